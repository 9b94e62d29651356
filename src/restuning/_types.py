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

Pooled: TypeAlias = Float[Tensor, "b d"]
Logits: TypeAlias = Float[Tensor, "b c"]

Features: TypeAlias = tuple[Tensor, ...]
"""A frozen backbone's per-block outputs x_0 … x_L (x_0 is the first block's input); shapes may differ by block."""


@dataclass(frozen=True)
class Port:
    """What a tuner may know of the place it is built for: the width that it `reads`, the width that it `writes`
    and the number of attention `heads` of the block (1 where the block has none)."""

    reads: int
    writes: int
    heads: int = 1


Recipe: TypeAlias = Callable[[Port], nn.Module]
"""How a tuner is made: called once for each site. `rt.Adapter(10)` is one; so is any `nn.Module` class whose
`__init__` takes a port. The module's `forward(x, y)` gets what the operation read, `x` (b, n, port.reads), and what
it said, `y` (b, n, port.writes), and returns what to add to `y`. A module may declare `mixes_tokens = False` if each
of its output tokens depends on the same input token alone."""
