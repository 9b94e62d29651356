"""Deterministic costs: parameters, and bytes that autograd saves for backward."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from restuning.adapt import Tuned


def count(tuned: Tuned) -> dict[str, int]:
    """Parameters of the active adapters: trainable = tuners + head; total counts the backbone's body too.

    A side path counts as tuners; under full fine-tuning the whole body does.
    """
    active = [tuned.adapters[name] for name in tuned.active_adapters]
    head = sum(_size(a.get_submodule("head")) for a in active)
    inside = sum(_size(a) for a in active) - head
    body = tuned.body
    tuners = inside + (body if any(a.full for a in active) else 0)
    return {"trainable": tuners + head, "tuners": tuners, "head": head, "total": body + inside + head}


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_bytes(run: Callable[[], Any], leave_out: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `run()`: each storage once, `leave_out` (the parameters) not."""
    known = {t.untyped_storage().data_ptr() for t in leave_out}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until counted, so that no address is met twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(found.values())
