"""LoSA: a low-rank mixer over channels, then over tokens, along the layers."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Tokens
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork, require_one_width
from restuning.side.features import Features
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class Losa(SideConfig):
    """Low-rank side adaptation, in the manner of Mercea et al. (CVPR 2024); see `LosaNet`.

    Its mixer over tokens is a matrix of as many rows as there are tokens; here tokens are gathered into slots and given
    back by learned queries, so that their number is free.

    Args:
        rank: of the mixer over channels.
        slots: of the mixer over tokens.

    Raises:
        MethodError: a size below 1.
    """

    rank: int = 16
    slots: int = 8

    every_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("Losa", "rank", self.rank)
        check_size("Losa", "slots", self.slots)

    def resized(self, size: int) -> Self:
        return replace(self, rank=size)

    def build(self, info: FeatureInfo) -> "LosaNet":
        require_one_width("LoSA", info)
        return LosaNet(len(info.layers), info.head.out_features, self.rank, self.slots)


class LosaNet(SideNetwork):
    """a_0 = 0; a_l = a_{l−1} + G_l(x_l + a_{l−1}) for the layers l; x_L + a_L takes the place of the final norm's
    input, x_L itself at initialisation."""

    def __init__(self, layers: int, width: int, rank: int, slots: int) -> None:
        """
        Args:
            layers: L + 1.
            width: d.
            rank, slots: of the mixers.
        """
        super().__init__()
        self.mixers = nn.ModuleList(Mixer(width, rank, slots) for _ in range(layers))

    def forward(self, features: Features) -> Tokens:
        """Tokens (b, n, d) in place of the final norm's input."""
        layers = [features.layers[layer] for layer in range(len(self.mixers))]
        change = torch.zeros_like(layers[0])
        for mixer, x in zip(self.mixers, layers, strict=True):
            change = change + mixer(x + change, features.mask)
        return layers[-1] + change


class Mixer(nn.Module):
    """G(v) = c + γ ⊙ B gelu(A t), with t = LN v, c = gelu(t D) U, over channels; A the softmax over tokens of learned
    queries' scores of them, B the softmax over slots of other queries' scores. U and γ are zero at initialisation."""

    def __init__(self, width: int, rank: int, slots: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.gather, self.give = nn.Linear(width, slots, bias=False), nn.Linear(width, slots, bias=False)
        self.scale = nn.Parameter(torch.zeros(width))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (b, n), which of the tokens are no padding; None: all."""
        t = self.norm(v)
        scores = self.gather(t)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None].bool(), -torch.inf)
        slots = F.gelu(scores.softmax(-2).transpose(-1, -2) @ t)
        return self.up(F.gelu(self.down(t))) + self.scale * (self.give(t).softmax(-1) @ slots)  # type: ignore[no-any-return]
