"""One pass of a backbone with tuners attached, from the input to its features."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from restuning.backbones.sites import Site
from restuning.errors import MethodError, line
from restuning.hooks.law import Attachment
from restuning.hooks.memory import FrozenOpMemory
from restuning.hooks.points import NamedTuners, backbone_lock
from restuning.hooks.recompute import checkpoints
from restuning.hooks.taps import Taps, check_square, check_widths, tap
from restuning.side.features import FeatureRequest, Features
from restuning.tuners.base import as_tuner

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
        with attachment.on(recomputing), tap(backbone, sites, request) as made:
            made.mask = mask if recomputing else None  # a block is run again, and not the backbone, which has it
            yield made

    quiet: AbstractContextManager[Any] = torch.no_grad() if frozen else frozen_op_memory(tuned)
    check_inputs(tuned, args, kwargs)
    with backbone_lock(backbone), quiet, on() as taps:
        try:
            backbone(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            raise _in_words(tuned, inside, error) from error
    mask = taps.mask
    check_square(taps, sites)
    check_widths(taps, sites)
    trained = any(p.requires_grad for at_site in inside.values() for _, tuner in at_site for p in tuner.parameters())
    graph, recomputed = trained and torch.is_grad_enabled(), bool(checkpoints(backbone))
    if graph and not recomputed and not any(x.requires_grad for x in taps.features.tensors()):
        raise MethodError(
            f"no gradient comes through {type(backbone).__name__}, to what is tuned inside it: it has a backward pass "
            "of its own, or does not call what is tuned; a side path needs none"
        )
    if graph and recomputed:
        tuned.replay.watch(taps.features.tensors(), partial(on, recomputing=True))
    return taps.features


def check_inputs(tuned: "Tuned", args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """
    Args:
        tuned: whose backbone is called.
        args, kwargs: of the backbone's forward.

    Raises:
        MethodError: the backbone would fail in no words, or its output would be NaN: a batch of no rows over stages, a
            text beyond the learnt positions, a row of padding alone.
    """
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    if first is not None and first.ndim and not len(first) and not tuned.sites.uniform:
        raise MethodError("a batch of no rows: stages need one at least")
    if tuned.family != "text":
        return
    ids, most = kwargs.get("input_ids", first), positions_of(tuned.backbone)
    if most is not None and isinstance(ids, torch.Tensor) and ids.ndim > 1 and ids.shape[1] > most:
        raise MethodError(f"a text of {ids.shape[1]} tokens: {type(tuned.backbone).__name__} reads at most {most}")
    mask = kwargs.get("attention_mask")
    whole = kwargs.get("past_key_values") is None  # with a cache, a row's first tokens may all be padding
    if whole and isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.numel():
        empty = (~mask.bool().any(-1)).nonzero()
        if len(empty):
            raise MethodError(f"row {int(empty[0])} is padding alone: a text has one token at least")


def positions_of(backbone: nn.Module) -> int | None:
    """The tokens that learnt positions reach, if the backbone has such."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    if type(table) is not nn.Embedding:
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _in_words(tuned: "Tuned", inside: Mapping[Site, NamedTuners], error: RuntimeError | IndexError) -> Exception:
    """The error itself, but where tuners inside the backbone add tokens, keys or values that it cannot take."""
    tuners = (tuner for named in inside.values() for _, tuner in named)
    kinds = sorted({type(tuner).__name__ for tuner in tuners if as_tuner(tuner).only_on})
    if not kinds or isinstance(error, torch.OutOfMemoryError):
        return error
    return MethodError(f"{type(tuned.backbone).__name__} cannot be run with {', '.join(kinds)}: {line(error)}")


def frozen_op_memory(tuned: "Tuned") -> AbstractContextManager[Any]:
    """While it lasts, frozen operations keep what `tuned.memory` says for the backward pass.

    Off where blocks are run again in the backward pass (they keep their inputs alone, and then what they kept before),
    and in full fine-tuning, where no operation is frozen.
    """
    full = any(tuned.adapter(name).full for name in tuned.adapters)
    if full or tuned.memory == "plain" or not torch.is_grad_enabled() or checkpoints(tuned.backbone):
        return nullcontext()
    return FrozenOpMemory(tuned.memory).but(tuned.backbone.get_submodule(tuned.sites.blocks[-1]))
