"""A grid of settings from one bank, every point of a method at once: validation chooses, then one test."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from restuning.data import Items, Task, split
from restuning.data.objective import objective, sort_key
from restuning.errors import RestuningError
from restuning.features.bank import LIMIT, Bank
from restuning.features.bank.window import Window
from restuning.features.stacked import Point, scores, train
from restuning.methods.files import to_dict
from restuning.methods.named import find_method
from restuning.model.count import count
from restuning.model.stack import Stack
from restuning.runs.banks import from_bank
from restuning.runs.settings import RESULT, RUN, Run, versions
from restuning.runs.sources import on_bank
from restuning.side.features import Features
from restuning.training.config import TrainConfig
from restuning.training.evaluate import padded
from restuning.utils.cluster import check_engine, on_ray
from restuning.utils.files import as_json, atomic_write, contents, locked
from restuning.utils.options import Option, Pool, Shots, TrainSize, ValSize
from restuning.utils.plain import read_plain
from restuning.utils.reading import read_json

SWEEP, RECORD = "sweep.json", "settings.json"


@dataclass(frozen=True)
class Sweep:
    """Every method × rate × length × seed. Splits and births are those of a `Run` of the same seed."""

    bank: Annotated[str, Option("a bank's folder", metavar="DIR")]
    methods: Annotated[tuple[str, ...], Option("names, or .json files", flag="method")] = ("bypass",)
    lrs: Annotated[tuple[float, ...], Option("learning rates", flag="lr")] = (0.05, 0.01, 0.005, 0.001)
    epochs: Annotated[tuple[int, ...], Option("lengths")] = (50, 100)
    seeds: Annotated[tuple[int, ...], Option()] = (0, 1, 2)
    shared: Annotated[
        str | None, Option("of bypass-query-shared: weights of `restuning share`, common to tasks", metavar="FILE")
    ] = None
    pool: Pool = None
    train_size: TrainSize = None
    shots: Shots = None
    val_size: ValSize = 0
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("methods", "lrs", "epochs", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise RestuningError(f"{name} {list(values)}: expected one or more, each once")
        for lr, epochs, seed in itertools.product(self.lrs, self.epochs, self.seeds):
            replace(self.training, lr=lr, epochs=epochs, seed=seed)
        for method in self.methods:
            find_method(method)
        folders = [Path(method).stem for method in self.methods]
        if len(set(folders)) != len(folders):
            twice = next(name for name in folders if folders.count(name) > 1)
            raise RestuningError(f"two methods are called {twice!r}, as their folders would be: rename a file")

    def run(self, method: str, seed: int) -> Run:
        """The run that a winner of this method and seed is, but for its rate and length."""
        spec = to_dict(find_method(method)) if method.endswith(".json") else method
        return Run(
            **from_bank(self.bank),
            method=spec,
            shared=self.shared,
            pool=self.pool,
            train_size=self.train_size,
            shots=self.shots,
            val_size=self.val_size,
            training=replace(self.training, seed=seed),
        )


def sweep(
    settings: Sweep, out: Path, *, resume: bool = False, engine: str = "local", workers: int | None = None
) -> dict[str, Any]:
    """Run the grid; sweep.json and, for every method and seed, the winner as a run's folder in `out`.

    For each seed the point with the best validation score is trained again on training and validation items and
    tested once, at its last epoch: what `restuning train --bank` gives with that seed and these rates. A method that
    is done is not done again on `resume`. engine: local, or ray, where each method's stacks are a job; workers: see
    `restuning.utils.cluster.on_ray`. Returns what sweep.json holds.
    """
    check_engine(engine, workers)
    bank, seed = Bank(settings.bank), settings.seeds[0]
    if bank.views > 1:
        raise RestuningError(f"{settings.bank} holds {bank.views} views of each image: a sweep reads a bank of one")
    for method in settings.methods:  # what cannot be, before anything is written
        on_bank(settings.run(method, seed), _task(settings, bank, seed, hold=True), bank)()
    with locked(out):
        _record(settings, out, resume)
        done: dict[str, Any] = read_json(out / SWEEP)["methods"] if (out / SWEEP).exists() else {}
        left = [method for method in settings.methods if method not in done]
        result: dict[str, Any] = {}
        for method, found in _methods(settings, bank, left, out, engine, workers):
            done[method] = found
            done = {method: done[method] for method in settings.methods if method in done}
            result = {"settings": asdict(settings), "versions": versions(), "methods": done}
            atomic_write(out / SWEEP, as_json(result))
        return result or dict(read_json(out / SWEEP))


def _record(settings: Sweep, out: Path, resume: bool) -> None:
    record = out / RECORD
    if record.exists() and not resume:
        raise RestuningError(f"{out} holds a sweep: continue it with --resume, or choose another folder")
    if not record.exists() and contents(out):
        raise RestuningError(f"{out} is not empty and holds no sweep: choose another folder")
    if record.exists() and read_plain(record, Sweep) != settings:
        raise RestuningError(f"{out} holds a sweep of other settings: choose another folder")
    atomic_write(record, as_json(asdict(settings)))


def _methods(
    settings: Sweep, bank: Bank, methods: Sequence[str], out: Path, engine: str, workers: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each as it is done."""
    if engine == "local":
        for method in methods:
            yield method, _method(settings, bank, method, out)
    elif methods:
        for i, found in on_ray(_at_work, [(settings, method, out.absolute()) for method in methods], workers):
            if isinstance(found, RestuningError):
                raise RestuningError(f"{methods[i]}: {found}; what is done is kept, continue with --resume")
            yield methods[i], found


