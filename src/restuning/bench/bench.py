"""What tuning costs beside its peers, all in one run: ratios with their spread, as JSON lines, tables and pictures.

A benchmark gives samples, one value of each unit for every round, and the pairs of names whose ratios are taken round
by round. What is wanted of them (`WANTED`) is wanted of ViT-B/16 at 224 x 224 in float32, on two CPU cores.
"""

import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.load import describe_backbone, load_backbone, reading_of
from restuning.bench.peers import PEERS, bound_loss, missing, subject
from restuning.data import Items, Preprocess, Task
from restuning.errors import MethodError, RestuningError, SiteError, line
from restuning.features.bank import Bank, FromBank, FromFeatures, build
from restuning.features.stacked import Point, train
from restuning.methods.named import find_method
from restuning.model.stack import Stack
from restuning.model.tuned import Tuned, adapt
from restuning.side.features import Features
from restuning.training.config import TrainConfig, data_order, parameter_groups
from restuning.utils.figures import Record
from restuning.utils.options import ImageSize, Option
from restuning.utils.profiling import in_turn, peak_bytes, saved_bytes, spread

if TYPE_CHECKING:
    from PIL.Image import Image

WANTED: dict[str, dict[tuple[str, str, str], str]] = {
    "memory": {
        ("bypass", "full", "saved_bytes"): "<= 0.005",
        ("bypass", "linear", "peak_bytes"): "<= 1.1",
        ("res-tuning", "peft-lora-equal", "saved_bytes"): "<= 1.1",
    },
    "step": {
        ("res-tuning", "peft-lora-equal", "seconds"): "<= 1",
        ("lora", "peft-lora", "seconds"): "<= 1.05",
        ("prefix", "prefix, bound", "seconds"): "<= 1.15",
        ("forward, res-tuning", "forward", "seconds"): "<= 1.08",
        ("bypass", "forward", "seconds"): "<= 1.25",
    },
    "multitask": {
        ("19 tasks", "19 full models", "seconds"): "<= 0.058",
        ("1000 tasks", "forward", "seconds"): "<= 1.4",
    },
    "mixed": {
        (f"{method}, 19 mixed", f"{method}, one", "images_per_second"): ">= 0.95"
        for method in ("adapter", "lora", "prefix")
    },
    "grid": {("8 points, a stack", "1 point", "seconds"): "<= 4"},
    "bank": {(f"step from {where}", "full step", "seconds"): "<= 0.001" for where in ("memory", "disk")},
}
RUN_FULL = 19  # so many full models are run one after the other; other numbers of them are counted from one
GRID_STEPS, BANK_STEPS = 32, 8  # of an epoch from features kept
METHODS = ("full", "linear", "bypass", "bypass-horizontal", "res-tuning", "lora", "prefix", "adapter", "lst", "dtl")

