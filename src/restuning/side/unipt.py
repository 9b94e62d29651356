"""UniPT: the last layer's tokens query every layer."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Tokens
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork, require_one_width
from restuning.side.features import Features, mean_of
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class UniPt(SideConfig):
    """Universal parallel tuning (Diao et al., CVPR 2024); see `UniPtNet`.

    Args:
        width: of the down-projected tokens.

    Raises:
        MethodError: it is below 1.
    """

    width: int = 32

    every_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("UniPt", "width", self.width)

    def resized(self, size: int) -> Self:
        return replace(self, width=size)

    def build(self, info: FeatureInfo) -> "UniPtNet":
        require_one_width("UniPT", info)
        return UniPtNet(len(info.layers), info.head.out_features, self.width)


class UniPtNet(SideNetwork):
    """h_l = D_l relu(x_l), q = D relu(x_L); m_l = R_l h_l, with R_l the rows of relu(q h_lᵀ) that sum to one; c =
    softmax over layers of a gate's reading of (the mean of q) ⊙ (the mean of h_l); x_L + U relu(Σ_l c_l m_l) takes the
    place of the final norm's input. The published code adds the first token of h_l to m_l, and reads q's in the gate,
    where here, for every pooling, the mean stands.
    """

    def __init__(self, layers: int, width: int, side: int) -> None:
        """
        Args:
            layers: L + 1.
            width: d.
            side: width of the down-projected tokens.
        """
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, side) for _ in range(layers))
        self.query, self.up, self.gate = nn.Linear(width, side), nn.Linear(side, width), nn.Linear(side, 1, bias=False)

    def forward(self, features: Features) -> Tokens:
        """Tokens (b, n, d) in place of the final norm's input."""
        layers, mask = [features.layers[layer] for layer in range(len(self.down))], features.mask
        q = self.query(F.relu(layers[-1]))
        anchor = mean_of(q, mask)
        merged, gates = [], []
        for down, x in zip(self.down, layers, strict=True):
            h = down(F.relu(x))
            mean = mean_of(h, mask)
            merged.append(_read(q, h, mask) + mean[:, None])
            gates.append(self.gate(anchor * mean))
        weights = torch.cat(gates, -1).softmax(-1)
        together = torch.einsum("bl,blnw->bnw", weights, torch.stack(merged, 1))
        return layers[-1] + self.up(F.relu(together))  # type: ignore[no-any-return]


def _read(q: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens h (b, n, w) as the tokens q see them, by weights that a ReLU leaves and that sum to one."""
    weights = F.relu(q @ h.mT)
    if mask is not None:
        weights = weights * mask[:, None].to(weights.dtype)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-8) @ h
