"""A saved adapter with its backbone as one graph that needs neither this library nor, as ONNX, torch."""

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._version import __version__
from restuning.backbones.sites import Sites
from restuning.data import Items, Preprocess, Reading, Texts, Tokenise, load_images, load_task, prepared
from restuning.errors import CheckpointError, MissingExtra, RestuningError, line
from restuning.hooks.law import Attachment, group_by_site
from restuning.hooks.points import backbone_lock
from restuning.hooks.taps import tap
from restuning.model.adapter import Reader
from restuning.model.tuned import Tuned
from restuning.runs.load import load_several, transform_of
from restuning.runs.settings import RUN, read_run
from restuning.side.features import FeatureRequest, Features
from restuning.training.evaluate import loader
from restuning.utils.files import as_json

SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx"}
"""Of the files, by format."""
ABOUT = "export.json"
TOLERANCE = 1e-4

Call = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""A graph as it was written: its inputs by name → its outputs."""


class Graph(nn.Module):
    """One adapter and its backbone as a function of the inputs alone, as it is traced.

    Args:
        names: of the inputs, if they are several; none: one tensor.
    """

    def __init__(self, tuned: Tuned, name: str, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.backbone, self.reader, self.names = tuned.backbone, tuned.reader(name), tuple(names)
        self._sites: Sites = tuned.sites

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs (b, …) → logits (b, c), or (b, n, c) of every token."""
        reader: Reader = self.reader
        adapter = reader.adapter
        added = group_by_site((site, "", tuner) for site, tuner in (*adapter.inside, *adapter.in_tail))
        with (
            backbone_lock(self.backbone),
            Attachment(self.backbone, self._sites, added).on(),
            tap(self.backbone, self._sites, adapter.request) as taps,
        ):
            _run(self.backbone, inputs, self.names)
            return reader.read(taps.features)


