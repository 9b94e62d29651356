"""What a module is: a linear map, a norm, a part of a stream, by its kind and by what went through it."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from restuning.backbones.sites import layout_of
from restuning.backbones.trace import Ran, Seen


def weights_in(module: nn.Module) -> int:
    return sum(1 for p in module.parameters() if p.ndim > 1)


def kind_of(module: nn.Module) -> Any:
    """A class, and what it is made of where that says nothing."""
    if type(module) in (nn.Sequential, nn.ModuleList):
        return (type(module), *(kind_of(child) for child in module.children()))
    return type(module)


def count_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.PReLU):
        return False
    return (isinstance(weight, Tensor) and weight.ndim == 1) or "Norm" in type(module).__name__


def last_of_map(module: nn.Module, seen: Seen) -> bool:
    """Whether a map (b, ·, ·, ·) has its channels last."""
    if len(seen.shape) != 4:
        return False
    _, a, b, c = seen.shape
    if a == b != c:
        return True
    if b == c != a:
        return False
    return layout_of(module) == "last"


def width_of(seen: Seen, last: bool) -> int:
    return seen.shape[1] if len(seen.shape) == 4 and not last else seen.shape[-1]


def tokens_in(seen: Seen, last: bool) -> int:
    if len(seen.shape) == 4:
        return math.prod(seen.shape[1:3] if last else seen.shape[2:])
    return seen.shape[1] if len(seen.shape) == 3 else 1


def pointwise(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv2d) or max(module.kernel_size) == 1


def depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and not pointwise(module)


def convolves(calls: Sequence[Ran]) -> bool:
    return any(not pointwise(c.module) for c in calls)


def passes(module: nn.Module) -> bool:
    """Whether it gives, in evaluation, what it is given."""
    return isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)) or type(module).__name__ == "DropPath"


def channels_last(ran: Ran) -> bool:
    """A linear map or a norm acts on the last dimension, unless it is one of maps."""
    return layout_of(ran.module) != "first"


def short_name(path: str, block: str) -> str:
    return path.removeprefix(f"{block}.").replace(".", "_")
