"""Several adapters at once: which of them are of one kind, and stacks of them on shared features."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from restuning.model.adapter import AdapterModule, Reader
from restuning.model.stack import Stack
from restuning.side import SideNet
from restuning.side.features import TokenSelection

CHUNK = 64
"""Adapters of a stack at most, so that one that comes or goes moves few others."""


def kind_of(name: str, adapter: AdapterModule) -> str:
    """What adapters that can be one stack share; an adapter with own tuners, or with a network on the pixels, is a kind
    of its own."""
    spec = json.dumps(adapter.config.spec)
    alone = name if '"own": ' in spec or isinstance(adapter.side, SideNet) or adapter.full else ""
    return f"{alone} {adapter.config.pool} {adapter.config.num_classes is None} {spec}"


@dataclass(frozen=True)
class AdapterStack:
    """A stack of some adapters, by name."""

    readers: dict[str, Reader]
    stack: Stack

    def __call__(self, features: Mapping[int, Tensor], kept: TokenSelection, head: bool) -> dict[str, Tensor]:
        first = next(iter(self.readers.values()))
        out = self.stack(first.own(features, kept), head)
        classes = [r.adapter.config.num_classes if head else None for r in self.readers.values()]
        return {name: one[..., :c] for name, one, c in zip(self.readers, out, classes, strict=True)}


def serve(readers: Mapping[str, Reader], names: Sequence[str], before: Sequence[AdapterStack]) -> list[AdapterStack]:
    """Stacks for those of the adapters that are of one kind; of the stacks `before`, those that still hold are kept."""
    kept = [s for s in before if not s.stack.stale and all(readers.get(n) is r for n, r in s.readers.items())]
    wanted = set(names)
    kept = [served for served in kept if wanted.issuperset(served.readers)]
    there = {name for served in kept for name in served.readers}
    kinds: dict[str, list[str]] = {}
    for name in names:
        if name not in there and any(True for _ in readers[name].parameters()):
            kinds.setdefault(kind_of(name, readers[name].adapter), []).append(name)
    for alike in kinds.values():
        for i in range(0, len(alike) - 1, CHUNK):  # one alone needs no stack
            own = {name: readers[name] for name in alike[i : i + CHUNK]}
            with torch.no_grad():
                kept.append(AdapterStack(own, Stack(list(own.values()))))
    return kept


def take_rows(value: Any, rows: Sequence[int], batch: int) -> Any:
    """These rows of every tensor that has one for each of the batch."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and len(value) == batch and len(rows) < batch else value
    if isinstance(value, dict):
        return {key: take_rows(item, rows, batch) for key, item in value.items()}
    return type(value)(take_rows(item, rows, batch) for item in value) if type(value) in (tuple, list) else value
