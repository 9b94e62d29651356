"""A run's settings as data, and the files that record them."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from restuning._version import __version__
from restuning.backbones.load import MICRO
from restuning.errors import RestuningError
from restuning.methods.named import find_method
from restuning.methods.spec import Method, on_blocks, resize
from restuning.training.config import TrainConfig

RUN, RESULT, TRIALS = "run.json", "result.json", "trials.json"


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's outcome. `bank`: a folder of kept features, read in place of items and backbone.

    Several rates in `lrs`: chosen on the data's own validation split; where there is none (or with `val_size`) on
    training items held out, then trained again on all of these (VTAB-1k's protocol). Tested once, at the last epoch.
    """

    data: str
    method: str | Mapping[str, Any] = "res-tuning"
    backbone: str = MICRO
    weights: str | None = None
    image_size: int | None = None
    bank: str | None = None
    size: int | None = None
    blocks: tuple[int, ...] | None = None
    pool: str | None = None
    train_size: int | None = None
    shots: int | None = None
    val_size: int = 0
    test_size: int | None = None
    augment: bool = False
    crop: bool = False
    tokenizer: str | None = None
    max_length: int | None = None
    class_weights: Literal["balanced"] | None = None
    keep_features: bool = True
    lrs: tuple[float, ...] = (1e-3,)
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.lrs:
            raise RestuningError("no learning rate: expected at least one")
        for lr in self.lrs:
            replace(self.training, lr=lr)
        find_method(self.method)
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Run":
        """The inverse of `to_dict`. Raises RestuningError for settings that are unknown or missing."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown or "data" not in data:
            raise RestuningError(f"a run with unknown settings {unknown}" if unknown else "a run without 'data'")
        blocks = data.get("blocks")
        try:
            training = TrainConfig(**data.get("training", {}))
        except TypeError as error:
            raise RestuningError(f"a run with unknown training settings: {error}") from error
        return cls(
            **{
                **data,
                "blocks": None if blocks is None else tuple(blocks),
                "lrs": tuple(data.get("lrs", (1e-3,))),
                "training": training,
            }
        )


def read_run(path: Path) -> Run:
    """A run.json. Raises RestuningError if it is not there or cannot be read."""
    try:
        return Run.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RestuningError(f"no recorded run at {path}: expected a {RUN}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise RestuningError(f"{path} is damaged: {error}") from error


def versions() -> dict[str, str]:
    """Of what computed the numbers."""
    return {"restuning": __version__, "torch": torch.__version__, "python": platform.python_version()}
