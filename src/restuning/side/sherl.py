"""SHERL: the layers summed by how little they repeat one another."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from restuning._types import Tokens
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork, require_one_width
from restuning.side.features import Features, mean_of
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class Sherl(SideConfig):
    """A sum of the layers weighted by their redundancy, in the manner of SHERL (Diao et al., ECCV 2024); see
    `SherlNet`. The published method also tunes the backbone's last layers, with their gradient: that is left out.

    Args:
        width: of the down-projected tokens.

    Raises:
        MethodError: it is below 1.
    """

    width: int = 32

    every_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("Sherl", "width", self.width)

    def resized(self, size: int) -> Self:
        return replace(self, width=size)

    def build(self, info: FeatureInfo) -> "SherlNet":
        require_one_width("SHERL", info)
        return SherlNet(len(info.layers), info.head.out_features, self.width)


class SherlNet(SideNetwork):
    """h_l = D_l x_l; the redundancy r_l is the mean cosine of the mean of h_l with those of the other layers, w =
    softmax(−r / τ), τ = 0.1 at initialisation; s = Σ_l w_l h_l; u = s + attention of the tokens of D x_L to those of s;
    x_L + U relu(LN u) takes the place of the final norm's input."""

    def __init__(self, layers: int, width: int, side: int) -> None:
        """
        Args:
            layers: L + 1.
            width: d.
            side: width of the down-projected tokens.
        """
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, side) for _ in range(layers))
        self.query, self.up, self.norm = nn.Linear(width, side), nn.Linear(side, width), nn.LayerNorm(side)
        self.sharpness = nn.Parameter(torch.full((1,), 10.0))
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Features) -> Tokens:
        """Tokens (b, n, d) in place of the final norm's input."""
        layers, mask = [features.layers[layer] for layer in range(len(self.down))], features.mask
        reduced = [down(x) for down, x in zip(self.down, layers, strict=True)]
        means = torch.stack([F.normalize(mean_of(h, mask), dim=-1) for h in reduced], -2)
        others = max(len(reduced) - 1, 1)
        redundancy = ((means @ means.mT).sum(-1) - 1) / others
        weights = (-self.sharpness * redundancy).softmax(-1)
        s = torch.einsum("bl,blnw->bnw", weights, torch.stack(reduced, 1))
        seen = None if mask is None else mask[:, None].bool()
        query = self.query(layers[-1])
        s = s.to(query.dtype)
        u = s + F.scaled_dot_product_attention(query, s, s, seen)
        return layers[-1] + self.up(F.relu(self.norm(u)))  # type: ignore[no-any-return]
