"""VPT."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from restuning._types import SiteInfo, Tokens
from restuning.errors import MethodError
from restuning.tuners.base import PromptTuner
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class PromptTuning:
    """Visual prompt tuning (Jia et al. 2022; Res-Tuning, Eq. 4 and 5): learned tokens appended to a block's input.

    tokens: how many; tokens · d parameters a block. span: `block`, taken off again after it (VPT-deep), or `rest`,
    kept until the last block has spoken (VPT-shallow, on block 0). unbound: compute Eq. 5 in place of Eq. 4: stream and
    prompts pass apart and meet in the attention alone; the same output. U(±sqrt(6 / (3 · patch² + d))), as published.
    Raises MethodError for tokens below 1 or an unknown span.
    """

    SIZE: ClassVar[str] = "tokens"

    tokens: int = 10
    span: Literal["block", "rest"] = "block"
    unbound: bool = False
    patch: int = 16

    def __post_init__(self) -> None:
        check_size("PromptTuning", "tokens", self.tokens)
        check_size("PromptTuning", "patch", self.patch)
        if self.span not in ("block", "rest"):
            raise MethodError(f"PromptTuning(span={self.span!r}): expected block or rest")

    def __call__(self, info: SiteInfo) -> nn.Module:
        return PromptTuningTuner(info.in_features, self.tokens, self.span, self.unbound, self.patch)


class PromptTuningTuner(PromptTuner):
    """The tokens (b, tokens, d) for a stream (b, n, d); see `PromptTuning`."""

    def __init__(self, width: int, tokens: int, span: Literal["block", "rest"], unbound: bool, patch: int) -> None:
        super().__init__()
        self.span, self.unbound = span, unbound
        self.tokens = nn.Parameter(torch.empty(tokens, width))
        bound = (6 / (3 * patch**2 + width)) ** 0.5
        nn.init.uniform_(self.tokens, -bound, bound)

    def forward(self, x: Tokens) -> Tensor:
        return self.tokens.expand(len(x), -1, -1)
