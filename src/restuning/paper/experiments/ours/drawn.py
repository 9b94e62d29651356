"""Draws of several sizes of a task's pictures, and side paths trained on them side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from restuning.backbones.load import MICRO, load_backbone, reading_of
from restuning.data import Items, Reading, Task, load_task, prepared, split
from restuning.data.task import Source, Subset
from restuning.features.memory import CachedFeatures, FromFeatures, cache_features
from restuning.features.stacked import Point, scores
from restuning.features.stacked import train as train_stack
from restuning.model.stack import Stack
from restuning.model.tuned import Tuned, adapt
from restuning.training.config import TrainConfig

TASKS = {
    "digits": ("digits", 1000, 430, 359),  # the largest draw, what validates, what tests
    "EuroSAT": ("tar:{}/eurosat/eurosat_rgb64_every6th.tar", 3000, 500, 900),
    "sprite location": ("sprites:location", 5000, 500, 900),
}
SIZES = (30, 300, 1000, 3000, 5000)
"""Of a task those up to 300, and its largest draw."""
SEEDS = (0, 1, 2)
BATCH = 32
BACKBONES: dict[str, dict[str, Any]] = {
    MICRO: {"name": MICRO},
    "ViT-Ti/16 at 96 pixels": {
        "name": "vit_tiny_patch16_224",
        "weights": "{}/vit_tiny_patch16_224_in1k/model.safetensors",
        "image_size": 96,
    },
}


@dataclass(frozen=True)
class Plan:
    """What is tried of a method: rates, lengths in steps, and where."""

    rates: tuple[float, ...]
    steps: tuple[int, ...]
    sizes: tuple[int, ...] = SIZES
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = SEEDS


class Pool:
    """A task's pictures and, of every method, what it reads of them, computed once."""

    def __init__(self, name: str, data: str, backbone: str = MICRO, most: int | None = None) -> None:
        spec, self.most, self.val, self.test = TASKS[name]
        self.most = most or self.most
        self.name, self.spec, self.of = name, spec.format(data), backbone
        self.asked: dict[str, Any] = {
            k: v.format(data) if isinstance(v, str) else v for k, v in BACKBONES[backbone].items()
        }
        self.kept: dict[str, CachedFeatures] = {}

    @cached_property
    def task(self) -> Task:
        sizes = {"train_size": self.most + self.val, "val_size": self.val, "test_size": self.test}
        return load_task(self.spec, **sizes, seed=0)

    @cached_property
    def backbone(self) -> torch.nn.Module:
        return self.another()

    def another(self) -> torch.nn.Module:
        return load_backbone(**self.asked)

    def rows(self, size: int, seed: int) -> list[int]:
        """Of the training pictures, a draw by class."""
        source = Source(self.task.classes, self.task.train, None, self.task.test)
        drawn = split(self.spec, source, size, 0, None, seed).train
        assert isinstance(drawn, Subset)
        return drawn.indices

    def held(self, rows: list[int], seed: int) -> tuple[list[int], list[int]]:
        """Of such a draw, four fifths and the fifth that `restuning train` would hold out."""
        source = Source(self.task.classes, Subset(self.task.train, rows), None, self.task.test)
        parts = split(self.spec, source, None, len(rows) // 5, None, seed)
        assert isinstance(parts.train, Subset) and isinstance(parts.val, Subset)
        return [rows[i] for i in parts.train.indices], [rows[i] for i in parts.val.indices]

    def tuned(self, method: str, seed: int, backbone: torch.nn.Module | None = None) -> Tuned:
        torch.manual_seed(seed)
        return adapt(backbone or self.another(), method, len(self.task.classes))

    def how(self) -> Reading:
        return reading_of(self.backbone, self.asked.get("image_size"))

    def read(self, method: str) -> CachedFeatures:
        """Training, validation and test pictures, in this order. What a bypass reads is what linear probing reads."""
        reads = "bypass" if method == "linear" else method
        if reads not in self.kept:
            self.kept.clear()
            whole = Joined([self.task.train, self.task.val or self.task.test, self.task.test])
            tuned = self.tuned(reads, 0, self.backbone)
            self.kept[reads] = cache_features(tuned, prepared(whole, self.how()))
            tuned.unload()
        return self.kept[reads]


class Joined(Items):
    def __init__(self, parts: Sequence[Items]) -> None:
        self.at = [(part, i) for part in parts for i in range(len(part))]
        self.names = [f"{k}: {part.names[i]}" for k, part in enumerate(parts) for i in range(len(part))]
        self.labels = [part.labels[i] for part, i in self.at]

    def item(self, i: int) -> Any:
        part, at = self.at[i]
        return part.item(at)


def stacked(
    pool: Pool,
    method: str,
    configs: Sequence[TrainConfig],
    rows: Sequence[list[int]],
    asked: Sequence[Sequence[Tensor]],
) -> list[list[float]]:
    """Of every point its scores on its rows of each of what is `asked`."""
    cached = pool.read(method)
    stack = Stack([FromFeatures(pool.tuned(method, config.seed)) for config in configs])
    points = [Point(config, torch.tensor(mine)) for config, mine in zip(configs, rows, strict=True)]
    finite = train_stack(stack, cached.features, cached.labels, points)
    columns = [scores(stack, cached.features, cached.labels, each) for each in asked]
    return [[c[i] if good else 0.0 for c in columns] for i, good in enumerate(finite)]
