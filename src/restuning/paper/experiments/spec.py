"""What an experiment is, as data: rows and columns of a table of the paper, and how its numbers are made here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VIT = "vit_base_patch16_224.augreg_in21k"
RATES, EPOCHS, SEEDS = (0.05, 0.01, 0.005, 0.001), (50, 100), (0, 1, 2)
COSTS = {"parameters_M": "parameters, M", "memory_GB": "memory, GB", "hours_per_epoch": "hours an epoch"}
"""Columns that are no score: what a method costs."""


@dataclass(frozen=True)
class Data:
    """A column: its name as printed; spec: the data, where `{root}` is what --data-root names and `{seed}` the run's
    seed; group: of which the means are taken; train, test: images, for the cost; shots: of each class; targets: other
    columns, tested by what was trained here."""

    name: str
    spec: str
    group: str = ""
    train: int = 1000
    test: int = 1000
    shots: int | None = None
    targets: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """A line: its name as printed, our method (a name, or as data; None: not to be had here), and the paper's values by
    column. lrs, epochs, seeds, pool, backbone, weights, image_size: where they are not the experiment's;
    head_lr_factor: see `TrainConfig`; command: where `reproduce` is not what runs it."""

    name: str
    method: str | Mapping[str, Any] | None
    paper: Mapping[str, float | None]
    size: int | None = None
    blocks: tuple[int, ...] | None = None
    lrs: tuple[float, ...] | None = None
    epochs: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None
    pool: str | None = None
    backbone: str | None = None
    weights: str | None = None
    image_size: int | None = None
    head_lr_factor: float = 1.0
    command: str = ""


@dataclass(frozen=True)
class Experiment:
    """name: `tab4`, `fig5`; columns: of the paper's values; margin: how far from the paper's a score may be, either
    way, in its own unit; command: where `restuning reproduce` is not what runs it."""

    name: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    tasks: tuple[Data, ...] = ()
    backbone: str = VIT
    weights: str | None = None
    image_size: int | None = None
    pool: str | None = None
    lrs: tuple[float, ...] = RATES
    epochs: tuple[int, ...] = EPOCHS
    seeds: tuple[int, ...] = SEEDS
    augment: bool = False
    crop: bool = False
    label_smoothing: float = 0.0
    margin: float = 1.0
    command: str = ""
    note: str = ""

    @property
    def shown_command(self) -> str:
        """The command that makes its numbers."""
        return self.command or f"restuning reproduce {self.name} --data-root DATA --out runs/{self.name}"

    def accepts(self, row: Row, column: str) -> tuple[float, float] | None:
        """The range in which ours is taken for the paper's; none where the paper has no score there."""
        value = row.paper.get(column)
        return None if value is None or column in COSTS else (value - self.margin, value + self.margin)


def printed(columns: Sequence[str], *rows: tuple[Any, ...], **settings: Any) -> tuple[Row, ...]:
    """Rows as the paper prints them: (name, method, value of each column …)."""
    return tuple(
        Row(name, method, dict(zip(columns, values, strict=True)), **settings) for name, method, *values in rows
    )


def residual(**tuners: str) -> dict[str, Any]:
    """A Res-Tuner of ten on each of these operations, as data; adapters on MHA and FFN have a channel scale."""
    sizes = {"adapter": "width", "prefix": "tokens", "prompt": "tokens"}
    made = {op: {"tuner": tuner, sizes[tuner]: 10} for op, tuner in tuners.items()}
    for op, tuner in made.items():
        if tuner["tuner"] == "adapter" and op != "block":
            tuner["scale"] = "channel"
    return {"kind": "residual", "tuners": made}


def without(*blocks: int, depth: int = 12) -> tuple[int, ...]:
    """The blocks that carry tuners, from 0, where the paper counts those that do not, from 1."""
    return tuple(i for i in range(depth) if i + 1 not in blocks)


CIFAR = Data("CIFAR-100", "cifar100:{root}/cifar100", train=50_000, test=10_000)
FULL_RATES = (0.0005, 0.0001)
"""Of full fine-tuning: the paper's own would destroy what it starts from."""
