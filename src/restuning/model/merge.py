"""Adapters in the backbone's own weights, for good or until they are taken out: LoRA, SSF and BitFit are changes of
affine maps, and what a trained copy holds takes the place of its module's weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from restuning.backbones.anatomy import AFFINE, PARTS
from restuning.backbones.load import check_finite
from restuning.backbones.quantised import require_plain
from restuning.backbones.sites import Site
from restuning.errors import MethodError
from restuning.hooks.fsdp import require_unsharded
from restuning.hooks.points import backbone_lock
from restuning.model.adapter import AdapterModule
from restuning.tuners.base import Mergeable
from restuning.tuners.copied import CopiedModule

if TYPE_CHECKING:
    from restuning.model.collection import AdapterCollection
    from restuning.model.tuned import Tuned


@dataclass(frozen=True)
class Merged:
    """What is merged into a backbone, and what it takes to undo that.

    Args:
        names: of the adapters.
        were: path of a parameter or buffer → the tensor that it held; None: there was none.
    """

    names: tuple[str, ...]
    were: Mapping[str, Tensor | None]


_MERGED: "WeakSet[nn.Module]" = WeakSet()
"""Backbones in whose weights adapters are: others that share such a backbone are told."""


def require_unmerged(backbone: nn.Module, what: str) -> None:
    """Raises MethodError while an adapter is in the backbone's weights."""
    if backbone in _MERGED:
        raise MethodError(
            f"the backbone's weights hold a merged adapter, and {what} needs its own: call unmerge_adapter() first"
        )


def merge_adapter(tuned: "Tuned", names: str | Sequence[str] | None = None, safe_merge: bool = True) -> None:
    """Put adapters into the backbone's weights, in place, and make them active: nothing is computed beside the maps
    until `unmerge_adapter`, which restores the weights to the bit (the tensors that were there are kept meanwhile).

    Until then the backbone is another, so what needs its own weights is refused: other adapters, `disable_adapter`,
    mixed batches, training, and a `Predictor` on it.

    Args:
        names: of the adapters; None: the active ones.
        safe_merge: whether merged weights that are not finite are refused.

    Raises:
        MethodError: adapters are merged already; a tuner that no weight can hold; nothing is changed then.
        CheckpointError: an adapter's weights, or the merged ones, are not finite.
    """
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(tuned.active() if names is None else names))
    require_unmerged(tuned.backbone, "a merge")
    require_unsharded(tuned.shards, "a merge")
    adapters = {name: tuned.adapter(name) for name in names}
    for name, adapter in adapters.items():
        check_finite(adapter.state_dict(), f"adapter {name!r}")
        _check(tuned.backbone, name, adapter)
    with torch.no_grad():
        values = _values(tuned.backbone, adapters)
    if safe_merge:
        check_finite({path: t for path, t in values.items() if t.is_floating_point()}, f"{', '.join(names)} merged")
    tuned.set_adapter(names)
    with backbone_lock(tuned.backbone):
        tuned.merged = Merged(names, {path: _swap(tuned.backbone, path, value) for path, value in values.items()})
        _MERGED.add(tuned.backbone)
        for adapter in adapters.values():
            adapter.merged = True


def unmerge_adapter(tuned: "AdapterCollection") -> None:
    """The inverse of `merge_adapter`: the backbone's own weights, the same tensors; nothing if nothing is merged."""
    if tuned.merged is not None:
        with backbone_lock(tuned.backbone):
            for path, value in tuned.merged.were.items():
                _swap(tuned.backbone, path, value)
            _forget(tuned)


def merge_and_unload(tuned: "Tuned", name: str | None = None, safe_merge: bool = True) -> nn.Module:
    """The backbone with the active (or the named) adapter in its own weights: no tuner is left, its features are the
    tuned ones. All adapters are gone, their heads too.

    Args:
        name: of the adapter.
        safe_merge: whether merged weights that are not finite are refused.

    Raises:
        MethodError: a tuner that no weight can hold (all but LoRA, SSF and BitFit), or a convolution that standardises
            its weight; nothing is changed then.
        CheckpointError: the adapter's weights, or the merged ones, are not finite.
    """
    name = tuned.one(name)
    unmerge_adapter(tuned)
    _check(tuned.backbone, name, tuned.adapter(name))
    tuned.unshard()
    merge_adapter(tuned, name, safe_merge)
    _forget(tuned)
    return tuned.unload()


def _forget(tuned: "AdapterCollection") -> None:
    assert tuned.merged is not None
    for name in tuned.merged.names:
        tuned.adapter(name).merged = False
    tuned.merged = None
    _MERGED.discard(tuned.backbone)


