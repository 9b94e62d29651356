"""`restuning reproduce`: an experiment's jobs, one after another, by any number of processes beside one another."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch

from restuning.backbones.load import describe_backbone
from restuning.backbones.sites import find_sites
from restuning.data import load_source
from restuning.errors import Locked, RestuningError
from restuning.methods.named import find_method
from restuning.methods.spec import grid_of
from restuning.paper.experiments import Data, Experiment, Row
from restuning.paper.jobs import Done, Job, blank, finish, method_of, one_seed, reads_all, reads_every, reads_features
from restuning.paper.results import RESULTS, key_of, read
from restuning.training.config import TrainConfig
from restuning.utils.files import as_json, atomic_write, locked
from restuning.utils.options import BACKBONE, DTYPES, ImageSize, Option, Weights

SETTINGS = "reproduce.json"
Engine = Callable[[Sequence[Job], Path, str], Iterator[Done]]
WAIT = 1.0  # seconds, where all that is left is being done by others


@dataclass(frozen=True)
class Settings:
    """What is not the experiment's own: data_root, in place of `{root}`; the rest in place of its own. dtype: of
    the features kept."""

    data_root: Annotated[str, Option("where its data are; see `restuning data list`", metavar="DIR")]
    backbone: Annotated[str | None, Option(f"{BACKBONE}, in place of the experiment's")] = None
    weights: Weights = None
    image_size: ImageSize = None
    lrs: Annotated[tuple[float, ...] | None, Option("in place of the experiment's", flag="lr")] = None
    epochs: Annotated[tuple[int, ...] | None, Option("in place of the experiment's")] = None
    seeds: Annotated[tuple[int, ...] | None, Option("in place of the experiment's")] = None
    dtype: Annotated[str, Option("of the banks", choices=DTYPES)] = "float32"

    def __post_init__(self) -> None:
        """Raises RestuningError before any work begins for what training would refuse after a bank is built."""
        for epochs in self.epochs or ():
            TrainConfig(epochs=epochs)
        for lr in self.lrs or ():
            TrainConfig(lr=lr)
        for seed in self.seeds or ():
            TrainConfig(seed=seed)
        if self.dtype not in DTYPES:
            raise RestuningError(f"unknown dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.image_size is not None and self.image_size < 1:
            raise RestuningError(f"image size {self.image_size}: expected a positive number of pixels")


@dataclass(frozen=True)
class Only:
    """Which parts of an experiment: all by default."""

    rows: Annotated[tuple[str, ...], Option("these rows alone", flag="row")] = ()
    columns: Annotated[tuple[str, ...], Option("these columns alone", flag="column")] = ()

    def check(self, experiments: Sequence[Experiment]) -> None:
        """Raises RestuningError for a name that none of them has."""
        for given, known in (
            (self.rows, [row.name for e in experiments for row in e.rows]),
            (self.columns, [task.name for e in experiments for task in e.tasks]),
        ):
            strange = sorted(set(given) - set(known))
            if strange:
                raise RestuningError(f"{strange[0]!r} is not there: expected some of {', '.join(dict.fromkeys(known))}")


EVERYTHING = Only()


def plan(experiment: Experiment, settings: Settings, only: Only = EVERYTHING) -> list[Job]:
    """Its jobs: the cheapest first, within a column what reads features before what does not."""
    jobs: list[Job] = []
    for task in experiment.tasks:
        if only.columns and task.name not in only.columns:
            continue
        rows = [r for r in experiment.rows if r.method is not None and (not only.rows or r.name in only.rows)]
        beside = [r for r in rows if not experiment.augment and _banks(experiment, r, settings)]
        for group in _alike(beside):
            jobs += _jobs(experiment, task, group, settings, True)
        for row in rows:
            if row not in beside:
                jobs += _jobs(experiment, task, [row], settings, False)
    return jobs


def _banks(experiment: Experiment, row: Row, settings: Settings) -> bool:
    """Whether a bank serves it: not on backbones of stages, whose maps are too large to keep of whole data sets, nor
    where its head reads something else than the others'."""
    name = settings.backbone or row.backbone or experiment.backbone
    return row.pool is None and reads_features(row.method or "") and _uniform(name)


@cache
def _uniform(backbone: str) -> bool:
    try:
        return find_sites(describe_backbone(backbone)).uniform
    except RestuningError:  # it cannot be had: its jobs report that
        return True


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that one bank and one sweep can serve: of one grid, CLS alone being a part of any that is finer than 1."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        method = row.method or ""
        grid = -2 if reads_every(method) else -1 if reads_all(method) else grid_of(find_method(method)) or 0
        groups.setdefault(
            (row.lrs, row.epochs, row.seeds, row.backbone, row.weights, row.image_size, row.head_lr_factor, grid), []
        ).append(row)
    for key in [key for key in groups if key[-1] == 0]:
        finer = [other for other in groups if other[:-1] == key[:-1] and other[-1] > 1]
        if finer:
            with_grid = min(finer, key=lambda other: int(other[-1]))
            groups[with_grid] = groups.pop(key) + groups[with_grid]
    return list(groups.values())


