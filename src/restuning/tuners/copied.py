"""A trained copy of a whole module."""

import copy
from typing import Any, ClassVar

import torch
from torch import nn


class CopiedModule(nn.Module):
    """A copy of a frozen module, which is trained and whose output takes the place of the module's own: what PEFT's
    `modules_to_save` does. No sum: the module may be an embedding, a norm, a whole block."""

    form: ClassVar[str] = "copy"
    mixes_tokens = True

    def __init__(self, module: nn.Module) -> None:
        """
        Args:
            module: copied with its weights, buffers and hooks.
        """
        super().__init__()
        self.module = copy.deepcopy(module)
        for p in self.module.parameters():
            p.requires_grad_(torch.is_floating_point(p))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
