"""Frozen convolutions and batch norms that keep nothing for backward.

torch keeps the input of every convolution and batch norm, though a gradient with respect to the input alone needs only
the weights. (Linear maps keep none where their weight is frozen.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode


class _Conv(torch.autograd.Function):
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


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        ctx.save_for_backward(scale)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale.to(grads[0].dtype)[:, None, None], None, None, None, None, None


class FrozenOpMemory(TorchFunctionMode):
    """While it lasts, they do; outputs are the same to the bit, gradients the same up to rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and not kwargs and len(args) == 7 and _passed(args[0]) and _frozen(*args[1:3]):
            x, weight, bias, *settings = args
            if not isinstance(settings[1], str):
                return _Conv.apply(x, weight, bias, tuple(settings))  # type: ignore[no-untyped-call]
        if func is F.batch_norm and _passed(args[0]) and args[0].ndim == 4:
            return self._norm(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _norm(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        if training or running_mean is None or not _frozen(weight, bias):
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return _Norm.apply(x, running_mean, running_var, weight, bias, eps)  # type: ignore[no-untyped-call]


def _passed(x: Tensor) -> bool:
    """Whether a gradient goes through it."""
    return torch.is_grad_enabled() and x.requires_grad


def _frozen(*parameters: Tensor | None) -> bool:
    """Whether these are a module's own, and are not trained (a stack's are no parameters)."""
    return all(p is None or (isinstance(p, nn.Parameter) and not p.requires_grad) for p in parameters)
