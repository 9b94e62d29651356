"""Tokens appended to the residual stream over a span of blocks (Res-Tuning, Eq. 4 and 5)."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.anatomy import as_tuple
from restuning.backbones.sites import Sites
from restuning.errors import MethodError
from restuning.hooks.attention import Call, Piece, merged, on_call
from restuning.hooks.points import (
    AnyTuner,
    Hook,
    after,
    argument,
    before,
    first_tensor,
    in_dtype,
    in_dtype_of,
    replace_argument,
    replace_first_tensor,
)

ROTARY = ("rope", "position_embeddings")
"""The keyword arguments by which blocks are given rotary positions."""


class AppendedTokens:
    """How many tokens are appended to the stream over a span of blocks.

    Args:
        span: the blocks, counted from 0.
    """

    def __init__(self, span: range) -> None:
        self.span = span
        self.before = 0  # tokens of the stream without them
        self.count = 0


def append_tokens(backbone: nn.Module, sites: Sites, appended: AppendedTokens, tuner: AnyTuner) -> Iterator[Hook]:
    """[x; tokens] from the input of the first block of a span to the output of its last one (Eq. 4)."""
    modules = [backbone.get_submodule(sites.blocks[i]) for i in appended.span]

    def append(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _refuse_rotary(kwargs)
        name, x = argument(m, args, kwargs)
        if m is modules[0]:
            appended.before = x.shape[1]
            x = torch.cat([x, _tokens(tuner, x)], 1)
            appended.count = x.shape[1] - appended.before
        n, total = appended.before, x.shape[1]
        args = tuple(_widened(value, n, total) for value in args)
        kwargs = {key: _widened(value, n, total) for key, value in kwargs.items()}
        return replace_argument(args, kwargs, name, x)

    def remove(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return replace_first_tensor(out, first_tensor(out)[:, : appended.before])

    for module in modules:
        yield partial(before, module, append, first=True)
    yield partial(after, modules[-1], remove)


def prompts_apart(
    backbone: nn.Module, sites: Sites, span: range, tuner: AnyTuner, recomputing: Callable[[], bool]
) -> Iterator[Hook]:
    """The same, unbound (Eq. 5): stream and prompts pass every block of a span apart, and meet in its attention alone,
    by λ and by β (Eq. 9 to 13)."""
    prompts: dict[int, Tensor] = {}  # those that come to a block from the one before it

    def in_block(i: int, block: nn.Module) -> tuple[Callable[..., None], Callable[[Call], Tensor]]:
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outer: list[Call] = []
        own: list[Piece] = []  # the prompts' keys and values

        def read(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _refuse_rotary(kwargs)
            given[:] = [(args, kwargs)]

        def change(call: Call) -> Tensor:
            if outer:  # the prompts' own pass: their queries see the stream and themselves (D of Eq. 5)
                own.append((call.k, call.v))
                stream = outer[-1]
                mask = None if stream.mask is None else stream.mask[..., :1, :]
                return merged(Call(call.q, stream.k, stream.v, mask, False, stream.scale), own[-1:])
            args, kwargs = given[0]  # kept: a block may be run again from within
            name, x = argument(block, args, kwargs)
            tokens = prompts[i] if i in prompts else _tokens(tuner, x)
            args = tuple(None if _is_mask(value) else value for value in args)
            kwargs = {key: None if _is_mask(value) else value for key, value in kwargs.items()}
            args, kwargs = replace_argument(args, kwargs, name, tokens)
            outer.append(call)
            training, block.training = block.training, False  # no checkpoint within a checkpoint
            try:
                output = first_tensor(block.forward(*args, **kwargs))  # without its hooks: they are the stream's
            finally:
                block.training = training
                outer.pop()
            if i + 1 in span:
                prompts[i + 1] = output
            return merged(call, [own.pop()])

        return read, change

    for i in span:
        block = backbone.get_submodule(sites.blocks[i])
        read, change = in_block(i, block)
        yield partial(before, block, read)
        (name,) = as_tuple(sites.anatomy.attention)
        attention = f"{sites.blocks[i]}.{name}"
        yield partial(on_call, backbone.get_submodule(attention), change, recomputing)


def _tokens(tuner: AnyTuner, x: Tensor) -> Tensor:
    """Those that a tuner appends to the stream, in its dtype."""
    return in_dtype(tuner(in_dtype_of(tuner, x)), x.dtype)


def _refuse_rotary(kwargs: Mapping[str, Any]) -> None:
    if any(kwargs.get(name) is not None for name in ROTARY):
        raise MethodError("this backbone's positions are rotary and fixed in number: tokens cannot be added to it")


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _widened(mask: Any, n: int, total: int) -> Any:
    """An attention mask (b, 1, 1 or n, n) for `total` tokens, of which those after the n-th are seen and see."""
    if not (_is_mask(mask) and mask.shape[-1] == n):
        return mask
    more = total - n
    mask = F.pad(mask, (0, more), value=True if mask.dtype == torch.bool else 0)
    return torch.cat([mask, mask[:, :, :1].expand(-1, -1, more, -1)], 2) if mask.shape[2] == n else mask
