"""A step that keeps what it reads for the backward pass, and nothing of what it computes on the way."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


def again(step: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """step(*inputs), run once more when its gradient is asked for; `parameters`: those that it uses.

    As torch's own checkpoints, but what is kept is kept as saved tensors, which can be counted.
    """
    if not torch.is_grad_enabled():
        return step(*inputs)
    said: Tensor = _Again.apply(step, parameters, len(inputs), *inputs, *parameters)  # type: ignore[no-untyped-call]
    return said


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Callable[..., Tensor], parameters: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.step, ctx.parameters, ctx.device = step, parameters, tensors[0].device.type
        ctx.save_for_backward(*tensors[:count])
        ctx.drawn = torch.get_rng_state(), get_device_states(*tensors)  # for dropout
        ctx.cast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        return step(*tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needs, strict=False)]
        cpu, (devices, states) = ctx.drawn
        on, dtype = ctx.cast
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(ctx.device, dtype, enabled=on):
            torch.set_rng_state(cpu)
            set_device_states(devices, states)
            said = ctx.step(*inputs)
        all_of = [*inputs, *ctx.parameters]
        wanted = [t for t, need in zip(all_of, needs, strict=True) if need]
        found = iter(torch.autograd.grad(said, wanted, grads, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needs)
