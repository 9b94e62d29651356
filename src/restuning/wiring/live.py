"""The tokens of a feature that any output can see: only these are tapped, kept and computed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from restuning._types import Tokens
from restuning.tuners.grid import cells


@dataclass(frozen=True)
class View:
    """What is kept of the tokens (b, n, d) of a layer.

    `all`: every token; `first`: the first alone, (b, 1, d); a number g: the first one where there are tokens before
    the patches (`prefix` of them), and the mean of each cell of a g × g grid of the patches, (b, 1 + g², d).

    `MEAN`, one cell and no token before it, is exact where what follows is linear, token by token, up to a mean over
    all tokens (no norm comes before that): for linear probing, for tuners inside the backbone, which act before the
    last layer, and for a bypass without tuners over layers of one grid. In a bypass with tuners every position is live.
    """

    tokens: str | int = "all"
    prefix: int = 1

    def __call__(self, x: Tokens) -> Tensor:
        if self.tokens == "all":
            return x
        first = x[:, :1]
        if self.tokens == "first":
            return first
        grid = cells(x, self.prefix, int(self.tokens))
        return torch.cat([first, grid], 1) if self.prefix else grid

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


ALL, FIRST, MEAN = View(), View("first"), View(1, prefix=0)
