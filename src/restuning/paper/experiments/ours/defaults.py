"""What rate and length `restuning train` should take where none is given: sets of 30 to 5,000 pictures, three seeds.

The bundled backbone on three tasks that it was not trained on. Every rate and length is trained on draws of every size;
a validation set that is the same for all chooses, and the test set says what that was worth. Then, on two backbones,
what `restuning train` does where no rate is given: of a few rates the best on a fifth held out, trained again on all.
"""

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from restuning.backbones.load import MICRO, reading_of
from restuning.data import prepared
from restuning.data.task import Subset
from restuning.errors import RestuningError
from restuning.paper.experiments.measured import Place, once, table
from restuning.paper.experiments.ours.drawn import BATCH, SEEDS, SIZES, TASKS, Plan, Pool, stacked
from restuning.paper.experiments.ours.held_out import CHOSEN, choices, chosen
from restuning.paper.results import Record
from restuning.training.config import TrainConfig
from restuning.training.evaluate import evaluate
from restuning.training.loop import fit

BEFORE = (0.005, 50)
"""The rate and the epochs that were the default when this was measured."""
PLANS = {
    "linear": Plan((0.005, 0.02, 0.05), (50, 200, 800, 3200)),
    "bypass": Plan((0.002, 0.005, 0.02), (50, 200, 800)),
    "linear-all": Plan((0.001, 0.005, 0.02), (50, 200, 800, 3200)),
    "res-tuning": Plan((0.002, 0.005), (50, 200), (30,), ("EuroSAT",), (0,)),
}
LONG = 1000
"""Pictures from which the longest training is tried."""


@dataclass(frozen=True)
class Defaults:
    """Rates and lengths by method and size.

    Args:
        methods: names, between spaces.
        sizes: likewise.
        longest: steps; no longer training is tried.
        parts: `grid` of rates and lengths, `choice` of a rate, between spaces.
    """

    methods: str = " ".join(dict.fromkeys((*PLANS, *CHOSEN)))
    sizes: str = " ".join(map(str, SIZES))
    longest: int = 8000
    parts: str = "grid choice"

    def __post_init__(self) -> None:
        methods, sizes = list(dict.fromkeys((*PLANS, *CHOSEN))), list(map(str, SIZES))
        for value, known in ((self.methods, methods), (self.sizes, sizes), (self.parts, ["grid", "choice"])):
            if wrong := [name for name in value.split() if name not in known]:
                raise RestuningError(f"--set of defaults: unknown {wrong[0]!r}, expected of {', '.join(known)}")

    def run(self, place: Place) -> Iterator[Record]:
        sizes = [int(size) for size in self.sizes.split()]
        for part in self.parts.split():
            yield from self._grid(place) if part == "grid" else chosen(place, self.methods.split(), sizes)

    def _grid(self, place: Place) -> Iterator[Record]:
        sizes = [int(size) for size in self.sizes.split()]
        for name, task in TASKS.items():
            pool = Pool(name, place.data)
            for method, plan in PLANS.items():
                if method not in self.methods.split():
                    continue
                for size in plan.sizes if name in plan.tasks else ():
                    if size in sizes and (size <= 300 or size == task[1]):
                        for epochs, rates in _lengths(plan, size, self.longest).items():
                            file = place.out / f"{name.replace(' ', '-')}-{method}-{size}-{epochs}.json"
                            yield once(file, partial(_trained, pool, method, size, epochs, rates, plan.seeds))

    def text(self, records: Sequence[Record]) -> str:
        parts = [
            f"""# What to train with where nothing is given

{MICRO} on {", ".join(TASKS)}: none of them is among what it was trained on. {len(SEEDS)} seeds
({_names_of_few()}: one), each with a draw of its own; batch {BATCH}, the recipe's warm-up and cosine. What validates
(430 to 500 pictures) and what tests (359 to 900) is the same for all draws. A length is in steps, rounded up to whole
epochs."""
        ]
        for method in PLANS:
            if mine := [r for r in records if r["method"] == method and "backbone" not in r]:
                parts += [f"## {method}", _validated(mine), _tested(mine)]
        if mine := [r for r in records if "backbone" in r]:
            parts += [choices(mine)]
        return "\n\n".join(parts)


def _names_of_few() -> str:
    return ", ".join(name for name, plan in PLANS.items() if len(plan.seeds) == 1)


def _lengths(plan: Plan, size: int, longest: int) -> dict[int, tuple[float, ...]]:
    """Epochs → rates; what was the default is among them."""
    each = math.ceil(size / BATCH)
    found: dict[int, tuple[float, ...]] = {}
    for steps in plan.steps:
        if each <= steps <= longest and (steps <= 800 or size >= LONG):
            found[math.ceil(steps / each)] = plan.rates
    rate, epochs = BEFORE
    if epochs * each <= longest:
        found.setdefault(epochs, (rate,))
    return found


def _trained(
    pool: Pool, method: str, size: int, epochs: int, rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Any]:
    """Accuracies by rate, of every seed."""
    start = time.perf_counter()
    grid = list(itertools.product(rates, seeds))
    configs = [TrainConfig(epochs=epochs, lr=rate, batch_size=BATCH, seed=seed) for rate, seed in grid]
    rows = [pool.rows(size, seed) for _, seed in grid]
    if pool.tuned(method, 0).reads_features:
        found = _beside(pool, method, configs, rows)
    else:
        found = [_inside(pool, method, config, mine) for config, mine in zip(configs, rows, strict=True)]
    scored = {
        name: {f"{rate:g}": [row[k] for (r, _), row in zip(grid, found, strict=True) if r == rate] for rate in rates}
        for k, name in enumerate(("validation", "test"))
    }
    steps = epochs * math.ceil(size / BATCH)
    told = {"task": pool.name, "method": method, "size": size, "epochs": epochs, "steps": steps}
    return {**told, **scored, "seconds": round(time.perf_counter() - start, 1)}


