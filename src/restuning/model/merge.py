"""An adapter in the backbone's own weights: LoRA, SSF and BitFit are changes of affine maps."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from restuning.backbones.anatomy import AFFINE
from restuning.backbones.sites import Site
from restuning.errors import MethodError
from restuning.model.adapter import AdapterModule
from restuning.tuners.base import Mergeable

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned


def merge_and_unload(tuned: "Tuned", name: str) -> nn.Module:
    """The backbone with the named adapter in its own weights, and no adapter left.

    Args:
        tuned: the model; unloaded at the end.
        name: of the adapter.

    Raises:
        MethodError: it cannot be merged; nothing is changed then.
    """
    adapter = tuned.adapter(name)
    _check(tuned.backbone, name, adapter)
    tuned.unshard()
    changed = _changed(tuned.backbone, name, adapter)
    backbone = tuned.unload()
    for site, (weight, bias) in changed.items():
        affine = site.affine(backbone)
        affine.weight.data.copy_(weight.detach())
        if affine.bias is not None:
            affine.bias.data.copy_(bias.detach())
        elif bias.any():
            module: Any = backbone.get_submodule(site.reads.path)
            module.bias = nn.Parameter(bias.detach())
    return backbone


def _check(backbone: nn.Module, name: str, adapter: AdapterModule) -> None:
    if adapter.full or adapter.side is not None:
        kind = "a side path" if adapter.side is not None else "full fine-tuning"
        raise MethodError(f"adapter {name!r} cannot be merged: {kind} is no change of frozen weights")
    for key, site in adapter.sites.items():
        tuner = adapter.tuners[key]
        if not isinstance(tuner, Mergeable) or site.op not in AFFINE:
            raise MethodError(
                f"adapter {name!r} cannot be merged: {type(tuner).__name__} at {key} is no change of a weight; "
                "LoRA, SSF and BitFit on affine modules are"
            )
        standardised = "" if site.weight else type(backbone.get_submodule(site.reads.path)).__name__
        if standardised.startswith(("StdConv", "ScaledStdConv")):
            raise MethodError(f"{standardised} standardises its weight: nothing can be merged into it")


def _changed(backbone: nn.Module, name: str, adapter: AdapterModule) -> dict[Site, tuple[Tensor, Tensor]]:
    """New weights and biases by site. Tuners of one site add up, each to the frozen map."""
    changed: dict[Site, tuple[Tensor, Tensor]] = {}
    for key, site in adapter.sites.items():
        tuner: Any = adapter.tuners[key]
        affine = site.affine(backbone)
        weight, bias = affine.weight, affine.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        more_weight, more_bias = tuner.merged(weight, bias)
        to_weight, to_bias = changed.get(site, (weight, bias))
        changed[site] = to_weight + (more_weight - weight), to_bias + (more_bias - bias)
        takes_bias = site.weight is None and "bias" in backbone.get_submodule(site.reads.path)._parameters
        if affine.bias is None and not takes_bias and (weight.ndim == 1 or changed[site][1].any()):
            raise MethodError(f"adapter {name!r} cannot be merged: no bias is there to take what {key} adds")
    return changed
