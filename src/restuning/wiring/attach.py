"""The law, written once: OP(x) becomes OP(x) + tuner(x, OP(x)), by hooks that live in a `with` block.

Beside it, what the law cannot say: tokens appended to the stream (`rewrites`), and prefixes merged into the attention.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Features
from restuning.errors import MethodError, SiteError
from restuning.wiring.anatomy import Point, several
from restuning.wiring.live import ALL, View
from restuning.wiring.sites import Site, Sites
from restuning.wiring.unbind import Call, Piece, merged, on_call, on_weight

INPUT = -1
"""The layer before all others: what the backbone itself is given."""

MASK = -2
"""Not a layer: the attention mask (b, n) that the backbone is given, which tells tokens from padding."""



def summary_of(layer: int) -> int:
    """Not a layer: where a bank of components has the summary of this one."""
    return -3 - layer


Tuner = Any
"""A module, or what declares and does the same."""

Hook = Callable[[], AbstractContextManager[None]]
"""Puts a hook on a module, for as long as a `with` block lasts."""

Tuners = Sequence[tuple[str, Tuner]]
"""(adapter, tuner): what is added at one site."""


_BUSY: "WeakKeyDictionary[nn.Module, RLock]" = WeakKeyDictionary()


def one_thread(backbone: nn.Module) -> RLock:
    """Held while hooks are on a backbone, which they are for all of its callers: of several threads, one at a time."""
    return _BUSY.setdefault(backbone, RLock())


def gathered(tuners: Iterable[tuple[Site, str, Tuner]]) -> dict[Site, list[tuple[str, Tuner]]]:
    """Site by site, in their order."""
    found: dict[Site, list[tuple[str, Tuner]]] = {}
    for site, name, tuner in tuners:
        found.setdefault(site, []).append((name, tuner))
    return found


class Grown:
    """Tokens appended to the stream over a `span` of blocks: `n` without them, `more` of them."""

    def __init__(self, span: range) -> None:
        self.span, self.n, self.more = span, 0, 0


class Joint:
    """What is added at one site: the sum of its tuners. Holds what the operation read only until it has spoken, and
    what its tuners were given to carry, so that it can say the same once more."""

    def __init__(self, site: Site, tuners: Tuners, carries: Mapping[str, dict[str, Any]], grown: list[Grown]) -> None:
        self.site, self.tuners, self.carries, self.grown = site, tuners, carries, grown
        self.x: dict[str, list[Tensor]] = {source: [] for source in {_source(t) for _, t in tuners} - {"out"}}
        self.given: dict[str, dict[str, Any]] = {}
        self.spoke = self.again = False

    def read(self, source: str, x: Tensor) -> None:
        self.x[source].append(x)

    def says(self, x: Tensor, y: Tensor) -> Tensor:
        """Read and written in one."""
        for source in self.x:
            self.read(source, x)
        return self.write(y)

    def write(self, y: Tensor) -> Tensor:
        self.spoke = True
        if not all(self.x.values()):
            raise SiteError("an operation spoke before it read: the anatomy's points are in the wrong order")
        x = {source: stack.pop() for source, stack in self.x.items()}
        said = x["out"] = y
        for name, tuner in self.tuners:
            on_grid = getattr(tuner, "on_grid", False)
            if on_grid and said.ndim == 4 and said.shape[2] != said.shape[3]:
                raise MethodError(f"{type(tuner).__name__} needs a square map, not {said.shape[2]} x {said.shape[3]}")
            more = sum(g.more for g in self.grown if self.site.block in g.span) if on_grid else 0
            read = x[_source(tuner)]
            if getattr(tuner, "on_maps", False):
                pair = [read, said]
            else:
                pair = [t[:, : t.shape[1] - more] for t in (as_tokens(_on_grid_of(said, read)), as_tokens(said))]
            added = tuner(*pair, self._carry(name)) if _carries(tuner) else tuner(*pair)
            if added is not None:
                y = y + _as(F.pad(added, (0, 0, 0, more)) if more else added, y)
        return y

    def _carry(self, name: str) -> dict[str, Any]:
        if self.again:
            return dict(self.given[name])
        self.given[name] = dict(self.carries[name])
        return self.carries[name]


class Attachment:
    """Every site says OP(x) plus what its tuners add to it, while `on()` lasts."""

    def __init__(self, backbone: nn.Module, sites: Sites, tuners: Mapping[Site, Tuners]) -> None:
        carries: dict[str, dict[str, Any]] = {name: {} for here in tuners.values() for name, _ in here}
        self.joints: list[Joint] = []
        self._hooks: list[Hook] = []
        self._again = [False]
        grown: list[Grown] = []

        def again(state: list[bool] = self._again) -> bool:  # without self: no cycle that would keep activations
            return state[0]

        for site, here in tuners.items():
            plain = [(name, t) for name, t in here if not _rewrites(t)]
            if plain and site.op == "attention":
                change = _merging([t for _, t in plain])
                self._hooks.append(partial(on_call, backbone.get_submodule(site.reads.path), change, again))
            elif plain:
                joint = Joint(site, plain, carries, grown)
                self.joints.append(joint)
                if site.weight is not None:
                    owner, weight = backbone.get_submodule(site.weight.owner), partial(_weight, site, backbone)
                    self._hooks.append(partial(on_weight, owner, weight, joint.says, again))
                    continue
                for source in sorted(joint.x):
                    point = site.stream if source == "stream" else site.reads
                    self._hooks.append(_on_read(backbone, point, _reader(joint, source)))
                self._hooks.append(_on_write(backbone, site.writes, joint.write))
        for site, here in tuners.items():  # around all others, so that these read and write the same tokens
            for tuner in (t for _, t in here if _rewrites(t)):
                first = site.block or 0
                span = range(first, first + 1 if _rewrites(tuner) == "block" else len(sites.blocks))
                if getattr(tuner, "unbound", False):
                    self._hooks += _beside(backbone, sites, span, tuner, again)
                else:
                    grown.append(Grown(span))
                    self._hooks += _rewritten(backbone, sites, grown[-1], tuner)

    @contextmanager
    def on(self, again: bool = False) -> Iterator[None]:
        """again: for blocks of a pass that is over, in whatever order, as often as wanted: they say what they said.

        Raises SiteError if the backbone's forward did not call an operation that carries tuners.
        """
        self._again[0] = again
        for joint in self.joints:
            joint.again = again
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.enter_context(hook())
            yield
        for joint in self.joints:
            for left in joint.x.values():
                left.clear()
        silent = [joint.site.name for joint in self.joints if not joint.spoke]
        if silent:
            raise SiteError(f"the backbone's forward calls no module at {', '.join(silent)}: no tuner can be there")


@contextmanager
def attach(backbone: nn.Module, sites: Sites, tuners: Mapping[Site, Tuners]) -> Iterator[Attachment]:
    """An attachment that is on while it lasts."""
    attachment = Attachment(backbone, sites, tuners)
    with attachment.on():
        yield attachment


def _reader(joint: Joint, source: str) -> Callable[[Tensor], None]:
    return lambda x: joint.read(source, x)


def _weight(site: Site, backbone: nn.Module) -> Tensor:
    """As it is at the moment: a backbone that is shared out has other tensors in a block while this runs."""
    weight: Tensor = site.affine(backbone).weight
    return weight


def _source(tuner: Tuner) -> str:
    return getattr(tuner, "source", "normed")


def _carries(tuner: Tuner) -> bool:
    return getattr(tuner, "carries", False)


def _rewrites(tuner: Tuner) -> str | None:
    return getattr(tuner, "rewrites", None)


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


def _merging(tuners: Sequence[Tuner]) -> Callable[[Call], Tensor]:
    """Tuners of the attention itself say which keys and values are merged into it."""
    return lambda call: merged(call, [tuner(call) for tuner in tuners])


ROTARY = ("rope", "position_embeddings")
"""The names by which blocks are given positions that are rotary."""


def _fixed(kwargs: Mapping[str, Any]) -> None:
    if any(kwargs.get(name) is not None for name in ROTARY):
        raise MethodError("this backbone's positions are rotary and fixed in number: tokens cannot be added to it")


def _rewritten(backbone: nn.Module, sites: Sites, grown: Grown, tuner: Tuner) -> Iterator[Hook]:
    """[x; tokens] from the input of the first block of a span to the output of its last one (Res-Tuning, Eq. 4)."""
    modules = [backbone.get_submodule(sites.blocks[i]) for i in grown.span]

    def grow(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _fixed(kwargs)
        name, x = argument(m, args, kwargs)
        if m is modules[0]:
            grown.n = x.shape[1]
            x = torch.cat([x, tuner(x)], 1)
            grown.more = x.shape[1] - grown.n
        n, wide = grown.n, x.shape[1]
        args = tuple(_widened(value, n, wide) for value in args)
        kwargs = {key: _widened(value, n, wide) for key, value in kwargs.items()}
        return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})

    def strip(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return _say(out, _said(out)[:, : grown.n])

    for module in modules:
        yield partial(before, module, grow, first=True)
    yield partial(_after, modules[-1], strip)


def _beside(backbone: nn.Module, sites: Sites, span: range, tuner: Tuner, again: Callable[[], bool]) -> Iterator[Hook]:
    """The same, unbound (Res-Tuning, Eq. 5): stream and prompts pass every block of `span` apart, and meet in its
    attention alone, by λ and by β (Eq. 9 to 13)."""
    prompts: dict[int, Tensor] = {}  # those that come to a block from the one before it

    def in_block(i: int, block: nn.Module) -> tuple[Callable[..., None], Callable[[Call], Tensor]]:
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outer: list[Call] = []
        own: list[Piece] = []  # the prompts' keys and values

        def read(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _fixed(kwargs)
            given[:] = [(args, kwargs)]

        def change(call: Call) -> Tensor:
            if outer:  # the prompts' own pass: their queries see the stream and themselves (D of Eq. 5)
                own.append((call.k, call.v))
                stream = outer[-1]
                mask = None if stream.mask is None else stream.mask[..., :1, :]
                return merged(Call(call.q, stream.k, stream.v, mask, False, stream.scale), own[-1:])
            args, kwargs = given[0]  # kept: a block may be run again from within
            name, x = argument(block, args, kwargs)
            here = prompts[i] if i in prompts else tuner(x)
            args = tuple(None if _is_mask(value) else value for value in args)
            kwargs = {key: None if _is_mask(value) else value for key, value in kwargs.items()}
            args, kwargs = ((here, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: here})
            outer.append(call)
            training, block.training = block.training, False  # no checkpoint within a checkpoint
            try:
                said = _said(block.forward(*args, **kwargs))  # not its hooks: they are the stream's
            finally:
                block.training = training
                outer.pop()
            if i + 1 in span:
                prompts[i + 1] = said
            return merged(call, [own.pop()])

        return read, change

    for i in span:
        block = backbone.get_submodule(sites.blocks[i])
        read, change = in_block(i, block)
        yield partial(before, block, read)
        (name,) = several(sites.anatomy.attention)
        attention = f"{sites.blocks[i]}.{name}"
        yield partial(on_call, backbone.get_submodule(attention), change, again)


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
    """The backbone's per-block outputs, x_0 … x_L, as its forward runs; layers that are not wanted are not kept.

    What is kept of frozen layers of one shape goes to one piece of memory, made with the first: small pieces that
    outlive the large ones between them would keep an allocator from giving those back.
    """

    def __init__(self, layers: Iterable[int], view: View, one_shape: bool, maps: bool = False) -> None:
        """maps: layers are kept whole, as they come."""
        self.wanted = sorted(set(layers))
        self.view, self.one_shape, self.maps = view, one_shape, maps
        self.kept: dict[int, Tensor] = {}
        self.given: Tensor | None = None  # the attention mask
        self.memory: Tensor | None = None
        self.oblong = False  # whether a map was not square

    def keep(self, layer: int, x: Tensor) -> None:
        if self.maps:
            self.kept[layer] = x
            return
        self.oblong = self.oblong or (x.ndim == 4 and x.shape[2] != x.shape[3])
        if x.ndim == 4 and isinstance(self.view.tokens, int):  # its cells are as oblong as it is
            x = F.adaptive_avg_pool2d(x, self.view.tokens)
        x = as_tokens(x)
        seen = self.view(x, self.given)
        if x.requires_grad or seen is x or not self.one_shape:  # a slice would hold the memory of all
            self.kept[layer] = seen.clone() if self.view.tokens in ("first", "last") else seen
            return
        if self.memory is None or self.memory.shape[1:] != seen.shape or self.memory.dtype != seen.dtype:
            self.memory = seen.new_empty(len(self.wanted), *seen.shape)
        self.kept[layer] = self.memory[self.wanted.index(layer)].copy_(seen)

    @property
    def features(self) -> Features:
        if MASK in self.wanted and MASK not in self.kept:  # no padding
            last = self.kept[self.wanted[-1]]
            self.kept[MASK] = last.new_ones(last.shape[:2])
        return tuple(self.kept[layer] for layer in self.wanted)

    def mask(self, m: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(m.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if given is not None and given.ndim != 2:
            raise MethodError(f"an attention mask {tuple(given.shape)}: expected (b, n), to tell tokens from padding")
        self.given = given
        if given is not None and MASK in self.wanted:
            self.kept[MASK] = given


@contextmanager
def tap(backbone: nn.Module, sites: Sites, layers: Iterable[int], view: View = ALL) -> Iterator[Taps]:
    """While it lasts, `layers` are kept (MASK; INPUT; 0: what the first block reads; l: what block l says)."""
    taps = Taps(layers, view, sites.uniform, maps=sites.join is not None)
    with ExitStack() as stack:
        if view.by_mask or MASK in taps.wanted:
            stack.enter_context(before(backbone, taps.mask))
        for layer in taps.wanted:
            if layer == INPUT:

                def whole(m: nn.Module, args: Any, kwargs: Any) -> None:
                    taps.kept[INPUT] = argument(m, args, kwargs)[1]

                stack.enter_context(before(backbone, whole))
                continue
            if layer == MASK:
                continue
            stack.enter_context(_on_read(backbone, sites.layer(layer), partial(taps.keep, layer), first=True)())
        yield taps


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
        return partial(
            before, module, lambda m, args, kwargs: read(_seen(argument(m, args, kwargs)[1], point)), first=first
        )
    return partial(_after, module, lambda m, args, out: read(_seen(_said(out), point)))


def _on_write(backbone: nn.Module, point: Point, write: Callable[[Tensor], Tensor]) -> Hook:
    module = backbone.get_submodule(point.path)
    if point.side == "in":

        def change(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name, y = argument(m, args, kwargs)
            y = _written(write, y, point)
            return ((y, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: y})

        return partial(before, module, change)
    return partial(_after, module, lambda m, args, out: _say(out, _written(write, _said(out), point)))


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
