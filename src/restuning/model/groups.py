"""Adapters of one kind that run as one, and go on to compute the same whatever others come and go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restuning.hooks.points import backbone_lock
from restuning.model.adapter import AdapterModule, Reader
from restuning.model.stack import Stack
from restuning.side.features import Features


@dataclass(frozen=True, eq=False)
class Group:
    """Adapters of one kind that read features only, at most CHUNK of them; stack: None for one that cannot be stacked.
    Its place in a group never moves while an adapter is there, so that its outputs do not either."""

    key: str
    readers: Mapping[str, Reader]
    stack: Stack | None = None

    @classmethod
    def of(cls, key: str, readers: Mapping[str, Reader], backbone: nn.Module) -> "Group":
        first = next(iter(readers.values()))
        if not first.adapter.stackable or not any(True for _ in first.parameters()):
            return cls(key, readers)
        # a stack that runs puts its tensors into the first of its readers, which older snapshots share
        with torch.no_grad(), backbone_lock(backbone):
            return cls(key, readers, Stack(list(readers.values()), padded_width(first.adapter)))


class Prepared:
    """What stacks with the same fixed weights make of the same features first (`SideNetwork.prepare`), made once."""

    def __init__(self) -> None:
        self._made: list[tuple[Mapping[str, Any], Sequence[Tensor], Features]] = []

    def of(self, stack: Stack, reader: Reader, features: Features) -> Features:
        """
        Args:
            stack: whose modules have these weights in common, or the features come back as they are.
            reader: its first.
            features: as it reads them; the same at every call.
        """
        side, spec = reader.adapter.side, reader.adapter.config.spec
        own = {} if side is None else {f"adapter.side.{name}": t for name, t in side.named_buffers()}
        if side is None or not own or not stack.common.issuperset(own):
            return features
        for kind, weights, prepared in self._made:
            if kind == spec and all(map(_same, weights, own.values())):
                return prepared
        prepared = side.prepare(features)
        self._made.append((spec, [*own.values()], prepared))
        return prepared


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def padded_width(adapter: AdapterModule) -> int:
    """To how many classes its head is padded: a power of two, so that a stack computes the same for an adapter whatever
    others are in it."""
    return 1 << max(3, ((adapter.config.num_classes or 1) - 1).bit_length())
