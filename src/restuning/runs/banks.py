"""Runs and banks: build one by names, and the settings that one decides."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from restuning.backbones.load import MICRO, load_backbone, reading_of
from restuning.data import (
    Tokenise,
    load_task,
)
from restuning.errors import RestuningError
from restuning.features.bank import (
    Bank,
    build,
)
from restuning.methods.spec import Bypass
from restuning.model.tuned import adapt
from restuning.runs.settings import Run
from restuning.side.features import MEAN
from restuning.training.logging import bar
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


def from_bank(path: str | Path) -> dict[str, Any]:
    """The settings of a run that a bank decides: data, what of it is tested on, and backbone, as they were when it was
    built."""
    manifest = Bank(path, verify=False).manifest
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
    """What a bank is of. tokens: `first`, `last`, `all`, `mean` (where there is no CLS beside patches), or g for CLS
    and a g × g grid; None: what the backbone's pooling sees."""

    data: Annotated[str, Option(DATA)]
    backbone: Annotated[str, Option(BACKBONE)] = MICRO
    weights: Weights = None
    image_size: ImageSize = None
    tokenizer: Tokenizer = None
    max_length: MaxLength = None
    crop: Annotated[bool, Option("the backbone's centre crop, not the whole image")] = False
    tokens: Annotated[
        str | None,
        Option("first, last, mean, all, or G for CLS and a G x G grid (default: what the pooling sees)"),
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


def build_bank(settings: BankSettings, out: Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Load the data and the backbone, and build a bank of all layers in `out` (see `restuning.features.bank.build`).
    Returns its manifest."""
    read = Path(settings.data.partition("?")[0].split(":")[-1])
    check_outside(out, "the output folder", *([read] if str(read) != "." and read.is_dir() else []))
    settings = replace(settings, backbone=pinned(settings.backbone))
    tokens = settings.tokens
    model = load_backbone(settings.backbone, settings.weights, settings.image_size)
    if tokens not in (None, "first", "last", "all", "mean") and not tokens.isdecimal():
        raise RestuningError(f"tokens {tokens!r}: expected first, mean, all, last, or the cells a side of a grid")
    reads: dict[str, Any] = {k: getattr(settings, k) for k in ("image_size", "crop", "tokenizer", "max_length")}
    how = reading_of(model, **reads)
    grid = 1 if tokens == "mean" else int(tokens) if tokens is not None and tokens.isdecimal() else None
    # a mean over all tokens of a text has their mask kept too
    all_tokens = "cls+mean" if isinstance(how, Tokenise) else "none"
    pool = {"first": "cls", "last": "last", "all": all_tokens}.get(tokens or "")
    tuned = adapt(model, Bypass(grid=grid), pool=pool, backbone_name=settings.backbone)
    if tokens == "mean" and tuned._live() != MEAN:
        raise RestuningError("tokens 'mean': this backbone has tokens before its patches; 1 keeps CLS and the mean")
    if torch.cuda.is_available():
        tuned.cuda()
    sizes = {k: getattr(settings, k) for k in ("train_size", "val_size", "test_size", "seed")}
    task = load_task(settings.data, **sizes)
    with bar(100, progress) as show:

        def seen(done: int, of: int) -> None:
            show(100 * done // of, f"{done} of {of}")

        source = {"backbone": settings.backbone, "weights": settings.weights, **reads}
        return build(
            tuned,
            task,
            how,
            out,
            dtype=settings.dtype,
            views=settings.views,
            seed=settings.seed,
            batch_size=settings.batch_size,
            about={"source": source, "test_size": settings.test_size},
            resume=resume,
            seen=seen,
        )
