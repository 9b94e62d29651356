"""The law, written once: OP(x) becomes OP(x) + tuner(x, OP(x)), by hooks that live in a `with` block.

Beside it, what the law cannot say: tokens appended to the stream (`rewrites`), and prefixes merged into the attention.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from restuning._types import Features
from restuning.errors import MethodError, SiteError
from restuning.wiring.live import ALL, View
from restuning.wiring.sites import Point, Site, Sites
from restuning.wiring.unbind import Call, Piece, merged, on_call

INPUT = -1
"""The layer before all others: what the backbone itself is given."""

Tuner = Callable[..., Any]
"""A module, or what declares and does the same."""

Tuners = Sequence[tuple[str, Tuner]]
"""(adapter, tuner): what is added at one site."""


class Joint:
    """What is added at one site: the sum of its tuners. Holds what the operation read only until it has spoken."""

    def __init__(self, tuners: Tuners, carries: Mapping[str, dict[str, Any]], appended: Sequence[int]) -> None:
        self.tuners, self.carries, self.appended, self.spoke = tuners, carries, appended, False
        self.x: dict[str, list[Tensor]] = {}

    def read(self, source: str, x: Tensor) -> None:
        self.x.setdefault(source, []).append(x)

    def write(self, y: Tensor) -> Tensor:
        self.spoke = True
        if not all(self.x.values()):
            raise SiteError("an operation spoke before it read: the anatomy's points are in the wrong order")
        x = {source: _tokens(stack.pop()) for source, stack in self.x.items()}
        said = x["out"] = _tokens(y)
        for name, tuner in self.tuners:
            more = sum(self.appended) if getattr(tuner, "on_grid", False) else 0
            pair = [t[:, : t.shape[1] - more] for t in (x[_source(tuner)], said)]
            added = tuner(*pair, self.carries[name]) if _carries(tuner) else tuner(*pair)
            if added is not None:
                y = y + _as(F.pad(added, (0, 0, 0, more)) if more else added, y)
        return y


@contextmanager
def attach(backbone: nn.Module, sites: Sites, tuners: Mapping[Site, Tuners]) -> Iterator[None]:
    """While it lasts, every site says OP(x) plus what its tuners add to it.

    Raises SiteError if the backbone's forward did not call an operation that carries tuners.
    """
    carries: dict[str, dict[str, Any]] = {name: {} for here in tuners.values() for name, _ in here}
    joints: list[tuple[Site, Joint]] = []
    appended: list[int] = []  # how many tokens every rewrite has on the stream, after those of a grid
    with ExitStack() as stack:
        for site, here in tuners.items():
            plain = [(name, t) for name, t in here if not _rewrites(t)]
            if plain and site.op == "attention":
                stack.enter_context(_merging(backbone.get_submodule(site.reads.path), [t for _, t in plain]))
            elif plain:
                joint = Joint(plain, carries, appended)
                joints.append((site, joint))
                for source in sorted({_source(t) for _, t in plain} - {"out"}):
                    point, joint.x[source] = site.stream if source == "stream" else site.reads, []
                    stack.enter_context(_removed(_on_read(backbone, point, _reader(joint, source))))
                stack.enter_context(_removed(_on_write(backbone, site.writes, joint.write)))
        for site, here in tuners.items():  # around all others, so that these read and write the same tokens
            for tuner in (t for _, t in here if _rewrites(t)):
                first = site.block or 0
                span = range(first, first + 1 if _rewrites(tuner) == "block" else len(sites.blocks))
                rewrite = _beside if getattr(tuner, "unbound", False) else _rewritten
                stack.enter_context(rewrite(backbone, sites, span, tuner, appended))
        yield
        silent = [site.name for site, joint in joints if not joint.spoke]
        if silent:
            raise SiteError(f"the backbone's forward calls no module at {', '.join(silent)}: no tuner can be there")


def _reader(joint: Joint, source: str) -> Callable[[Tensor], None]:
    return lambda x: joint.read(source, x)


def _source(tuner: Tuner) -> str:
    return getattr(tuner, "source", "normed")


def _carries(tuner: Tuner) -> bool:
    return getattr(tuner, "carries", False)


def _rewrites(tuner: Tuner) -> str | None:
    return getattr(tuner, "rewrites", None)


def _tokens(x: Tensor) -> Tensor:
    """(b, d, h, w), as convolutions have it, or pooled (b, d) → (b, n, d); tokens as they are."""
    if x.ndim == 2:
        return x[:, None]
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def _as(tokens: Tensor, y: Tensor) -> Tensor:
    return (tokens.transpose(1, 2) if y.ndim == 4 else tokens).reshape(y.shape)


@contextmanager
def _merging(attention: nn.Module, tuners: Sequence[Tuner]) -> Iterator[None]:
    """Tuners of the attention itself say which keys and values are merged into it."""

    def change(call: Call) -> Tensor:
        return merged(call, [tuner(call) for tuner in tuners])

    with on_call(attention, change):
        yield


@contextmanager
def _rewritten(backbone: nn.Module, sites: Sites, span: range, tuner: Tuner, appended: list[int]) -> Iterator[None]:
    """[x; tokens] from the input of the first block of `span` to the output of its last one (Res-Tuning, Eq. 4)."""
    count: list[int] = []  # tokens of the stream, without those added

    def grow(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("rope") is not None:
            raise MethodError("this backbone's positions are rotary and fixed in number: tokens cannot be added to it")
        name, x = _argument(m, args, kwargs)
        if not count:
            count.append(x.shape[1])
            x = torch.cat([x, tuner(x)], 1)
            appended.append(x.shape[1] - count[0])
        n, wide = count[0], x.shape[1]
        args = tuple(_widened(value, n, wide) for value in args)
        kwargs = {key: _widened(value, n, wide) for key, value in kwargs.items()}
        return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})

    def strip(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        appended.pop()
        return _say(out, _said(out)[:, : count.pop()])

    with ExitStack() as stack:
        modules = [backbone.get_submodule(sites.blocks[i]) for i in span]
        for module in modules:
            stack.enter_context(_removed(module.register_forward_pre_hook(grow, with_kwargs=True, prepend=True)))
        stack.enter_context(_removed(modules[-1].register_forward_hook(strip)))
        yield


@contextmanager
def _beside(backbone: nn.Module, sites: Sites, span: range, tuner: Tuner, appended: list[int]) -> Iterator[None]:
    """The same, unbound (Res-Tuning, Eq. 5): stream and prompts pass every block of `span` apart, and meet in its
    attention alone, by λ and by β (Eq. 9 to 13)."""
    prompts: list[Tensor] = []

    def in_block(block: nn.Module) -> tuple[Callable[..., None], Callable[[Call], Tensor]]:
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outer: list[Call] = []
        own: list[Piece] = []  # the prompts' keys and values

        def read(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append((args, kwargs))

        def change(call: Call) -> Tensor:
            if outer:  # the prompts' own pass: their queries see the stream and themselves (D of Eq. 5)
                own.append((call.k, call.v))
                stream = outer[-1]
                mask = None if stream.mask is None else stream.mask[..., :1, :]
                return merged(Call(call.q, stream.k, stream.v, mask, False, stream.scale), own[-1:])
            args, kwargs = given.pop()
            name, x = _argument(block, args, kwargs)
            here = prompts.pop() if prompts else tuner(x)
            args = tuple(None if _is_mask(value) else value for value in args)
            kwargs = {key: None if _is_mask(value) else value for key, value in kwargs.items()}
            args, kwargs = ((here, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: here})
            outer.append(call)
            try:
                prompts.append(_said(block.forward(*args, **kwargs)))  # not its hooks: they are the stream's
            finally:
                outer.pop()
            if _rewrites(tuner) == "block":
                prompts.clear()
            return merged(call, [own.pop()])

        return read, change

    with ExitStack() as stack:
        for i in span:
            block = backbone.get_submodule(sites.blocks[i])
            read, change = in_block(block)
            stack.enter_context(_removed(block.register_forward_pre_hook(read, with_kwargs=True)))
            attention = f"{sites.blocks[i]}.{sites.anatomy.attention}"
            stack.enter_context(on_call(backbone.get_submodule(attention), change))
        yield


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _widened(mask: Any, n: int, wide: int) -> Any:
    """An attention mask (b, 1, 1 or n, n) for `wide` tokens, of which those after the n-th are seen and see."""
    if not (_is_mask(mask) and mask.shape[-1] == n):
        return mask
    more = wide - n
    mask = F.pad(mask, (0, more), value=True if mask.dtype == torch.bool else 0)
    return torch.cat([mask, mask[:, :, :1].expand(-1, -1, more, -1)], 2) if mask.shape[2] == n else mask


class Taps:
    """The backbone's per-block outputs, x_0 … x_L, as its forward runs; layers that are not wanted are not kept."""

    def __init__(self, layers: Iterable[int], view: View) -> None:
        self.wanted = sorted(set(layers))
        self.view = view
        self.kept: dict[int, Tensor] = {}

    def keep(self, layer: int, x: Tensor) -> None:
        self.kept[layer] = self.view(x)

    @property
    def features(self) -> Features:
        return tuple(self.kept[layer] for layer in self.wanted)


@contextmanager
def tap(backbone: nn.Module, sites: Sites, layers: Iterable[int], view: View = ALL) -> Iterator[Taps]:
    """While it lasts, `layers` are kept (INPUT; 0: what the first block reads; l: what block l says)."""
    taps = Taps(layers, view)
    with ExitStack() as stack:
        for layer in taps.wanted:
            if layer == INPUT:
                handle = backbone.register_forward_pre_hook(
                    lambda m, args, kwargs: taps.kept.update({INPUT: _argument(m, args, kwargs)[1]}), with_kwargs=True
                )
                stack.enter_context(_removed(handle))
                continue
            point = Point(sites.blocks[max(layer - 1, 0)], "out" if layer else "in")

            def keep(x: Tensor, layer: int = layer) -> None:
                taps.keep(layer, x)

            stack.enter_context(_removed(_on_read(backbone, point, keep, first=True)))
        yield taps


@contextmanager
def _removed(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _on_read(backbone: nn.Module, point: Point, read: Any, first: bool = False) -> RemovableHandle:
    module = backbone.get_submodule(point.path)
    if point.side == "in":
        return module.register_forward_pre_hook(
            lambda m, args, kwargs: read(_argument(m, args, kwargs)[1]), with_kwargs=True, prepend=first
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
