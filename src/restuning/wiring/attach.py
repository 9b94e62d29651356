"""The law, written once: OP(x) becomes OP(x) + tuner(x, OP(x)), by hooks that live in a `with` block."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from restuning._types import Features
from restuning.errors import SiteError
from restuning.wiring.sites import Point, Site, Sites


class Joint:
    """What is added at one site: the sum of its tuners. Holds what the operation read only until it has spoken."""

    def __init__(self, tuners: Sequence[nn.Module]) -> None:
        self.tuners = tuners
        self.x: Tensor | None = None

    def read(self, x: Tensor) -> None:
        self.x = x

    def write(self, y: Tensor) -> Tensor:
        x, self.x = self.x, None
        if x is None:
            raise SiteError("an operation spoke before it read: the anatomy's points are in the wrong order")
        added: Tensor = self.tuners[0](x, y)
        for tuner in self.tuners[1:]:
            added = added + tuner(x, y)
        return y + added


@contextmanager
def attach(backbone: nn.Module, tuners: Mapping[Site, Sequence[nn.Module]]) -> Iterator[None]:
    """While it lasts, every site says OP(x) plus what its tuners add to it."""
    with ExitStack() as stack:
        for site, here in tuners.items():
            joint = Joint(here)
            stack.enter_context(_removed(_on_read(backbone, site.reads, joint.read)))
            stack.enter_context(_removed(_on_write(backbone, site.writes, joint.write)))
        yield


class Taps:
    """The backbone's per-block outputs, x_0 … x_L, as its forward runs; layers that are not wanted are not kept."""

    def __init__(self, layers: Iterable[int], tokens: slice) -> None:
        self.wanted = sorted(set(layers))
        self.tokens = tokens
        self.kept: dict[int, Tensor] = {}

    def keep(self, layer: int, x: Tensor) -> None:
        # a copy, or the few tokens would hold the memory of all
        self.kept[layer] = x if self.tokens == slice(None) else x[:, self.tokens].clone()

    @property
    def features(self) -> Features:
        return tuple(self.kept[layer] for layer in self.wanted)


@contextmanager
def tap(backbone: nn.Module, sites: Sites, layers: Iterable[int], tokens: slice = slice(None)) -> Iterator[Taps]:
    """While it lasts, the outputs of `layers` (0: what the first block reads; l: what block l says) are kept."""
    taps = Taps(layers, tokens)
    with ExitStack() as stack:
        for layer in taps.wanted:
            point = Point(sites.blocks[max(layer - 1, 0)], "out" if layer else "in")

            def keep(x: Tensor, layer: int = layer) -> None:
                taps.keep(layer, x)

            stack.enter_context(_removed(_on_read(backbone, point, keep)))
        yield taps


@contextmanager
def _removed(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _on_read(backbone: nn.Module, point: Point, read: Any) -> RemovableHandle:
    module = backbone.get_submodule(point.path)
    if point.side == "in":
        return module.register_forward_pre_hook(
            lambda m, args, kwargs: read(_argument(m, args, kwargs)[1]), with_kwargs=True
        )
    return module.register_forward_hook(lambda m, args, out: read(_said(out)))


def _on_write(backbone: nn.Module, point: Point, write: Any) -> RemovableHandle:
    module = backbone.get_submodule(point.path)
    if point.side == "in":

        def change(
            m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            name, y = _argument(m, args, kwargs)
            return ((write(y), *args[1:]), kwargs) if name is None else (args, {**kwargs, name: write(y)})

        return module.register_forward_pre_hook(change, with_kwargs=True)
    return module.register_forward_hook(lambda m, args, out: _say(out, write(_said(out))))


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
    """The first argument of a call, and its name if it came by keyword."""
    if args:
        return None, args[0]
    name = next(iter(inspect.signature(module.forward).parameters))
    if name not in kwargs:
        raise SiteError(f"{type(module).__name__} was called without its first argument {name!r}")
    return name, kwargs[name]


def _said(out: Any) -> Tensor:
    """The first tensor of an output that may be a tensor, a tuple or a mapping."""
    if isinstance(out, Tensor):
        return out
    first = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return _said(first)


def _say(out: Any, y: Tensor) -> Any:
    """The same output with its first tensor replaced; the original is left alone."""
    if isinstance(out, Tensor):
        return y
    if isinstance(out, Mapping):
        name = next(iter(out))
        return type(out)(**{**out, name: _say(out[name], y)})
    items = (_say(out[0], y), *out[1:])
    return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
