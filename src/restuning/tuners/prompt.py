"""Res-Prompt."""

from dataclasses import dataclass

import torch
from torch import nn

from restuning._types import Port, Tokens
from restuning.errors import MethodError
from restuning.tuners.prefix import attend, check_heads
from restuning.tuners.scale import Scale, branch_scale, check_size


@dataclass(frozen=True)
class Prompt:
    """Res-Prompt on any operation (Res-Tuning, section 3.1): Attn(x, P, P), beside the operation.

    One set of `tokens` learned tokens P serves as keys and as values; tokens · d parameters at width d. P is
    xavier-uniform: the tuner is not zero at birth, because shared tokens that start at zero stay identical for ever.
    scale: a learned weight of the branch, none, scalar or channel, one at birth.
    Raises MethodError for sizes below 1, an unknown choice, heads that do not divide the width, or an operation that
    reads another width than it writes.
    """

    tokens: int = 10
    scale: Scale = "none"

    def __post_init__(self) -> None:
        check_size("Prompt", "tokens", self.tokens)

    def __call__(self, port: Port) -> nn.Module:
        if port.reads != port.writes:
            raise MethodError(f"Prompt needs an operation of one width; this reads {port.reads}, writes {port.writes}")
        return PromptTuner(port.reads, port.heads, self.tokens, self.scale)


class PromptTuner(nn.Module):
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
