"""Res-Prompt."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from restuning._types import SiteInfo, Tokens
from restuning.errors import MethodError
from restuning.tuners.base import Tuner
from restuning.tuners.prefix import attend, check_heads
from restuning.tuners.scale import Scale, branch_scale, check_size


@dataclass(frozen=True)
class Prompt:
    """Res-Prompt on any operation (Res-Tuning, section 3.1): Attn(x, P, P), beside the operation.

    One set of `tokens` learned tokens P serves as keys and as values; tokens · d parameters at width d. P is
    xavier-uniform: the tuner is not zero at initialisation, because shared tokens that start at zero stay identical for
    ever.
    scale: a learned weight of the branch, none, scalar or channel, one at initialisation.
    Raises MethodError for sizes below 1, an unknown choice, heads that do not divide the width, or an operation that
    in_features another width than it out_features.
    """

    SIZE: ClassVar[str] = "tokens"
    TOKENWISE: ClassVar[bool] = True

    tokens: int = 10
    scale: Scale = "none"

    def __post_init__(self) -> None:
        check_size("Prompt", "tokens", self.tokens)

    def __call__(self, info: SiteInfo) -> nn.Module:
        if info.in_features != info.out_features:
            raise MethodError(
                f"Prompt needs an operation of one width; this one's input is {info.in_features} wide, its output "
                f"{info.out_features}"
            )
        return ResPromptTuner(info.in_features, info.heads, self.tokens, self.scale)


class ResPromptTuner(Tuner):
    """(b, n, d) → (b, n, d); see `Prompt`."""

    mixes_tokens = False

    def __init__(self, width: int, heads: int, tokens: int, scale: Scale) -> None:
        super().__init__()
        check_heads(heads, width, width)
        self.heads = heads
        self.tokens = nn.Parameter(torch.empty(tokens, width))
        self.scale = branch_scale(scale, width)
        nn.init.xavier_uniform_(self.tokens)

    def forward(self, x: Tokens, y: Tokens) -> Tokens:
        values = self.tokens if self.scale is None else self.tokens * self.scale
        return attend(x, self.tokens, values, self.heads)
