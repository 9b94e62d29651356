"""Several adapters at once: which of them are of one kind, and stacks of them on shared features."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from restuning.errors import MethodError
from restuning.hooks.law import group_by_site
from restuning.hooks.points import backbone_lock
from restuning.hooks.tail import live, tail_of
from restuning.hooks.taps import tap
from restuning.model.adapter import AdapterModule, Reader
from restuning.model.groups import CHUNK, Prepared
from restuning.model.passes import features_of
from restuning.model.stack import PerRow, Stack
from restuning.side.features import FeatureRequest, Features

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned


def kind_of(name: str, adapter: AdapterModule) -> str:
    """What adapters that can be one stack share; an adapter with own tuners, or with a network on the pixels, is a kind
    of its own."""
    spec = json.dumps(adapter.config.spec)
    alone = name if '"own": ' in spec or not adapter.stackable or adapter.full else ""
    dtypes = sorted({str(p.dtype) for p in adapter.parameters()})
    return f"{alone} {adapter.config.pool} {adapter.config.num_classes is None} {dtypes} {spec}"


@dataclass(frozen=True)
class AdapterStack:
    """A stack of some adapters, by name."""

    readers: dict[str, Reader]
    stack: Stack

    def __call__(self, features: Features, head: bool, prepared: Prepared) -> dict[str, Tensor]:
        """{adapter: output}, from features that hold at least what they read; prepared: of these features."""
        first = next(iter(self.readers.values()))
        out = self.stack(prepared.of(self.stack, first, first.select(features)), head)
        classes = [r.adapter.config.num_classes if head else None for r in self.readers.values()]
        return {name: one[..., :c] for name, one, c in zip(self.readers, out, classes, strict=True)}


def stacks_of(
    readers: Mapping[str, Reader], names: Sequence[str], before: Sequence[AdapterStack]
) -> list[AdapterStack]:
    """Stacks for those of the adapters that are of one kind.

    Args:
        readers: of all adapters.
        names: of those that are wanted.
        before: stacks that were made earlier; those that still hold are used again.
    """
    stacks = [s for s in before if not s.stack.stale and all(readers.get(n) is r for n, r in s.readers.items())]
    wanted = set(names)
    stacks = [stack for stack in stacks if wanted.issuperset(stack.readers)]
    there = {name for stack in stacks for name in stack.readers}
    kinds: dict[str, list[str]] = {}
    for name in names:
        if name not in there and any(True for _ in readers[name].parameters()):
            kinds.setdefault(kind_of(name, readers[name].adapter), []).append(name)
    for alike in kinds.values():
        for i in range(0, len(alike) - 1, CHUNK):  # one alone needs no stack
            own = {name: readers[name] for name in alike[i : i + CHUNK]}
            with torch.no_grad():
                stacks.append(AdapterStack(own, Stack(list(own.values()))))
    return stacks


def take_rows(value: Any, rows: Sequence[int], batch: int) -> Any:
    """These rows of every tensor that has one for each of the batch."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and len(value) == batch and len(rows) < batch else value
    if isinstance(value, dict):
        return {key: take_rows(item, rows, batch) for key, item in value.items()}
    return type(value)(take_rows(item, rows, batch) for item in value) if type(value) in (tuple, list) else value


def from_features(tuned: "Tuned", features: Features, head: bool = True) -> Any:
    """Outputs of the active adapters, from features that they share; see `Tuned.from_features`."""
    names = tuned.active()
    if len(names) == 1:
        reader = tuned.reader(names[0])
        return reader(reader.select(features), head)
    found: dict[str, Tensor] = {}
    if not torch.is_grad_enabled() and not tuned.training:
        tuned.stacks = stacks_of({name: tuned.reader(name) for name in tuned.adapters}, names, tuned.stacks)
        prepared = Prepared()
        for stack in tuned.stacks:
            found |= stack(features, head, prepared)
    for name in names:
        if name not in found:
            reader = tuned.reader(name)
            found[name] = reader(reader.select(features), head)
    return {name: found[name] for name in names}


def mixed_batch(tuned: "Tuned", rows: Sequence[str | None], args: Any, kwargs: Any) -> Tensor:
    """Logits (b, c) of a batch whose rows have adapters of their own. Every kind of adapter takes one pass of the
    backbone, with all of its rows.

    Args:
        tuned: the adapters.
        rows: the adapter of every row; None: the bare backbone.
        args, kwargs: of the backbone's forward.

    Raises:
        MethodError: see `Tuned.forward`.
    """
    batch = len(next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), ()))
    if len(rows) != batch or not batch:
        raise MethodError(f"adapter_names has {len(rows)} names for a batch of {batch}: expected one for every row")
    kinds: dict[str | None, list[int]] = {}
    for i, name in enumerate(rows):
        kinds.setdefault(None if name is None else kind_of(name, tuned.adapter(name)), []).append(i)
    if len(kinds) > 1 and kwargs.get("past_key_values") is not None:
        raise MethodError("adapter_names with past_key_values: a cache is of one kind of adapter, one pass for all")
    parts = []
    for at in kinds.values():
        own_args, own_kwargs = take_rows((args, kwargs), at, batch)
        parts.append(_rows(tuned, [rows[i] for i in at], own_args, own_kwargs))
    if len({part.ndim for part in parts}) > 1:
        raise MethodError("adapter_names mixes pooled outputs with outputs of every token")
    widest = max(part.shape[-1] for part in parts)
    out = torch.cat([F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts])
    return out[torch.tensor([i for at in kinds.values() for i in at], device=out.device).argsort()]


def _rows(tuned: "Tuned", rows: Sequence[str | None], args: Any, kwargs: Any) -> Tensor:
    """Logits of rows whose adapters are of one kind."""
    names = [name for name in dict.fromkeys(rows) if name is not None]
    backbone, sites = tuned.backbone, tuned.sites
    if not names:
        tail = tail_of(backbone, sites)
        request = FeatureRequest((len(sites.blocks),), live(sites, tail.pool))
        with backbone_lock(backbone), tap(backbone, sites, request) as taps:
            out = backbone(*args, **kwargs)
        return out if isinstance(out, Tensor) and out.ndim == 2 else tail(taps.features.last)
    like = tuned.adapter(names[0])
    which = torch.tensor([names.index(str(name)) for name in rows], device=next(backbone.parameters()).device)
    alike = zip(*(tuned.adapter(name).inside for name in names), strict=True)
    inside = group_by_site(
        (same[0][0], "", same[0][1] if len(names) == 1 else PerRow([tuner for _, tuner in same], which))
        for same in alike
    )
    features = features_of(tuned, inside, like.request, like.reads_features, args, kwargs)
    if len(names) == 1 or not any(True for _ in like.parameters()):
        return tuned.reader(names[0])(features)  # type: ignore[no-any-return]
    readers = Stack([tuned.reader(name) for name in names])
    out = readers(features.map(lambda x: x[:, None]), batched=True, which=which)
    return out.squeeze(1)  # type: ignore[no-any-return]
