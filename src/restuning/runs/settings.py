"""A run's settings as data, and the files that record them."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from restuning._version import __version__
from restuning.backbones.load import MICRO
from restuning.errors import RestuningError
from restuning.hooks.memory import check_memory
from restuning.methods.named import find_method
from restuning.methods.spec import Method, on_blocks, resize
from restuning.training.config import TrainConfig
from restuning.utils.options import (
    BACKBONE,
    DATA,
    MEMORY,
    TUNER_SIZE,
    Blocks,
    ImageSize,
    MaxLength,
    Option,
    Pool,
    Shots,
    TestSize,
    Tokenizer,
    TrainSize,
    ValSize,
    Weights,
)
from restuning.utils.plain import read_plain

RUN, RESULT, TRIALS = "run.json", "result.json", "trials.json"


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's outcome. `bank`: a folder of kept features, read in place of items and backbone.
    `skip_bad`: images that cannot be decoded are left out, and told; else they are refused.

    Several rates in `lrs`: chosen on the data's own validation split; where there is none (or with `val_size`) on
    training items held out, then trained again on all of these (VTAB-1k's protocol). Tested once, at the last epoch.
    None: the method's own rate or, where features of 100 items or more are kept (and without patience), the best of
    three, chosen likewise; a `val_size` is then held out of the training, too.
    `memory`: what frozen operations keep for the backward pass, a mode of `restuning.hooks.memory.MEMORY`.
    """

    data: Annotated[str, Option(DATA)]
    method: Annotated[
        str | Mapping[str, Any],
        Option(
            "see `restuning methods`, or a method's .json file (default res-tuning; without a GPU bypass-query, but "
            "for labels of tokens)",
            parse=str,
        ),
    ] = "res-tuning"
    backbone: Annotated[str, Option(BACKBONE)] = MICRO
    weights: Weights = None
    image_size: ImageSize = None
    bank: Annotated[str | None, Option("train from a bank's features, without data and backbone", metavar="DIR")] = None
    shared: Annotated[
        str | None, Option("of bypass-query-shared: weights of `restuning share`, common to tasks", metavar="FILE")
    ] = None
    size: Annotated[int | None, TUNER_SIZE] = None
    blocks: Blocks = None
    pool: Pool = None
    train_size: TrainSize = None
    shots: Shots = None
    val_size: ValSize = 0
    test_size: TestSize = None
    augment: Annotated[bool, Option("RandomResizedCrop and flip")] = False
    crop: Annotated[bool, Option("the backbone's centre crop, not the whole image")] = False
    tokenizer: Tokenizer = None
    max_length: MaxLength = None
    class_weights: Annotated[
        Literal["balanced"] | None, Option("weigh classes in the loss so that each counts as much")
    ] = None
    skip_bad: Annotated[bool, Option("leave out images that cannot be decoded, and tell them")] = False
    keep_features: Annotated[
        bool, Option("run the backbone in every epoch even where its features could be kept in memory")
    ] = True
    memory: Annotated[str, MEMORY] = "shared"
    lrs: Annotated[
        tuple[float, ...] | None,
        Option(
            "learning rate; several: chosen on validation (default: the method's, 0.005 for most; where features are "
            "kept, of 100 items or more, the best of three)",
            flag="lr",
        ),
    ] = None
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.lrs == ():
            raise RestuningError("no learning rate: expected at least one")
        for lr in self.lrs or ():
            replace(self.training, lr=lr)
        find_method(self.method)
        check_memory(self.memory)
        if self.class_weights not in (None, "balanced"):
            raise RestuningError(f"class weights {self.class_weights!r}: expected balanced, or none")

    def spec(self, family: str = "") -> str | Method:
        """The method as a family of backbones has it, by its name where it is the named one."""
        if isinstance(self.method, str) and self.size is None and self.blocks is None:
            return self.method
        method = find_method(self.method, family)
        method = method if self.size is None else resize(method, self.size)
        return method if self.blocks is None else on_blocks(method, self.blocks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_run(path: Path) -> Run:
    """A run.json. Raises RestuningError if it is not there or cannot be read."""
    return read_plain(path, Run)


def versions() -> dict[str, str]:
    """Of what computed the numbers."""
    return {"restuning": __version__, "torch": torch.__version__, "python": platform.python_version()}
