"""Backward passes of frozen operations that need less than torch keeps for them: norms from their outputs, derivatives
in 8 bits, and what is computed again. All of them give the outputs of the plain operation, to the bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.utils.weak import WeakIdKeyDictionary

from restuning.hooks.expressions import Program

aten = torch.ops.aten


class Conv(torch.autograd.Function):
    """A convolution (b, c, h, w) → (b, c', h', w') that keeps its weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        grad = conv2d_input(ctx.shape, weight.to(grads[0].dtype), grads[0], *ctx.settings)  # type: ignore[no-untyped-call]
        return grad, None, None, None


class BatchNorm(torch.autograd.Function):
    """A batch norm in eval mode, (b, c, h, w), that keeps a factor for each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        ctx.save_for_backward(scale)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale.to(grads[0].dtype)[:, None, None], None, None, None, None, None


# ---- norms from their outputs


class LayerNorm(torch.autograd.Function):
    """A layer norm over the last dimension that keeps its output, and of its input one number a row (Ba et al. 2016).

    With x̂ = (y − b) / w the gradient is (g w − mean(g w) − x̂ mean(g w x̂)) / σ. Where w is too small to divide by, x̂
    is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        at = small_weights(weight, bias, y.dtype)
        kept = None if at is None else (x[..., at] - mean) * rstd
        ctx.save_for_backward(_watched(ctx, y), rstd, weight, bias, at, kept)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, rstd, weight, bias, at, kept = ctx.saved_tensors
        x = _normalised(_unchanged(ctx, y), weight, bias)
        if at is not None:
            x[..., at] = kept.to(x.dtype)
        wide = None if weight is None else weight.to(x.dtype)
        none, one = torch.zeros_like(rstd, dtype=x.dtype), torch.ones_like(rstd, dtype=x.dtype)
        grad, _, _ = aten.native_layer_norm_backward(
            grads[0].to(x.dtype), x, x.shape[-1:], none, one, wide, None, [True, False, False]
        )
        return grad.mul_(rstd).to(ctx.dtype), None, None, None


class GroupNorm(torch.autograd.Function):
    """The same of a group norm, over groups of the channels of (b, c, …)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        b, c, size = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, size, groups, eps)
        at = small_weights(weight, bias, y.dtype)
        kept = None if at is None else (x[:, at] - _of_channels(mean, x)[:, at]) * _of_channels(rstd, x)[:, at]
        ctx.save_for_backward(_watched(ctx, y), rstd, weight, bias, at, kept)
        ctx.dtype, ctx.groups = x.dtype, groups
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, rstd, weight, bias, at, kept = ctx.saved_tensors
        shape = (-1, *[1] * (y.ndim - 2))
        x = _normalised(_unchanged(ctx, y), *(None if p is None else p.view(shape) for p in (weight, bias)))
        if at is not None:
            x[:, at] = kept.to(x.dtype)
        none, one = torch.zeros_like(rstd, dtype=x.dtype), torch.ones_like(rstd, dtype=x.dtype)
        grad, _, _ = aten.native_group_norm_backward(
            grads[0].to(x.dtype).contiguous(), x, none, one, None if weight is None else weight.to(x.dtype),
            x.shape[0], x.shape[1], x[0, 0].numel(), ctx.groups, [True, False, False],
        )  # fmt: skip
        return grad.mul_(_of_channels(rstd, x)).to(ctx.dtype), None, None, None, None


class RmsNorm(torch.autograd.Function):
    """The same of a norm by the root mean square, of the last dimension (Zhang & Sennrich 2019). compute: gives the
    output; rstd (…, 1): what the input was multiplied by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rstd: Tensor, weight: Tensor | None, compute: Callable[[], Tensor]) -> Tensor:
        y = compute()
        at = small_weights(weight, None, y.dtype)
        ctx.save_for_backward(_watched(ctx, y), rstd, weight, at, None if at is None else x[..., at] * rstd)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, rstd, weight, at, kept = ctx.saved_tensors
        x = _normalised(_unchanged(ctx, y), weight, None)
        if at is not None:
            x[..., at] = kept.to(x.dtype)
        grad = grads[0].to(x.dtype) if weight is None else grads[0] * weight.to(x.dtype)
        grad = grad - x * (grad * x).mean(-1, keepdim=True)
        return grad.mul_(rstd).to(ctx.dtype), None, None, None


def _watched(ctx: Any, y: Tensor) -> Tensor:
    """An output as it is kept: the same memory, of which torch does not count writes with the output's own, since what
    writes to that gives it other memory first (see `FrozenOpMemory`). What does not is found in the backward pass."""
    ctx.output, ctx.version = ref(y), y._version
    same = torch.empty(0, dtype=y.dtype, device=y.device)
    return same.set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _unchanged(ctx: Any, y: Tensor) -> Tensor:
    output = ctx.output()
    if output is not None and output._version != ctx.version and output.data_ptr() == y.data_ptr():
        raise RuntimeError("the output of a frozen norm, kept for backward, was written to after the pass")
    return y


