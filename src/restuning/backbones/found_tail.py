"""What follows the blocks of a backbone that was traced: found by trying, and kept if it gives the output."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from restuning.backbones.modules import is_norm, last_of_map, passes, width_of
from restuning.backbones.sites import CLASSIFIERS, layout_of
from restuning.backbones.trace import BATCH, WORDS, Ran, Seen, Trace, quiet, run, tensors
from restuning.errors import SiteError


@dataclass(frozen=True)
class FoundTail:
    """What follows the blocks; more: a call that has to count as the last block. checked: against the output. instead:
    which pooling stands in for the backbone's own, and why; empty: it is the backbone's own. rewritten: the layers
    to which what follows writes once more, as nn.ReLU(inplace=True) does."""

    norm: tuple[str, ...]
    post: tuple[str, ...]
    pooler: str | None
    pool: str
    prefix: int
    width: int
    checked: bool
    more: Ran | None = None
    instead: str = ""
    rewritten: tuple[int, ...] = ()


def tail_of_blocks(
    backbone: nn.Module, seen: Trace, blocks: Sequence[Ran], inputs: Mapping[str, Any], prefix: int
) -> FoundTail:
    """Norm, pooling and what follows, tried out on the backbone's output. Raises SiteError if nothing gives that."""
    after = [c for c in seen.root.within() if c.start > blocks[-1].end]
    if any(p.is_meta for p in backbone.parameters()):
        return _of_shapes(backbone, after, prefix, blocks[-1])
    kept: dict[str, list[Any]] = {}
    watched = {blocks[-1].path: blocks[-1].module, **{c.path: c.module for c in after}}

    versions: dict[str, list[tuple[Tensor, int]]] = {}

    def keep(path: str) -> Any:
        def see(m: nn.Module, args: Any, out: Any) -> None:
            if path in watched:
                kept.setdefault(path, []).append((args, copied(out)))
            if (given := next(tensors(out), None)) is not None:
                versions.setdefault(path, []).append((given, given._version))

        return see

    every = {**{ran.path: ran.module for ran in blocks}, **watched}
    handles = [module.register_forward_hook(keep(path)) for path, module in every.items()]
    try:
        with quiet(backbone):
            out = run(backbone, inputs)
    finally:
        for handle in handles:
            handle.remove()
    targets = list(_targets(backbone, out, kept, seen))
    words = _words(backbone, inputs, out) if "input_ids" in inputs else None
    with quiet(backbone):
        sources: list[tuple[Ran | None, Any]] = [(None, kept[blocks[-1].path][-1][1])]
        sources += [(c, kept[c.path][-1][1]) for c in after if kept.get(c.path)]
        sources.append((seen.root, out))
        for more, value in sources:
            h = next(tensors(value), None)
            if h is None or not h.is_floating_point() or len(h) != BATCH or h.ndim not in (2, 3, 4):
                continue
            source = more or blocks[-1]
            last = last_of_map(source.module, Seen(0, tuple(h.shape), True))
            rest = [c for c in after if c.start > source.end] if more is not seen.root else []
            found = _fitting(h.permute(0, 3, 1, 2) if last else h, rest, targets, prefix, words)
            if found is not None:
                ends = [*blocks, *([more] if more is not None and more is not seen.root else [])]
                return replace(found, more=more, rewritten=tuple(_rewritten(ends, versions)))
    raise SiteError(
        f"the pooling of {type(backbone).__name__} is not known: its blocks are found, its output is not made of them"
    )


def _rewritten(ends: Sequence[Ran], versions: Mapping[str, Sequence[tuple[Tensor, int]]]) -> Iterator[int]:
    """The layers x_1 … x_L that were written to after these calls had made them."""
    for layer, ran in enumerate(ends, 1):
        x, version = versions[ran.path][-1 if ran.nth is None else ran.nth]
        if x._version != version:
            yield layer


def _targets(backbone: nn.Module, out: Any, kept: Mapping[str, list[Any]], seen: Trace) -> Iterator[tuple[str, Tensor]]:
    """What the tail must give: what the classifier reads, the backbone's pooled output, or its last tokens."""
    classifier = next(
        (
            c
            for c in reversed(list(seen.root.within()))
            if isinstance(c.module, nn.Linear)
            and {*c.path.split(".")} & CLASSIFIERS
            and isinstance(out, Tensor)
            and c.output is not None
            and tuple(out.shape) == c.output.shape
            and out.ndim == 2
            and kept.get(c.path)
            and torch.equal(next(tensors(kept[c.path][-1][1])), out)
        ),
        None,
    )
    if classifier is not None:
        yield "pooled", kept[classifier.path][-1][0][0]
        return
    if isinstance(out, Mapping):
        pooled = out.get("pooler_output")
        if isinstance(pooled, Tensor):
            yield "pooled", pooled.flatten(1)
        tokens = out.get("last_hidden_state")
        if isinstance(tokens, Tensor):
            yield "tokens", tokens
            return
    first = next((t for t in tensors(out) if t.is_floating_point()), None)
    if first is not None:
        yield ("pooled" if first.ndim == 2 or first.shape[2:] == (1, 1) else "tokens"), first


