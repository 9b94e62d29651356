"""Tokens as the square grid of patches that they are."""

import math

from torch import Tensor

from restuning.errors import MethodError


def patches(x: Tensor, prefix: int) -> Tensor:
    """(b, prefix + side², d) → (b, d, side, side). Raises MethodError where the patches make no square."""
    count = x.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        raise MethodError(f"{count} patches make no square grid")
    return x[:, prefix:].transpose(1, 2).reshape(len(x), -1, side, side)
