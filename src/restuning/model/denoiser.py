"""Tuning a backbone that denoises: side paths join its last modules, and it is called as it always was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restuning.backbones.sites import Sites
from restuning.errors import MethodError
from restuning.hooks.law import Attachment, group_by_site
from restuning.hooks.points import argument, backbone_lock, before, replace_argument
from restuning.hooks.recompute import checkpoints
from restuning.hooks.taps import tap
from restuning.model.adapter import AdapterModule
from restuning.model.merge import require_unmerged
from restuning.model.passes import frozen_op_memory
from restuning.side.features import FeatureRequest

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned


@dataclass(frozen=True)
class PerAdapter:
    """Each adapter alone. rows: the batch holds as many parts as there are adapters, a part each; else each reads all
    of it. plain: before them, the untuned backbone's output."""

    rows: bool = False
    plain: bool = False


@contextmanager
def joined(
    backbone: nn.Module, sites: Sites, adapters: Sequence[AdapterModule], apart: PerAdapter | None = None
) -> Iterator[None]:
    """While it lasts, the outputs of the adapters' side paths are added to the input of the backbone's last
    modules; up to there the backbone runs without autograd if nothing inside it is tuned.

    apart: in place of their sum, each adapter's alone, (n · b, …), adapter by adapter.
    """
    sides = [adapter for adapter in adapters if adapter.side is not None]
    if not sides:
        yield
        return
    assert sites.join is not None
    grad, frozen = torch.is_grad_enabled(), all(adapter.reads_features for adapter in adapters)
    request = FeatureRequest.of_all(adapter.request for adapter in sides)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        torch.set_grad_enabled(grad)
        name, x = argument(module, args, kwargs)
        n, rows = len(sides), apart is not None and apart.rows
        more = []
        for i, adapter in enumerate(sides):
            part = partial(_part, n, i)
            own = taps.features.map(part) if rows else taps.features
            more.append(adapter.beside(own.detached()).to(x.dtype))
        if rows:
            output = x + torch.cat(more)
        elif apart:
            output = torch.cat([*([x] if apart.plain else []), *(x + m for m in more)])
        else:
            output = x + sum(more[1:], more[0])
        return replace_argument(args, kwargs, name, output)

    with (
        torch.set_grad_enabled(grad and not frozen),
        tap(backbone, sites, request) as taps,
        before(backbone.get_submodule(sites.join), add),
    ):
        yield


def call(tuned: "Tuned", args: Any, kwargs: Any) -> Any:
    """The tuned backbone's own output."""
    with acting(tuned) as after:
        out = tuned.backbone(*args, **kwargs)
        after(out)
    return out


@contextmanager
def acting(tuned: "Tuned") -> Iterator[Callable[[Any], None]]:
    """While it lasts, one call of a backbone that denoises is one of the tuned backbone; what it yields is to be called
    with that call's output. Side paths add to the input of the backbone's last modules; what comes before these runs
    without autograd if nothing else is tuned."""
    backbone, sites = tuned.backbone, tuned.sites
    tuned.replay.leave()
    active = [tuned.adapter(name) for name in tuned.active()]
    inside = group_by_site((site, str(i), tuner) for i, adapter in enumerate(active) for site, tuner in adapter.inside)
    attachment = Attachment(backbone, sites, inside)
    replays = bool(inside) and torch.is_grad_enabled() and bool(checkpoints(backbone))

    def after(out: Any) -> None:
        if replays:
            tuned.replay.watch([output_of(out)], partial(attachment.on, recomputing=True))

    with (
        backbone_lock(backbone),
        frozen_op_memory(tuned),
        attachment.on(),
        joined(backbone, sites, active),
    ):
        yield after


def each_of(tuned: "Tuned", apart: PerAdapter, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """{name: output} of each active adapter alone, from one call of the backbone; under "" the untuned backbone's."""
    backbone, sites = tuned.backbone, tuned.sites
    adapters = {name: tuned.adapter(name) for name in tuned.active()}
    require_unmerged(backbone, "each adapter alone")
    wrong = [name for name, adapter in adapters.items() if not serves(sites, adapter)]
    if wrong:
        inside = not adapters[wrong[0]].reads_features
        why = f"{wrong[0]!r} acts inside it" if inside else f"{sites.anatomy.name} tells its last modules more"
        raise MethodError(f"one call of the backbone cannot serve each adapter alone: {why}")
    with backbone_lock(backbone), joined(backbone, sites, list(adapters.values()), apart):
        output = output_of(backbone(*args, **kwargs))
    names = [*([""] if apart.plain else []), *adapters]
    return dict(zip(names, output.chunk(len(names)), strict=True))


def _part(count: int, i: int, x: Tensor) -> Tensor:
    return x.chunk(count)[i]


def serves(sites: Sites, adapter: AdapterModule) -> bool:
    """Whether one call of the backbone can serve this adapter beside others."""
    return adapter.side is not None and adapter.reads_features and bool(sites.anatomy.stems)


def output_of(output: Any) -> Tensor:
    """The tensor of an output as diffusers gives it."""
    return output if isinstance(output, Tensor) else output[0]


class Plug:
    """Hooks on a backbone that make every call of it one of the tuned backbone, until `remove()`.

    What is tuned goes to where the sample is, as pipelines that move their parts about put that. before: the backbone's
    state to give back.
    """

    def __init__(self, backbone: nn.Module, tuned: Any, before: Mapping[str, Tensor] | None = None) -> None:
        self.tuned, self._backbone, self._before = tuned, backbone, before or {}
        self._running: list[tuple[ExitStack, Callable[[Any], None]]] = []
        self._handles = [  # bound methods, so that a copy of the backbone has hooks of its own
            backbone.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            backbone.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, own = argument(module, args, kwargs)[1], list(self.tuned.adapters.parameters())
        if any(p.device != sample.device for p in own):
            self.tuned.adapters.to(sample.device)
        stack = ExitStack()
        self._running.append((stack, stack.enter_context(self.tuned.acting())))

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        stack, after_call = self._running.pop()
        if out is not None:
            after_call(out)
        stack.close()

    def remove(self) -> None:
        """The backbone as it came."""
        for handle in self._handles:
            handle.remove()
        if self._before:
            self._backbone.load_state_dict(self._before)
            self._before = {}

    def __enter__(self) -> "Plug":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()