def _fitting(
    h: Tensor, rest: Sequence[Ran], targets: Sequence[tuple[str, Tensor]], prefix: int, words: str | None
) -> FoundTail | None:
    modules = list(_in_tail(rest))[:14]
    x = as_tokens(h)
    text = words is not None
    image = not text
    for kind, target in targets:
        wanted = target if kind == "tokens" else target.flatten(1)
        splits = [(end, k) for end in range(len(modules) + 1) for k in range(end, -1, -1)]
        for end, k in splits:
            norm, post = modules[:k], modules[k:end]
            if any(isinstance(m.module, nn.Tanh) for m in modules[:end]):
                continue  # a pooler that was trained for another task
            try:
                y = through([m.module for m in norm], x)
            except Exception:
                continue
            if kind == "tokens":
                if k == end and _same(y, as_tokens(target)):
                    own = any(kind == "pooled" for kind, _ in targets)
                    return _pooled_anyhow(norm, y, prefix, words, target, own)
                continue
            for pool, skip in _pools(y, prefix, image):
                try:
                    z = through([m.module for m in post], pooled(y, pool, skip)).flatten(1)
                except Exception:
                    continue
                if _same(z, wanted):
                    ahead, behind = (tuple(m.path for m in some) for some in (norm, post))
                    return FoundTail(ahead, behind, None, pool, skip, z.shape[1], True)
            if k == end and k < len(modules):
                pooler = modules[k]
                try:
                    z = pooler.module(y)
                except Exception:
                    continue
                if isinstance(z, Tensor) and y.ndim == 3 and y.shape[1] > 1 and z.ndim == 2 and _same(z, wanted):
                    return FoundTail(tuple(m.path for m in norm), (), pooler.path, "map", prefix, z.shape[1], True)
    return None


def _words(backbone: nn.Module, inputs: Mapping[str, Any], out: Any) -> str:
    """How the tokens of a text are pooled by one who wants one feature of all: by the last where it alone sees all."""
    first = next((t for t in tensors(out) if t.is_floating_point()), None)
    if first is not None and first.ndim == 3 and first.shape[1] == WORDS:
        ids = inputs["input_ids"].clone()
        ids[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids[:, 1], ids[:, 0])
        with quiet(backbone):
            other = next(t for t in tensors(run(backbone, {**inputs, "input_ids": ids})) if t.is_floating_point())
        if torch.allclose(first[:, 0], other[:, 0], rtol=1e-4, atol=1e-5):
            return "last"
    config: Any = getattr(backbone, "config", None)
    output = getattr(config, "classifier_pooling", None)
    if output in ("cls", "mean"):
        return str(output)
    return "mean" if getattr(config, "is_encoder_decoder", False) or hasattr(config, "d_kv") else "cls"


def _pooled_anyhow(
    norm: Sequence[Ran], y: Tensor, prefix: int, words: str | None, target: Tensor, own: bool
) -> FoundTail:
    """Of a backbone that gives its last tokens: the first where there is one before the patches, else their mean. own:
    whether it gives a pooled feature too."""
    pool = words or ("mean" if target.ndim == 4 or prefix == 0 else "cls")
    why = "the backbone's own pooler is left out" if own else "the backbone gives tokens and no pooled feature"
    ahead = tuple(m.path for m in norm)
    return FoundTail(ahead, (), None, pool, 0 if words else prefix, y.shape[-1], True, instead=f"{why}: {NAMED[pool]}")


NAMED = {"cls": "its first token is used", "mean": "the mean of its tokens is used", "last": "its last token is used"}


def _pools(y: Tensor, prefix: int, image: bool) -> Iterator[tuple[str, int]]:
    if y.shape[1] == 1:
        yield "mean", 0
        return
    if prefix or not image:
        yield "cls", prefix
    for skip in dict.fromkeys((prefix, 0, 1)):
        yield "mean", skip
    yield "cls", prefix
    yield "last", 0


def _in_tail(rest: Sequence[Ran]) -> Iterator[Ran]:
    """The modules after the blocks that compute: what holds parameters of its own, and activations."""
    covered: set[int] = set()
    for c in rest:
        if id(c) in covered:
            continue
        own = any(True for _ in c.module.parameters(recurse=False))
        if own or not c.children:
            covered |= {id(inner) for inner in c.within()}
            changes = c.input is not None and c.output is not None and c.input.shape == c.output.shape
            if own or (changes and not passes(c.module)):
                yield c


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1e-6)
    )


def copied(out: Any) -> Any:
    """The same output with tensors of its own."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)


def as_tokens(x: Tensor) -> Tensor:
    """(b, d, h, w), or pooled (b, d) → (b, n, d); tokens as they are."""
    if x.ndim == 2:
        return x[:, None]
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def through(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Tokens (b, n, d) or pooled (b, d), which a module of maps has as (b, d, n, 1)."""
    for module in modules:
        if layout_of(module) == "first":
            output = as_tokens(module(as_tokens(x).transpose(1, 2).unsqueeze(-1)))
            x = output if x.ndim == 3 else output.flatten(1)
        else:
            x = module(x)
    return x


def pooled(x: Tensor, pool: str, prefix: int) -> Tensor:
    if pool == "cls":
        return x[:, 0]
    return x[:, -1] if pool == "last" else x[:, prefix:].mean(1)


def _of_shapes(backbone: nn.Module, after: Sequence[Ran], prefix: int, last: Ran) -> FoundTail:
    """Of a backbone without values, by shapes alone."""
    modules = [c for c in _in_tail(after) if c.input is not None]
    norm = tuple(c.path for c in modules if c.input is not None and c.input.streams and is_norm(c.module))
    pool = "cls" if prefix else "mean"
    width = width_of(last.output, last_of_map(last.module, last.output)) if last.output else 0
    return FoundTail(norm, (), None, pool, prefix, width, False)