class FeatureGraph(nn.Module):
    """The frozen backbone alone, from its inputs to what several adapters read of it."""

    def __init__(self, tuned: Tuned, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.backbone, self.names = tuned.backbone, tuple(names)
        self._sites, self._request = tuned.sites, tuned.request

    def features(self, *inputs: Tensor) -> Features:
        """Inputs (b, …) → features."""
        with backbone_lock(self.backbone), tap(self.backbone, self._sites, self._request) as taps:
            _run(self.backbone, inputs, self.names)
            return taps.features

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The features that are no inputs themselves."""
        return tuple(x for x in self.features(*inputs).tensors() if not any(x is given for given in inputs))


class TaskGraph(nn.Module):
    """One adapter that leaves the backbone as it is: from features to its outputs.

    Args:
        name: of the adapter.
        like: the features that it will be given, of any batch.
    """

    def __init__(self, tuned: Tuned, name: str, like: Features) -> None:
        super().__init__()
        self.reader, self._like, self._base = tuned.reader(name), like, (tuned.backbone, tuned.sites)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Features' tensors in their order → logits (b, c), or (b, n, c) of every token."""
        reader: Reader = self.reader
        rest = iter(tensors)
        features = self._like.map(lambda _: next(rest))
        backbone, sites = self._base
        added = group_by_site((site, "", tuner) for site, tuner in reader.adapter.in_tail)
        with backbone_lock(backbone), Attachment(backbone, sites, added).on():
            return reader.read(reader.select(features))


def _run(backbone: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> None:
    backbone(**dict(zip(names, inputs, strict=True))) if names else backbone(*inputs)


def export(
    folder: Path | Sequence[Path],
    out: Path,
    format: str = "onnx",
    weights: str | None = None,
    inputs: str | None = None,
    apart: bool = False,
) -> dict[str, Any]:
    """Write a saved adapter with its backbone as one graph: `model.onnx` or `model.pt2`, and `export.json` beside it
    with the preprocessing and the classes. The graph takes any number of items (and texts of any length); it has been
    compared with the model on real inputs before anything is written.

    Several adapters, or one with `apart`, become several graphs: `backbone.onnx` from the inputs to the features, once,
    and `tasks/NAME.onnx` from the features to the outputs for each adapter, named by its folder.

    Args:
        folder: of the saved adapter, or several of one backbone.
        out: a folder that is not there yet.
        format: a key of SUFFIXES.
        weights: the backbone's, if not those of its run.json.
        inputs: an image, a folder of images, or a .txt of texts to compare on; None: what the run was tested on, else
            made-up ones.
        apart: graphs of their own for the backbone and for each adapter.

    Returns:
        What export.json holds.

    Raises:
        RestuningError: for a folder that is there, and a model that cannot be traced or whose graph gives other
        numbers; for adapters that tune the backbone inside, where graphs are to be apart.
    """
    if format not in SUFFIXES:
        raise RestuningError(f"unknown format {format!r}: expected one of {', '.join(SUFFIXES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RestuningError(f"{out} is there already: choose another folder")
    if format == "onnx":
        _onnxruntime()
    folders = [folder] if isinstance(folder, Path) else list(folder)
    apart = apart or len(folders) > 1
    tuned, names = _load(folders, weights, apart)
    config = tuned.adapter_config("default")
    how = transform_of(folders[0], config.preprocessing)
    items, where = _items(folders[0], how, inputs, config.kind == "per-token")
    batch = next(iter(loader(prepared(items, how, cache=False), min(len(items), 4))))[0]
    given = {str(k): v for k, v in batch.items()} if isinstance(batch, Mapping) else {"pixels": batch}
    keys = tuple(given) if isinstance(batch, Mapping) else ()
    tokens = next(iter(given.values())).shape[1] if isinstance(how, Tokenise) else None
    logits = {}
    for name in names:
        tuned.set_adapter(name)
        with torch.no_grad():
            logits[name] = tuned(**given) if keys else tuned(batch)
    tuned.set_adapter(list(names))
    about: dict[str, Any] = {
        "restuning_version": __version__,
        "format": format,
        "backbone": config.backbone.get("name"),
        "preprocessing": how.to_dict(),
    }
    files: dict[str, bytes] = {}

    def add(name: str, graph: nn.Module, read: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Any]:
        file = name + SUFFIXES[format]
        files[file], worst = _checked(graph.eval(), read, found, format, tokens)
        return {
            "file": file,
            "inputs": {key: {"shape": _shape(x, tokens), "dtype": str(x.dtype)[6:]} for key, x in read.items()},
            "outputs": list(found),
            "checked": {"on": where, "items": len(logits["default"]), "largest_difference": worst},
        }

    if not apart:
        about |= add("model", Graph(tuned, "default", keys), given, {"logits": logits["default"]})
        about |= _classes(tuned, "default")
    else:
        graph = FeatureGraph(tuned, keys)
        with torch.no_grad():
            features = graph.features(*given.values())
        read = dict(zip(_names(features, given), features.tensors(), strict=True))
        about["features"] = add("backbone", graph, given, {k: x for k, x in read.items() if k not in given})
        about["tasks"] = {}
        for name, path in names.items():
            part = _part(features, tuned.adapter(name).request)
            own = {key: x for key, x in read.items() if any(x is one for one in part.tensors())}
            one = add(f"tasks/{path.name}", TaskGraph(tuned, name, part), own, {"logits": logits[name]})
            about["tasks"][path.name] = one | _classes(tuned, name)
    _write(out, {**files, ABOUT: as_json(about)})
    return about


def _load(folders: Sequence[Path], weights: str | None, apart: bool) -> tuple[Tuned, dict[str, Path]]:
    """Raises RestuningError where graphs apart cannot be, or would share a name."""
    tuned, names = load_several(folders, weights)
    stems = [path.resolve().name for path in folders]
    if double := {stem for stem in stems if stems.count(stem) > 1}:
        raise RestuningError(f"two adapters in folders named {double.pop()}: a graph has its folder's name")
    for name, path in names.items() if apart else ():
        if not tuned.adapter(name).reads_features:
            raise RestuningError(f"{path} tunes inside the backbone: export it alone, as one graph")
    return tuned.eval().requires_grad_(False), {name: path.resolve() for name, path in names.items()}


def _classes(tuned: Tuned, name: str) -> dict[str, Any]:
    config = tuned.adapter_config(name)
    return {"kind": config.kind, "classes": None if config.classes is None else list(config.classes)}


def _part(features: Features, request: FeatureRequest) -> Features:
    """The layers that are asked for, all their tokens, and the rest where it is read."""
    return replace(
        features,
        layers={layer: features.layers[layer] for layer in request.layers},
        mask=features.mask if request.mask or request.tokens.by_mask else None,
        pixels=features.pixels if request.pixels else None,
    )


def _names(features: Features, inputs: Mapping[str, Tensor]) -> list[str]:
    """Of the features' tensors: an input's own name where it is handed through."""
    names = [f"layer_{layer}" for layer in sorted(features.layers)]
    names += [name for name in ("mask", "pixels") if getattr(features, name) is not None]
    same = [[key for key, given in inputs.items() if given is x] for x in features.tensors()]
    return [(keys or [name])[0] for name, keys in zip(names, same, strict=True)]


def _checked(
    graph: nn.Module, read: Mapping[str, Tensor], expected: Mapping[str, Tensor], format: str, tokens: int | None
) -> tuple[bytes, float]:
    """The graph as it is written, and by how much it differs from what is expected of it.

    Raises RestuningError for one that is not the model.
    """
    data, call = (_onnx if format == "onnx" else _torch_export)(graph, read, list(expected), tokens)
    worst = 0.0
    for rows in (len(next(iter(read.values()))), 1):
        for found, wanted in zip(call({k: x[:rows] for k, x in read.items()}), expected.values(), strict=True):
            wanted = wanted[:rows]
            if found.shape != wanted.shape:
                raise RestuningError(f"the graph gives {tuple(found.shape)}, the model {tuple(wanted.shape)}")
            worst = max(worst, float(((found - wanted).abs() / (1 + wanted.abs())).max()))
    if not worst <= TOLERANCE:
        raise RestuningError(f"the graph is not the model: they differ by {worst:.2g}, expected {TOLERANCE:g} at most")
    return data, worst


def _shape(x: Tensor, tokens: int | None) -> list[Any]:
    return ["batch", *(["tokens", *x.shape[2:]] if _of_tokens(x, tokens) else x.shape[1:])]


def _of_tokens(x: Tensor, tokens: int | None) -> bool:
    """Whether the second axis is that of a text's tokens."""
    return tokens is not None and x.ndim > 1 and x.shape[1] == tokens


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """All of them, or nothing."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            for name, data in files.items():
                (made / name).parent.mkdir(exist_ok=True)
                (made / name).write_bytes(data)
            made.chmod(0o755)
            os.replace(made, out)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise RestuningError(f"cannot write to {out}: {error.strerror or error}") from error


def _items(folder: Path, how: Reading, given: str | None, by_word: bool) -> tuple[Items, str]:
    """Items to compare on, and where they are from."""
    from restuning.runs.predict import texts_of

    if given is not None:
        return (load_images(Path(given)) if isinstance(how, Preprocess) else texts_of(given, by_word)), given
    if (folder / RUN).exists():
        try:
            run = read_run(folder / RUN)
            return load_task(run.data, test_size=run.test_size).test, run.data
        except RestuningError:  # its data are elsewhere
            pass
    if isinstance(how, Tokenise):
        texts: list[tuple[Any, ...]] = [("some words to read",), ("fewer words",), ("these are a few words more",)]
        texts = [(text.split(),) for (text,) in texts] if by_word else texts
        return Texts(texts, [list(range(len(t[0]))) if by_word else 0 for t in texts], ["a", "b", "c"]), "made-up texts"
    return _Noise(), "made-up images"


class _Noise(Items):
    def __init__(self) -> None:
        self.names, self.labels = [f"noise {i}" for i in range(3)], [0] * 3

    def item(self, i: int) -> Any:
        from PIL import Image

        pixels = torch.randint(256, (24, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        return Image.fromarray(pixels.numpy()).resize((96, 72))


def _traced(graph: nn.Module, read: Mapping[str, Tensor], tokens: int | None) -> Any:
    """By torch.export, for any number of items, and of tokens where these are `tokens` many."""
    batch = torch.export.Dim("batch", min=1, max=65_536)
    shapes = tuple(
        {0: batch, 1: torch.export.Dim.DYNAMIC} if _of_tokens(x, tokens) else {0: batch} for x in read.values()
    )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(graph, tuple(read.values()), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise CheckpointError(f"this model cannot be traced by torch.export: {line(error)}") from error


def _several(found: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found


def _torch_export(
    graph: nn.Module, read: Mapping[str, Tensor], outputs: Sequence[str], tokens: int | None
) -> tuple[bytes, Call]:
    program = _traced(graph, read, tokens)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt2"
        torch.export.save(program, file)
        data = file.read_bytes()
        loaded = torch.export.load(file).module()
    return data, lambda inputs: _several(loaded(*inputs.values()))


def _onnx(
    graph: nn.Module, read: Mapping[str, Tensor], outputs: Sequence[str], tokens: int | None
) -> tuple[bytes, Call]:
    runtime = _onnxruntime()
    program = _traced(graph, read, tokens)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # a line for every operation that it leaves as it is
        file = Path(folder) / "model.onnx"
        try:
            made = torch.onnx.export(
                program, input_names=list(read), output_names=outputs, dynamo=True, verbose=False, optimize=True
            )
            assert made is not None
            made.save(file, external_data=False)
        except Exception as error:
            raise CheckpointError(f"this model cannot be written as ONNX: {line(error)}") from error
        data = file.read_bytes()
    try:
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"onnxruntime does not read the graph: {line(error)}") from error
    used = {one.name for one in session.get_inputs()}  # a graph has those alone that it reads

    def call(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = session.run(list(outputs), {name: x.numpy() for name, x in inputs.items() if name in used})
        return [torch.from_numpy(x) for x in found]

    return data, call


def _onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(str(error.name or "onnxruntime"), "export") from error
    return onnxruntime
