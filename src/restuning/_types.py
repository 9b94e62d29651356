"""The vocabulary that every layer shares: shapes, and what a tuner is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

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

Features: TypeAlias = tuple[Tensor, ...]
"""A frozen backbone's per-block outputs x_0 … x_L (x_0 is the first block's input); shapes may differ by block."""


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
    """What a tuner may know of the place it is built for: the width that it `reads`, the width that it `writes`, the
    number of attention `heads` of the block (1 where it has none), which `block` it is of how many (`depth`), where
    the tokens are a grid of patches, how many come before them (`grid`; None: no grid), where the operation is a
    convolution, its `kernel`, and where it looks words up in a table, how many `words` that has."""

    reads: int
    writes: int
    heads: int = 1
    block: int = 0
    depth: int = 1
    grid: int | None = None
    kernel: Kernel | None = None
    words: int | None = None


TunerConfig: TypeAlias = Callable[[SiteInfo], nn.Module]
"""How a tuner is made: called once for each site. `rt.Adapter(10)` is one; so is any `nn.Module` class whose
`__init__` takes a port.

The module's `forward(x, y)` gets what the operation read, `x` (b, n, port.reads), and what it said, `y`
(b, n, port.writes), and returns what to add to `y` (None: nothing); maps come as tokens, row by row, and what was read
at another resolution comes pooled to that of `y`. It may declare
`mixes_tokens = False` if each of its output tokens depends on the same input token alone,
`source = "stream"` to read the residual stream before the block's norm, or `"out"` to read what the operation said,
`carries = True` to be called as `forward(x, y, carry)` with a dict that is empty at the start of every pass of the
backbone and shared by the tuners of its adapter,
`rewrites = "block"` or `"rest"` to be called as `forward(x)` before a block and return tokens (b, p, d) that are
appended to the stream, and taken off again after the block, or after the last one,
`place = "block"` or `"attention"` if it goes there alone (on `attention`, `forward(call)` returns the keys and values
(h, p, d / h) that are merged into the softmax),
`on_grid = True` to be spared the tokens that others have appended after the grid of patches,
`on_maps = True` to be given the maps (b, d, h, w) of a convolution, and to return one,
`bind(weight, bias)` to be handed the frozen affine map's own when it is made, and
`merges = True` if it has `merged(weight, bias)`, the affine map's with the tuner in it."""
