"""What follows the blocks in a frozen backbone: final norm, pooling, what comes after it; and the tokens it can see."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restuning._types import Tokens
from restuning.backbones.sites import Sites, layout_of
from restuning.errors import SiteError
from restuning.hooks.points import as_tokens, in_dtype_of
from restuning.side.features import ALL, FIRST, LAST, MEAN, TokenSelection, last, mean_of

POOLS = ("cls", "mean", "cls+mean", "last", "map", "none")


@dataclass(frozen=True)
class Tail:
    """Tokens (b, n, d) of the last block → what the head reads: (b, d), (b, 2 d) for cls+mean, (b, n, d) for none,
    (b, n d) for flat. mask (b, n): which tokens are no padding, and have a part in the mean or are the last.

    The modules before and after pooling, and the pooler, are the backbone's own: the tail refers to them.
    """

    norm: tuple[nn.Module, ...]
    post: tuple[nn.Module, ...]
    pooler: nn.Module
    pool: str
    prefix: int

    def __call__(self, tokens: Tokens, mask: Tensor | None = None) -> Tensor:
        x = _through(self.norm, tokens)
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "last":
            x = last(x, mask)[:, 0]
        elif self.pool == "map":
            x = self.pooler(in_dtype_of(self.pooler, x))
        elif self.pool == "mean":
            x = self._mean(x, mask)
        elif self.pool == "cls+mean":
            x = torch.cat([x[:, 0], self._mean(x, mask)], dim=-1)
        out = _through(self.post, x)
        return out.flatten(1) if self.pool == "flat" else out

    def _mean(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return mean_of(x[:, self.prefix :], None if mask is None else mask[:, self.prefix :])


def _through(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Tokens (b, n, d) or pooled (b, d), which a module of maps has as (b, d, n, 1)."""
    for module in modules:
        x = in_dtype_of(module, x)
        if layout_of(module) == "first":
            pooled = as_tokens(module(as_tokens(x).transpose(1, 2).unsqueeze(-1)))
            x = pooled if x.ndim == 3 else pooled.flatten(1)
        else:
            x = module(x)
    return x


def tail_of(backbone: nn.Module, sites: Sites, pool: str | None = None) -> Tail:
    """The backbone's tail with its own pooling or the one named. Raises SiteError for a pooling that is not known, or
    that needs a CLS token where there is none."""
    pool = sites.pool if pool is None else pool
    if pool not in (*POOLS, "flat"):
        raise SiteError(f"unknown pooling {pool!r}: expected one of {', '.join(POOLS)}")
    if pool == "map" and sites.pooler is None:
        raise SiteError(f"pooling 'map' is by the backbone's own attention, and this {sites.anatomy.name} has none")
    if "cls" in pool and sites.info.grid == 0 and pool != sites.pool:
        raise SiteError(f"pooling {pool!r}: {sites.anatomy.name} has no CLS token here; use mean or none")
    pooler = nn.Identity() if sites.pooler is None else backbone.get_submodule(sites.pooler)
    norm, post = (tuple(backbone.get_submodule(path) for path in paths) for paths in (sites.norm, sites.post))
    return Tail(norm, () if pool == "cls+mean" else post, pooler, pool, sites.prefix)


def live(sites: Sites, pool: str) -> TokenSelection:
    """The tokens of the last layer that the output can see."""
    if pool == "mean" and not sites.norm and sites.prefix == 0:
        return MEAN
    return {"cls": FIRST, "last": LAST}.get(pool, ALL)


def head_width(width: int, pool: str, tokens: int = 1) -> int:
    """The width that the head reads; `tokens`: how many there are of them, for flat."""
    return width * {"cls+mean": 2, "flat": tokens}.get(pool, 1)
