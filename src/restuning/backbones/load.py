"""Frozen backbones by name: the bundled one, timm's, transformers'; their weights from a file, a hub, or none."""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning.backbones.sites import find_sites, tower_of
from restuning.data import Preprocess, Reading, Tokenise
from restuning.errors import CheckpointError, DataError, MissingExtra, RestuningError, SiteError, TowersError, line
from restuning.utils.hub import MINILM, HubId, hub, located, packaged, remote_code
from restuning.utils.hub import trust_remote_code as trusting
from restuning.utils.reading import check_regular

MICRO = "restuning-micro"
STAGES = "resnet18-stages"
_ASSETS = Path(__file__).parent / "assets"
MOST_PIXELS = 16_384
"""The longest side of an image that a backbone is made for."""


def load_backbone(
    name: str,
    weights: str | Path | None = None,
    image_size: int | None = None,
    *,
    tower: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A backbone without its classifier, in eval mode.

    name: `restuning-micro` (bundled), a timm model such as `vit_base_patch16_224` or `convnext_base`, `hf:` and a
    transformers folder or `hub:owner/name[@revision]`, `all-MiniLM-L6-v2`, a text encoder, from the package that holds
    it, or `resnet18-stages`, a ResNet-18 of three stages with its batch norms folded into its convolutions. weights: a
    safetensors or state-dict file; `"random"`: none; None: pretrained (bundled, or from the hub). image_size: pixels a
    side, if other than the model's own (position embeddings are interpolated; convolutions see any size). tower: of a
    model with several (CLIP, SigLIP, an encoder with a decoder), the path of the one that is meant; `hf:FOLDER#TOWER`
    says the same. trust_remote_code: whether a transformers folder's own Python code may run.
    Raises SiteError for an unknown name, TowersError for several towers of which none is named, CheckpointError for
    weights that do not fit or cannot be had.
    """
    if image_size is not None and not 1 <= image_size <= MOST_PIXELS:
        raise RestuningError(f"image size {image_size}: expected a number of pixels from 1 to {MOST_PIXELS}")
    if not name or "\0" in name:
        raise SiteError(f"{name!r} is no name of a backbone: expected {MICRO}, a timm model or hf:FOLDER")
    name = name if tower is None else f"{name}#{tower}"
    if name.startswith("hf:") or name == MINILM:
        with trusting(trust_remote_code) if trust_remote_code else nullcontext():
            backbone = _transformers(name.removeprefix("hf:"), weights)
    elif name == MICRO:
        backbone = _micro()
        _load(backbone, _ASSETS / f"{MICRO}.safetensors" if weights is None else weights)
    elif name == STAGES:
        if weights is None:
            raise CheckpointError(f"{STAGES} has no weights of its own: give a file with weights=, or weights='random'")
        backbone = _stages()
        _load(backbone, weights)
    else:
        backbone = _timm(name, pretrained=weights is None)
        _load(backbone, "random" if weights is None else weights)
    if image_size is not None:
        _resize(backbone, image_size)
    return backbone.eval()


def describe_backbone(name: str) -> nn.Module:
    """The same backbone on the meta device: names, shapes and counts, no weights loaded and no memory used. Beside
    those names, `roberta-base`, and `sd-v1-5`, Stable Diffusion's U-Net."""
    if torch.__version__ < "2.12":  # torchvision loads torch's compiler, which 2.8 cannot load under another device
        import_module("torch._dynamo")
    with torch.device("meta"):
        if name in SHAPES:
            return SHAPES[name]()
        if name in (MICRO, STAGES):
            return _micro() if name == MICRO else _stages()
        hub_like = name.startswith("hf:") or name == MINILM
        return _transformers(name.removeprefix("hf:"), "random") if hub_like else _timm(name, False)


def _roberta() -> nn.Module:
    try:
        from transformers import RobertaConfig, RobertaModel
    except ImportError as error:
        raise MissingExtra("transformers", "transformers") from error
    model: nn.Module = RobertaModel(RobertaConfig(), add_pooling_layer=False)
    return model


def _unet() -> nn.Module:
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise MissingExtra("diffusers", "diffusion") from error
    unet: nn.Module = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return unet


SHAPES: dict[str, Callable[[], nn.Module]] = {"roberta-base": _roberta, "sd-v1-5": _unet}
"""Backbones that are told by their shapes alone."""


def reading_of(
    backbone: nn.Module,
    image_size: int | None = None,
    crop: bool = False,
    tokenizer: str | None = None,
    max_length: int | None = None,
) -> Reading:
    """How the backbone reads its items: images as `preprocessing_of` has it, texts by its own (or the named) tokenizer.

    max_length: tokens that texts are cut to; None: texts longer than it reads are refused.
    """
    if find_sites(backbone).anatomy.family != "text":
        if tokenizer is not None or max_length is not None:
            raise RestuningError(f"{type(backbone).__name__} reads images: a tokenizer and a max length are for texts")
        return preprocessing_of(backbone, image_size, crop)
    if image_size is not None or crop:
        raise RestuningError(f"{type(backbone).__name__} reads texts: an image size and a crop are for images")
    config: Any = backbone.config
    pad, places = config.pad_token_id, ("max_position_embeddings", "n_positions")
    limit = int(next((n for name in places if (n := getattr(config, name, None))), 512))
    first = getattr(getattr(backbone, "embeddings", None), "padding_idx", None)
    if config.model_type in OFFSET and first is not None:
        limit -= first + 1
    return Tokenise(
        tokenizer or str(config._name_or_path).partition("#")[0], limit, int(config.vocab_size), pad, max_length
    )


OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
"""Models whose positions begin after the padding id."""


def preprocessing_of(backbone: nn.Module, image_size: int | None = None, crop: bool = False) -> Preprocess:
    """How the backbone's own configuration wants its images: size, mean, standard deviation, interpolation.

    The whole image is resized to the size, as in VTAB-1k's protocol, unless `crop` asks for the configured centre crop.
    """
    timm, config = getattr(backbone, "pretrained_cfg", None), getattr(backbone, "config", None)
    if isinstance(timm, Mapping):
        side = image_size or int(timm["input_size"][-1])
        return Preprocess(
            size=(side, side),
            mean=tuple(timm["mean"]),
            std=tuple(timm["std"]),
            interpolation=str(timm["interpolation"]),
            crop=float(timm.get("crop_pct") or 1.0) if crop else None,
        )
    side = image_size or int(getattr(config, "image_size", 224))
    how, half = _processor(str(getattr(config, "_name_or_path", "")).partition("#")[0]), (0.5, 0.5, 0.5)
    resample = how.get("resample", 3)
    named = {
        "size": (side, side),
        "mean": how.get("image_mean") or half,
        "std": how.get("image_std") or half,
        "interpolation": RESAMPLE.get(resample, "bicubic") if isinstance(resample, int) else "bicubic",
        "crop": 1.0 if crop else None,
    }
    try:
        return Preprocess.from_dict(named)
    except DataError as error:
        raise CheckpointError(f"the image processor of {getattr(config, '_name_or_path', '')}: {error}") from error


RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""As Pillow counts them."""


def _processor(path: str) -> dict[str, Any]:
    """transformers' image processor beside the weights, as data; nothing where there is none. Raises CheckpointError
    for one that cannot be read."""
    if not path:
        return {}
    from transformers.image_processing_utils import BaseImageProcessor

    local = Path(path).is_dir()
    try:
        where = located(path)
        name, at = (where.repo, where.revision) if isinstance(where, HubId) else (path, None)
        with nullcontext() if local else hub():
            found = BaseImageProcessor.get_image_processor_dict(name, revision=at)[0]
        if not isinstance(found, dict):
            raise TypeError(f"expected a JSON object, found {str(found)[:40]!r}")
        return found
    except CheckpointError:
        return {}
    except Exception as error:
        if local and any((Path(path) / name).exists() for name in PROCESSORS):
            raise CheckpointError(f"{path}: the image processor cannot be read: {line(error)}") from error
        return {}


PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def _micro() -> nn.Module:
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise MissingExtra("timm", "timm") from error
    config = json.loads((_ASSETS / f"{MICRO}.json").read_text(encoding="utf-8"))
    model: nn.Module = VisionTransformer(**config["architecture"])
    side = config["architecture"]["img_size"]
    model.pretrained_cfg = {  # type: ignore[assignment]  # as timm's own builders leave it
        "architecture": MICRO,
        "input_size": (3, side, side),
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
    }
    return model


def _stages() -> nn.Module:
    """timm's ResNet-18 without its last stage, whose convolutions have biases and whose norms are none."""
    model: Any = _timm("resnet18", False, norm_layer=lambda *_, **__: nn.Identity(), zero_init_last=False)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    model.layer4, model.num_features = nn.Identity(), model.layer3[-1].conv2.out_channels
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": STAGES}
    return model  # type: ignore[no-any-return]


def _timm(name: str, pretrained: bool, **settings: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra("timm", "timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [MICRO, STAGES, *timm.list_models()], 3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise SiteError(
            f"unknown backbone {name!r}: expected {MICRO}, a timm model, hf:FOLDER, {MINILM} or {STAGES}{hint}"
        )
    try:
        with hub() if pretrained else nullcontext():
            model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **settings)
    except Exception as error:
        if not pretrained:
            raise
        raise CheckpointError(
            f"the pretrained weights of {name} could not be had from the hub ({line(error)}): "
            "give a file with weights=, or weights='random'"
        ) from error
    return model


def _one_tower(model: nn.Module) -> nn.Module:
    """The model. Raises TowersError for one with a tower for images and one for texts."""
    both = tuple(name for name in ("vision_model", "text_model") if isinstance(getattr(model, name, None), nn.Module))
    if len(both) > 1:
        raise TowersError(type(model).__name__, both)
    return model


def _transformers(path: str, weights: str | Path | None) -> nn.Module:
    whole = path
    path, _, tower = path.partition("#")
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise MissingExtra("transformers", "transformers") from error
    found = located(packaged(path))
    remote = isinstance(found, HubId)
    folder, at = (found.repo, {"revision": found.revision}) if isinstance(found, HubId) else (str(found), {})
    if not remote:
        _check_folder(Path(folder))
    more: dict[str, Any] = {**at, **remote_code()}
    try:
        with _no_bar(), hub() if remote else nullcontext():
            if weights is None:
                model = AutoModel.from_pretrained(folder, **more)
            else:
                model = AutoModel.from_config(AutoConfig.from_pretrained(folder, **more), **remote_code())
    except Exception as error:  # of a damaged folder it can be anything
        raise CheckpointError(f"transformers cannot load {path!r}: {_why(error)}") from error
    if not getattr(model, "is_quantized", False):
        model.float()  # a scale that is one at initialisation cannot move in bfloat16: half precision is for autocast
    backbone: nn.Module = tower_of(model, tower) if tower else _one_tower(model)
    config: Any = getattr(backbone, "config", model.config)
    config._name_or_path = whole  # a packaged model is known by its name, wherever it is installed
    if weights is not None:
        _load(backbone, weights)
    return backbone


def _check_folder(folder: Path) -> None:
    """Files of a folder that transformers opens by itself are regular ones. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: expected one that transformers loads, with a config.json")
    for file in folder.iterdir():
        if not file.is_dir():
            try:
                check_regular(file)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def _why(error: BaseException) -> str:
    """transformers' own reason in one line; of code that is not to be run, how to say that it may."""
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        return "it has Python code of its own, which is not run: read it, then give --trust-remote-code"
    return line(error)


@contextmanager
def _no_bar() -> Iterator[None]:
    """While it lasts, transformers draws no bar for what is loaded in a moment."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _load(backbone: nn.Module, weights: str | Path) -> None:
    """Weights from a file, strictly, but for the classifier's. Raises CheckpointError that names the keys."""
    if weights == "random":
        return
    state = read_state_dict(Path(weights))
    expected = backbone.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not _classifier(key)}
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    other = sorted(k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape)
    if missing or extra or other:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", extra), ("of another shape", other))
            if keys
        ]
        raise CheckpointError(f"{weights} does not fit {type(backbone).__name__}: keys {'; '.join(parts)}")
    check_finite(state, str(weights))
    backbone.load_state_dict(state)


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError that names the first tensor with a value that is no finite number."""
    for key, value in state.items():
        if (value.is_floating_point() or value.is_complex()) and not bool(value.isfinite().all()):
            raise CheckpointError(f"{where}: {key} has values that are not finite")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict saved by torch (read without unpickling code)."""
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}: expected a .safetensors, .pt or .pth file")
    try:
        check_regular(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as weights: {line(error)}") from error
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict: expected names of tensors")
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path} holds no state dict: expected names of tensors")
    return dict(state)


def _classifier(key: str) -> bool:
    return key.split(".")[0] in {"head", "head_dist", "fc", "classifier"}


def _resize(backbone: nn.Module, image_size: int) -> None:
    if find_sites(backbone).anatomy.convolutional:
        try:
            with torch.no_grad():
                backbone.eval()(torch.zeros(1, 3, image_size, image_size))
        except RuntimeError as error:
            raise RestuningError(f"image size {image_size} does not fit the backbone: {line(error)}") from error
        return
    resize: Any = getattr(backbone, "set_input_size", None)
    if resize is None:
        raise RestuningError(f"{type(backbone).__name__} has a fixed input size: leave out the image size")
    patch = max(getattr(getattr(backbone, "patch_embed", None), "patch_size", (1,)))
    if image_size % patch:
        raise RestuningError(f"image size {image_size} does not fit the backbone: expected a multiple of {patch}")
    try:
        resize(img_size=(image_size, image_size))
    except (AssertionError, ValueError) as error:
        raise RestuningError(f"image size {image_size} does not fit the backbone: {line(error)}") from error