def _at_work(settings: Sweep, method: str, out: Path) -> dict[str, Any]:
    return _method(settings, Bank(settings.bank, verify=False), method, out)


def _method(settings: Sweep, bank: Bank, method: str, out: Path) -> dict[str, Any]:
    start = time.perf_counter()
    grid = list(itertools.product(settings.seeds, settings.lrs, settings.epochs))
    whole, held = ({s: _task(settings, bank, s, hold) for s in settings.seeds} for hold in (False, True))
    models = {seed: on_bank(settings.run(method, seed), whole[seed], bank) for seed in settings.seeds}
    first = models[settings.seeds[0]]().tuned
    task_objective = objective(whole[settings.seeds[0]].kind, smoothing=settings.training.label_smoothing)
    # what no adapter reads is not carried along
    layers: Sequence[int] = first.request.layers
    select: Callable[[Features], Features] | None = first.reader(first.active()[0]).select
    if bank.tokens.tokens == "components":
        pooled = first.request.tokens.tokens == "pooled"
        select, layers = (Features.as_pooled, ()) if pooled else (None, bank.layers)
    features: Features | Window
    if bank.bytes > LIMIT:
        features = Window(bank, layers, select)
        labels, offsets = features.labels, features.offsets
    else:
        features, labels, offsets = everything(bank)
        features = features if select is None else select(features)

    def rows(items: Items) -> Tensor:
        places = (name.removesuffix("]").rpartition("[") for name in items.names)
        return torch.tensor([offsets[split] + int(i) for split, _, i in places])

    def config(lr: float, epochs: int, seed: int) -> TrainConfig:
        return replace(settings.training, lr=lr, epochs=epochs, seed=seed)

    trials: dict[tuple[int, float, int], float] = {}
    if len(grid) > len(settings.seeds):
        stack = Stack([models[seed]() for seed, _, _ in grid])
        points = [Point(config(lr, epochs, seed), rows(held[seed].train)) for seed, lr, epochs in grid]
        finite = train(stack, features, labels, points, task_objective)
        validated = scores(stack, features, labels, [rows(_val(held[seed])) for seed, _, _ in grid], task_objective)
        trials = {p: sort_key(a if good else None) for p, a, good in zip(grid, validated, finite, strict=True)}
    pairs = list(itertools.product(settings.lrs, settings.epochs))
    # of equal score the first, as in a run
    best = {s: max(pairs, key=lambda pair, s=s: trials.get((s, *pair), -math.inf)) for s in settings.seeds}  # type: ignore[misc]
    winners = {seed: models[seed]() for seed in settings.seeds}
    stack = Stack(list(winners.values()))
    points = [Point(config(*best[seed], seed), rows(whole[seed].train)) for seed in settings.seeds]
    finite = train(stack, features, labels, points, task_objective)
    stack.write_back()
    tested = scores(stack, features, labels, [rows(whole[seed].test) for seed in settings.seeds], task_objective)
    seeds = []
    for seed, score, good in zip(settings.seeds, tested, finite, strict=True):
        lr, epochs = best[seed]
        row = {
            "seed": seed,
            "lr": lr,
            "epochs": epochs,
            "test_score": score if good else None,
            "validation_score": {
                f"{r:g}, {e} epochs": trials[seed, r, e] if math.isfinite(trials[seed, r, e]) else None
                for s, r, e in trials
                if s == seed
            },
        }
        seeds.append(row)
        folder = out / f"{Path(method).stem}-seed{seed}"
        run = settings.run(method, seed)
        run = replace(run, lrs=(lr,), val_size=0, training=config(lr, epochs, seed))  # it was trained on all
        winners[seed].tuned.save_pretrained(folder)
        atomic_write(folder / RUN, as_json(run.to_dict()))
        atomic_write(folder / RESULT, as_json({**row, "settings": run.to_dict(), "versions": versions()}))
    found = [a for a, good in zip(tested, finite, strict=True) if good]
    return {
        "test_score": statistics.fmean(found) if found else None,
        "spread": statistics.stdev(found) if len(found) > 1 else 0.0,
        "parameters": count(winners[settings.seeds[0]].tuned),
        "points": len(grid),
        "seconds": round(time.perf_counter() - start, 1),
        "seeds": seeds,
    }


def _task(settings: Sweep, bank: Bank, seed: int, hold: bool) -> Task:
    """The splits of a run of this seed; with `hold`, those on which its rate is chosen."""
    sizes = {"train_size": settings.train_size, "shots": settings.shots, "test_size": None, "seed": seed}
    spec, source = str(bank.manifest["data"]["spec"]), bank.source()
    whole = split(spec, source, **sizes, val_size=0)  # type: ignore[arg-type]
    if not hold:
        return whole
    if whole.val is not None and not settings.val_size:
        return whole
    return split(spec, source, **sizes, val_size=settings.val_size or max(1, len(whole.train) // 5))  # type: ignore[arg-type]


def _val(task: Task) -> Items:
    assert task.val is not None
    return task.val


def everything(bank: Bank) -> tuple[Features, Tensor, dict[str, int]]:
    """The features of all splits in one, the labels, and where each split begins."""
    parts, offsets, start = [], {}, 0
    for name in bank.splits:
        rows = bank.rows(name)
        offsets[name], start = start, start + len(rows)
        parts.append(rows.fetch(range(len(rows))))
    return Features.joined([part for part, _ in parts], padded), torch.cat([labels for _, labels in parts]), offsets
