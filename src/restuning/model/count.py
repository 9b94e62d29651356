"""Parameters of a tuned model."""

from torch import nn

from restuning.model.tuned import Tuned


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
