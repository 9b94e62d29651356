"""Tokens as the square grid of patches that they are."""

import math

from torch import Tensor
from torch.nn import functional as F

from restuning.errors import MethodError


def patches(x: Tensor, prefix: int) -> Tensor:
    """(b, prefix + side², d) → (b, d, side, side). Raises MethodError where the patches make no square."""
    side = grid_side(x, prefix)
    return x[:, prefix:].transpose(1, 2).reshape(x.shape[0], -1, side, side)


def grid_side(x: Tensor, prefix: int) -> int:
    """The side of the square that the patches are."""
    count = x.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        raise MethodError(f"{count} patches make no square grid")
    return side


def cells(x: Tensor, prefix: int, side: int) -> Tensor:
    """The means over the cells of a side × side grid of the patches, (b, side², d)."""
    if side == 1:
        return x[:, prefix:].mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(patches(x, prefix), side).flatten(2).transpose(1, 2)
