"""What is done in place of frozen operations while a `FrozenOpMemory` is on: one function an operation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from restuning.hooks.attention import Call, Piece, merged, opened
from restuning.hooks.backward import (
    GELU,
    GELU_TANH,
    HARDSWISH,
    QUICK_GELU,
    SILU,
    Activation,
    BatchNorm,
    Compact,
    Conv,
    Gated,
    GroupNorm,
    LayerNorm,
    Operation,
    Relu,
    RmsNorm,
    frozen,
)

if TYPE_CHECKING:
    from restuning.hooks.memory import FrozenOpMemory


def read_by_tuner(x: Tensor) -> Tensor:
    """The same tensor: told to a `FrozenOpMemory` that is on, since a tuner keeps what it reads for its own
    gradient."""
    if has_torch_function((x,)):
        handle_torch_function(read_by_tuner, (x,), x)
    return x


# ---- norms


def _layer_norm(
    mode: "FrozenOpMemory",
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    if not passed(input) or not frozen(weight, bias) or len(normalized_shape) != 1 or _fits_not(weight, bias):
        return NotImplemented
    if input in mode.kept:
        return NotImplemented
    if mode.again and input.ndim == 4:  # of queries and keys
        run = partial(F.layer_norm, normalized_shape=normalized_shape, weight=weight, bias=bias, eps=eps)
        if (y := mode.recomputed(Operation(run), [input])) is not NotImplemented:
            return y
    return mode.keep(LayerNorm.apply(_wide_in_autocast(input), weight, bias, eps))  # type: ignore[no-untyped-call]


def _group_norm(
    mode: "FrozenOpMemory", input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    if not passed(input) or not frozen(weight, bias) or not input.is_contiguous() or _fits_not(weight, bias):
        return NotImplemented
    if input in mode.kept:
        return NotImplemented
    return mode.keep(GroupNorm.apply(_wide_in_autocast(input), num_groups, weight, bias, eps))  # type: ignore[no-untyped-call]


def _rms_norm(
    mode: "FrozenOpMemory", input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    if not passed(input) or not frozen(weight) or len(normalized_shape) != 1 or input in mode.kept:
        return NotImplemented
    if mode.again and input.ndim == 4:
        run = partial(F.rms_norm, normalized_shape=list(normalized_shape), weight=weight, eps=eps)
        if (y := mode.recomputed(Operation(run), [input])) is not NotImplemented:
            return y
    x = _wide_in_autocast(input)
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    by = (wide.square().mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    compute = partial(F.rms_norm, x.detach(), list(normalized_shape), weight, eps)
    return mode.keep(RmsNorm.apply(x, by, weight, compute))  # type: ignore[no-untyped-call]


def _batch_norm(
    mode: "FrozenOpMemory",
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not passed(input) or input.ndim != 4 or training or running_mean is None or not frozen(weight, bias):
        return NotImplemented
    return BatchNorm.apply(input, running_mean, running_var, weight, bias, eps)  # type: ignore[no-untyped-call]


def _conv2d(
    mode: "FrozenOpMemory",
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not passed(input) or not frozen(weight, bias) or isinstance(padding, str) or input.ndim != 4:
        return NotImplemented
    return Conv.apply(input, weight, bias, (stride, padding, dilation, groups))  # type: ignore[no-untyped-call]


# ---- activations


def _gelu(mode: "FrozenOpMemory", input: Tensor, approximate: str = "none") -> Any:
    return _activation(mode, input, GELU if approximate == "none" else GELU_TANH)


def _silu(mode: "FrozenOpMemory", input: Tensor, inplace: bool = False) -> Any:
    return _activation(mode, input, SILU, inplace)


def _hardswish(mode: "FrozenOpMemory", input: Tensor, inplace: bool = False) -> Any:
    return _activation(mode, input, HARDSWISH, inplace)


def _relu(mode: "FrozenOpMemory", input: Tensor, inplace: bool = False) -> Any:
    if not passed(input) or (inplace and input._is_view()):
        return NotImplemented
    return Relu.apply(input, inplace) if mode.signs else F.relu(input, inplace)  # type: ignore[no-untyped-call]


def _activation(
    mode: "FrozenOpMemory", x: Tensor, kind: Activation, inplace: bool = False, out: Callable[[], Tensor] | None = None
) -> Any:
    """out: gives the output, if not kind.forward(x)."""
    if not passed(x) or (inplace and x._is_view()):
        return NotImplemented
    operation = Operation(kind.forward, lambda grad, x: (kind.backward(grad, x),), out)
    y = mode.recomputed(operation, [x]) if mode.again and not inplace else NotImplemented
    if y is NotImplemented and inplace and not mode.compact:
        return NotImplemented
    if y is NotImplemented and mode.compact and x not in mode.kept:
        mode.rounded = True
        y = Compact.apply(x, kind, inplace)  # type: ignore[no-untyped-call]
    elif y is NotImplemented:
        y = kind.forward(x) if out is None else out()
    if not inplace:
        mode.note[y] = "activation", kind, x
    return y


def _mul(mode: "FrozenOpMemory", input: Any, other: Any, *, out: Any = None) -> Any:
    if out is not None or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return NotImplemented
    for a, b in ((input, other), (other, input)):
        what, *rest = mode.note.get(a) or (None,)
        if what == "sigmoid" and rest[0] is b and passed(b):  # x σ(x), and QuickGELU
            kind = {1.0: SILU, 1.702: QUICK_GELU}.get(rest[1])
            return NotImplemented if kind is None else _activation(mode, b, kind, out=partial(torch.mul, input, other))
        if what == "normalised" and b.ndim == 1 and not b.requires_grad and b.shape == a.shape[-1:]:
            x, by = rest
            if x in mode.made and x.ndim == 4:
                return NotImplemented  # of queries and keys: its parts are computed again
            mode.note.clear()
            return mode.keep(RmsNorm.apply(x, by.detach(), b, partial(_unrecorded, torch.mul, input, other)))  # type: ignore[no-untyped-call]
        if what == "activation" and passed(a) and passed(b) and a.shape == b.shape and a.dtype == b.dtype:
            kind, gate = rest
            mode.note.clear()
            now = partial(_unrecorded, torch.mul, input, other)
            operation = Operation(kind.gated, kind.gated_backward, now)
            again = mode.recomputed(operation, [gate, b]) if mode.again else NotImplemented
            return Gated.apply(gate, b, kind, now) if again is NotImplemented else again  # type: ignore[no-untyped-call]
    both = mode.again and passed(input) and passed(other)
    return mode.recomputed(Operation(torch.mul), [input, other]) if both else NotImplemented


# ---- what is computed again


def _attention(
    mode: "FrozenOpMemory",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    trained = isinstance(attn_mask, Tensor) and attn_mask.requires_grad
    if not mode.again or dropout_p or trained:
        return NotImplemented
    masks = [] if attn_mask is None else [attn_mask]
    run = partial(F.scaled_dot_product_attention, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return mode.recomputed(Operation(run), [query, key, value, *masks])


def _pow(mode: "FrozenOpMemory", input: Tensor, exponent: Any) -> Any:
    if not mode.again or isinstance(exponent, Tensor) or exponent != 2 or input.ndim != 4:
        return NotImplemented
    return mode.recomputed(Operation(torch.square), [input])


def _merged(mode: "FrozenOpMemory", call: Call, pieces: Sequence[Piece], fast: bool = True) -> Any:
    if not mode.again or call.output is not None:
        return NotImplemented
    masks = [] if call.mask is None else [call.mask]

    def run(*t: Tensor) -> Tensor:
        more = t[3 + len(masks) :]
        own = replace(call_, q=t[0], k=t[1], v=t[2], mask=t[3] if masks else None)
        return merged(own, list(zip(more[::2], more[1::2], strict=True)), fast)

    operands = [call.q, call.k, call.v, *masks, *(t for piece in pieces for t in piece)]
    empty = torch.empty(0)
    call_, masks = replace(call, q=empty, k=empty, v=empty, mask=None), [empty for _ in masks]  # `run` holds none
    return mode.recomputed(Operation(run), operands)


def _opened(mode: "FrozenOpMemory", *args: Any, **kwargs: Any) -> Any:
    """nn.MultiheadAttention, whose inside no mode can see, in calls that this one can."""
    plain = kwargs.get("need_weights", True) or not mode.again or args[0].ndim != 3
    if plain or any(args[i] is not None for i in (7, 8)) or args[9] or args[5] is None:
        return NotImplemented
    with mode:
        return opened(*args, **kwargs)


def _addcmul(mode: "FrozenOpMemory", input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Any:
    if not mode.again or not passed(tensor1) or value != 1:
        return NotImplemented
    return mode.recomputed(Operation(torch.addcmul), [input, tensor1, tensor2])


def _read(mode: "FrozenOpMemory", x: Tensor) -> Tensor:
    return mode.keep(x)


RULES: Mapping[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    F.conv2d: _conv2d,
    F.gelu: _gelu,
    F.silu: _silu,
    F.hardswish: _hardswish,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    Tensor.mul: _mul,
    torch.mul: _mul,
    Tensor.pow: _pow,
    torch.addcmul: _addcmul,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _opened,
    merged: _merged,
    read_by_tuner: _read,
}
"""What is done in place of an operation: NotImplemented where it is done as it is."""


def passed(x: Tensor) -> bool:
    """Whether a gradient goes through it."""
    return torch.is_grad_enabled() and x.requires_grad


def _fits_not(weight: Tensor | None, bias: Tensor | None) -> bool:
    return weight is None and bias is not None


def _wide_in_autocast(x: Tensor) -> Tensor:
    """As autocast gives it to norms: on accelerators in single precision, on a CPU as it is."""
    cast = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
    return x.float() if cast and x.dtype in (torch.float16, torch.bfloat16) else x


def _unrecorded(func: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Without autograd."""
    with torch.no_grad():
        return func(*args)
