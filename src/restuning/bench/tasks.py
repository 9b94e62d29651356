"""Many tasks, mixed batches, grids and banks, beside one."""

import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from restuning.backbones.load import reading_of
from restuning.data import Items, Task
from restuning.errors import MethodError, RestuningError, SiteError, line
from restuning.features.bank import Bank, FromBank, FromFeatures, build
from restuning.features.stacked import Point, train
from restuning.model.stack import Stack
from restuning.model.tuned import adapt
from restuning.side.features import Features
from restuning.training.config import TrainConfig, data_order
from restuning.utils.profiling import in_turn

if TYPE_CHECKING:
    from PIL.Image import Image

from restuning.bench.settings import (
    BANK_STEPS,
    GRID_STEPS,
    RUN_FULL,
    Bench,
    Call,
    Measured,
    loss_of,
    many_adapters,
    on_device,
    training_step,
    without_grad,
)


def multitask(settings: Bench) -> Measured:
    """Tasks of a bypass, or of another method, on one pass of a shared backbone, beside as many fully fine-tuned
    models."""
    if len(settings.methods) != 1:
        raise RestuningError(f"multitask is of one method: given are {len(settings.methods)}")
    shared, (x, _) = settings.load(), settings.inputs()
    full, tuned = settings.subject("full").eval(), many_adapters(settings, shared, settings.methods[0])
    counts = sorted({t for t in (1, 2, 5, 10, 19, 50, 100, 200, 500) if t < settings.tasks} | {settings.tasks})
    names = {t: ("1 task", "1 full model") if t == 1 else (f"{t} tasks", f"{t} full models") for t in counts}

    def models(n: int) -> None:
        for _ in range(n):
            full(x)

    calls: dict[str, Call] = {"forward": without_grad(lambda: shared(x))}
    for t in counts:
        calls[names[t][0]] = without_grad(lambda: tuned(x))
        if t in (1, RUN_FULL):
            calls[names[t][1]] = without_grad(partial(models, t))

    def before(name: str) -> None:
        if "task" in name:
            tuned.set_adapter([f"t{i}" for i in range(int(name.split()[0]))])
            without_grad(lambda: tuned(x[:1]))()  # what is made once for a choice of adapters

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


def mixed(settings: Bench) -> Measured:
    """A batch whose rows have adapters of their own, beside a batch of one adapter."""
    shared, (x, _), measured = settings.load(), settings.inputs(), Measured()
    names, calls = [f"t{i % settings.tasks}" for i in range(len(x))], dict[str, Call]()
    for method in ("adapter", "lora", "prefix", "bypass"):
        one, mixed = f"{method}, one", f"{method}, {settings.tasks} mixed"
        tuned = many_adapters(settings, shared, method)
        tuned.set_adapter("t0")
        try:
            without_grad(partial(tuned, x[:2], adapter_names=names[:2]))()
        except (MethodError, SiteError) as error:
            measured.absent[mixed] = line(error)
            continue
        calls |= {one: without_grad(partial(tuned, x)), mixed: without_grad(partial(tuned, x, adapter_names=names))}
        measured.against(one, "images_per_second", [mixed])
    measured.seconds(in_turn(calls, settings.rounds), "images", dict.fromkeys(calls, settings.batch))
    return measured


def grid(settings: Bench) -> Measured:
    """Points of a grid, an epoch of `GRID_STEPS` from features kept: one alone, all as a stack, all one by one."""
    shared, (x, _), n, rows = settings.load(), settings.inputs(), settings.points, settings.batch * GRID_STEPS
    tapped = adapt(shared, "bypass", settings.classes).features(x[:1])
    features = tapped.map(lambda f: torch.randn(rows, *f.shape[1:], device=f.device))
    labels, at = torch.arange(rows, device=x.device) % settings.classes, torch.arange(rows)
    models = [FromFeatures(adapt(shared, "bypass", settings.classes)).train() for _ in range(n)]

    def alone(n: int) -> None:
        for model in models[:n]:
            orders = iter(data_order(rows, settings.batch, 0, 0))
            step = training_step(model, lambda m=model, o=orders: loss_of(m, features, labels, next(o)))  # type: ignore[misc]
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


def bank(settings: Bench) -> Measured:
    """Steps and epochs of a bypass from features in memory and on disk, beside a step of full fine-tuning."""
    shared, (x, labels), measured = settings.load(), settings.inputs(), Measured()
    tuned, full = adapt(shared, "bypass", settings.classes).train(), settings.subject("full")
    model, classes = FromFeatures(tuned), tuple(map(str, range(settings.classes)))
    task = Task("noise", classes, Noise(settings.batch * BANK_STEPS, len(classes)), None, Noise(1, len(classes)))
    with tempfile.TemporaryDirectory() as folder:
        build(tuned, task, reading_of(shared, settings.image_size), Path(folder), batch_size=settings.batch)
        bank = Bank(folder)
        rows = FromBank(bank, bank.source().train)
        kept, kept_labels = on_device(bank.rows("train").fetch(range(len(rows))), x.device)
        orders = (batch for epoch in count() for batch in data_order(len(rows), settings.batch, 0, epoch))

        def read() -> tuple[Features, Tensor]:
            return on_device(rows.__getitems__(next(orders)), x.device)

        def disk_loss() -> Tensor:
            features, labels = read()
            return F.cross_entropy(model(features), labels)

        def epoch(step: Call) -> None:
            for _ in range(BANK_STEPS):
                step()

        memory, disk = (
            training_step(model, lambda: loss_of(model, kept, kept_labels, next(orders))),
            training_step(model, disk_loss),
        )
        calls: dict[str, Call] = {
            "full step": training_step(full, lambda: full(x, labels=labels)["loss"]),
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


class Noise(Items):
    """Random pictures."""

    def __init__(self, count: int, classes: int) -> None:
        self.names, self.labels = [f"noise {i}" for i in range(count)], [i % classes for i in range(count)]

    def item(self, i: int) -> "Image":
        from PIL import Image

        pixels = torch.randint(256, (16 * 16 * 3,), generator=torch.Generator().manual_seed(i))
        return Image.frombytes("RGB", (16, 16), bytes(pixels.tolist()))
