"""Runs and banks: build one by names, and the settings that one decides."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch

from restuning.backbones.load import MICRO, load_backbone, reading_of
from restuning.data import Reading, Task, Tokenise, load_task, prepared
from restuning.errors import RestuningError
from restuning.features.bank import Bank, build
from restuning.features.bank.build import Builder, Piece, bytes_kept, seconds_each
from restuning.features.bank.format import COMPONENTS, Shard
from restuning.methods.spec import Method
from restuning.model.tuned import Tuned, adapt
from restuning.runs.settings import Run
from restuning.side import Bypass, BypassQuery, LinearAll
from restuning.side.features import MEAN
from restuning.training.components import Components, fit_components, widths_of
from restuning.training.logging import bar
from restuning.utils.cluster import check_engine, on_ray
from restuning.utils.distributed import is_main_process, together, world_size
from restuning.utils.files import check_outside
from restuning.utils.hub import pinned
from restuning.utils.options import (
    BACKBONE,
    DATA,
    DTYPES,
    ImageSize,
    MaxLength,
    Option,
    TestSize,
    Tokenizer,
    TrainSize,
    ValSize,
    Weights,
)

READS = ("image_size", "crop", "tokenizer", "max_length")
"""Settings of how items are read."""


def from_bank(path: str | Path) -> dict[str, Any]:
    """The settings of a run that a bank decides: data, what of it is tested on, and backbone, as they were when it was
    built."""
    manifest = Bank(path, verify=False).manifest
    if "source" not in manifest:
        raise RestuningError(f"{path} does not say how it was made: it was built in Python, and is read there")
    sizes = {"test_size": manifest.get("test_size")}
    return {"data": manifest["data"]["spec"], "bank": str(path), **sizes, **manifest["source"]}


def _agree(run: Run, bank: str) -> None:
    """Raises RestuningError for settings that a bank decides, and that are others here."""
    held = from_bank(bank)
    other = next((name for name, value in held.items() if getattr(run, name) != value), None)
    if other is not None:
        raise RestuningError(f"{bank} is of {other} {held[other]!r}: leave out {getattr(run, other)!r}")
    if run.augment:
        raise RestuningError(f"{bank} holds features: augmented ones are built by restuning bank --views")


@dataclass(frozen=True)
class BankSettings:
    """What a bank is of.

    tokens: `first`, `last`, `all`, `mean` (where there is no CLS beside patches), g for CLS and a g × g grid, `pooled`
    (what linear-all reads), `int8` (all tokens, each quantised), or `pca:K` and `pca:K:FILE` (K components of every
    token, fitted on the training items or taken from a file, and what is pooled); None: what the backbone's pooling
    sees.
    """

    data: Annotated[str, Option(DATA)]
    backbone: Annotated[str, Option(BACKBONE)] = MICRO
    weights: Weights = None
    image_size: ImageSize = None
    tokenizer: Tokenizer = None
    max_length: MaxLength = None
    crop: Annotated[bool, Option("the backbone's centre crop, not the whole image")] = False
    tokens: Annotated[
        str | None,
        Option(
            "first, last, mean, all, int8 (all, quantised), G for CLS and a G x G grid, pooled (of linear-all), "
            "or pca:K[:FILE], K components of every token, fitted or from a file (default: what the pooling sees)"
        ),
    ] = None
    dtype: Annotated[str, Option("of the features", choices=(*DTYPES, "float64"))] = "float32"
    views: Annotated[int, Option("augmented views of each training image", metavar="K")] = 1
    train_size: TrainSize = None
    val_size: ValSize = 0
    test_size: TestSize = None
    batch_size: Annotated[int, Option()] = 32
    seed: Annotated[int, Option()] = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RestuningError(f"--batch-size {self.batch_size}: expected at least 1")


@dataclass(frozen=True)
class Parts:
    """What a bank is made of, loaded."""

    settings: BankSettings
    tuned: Tuned
    task: Task
    how: Reading
    dtype: str
    components: tuple[int, Path | None] | None  # how many, and of which file, where they are not fitted

    def builder(self, components: Components | None) -> Builder:
        s = self.settings
        options = {"dtype": self.dtype, "views": s.views, "seed": s.seed, "batch_size": s.batch_size}
        return Builder(self.tuned, self.task, self.how, components=components, **options)  # type: ignore[arg-type]


def build_bank(
    settings: BankSettings,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[int, int, float], None] | None = None,
    engine: str = "local",
    workers: int | None = None,
) -> dict[str, Any]:
    """Load the data and the backbone, and build a bank of all layers in `out` (see `restuning.features.bank.build`).
    Returns its manifest.

    Args:
        say: told the bytes of an item, how many there are, and the seconds that all will take by those of a first
            batch, before anything is written.
        engine: local, where the processes that `accelerate launch` has started share the work; or ray, where shards are
            jobs. workers: see `restuning.utils.cluster.on_ray`.
    """
    check_engine(engine, workers)
    read = Path(settings.data.partition("?")[0].split(":")[-1])
    check_outside(out, "the output folder", *([read] if str(read) != "." and read.is_dir() else []))
    settings = replace(settings, backbone=pinned(settings.backbone))
    parts = _loaded(settings)
    tuned, task = parts.tuned, parts.task
    train = prepared(task.train, parts.how, cache=False)
    components = None
    if parts.components is not None:
        count, file = parts.components
        there = out / COMPONENTS if resume and (out / COMPONENTS).exists() else file
        if there is None and together():
            raise RestuningError(f"tokens {settings.tokens!r}: several processes need a file of components, pca:K:FILE")
        components = Components.load(there) if there else fit_components(tuned, train, count, settings.batch_size)
        components.check(widths_of(tuned, tuned.request.layers), str(there))
        if components.count != count:
            raise RestuningError(f"{there} holds {components.count} components of a layer: expected {count}")
    if say is not None and is_main_process():
        items = len(task.train) * settings.views + len(task.val or ()) + len(task.test)
        each = bytes_kept(tuned, train, parts.dtype, components)
        seconds = seconds_each(tuned, train, parts.dtype, settings.batch_size, components)
        say(each, items, seconds * items / (workers or world_size()))
    run = partial(_on_ray, settings, out.absolute(), workers) if engine == "ray" else None
    with bar(100, progress and is_main_process()) as show:

        def seen(done: int, of: int) -> None:
            show(100 * done // of, f"{done} of {of}")

        reads = {name: getattr(settings, name) for name in READS}
        source = {"backbone": settings.backbone, "weights": settings.weights, **reads}
        return build(
            tuned,
            task,
            parts.how,
            out,
            dtype=parts.dtype,
            views=settings.views,
            seed=settings.seed,
            batch_size=settings.batch_size,
            about={"source": source, "test_size": settings.test_size},
            components=components,
            resume=resume,
            seen=seen,
            run=run,
        )


def _loaded(settings: BankSettings) -> Parts:
    """Data and backbone, on a GPU where there is one."""
    model = load_backbone(settings.backbone, settings.weights, settings.image_size)
    tokens, count, file = _components(settings.tokens)
    tokens, dtype = ("all", "int8") if tokens == "int8" else (tokens, settings.dtype)
    if tokens not in (None, "first", "last", "all", "mean", "pooled", "pca") and not tokens.isdecimal():
        raise RestuningError(
            f"tokens {tokens!r}: expected first, mean, all, last, pooled, int8, pca:K, or the cells a side of a grid"
        )
    how = reading_of(model, **{name: getattr(settings, name) for name in READS})
    grid = 1 if tokens == "mean" else int(tokens) if tokens is not None and tokens.isdecimal() else None
    # a mean over all tokens of a text has their mask kept too
    all_tokens = "cls+mean" if isinstance(how, Tokenise) else "none"
    pool = {"first": "cls", "last": "last", "all": all_tokens}.get(tokens or "")
    readers: dict[str, Method] = {"pooled": LinearAll(), "pca": BypassQuery()}
    reader = readers.get(tokens or "", Bypass(grid=grid))
    tuned = adapt(model, reader, pool=pool, backbone_name=settings.backbone)
    if tokens == "mean" and tuned.request.tokens != MEAN:
        raise RestuningError("tokens 'mean': this backbone has tokens before its patches; 1 keeps CLS and the mean")
    if torch.cuda.is_available():
        tuned.cuda()
    sizes = {k: getattr(settings, k) for k in ("train_size", "val_size", "test_size", "seed")}
    task = load_task(settings.data, **sizes)
    if task.kind == "per-token":
        raise RestuningError(f"{task.spec}: a bank keeps one label for each item, and these are by token")
    return Parts(settings, tuned, task, how, dtype, (count, file) if tokens == "pca" else None)


def _on_ray(settings: BankSettings, out: Path, workers: int | None, pieces: Sequence[Piece]) -> Iterator[Shard]:
    for _, found in on_ray(_piece, [(settings, out, piece) for piece in pieces], workers):
        if isinstance(found, RestuningError):
            raise RestuningError(f"{found}; the shards that are done are kept, continue with --resume")
        yield found


def _piece(settings: BankSettings, out: Path, piece: Piece) -> Shard:
    """On a worker."""
    return _builder(settings, out).shard(out, piece)


@lru_cache(1)
def _builder(settings: BankSettings, out: Path) -> Builder:
    parts = _loaded(settings)
    return parts.builder(Components.load(out / COMPONENTS) if parts.components is not None else None)


def _components(tokens: str | None) -> tuple[str | None, int, Path | None]:
    """`pca:K` or `pca:K:FILE` as ("pca", K, FILE); others as they are."""
    kind, _, rest = (tokens or "").partition(":")
    if kind != "pca":
        return tokens, 0, None
    count, _, file = rest.partition(":")
    if not count.isdecimal() or int(count) < 1:
        raise RestuningError(f"tokens {tokens!r}: expected pca:K or pca:K:FILE, with K components")
    return "pca", int(count), Path(file) if file else None
