"""DTL."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import SiteInfo, Tokens
from restuning.errors import MethodError
from restuning.tuners.base import StatefulTuner
from restuning.tuners.grid import patches
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class Dtl:
    """DTL (Fu et al. 2024), on the operation `block`: h_0 = 0; h_l = h_{l−1} + x_l A_l B_l beside every block, and
    block(x_l) + swish(h_l) after each of the last ones, swish(z) = z · sigmoid(β z). 2 · rank · d parameters a block.

    rank: of A_l B_l. last: how many blocks are written to; those before the first need no gradient. beta: β.
    plus: DTL+, the patches of swish(h) pass one shared depthwise 3×3 convolution (9 d more), the identity at
    initialisation. A is kaiming-uniform, B zero: the backbone is unchanged at initialisation.
    Raises MethodError for a rank below 1 or above the width, and with `plus` where the tokens are no grid of patches.
    """

    SIZE: ClassVar[str] = "rank"

    rank: int = 2
    last: int = 6
    beta: float = 100.0
    plus: bool = False

    def __post_init__(self) -> None:
        check_size("Dtl", "rank", self.rank)
        check_size("Dtl", "last", self.last)

    def __call__(self, info: SiteInfo) -> nn.Module:
        if self.rank > info.in_features:
            raise MethodError(f"Dtl(rank={self.rank}): expected at most the width, {info.in_features}")
        if self.plus and info.grid is None:
            raise MethodError("Dtl(plus=True) needs a grid of patches, and this backbone's tokens are none")
        first = max(info.depth - self.last, 0)
        prefix = info.grid if self.plus else None
        return DtlTuner(info.in_features, self.rank, self.beta, info.block >= first, info.block == first, prefix)


class DtlTuner(StatefulTuner):
    """(b, n, d) → (b, n, d), or nothing to add before the first write-back; see `Dtl`."""

    only_on = "block"

    def __init__(self, width: int, rank: int, beta: float, writes: bool, first: bool, prefix: int | None) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.writes, self.beta, self.prefix = writes, beta, prefix
        self.layout = "tokens" if prefix is None else "patches"
        self.conv: nn.Conv2d | None = None
        if first and prefix is not None:
            self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            nn.init.dirac_(self.conv.weight, groups=width)

    def forward(self, x: Tokens, y: Tokens, state: dict[str, Any]) -> Tensor | None:
        more = x @ self.a.T @ self.b.T
        h: Tensor = state["h"] + more if "h" in state else more
        state["h"] = h
        if not self.writes:
            return None
        out = h * torch.sigmoid(self.beta * h)
        if self.conv is not None:
            state["weight"] = self.conv.weight
        if self.prefix is not None:
            grid = F.conv2d(patches(out, self.prefix), state["weight"].to(out.dtype), padding=1, groups=out.shape[-1])
            grid = grid.flatten(2).transpose(1, 2)
            out = torch.cat([out[:, : self.prefix], grid], 1)
        return out
