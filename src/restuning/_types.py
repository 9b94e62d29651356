"""The vocabulary that every layer shares: shapes, and what a tuner is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float
else:
    try:  # shapes are checked at run time where jaxtyping is installed (the tests), and cost nothing elsewhere
        from jaxtyping import Float
    except ImportError:

        class Float:
            def __class_getitem__(cls, _: Any) -> type[Tensor]:
                return Tensor


Tokens: TypeAlias = Float[Tensor, "b n d"]
"""What an operation reads or says: batch, tokens, width."""

Input: TypeAlias = Float[Tensor, "b n r"]
"""What an operation reads, where it may say another width."""

Output: TypeAlias = Float[Tensor, "b n w"]
"""What it says."""

InputMaps: TypeAlias = Float[Tensor, "b r h w"]
OutputMaps: TypeAlias = Float[Tensor, "b s i j"]
"""What a convolution reads, and what it says."""

Pooled: TypeAlias = Float[Tensor, "b d"]
Logits: TypeAlias = Float[Tensor, "b c"]


@dataclass(frozen=True)
class Kernel:
    """How a convolution reads its map; padding None: in a way of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...] | None
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class SiteInfo:
    """What a tuner may know of the operation that it is built for.

    Args:
        in_features: width of the operation's input.
        out_features: width of its output.
        heads: attention heads of its block; 1 where there are none.
        block: which block it is in, from 0.
        depth: how many blocks there are.
        grid: how many tokens come before the grid of patches; None where the tokens are no grid.
        kernel: of the operation itself, where it is a convolution.
    """

    in_features: int
    out_features: int
    heads: int = 1
    block: int = 0
    depth: int = 1
    grid: int | None = None
    kernel: Kernel | None = None
