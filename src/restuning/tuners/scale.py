"""The learned weight of a tuner's branch, one at initialisation."""

from typing import Literal, TypeAlias

import torch
from torch import nn

from restuning.errors import MethodError

Scale: TypeAlias = Literal["none", "scalar", "channel"]


def branch_scale(scale: Scale, width: int) -> nn.Parameter | None:
    """No parameter, one, or one for each of `width` channels."""
    sizes = {"none": None, "scalar": 1, "channel": width}
    if scale not in sizes:
        raise MethodError(f"unknown scale {scale!r}: expected one of {', '.join(sizes)}")
    size = sizes[scale]
    return None if size is None else nn.Parameter(torch.ones(size))


def check_size(tuner: str, field: str, value: int) -> None:
    """Sizes are whole numbers of at least one."""
    if type(value) is not int or value < 1:
        raise MethodError(f"{tuner}({field}={value!r}): expected a whole number of at least 1")


def check_init(tuner: str, init: str, known: tuple[str, ...]) -> None:
    """An initialisation is one of those named."""
    if init not in known:
        raise MethodError(f"{tuner}(init={init!r}): expected one of {', '.join(known)}")


def check_rate(tuner: str, dropout: float) -> None:
    """Dropout is a probability below one."""
    if not 0 <= dropout < 1:
        raise MethodError(f"{tuner}(dropout={dropout!r}): expected 0 or more, and less than 1")
