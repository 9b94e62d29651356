"""The tokens of a feature that any output can see: only these are tapped, kept and computed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from restuning._types import Tokens
from restuning.tuners.grid import patches


@dataclass(frozen=True)
class View:
    """What is kept of the tokens (b, n, d) of a layer.

    `all`: every token; `first`: the first alone, (b, 1, d); `last`: the last that is no padding, (b, 1, d); a number g:
    the first one where there are tokens before the patches (`prefix` of them), and the mean of each cell of a g × g
    grid of the patches, (b, 1 + g², d).
    """

    tokens: str | int = "all"
    prefix: int = 1

    def __call__(self, x: Tokens, mask: Tensor | None = None) -> Tensor:
        """mask (b, n): which tokens are no padding; of a longer one, with what came before these tokens, the end."""
        if self.tokens == "all":
            return x
        if self.tokens == "last":
            return last(x, mask)
        first = x[:, :1]
        if self.tokens == "first":
            return first
        cells = F.adaptive_avg_pool2d(patches(x, self.prefix), int(self.tokens)).flatten(2).transpose(1, 2)
        return torch.cat([first, cells], 1) if self.prefix else cells

    def of(self, kept: "View") -> "View | None":
        """What makes this view of tokens that are a view already; None if they hold too little."""
        if kept == self:
            return ALL
        if kept.tokens == "all":
            return self
        return self if self.tokens == "first" and kept.prefix else None

    def count(self) -> int:
        """How many tokens a grid leaves."""
        return int(self.tokens) ** 2 + (self.prefix > 0)


def last(x: Tokens, mask: Tensor | None) -> Tensor:
    """The last token of each row that `mask` has, (b, 1, d), on whichever side the padding is."""
    if mask is None:
        return x[:, -1:]
    ahead = mask[:, -x.shape[1] :].flip(1).bool().int().argmax(1)
    return x.gather(1, (x.shape[1] - 1 - ahead)[:, None, None].expand(-1, 1, x.shape[2]))


ALL, FIRST, LAST = View(), View("first"), View("last")
