"""What follows the blocks in a frozen backbone: final norm, pooling, norm after pooling; and the tokens it can see."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restuning._types import Tokens
from restuning.errors import SiteError
from restuning.wiring.live import ALL, FIRST, LAST, View, last, mean_of
from restuning.wiring.sites import Sites

POOLS = ("cls", "mean", "cls+mean", "last", "map", "none")


@dataclass(frozen=True)
class Tail:
    """Tokens (b, n, d) of the last block → what the head reads: (b, d), (b, 2 d) for cls+mean, (b, n, d) for none,
    (b, n d) for flat. mask (b, n): which tokens are no padding, and have a part in the mean or are the last.

    Norms and pooler are the backbone's own modules; the tail refers to them and owns nothing.
    """

    norm: nn.Module
    post: nn.Module
    pooler: nn.Module
    pool: str
    prefix: int

    def __call__(self, tokens: Tokens, mask: Tensor | None = None) -> Tensor:
        x = self.norm(tokens)
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "last":
            x = last(x, mask)[:, 0]
        elif self.pool == "map":
            x = self.pooler(x)
        elif self.pool == "mean":
            x = self._mean(x, mask)
        elif self.pool == "cls+mean":
            x = torch.cat([x[:, 0], self._mean(x, mask)], dim=-1)
        out: Tensor = self.post(x)
        return out.flatten(1) if self.pool == "flat" else out

    def _mean(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return mean_of(x[:, self.prefix :], None if mask is None else mask[:, self.prefix :])

    @property
    def live(self) -> View:
        """The tokens that the output can see, if nothing before it mixes tokens."""
        return seen_by(self.pool)


def seen_by(pool: str) -> View:
    """The tokens that a pooling reads."""
    return {"cls": FIRST, "last": LAST}.get(pool, ALL)


def tail_of(backbone: nn.Module, sites: Sites, pool: str | None = None) -> Tail:
    """The backbone's tail with its own pooling or the one named. Raises SiteError for a pooling that is not known."""
    pool = sites.pool if pool is None else pool
    if pool not in (*POOLS, "flat"):
        raise SiteError(f"unknown pooling {pool!r}: expected one of {', '.join(POOLS)}")
    if pool == "map" and sites.pooler is None:
        raise SiteError(f"pooling 'map' is by the backbone's own attention, and this {sites.anatomy.name} has none")
    pooler = nn.Identity() if sites.pooler is None else backbone.get_submodule(sites.pooler)
    norm = nn.Identity() if sites.norm is None else backbone.get_submodule(sites.norm)
    post = nn.Identity() if sites.post is None or pool == "cls+mean" else backbone.get_submodule(sites.post)
    return Tail(norm, post, pooler, pool, sites.prefix)


def head_width(width: int, pool: str, tokens: int = 1) -> int:
    """The width that the head reads; `tokens`: how many there are of them, for flat."""
    return width * {"cls+mean": 2, "flat": tokens}.get(pool, 1)
