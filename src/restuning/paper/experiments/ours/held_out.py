"""What `restuning train` does where no rate is given: of a few rates the best on a fifth held out, trained again."""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from restuning.methods.named import CHOICE, TRIED, rates_of
from restuning.paper.experiments.measured import Place, mean, once, table
from restuning.paper.experiments.ours.drawn import BACKBONES, SEEDS, TASKS, Plan, Pool, stacked
from restuning.paper.results import Record
from restuning.training.config import TrainConfig

_SMALL = (30, 300)
CHOSEN = {  # where the choice is tried
    "linear": Plan(TRIED, (), (*_SMALL, 1000, 3000, 5000)),
    "linear-all": Plan(TRIED, (), (*_SMALL, 1000, 3000, 5000)),
    "bypass": Plan(TRIED, (), (*_SMALL, 1000, 3000)),
    "bypass-query": Plan(TRIED, (), _SMALL, ("EuroSAT", "sprite location")),
}


def chosen(place: Place, methods: Sequence[str], wanted: Sequence[int]) -> Iterator[Record]:
    """Of every backbone, task, method and size."""
    for backbone, name, method in itertools.product(BACKBONES, TASKS, methods):
        plan = CHOSEN.get(method)
        if plan is None or name not in plan.tasks:
            continue
        sizes = [n for n in plan.sizes if n <= 300 or n == TASKS[name][1]]
        pool = Pool(name, place.data, backbone, max(sizes))
        for size in (n for n in sizes if n in wanted):
            known = f"{backbone.split()[0].replace('/', '-')}-{name.replace(' ', '-')}"
            yield once(place.out / f"choice-{known}-{method}-{size}.json", partial(_measured, pool, method, size))


def _measured(pool: Pool, method: str, size: int) -> dict[str, Any]:
    """By rate and seed: the score on a fifth held out, and that on the test items, trained on all."""
    grid, start = list(itertools.product(TRIED, SEEDS)), time.perf_counter()
    configs = [TrainConfig(lr=rate, seed=seed) for rate, seed in grid]
    rows = {seed: pool.rows(size, seed) for seed in SEEDS}
    parts = {seed: pool.held(rows[seed], seed) for seed in SEEDS}
    held = [torch.tensor(parts[seed][1]) for _, seed in grid]
    tested = torch.arange(len(pool.task.train) + len(pool.task.val or ()), len(pool.read(method)))
    on_part = stacked(pool, method, configs, [parts[seed][0] for _, seed in grid], [held])
    on_all = stacked(pool, method, configs, [rows[seed] for _, seed in grid], [[tested] * len(grid)])
    scored = {
        name: {f"{rate:g}": [row[0] for (r, _), row in zip(grid, found, strict=True) if r == rate] for rate in TRIED}
        for name, found in (("held", on_part), ("test", on_all))
    }
    told = {"backbone": pool.of, "task": pool.name, "method": method, "size": size}
    return {**told, **scored, "seconds": round(time.perf_counter() - start, 1)}


def choices(records: Sequence[Record]) -> str:
    """Of every backbone, method and size the mean over the tasks at each rate, and what the choice gives."""
    lines = []
    for backbone, method, size in sorted({(r["backbone"], r["method"], r["size"]) for r in records}):
        group = [r for r in records if (r["backbone"], r["method"], r["size"]) == (backbone, method, size)]
        each = [statistics.fmean(statistics.fmean(r["test"][f"{rate:g}"]) for r in group) for rate in TRIED]
        by_seed = [statistics.fmean(_by_choice(r, i) for r in group) for i in range(len(SEEDS))]
        lines.append(
            [f"{backbone}, {method}", str(size), str(len(group)), *(f"{value:.1f}" for value in each), mean(by_seed, 1)]
        )
    head = ["backbone, method", "pictures", "tasks", *(f"lr {rate:g}" for rate in TRIED), "chosen"]
    return f"""## What is done where no rate is given

{TrainConfig.epochs} epochs. Of {len(TRIED)} rates the best on a fifth of the training pictures, held out (of equals the
first; of fewer than {CHOICE} pictures the first), trained again on all of them. Test accuracy in percent, mean over
the tasks and {len(SEEDS)} seeds; of the choice ± standard deviation over the seeds.

{table(head, lines)}"""


def _by_choice(record: Record, seed: int) -> float:
    rates = rates_of(record["method"], record["size"], kept=True)
    rate = max(rates, key=lambda rate: record["held"][f"{rate:g}"][seed])
    return float(record["test"][f"{rate:g}"][seed])
