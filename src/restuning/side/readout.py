"""A linear read-out of every layer: the first token and the mean of each, normalised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from restuning.errors import MethodError
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork
from restuning.side.features import Features, TokenSelection
from restuning.tuners.scale import check_size

SCALE = 0.3
"""Of the read-out in full, so that a head's outputs begin as small as they do on one layer."""


class Readout(nn.Module):
    """The `summary` of every layer, (b, s, d_l) for layers 0 … L, as one vector that a head reads.

    In full: 0.3 · all of them, (b, s Σ d_l): the first tokens of all layers, then their means. Gated: Σ_l γ_l ⊙ t_l for
    each of the s summaries, (b, s d), γ from (L + 1)^−½; for layers of one width.
    """

    def __init__(self, widths: Sequence[int], summaries: int, gated: bool = False) -> None:
        """
        Args:
            widths: d_0 … d_L, of the layers.
            summaries: s, how many summaries there are of each layer.
            gated: whether they are summed by gates.
        """
        super().__init__()
        self.summaries, self.layers = summaries, len(widths)
        self.out_features = summaries * (widths[-1] if gated else sum(widths))
        # a vector, which weight decay never touches
        count = len(widths) * self.out_features
        self.gate = nn.Parameter(torch.full((count,), len(widths) ** -0.5)) if gated else None

    def forward(self, summaries: Sequence[Tensor]) -> Tensor:
        if self.gate is None:
            parts = [x[:, i] for i in range(self.summaries) for x in summaries]
            return SCALE * torch.cat(parts, -1)
        x = torch.stack(list(summaries), 1)  # (b, layers, s, d)
        return (x * self.gate.view(x.shape[1:])).sum(1).flatten(1)


@dataclass(frozen=True)
class LinearAll(SideConfig):
    """A linear head on every layer: the first token and the mean of the patches (of texts: the mean of the tokens),
    each token normalised (LayerNorm without weights); see `Readout`. Ours.

    Args:
        gated: the layers are summed by gates, so that the head reads twice the width and not that of every layer.
        last: how many layers are read, from the last; None: all.

    Raises:
        MethodError: `last` is below 1, or `gated` is neither true nor false.
    """

    gated: bool = False
    last: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gated, bool):
            raise MethodError(f"LinearAll(gated={self.gated!r}): expected true or false")
        if self.last is not None:
            check_size("LinearAll", "last", self.last)

    own_output: ClassVar[bool] = True

    def layers(self, info: FeatureInfo) -> Sequence[int]:
        return every_layer(info)[-(self.last or 0) :]

    def tokens(self, info: FeatureInfo) -> TokenSelection:
        return TokenSelection("pooled", info.prefix or 0)

    def build(self, info: FeatureInfo) -> "ReadoutNet":
        return ReadoutNet(self.layers(info), readout_of(info, self.gated, self.last))

    def from_bank(self) -> bool:
        return True

    def accepts(self, components: int | None) -> bool:
        return True


class ReadoutNet(SideNetwork):
    """`linear-all`: nothing beside the read-out; the head is linear in the features."""

    output = "pooled"

    def __init__(self, path: Sequence[int], readout: Readout) -> None:
        """
        Args:
            path: the layers that are read.
            readout: of their summaries.
        """
        super().__init__()
        self.path, self.readout, self.out_features = tuple(path), readout, readout.out_features

    def forward(self, features: Features) -> Tensor:
        """(b, out_features)."""
        summaries = features.summaries or features.layers
        out: Tensor = self.readout([summaries[layer] for layer in self.path])
        return out


def every_layer(info: FeatureInfo) -> Sequence[int]:
    """All layers, or the stages where there are several.

    Raises:
        MethodError: the backbone has no head.
    """
    if info.denoises:
        raise MethodError(f"this side network needs a head; {info.name} has none: a Bypass can be")
    return range(len(info.layers)) if info.uniform else info.stages


def readout_of(info: FeatureInfo, gated: bool, last: int | None = None) -> Readout:
    """The read-out of a backbone's layers, or of the last of them.

    Raises:
        MethodError: gates sum layers of one width, and these are not.
    """
    widths = [info.layers[layer].out_features for layer in every_layer(info)[-(last or 0) :]]
    if gated and len({*widths}) > 1:
        raise MethodError(f"gates sum layers of one width: {info.name} has {', '.join(map(str, widths))}")
    return Readout(widths, 2 if info.prefix else 1, gated)
