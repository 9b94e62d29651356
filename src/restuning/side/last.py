"""LAST: low-rank self-attention beside the backbone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Tokens
from restuning.errors import MethodError
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork, require_one_width
from restuning.side.features import Features, normalised
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class LowRank(SideConfig):
    """What LAST and MIST have in common: a chain of low-rank attention on every token.

    Args:
        rank: r, the width of queries, keys and values, a multiple of the heads.
        heads: of the attention.

    Raises:
        MethodError: a size below 1, a rank that the heads do not divide.
    """

    rank: int = 16
    heads: int = 1

    every_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        kind = type(self).__name__
        check_size(kind, "rank", self.rank)
        check_size(kind, "heads", self.heads)
        if self.rank % self.heads:
            raise MethodError(f"{kind}(rank={self.rank}): expected a multiple of its {self.heads} heads")

    def resized(self, size: int) -> Self:
        return replace(self, rank=size)


@dataclass(frozen=True)
class Last(LowRank):
    """Low-rank attention side-tuning (Tang et al. 2024, 2402.04009), in its manner: its code is not public; see
    `LastNet`. Settings: those of `LowRank`."""

    def build(self, info: FeatureInfo) -> "LastNet":
        require_one_width("LAST", info)
        return LastNet(len(info.layers), info.head.out_features, self.rank, self.heads, info.pool == "last")


class LastNet(SideNetwork):
    """a_0 = 0; a_l = a_{l−1} + A_l(LN(x_0 + … + x_{l−1} + a_{l−1})) for l = 1 … L + 1, with attention A_l of rank r;
    x_L + a_{L+1} takes the place of the final norm's input: x_L itself at initialisation. No FFN.
    """

    def __init__(self, layers: int, width: int, rank: int, heads: int, causal: bool) -> None:
        """
        Args:
            layers: L + 1.
            width: d.
            rank, heads: of the attention.
            causal: whether a token sees none that comes after it, as in a decoder.
        """
        super().__init__()
        self.attentions = low_rank_chain(layers, width, rank, heads, causal)

    def forward(self, features: Features) -> Tokens:
        """Tokens (b, n, d) in place of the final norm's input."""
        layers = [features.layers[layer] for layer in range(len(self.attentions))]
        stream = torch.zeros_like(layers[0])
        change = torch.zeros_like(layers[0])
        for attention, x in zip(self.attentions, layers, strict=True):
            stream = stream + x
            change = change + attention(stream + change, features.mask)
        return layers[-1] + change


class LowRankAttention(nn.Module):
    """Attention (b, n, d) → (b, n, d) by queries, keys and values of width r, after a norm; zero at initialisation.
    `4 d r + 2 d` parameters."""

    def __init__(self, width: int, rank: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.qkv, self.up = nn.Linear(width, 3 * rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (b, n), which of the tokens are no padding; None: all."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, visible(x.shape[1], mask, self.causal, x.device))
        return self.up(out.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]


def low_rank_chain(count: int, width: int, rank: int, heads: int, causal: bool) -> nn.ModuleList:
    """As many as are asked for."""
    return nn.ModuleList(LowRankAttention(width, rank, heads, causal) for _ in range(count))


def visible(n: int, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """Which of n tokens each attends to, (b, 1, 1 or n, n) or (n, n); None: all."""
    seen = None if mask is None else mask[:, None, None].bool()
    if not causal:
        return seen
    before = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    # padding sees itself, so that no row is empty
    return before if seen is None else (before & seen) | torch.eye(n, dtype=torch.bool, device=device)


def sum_normalised(layers: Iterable[Tensor]) -> Tensor:
    """Σ_l LN(x_l), LN without weights."""
    return torch.stack([normalised(x) for x in layers]).sum(0)
