"""One pass of a backbone with tuners attached, from the input to its features."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from restuning.backbones.sites import Site
from restuning.hooks.law import Attachment
from restuning.hooks.memory import FrozenOpMemory
from restuning.hooks.points import NamedTuners, backbone_lock
from restuning.hooks.recompute import checkpoints
from restuning.hooks.taps import Taps, check_square, tap
from restuning.side.features import FeatureRequest, Features

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned


def features_of(
    tuned: "Tuned",
    inside: Mapping[Site, NamedTuners],
    request: FeatureRequest,
    frozen: bool,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Features:
    """
    Args:
        tuned: the backbone, its sites and its gradient checkpoints.
        inside: the tuners inside the backbone, by site.
        request: which features are kept.
        frozen: whether the backbone runs without autograd.
        args, kwargs: of the backbone's forward.
    """
    backbone, sites = tuned.backbone, tuned.sites
    tuned.replay.leave()
    attachment = Attachment(backbone, sites, inside)

    @contextmanager
    def on(recomputing: bool = False) -> Iterator[Taps]:
        with attachment.on(recomputing), tap(backbone, sites, request) as taps:
            yield taps

    quiet: AbstractContextManager[Any] = torch.no_grad() if frozen else frozen_op_memory(tuned)
    with backbone_lock(backbone), quiet, on() as taps:
        backbone(*args, **kwargs)
    check_square(taps, sites)
    trained = any(p.requires_grad for at_site in inside.values() for _, tuner in at_site for p in tuner.parameters())
    if trained and torch.is_grad_enabled() and checkpoints(backbone):
        tuned.replay.watch(taps.features.tensors(), partial(on, recomputing=True))
    return taps.features


def frozen_op_memory(tuned: "Tuned") -> AbstractContextManager[Any]:
    """While it lasts, frozen operations keep less for the backward pass. A block that is run again in a backward pass
    has to keep what it kept."""
    less = tuned.sites.anatomy.convolutional and not checkpoints(tuned.backbone)
    return FrozenOpMemory() if less else nullcontext()
