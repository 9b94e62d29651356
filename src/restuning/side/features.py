"""The tokens of a feature that any output can see: only these are tapped, kept and computed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from restuning._types import Tokens
from restuning.tuners.grid import cells


@dataclass(frozen=True)
class TokenSelection:
    """What is kept of the tokens (b, n, d) of a layer.

    `all`: every token; `first`: the first alone, (b, 1, d); `last`: the last that is no padding, (b, 1, d); `mean`: the
    mean of those that are none, (b, 1, d); a number g: the first one where there are tokens before the patches
    (`prefix` of them), and the mean of each cell of a g × g grid of the patches, (b, 1 + g², d).

    The mean is exact where what follows is linear, token by token, up to a mean over all tokens (no norm comes before
    that): for linear probing, for tuners inside the backbone, which act before the last layer, and for a bypass without
    tuners over layers of one grid. In a bypass with tuners every position is live.
    """

    tokens: str | int = "all"
    prefix: int = 1

    def __call__(self, x: Tokens, mask: Tensor | None = None) -> Tensor:
        """mask (b, n): which tokens are no padding; None: all. Of one longer by a cache, `last` reads the end."""
        if self.tokens == "all":
            return x
        if self.tokens == "last":
            return last(x, mask)
        if self.tokens == "mean":
            return mean_of(x, mask)[:, None]
        first = x[:, :1]
        if self.tokens == "first":
            return first
        grid = cells(x, self.prefix, int(self.tokens))
        return torch.cat([first, grid], 1) if self.prefix else grid

    def of(self, kept: "TokenSelection") -> "TokenSelection | None":
        """What makes this view of tokens that are a view already; None if they hold too little."""
        if kept == self:
            return ALL
        if kept.tokens == "all":
            return self
        return self if self.tokens == "first" and kept.tokens != "mean" and kept.prefix else None

    @property
    def by_mask(self) -> bool:
        """Whether padding must be told from tokens."""
        return self.tokens in ("last", "mean")

    def count(self) -> int:
        """How many tokens a grid leaves."""
        return 1 if self.tokens == "mean" else int(self.tokens) ** 2 + (self.prefix > 0)


def last(x: Tokens, mask: Tensor | None) -> Tensor:
    """The last token of each row that `mask` has, (b, 1, d), on whichever side the padding is."""
    if mask is None:
        return x[:, -1:]
    ahead = mask[:, -x.shape[1] :].flip(1).bool().int().argmax(1)
    return x.gather(1, (x.shape[1] - 1 - ahead)[:, None, None].expand(-1, 1, x.shape[2]))


def mean_of(x: Tokens, mask: Tensor | None = None) -> Tensor:
    """The mean of the tokens (b, n, d) → (b, d) that are no padding by mask (b, n)."""
    if mask is None:
        return x.mean(1)
    weight = mask[..., None].to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum has no room in float16
    return ((x * weight).sum(1, dtype=wide) / weight.sum(1, dtype=wide)).to(x.dtype)


ALL, FIRST, LAST, MEAN = TokenSelection(), TokenSelection("first"), TokenSelection("last", 0), TokenSelection("mean", 0)
