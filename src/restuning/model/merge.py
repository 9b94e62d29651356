"""An adapter in the backbone's own weights: LoRA, SSF and BitFit are changes of affine maps."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restuning.backbones.anatomy import AFFINE, PARTS
from restuning.backbones.load import check_finite
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
        CheckpointError: its weights, or the merged ones, are not finite.
    """
    adapter = tuned.adapter(name)
    check_finite(adapter.state_dict(), f"adapter {name!r}")
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
        if not isinstance(tuner, Mergeable) or site.op not in (*AFFINE, *PARTS, "words"):
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
        # what a norm multiplies by may be its weight and 1 (Gemma's, Nemotron's)
        more = 0.0 if site.weight else added_to_weight(backbone.get_submodule(site.reads.path))
        more_weight, more_bias = tuner.merged(weight + more, bias)
        to_weight, to_bias = changed.get(site, (weight, bias))
        changed[site] = to_weight + (more_weight - more - weight), to_bias + (more_bias - bias)
        takes_bias = site.weight is None and "bias" in backbone.get_submodule(site.reads.path)._parameters
        if affine.bias is None and not takes_bias and (weight.ndim == 1 or changed[site][1].any()):
            raise MethodError(f"adapter {name!r} cannot be merged: no bias is there to take what {key} adds")
    for site, (weight, bias) in changed.items():
        check_finite({"weight": weight, "bias": bias}, f"adapter {name!r} merged into {site.reads.path}")
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
