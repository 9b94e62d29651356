"""Res-Prefix."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from restuning._types import Input, Output, SiteInfo
from restuning.errors import MethodError
from restuning.tuners.base import Tuner
from restuning.tuners.scale import Scale, branch_scale, check_init, check_size


@dataclass(frozen=True)
class Prefix:
    """Res-Prefix on any operation (Res-Tuning, section 3.1): Attn(x, K_pre, V_pre), beside the operation.

    Multi-head attention (Eq. 1) of what the operation read over `tokens` learned keys and as many learned values;
    2 · tokens · d parameters at width d.
    scale: a learned weight of the branch, none, scalar or channel, one at initialisation.
    init: `zero` (V_pre zero, so the operation is unchanged at initialisation) or `xavier` (keys and values).
    Raises MethodError for sizes below 1, an unknown choice, or heads that do not divide the width.
    """

    SIZE: ClassVar[str] = "tokens"
    TOKENWISE: ClassVar[bool] = True

    tokens: int = 10
    scale: Scale = "none"
    init: Literal["zero", "xavier"] = "zero"

    def __post_init__(self) -> None:
        check_size("Prefix", "tokens", self.tokens)
        check_init("Prefix", self.init, ("zero", "xavier"))

    def __call__(self, info: SiteInfo) -> nn.Module:
        return PrefixTuner(info.in_features, info.out_features, info.heads, self.tokens, self.scale, self.init)


class PrefixTuner(Tuner):
    """(b, n, in_features) → (b, n, out_features); see `Prefix`."""

    mixes_tokens = False

    def __init__(self, in_features: int, out_features: int, heads: int, tokens: int, scale: Scale, init: str) -> None:
        super().__init__()
        check_heads(heads, in_features, out_features)
        self.heads = heads
        self.keys = nn.Parameter(torch.empty(tokens, in_features))
        self.values = nn.Parameter(torch.zeros(tokens, out_features))
        self.scale = branch_scale(scale, out_features)
        nn.init.xavier_uniform_(self.keys)
        if init == "xavier":
            nn.init.xavier_uniform_(self.values)

    def forward(self, x: Input, y: Output) -> Output:
        values = self.values if self.scale is None else self.values * self.scale
        return attend(x, self.keys, values, self.heads)


def check_heads(heads: int, in_features: int, out_features: int) -> None:
    """Every head has the same width."""
    if in_features % heads or out_features % heads:
        raise MethodError(f"{heads} heads do not divide the widths {in_features} (input) and {out_features} (output)")


def attend(x: Input, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Eq. 1 for queries x (b, n, d) over learned keys (p, d) and values (p, d'), head by head: (b, n, d')."""
    b, n, d = x.shape
    q = x.view(b, n, heads, d // heads)
    scores = torch.einsum("bnhd,phd->bnhp", q, keys.view(len(keys), heads, -1)) * (d // heads) ** -0.5
    return torch.einsum("bnhp,phd->bnhd", scores.softmax(-1), values.view(len(values), heads, -1)).reshape(b, n, -1)
