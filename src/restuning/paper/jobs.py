"""A part of an experiment that is done in one go: resumable, finished when its records are among the results.

Methods that read features share a bank and a sweep; one that acts inside the backbone is a run. Both choose on
validation, train again on all, and test once, at the last epoch.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from restuning.backbones.load import load_backbone, reading_of
from restuning.data import Items, Preprocess, load_source, load_task, prepared
from restuning.data.inspect import pixels_of
from restuning.data.objective import objective
from restuning.features.bank.format import MANIFEST
from restuning.methods.files import from_dict, to_dict
from restuning.methods.named import find_method
from restuning.methods.spec import (
    Full,
    grid_of,
    on_blocks,
    parts_of,
    reads_all_tokens,
    reads_every_token,
    resize,
    side_of,
)
from restuning.model.files import read as read_adapter
from restuning.model.files import read_config
from restuning.model.tuned import Tuned, adapt
from restuning.paper.results import RESULTS, Record, append, key_of, read, where
from restuning.runs.banks import BankSettings, build_bank
from restuning.runs.load import transform_of
from restuning.runs.run import execute
from restuning.runs.settings import RESULT, RUN, Run
from restuning.runs.sweep import Sweep, sweep
from restuning.side import Bypass
from restuning.side.base import SideConfig
from restuning.training.config import TrainConfig
from restuning.training.evaluate import loader, predict_logits, to_device
from restuning.tuners import Adapter, Prefix, Prompt
from restuning.utils.files import as_json, atomic_write, locked
from restuning.utils.profiling import peak_bytes, saved_bytes
from restuning.utils.reading import read_json

BANKS, JOBS = "banks", "jobs"
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One column of an experiment for some of its rows: `methods` by row, as names or data. beside: whether they read
    features, from a bank. targets: further columns and their data. images: to train and to test on."""

    experiment: str
    column: str
    data: str
    methods: Mapping[str, str | Mapping[str, Any]]
    beside: bool
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    epochs: tuple[int, ...]
    backbone: str
    weights: str | None
    image_size: int | None
    pool: str | None
    crop: bool
    augment: bool
    shots: int | None
    targets: Mapping[str, str]
    images: tuple[int, int]
    label_smoothing: float = 0.0
    head_lr_factor: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder."""
        seeds = "-".join(map(str, self.seeds))
        outputs = f"{self.experiment} {self.column} {' '.join(self.methods) if len(self.methods) < 3 else 'features'}"
        return f"{slug(outputs)[:60]}-seed{seeds}-{_hash(asdict(self))}"

    @property
    def keys(self) -> set[tuple[Any, ...]]:
        """Of the records that it makes."""
        return {
            (self.experiment, row, column, seed)
            for row in self.methods
            for column in (self.column, *self.targets)
            for seed in self.seeds
        }

    @property
    def passes(self) -> float:
        """What it costs, in forward passes of the backbone over one image: a training step is three; a step from
        features a hundredth, for each point of the grid; trials see four fifths of the training images."""
        train, test = self.images
        grid = len(self.lrs) * len(self.epochs)
        seen = train * ((0.8 * sum(self.epochs) * len(self.lrs) if grid > 1 else 0) + max(self.epochs))
        if self.beside:
            return train + test + 0.01 * seen * len(self.methods) * len(self.seeds)
        seen = train * max(self.epochs) * (1 + (0.8 * len(self.lrs) if len(self.lrs) > 1 else 0))
        return (3 * seen + test) * len(self.methods) * len(self.seeds)


@dataclass(frozen=True)
class Done:
    """What became of a job: its records and seconds, or why it failed."""

    job: Job
    records: list[Record]
    seconds: float
    failed: str = ""


_EACH_TOKEN = {Adapter, Prefix, Prompt, type(None)}
"""Tuners that treat each token by itself; of others a bank may not hold what they read."""


def reads_features(method: str | Mapping[str, Any]) -> bool:
    """Linear probing, or a side path that begins without the backbone's weights, on tokens that a bank keeps."""
    found = find_method(method)
    if isinstance(found, Full):
        return False
    return all(part.from_bank() if isinstance(part, SideConfig) else not part.tuners for part in parts_of(found))


def reads_all(method: str | Mapping[str, Any]) -> bool:
    """Whether it reads every layer in a way of its own, from a bank of components."""
    return reads_all_tokens(find_method(method))


def reads_every(method: str | Mapping[str, Any]) -> bool:
    """Whether it reads every token in full, from a bank of all tokens."""
    return reads_every_token(find_method(method))


def method_of(method: str | Mapping[str, Any], size: int | None, blocks: tuple[int, ...] | None) -> Any:
    """A name as it is; of another size, or in some of the blocks, as data."""
    if size is None and blocks is None:
        return method
    found = find_method(method)
    found = found if size is None else resize(found, size)
    return to_dict(found if blocks is None else on_blocks(found, blocks))