def _normalised(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x̂ = (y − b) / w, in single precision at least; a tensor of its own."""
    y = y.to(_wide(y.dtype))
    if weight is None:
        return y.clone()
    by = weight.to(y.dtype).reciprocal()
    return y * by if bias is None else torch.addcmul(-bias.to(y.dtype) * by, y, by)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _of_channels(statistic: Tensor, x: Tensor) -> Tensor:
    """(b, groups) → (b, c, 1, …)."""
    wide = statistic.repeat_interleave(x.shape[1] // statistic.shape[1], 1)
    return wide.view(*wide.shape, *[1] * (x.ndim - 2))


_SMALL: WeakIdKeyDictionary = WeakIdKeyDictionary()


def small_weights(weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The channels whose weight is so small beside their bias that x̂ cannot be had from the output; None if none is.

    To look at the values makes a GPU wait: done once for each weight as it is.
    """
    if weight is None:
        return None
    limit = 64.0 if dtype in (torch.float32, torch.float64) else 4.0
    key = (weight._version, None if bias is None else (id(bias), bias._version), limit)
    found = _SMALL.get(weight)  # type: ignore[no-untyped-call]
    if found is None or found[0] != key:
        size = weight.detach().abs()
        small = size * limit <= (0 if bias is None else bias.detach().abs())
        at = (small | (size < torch.finfo(weight.dtype).tiny * 2**20)).nonzero().flatten()
        found = _SMALL[weight] = key, at if len(at) else None
    at_: Tensor | None = found[1]
    return at_


# ---- activations


@dataclass(frozen=True)
class Activation:
    """forward(x); backward(grad, x), the gradient times the derivative, which lies between low and high."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    low: float = -0.13
    high: float = 1.13

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        """act(gate) · x."""
        return self.forward(gate) * x

    def gated_backward(self, grad: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradients."""
        return self.backward(grad * x, gate), grad * self.forward(gate)


def _quick_gelu(factor: float) -> Activation:
    """x σ(factor x), whose derivative is that of SiLU at factor x."""
    return Activation(lambda x: x * torch.sigmoid(factor * x), lambda g, x: aten.silu_backward(g, x * factor))


GELU = Activation(F.gelu, aten.gelu_backward)
GELU_TANH = Activation(
    lambda x: F.gelu(x, approximate="tanh"), lambda g, x: aten.gelu_backward(g, x, approximate="tanh")
)
SILU = Activation(F.silu, aten.silu_backward)
HARDSWISH = Activation(F.hardswish, aten.hardswish_backward, -0.5, 1.5)
QUICK_GELU = _quick_gelu(1.702)

CHUNK = 2**18  # values at a time on a CPU, which then stay in its caches


class Compact(torch.autograd.Function):
    """An activation whose derivative is kept in 8 bits, as a step on a grid of 256 on which 0 and 1 lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Activation, inplace: bool) -> Tensor:
        steps, zero = _grid(kind)
        flat, codes = x.contiguous(), torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
        size = CHUNK if x.device.type == "cpu" else max(1, x.numel())
        ones = torch.full((min(size, x.numel()),), steps, dtype=_wide(x.dtype), device=x.device)
        for part, to in zip(flat.view(-1).split(size), codes.view(-1).split(size), strict=True):  # type: ignore[no-untyped-call]
            part = part.to(ones.dtype)
            to.copy_(kind.backward(ones[: len(part)], part).add_(zero + 0.5).clamp_(0, 255))
        ctx.save_for_backward(codes)
        ctx.kind = kind
        if inplace:
            ctx.mark_dirty(x)
            return x.copy_(kind.forward(x))
        return kind.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (codes,) = ctx.saved_tensors
        steps, zero = _grid(ctx.kind)
        grad = codes.to(grads[0].dtype)
        return grad.sub_(zero).mul_(grads[0]).mul_(1 / steps), None, None


def _grid(kind: Activation) -> tuple[float, int]:
    """Steps in one, and the step of 0."""
    steps = float(int(255 / (kind.high - kind.low)))
    return steps, round(-kind.low * steps)


class Relu(torch.autograd.Function):
    """A ReLU that keeps where it let through; exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = torch.relu_(x) if inplace else torch.relu(x)
        ctx.save_for_backward(y > 0)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (let,) = ctx.saved_tensors
        return grads[0] * let, None


class Gated(torch.autograd.Function):
    """act(gate) · x, elementwise, that keeps the two it was made of and not the activation's output; exact. now: gives
    the output."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor, kind: Activation, now: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, x)
        ctx.kind = kind
        return now()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, x = ctx.saved_tensors
        return *ctx.kind.gated_backward(grads[0], gate, x), None, None


# ---- computed again


@dataclass(frozen=True)
class Operation:
    """run(*operands) → output. backward(grad, *operands) → a gradient for each; None: as autograd has it. now: gives
    the output where it is there already."""

    run: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]] | None = None
    now: Callable[[], Tensor] | None = None


class Recomputed(torch.autograd.Function):
    """An operation whose operands are not kept: `program` computes them again from leaves.

    Args of apply:
        operation: see `Operation`.
        program: see `Program`; what it wants are the operands.
        count: the number of operands.
        tensors: the operands, then the program's leaves, which get no gradient here.
    """

    @staticmethod
    def forward(ctx: Any, operation: Operation, program: Program, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        ctx.operation, ctx.program, ctx.device = replace(operation, now=None), program, tensors[0].device.type
        ctx.cast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        return operation.run(*tensors[:count]) if operation.now is None else operation.now()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs, operation = ctx.needs_input_grad[3:], ctx.operation
        on, dtype = ctx.cast
        with torch.autocast(ctx.device, dtype, enabled=on):
            with torch.no_grad():
                operands = ctx.program.run(ctx.saved_tensors)
            if operation.backward is not None:
                found = iter(operation.backward(grads[0], *operands))
                return None, None, None, *(next(found, None) for _ in needs)
            operands = [t.detach().requires_grad_(need) for t, need in zip(operands, needs, strict=False)]
            with torch.enable_grad():
                y = operation.run(*operands)
        found = iter(torch.autograd.grad(y, [t for t in operands if t.requires_grad], grads))
        return None, None, None, *(next(found) if need else None for need in needs)


def frozen(*parameters: Tensor | None) -> bool:
    """Whether these are a module's own, and are not trained (a stack's are no parameters)."""
    return all(p is None or (isinstance(p, nn.Parameter) and not p.requires_grad) for p in parameters)


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Of the memory behind them, each piece once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