Call = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """The settings of a benchmark. methods: of `memory` and `step`, peers among them; tasks: adapters; points: of a
    grid."""

    backbone: Annotated[str, Option("a timm model, or restuning-micro")] = "vit_base_patch16_224"
    weights: Annotated[str, Option("file of pretrained weights")] = "random"
    image_size: ImageSize = None
    batch: Annotated[
        int, Option("images (default 8; mixed 64; grid and bank 32)", flag="batch-size", aliases=("batch",))
    ] = 8
    rounds: Annotated[int, Option("ratios are taken round by round")] = 5
    classes: Annotated[int, Option("of each head (default 100; multitask 10)")] = 100
    tasks: Annotated[int, Option("multitask: most tasks (default 1000); mixed: adapters (default 19)")] = 19
    points: Annotated[int, Option("of a grid")] = 8
    device: Annotated[str, Option("cpu or cuda")] = "cpu"
    methods: Annotated[tuple[str, ...], Option("memory and step: methods and peers (default: all)", flag="method")] = (
        *METHODS,
        *PEERS,
    )

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "classes", "tasks", "points"):
            if getattr(self, name) < 1:
                raise RestuningError(f"{name} {getattr(self, name)}: expected at least 1")
        twice = next((m for m in self.methods if self.methods.count(m) > 1), None)
        if twice is not None:
            raise RestuningError(f"method {twice!r}: expected each once")
        for method in (m for m in self.methods if m not in PEERS):
            find_method(method)
        if self.device not in ("cpu", "cuda"):
            raise RestuningError(f"device {self.device!r}: expected cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RestuningError("device cuda: no GPU can be used here; leave out --device, or install torch for it")

    def load(self) -> nn.Module:
        torch.manual_seed(0)
        return load_backbone(self.backbone, self.weights, self.image_size).to(self.device)

    def subject(self, name: str, backbone: nn.Module | None = None) -> Any:
        """What is trained, in training mode, on this backbone or on its own."""
        return subject(name, self.load() if backbone is None else backbone, self.backbone, self.classes)

    def side(self) -> int:
        how = reading_of(describe_backbone(self.backbone), self.image_size)
        if not isinstance(how, Preprocess):
            raise RestuningError(f"{self.backbone} reads texts: benchmarks are of backbones of images")
        return how.size[0]

    def inputs(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        labels = torch.arange(self.batch) % self.classes
        return torch.randn(self.batch, 3, self.side(), self.side()).to(self.device), labels.to(self.device)

    def facts(self, own: Sequence[str]) -> dict[str, Any]:
        """What a figure depends on; own: which of methods, tasks and points do."""
        return {
            **{k: v for k, v in asdict(self).items() if k in own or k not in ("methods", "tasks", "points")},
            "image_size": self.side(),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),  # glibc's; resident sets depend on it
            "device_name": torch.cuda.get_device_name() if self.device == "cuda" else _processor(),
        }


@dataclass
class Measured:
    """samples: name → unit → a value for every round (or one for all); absent: what could not be measured, and why."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    pairs: list[tuple[str, str, str]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def seconds(self, times: Mapping[str, list[float]], what: str = "", amounts: Mapping[str, int] = {}) -> None:
        """Times by name, and how much of `what` (images, steps) that is in a second."""
        for name, values in times.items():
            self.samples[name] = {"seconds": values}
            if name in amounts:
                self.samples[name][f"{what}_per_second"] = [amounts[name] / s for s in values]

    def against(self, to: str, unit: str = "seconds", names: Sequence[str] | None = None) -> None:
        self.pairs += [(name, to, unit) for name in (self.samples if names is None else names) if name != to]


def bench(what: str, **given: Any) -> list[Record]:
    """Run one of `BENCHES` with its defaults or the given settings; a record for every name.

    Raises RestuningError for an unknown benchmark or a setting that cannot be.
    """
    if what not in BENCHES:
        raise RestuningError(f"unknown benchmark {what!r}: expected one of {', '.join(BENCHES)}")
    run, own, defaults = BENCHES[what]
    settings = Bench(**{**defaults, **given})
    facts, measured = settings.facts(own), run(settings)
    records = []
    for name, units in measured.samples.items():
        ratios: dict[str, dict[str, Any]] = {}
        for a, b, unit in measured.pairs:
            if a == name and all(measured.samples.get(b, {}).get(unit, [0])):
                found = {k: _short(v) for k, v in spread(units[unit], measured.samples[b][unit]).items()}
                wanted = WANTED[what].get((a, b, unit)) if settings.backbone == "vit_base_patch16_224" else None
                ratios[f"{unit} / {b}"] = {**found, **({} if wanted is None else {"wanted": wanted})}
        values = {unit: _short(statistics.median(v)) for unit, v in units.items()}
        records.append({"what": what, "name": name, "values": values, "ratios": ratios, "settings": facts})
    return records + [
        {"what": what, "name": name, "values": {}, "ratios": {}, "absent": why, "settings": facts}
        for name, why in measured.absent.items()
    ]


# ---- what is measured


def _memory(settings: Bench) -> Measured:
    """One training step of each, in a fresh process for each round."""
    measured, threads = Measured(absent=_absent(settings)), torch.get_num_threads()
    for _ in range(settings.rounds):
        for name in (m for m in settings.methods if m not in measured.absent):
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    found = fresh.submit(_cost, settings, name, threads).result()
            except (MethodError, SiteError) as error:
                measured.absent[name] = line(error)
            except BrokenProcessPool as error:
                raise RestuningError(f"the process that measured {name} was killed: too little memory?") from error
            else:
                units = measured.samples.setdefault(name, {unit: [] for unit in found})
                for unit, value in found.items():
                    units[unit].append(value)
    measured.against("full", "saved_bytes")
    measured.against("full", "peak_bytes")
    measured.against("linear", "peak_bytes")
    measured.against("peft-lora-equal", "saved_bytes", ["res-tuning"])
    return measured


def _cost(settings: Bench, name: str, threads: int) -> dict[str, float]:
    """Of one training step; `peak_bytes` are those above `loaded_bytes`."""
    torch.set_num_threads(threads)
    model, (x, labels) = settings.subject(name), settings.inputs()
    tiny = nn.Linear(2, 2, device=x.device)
    _step(tiny, lambda: tiny(torch.ones(1, 2, device=x.device)).sum())()  # what the first step of any model loads
    loaded, above = peak_bytes(_step(model, lambda: model(x, labels=labels)["loss"]), x.device)
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "saved_bytes": saved_bytes(lambda: model(x, labels=labels)["loss"], model.parameters()),
        "peak_bytes": above,
        "loaded_bytes": loaded,
    }


def _steps(settings: Bench) -> Measured:
    """Training steps and forwards, in turn."""
    shared, (x, labels), measured = settings.load(), settings.inputs(), Measured(absent=_absent(settings))
    calls: dict[str, Call] = {"forward": _no_grad(lambda: shared(x))}
    for name in (m for m in settings.methods if m not in measured.absent):
        try:
            model = settings.subject(name, None if name == "full" or name in PEERS else shared)
        except (MethodError, SiteError) as error:
            measured.absent[name] = line(error)
            continue
        calls[name] = _step(model, lambda m=model: m(x, labels=labels)["loss"])  # type: ignore[misc]
        if name == "res-tuning":
            calls["forward, res-tuning"] = _no_grad(partial(model, x))
        if name == "prefix":
            calls["prefix, bound"] = _step(model, partial(bound_loss, model, x, labels))
    measured.seconds(in_turn(calls, settings.rounds))
    measured.against("full")
    measured.against("forward", names=["forward, res-tuning", "linear", "bypass"])
    measured.against("peft-lora-equal", names=["res-tuning", "bypass"])
    pairs = ("prefix", "prefix, bound"), ("lora", "peft-lora"), ("bypass", "swift-bypass")
    measured.pairs += [(name, to, "seconds") for name, to in pairs]
    return measured


def _multitask(settings: Bench) -> Measured:
    """Tasks of a bypass on one pass of a shared backbone, beside as many fully fine-tuned models."""
    shared, (x, _) = settings.load(), settings.inputs()
    full, tuned = settings.subject("full").eval(), _many(settings, shared, "bypass")
    counts = sorted({t for t in (1, 2, 5, 10, 19, 50, 100, 200, 500) if t < settings.tasks} | {settings.tasks})
    names = {t: ("1 task", "1 full model") if t == 1 else (f"{t} tasks", f"{t} full models") for t in counts}

    def models(n: int) -> None:
        for _ in range(n):
            full(x)

    calls: dict[str, Call] = {"forward": _no_grad(lambda: shared(x))}
    for t in counts:
        calls[names[t][0]] = _no_grad(lambda: tuned(x))
        if t in (1, RUN_FULL):
            calls[names[t][1]] = _no_grad(partial(models, t))

    def before(name: str) -> None:
        if "task" in name:
            tuned.set_adapter([f"t{i}" for i in range(int(name.split()[0]))])
            _no_grad(lambda: tuned(x[:1]))()  # what is made once for a choice of adapters

    times = in_turn(calls, settings.rounds, before)
    measured = Measured()
    measured.seconds({"forward": times["forward"]})
    for t in counts:
        tasks, models_ = names[t]
        counted = [t * s for s in times[names[1][1]]]
        ours, theirs = times[tasks], times.get(models_, counted)
        theirs_name = models_ if models_ in times else f"{models_}, counted"
        measured.samples |= {tasks: {"seconds": ours, "tasks": [t]}, theirs_name: {"seconds": theirs, "tasks": [t]}}
        measured.pairs += [(tasks, theirs_name, "seconds"), (tasks, "forward", "seconds")]
    if len(counts) > 1:
        first, last = times[names[counts[0]][0]], times[names[counts[-1]][0]]
        more = [(b - a) / (counts[-1] - counts[0]) for a, b in zip(first, last, strict=True)]
        measured.seconds({"one more task": more})
        measured.against("forward", names=["one more task"])
    return measured


def _mixed(settings: Bench) -> Measured:
    """A batch whose rows have adapters of their own, beside a batch of one adapter."""
    shared, (x, _), measured = settings.load(), settings.inputs(), Measured()
    names, calls = [f"t{i % settings.tasks}" for i in range(len(x))], dict[str, Call]()
    for method in ("adapter", "lora", "prefix", "bypass"):
        one, mixed = f"{method}, one", f"{method}, {settings.tasks} mixed"
        tuned = _many(settings, shared, method)
        tuned.set_adapter("t0")
        try:
            _no_grad(partial(tuned, x[:2], adapter_names=names[:2]))()
        except (MethodError, SiteError) as error:
            measured.absent[mixed] = line(error)
            continue
        calls |= {one: _no_grad(partial(tuned, x)), mixed: _no_grad(partial(tuned, x, adapter_names=names))}
        measured.against(one, "images_per_second", [mixed])
    measured.seconds(in_turn(calls, settings.rounds), "images", dict.fromkeys(calls, settings.batch))
    return measured


def _grid(settings: Bench) -> Measured:
    """Points of a grid, an epoch of `GRID_STEPS` from features kept: one alone, all as a stack, all one by one."""
    shared, (x, _), n, rows = settings.load(), settings.inputs(), settings.points, settings.batch * GRID_STEPS
    tapped = adapt(shared, "bypass", settings.classes).features(x[:1])
    features = tapped.map(lambda f: torch.randn(rows, *f.shape[1:], device=f.device))
    labels, at = torch.arange(rows, device=x.device) % settings.classes, torch.arange(rows)
    models = [FromFeatures(adapt(shared, "bypass", settings.classes)).train() for _ in range(n)]

    def alone(n: int) -> None:
        for model in models[:n]:
            orders = iter(data_order(rows, settings.batch, 0, 0))
            step = _step(model, lambda m=model, o=orders: _loss(m, features, labels, next(o)))  # type: ignore[misc]
            for _ in range(GRID_STEPS):
                step()

    def stacked(seeds: Sequence[int]) -> None:
        configs = [TrainConfig(1, 0.001 * (i + 1), batch_size=settings.batch, seed=s) for i, s in enumerate(seeds)]
        train(Stack(models[: len(seeds)]), features, labels, [Point(config, at) for config in configs])

    calls: dict[str, Call] = {
        "1 point": lambda: alone(1),
        "1 point, a stack": lambda: stacked([0]),
        f"{n} points, a stack": lambda: stacked([0] * n),
        f"{n} points, a stack, {n} seeds": lambda: stacked(range(n)),
        f"{n} points, one by one": lambda: alone(n),
    }
    measured = Measured()
    steps = {name: GRID_STEPS * int(name.split()[0]) for name in calls}
    measured.seconds(in_turn(calls, settings.rounds), "steps", steps)
    measured.against("1 point")
    return measured


def _bank(settings: Bench) -> Measured:
    """Steps and epochs of a bypass from features in memory and on disk, beside a step of full fine-tuning."""
    shared, (x, labels), measured = settings.load(), settings.inputs(), Measured()
    tuned, full = adapt(shared, "bypass", settings.classes).train(), settings.subject("full")
    model, classes = FromFeatures(tuned), tuple(map(str, range(settings.classes)))
    task = Task("noise", classes, _Noise(settings.batch * BANK_STEPS, len(classes)), None, _Noise(1, len(classes)))
    with tempfile.TemporaryDirectory() as folder:
        build(tuned, task, reading_of(shared, settings.image_size), Path(folder), batch_size=settings.batch)
        bank = Bank(folder)
        rows = FromBank(bank, bank.source().train)
        kept, kept_labels = _to(bank.rows("train").fetch(range(len(rows))), x.device)
        orders = (batch for epoch in count() for batch in data_order(len(rows), settings.batch, 0, epoch))

        def read() -> tuple[Features, Tensor]:
            return _to(rows.__getitems__(next(orders)), x.device)

        def disk_loss() -> Tensor:
            features, labels = read()
            return F.cross_entropy(model(features), labels)

        def epoch(step: Call) -> None:
            for _ in range(BANK_STEPS):
                step()

        memory, disk = _step(model, lambda: _loss(model, kept, kept_labels, next(orders))), _step(model, disk_loss)
        calls: dict[str, Call] = {
            "full step": _step(full, lambda: full(x, labels=labels)["loss"]),
            "read a batch": read,
            "step from memory": memory,
            "step from disk": disk,
            "epoch from memory": partial(epoch, memory),
            "epoch from disk": partial(epoch, disk),
        }
        images = {name: settings.batch * (BANK_STEPS if "epoch" in name else 1) for name in calls}
        measured.seconds(in_turn(calls, settings.rounds), "images", images)
    measured.against("full step", names=["read a batch", "step from memory", "step from disk"])
    return measured


BENCHES: dict[str, tuple[Callable[[Bench], Measured], Sequence[str], dict[str, Any]]] = {
    "memory": (_memory, ["methods"], {}),
    "step": (_steps, ["methods"], {}),
    "multitask": (_multitask, ["tasks"], {"classes": 10, "tasks": 1000}),
    "mixed": (_mixed, ["tasks"], {"batch": 64}),
    "grid": (_grid, ["points"], {"batch": 32}),
    "bank": (_bank, [], {"batch": 32}),
}
"""The benchmarks, the settings that only some of them have, and their defaults where these are not those of `Bench`."""


class _Noise(Items):
    """Random pictures."""

    def __init__(self, count: int, classes: int) -> None:
        self.names, self.labels = [f"noise {i}" for i in range(count)], [i % classes for i in range(count)]

    def item(self, i: int) -> "Image":
        from PIL import Image

        pixels = torch.randint(256, (16 * 16 * 3,), generator=torch.Generator().manual_seed(i))
        return Image.frombytes("RGB", (16, 16), bytes(pixels.tolist()))


def _absent(settings: Bench) -> dict[str, str]:
    """The peers among the methods that are not installed."""
    return {name: why for name, why in missing().items() if name in settings.methods}


def _many(settings: Bench, backbone: nn.Module, method: str) -> Tuned:
    tuned = Tuned(backbone)
    for i in range(settings.tasks):
        tuned.add_adapter(f"t{i}", method, settings.classes)
    return tuned.eval()


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Call:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _no_grad(call: Call) -> Call:
    return torch.no_grad()(call)


def _loss(model: nn.Module, features: Features, labels: Tensor, batch: Sequence[int]) -> Tensor:
    at = torch.tensor(batch, device=labels.device)
    return F.cross_entropy(model(features.rows(at)), labels[at])


def _to(batch: Any, device: torch.device) -> tuple[Features, Tensor]:
    features, labels = batch
    return features.map(lambda x: x.to(device)), labels.to(device)


def _processor() -> str:
    with suppress(OSError, StopIteration):
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        return next(row.split(":")[1].strip() for row in rows if row.startswith("model name"))
    return platform.processor() or platform.machine()


def _short(value: float) -> float:
    return float(f"{value:.6g}")
