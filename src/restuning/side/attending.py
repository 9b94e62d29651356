"""Attention to tokens that several networks share, and their norm: little of it is kept for backward."""

from typing import Any

import torch
from torch import Tensor


def attend(rows: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
    """softmax(rows keysᵀ) values, (b, …, m, v) of (b, …, m, w), (b, …, n, w) and (b, …, n, v), whose weights are
    computed again for backward. Under vmap over the rows alone, those of all slices attend as one: keys and values are
    not copied.

    seen: (b, …, 1, n), which tokens are attended to; None: all.
    """
    kind, same = rows.device.type, values is keys
    if torch.is_autocast_enabled(kind) and rows.dtype is not torch.float64:  # as it casts a matrix product
        dtype = torch.get_autocast_dtype(kind)
        rows, keys, values = (tensor.to(dtype) for tensor in (rows, keys, values))
    else:
        keys, values = keys.to(rows.dtype), values.to(rows.dtype)
    out: Tensor = _Attend.apply(rows, keys, None if same else values, seen)  # type: ignore[no-untyped-call]
    return out


def _weights(rows: Tensor, keys: Tensor, seen: Tensor | None) -> Tensor:
    scores = rows @ keys.mT
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    weights: Tensor = scores.softmax(-1).to(keys.dtype)
    return weights


class _Attend(torch.autograd.Function):
    """values: None where they are the keys: torch.compile of 2.14 refuses the same tensor as two arguments."""

    @staticmethod
    def forward(rows: Tensor, keys: Tensor, values: Tensor | None, seen: Tensor | None) -> Tensor:
        return _weights(rows, keys, seen) @ (keys if values is None else values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, keys, values, seen = ctx.saved_tensors
        weights = _weights(rows, keys, seen)
        same, values = values is None, keys if values is None else values
        back = grad @ values.mT
        back = weights * (back - (weights * back).sum(-1, keepdim=True))
        to_keys = back.mT @ rows if ctx.needs_input_grad[1] else None
        to_values = weights.mT @ grad if ctx.needs_input_grad[1 if same else 2] else None
        if same and to_keys is not None:
            to_keys, to_values = to_keys + to_values, None
        return back @ keys, to_keys, to_values, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, rows: Tensor, *shared: Tensor | None) -> tuple[Tensor, int]:
        at, *dims = in_dims
        if at is not None and dims == [None] * len(dims):
            rows = rows.movedim(at, -3)
            out: Tensor = _Attend.apply(rows.flatten(-3, -2), *shared)  # type: ignore[no-untyped-call]
            return torch.unflatten(out, -2, rows.shape[-3:-1]), rows.ndim - 3

        def batched(x: Tensor | None, at: int | None) -> Tensor | None:
            """Slices before the batch, as one axis."""
            if x is None:
                return None
            x = x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
            return x.flatten(0, 1)

        out = _Attend.apply(*(batched(x, d) for x, d in zip((rows, *shared), in_dims, strict=True)))  # type: ignore[no-untyped-call]
        return torch.unflatten(out, 0, (info.batch_size, -1)), 0


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weightᵀ + bias for the rows of x (b, m, w); under vmap over all three, one batched product."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        x, weight, bias = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (x, weight, bias))
    out: Tensor = torch.unflatten(_Affine.apply(x.flatten(0, 1), weight, bias), 0, x.shape[:2])  # type: ignore[no-untyped-call]
    return out


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight.mT) if x.ndim == 2 else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x, grad.sum(-2)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> tuple[Tensor, int]:
        of_each = (
            x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
            for x, at in zip(inputs, in_dims, strict=True)
        )
        out: Tensor = _Affine.apply(*of_each)  # type: ignore[no-untyped-call]
        return out, 0


def normalised_tokens(x: Tensor) -> Tensor:
    """`features.normalised` of what carries a gradient: no more than its output is kept for backward."""
    out: Tensor = _Normalised.apply(x)[0]  # type: ignore[no-untyped-call]
    return out


class _Normalised(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y, _, scale = torch.native_layer_norm(wide, wide.shape[-1:], None, None, 1e-5)
        return y, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
        y, scale = ctx.saved_tensors
        back: Tensor = scale * (grad - grad.mean(-1, keepdim=True) - y * (grad * y).mean(-1, keepdim=True))
        return back.to(ctx.dtype)