def finish(job: Job, out: Path, dtype: str = "float32", progress: bool = False) -> list[Record]:
    """Its records, made where they are not among the results yet. Raises Locked where another process is at it."""
    with locked(out / JOBS / job.name):
        there = {key_of(r): r for r in read(out / RESULTS)}
        if job.keys <= there.keys():
            return [there[key] for key in sorted(job.keys, key=str)]
        records = [
            {**_about(job), **record} for record in (_beside if job.beside else _inside)(job, out, dtype, progress)
        ]
        append(out / RESULTS, records)
        return records


def _about(job: Job) -> Record:
    own = ("experiment", "column", "methods", "beside", "targets", "seeds")
    settings = {k: v for k, v in asdict(job).items() if k not in own}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    source = load_source(job.data)
    pixels = pixels_of(source.test or source.train)
    return {
        "experiment": job.experiment,
        **where(),
        "device": device,
        "finished": finished,
        "pixels": pixels,
        **settings,
    }


def _beside(job: Job, out: Path, dtype: str, progress: bool) -> Iterable[Record]:
    folder = out / JOBS / job.name
    files = {}
    for row, method in job.methods.items():
        files[row] = folder / "methods" / f"{slug(row)}.json"
        atomic_write(files[row], as_json(method if isinstance(method, Mapping) else to_dict(find_method(method))))
    settings = Sweep(
        bank=str(_bank(job, out, dtype, progress)),
        methods=tuple(map(str, files.values())),
        lrs=job.lrs,
        epochs=job.epochs,
        seeds=job.seeds,
        pool=job.pool,
        shots=job.shots,
        training=TrainConfig(label_smoothing=job.label_smoothing, head_lr_factor=job.head_lr_factor),
    )
    found, peak = _measured(partial(sweep, settings, folder / "sweep", resume=True))
    saved = {}
    for row, file in files.items():
        swept = found["methods"][str(file)]
        kept = _kept(job, job.methods[row], folder / "sweep" / f"{file.stem}-seed{job.seeds[0]}")
        for one in swept["seeds"]:
            saved[row, one["seed"]] = at = folder / "sweep" / f"{file.stem}-seed{one['seed']}"
            yield {
                "row": row,
                "column": job.column,
                "seed": one["seed"],
                "score": one["test_score"],
                "chosen": {"lr": one["lr"], "epochs": one["epochs"]},
                "validation": one["validation_score"],
                "method": job.methods[row],
                "parameters": swept["parameters"],
                "seconds": swept["seconds"] / len(job.seeds),
                "peak_bytes": peak,
                "kept_bytes": kept,
                "from": "bank",
                "gates": _gates(at),
            }
    yield from _elsewhere(job, saved)


def _inside(job: Job, out: Path, dtype: str, progress: bool) -> Iterable[Record]:
    saved = {}
    for row, method in job.methods.items():
        kept = None  # the same for every seed
        for seed in job.seeds:
            saved[row, seed] = folder = out / JOBS / job.name / f"{slug(row)}-seed{seed}"
            run = Run(
                data=job.data,
                method=method,
                backbone=job.backbone,
                weights=job.weights,
                image_size=job.image_size,
                pool=job.pool,
                crop=job.crop,
                augment=job.augment,
                shots=job.shots,
                lrs=job.lrs,
                training=TrainConfig(
                    epochs=max(job.epochs),
                    seed=seed,
                    label_smoothing=job.label_smoothing,
                    head_lr_factor=job.head_lr_factor,
                ),
            )
            if (folder / RESULT).exists():
                result, peak = read_json(folder / RESULT), None
            else:
                again = (folder / RUN).exists()
                result, peak = _measured(partial(execute, run, folder, resume=again, progress=progress))
            kept = _kept(job, method, folder) if kept is None else kept
            yield {
                "row": row,
                "column": job.column,
                "seed": seed,
                "score": result[f"test_{result['metric']}"],
                "metric": result["metric"],
                "chosen": {"lr": result["lr"], "epochs": max(job.epochs)},
                "validation": result["validation_score"],
                "method": method,
                "parameters": result["parameters"],
                "seconds": result["seconds"],
                "peak_bytes": peak,
                "kept_bytes": kept,
                "from": "backbone",
                "gates": _gates(folder),
            }
    yield from _elsewhere(job, saved)


