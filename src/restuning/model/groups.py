"""Adapters of one kind that run as one, and go on to compute the same whatever others come and go."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restuning.hooks.points import backbone_lock
from restuning.model.adapter import AdapterModule, Reader
from restuning.model.stack import Stack
from restuning.side.features import Features

CHUNK = 64
"""Adapters of a stack at most, so that one that comes or goes moves few others."""


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


def packed(asked: Sequence[tuple[Group, Sequence[str]]]) -> list[list[tuple[Group, Sequence[str]]]]:
    """What is computed together of groups and what is asked of each: few of many groups of one kind are as many as one
    group's at most. What is asked for alone decides, so that outputs stay the same whatever else comes and goes."""
    packs: list[list[tuple[Group, Sequence[str]]]] = []
    latest: dict[str, list[tuple[Group, Sequence[str]]]] = {}
    for group, names in asked:
        pack = latest.get(group.key, [])
        joins = group.stack is not None and not group.stack.common
        if pack and joins and sum(len(own) for _, own in pack) + len(names) <= CHUNK:
            pack.append((group, names))
        else:
            latest[group.key] = pack = [(group, names)]
            packs.append(pack)
    return packs


def picked(
    pack: Sequence[tuple[Group, Sequence[str]]], wanted: Mapping[str, Sequence[int]], alike: bool
) -> Callable[..., Tensor]:
    """The stack of what is asked for: of each task once, or once for each of its rows."""
    parts: list[tuple[Stack, list[int]]] = []
    for group, names in pack:
        assert group.stack is not None
        places = {name: i for i, name in enumerate(group.readers)}
        parts.append(
            (group.stack, [places[name] for name in names for _ in (wanted[name][:1] if alike else wanted[name])])
        )
    if len(parts) > 1:
        return Stack.joined(parts)
    stack, which = parts[0]
    if alike and len(which) == len(stack):
        return stack
    return partial(stack, which=torch.tensor(which, device=next(iter(stack.tensors.values())).device))


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


def hold_in_common(adapter: AdapterModule, held: MutableMapping[Any, Tensor]) -> None:
    """Make buffers of its side network (components, what tasks share) that equal one of `held` the same tensor, and
    add the others to it. None of them may ever change again."""
    side = adapter.side
    if side is None:
        return
    for name, buffer in list(side.named_buffers()):
        key = (*buffer.shape, buffer.dtype, buffer.device, float(buffer.double().sum()))
        other = held.setdefault(key, buffer)
        if _same(other, buffer):
            path, _, last = name.rpartition(".")
            setattr(side.get_submodule(path), last, other)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def padded_width(adapter: AdapterModule) -> int:
    """To how many classes its head is padded: a power of two, so that a stack computes the same for an adapter whatever
    others are in it."""
    return 1 << max(3, ((adapter.config.num_classes or 1) - 1).bit_length())
