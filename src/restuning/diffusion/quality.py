"""How near painted pictures are to real ones, and to their prompts: by torchmetrics, with weights that are here."""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning.backbones.load import check_finite, load_backbone, read_state_dict, reading_of
from restuning.data import Preprocess
from restuning.data.captioned import Square
from restuning.data.captions import load_captions
from restuning.data.folder import load_images
from restuning.errors import CheckpointError, DataError, MissingExtra, RestuningError, line
from restuning.model.tuned import adapt
from restuning.utils.hub import remote_code
from restuning.utils.reading import open_regular, parse_json

INCEPTION = "inception:"


def score(
    generated: Path, real: str, *, features: str, weights: str | None = None, clip: str | None = None
) -> dict[str, Any]:
    """The Fréchet and the kernel distance of a folder of pictures to real ones, and their CLIP score.

    real: captioned pictures (`restuning.data.captions`), cut to squares of that size. features: `inception:FILE`
    (FID and KID as published, on torch-fidelity's Inception weights), or any backbone of images that `load_backbone`
    knows, with `weights`: then both are distances of that backbone's pooled features. clip: a folder with a CLIP model;
    prompts are read from the pictures. Raises DataError for fewer than 2 pictures and for pictures of several adapters
    (a folder that `restuning generate` painted with one is what can be scored), RestuningError for weights that are not
    there.
    """
    net = _net(features, weights)
    painted, data = load_images(generated), load_captions(real)
    if min(len(painted), len(data)) < 2:
        raise DataError(f"{len(painted)} pictures and {len(data)} real ones: expected 2 of each at least")
    images = [painted.item(i) for i in range(len(painted))]
    texts = [_texts_of(name) for name in painted.names]
    by = sorted({_adapter(text, name) for text, name in zip(texts, painted.names, strict=True)})
    if len(by) > 1:
        raise DataError(f"{generated} holds pictures of several adapters ({', '.join(by)}): expected those of one")
    square = Square(images[0].width)
    found = distances(seen(net, images), seen(net, (_image(square(data.image(i))) for i in range(len(data)))))
    result: dict[str, Any] = {"pictures": len(painted), "real": len(data), "features": features, **found}
    if clip is not None:
        prompts = [_prompt(text, name) for text, name in zip(texts, painted.names, strict=True)]
        result["clip_score"] = clip_score(clip, images, prompts)
    return result


def distances(painted: Tensor, real: Tensor) -> dict[str, float]:
    """`fid` (Heusel et al. 2017) and `kid` (Bińkowski et al. 2018; unbiased, may be below 0) of features (n, d) and
    (m, d). With no more pictures than features, the Fréchet distance is that of singular covariances."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise MissingExtra("torchmetrics", "diffusion") from error
    given: Any = nn.Identity()
    given.num_features = painted.shape[1]
    size = min(len(painted), len(real))
    subsets = {"subsets": 1, "subset_size": size} if size <= 1000 else {"subsets": 100, "subset_size": 1000}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)  # which pictures are in a subset
        warnings.filterwarnings("ignore", ".*save all extracted features in buffer.*")
        fid, kid = FrechetInceptionDistance(given).double(), KernelInceptionDistance(given, **subsets)
        fid.set_dtype(torch.float64)
        for metric in (fid, kid):
            metric.update(painted.double(), real=False)
            metric.update(real.double(), real=True)
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}


@torch.no_grad()
def seen(net: Callable[[Sequence[Any]], Tensor], images: Any, batch_size: int = 32) -> Tensor:
    """Features (n, d) of PIL images."""
    images = list(images)
    return torch.cat([net(images[i : i + batch_size]) for i in range(0, len(images), batch_size)])


@torch.no_grad()
def clip_score(path: str, images: Sequence[Any], prompts: Sequence[str], batch_size: int = 32) -> float:
    """The mean of 100 · cos(image, prompt), not below 0 (Hessel et al. 2021). Longer prompts than it reads are cut."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise MissingExtra("transformers", "diffusion") from error
    if not Path(path).is_dir():
        raise RestuningError(f"no CLIP model at {path}: expected a folder that transformers loads")
    try:
        model, processor = CLIPModel.from_pretrained(path).eval(), CLIPProcessor.from_pretrained(path, **remote_code())
    except Exception as error:
        raise RestuningError(f"{path} holds no CLIP model: {line(error)}") from error
    found = []
    for i in range(0, len(images), batch_size):
        texts, some = list(prompts[i : i + batch_size]), list(images[i : i + batch_size])
        output = model(**processor(text=texts, images=some, return_tensors="pt", padding=True, truncation=True))
        found.append((output.image_embeds * output.text_embeds).sum(-1).clamp(min=0))
    return float(100 * torch.cat(found).mean())


def _net(features: str, weights: str | None) -> Callable[[Sequence[Any]], Tensor]:
    if features.startswith(INCEPTION):
        path = features.removeprefix(INCEPTION)
        if not Path(path).is_file():
            raise RestuningError(f"no Inception weights at {path}: expected torch-fidelity's weights-inception file")
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            # the package unpickles whatever its file holds: it is given a file of ours, of tensors alone
            state = read_state_dict(Path(path))
            check_finite(state, path)
            with tempfile.TemporaryDirectory() as folder:
                safe = Path(folder) / "inception.pth"
                torch.save(state, safe)
                net: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(safe))
        except ModuleNotFoundError as error:
            raise MissingExtra("torch-fidelity", "diffusion") from error
        except CheckpointError:
            raise
        except Exception as error:
            raise RestuningError(f"{path} holds no Inception weights: {line(error)}") from error
        return lambda images: net(torch.stack([_pixels(image) for image in _alike(images)])).flatten(1)
    backbone = load_backbone(features, weights)
    how, tuned = reading_of(backbone), adapt(backbone, "linear")
    if not isinstance(how, Preprocess):
        raise RestuningError(f"{features} reads texts: expected a backbone of images")
    return lambda images: tuned(torch.stack([how(image) for image in images]))


def _alike(images: Sequence[Any]) -> Sequence[Any]:
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise DataError(f"pictures of several sizes ({sizes[0]} and {sizes[-1]} pixels): Inception reads those of one")
    return images


def _pixels(image: Any) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def _image(pixels: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def _texts_of(path: str) -> dict[str, str]:
    """A PNG's own words."""
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file) as image:
            return {str(k): str(v) for k, v in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image: {line(error)}") from error


def _adapter(texts: Mapping[str, str], path: str) -> str:
    """Which adapter generated it: `base` for none, `none` where the picture says nothing of it."""
    if "restuning" not in texts:
        return "none"
    try:
        found = parse_json(texts["restuning"])["adapter"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: its text 'restuning' is not what `restuning generate` writes") from error
    if not isinstance(found, str):
        raise DataError(f"{path}: its text 'restuning' names no adapter")
    return found or "base"


def _prompt(texts: Mapping[str, str], path: str) -> str:
    if "prompt" not in texts:
        raise DataError(f"{path} says nothing of its prompt: CLIP scores are for pictures of `restuning generate`")
    return texts["prompt"]