def _bank(job: Job, out: Path, dtype: str, progress: bool) -> Path:
    """One pass over the data, shared by all jobs that read the same of it. Raises Locked where it is being made."""
    methods = job.methods.values()
    grids = sorted({grid_of(find_method(m)) or 0 for m in methods})
    tokens = "pca:64" if all(map(reads_all, methods)) else str(grids[-1]) if grids[-1] else None
    settings: dict[str, Any] = {
        "data": job.data,
        "backbone": job.backbone,
        "weights": job.weights,
        "image_size": job.image_size,
        "crop": job.crop,
        "tokens": "all" if any(map(reads_every, methods)) else tokens,
        "dtype": dtype,
    }
    folder = out / BANKS / _hash(settings)
    if not (folder / MANIFEST).exists():
        build_bank(BankSettings(**settings), folder, resume=True, progress=progress)
    return folder


def _elsewhere(job: Job, saved: Mapping[tuple[str, int], Path]) -> Iterable[Record]:
    """What was trained, on other data of the same classes: one pass over each for all that act beside the backbone."""
    if not job.targets:
        return
    names = {f"{slug(row)}-{seed}": (row, seed) for row, seed in saved}
    groups = [list(names)] if job.beside else [[name] for name in names]
    for group in groups:
        tuned = Tuned(load_backbone(job.backbone, job.weights, job.image_size), backbone_name=job.backbone)
        for name in group:
            tuned.load_adapter(saved[names[name]], name)
        tuned.set_adapter(group if len(group) > 1 else group[0])
        if torch.cuda.is_available():
            tuned.cuda()
        first = saved[names[group[0]]]
        how = transform_of(first, read_config(first).preprocessing)
        for column, spec in job.targets.items():
            test = load_task(spec).test
            outputs, labels = _logits(tuned, prepared(test, how), group)
            for name in group:
                logits = _restricted(outputs[name], test) if spec.startswith("domains:") else outputs[name]
                score = next(objective().metrics(logits, labels))[1]
                row, seed = names[name]
                yield {"row": row, "column": column, "seed": seed, "score": score, "tested": spec}


@torch.no_grad()
def _logits(tuned: Tuned, examples: Any, group: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    if len(group) == 1:
        logits, labels = predict_logits(tuned, examples, 32)
        return {group[0]: logits}, labels
    tuned.eval()
    device, parts, labels_of = next(tuned.parameters()).device, [], []
    for inputs, label in loader(examples, 32):
        parts.append({name: x.float().cpu() for name, x in tuned(to_device(inputs, device)).items()})
        labels_of.append(label)
    return {name: torch.cat([part[name] for part in parts]) for name in group}, torch.cat(labels_of)


def _restricted(logits: Tensor, test: Items) -> Tensor:
    """An answer is one of the classes that the target has, as ImageNet-A and -R are scored."""
    seen = torch.tensor(sorted(set(test.labels)))
    return torch.full_like(logits, -1e30).index_copy(1, seen, logits[:, seen])


def _gates(folder: Path) -> list[float] | None:
    """λ by layer, of a bypass; the mean over channels, where each has its own."""
    config, state = read_adapter(folder)
    if not isinstance(side_of(find_method(config.spec)), Bypass):
        return None
    one = next((value for key, value in state.items() if key.endswith("side.gate")), None)
    each = [(int(k.rpartition(".")[2]), v) for k, v in state.items() if k.rpartition(".")[0].endswith("side.gate")]
    gates = [v for _, v in sorted(each)] if one is None else list(one)
    return [round(v.sigmoid().mean().item(), 4) for v in gates] or None


def _measured(call: Callable[[], T]) -> tuple[T, int | None]:
    """What it gives, and on a GPU how far memory rose: on a CPU, a process still holds the memory of its other jobs."""
    if not torch.cuda.is_available():
        return call(), None
    kept: list[T] = []
    _, above = peak_bytes(lambda: kept.append(call()), torch.device("cuda"))
    return kept[0], above


def _kept(job: Job, method: Any, saved: Path) -> int:
    """Bytes that autograd keeps of a batch of 32 for its backward pass: a count, the same on any machine."""
    model, batch = blank(job.backbone, job.image_size, 32)
    if reads_all(method):  # with the components that it has
        method = from_dict(read_config(saved).spec)
    tuned = adapt(
        model, method, len(read_config(saved).classes or ()), pool=job.pool, backbone_name=job.backbone
    ).train()
    return saved_bytes(lambda: tuned(batch), tuned.parameters())


def blank(backbone: str, image_size: int | None, count: int) -> tuple[nn.Module, Tensor]:
    """A backbone of random weights, and a batch of so many images of nothing, or texts of 128 tokens."""
    model = load_backbone(backbone, "random", image_size)
    how = reading_of(model, image_size)
    return model, torch.zeros(count, 3, *how.size) if isinstance(how, Preprocess) else torch.zeros(count, 128).long()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=list).encode()).hexdigest()[:10]


def one_seed(job: Job, seed: int) -> Job:
    """The part of it that has this seed."""
    return replace(job, seeds=(seed,), data=job.data.replace("{seed}", str(seed)))
