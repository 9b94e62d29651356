"""What `train` and the estimators should do when nothing is asked: rates and lengths, by the size of the data.

Features are computed once; every point of a grid is trained from them on a part of the training items, drawn by class,
and tested on items that no part has. The bundled backbone was trained on none of its tasks here.
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from restuning.data import split
from restuning.data.objective import objective
from restuning.errors import CheckpointError
from restuning.features.bank import Bank
from restuning.features.stacked import Point, scores, train
from restuning.model.stack import Stack
from restuning.paper.experiments.measured import Place, table
from restuning.paper.results import Record, where
from restuning.runs.banks import BankSettings, build_bank, from_bank
from restuning.runs.settings import Run
from restuning.runs.sources import on_bank
from restuning.runs.sweep import everything
from restuning.training.config import TrainConfig
from restuning.utils.files import as_json, atomic_write

TASKS = {
    "EuroSAT": ("restuning-micro", None, None, "part:1000,1000:tar:{}/eurosat/eurosat_rgb64_every6th.tar"),
    "digits": ("restuning-micro", None, None, "part:1000,700:digits"),
    "Caltech-101": (
        "vit_tiny_patch16_224",
        "{}/vit_tiny_patch16_224_in1k/model.safetensors",
        96,
        "part:1000,800:tar:{}/caltech101/caltech101_short128_max40.tar",
    ),
}
"""A task's backbone, weights, pixels a side and data."""


@dataclass(frozen=True)
class Defaults:
    """Rates and lengths from features, at several sizes, three seeds."""

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = ("linear", "bypass")
    sizes: tuple[int, ...] = (30, 100, 300, 1000)
    lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    epochs: tuple[int, ...] = (20, 50, 100)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps_at_most: int = 1600
    title: ClassVar[str] = "Rates and lengths by the size of the data"

    def run(self, place: Place) -> Iterator[Record]:
        banks: dict[str, Bank] = {}
        for size, task, method in itertools.product(self.sizes, self.tasks, self.methods):
            file = place.out / f"{task}-{method}-{size}.json"
            if not file.exists():
                bank = banks[task] = banks.get(task) or self._bank(place, task)
                rows = len(bank.rows("train"))
                if not max(30, len(bank.manifest["data"]["classes"])) <= size <= rows:
                    continue
                atomic_write(file, as_json({"task": task, **self._grid(bank, method, size), **where()}))
            yield json.loads(file.read_text(encoding="utf-8"))

    def _bank(self, place: Place, task: str) -> Bank:
        backbone, weights, size, data = TASKS[task]
        settings = BankSettings(data.format(place.data), backbone, weights and weights.format(place.data), size)
        out = place.out / f"{task}-bank"
        try:
            return Bank(out)
        except CheckpointError:  # none, or one that was not finished
            build_bank(settings, out, resume=out.exists(), progress=False)
        return Bank(out)

    def _grid(self, bank: Bank, method: str, size: int) -> Record:
        """The test score of every rate and length, and its spread over the seeds."""
        start = time.perf_counter()
        steps = [(epochs, epochs * -(-size // 32)) for epochs in self.epochs]
        lengths = [epochs for epochs, total in steps if total <= self.steps_at_most] or self.epochs[:1]
        grid = list(itertools.product(self.lrs, lengths, self.seeds))
        features, labels, offsets = everything(bank)
        models, points, tests = [], [], []
        for lr, epochs, seed in grid:
            run = Run(**from_bank(str(bank.path)), method=method, train_size=size, training=TrainConfig(seed=seed))
            task = split(str(bank.manifest["data"]["spec"]), bank.source(), size, 0, None, seed)
            models.append(on_bank(run, task, bank)())
            rows = [
                torch.tensor([offsets[split] + int(i) for split, _, i in (n[:-1].rpartition("[") for n in items.names)])
                for items in (task.train, task.test)
            ]
            points.append(Point(TrainConfig(epochs=epochs, lr=lr, seed=seed), rows[0]))
            tests.append(rows[1])
        stack = Stack(models)
        train(stack, features, labels, points, objective("single-label"))
        found = dict(zip(grid, scores(stack, features, labels, tests, objective("single-label")), strict=True))
        mean = {
            f"{lr:g}, {epochs}": [found[lr, epochs, seed] for seed in self.seeds]
            for lr, epochs in itertools.product(self.lrs, lengths)
        }
        return {"method": method, "size": size, "scores": mean, "seconds": round(time.perf_counter() - start, 1)}

    def text(self, records: Sequence[Record]) -> str:
        lengths = [f"{lr:g}, {epochs}" for lr, epochs in itertools.product(self.lrs, self.epochs)]
        rows, behind = [], {key: list[float]() for key in lengths}
        for record in records:
            means = {key: statistics.fmean(found) for key, found in record["scores"].items()}
            best = max(means.values())
            for key, mean in means.items():
                behind[key].append(best - mean)
            cells = [f"{means[key]:.1f}" if key in means else "" for key in lengths]
            rows.append([record["task"], record["method"], str(record["size"]), *cells])
        lost = [f"{statistics.fmean(each):.1f}" if each else "" for each in behind.values()]
        worst = [f"{max(each):.1f}" if each else "" for each in behind.values()]
        rows += [["points behind the best, mean", "", "", *lost], ["worst", "", "", *worst]]
        return f"""# {self.title}

Test accuracy in percent, mean of {len(self.seeds)} seeds, by learning rate and epochs; AdamW, batch 32, warm-up of a
fifth of the epochs at most 10, a cosine to zero. EuroSAT and digits on `restuning-micro`, Caltech-101 on a real
ViT-Ti/16 at 96 pixels. An empty cell was not run (more than {self.steps_at_most:,} steps).

{table(["task", "method", "items", *lengths], rows)}"""