def _jobs(experiment: Experiment, task: Data, rows: Sequence[Row], settings: Settings, beside: bool) -> Iterator[Job]:
    first = rows[0]
    weights = settings.weights or first.weights or experiment.weights
    job = Job(
        experiment=experiment.name,
        column=task.name,
        data=task.spec.replace("{root}", settings.data_root),
        methods={row.name: method_of(row.method or "", row.size, row.blocks) for row in rows},
        beside=beside,
        seeds=settings.seeds or first.seeds or experiment.seeds,
        lrs=settings.lrs or first.lrs or experiment.lrs,
        epochs=settings.epochs or first.epochs or experiment.epochs,
        backbone=settings.backbone or first.backbone or experiment.backbone,
        # another backbone has other weights
        weights=weights.replace("{root}", settings.data_root)
        if weights and (settings.weights or not settings.backbone)
        else None,
        image_size=settings.image_size or first.image_size or experiment.image_size,
        pool=first.pool or experiment.pool,
        crop=experiment.crop,
        augment=experiment.augment,
        shots=task.shots,
        targets={name: spec.replace("{root}", settings.data_root) for name, spec in (task.targets or {}).items()},
        images=(task.train, task.test),
        label_smoothing=experiment.label_smoothing,
        head_lr_factor=first.head_lr_factor,
    )
    if job.beside and "{seed}" not in job.data:
        yield job
    else:
        yield from (one_seed(job, seed) for seed in job.seeds)


def cost(jobs: Sequence[Job], timed: Callable[[str, int | None], float] | None = None) -> list[dict[str, Any]]:
    """For each experiment and column: jobs, scores, forward passes, and (with `timed`) hours."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for job in jobs:
        row = rows.setdefault(
            (job.experiment, job.column),
            {"experiment": job.experiment, "column": job.column, "jobs": 0, "scores": 0, "passes": 0.0, "hours": 0.0},
        )
        row["jobs"] += 1
        row["scores"] += len(job.keys)
        row["passes"] += job.passes
        if timed is not None:
            row["hours"] += job.passes * timed(job.backbone, job.image_size) / 3600
    return list(rows.values())


def seconds_each(backbone: str, image_size: int | None) -> float:
    """Of one image's way through a backbone of random weights, on this machine: the better of two batches of 8."""
    from restuning.model.tuned import adapt

    model, x = blank(backbone, image_size, 8)
    tuned = adapt(model, "linear", 2, backbone_name=backbone).eval()
    if torch.cuda.is_available():
        tuned, x = tuned.cuda(), x.cuda()
    times = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            tuned(x)
            times.append(time.perf_counter() - start)
    return min(times[1:]) / 8


def claim(out: Path, settings: Settings) -> None:
    """The folder for these settings. Raises RestuningError where it holds results of others."""
    record = out / SETTINGS
    now = as_json(asdict(settings))
    for left in range(50, -1, -1):
        if record.exists():
            break
        try:
            with locked(out):
                if not record.exists():
                    atomic_write(record, now)
        except Locked:  # another process begins here too
            if not left:
                raise
            time.sleep(0.1)
    if record.read_bytes() != now:
        raise RestuningError(f"{out} holds results of other settings (see {record}): choose another folder")


def absent(jobs: Sequence[Job]) -> dict[str, str]:
    """Data that cannot be read, and why; each is looked for once."""
    found = {}
    for data in dict.fromkeys(job.data for job in jobs):
        try:
            load_source(data)
        except RestuningError as error:
            found[data] = str(error)
    return found


def here(jobs: Sequence[Job], out: Path, dtype: str) -> Iterator[Done]:
    """In this process, one after another; what another process is at comes last."""
    left = list(jobs)
    while left:
        moved = False
        for job in list(left):
            start = time.perf_counter()
            try:
                done = Done(job, finish(job, out, dtype), time.perf_counter() - start)
            except Locked:
                continue
            except RestuningError as error:
                done = Done(job, [], 0.0, str(error))
            left.remove(job)
            moved = True
            yield done
        if not moved:
            time.sleep(WAIT)


def reproduce(
    jobs: Sequence[Job],
    out: Path,
    settings: Settings,
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    engine: Engine = here,
) -> list[str]:
    """Do what is not done. Returns what failed, a line each."""
    claim(out, settings)
    missing = absent(jobs)
    failed = [f"{data}: {why}" for data, why in missing.items()]
    for line in failed:
        report(f"absent: {line}")
    there = {key_of(r) for r in read(out / RESULTS)}
    jobs = [job for job in jobs if job.data not in missing and not job.keys <= there]
    meter = Meter(jobs, report)
    for done in engine(jobs, out, settings.dtype):
        if done.failed:
            failed.append(f"{done.job.name}: {done.failed}")
        meter.done(done)
    return failed


class Meter:
    """How far a table is: a line for each job, with the time left, as far as the jobs done tell it."""

    def __init__(self, jobs: Sequence[Job], report: Callable[[str], None]) -> None:
        self.count, self.left, self.report = len(jobs), sum(job.passes for job in jobs), report
        self.seen, self.passes, self.start = 0, 0.0, time.perf_counter()

    def done(self, done: Done) -> None:
        job = done.job
        self.seen, self.left = self.seen + 1, self.left - job.passes
        if done.failed:
            self.report(f"[{self.seen}/{self.count}] failed: {job.experiment}, {job.column}: {done.failed}")
            return
        self.passes += job.passes
        means: dict[str, list[float]] = {}
        for record in done.records:
            if record["column"] == job.column and record["score"] is not None:
                means.setdefault(record["row"], []).append(record["score"])
        scores = ", ".join(f"{row} {sum(v) / len(v):.2f}" for row, v in means.items()) or "diverged"
        left = self.left * (time.perf_counter() - self.start) / self.passes
        self.report(
            f"[{self.seen}/{self.count}] {job.experiment}, {job.column}: {scores} "
            f"({_hours(done.seconds)}; about {_hours(left)} left)"
        )


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
