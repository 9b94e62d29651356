"""Read or replace a module's input or output while a `with` block lasts."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.anatomy import Point
from restuning.errors import SiteError

Tuner = Any
"""A module, or what declares and does the same."""

Hook = Callable[[], AbstractContextManager[None]]
"""Puts a hook on a module, for as long as a `with` block lasts."""

Tuners = Sequence[tuple[str, Tuner]]
"""(adapter, tuner): what is added at one site."""


_BUSY: "WeakKeyDictionary[nn.Module, RLock]" = WeakKeyDictionary()


def backbone_lock(backbone: nn.Module) -> RLock:
    """Held while hooks are on a backbone, which they are for all of its callers: of several threads, one at a time."""
    return _BUSY.setdefault(backbone, RLock())


def as_tokens(x: Tensor) -> Tensor:
    """(b, d, h, w), as convolutions have it, or pooled (b, d) → (b, n, d); tokens as they are."""
    if x.ndim == 2:
        return x[:, None]
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def _as(added: Tensor, y: Tensor) -> Tensor:
    return (added.transpose(1, 2) if added.ndim < y.ndim == 4 else added).reshape(y.shape)


def _on_grid_of(y: Tensor, x: Tensor) -> Tensor:
    """A map that was read, averaged over the cells of the map that was said of it, where that is a coarser one."""
    other = x.ndim == y.ndim == 4 and x.shape[2:] != y.shape[2:]
    return F.adaptive_avg_pool2d(x, (y.shape[2], y.shape[3])) if other else x


def _seen(x: Tensor, point: Point) -> Tensor:
    """(b, h, w, d), if it is one that has its channels last, → (b, d, h, w); of its channels those of the point."""
    x = x.permute(0, 3, 1, 2) if point.last and x.ndim == 4 else x
    return x if point.channels is None else x[:, -point.channels :]


def _written(write: Callable[[Tensor], Tensor], y: Tensor, point: Point) -> Tensor:
    said = write(_seen(y, point))
    if point.channels is not None:
        return torch.cat([y[:, : -point.channels], said], 1)
    return said.permute(0, 2, 3, 1) if point.last and y.ndim == 4 else said


@contextmanager
def before(module: nn.Module, hook: Callable[..., Any], first: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _on_read(backbone: nn.Module, point: Point, read: Callable[[Tensor], None], first: bool = False) -> Hook:
    module = backbone.get_submodule(point.path)
    if point.side == "in":

        def see(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read(_seen(argument(m, args, kwargs)[1], point))

        return partial(_at_call, point.call, partial(before, module, first=first), see)
    return partial(_at_call, point.call, partial(_after, module), lambda m, args, out: read(_seen(_said(out), point)))


def _on_write(backbone: nn.Module, point: Point, write: Callable[[Tensor], Tensor]) -> Hook:
    module = backbone.get_submodule(point.path)
    if point.side == "in":

        def change(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name, y = argument(m, args, kwargs)
            y = _written(write, y, point)
            return ((y, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: y})

        return partial(_at_call, point.call, partial(before, module), change)

    def say(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return _say(out, _written(write, _said(out), point))

    return partial(_at_call, point.call, partial(_after, module), say)


def _at_call(
    call: int | None, on: Callable[[Callable[..., Any]], AbstractContextManager[None]], hook: Callable[..., Any]
) -> AbstractContextManager[None]:
    """`hook`, put on a module by `on`: at every call of the module, or at the call-th of a pass alone."""
    if call is None:
        return on(hook)
    calls = count()
    return on(lambda *given: hook(*given) if next(calls) == call else None)


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
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
