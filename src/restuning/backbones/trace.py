"""One forward of a frozen backbone, recorded: which modules ran, on which tensors, and what was added to what."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from restuning.errors import SiteError, line

BATCH = 3
"""Rows of the input of a trace: a number that few other dimensions have."""

WORDS = 12
"""Tokens of a text in a trace."""


@dataclass(frozen=True)
class Seen:
    """A tensor that was seen: `tag` is its own, whichever name it goes by."""

    tag: int
    shape: tuple[int, ...]
    floating: bool

    @property
    def streams(self) -> bool:
        """Whether it can be a residual stream: a row of the batch each, tokens or a map."""
        return self.floating and len(self.shape) in (3, 4) and self.shape[0] == BATCH


@dataclass
class Ran:
    """One call of one module: when it began and ended, by the clock of the trace, and what went in and came out.

    direct: whether the first argument (or the first tensor of the output) is a tensor itself, not a list of some. nth:
    which of its module's calls in the pass, from 0, where there are several.
    """

    path: str
    module: nn.Module
    parent: "Ran | None"
    start: int
    ins: list[Seen]
    end: int = -1
    outs: list[Seen] = field(default_factory=list)
    children: list["Ran"] = field(default_factory=list)
    direct: bool = True
    nth: int | None = None

    @property
    def input(self) -> Seen | None:
        return self.ins[0] if self.ins and self.direct else None

    @property
    def output(self) -> Seen | None:
        return self.outs[0] if self.outs else None

    def within(self) -> Iterator["Ran"]:
        """All calls during it, itself not among them, in the order in which they began."""
        for child in self.children:
            yield child
            yield from child.within()


@dataclass(frozen=True)
class Attended:
    """A softmax(QKᵀ)V that was called inside `ran`, and gave the tensor `tag`: heads of the queries, heads and width of
    the keys, and how many queries there are of how many rows; known: whether a prefix can be merged into it."""

    at: int
    ran: Ran
    tag: int
    heads: int
    keys: tuple[int, int]
    queries: tuple[int, int]
    known: bool


@dataclass(frozen=True)
class Mapped:
    """An affine map that no module of its own was called for: `weight` is the path of the parameter."""

    at: int
    ran: Ran
    weight: str
    bias: str | None
    input: Seen
    output: Seen


@dataclass
class Trace:
    """What one forward did. sums: (when, tensor, tensor, their sum); alike: tensors that are views of others."""

    root: Ran
    out: Any
    sums: list[tuple[int, Seen, Seen, Seen]]
    alike: dict[int, int]
    attended: list[Attended]
    mapped: list[Mapped]
    parents: dict[int, set[int]]

    def source(self, tag: int) -> int:
        """The tensor that a view is a view of."""
        while tag in self.alike:
            tag = self.alike[tag]
        return tag

    def origins(self, outs: Sequence[Sequence[int]]) -> Mapping[int, int]:
        """Tensor → a bit for each of `outs`, tensors that some calls gave: whether it was computed from one of them,
        by no way that leads through another."""
        bits: dict[int, int] = defaultdict(int)
        for i, tags in enumerate(outs):
            for tag in tags:
                bits[tag] |= 1 << i
        given = {*bits}
        for tag in sorted(self.parents):  # in the order in which they were made
            for parent in () if tag in given else self.parents[tag]:
                bits[tag] |= bits[parent]
        return bits

    def follows(self, tag: int, origin: Sequence[int]) -> bool:
        """Whether a tensor was computed from another."""
        wanted, todo, done = set(origin), [tag], set()
        while todo:
            tag = todo.pop()
            if tag in wanted:
                return True
            if tag not in done:
                done.add(tag)
                todo += self.parents.get(tag, ())
        return False


VIEWS = {
    *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze", "roll"),
    *("dropout", "swapaxes", "movedim", "to", "float", "type_as", "clone", "expand", "alias", "view_as", "reshape_as"),
}
SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


class _Recorder(TorchFunctionMode):
    """What is known of each tensor, in a table of weak references."""

    def __init__(self, names: Mapping[int, str], frozen: set[int]) -> None:
        """names: of parameters, by their id. frozen: ids of parameters and buffers, which no tensor follows from."""
        super().__init__()
        self.known: Any = WeakTensorKeyDictionary()
        self.frozen = frozen
        self.names, self.clock, self.tags = names, 0, 0
        self.sums: list[tuple[int, Seen, Seen, Seen]] = []
        self.alike: dict[int, int] = {}
        self.parents: dict[int, set[int]] = {}
        self.attended: list[Attended] = []
        self.mapped: list[Mapped] = []
        self.stack: list[Ran] = []
        self.keys: dict[int, tuple[int, int, int, int]] = {}

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def seen(self, t: Tensor, new: bool = False) -> Seen:
        tag = None if new else self.known.get(t)
        if tag is None:
            self.tags += 1
            tag = self.tags
            if id(t) not in self.frozen:
                self.known[t] = tag
        return Seen(tag, tuple(t.shape), t.is_floating_point())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "size", "dim", "numel", "stride", "is_floating_point"):
            return func(*args, **kwargs)
        given = [self.seen(t) for t in tensors((args, kwargs)) if id(t) not in self.frozen]
        before = {t.tag for t in given}
        out = func(*args, **kwargs)
        made = list(tensors(out))
        if not made:
            return out
        at = self.tick()
        for t in made:
            fresh = self.known.get(t) in (None, *before)
            if fresh:
                self.parents.setdefault(self.seen(t, new=True).tag, set()).update(before)
        first = made[0]
        if name in VIEWS and given and first.numel() == math.prod(given[0].shape):
            self.alike[self.seen(first).tag] = given[0].tag
        if name in SUMS and len(given) == 2:
            self.sums.append((at, given[0], given[1], self.seen(first)))
        if self.stack:
            self._inside(func, name, at, args, kwargs, given, first)
        return out

    def _inside(self, func: Any, name: str, at: int, args: Any, kwargs: Any, given: list[Seen], out: Tensor) -> None:
        here = self.stack[-1]
        if func is F.scaled_dot_product_attention:
            q, k, v = (args[i] if len(args) > i else kwargs[key] for i, key in enumerate(("query", "key", "value")))
            known = q.ndim == k.ndim == v.ndim == 4 and k.shape[-1] == v.shape[-1]
            keys = (k.shape[1], k.shape[-1] * k.shape[1]) if known else (1, 1)
            heads = q.shape[1] if known else 1
            self.attended.append(Attended(at, here, self.seen(out).tag, heads, keys, (len(q), q.shape[-2]), known))
        elif func is F.multi_head_attention_forward:
            self._multi_head(at, here, args, kwargs, out)
        elif name == "matmul" and out.ndim == 4:
            b, heads, n, e = args[0].shape
            self.keys[self.seen(out).tag] = (heads, heads * e, b, n)
        elif name == "softmax" and _scores_tokens(out, args, kwargs):
            owner = here if here.children or here.parent is None or any(True for _ in here.module.children()) else None
            here = owner or here.parent or here
            heads, width, rows, n = self._scores(given[0].tag)
            tag = self.seen(out).tag
            self.attended.append(Attended(at, here, tag, max(heads, 1), (heads, width), (rows, n), heads > 0))
        elif func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            path = self.names.get(id(weight))
            if path is not None and path != f"{here.path}.weight":
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                self.mapped.append(Mapped(at, here, path, self.names.get(id(bias)), given[0], self.seen(out)))

    def _multi_head(self, at: int, here: Ran, args: Any, kwargs: Any, out: Tensor) -> None:
        given = dict(zip(inspect.signature(F.multi_head_attention_forward).parameters, args, strict=False)) | kwargs
        query, heads = given["query"], given["num_heads"]
        plain = given.get("in_proj_weight") is not None and given.get("bias_k") is None and query.ndim == 3
        plain = plain and not given.get("add_zero_attn") and not given.get("need_weights", True)
        width = int(query.shape[-1])
        known = plain and bool(getattr(here.module, "batch_first", False))
        n, rows = query.shape[:2] if query.ndim == 3 else (0, 0)
        self.attended.append(Attended(at, here, self.seen(out).tag, heads, (heads, width), (rows, n), known))
        if plain:
            rows = Seen(-1, (query.shape[1], query.shape[0], width), True)
            for part, bias in (("in_proj_weight", "in_proj_bias"), ("out_proj_weight", "out_proj_bias")):
                path, to = self.names.get(id(given[part])), self.names.get(id(given[bias]))
                if path is not None:
                    output = Seen(self.seen(out).tag, (*rows.shape[:2], len(given[part])), True)
                    self.mapped.append(Mapped(at - (part[0] == "i"), here, path, to, rows, output))

    def _scores(self, tag: int) -> tuple[int, int, int, int]:
        """Heads, width, rows and queries of the matrix product that the scores come from; zeros if none is nearby."""
        todo = [(tag, 0)]
        while todo:
            tag, steps = todo.pop(0)
            if tag in self.keys:
                return self.keys[tag]
            if steps < 8:
                todo += [(parent, steps + 1) for parent in self.parents.get(tag, ())]
        return 0, 0, 0, 0


def _scores_tokens(weights: Tensor, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a softmax is over tokens for each token, and not over experts, or over branches."""
    if weights.ndim not in (3, 4, 5) or weights.shape[-1] < 2 or weights.shape[-2] < 2:
        return False
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim not in (-1, weights.ndim - 1):
        return False
    return weights.ndim > 3 or weights.shape[0] > BATCH or weights.shape[-1] == weights.shape[-2]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def trace(backbone: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """Run `backbone` once on `inputs`, without gradients, and record it. Raises SiteError if it fails."""
    names = {id(p): name for name, p in backbone.named_parameters(remove_duplicate=False)}
    frozen = {id(t) for t in (*backbone.parameters(), *backbone.buffers())}
    recorder = _Recorder(names, frozen)
    roots: list[Ran] = []

    def before(path: str) -> Callable[..., None]:
        def hook(m: nn.Module, args: Any, kwargs: Any) -> None:
            parent = recorder.stack[-1] if recorder.stack else None
            ins = [recorder.seen(t) for t in tensors((args, kwargs))]
            first = args[0] if args else kwargs.get(next(iter(inspect.signature(m.forward).parameters), ""))
            ran = Ran(path, m, parent, recorder.tick(), ins, direct=isinstance(first, Tensor))
            if ran.direct and not args:
                own = recorder.seen(first)
                ran.ins = [own, *(t for t in ins if t.tag != own.tag)]
            (parent.children if parent else roots).append(ran)
            recorder.stack.append(ran)

        return hook

    def after(m: nn.Module, args: Any, out: Any) -> None:
        ran = recorder.stack.pop()
        ran.outs, ran.end = [recorder.seen(t) for t in tensors(out)], recorder.tick()

    with ExitStack() as stack, quiet(backbone), recorder:
        for path, module in backbone.named_modules():
            stack.callback(module.register_forward_pre_hook(before(path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        out = run(backbone, inputs)
    calls: dict[str, list[Ran]] = {}
    for ran in roots[0].within():
        calls.setdefault(ran.path, []).append(ran)
    for several in calls.values():
        for nth, ran in enumerate(several if len(several) > 1 else ()):
            ran.nth = nth
    return Trace(roots[0], out, recorder.sums, recorder.alike, recorder.attended, recorder.mapped, recorder.parents)


@contextmanager
def quiet(backbone: nn.Module) -> Iterator[None]:
    """While it lasts there are no gradients, every module is in eval mode, and attention takes no fused fast path."""
    modes = {module: module.training for module in backbone.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    backbone.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


def run(backbone: nn.Module, inputs: Mapping[str, Any]) -> Any:
    try:
        return backbone(**inputs)
    except Exception as error:
        shown = ", ".join(f"{k} {tuple(v.shape) if isinstance(v, Tensor) else v!r}" for k, v in inputs.items())
        raise SiteError(f"{type(backbone).__name__} cannot be traced on {shown}: {line(error)}") from error
