"""Many adapters of one shape as one: grid points or tasks, side by side in batched matrix products."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from restuning._types import Features
from restuning.errors import MethodError
from restuning.recipe import TrainConfig, data_order, learning_rate


class Stack:
    """Modules of one shape, of which only the heads may differ in their number of classes.

    `stack(features)` gives logits (N, b, c): features (b, …) are shared by all, features (N, b, …) with `own=True` are
    one batch each. c is the largest number of classes; a narrower head says −inf beyond its own.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        """models: read features, as `FromFeatures` does. Raises MethodError if their shapes differ."""
        self.model, self.models = models[0], list(models)
        named = [{name: p for name, p in m.named_parameters() if p.requires_grad} for m in models]
        self.tensors: dict[str, Tensor] = {}
        for name, first in named[0].items():
            parts = []
            for i, other in enumerate(named):
                p = other.get(name)
                if p is None or p.shape[1:] != first.shape[1:] or (p.shape != first.shape and ".head." not in name):
                    raise MethodError(
                        f"adapter {i} has another shape than the first ({name}): it needs a stack of its own"
                    )
                parts.append(p.detach())
            rows = max(len(p) for p in parts) if first.ndim else 0
            self.tensors[name] = torch.stack([_padded(p, rows, name) for p in parts])
        if any(len(other) != len(self.tensors) for other in named):
            raise MethodError("adapters of different methods: each method needs a stack of its own")

    def __len__(self) -> int:
        return len(self.models)

    def __call__(self, features: Features, own: bool = False) -> Tensor:
        def one(tensors: dict[str, Tensor], features: Features) -> Any:
            return functional_call(self.model, tensors, (features,))

        out: Tensor = torch.vmap(one, in_dims=(0, 0 if own else None), randomness="error")(self.tensors, features)
        return out

    @torch.no_grad()
    def write_back(self) -> None:
        """Give every module its own parameters, as they are now."""
        for i, model in enumerate(self.models):
            for name, p in model.named_parameters():
                if name in self.tensors:
                    p.copy_(self.tensors[name][i, : len(p)] if p.ndim else self.tensors[name][i])


def _padded(p: Tensor, rows: int, name: str) -> Tensor:
    if p.ndim == 0 or len(p) == rows:
        return p
    # the missing classes: weights of zero, and a bias that no softmax sees
    fill = -torch.inf if name.endswith("bias") else 0.0
    return torch.cat([p, p.new_full((rows - len(p), *p.shape[1:]), fill)])


@dataclass(frozen=True)
class Point:
    """How one module of a stack is trained: its recipe, and its own rows of the shared features, in order."""

    config: TrainConfig
    rows: Tensor

    def __post_init__(self) -> None:
        if self.config.clip is not None or self.config.patience is not None or self.config.accumulate != 1:
            raise MethodError("a stack trains by the plain recipe: no clipping, patience or accumulation")


def train(stack: Stack, features: Features, labels: Tensor, points: Sequence[Point]) -> list[bool]:
    """Train all modules at once, each exactly as `restuning.train.fit` would train it alone.

    features: ((rows, tokens, width), …) shared by all points; labels: (rows,), or (N, rows) for other tasks on them.
    Points must have as many examples as one another, and one batch size. Returns which of them ended in finite values.
    """
    counts = {(len(p.rows), p.config.batch_size) for p in points}
    if len(points) != len(stack) or len(counts) != 1:
        raise MethodError("points of a stack share the number of examples and the batch size")
    ((examples, batch_size),) = counts
    steps = -(-examples // batch_size)
    optimizer = _AdamW(stack.tensors, [p.config for p in points])
    labels = labels.expand(len(points), -1)
    everyone = torch.arange(len(points))[:, None]
    for epoch in range(max(p.config.epochs for p in points)):
        orders = [data_order(examples, batch_size, p.config.seed, epoch) for p in points]
        for step in range(steps):
            at = torch.stack([p.rows[order[step]] for p, order in zip(points, orders, strict=True)])
            lrs = [_rate(p.config, epoch * steps + step, steps) for p in points]
            together = bool((at == at[0]).all())
            batch = tuple(x[at[0]] if together else x[at] for x in features)
            with torch.enable_grad():
                for t in stack.tensors.values():
                    t.requires_grad_(True)
                logits = stack(batch, own=not together)
                loss = F.cross_entropy(logits.flatten(0, 1), labels[everyone, at].flatten(), reduction="sum")
                grads = torch.autograd.grad(loss / at.shape[1], list(stack.tensors.values()))
            optimizer.step(grads, lrs)
    for t in stack.tensors.values():
        t.requires_grad_(False)
    finite = torch.ones(len(points), dtype=torch.bool)
    for name, t in stack.tensors.items():
        good = t.isfinite() | (t == -torch.inf) if name.endswith("head.bias") else t.isfinite()
        finite &= good.flatten(1).all(1)
    return finite.tolist()


def _rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of `restuning.train`; 0 for a point that has ended."""
    if step >= config.epochs * steps:
        return 0.0
    warmup = min(config.warmup_epochs, 0.2 * config.epochs)
    return learning_rate(step, config.epochs * steps, warmup * steps, config.lr)


class _AdamW:
    """torch.optim.AdamW, one for each of the stacked modules, on its slices of the stacked tensors."""

    def __init__(self, tensors: dict[str, Tensor], configs: Sequence[TrainConfig]) -> None:
        self.slices = [[t.detach()[i] for t in tensors.values()] for i in range(len(configs))]
        self.optimizers = [
            torch.optim.AdamW(
                [
                    # matrices alone decay, as in restuning.recipe
                    {"params": [t for t in slices if t.ndim >= 2], "weight_decay": config.weight_decay},
                    {"params": [t for t in slices if t.ndim < 2], "weight_decay": 0.0},
                ],
                fused=True,
            )
            for slices, config in zip(self.slices, configs, strict=True)
        ]

    def step(self, grads: Sequence[Tensor], lrs: Sequence[float]) -> None:
        """A module whose rate is 0 has ended, and stays as it is."""
        grads = [g.contiguous() for g in grads]  # the fused kernel reads memory in its order, whatever the strides
        for i, (slices, optimizer, lr) in enumerate(zip(self.slices, self.optimizers, lrs, strict=True)):
            if lr > 0:
                for t, g in zip(slices, grads, strict=True):
                    t.grad = g[i]
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()


@torch.no_grad()
def accuracies(
    stack: Stack, features: Features, labels: Tensor, rows: Sequence[Tensor], batch_size: int = 256
) -> list[float]:
    """Accuracy in percent of every module on its own rows (equally many) of the shared features."""
    at, labels = torch.stack(list(rows)), labels.expand(len(stack), -1)
    everyone, correct = torch.arange(len(stack))[:, None], torch.zeros(len(stack))
    for part in torch.split(at, batch_size, 1):
        together = bool((part == part[0]).all())
        logits = stack(tuple(x[part[0]] if together else x[part] for x in features), own=not together)
        correct += (logits.argmax(-1) == labels[everyone, part]).sum(1)
    return [float(c) for c in 100 * correct / at.shape[1]]
