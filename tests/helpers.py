"""What tests of several files share: adapters away from their initialisation, features by hooks of the tests' own."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tiny import Tiny
from torch import Tensor, nn

import restuning as rt
from restuning.model import compiled
from restuning.side.features import ALL

COMPILES = torch.__version__ >= compiled.LOWEST  # compared as versions
compiles = pytest.mark.skipif(not COMPILES, reason=f"Tuned.compile refuses torch before {compiled.LOWEST}")


def adapt(
    tiny: Tiny, method: Any, classes: int | None = 4, dtype: torch.dtype = torch.float32, **more: Any
) -> rt.Tuned:
    return rt.adapt(tiny.backbone(dtype), method, classes, anatomy=tiny.anatomy, **more)


def shake(tuned: rt.Tuned) -> rt.Tuned:
    """Away from its initialisation, where zeros would hide mistakes."""
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned


def plain_features(tiny: Tiny, backbone: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """x_0 … x_L of the bare backbone, every token, by hooks of the test's own; maps as their positions row by row."""
    sites = rt.find_sites(backbone, tiny.anatomy)
    kept: list[Tensor] = []

    def first(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else next(iter(kwargs.values())))

    def later(m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    modules = [backbone.get_submodule(path) for path in sites.blocks]
    handles = [modules[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [m.register_forward_hook(later) for m in modules]
    with torch.no_grad():
        backbone(**inputs)
    for handle in handles:
        handle.remove()
    if sites.anatomy.last:  # (b, h, w, d)
        return tuple(x.flatten(1, 2) for x in kept)
    return tuple(x.flatten(2).transpose(1, 2) if x.ndim == 4 else x for x in kept)


def as_features(layers: Sequence[Tensor] | Mapping[int, Tensor], mask: Tensor | None = None) -> rt.Features:
    """All tokens of x_0, x_1, …, or of the layers of these indices."""
    return rt.Features(dict(layers) if isinstance(layers, Mapping) else dict(enumerate(layers)), ALL, mask)
