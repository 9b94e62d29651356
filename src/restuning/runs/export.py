"""A saved adapter with its backbone as one graph that needs neither this library nor, as ONNX, torch."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
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
from restuning.runs.load import load_tuned, transform_of
from restuning.runs.settings import RUN, read_run
from restuning.training.evaluate import loader
from restuning.utils.files import as_json

FORMATS = {"torch-export": "model.pt2", "onnx": "model.onnx"}
ABOUT = "export.json"
TOLERANCE = 1e-4


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
            if self.names:
                self.backbone(**dict(zip(self.names, inputs, strict=True)))
            else:
                self.backbone(*inputs)
            return reader.read(taps.features)


def export(
    folder: Path, out: Path, format: str = "onnx", weights: str | None = None, inputs: str | None = None
) -> dict[str, Any]:
    """Write a saved adapter with its backbone as one graph: `model.onnx` or `model.pt2`, and `export.json` beside it
    with the preprocessing and the classes. The graph takes any number of items (and texts of any length); it has been
    compared with the model on real inputs before anything is written.

    Args:
        folder: of the saved adapter.
        out: a folder that is not there yet.
        format: a key of FORMATS.
        weights: the backbone's, if not those of its run.json.
        inputs: an image, a folder of images, or a .txt of texts to compare on; None: what the run was tested on, else
            made-up ones.

    Returns:
        What export.json holds.

    Raises:
        RestuningError: for a folder that is there, and a model that cannot be traced or whose graph gives other
        numbers.
    """
    if format not in FORMATS:
        raise RestuningError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RestuningError(f"{out} is there already: choose another folder")
    if format == "onnx":
        _onnxruntime()
    tuned = load_tuned(folder, weights)
    tuned.eval().requires_grad_(False)
    config = tuned.adapter_config()
    how = transform_of(folder, config.preprocessing)
    items, where = _items(folder, how, inputs, config.kind == "per-token")
    batch = next(iter(loader(prepared(items, how, cache=False), min(len(items), 4))))[0]
    named = {str(k): v for k, v in batch.items()} if isinstance(batch, Mapping) else {"pixels": batch}
    graph = Graph(tuned, "default", tuple(named) if isinstance(batch, Mapping) else ()).eval()
    with torch.no_grad():
        expected = tuned(**named) if isinstance(batch, Mapping) else tuned(batch)
    data, call = (_onnx if format == "onnx" else _torch_export)(graph, named)
    worst = 0.0
    for rows in (len(expected), 1):
        found = call({name: x[:rows] for name, x in named.items()})
        if found.shape != expected[:rows].shape:
            raise RestuningError(f"the graph gives {tuple(found.shape)}, the model {tuple(expected[:rows].shape)}")
        worst = max(worst, float(((found - expected[:rows]).abs() / (1 + expected[:rows].abs())).max()))
    if not worst <= TOLERANCE:
        raise RestuningError(f"the graph is not the model: they differ by {worst:.2g}, expected {TOLERANCE:g} at most")
    about = {
        "restuning_version": __version__,
        "format": format,
        "file": FORMATS[format],
        "backbone": config.backbone.get("name"),
        "kind": config.kind,
        "classes": None if config.classes is None else list(config.classes),
        "inputs": {name: {"shape": ["batch", *_shape(x)], "dtype": str(x.dtype)[6:]} for name, x in named.items()},
        "outputs": ["logits"],
        "preprocessing": how.to_dict(),
        "checked": {"on": where, "items": len(expected), "largest_difference": worst},
    }
    _write(out, {FORMATS[format]: data, ABOUT: as_json(about)})
    return about


def _shape(x: Tensor) -> list[Any]:
    return ["tokens"] if x.ndim == 2 else list(x.shape[1:])


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """All of them, or nothing."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            for name, data in files.items():
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


def _dynamic(named: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Any number of items; of texts, any number of tokens."""
    auto = torch.export.Dim.DYNAMIC
    batch = torch.export.Dim("batch", min=1, max=65_536)
    return (tuple({0: batch, 1: auto} if x.ndim == 2 else {0: batch} for x in named.values()),)


def _traced(graph: Graph, named: Mapping[str, Tensor]) -> Any:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(graph, tuple(named.values()), dynamic_shapes=_dynamic(named), strict=False)
    except Exception as error:
        raise CheckpointError(f"this model cannot be traced by torch.export: {line(error)}") from error


def _torch_export(graph: Graph, named: Mapping[str, Tensor]) -> tuple[bytes, Any]:
    program = _traced(graph, named)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FORMATS["torch-export"]
        torch.export.save(program, file)
        data = file.read_bytes()
        loaded = torch.export.load(file).module()
    return data, lambda inputs: loaded(*inputs.values())


def _onnx(graph: Graph, named: Mapping[str, Tensor]) -> tuple[bytes, Any]:
    runtime = _onnxruntime()
    program = _traced(graph, named)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / FORMATS["onnx"]
        try:
            made = torch.onnx.export(
                program, input_names=list(named), output_names=["logits"], dynamo=True, verbose=False, optimize=True
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

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])

    return data, call


def _onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(str(error.name or "onnxruntime"), "export") from error
    return onnxruntime
