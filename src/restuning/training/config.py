"""How training is done, as data and pure functions: the settings, the learning rate, the order of the data."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

from restuning.errors import RestuningError
from restuning.utils.options import Option

_MAY_BE_ZERO = (
    *("weight_decay", "label_smoothing", "consistency", "consistency_noise"),
    *("warmup_epochs", "seed", "workers"),
)


@dataclass(frozen=True)
class TrainConfig:
    """The recipe: AdamW, linear warm-up (at most a fifth of the epochs), then a cosine to 0, or (`schedule`) constant.

    `batch_size` examples over all processes, in each of the `accumulate` batches that one step averages over.
    With `patience`, training stops after so many epochs without a better validation score, and the best state
    stands. head_lr_factor: the head's learning rate in multiples of `lr`, which tuners and side paths have.
    label_smoothing: the share of every label that all classes have.
    consistency: λ, of the squared difference of two draws' logits, where what tuners and side paths add is multiplied
    by N(1, σ²), σ falling with depth from `consistency_noise` (see `restuning.training.consistency`); 0: no such draws.
    ema: of the weights, a mean that decays so much a step, which stands at the end.
    """

    epochs: Annotated[int, Option()] = 50
    lr: Annotated[float, Option("learning rate")] = 1e-3
    head_lr_factor: Annotated[float, Option("the head's learning rate, in multiples of lr", metavar="FACTOR")] = 1.0
    weight_decay: Annotated[float, Option("never on scales, gates, biases, norms")] = 0.05
    batch_size: Annotated[int, Option("examples, over all processes")] = 32
    warmup_epochs: Annotated[float, Option("at most a fifth of all")] = 10
    schedule: Annotated[Literal["cosine", "constant"], Option("of the learning rate, after the warm-up")] = "cosine"
    label_smoothing: Annotated[float, Option("share of a label that all classes have")] = 0.0
    consistency: Annotated[
        float, Option("weight of the squared difference of two noisy draws' logits, as in PACE", metavar="LAMBDA")
    ] = 0.0
    consistency_noise: Annotated[float, Option("its noise at the first block", metavar="SIGMA")] = 0.5
    ema: Annotated[float | None, Option("decay of the mean of the weights, which is what is saved (default none)")] = (
        None
    )
    precision: Annotated[Literal["no", "bf16", "fp16"], Option("mixed precision")] = "no"
    accumulate: Annotated[int, Option("batches per step")] = 1
    clip: Annotated[float | None, Option("largest gradient norm (default none)")] = None
    seed: Annotated[int, Option()] = 0
    patience: Annotated[
        int | None, Option("stop after so many epochs without a better validation score (default never)")
    ] = None
    group_by_length: Annotated[bool, Option("batches of texts of about one length")] = False
    workers: Annotated[int, Option("processes that load images")] = 0
    save_seconds: float = 60

    def __post_init__(self) -> None:
        if self.precision not in ("no", "bf16", "fp16"):
            raise RestuningError(f"precision is {self.precision!r}: expected no, bf16 or fp16")
        if self.schedule not in ("cosine", "constant"):
            raise RestuningError(f"schedule is {self.schedule!r}: expected cosine or constant")
        if self.ema is not None and not self.ema < 1:
            raise RestuningError(f"ema is {self.ema!r}: expected a number below 1")
        if not self.label_smoothing < 1:
            raise RestuningError(f"label_smoothing is {self.label_smoothing!r}: expected a number below 1")
        kinds = get_type_hints(type(self))
        for f in fields(self):
            value, whole = getattr(self, f.name), kinds[f.name] in (int, int | None)
            if f.name in ("precision", "schedule", "group_by_length") or (value is None and f.default is None):
                continue
            kind = "a whole number" if whole else "a number"
            bound = "of 0 or more" if f.name in _MAY_BE_ZERO else "above 0"
            good = isinstance(value, int if whole else (int, float)) and math.isfinite(value)
            if not good or value < 0 or (value == 0 and f.name not in _MAY_BE_ZERO):
                raise RestuningError(f"{f.name} is {value!r}: expected {kind} {bound}")


GROUP = 50
"""Batches that are drawn together where texts of a length are grouped."""


def learning_rate(step: int, steps: int, warmup: float, peak: float, schedule: str = "cosine") -> float:
    """The lr of a step: linear to the peak over `warmup` steps, then half a cosine that would reach 0 at `steps`, or
    the peak."""
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    if schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def parameter_groups(model: nn.Module, weight_decay: float, head_lr_factor: float = 1.0) -> list[dict[str, Any]]:
    """What is trained, as `groups_of` parts it. Raises RestuningError where nothing is."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise RestuningError("nothing to train: no parameter of the model has requires_grad")
    return groups_of(trained, weight_decay, head_lr_factor)


def groups_of(
    tensors: Mapping[str, Tensor], weight_decay: float, head_lr_factor: float, matrix: int = 2
) -> list[dict[str, Any]]:
    """An optimizer's groups: matrices with weight decay; α, λ, scales, biases and norms without. factor: by which `lr`
    is multiplied, head_lr_factor where a part of the name is `head`. matrix: the dimensions of one."""
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, tensor in tensors.items():
        factor = head_lr_factor if "head" in name.split(".") else 1.0
        groups.setdefault((tensor.ndim < matrix, factor), []).append(tensor)
    return [
        {"params": groups[bare, factor], "weight_decay": 0.0 if bare else weight_decay, "factor": factor}
        for bare, factor in sorted(groups)
    ]


def seed_of(*place: int) -> int:
    # a string is hashed in full (SHA-512), so neighbouring places share nothing
    return random.Random(repr(place)).getrandbits(63)


def data_order(
    examples: int, batch_size: int, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """The batches of an epoch, over all processes. lengths: of the examples, of which those in a batch are alike then:
    every 50 batches are drawn as one and sorted."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    order: list[int] = torch.randperm(examples, generator=generator).tolist()
    if lengths is not None:
        many = GROUP * batch_size
        order = [i for at in range(0, examples, many) for i in sorted(order[at : at + many], key=lengths.__getitem__)]
    batches = [order[i : i + batch_size] for i in range(0, examples, batch_size)]
    if lengths is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches
