"""Gradient checkpointing: the backbone's own, with tuners attached again when its blocks are run again."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from restuning.errors import MethodError, line


def checkpoints(backbone: nn.Module) -> list[nn.Module]:
    """The modules in which gradient checkpointing is on, by timm's name or by transformers'."""
    names = ("grad_checkpointing", "gradient_checkpointing")
    return [m for m in backbone.modules() if any(m.__dict__.get(name) for name in names)]


def switch_checkpoints(backbone: Any, on: bool, settings: Mapping[str, Any] | None = None) -> None:
    """Raises MethodError for a backbone that has none."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # transformers, from 5.23 and before it
        switch = getattr(backbone, f"{name}_{'enable' if on else 'disable'}", None)
        if switch is not None:
            try:
                switch(**({f"{name}_kwargs": dict(settings or {})} if on else {}))
            except ValueError as error:  # as transformers says that a model has none
                raise MethodError(line(error)) from error
            if hasattr(backbone, "_require_grads_hook"):  # what frozen embeddings say needs no gradient
                backbone.disable_input_require_grads()
            return
    diffusers = getattr(backbone, f"{'enable' if on else 'disable'}_gradient_checkpointing", None)
    if diffusers is not None:  # not reentrant, as it comes
        diffusers()
        return
    if not hasattr(backbone, "set_grad_checkpointing"):
        raise MethodError(f"{type(backbone).__name__} has no gradient checkpointing")
    backbone.set_grad_checkpointing(on)


def replays_nothing() -> AbstractContextManager[Any]:
    """For torch.compile: what hooks note down while a checkpointed block runs is noted once."""
    import torch._dynamo as dynamo

    return dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)  # type: ignore[no-any-return]


class Replay:
    """What is attached while a backward pass runs blocks again: one forward's tuners at a time."""

    def __init__(self) -> None:
        self._on, self._whose = ExitStack(), object()

    def watch(self, features: Sequence[Tensor], attached: Callable[[], AbstractContextManager[Any]]) -> None:
        """Be `attached` from the moment when a gradient reaches one of the features, to the end of that backward pass
        or to the moment when it reaches those of another forward.

        Raises MethodError if none of them can have a gradient: reentrant checkpoints run blocks without autograd.
        """
        reached = [x for x in features if x.requires_grad]
        if not reached:
            raise MethodError(
                "no gradient comes out of the recomputed blocks: gradient checkpointing needs use_reentrant=False "
                "(tuned.gradient_checkpointing_enable() says so)"
            )
        mine = object()

        def enter(grad: Tensor) -> None:
            if self._whose is not mine:
                self.leave()
                self._whose = mine
                self._on.enter_context(attached())
                torch.autograd.Variable._execution_engine.queue_callback(self.leave)

        for x in reached:
            x.register_hook(enter)  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Done by a backward pass at its end; to be done for one that was interrupted."""
        self._whose = object()
        self._on.close()
