"""MIST: a chain of low-rank attention on the sum of all layers."""

from dataclasses import dataclass

import torch

from restuning._types import Tokens
from restuning.side.base import FeatureInfo, SideNetwork, require_one_width
from restuning.side.features import Features
from restuning.side.last import LowRank, low_rank_chain, sum_normalised
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class Mist(LowRank):
    """The sum of all layers before a chain of low-rank attention, in the manner of MIST (CVPR 2025); see `MistNet`.

    Args:
        depth: of the chain; the other settings are those of `LowRank`.
    """

    depth: int = 4

    def __post_init__(self) -> None:
        check_size("Mist", "depth", self.depth)
        super().__post_init__()

    def build(self, info: FeatureInfo) -> "MistNet":
        require_one_width("MIST", info)
        return MistNet(len(info.layers), info.head.out_features, self.rank, self.heads, self.depth, info.pool == "last")


class MistNet(SideNetwork):
    """s = Σ_l LN(x_l), LN without weights; a_0 = 0; a_j = a_{j−1} + A_j(LN(s + a_{j−1})) for j = 1 … depth, with
    attention A_j of rank r; x_L + a takes the place of the final norm's input."""

    def __init__(self, layers: int, width: int, rank: int, heads: int, depth: int, causal: bool) -> None:
        """Args: see `restuning.side.last.LastNet`; depth: of the chain."""
        super().__init__()
        self.layers = layers
        self.attentions = low_rank_chain(depth, width, rank, heads, causal)

    def forward(self, features: Features) -> Tokens:
        """Tokens (b, n, d) in place of the final norm's input."""
        layers = [features.layers[layer] for layer in range(self.layers)]
        total, change = sum_normalised(layers), torch.zeros_like(layers[-1])
        for attention in self.attentions:
            change = change + attention(total + change, features.mask)
        return layers[-1] + change