def _swap(backbone: nn.Module, path: str, value: Tensor | None) -> Tensor | None:
    """Put a tensor into a parameter or a buffer, or nothing; what was there. The parameter itself stays, tied ones so
    too."""
    owner, _, name = path.rpartition(".")
    module = backbone.get_submodule(owner)
    held = getattr(module, name)
    if held is None or value is None:
        setattr(module, name, None if value is None else nn.Parameter(value, requires_grad=False))
        return None if held is None else held.data
    before: Tensor = held.data
    held.data = value
    return before


def _values(backbone: nn.Module, adapters: Mapping[str, AdapterModule]) -> dict[str, Tensor]:
    """Path of a parameter or buffer → its value with the adapters in it."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for site, (weight, bias) in _changed(backbone, adapters).items():
        at = site.parameters
        held = attrgetter(at.weight)(backbone)
        if id(held) in seen:
            raise MethodError(f"{site.reads.path} shares its weight with another map that is tuned: they cannot merge")
        seen.add(id(held))
        found[at.weight] = torch.empty_like(held).copy_(weight.T if site.turned(backbone) else weight)
        if at.bias is not None and (site.affine(backbone).bias is not None or bias.any()):
            found[at.bias] = bias.to(held.dtype, copy=True)
    for name, adapter in adapters.items():
        for key, tuner in adapter.tuners.items():
            if isinstance(tuner, CopiedModule):
                path = adapter.sites[key].reads.path
                own = {f"{path}.{k}": t.detach().clone() for k, t in tuner.module.state_dict().items()}
                if own.keys() & found.keys():
                    raise MethodError(f"adapter {name!r} cannot be merged: another one changes {path} too")
                found |= own
    return found


def _check(backbone: nn.Module, name: str, adapter: AdapterModule) -> None:
    if adapter.full or adapter.side is not None:
        kind = "a side path" if adapter.side is not None else "full fine-tuning"
        raise MethodError(f"adapter {name!r} cannot be merged: {kind} is no change of frozen weights")
    for key, site in adapter.sites.items():
        tuner = adapter.tuners[key]
        if isinstance(tuner, CopiedModule):
            continue
        if not isinstance(tuner, Mergeable) or site.op not in (*AFFINE, *PARTS, "words"):
            raise MethodError(
                f"adapter {name!r} cannot be merged: {type(tuner).__name__} at {key} is no change of a weight; "
                "LoRA, SSF and BitFit on affine modules are"
            )
        require_plain(site.affine(backbone).weight, f"a merge of adapter {name!r}")
        standardised = "" if site.weight else type(backbone.get_submodule(site.reads.path)).__name__
        if standardised.startswith(("StdConv", "ScaledStdConv")):
            raise MethodError(f"{standardised} standardises its weight: nothing can be merged into it")


def _changed(backbone: nn.Module, adapters: Mapping[str, AdapterModule]) -> dict[Site, tuple[Tensor, Tensor]]:
    """New weights and biases by site. Tuners of one site add up, each to the frozen map."""
    changed: dict[Site, tuple[Tensor, Tensor]] = {}
    placed = [(name, key, a.sites[key], tuner) for name, a in adapters.items() for key, tuner in a.tuners.items()]
    for name, key, site, tuner in placed:
        if not isinstance(tuner, Mergeable):
            continue  # a trained copy
        affine = site.affine(backbone)
        weight, bias = affine.weight, affine.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        # what a norm multiplies by may be its weight and 1 (Gemma's, Nemotron's)
        more = 0.0 if site.weight else added_to_weight(backbone.get_submodule(site.reads.path))
        more_weight, more_bias = tuner.merged(weight + more, bias)
        to_weight, to_bias = changed.get(site, (weight, bias))
        changed[site] = to_weight + (more_weight - more - weight), to_bias + (more_bias - bias)
        takes_bias = site.weight is None and "bias" in backbone.get_submodule(site.reads.path)._parameters
        if affine.bias is None and not takes_bias and (weight.ndim == 1 or changed[site][1].any()):
            raise MethodError(f"adapter {name!r} cannot be merged: no bias is there to take what {key} adds")
    return changed


@torch.no_grad()
def added_to_weight(module: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies by it: 0 as a rule, 1 for Gemma's RMSNorm and Nemotron's
    LayerNorm. Measured: the output at weight 0 is that many times the output's change per unit of weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or type(module) in (nn.LayerNorm, nn.BatchNorm2d):
        return 0.0
    x = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None]
    bias = getattr(module, "bias", None)
    zero = {} if bias is None else {"bias": torch.zeros_like(bias)}
    try:
        at_0, at_1 = (
            torch.func.functional_call(module, {"weight": torch.full_like(weight, v), **zero}, (x,)) for v in (0.0, 1.0)
        )
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        AssertionError,
    ):  # of maps, not of rows: the norms of convolutions
        return 0.0
    slope = float((at_1 - at_0).abs().sum())
    return float(round(float(at_0.abs().sum()) / slope)) if slope else 0.0