def _beside(pool: Pool, method: str, configs: Sequence[TrainConfig], rows: Sequence[list[int]]) -> list[list[float]]:
    """All points side by side, each as it would be trained alone."""
    first, second = len(pool.task.train), len(pool.task.train) + len(pool.task.val or ())
    same = [torch.arange(first, second)] * len(rows), [torch.arange(second, second + len(pool.task.test))] * len(rows)
    return stacked(pool, method, configs, rows, same)


def _inside(pool: Pool, method: str, config: TrainConfig, rows: list[int]) -> list[float]:
    tuned, read = pool.tuned(method, config.seed, pool.backbone), partial(prepared, how=reading_of(pool.backbone))
    try:
        fit(tuned, read(Subset(pool.task.train, rows)), None, config, progress=False)
        parts = (pool.task.val or pool.task.test, pool.task.test)
        return [next(evaluate(tuned, read(part), 128))[1] for part in parts]
    finally:
        tuned.unload()


# ---- what validation chooses


def _cells(records: Sequence[Record]) -> dict[tuple[str, int], list[Record]]:
    """By task and size."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        found.setdefault((record["task"], record["size"]), []).append(record)
    return found


def _validated(records: Sequence[Record]) -> str:
    """By size and length, the mean over the tasks at the rate that was best for that size and length."""
    by: dict[tuple[int, int], list[Record]] = {}
    for r in records:
        if len(r["validation"]) > 1:
            by.setdefault((r["size"], _nominal(r)), []).append(r)
    lengths = sorted({length for _, length in by})
    rows = []
    for size in sorted({size for size, _ in by}):
        cells = []
        for length in lengths:
            group = by.get((size, length), [])
            tried = group[0]["validation"] if group else ()
            rates = {rate: statistics.fmean(statistics.fmean(r["validation"][rate]) for r in group) for rate in tried}
            best = max(rates, key=rates.__getitem__, default="")
            cells.append(f"{rates[best]:.1f} (lr {best})" if best else "–")
        rows.append([str(size), *cells])
    head = [f"{length} steps" for length in lengths]
    return "Validation accuracy in percent, mean over the tasks:\n\n" + table(["pictures", *head], rows)


def _nominal(record: Record) -> int:
    """The length in the plan that a record is of."""
    each = math.ceil(record["size"] / BATCH)
    return next((s for s in PLANS[record["method"]].steps if math.ceil(s / each) == record["epochs"]), record["steps"])


@dataclass(frozen=True)
class Rule:
    """A rate; at least so many epochs, and at least so many steps."""

    rate: float
    epochs: int
    steps: int

    def of(self, cell: Sequence[Record]) -> Record:
        """The nearest length that was measured at this rate."""
        there = [r for r in cell if f"{self.rate:g}" in r["validation"]]
        wanted = max(self.steps, self.epochs * math.ceil(there[0]["size"] / BATCH))
        return min(there, key=lambda r: abs(math.log(r["steps"] / wanted)))

    def score(self, cells: Sequence[Sequence[Record]], part: str) -> float:
        """The mean over tasks and sizes."""
        return statistics.fmean(statistics.fmean(self.of(cell)[part][f"{self.rate:g}"]) for cell in cells)


NEAR = 0.3
"""Points of accuracy that are not worth more steps."""


def choose(records: Sequence[Record]) -> Rule:
    """Of all rules that come near the best validation score of one method, the one that trains least."""
    cells = list(_cells(records).values())
    rates = sorted({float(rate) for r in records if len(r["validation"]) > 1 for rate in r["validation"]})
    rules = [Rule(*values) for values in itertools.product(rates, (1, 5, 20, 50), (50, 200, 800))]
    scored = {rule: rule.score(cells, "validation") for rule in rules}
    near = [rule for rule in rules if scored[rule] >= max(scored.values()) - NEAR]
    return min(near, key=lambda rule: (sum(rule.of(cell)["steps"] for cell in cells), -scored[rule]))


def _tested(records: Sequence[Record]) -> str:
    """What was, what the rule gives, and what choosing for every set gives."""
    rule, before = choose(records), Rule(*BEFORE, 1)
    by_size: dict[int, list[list[Record]]] = {}
    for (_, size), cell in _cells(records).items():
        by_size.setdefault(size, []).append(cell)
    rows = []
    for size, cells in sorted(by_size.items()):
        chosen = [max(itertools.product(cell, PLANS[cell[0]["method"]].rates), key=_on_validation) for cell in cells]
        careful = statistics.fmean(statistics.fmean(r["test"][f"{rate:g}"]) for r, rate in chosen)
        values = [before.score(cells, "test"), rule.score(cells, "test"), careful]
        rows.append([str(size), *(f"{value:.1f}" for value in values)])
    what = f"lr {rule.rate:g}, {_at_least(rule)}"
    head = ["pictures", f"lr {BEFORE[0]:g}, {BEFORE[1]} epochs", what, "chosen for every set"]
    return f"Validation chooses {what}. Test accuracy in percent, mean over the tasks:\n\n" + table(head, rows)


def _at_least(rule: Rule) -> str:
    return f"{rule.steps} steps and at least {rule.epochs} epoch{'s' * (rule.epochs > 1)}"


def _on_validation(point: tuple[Record, float]) -> float:
    record, rate = point
    return statistics.fmean(record["validation"].get(f"{rate:g}", [0.0]))
