"""Read or replace a module's input or output, while a `with` block lasts."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import RLock
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.anatomy import Point
from restuning.errors import SiteError

AnyTuner: TypeAlias = Any
"""A module of one of the forms of `restuning.tuners.base`, or an object that declares the same."""

NamedTuners: TypeAlias = Sequence[tuple[str, AnyTuner]]
"""(name of the adapter, tuner): what is added at one site."""

Hook: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Puts a hook on a module, for as long as a `with` block lasts."""

_LOCKS: "WeakKeyDictionary[nn.Module, RLock]" = WeakKeyDictionary()


def backbone_lock(backbone: nn.Module) -> RLock:
    """Held while hooks are on a backbone, which all of its callers would run into: of several threads, one at a
    time."""
    return _LOCKS.setdefault(backbone, RLock())


def as_tokens(x: Tensor) -> Tensor:
    """Tokens (b, n, d): maps (b, d, h, w) row by row, pooled features (b, d) as one token, tokens as they are."""
    if x.ndim == 2:
        return x[:, None]
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def in_layout_of(y: Tensor, added: Tensor) -> Tensor:
    """Tokens (b, n, d) in the layout of the output `y`."""
    return (added.transpose(1, 2) if added.ndim < y.ndim == 4 else added).reshape(y.shape)


def pooled_to_grid_of(y: Tensor, x: Tensor) -> Tensor:
    """The input map x, averaged over the cells of the output map y where that is a coarser one."""
    coarser = x.ndim == y.ndim == 4 and x.shape[2:] != y.shape[2:]
    return F.adaptive_avg_pool2d(x, (y.shape[2], y.shape[3])) if coarser else x


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point numbers in a dtype; as they are under autocast, which has rules of its own."""
    same = x.dtype == dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type)
    return x if same else x.to(dtype)


def in_dtype_of(module: AnyTuner, x: Tensor) -> Tensor:
    """What a module reads, in the dtype of its parameters: adapters in float32 read features in half precision, and
    frozen modules in half precision what comes of adapters."""
    for p in module.parameters():  # no `next(…, None)`: torch.compile of 2.8 cannot trace it
        if p.is_floating_point():
            return in_dtype(x, p.dtype)
    return x


def on_input(backbone: nn.Module, point: Point, read: Callable[[Tensor], None], first: bool = False) -> Hook:
    """A hook that calls `read` with the tensor at a point. first: before the hooks that are there already."""
    module = backbone.get_submodule(point.path)
    if point.side == "in":

        def see(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read(_channels_first(argument(m, args, kwargs)[1], point))

        return partial(_at_call, point.call, partial(before, module, first=first), see)

    def see_output(m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        read(_channels_first(first_tensor(out), point))

    return partial(_at_call, point.call, partial(after, module), see_output)


def on_output(backbone: nn.Module, point: Point, change: Callable[[Tensor], Tensor]) -> Hook:
    """A hook that puts `change(y)` in the place of the tensor y at a point."""
    module = backbone.get_submodule(point.path)
    if point.side == "in":

        def replace(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name, y = argument(m, args, kwargs)
            return replace_argument(args, kwargs, name, _changed(change, y, point))

        return partial(_at_call, point.call, partial(before, module), replace)

    def replace_output(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return replace_first_tensor(out, _changed(change, first_tensor(out), point))

    return partial(_at_call, point.call, partial(after, module), replace_output)


def in_place_of(module: nn.Module, copies: NamedTuners) -> Hook:
    """A hook that puts a copy's output in the place of a module's. Raises SiteError for several copies of one."""
    if len(copies) > 1:
        names = " and ".join(name for name, _ in copies)
        raise SiteError(f"adapters {names} both train a copy of one {type(module).__name__}: make one of them active")
    replacement = copies[0][1]

    @contextmanager
    def on() -> Iterator[None]:
        handle = module.register_forward_hook(
            lambda m, args, kwargs, out: replacement(*args, **kwargs), with_kwargs=True, prepend=True
        )
        try:
            yield
        finally:
            handle.remove()

    return on


def _at_call(
    call: int | None, on: Callable[[Callable[..., Any]], AbstractContextManager[None]], hook: Callable[..., Any]
) -> AbstractContextManager[None]:
    """`hook`, put on a module by `on`: at every call of the module, or at the call-th of a pass alone."""
    if call is None:
        return on(hook)
    calls = 0

    def counted(*given: Any) -> Any:  # no itertools.count: torch.compile of 2.8 cannot trace it
        nonlocal calls
        calls += 1
        return hook(*given) if calls == call + 1 else None

    return on(counted)


@contextmanager
def before(module: nn.Module, hook: Callable[..., Any], first: bool = False) -> Iterator[None]:
    """A forward pre-hook (module, args, kwargs), while it lasts."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook (module, args, output), while it lasts."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
    """The first argument of a call, and its name if it was passed by keyword.

    Raises:
        SiteError: the module was called without it.
    """
    if args:
        return None, args[0]
    name = next(iter(inspect.signature(module.forward).parameters))
    if name not in kwargs:
        raise SiteError(f"{type(module).__name__} was called without its first argument {name!r}")
    return name, kwargs[name]


def replace_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str | None, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with another first one, which `argument` named."""
    return ((value, *args[1:]), dict(kwargs)) if name is None else (args, {**kwargs, name: value})


def first_tensor(out: Any) -> Tensor:
    """The first tensor of an output that may be a tensor, a tuple or a mapping."""
    if isinstance(out, Tensor):
        return out
    return first_tensor(next(iter(out.values())) if isinstance(out, Mapping) else out[0])


def replace_first_tensor(out: Any, y: Tensor) -> Any:
    """The same output with its first tensor replaced; the original is left alone."""
    if isinstance(out, Tensor):
        return y
    if isinstance(out, Mapping):
        name = next(iter(out))
        return type(out)(**{**out, name: replace_first_tensor(out[name], y)})
    items = (replace_first_tensor(out[0], y), *out[1:])
    return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)


def _channels_first(x: Tensor, point: Point) -> Tensor:
    """A map (b, h, w, d) as (b, d, h, w); of its channels those of the point."""
    x = x.permute(0, 3, 1, 2) if point.last and x.ndim == 4 else x
    return x if point.channels is None else x[:, -point.channels :]


def _changed(change: Callable[[Tensor], Tensor], y: Tensor, point: Point) -> Tensor:
    changed = change(_channels_first(y, point))
    if point.channels is not None:
        return torch.cat([y[:, : -point.channels], changed], 1)
    return changed.permute(0, 2, 3, 1) if point.last and y.ndim == 4 else changed
