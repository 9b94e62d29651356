"""Compiled graphs: the pass of one adapter, from the input to what its head reads; and the pass to the features that
any number of adapters read."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restuning.errors import MethodError
from restuning.hooks.law import Attachment, group_by_site
from restuning.hooks.points import backbone_lock
from restuning.hooks.recompute import checkpoints, replays_nothing
from restuning.hooks.taps import Taps, tap
from restuning.model.adapter import Reader
from restuning.model.mixed import kind_of
from restuning.side.features import Features

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned


LOWEST = "2.12"
"""The first torch that is known to trace hooks once; 2.10 traces every call anew, and some attention not at all."""


class CompiledPass:
    """Adapters of one kind, whatever their classes, share a graph."""

    def __init__(self, backbone: nn.Module, options: dict[str, Any]) -> None:
        """
        Args:
            backbone: frozen.
            options: of `torch.compile`.

        Raises:
            MethodError: torch is older than `LOWEST`.
        """
        if torch.__version__ < LOWEST:  # compared as versions
            raise MethodError(f"a compiled pass needs torch {LOWEST}, and this is {torch.__version__}")
        self.backbone = backbone
        self._graph: Callable[..., Tensor] = torch.compile(self._pass, **options)

    def __call__(self, tuned: "Tuned", name: str, args: Any, kwargs: Any) -> Tensor:
        """Logits of one adapter. The head runs outside: tasks may differ in their classes."""
        adapter, reader = tuned.adapter(name), tuned.reader(name)
        added = group_by_site((site, "", tuner) for site, tuner in (*adapter.inside, *adapter.in_tail))
        attachment = Attachment(self.backbone, tuned.sites, added)
        with (
            backbone_lock(self.backbone),
            replays_nothing() if checkpoints(self.backbone) else nullcontext(),
            attachment.on(),
            tap(self.backbone, tuned.sites, adapter.request) as taps,
        ):
            pooled = self._graph(kind_of(name, adapter), reader, taps, args, kwargs)
        return adapter.outputs(pooled)

    def _pass(self, kind: str, reader: Reader, taps: Taps, args: Any, kwargs: Any) -> Tensor:
        """kind: part of the signature, since what is attached is not."""
        with torch.no_grad() if reader.adapter.reads_features else nullcontext():
            self.backbone(*args, **kwargs)
        return reader.read(taps.features, head=False)


class CompiledForward:
    """The pass of a frozen backbone to its features. Other requests, and other shapes, may take another graph, of which
    torch keeps no more than `torch._dynamo.config.recompile_limit`; beyond them it runs as it is."""

    def __init__(self, backbone: nn.Module, options: dict[str, Any]) -> None:
        """
        Args:
            backbone: frozen.
            options: of `torch.compile`.
        """
        self.backbone = backbone
        self._graph: Callable[..., Features] = torch.compile(self._pass, **options)

    def __call__(self, taps: Taps, args: Any, kwargs: Any) -> Features:
        """What the taps, which are on the backbone, take of a forward."""
        return self._graph(taps, args, kwargs)

    def _pass(self, taps: Taps, args: Any, kwargs: Any) -> Features:
        self.backbone(*args, **kwargs)
        return taps.features
