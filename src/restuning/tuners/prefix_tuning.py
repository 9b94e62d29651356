"""Prefix tuning."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from restuning._types import SiteInfo
from restuning.tuners.base import AttentionTuner
from restuning.tuners.prefix import check_heads
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class PrefixTuning:
    """Prefix tuning (Li and Liang 2021), unbound and exact (Res-Tuning, Eq. 2, 3, 9, 10), on the operation `attention`.

    Attn(Q, [K_pre; K], [V_pre; V]) = (1 − λ) Attn(Q, K, V) + λ Attn(Q, K_pre, V_pre), λ per query and head from the
    attention's own log-sum-exp. `tokens` keys and as many values, 2 · tokens · d parameters, without
    reparametrisation, N(0, 0.02) (He et al. 2022); grouped queries share them as they share the backbone's keys. λ > 0
    at initialisation, so the output changes.
    """

    SIZE: ClassVar[str] = "tokens"

    tokens: int = 10

    def __post_init__(self) -> None:
        check_size("PrefixTuning", "tokens", self.tokens)

    def __call__(self, info: SiteInfo) -> nn.Module:
        check_heads(info.heads, info.out_features, info.out_features)
        return PrefixTuningTuner(info.out_features, info.heads, self.tokens)


class PrefixTuningTuner(AttentionTuner):
    """Keys and values (heads, tokens, width / heads) each, for whatever queries; see `PrefixTuning`. Heads and width
    are the keys' own, and each is there for the queries that share it."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.keys, self.values = (nn.Parameter(torch.empty(tokens, width)) for _ in range(2))
        nn.init.normal_(self.keys, std=0.02)
        nn.init.normal_(self.values, std=0.02)

    def forward(self, call: Any) -> tuple[Tensor, Tensor]:
        shared = call.q.shape[1] // self.heads
        both = (t.view(len(t), self.heads, -1).transpose(0, 1) for t in (self.keys, self.values))
        keys, values = (t.repeat_interleave(shared, 0) if shared > 1 else t for t in both)
        return keys, values
