"""Training a stack from features: grid points or tasks, side by side."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from restuning.data.objective import Objective, objective
from restuning.errors import MethodError
from restuning.features.bank.window import Window
from restuning.model.stack import Stack
from restuning.side.features import Features
from restuning.training.config import TrainConfig, data_order, groups_of, learning_rate


@dataclass(frozen=True)
class Point:
    """How one module of a stack is trained: its recipe, and its own rows of the shared features, in order."""

    config: TrainConfig
    rows: Tensor

    def __post_init__(self) -> None:
        c = self.config
        if c.clip is not None or c.patience is not None or c.accumulate != 1 or c.group_by_length:
            raise MethodError("a stack trains by the plain recipe: no clipping, patience, accumulation or grouping")
        if c.consistency:
            raise MethodError("a stack trains by the plain recipe: no consistency between draws of noise")
        if c.ema is not None or c.precision != "no":
            raise MethodError("a stack trains by the plain recipe: no mean of the weights, and in single precision")


def train(
    stack: Stack,
    features: Features | Window,
    labels: Tensor,
    points: Sequence[Point],
    task_objective: Objective | None = None,
    seen: Callable[[int, int, float], None] | None = None,
) -> list[bool]:
    """Train all modules at once, each exactly as `restuning.training.loop.fit` would train it alone.

    features: of all rows, shared by all points, or a window on a bank that is read as it goes; labels: (rows, …), or
    (N, rows, …) for other tasks on them. task_objective: the tasks'; None: of single labels.
    seen: told the step, of how many, and the mean loss, after every step.
    Points must have as many examples as one another, and one batch size. Returns which of them ended in finite values.
    """
    counts = {(len(p.rows), p.config.batch_size) for p in points}
    if len(points) != len(stack) or len(counts) != 1:
        raise MethodError("points of a stack share the number of examples and the batch size")
    ((examples, batch_size),) = counts
    steps = -(-examples // batch_size)
    stack.tensors = {name: t.detach() for name, t in stack.tensors.items()}
    trained = {n: stack.tensors[n] for n, p in stack.model.named_parameters() if p.requires_grad}
    optimizer = _AdamW(trained, [p.config for p in points])
    task_objective = task_objective or objective()
    loss_of = torch.vmap(task_objective.loss)
    labels = _of_each(labels, task_objective, len(points))
    everyone = torch.arange(len(points), device=labels.device)[:, None]

    def rows() -> Iterator[Tensor]:
        """Of every step: (N, batch), or (batch,) where they are those of all points."""
        for epoch in range(max(p.config.epochs for p in points)):
            orders = [data_order(examples, batch_size, p.config.seed, epoch) for p in points]
            for step in range(steps):
                yield _shared(torch.stack([p.rows[order[step]] for p, order in zip(points, orders, strict=True)]))

    for step, (at, batch) in enumerate(_read(features, rows(), labels.device)):
        with torch.enable_grad():
            for t in trained.values():
                t.requires_grad_(True)
            logits = stack(batch, batched=at.ndim == 2)
            loss = loss_of(logits, labels[everyone, at]).sum()
            grads = torch.autograd.grad(loss, list(trained.values()))
        optimizer.step(grads, [_rate(p.config, step, steps) for p in points])
        if seen is not None:
            seen(step + 1, steps * max(p.config.epochs for p in points), float(loss.detach()) / len(points))
    for t in trained.values():
        t.requires_grad_(False)
    finite = torch.ones(len(points), dtype=torch.bool, device=labels.device)
    for name, t in trained.items():
        good = t.isfinite() | (t == -torch.inf) if name.endswith("head.bias") else t.isfinite()
        finite &= good.flatten(1).all(1)
    return finite.tolist()


def _shared(at: Tensor) -> Tensor:
    """(N, b), or (b,) if all are alike."""
    return at[0] if bool((at == at[0]).all()) else at


def _read(
    features: Features | Window, rows: Iterable[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Features]]:
    """(rows, their features), in order."""
    if isinstance(features, Window):
        for at, found in features.batches(rows):
            yield at.to(device), found.map(lambda x: x.to(device))
    else:
        for at in (at.to(device) for at in rows):
            yield at, features.rows(at).trimmed()


def _rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of `restuning.training.loop`; 0 for a point that has ended."""
    if step >= config.epochs * steps:
        return 0.0
    warmup = min(config.warmup_epochs, 0.2 * config.epochs)
    return learning_rate(step, config.epochs * steps, warmup * steps, config.lr, config.schedule)


class _AdamW:
    """torch.optim.AdamW, one for each of the stacked modules, on its slices of the stacked tensors; one for all of them
    where they differ in their seeds alone, since it treats every number by itself."""

    def __init__(self, tensors: dict[str, Tensor], configs: Sequence[TrainConfig]) -> None:
        alike = len({replace(config, seed=0) for config in configs}) == 1
        self.parts: list[int | slice] = [slice(None)] if alike else list(range(len(configs)))
        named = [{name: t.detach()[part] for name, t in tensors.items()} for part in self.parts]
        self.slices = [list(slices.values()) for slices in named]
        matrix = 2 + alike  # dimensions, with the stack's own
        self.optimizers = [
            torch.optim.AdamW(groups_of(slices, config.weight_decay, config.head_lr_factor, matrix), fused=True)
            for slices, config in zip(named, configs, strict=False)
        ]

    def step(self, grads: Sequence[Tensor], lrs: Sequence[float]) -> None:
        """A module whose rate is 0 has ended, and stays as it is."""
        grads = [g.contiguous() for g in grads]  # the fused kernel reads memory in its order, whatever the strides
        # one part for all of them has one rate, the first
        for part, slices, optimizer, lr in zip(self.parts, self.slices, self.optimizers, lrs, strict=False):
            if lr > 0:
                for t, g in zip(slices, grads, strict=True):
                    t.grad = g[part]
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["factor"]
                optimizer.step()


@torch.no_grad()
def scores(
    stack: Stack,
    features: Features | Window,
    labels: Tensor,
    rows: Sequence[Tensor],
    task_objective: Objective | None = None,
    batch_size: int = 256,
) -> list[float]:
    """The objective's first metric of every module on its own rows (equally many) of the shared features."""
    task_objective = task_objective or objective()
    at, labels = torch.stack(list(rows)).to(labels.device), _of_each(labels, task_objective, len(stack))
    each = (_shared(part) for part in torch.split(at, batch_size, 1))
    parts = [stack(batch, batched=part.ndim == 2) for part, batch in _read(features, each, at.device)]
    return [next(task_objective.metrics(own, labels[i, at[i]]))[1] for i, own in enumerate(torch.cat(parts, 1))]


def _of_each(labels: Tensor, task_objective: Objective, count: int) -> Tensor:
    """Labels of the rows, (N, rows, …), where they may be shared by all N."""
    shared = labels.ndim == (1 if task_objective.kind == "single-label" else 2)
    return labels.expand(count, *labels.shape) if shared else labels
