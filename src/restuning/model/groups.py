"""Adapters of one kind that run as one, and go on to compute the same whatever others come and go."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from restuning.hooks.points import backbone_lock
from restuning.model.adapter import AdapterModule, Reader
from restuning.model.stack import Stack


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


def padded_width(adapter: AdapterModule) -> int:
    """To how many classes its head is padded: a power of two, so that a stack computes the same for an adapter whatever
    others are in it."""
    return 1 << max(3, ((adapter.config.num_classes or 1) - 1).bit_length())
