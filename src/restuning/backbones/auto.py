"""The anatomy of a backbone that no row of the table fits, found by one traced forward.

Every family that repeats blocks along a residual stream can be read off what it does: the lists of modules that run one
after another, the sums that end an operation, the softmax inside an attention, the affine maps before and after it.
What follows the blocks is tried out, and kept if it gives the backbone's own output.
"""

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from restuning._types import SiteInfo
from restuning.errors import SiteError, TowersError
from restuning.backbones.anatomy import PARTS, Anatomy, Point, Weight
from restuning.backbones.sites import Found, Site, Sites, is_linear, kernel_of, layout_of, sides, words_of
from restuning.backbones.trace import BATCH, WORDS, Attended, Mapped, Ran, Seen, Trace, quiet, run, tensors, trace

LEAST = 0.6
"""The share of the parameters that the blocks must hold."""


def find(backbone: nn.Module, inputs: Mapping[str, Any] | None = None, root: str = "") -> Sites:
    """The sites of a backbone that no row of the table fits.

    Args:
        backbone: any module whose forward runs blocks one after another.
        inputs: keyword arguments of one forward, of `BATCH` rows; None: as the backbone's own configuration says.
        root: the path of the tower that is meant, where there are several.

    Raises:
        SiteError: in one line, what was seen, where it cannot be read, where its blocks hold less than 60 % of its
            parameters, or where nothing that is known gives its output.
    """
    known = _KNOWN.get(backbone, {})
    if inputs is None and root in known:
        return known[root]
    given = [inputs] if inputs is not None else list(inputs_of(backbone))
    for i, one in enumerate(given):
        try:
            found = _Finder(backbone, one, root).sites()
            break
        except TowersError:
            raise
        except SiteError:
            if i + 1 == len(given):
                raise
    if inputs is None:
        _KNOWN.setdefault(backbone, {})[root] = found
    return found


_KNOWN: "WeakKeyDictionary[nn.Module, dict[str, Sites]]" = WeakKeyDictionary()


def inputs_of(backbone: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs of one small forward, as the backbone's own configuration has them; several, where it does not say.

    Raises SiteError where nothing says of what kind they are.
    """
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    timm, config = getattr(backbone, "pretrained_cfg", None), getattr(backbone, "config", None)

    def pixels(channels: int, sizes: Sequence[tuple[int, int]], name: str) -> Iterator[dict[str, Any]]:
        draw = torch.Generator().manual_seed(0)
        for size in dict.fromkeys(sizes):
            image = torch.randn(BATCH, channels, *size, generator=draw)
            yield {name: image.to(like.device, like.dtype)}

    if isinstance(timm, Mapping) and "input_size" in timm:
        channels, *size = timm["input_size"]
        low = () if timm.get("fixed_input_size") or min(size) <= 128 else ((128, 128),)
        own = _size(getattr(getattr(backbone, "patch_embed", None), "img_size", None))  # where it was built for another
        yield from pixels(channels, (*((own,) if own else low), (size[0], size[1])), _first_name(backbone))
        return
    if config is not None:
        main = getattr(backbone, "main_input_name", "")
        if main == "pixel_values":
            sizes = [_size(getattr(c, "image_size", None)) for c in (config, getattr(config, "backbone_config", None))]
            some = [size for size in sizes if size is not None] or [(64, 64), (224, 224)]
            channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
            yield from pixels(int(channels), some, main)
            return
        words = getattr(config, "vocab_size", None) or getattr(getattr(config, "text_config", None), "vocab_size", None)
        if main == "input_ids" and words:
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(min(3, int(words) - 1), int(words), (BATCH, WORDS), generator=draw).to(like.device)
            takes = inspect.signature(backbone.forward).parameters
            more = {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
            if "pixel_values" in takes and hasattr(config, "vision_config"):
                size = _size(getattr(getattr(config, "vision_config", None), "image_size", None)) or (224, 224)
                image = next(pixels(3, [size], "pixel_values"))
                yield {"input_ids": ids, **image}
            yield {"input_ids": ids, **more}
            return
    if type(backbone).__module__.startswith("torchvision."):
        side = int(getattr(backbone, "image_size", 224))
        yield from pixels(3, [(side, side), (299, 299)], _first_name(backbone))
        return
    raise SiteError(
        f"{type(backbone).__name__} does not say what it reads: expected a configuration of timm, transformers or "
        "torchvision; give find_sites(backbone, inputs={...}) the arguments of one forward, "
        f"{BATCH} rows, and pass the result as anatomy="
    )


def _first_name(backbone: nn.Module) -> str:
    return next(iter(inspect.signature(backbone.forward).parameters))


def _size(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple) and len(size) in (2, 3):
        return int(size[-2]), int(size[-1])
    return None


# ---- what a module is


def _weights(module: nn.Module) -> int:
    return sum(1 for p in module.parameters() if p.ndim > 1)


def _kind(module: nn.Module) -> Any:
    """A class, and what it is made of where that says nothing."""
    if type(module) in (nn.Sequential, nn.ModuleList):
        return (type(module), *(_kind(child) for child in module.children()))
    return type(module)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.PReLU):
        return False
    return (isinstance(weight, Tensor) and weight.ndim == 1) or "Norm" in type(module).__name__


def _last(module: nn.Module, seen: Seen) -> bool:
    """Whether a map (b, ·, ·, ·) has its channels last."""
    if len(seen.shape) != 4:
        return False
    _, a, b, c = seen.shape
    if a == b != c:
        return True
    if b == c != a:
        return False
    return layout_of(module) == "last"


def _width(seen: Seen, last: bool) -> int:
    return seen.shape[1] if len(seen.shape) == 4 and not last else seen.shape[-1]


def _tokens(seen: Seen, last: bool) -> int:
    if len(seen.shape) == 4:
        return math.prod(seen.shape[1:3] if last else seen.shape[2:])
    return seen.shape[1] if len(seen.shape) == 3 else 1


@dataclass(frozen=True)
class _Operation:
    """An operation of a block: where it reads and writes, and the calls during it."""

    op: str
    reads: Point
    writes: Point
    stream: Point
    width: tuple[int, int]
    calls: tuple[Ran, ...]
    attended: tuple[Attended, ...]


class _Finder:
    def __init__(self, backbone: nn.Module, inputs: Mapping[str, Any], root: str) -> None:
        self.backbone, self.inputs, self.top = backbone, inputs, root
        self.described = any(p.is_meta for p in backbone.parameters())
        self.trace: Trace = trace(backbone, inputs)
        self.calls = [self.trace.root, *self.trace.root.within()]
        tower = [ran for ran in self.calls if ran.path == root]
        if not tower:
            raise SiteError(f"no module {root!r} is called by {type(backbone).__name__}: expected the path of a tower")
        self.tower = tower[0]
        ran = {id(p): p.numel() for c in self.calls for p in c.module.parameters(recurse=False)}
        self.total = sum(ran.values())
        self.elements: set[Any] = set()
        self.lists: list[tuple[str, list[Ran]]] = []

    # ---- blocks

    def sites(self) -> Sites:
        blocks = self._blocks()
        if not blocks:
            raise SiteError(self._refusal(blocks, 0.0))
        found = _Described(self, blocks).sites()
        if found.found is not None and found.found.share < LEAST:
            raise SiteError(self._refusal(blocks, found.found.share))
        return found

    def share(self, blocks: Sequence[Ran], tail: Sequence[nn.Module] = ()) -> float:
        """What blocks, and what comes after them, hold of the parameters that the forward passed."""
        modules = [*(ran.module for ran in blocks), *tail]
        held = {id(p): p.numel() for module in modules for p in module.parameters()}
        ran = {id(p): p.numel() for c in self.calls for p in c.module.parameters(recurse=False)}
        for module in self.tower.module.modules():
            if isinstance(module, nn.Embedding):  # words are looked up, not computed with
                ran.pop(id(module.weight), None)
        return sum(held.values()) / max(sum((ran | held).values()), 1)

    def _blocks(self) -> list[Ran]:
        self._find_lists()
        self.stage_types = {
            type(m)
            for _, runs in self.lists
            for m in self._holders(runs[0])
            if type(m) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        }
        found = [ran for ran in self._expand(self.tower) if self._stream(ran)]
        if not found or self.share(found) < LEAST:
            plain = [ran for ran in self._plain(self.tower) if self._stream(ran)]
            found = plain if not found or self.share(plain) >= LEAST else found
        return self._chained(found)

    @staticmethod
    def _stream(ran: Ran) -> bool:
        return ran.said is not None and ran.said.streams

    def _find_lists(self) -> None:
        """The containers whose elements run one after another, are of one class, and compute with two weights at least.

        Of lists in lists the inner ones are meant, unless they run side by side or hold too little.
        """
        first: dict[str, Ran] = {}
        for ran in self.tower.within():
            first.setdefault(ran.path, ran)
        inside: dict[str, list[Ran]] = {}
        for path, module in self.backbone.named_modules():
            if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
                runs = [first[p] for name, _ in module.named_children() if (p := f"{path}.{name}".lstrip(".")) in first]
                inside[path] = [ran for ran in runs if _weights(ran.module) > 1 and self._stream(ran)]
        counts = {path: Counter(_kind(ran.module) for ran in runs) for path, runs in inside.items()}
        kinds = {kind for count in counts.values() for kind, n in count.items() if n > 1}
        lists: dict[str, list[Ran]] = {}
        for path, runs in inside.items():
            same = [ran for ran in runs if _kind(ran.module) in kinds]
            if same and self._in_a_row(same):
                lists[path] = same
        for path, ran in first.items():  # one layer, called several times in a row
            calls = [other for other in self.calls if other.path == path]
            if len(calls) > 1 and _weights(ran.module) > 3 and self._stream(ran) and self._in_a_row(calls):
                lists[path.rpartition(".")[0]] = [ran]
        kept = {}
        for path, runs in lists.items():
            held = 0
            for ran in runs:
                within = [p for p in lists if p == ran.path or _under(p, ran.path)]
                outer = [
                    p
                    for p in within
                    if not any(_under(p, r.path) or p == r.path for o in within if o != p for r in lists[o])
                ]
                elements = sorted((r for p in outer for r in lists[p]), key=lambda r: r.start)
                held += sum(_count(r.module) for r in elements) if self._in_a_row(elements) else 0
            if held < LEAST * sum(_count(ran.module) for ran in runs):
                kept[path] = runs
        self.lists = [
            (path, runs)
            for path, runs in kept.items()
            if not any(path == r.path or _under(path, r.path) for other in kept if other != path for r in kept[other])
        ]
        self.elements = {_kind(ran.module) for _, runs in self.lists for ran in runs}

    def _in_a_row(self, runs: Sequence[Ran]) -> bool:
        ordered = sorted(runs, key=lambda ran: ran.start)
        pairs = list(zip(ordered, ordered[1:], strict=False))
        good = sum(
            any(self.trace.follows(t.tag, [o.tag for o in a.outs]) for t in b.ins) and a.end < b.start for a, b in pairs
        )
        return good == len(pairs)

    def _holders(self, ran: Ran) -> Iterator[nn.Module]:
        """The called modules around a block, but for the whole."""
        while ran.parent is not None and ran.parent is not self.tower and ran is not self.tower:
            ran = ran.parent
            yield ran.module

    def _expand(self, ran: Ran) -> Iterator[Ran]:
        for child in ran.children:
            if self._stage(child):
                yield from self._expand(child)
            elif self._block(child):
                yield child

    def _stage(self, ran: Ran) -> bool:
        module = ran.module
        if _kind(module) in self.elements:
            return False
        if type(module) in self.stage_types:
            return True
        if any(_under(r.path, ran.path) for _, runs in self.lists for r in runs):
            return True
        kinds = {_kind(child.module) for child in ran.children}
        return isinstance(module, nn.Sequential) and bool(kinds & self.elements)

    def _block(self, ran: Ran) -> bool:
        module = ran.module
        if _kind(module) in self.elements:
            return True
        in_list = isinstance(self._owner(ran.path), nn.Sequential | nn.ModuleList | nn.ModuleDict)
        started = any(r.start < ran.start for _, runs in self.lists for r in runs)
        big = _count(module) >= 0.1 * self.total and started
        alone = _weights(module) == 1 and _count(module) >= 0.2 * self.total and started
        return alone or (_weights(module) > 1 and ((in_list and self._listed(ran)) or big))

    def _listed(self, ran: Ran) -> bool:
        """Whether it stands in a container in which there are blocks, or beside one."""
        parent = ran.path.rpartition(".")[0]
        around = parent.rpartition(".")[0]
        return any(
            path == parent or _under(path, around) and around != self.tower.path for path, _ in self.lists
        ) or any(_under(r.path, parent) for _, runs in self.lists for r in runs)

    def _owner(self, path: str) -> nn.Module:
        return self.backbone.get_submodule(path.rpartition(".")[0])

    def _plain(self, ran: Ran) -> Iterator[Ran]:
        """Without lists: what the whole calls, one after another; what holds nearly all is opened."""
        held = [child for child in ran.children if _weights(child.module)]
        for child in held:
            as_tuple = sum(_weights(inner.module) > 1 for inner in child.children) > 1
            if as_tuple and (_count(child.module) > 0.7 * self.total or type(child.module) is nn.Sequential):
                yield from self._plain(child)
            else:
                yield child

    def _chained(self, found: list[Ran]) -> list[Ran]:
        """The chain of those that follow from one another, by what goes in first, that holds the most parameters.

        Raises TowersError where another that runs wholly before or after it holds much too.
        """
        feeds = self.trace.origins([[o.tag for o in ran.outs] for ran in found])
        best: list[tuple[int, int | None]] = []
        for i, ran in enumerate(found):
            before: tuple[int, int | None] = (0, None)
            for j, other in enumerate(found[:i]):
                beside = ran.path.rpartition(".")[0] == other.path.rpartition(".")[0]
                given = ran.ins if beside or not ran.direct else ran.ins[:1]
                if other.end < ran.start and any(feeds[t.tag] >> j & 1 for t in given):
                    before = max(before, (best[j][0], j), key=lambda pair: (pair[0], pair[1] or 0))
            best.append((before[0] + _count(ran.module), before[1]))
        chain: list[int] = []
        at: int | None = max(range(len(found)), key=lambda i: best[i][0], default=None)
        while at is not None:
            chain.append(at)
            at = best[at][1]
        chosen = [found[i] for i in reversed(chain)]
        others = [ran for i, ran in enumerate(found) if i not in chain]
        apart = [ran for ran in others if chosen and (ran.end < chosen[0].start or ran.start > chosen[-1].end)]
        if sum(_count(ran.module) for ran in apart) >= 0.15 * self.total:
            firsts = sorted((chosen[0], apart[0]), key=lambda ran: ran.start)
            towers = self._towers(firsts)
            if len({*towers}) == len(towers) and all(towers):
                raise TowersError(type(self.backbone).__name__, towers)
        return chosen

    def _towers(self, firsts: Sequence[Ran]) -> tuple[str, ...]:
        """The outermost modules that hold one of these calls each."""
        around = []
        for ran in firsts:
            holders = []
            while ran.parent is not None:
                ran = ran.parent
                holders.append(ran.path)
            around.append(holders)
        return tuple(
            next((p for p in reversed(own) if all(p not in others for others in around if others is not own)), own[0])
            for own in around
        )

    def _refusal(self, blocks: Sequence[Ran], share: float) -> str:
        name = type(self.backbone).__name__
        seen = [f"{p} ({len(runs)} {type(runs[0].module).__name__})" for p, runs in self.lists] or ["no list of blocks"]
        where = self.lists[0][0] if self.lists else "PATH"
        return (
            f"no known anatomy fits {name}, and one traced forward finds blocks with {share:.0%} of its parameters "
            f"(expected {LEAST:.0%}): {', '.join(seen[:6])}; describe it: restuning.Anatomy({name!r}, blocks={where!r},
            " "ops={'mha': Op(into('ATTENTION'), out_of('ATTENTION')), 'ffn': Op(into('MLP'), out_of('MLP'))}, "
            "width='NORM.weight', norm='FINAL_NORM')"
        )


def _under(path: str, holder: str) -> bool:
    return path != holder and (not holder or path.startswith(f"{holder}."))


def _common(paths: Sequence[str]) -> str:
    split = [path.split(".") for path in paths]
    same = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    while same and same[-1].isdigit():
        same.pop()
    return ".".join(same) or "the backbone itself"


class _Described:
    """Sites of the blocks that were found."""

    def __init__(self, finder: _Finder, blocks: list[Ran]) -> None:
        self.finder, self.blocks = finder, blocks
        self.backbone, self.trace = finder.backbone, finder.trace
        self.notes: list[str] = []
        self.text = "input_ids" in finder.inputs
        self.times = Counter(ran.path for ran in finder.calls)

    def sites(self) -> Sites:
        tail = _tail(self.backbone, self.trace, self.blocks, self.finder.inputs, self.prefix(self.blocks[-1]))
        if tail.more is not None:
            self.blocks = [*self.blocks, tail.more]
            self.notes.append(
                f"{tail.more.path or 'the whole'} counts as the last block: what comes before it branches"
            )
        counts = Counter(ran.path for ran in self.blocks)
        nth: Counter[str] = Counter()
        calls: list[int | None] = []
        for ran in self.blocks:
            calls.append(nth[ran.path] if counts[ran.path] > 1 else None)
            nth[ran.path] += 1
        self.calls = calls
        operations = [list(self.operations(ran)) for ran in self.blocks]
        depth = len(self.blocks)
        outs = [self._out(i) for i in range(depth)]
        infos = [self._info(i, outs[i], operations[i]) for i in range(depth)]
        start, first = self._start(outs[0])
        shapes = [(info.out_features, _tokens(self._said(i), outs[i].last)) for i, info in enumerate(infos)]
        lengths = [len(list(group)) for _, group in groupby(shapes)]
        stages = tuple(sum(lengths[: i + 1]) for i in range(len(lengths)))
        every = [site for i in range(depth) for site in self._of_block(i, infos[i], outs[i], operations[i])]
        every = [*self._embed(), *every, *self._norms(tail), *words_of(self.backbone)]
        ops = {site.op for site in every}
        attention = self._one_attention(every)
        parts = {site.op: () for site in every if site.op in PARTS}
        said = [replace(info, reads=info.out_features) for info in infos]
        for op in ("mha", "ffn"):
            have = {s.block for s in every if s.op == op}
            if len(have) < depth:
                self.notes.append(f"{op} in {len(have)} of {depth} blocks")
        if not tail.checked:
            self.notes.append("the pooling could not be tried out on a backbone that is only described")
        after = [self.backbone.get_submodule(path) for path in (*tail.norm, *tail.post)]
        sure = "low" if not tail.checked else "high" if {"mha", "ffn"} & ops and tail.more is None else "medium"
        anatomy = Anatomy(
            f"found in {type(self.backbone).__name__}",
            blocks=_common([ran.path for ran in self.blocks]),
            ops={},
            width="",
            parts=parts,
            attention=attention,
            last=outs[-1].last,
            family=self._family(every),
        )
        return Sites(
            anatomy=anatomy,
            blocks=tuple(ran.path for ran in self.blocks),
            stages=stages,
            stems=tuple(ran.path for ran in self.blocks),
            features=(replace(said[0], reads=first, writes=first), *said),
            all=tuple(every),
            info=replace(said[-1], writes=tail.width or said[-1].writes),
            norm=tail.norm,
            post=tail.post,
            pooler=tail.pooler,
            join=None,
            pool=tail.pool,
            prefix=tail.prefix,
            points=(start, *outs),
            found=Found(self.finder.share(self.blocks, after), sure, tuple(self.notes)),
        )

    def _family(self, every: Sequence[Site]) -> str:
        if self.text:
            return "text"
        ops = {site.op for site in every}
        if "mha" in ops:
            return ""
        return "convnext" if {"ffn", "conv"} <= ops else "conv"

    def _said(self, i: int) -> Seen:
        said = self.blocks[i].said
        assert said is not None
        return said

    def _out(self, i: int) -> Point:
        ran = self.blocks[i]
        return Point(ran.path, "out", _last(ran.module, self._said(i)), call=self.calls[i])

    def _start(self, first: Point) -> tuple[Point, int]:
        """Where x_0 can be seen, and its width."""
        ran = self.blocks[0]
        read = ran.read
        if read is not None and read.streams:
            last = _last(ran.module, read)
            return Point(ran.path, "in", last, call=self.calls[0]), _width(read, last)
        for seen in ran.ins:
            for other in reversed(self.finder.calls):
                if seen.streams and other.end < ran.start and other.said is not None and other.said.tag == seen.tag:
                    last = _last(other.module, seen)
                    return Point(other.path, "out", last), _width(seen, last)
        return first, _width(self._said(0), first.last)  # nothing before it can be seen

    def prefix(self, ran: Ran) -> int:
        """How many tokens come before a grid of patches."""
        said = ran.said
        if said is None or len(said.shape) != 3 or self.text:
            return 0
        n = said.shape[1]
        maps = [
            math.prod(o.shape[2:])
            for other in self.finder.calls
            if other.end < ran.start and is_linear(other.module)
            for o in other.outs[:1]
            if len(o.shape) == 4 and o.shape[0] == BATCH and n - 32 < math.prod(o.shape[2:]) <= n
        ]
        return n - (maps[-1] if maps else math.isqrt(n) ** 2)

    def _info(self, i: int, out: Point, operations: Sequence["_Operation"]) -> SiteInfo:
        ran, said = self.blocks[i], self._said(i)
        width = _width(said, out.last)
        read = ran.read
        reads = _width(read, _last(ran.module, read)) if read is not None and read.streams else width
        heads = next((a.heads for op in operations for a in op.attended), 1)
        grid = None if self.text else self.prefix(ran)
        return SiteInfo(reads, width, heads, i, len(self.blocks), grid)

    # ---- operations

    def operations(self, ran: Ran) -> Iterator[_Operation]:
        found = self._residuals(ran, False) or self._residuals(ran, True)
        if not found:
            return
        names = self._names(found, ran)
        for name, one in zip(names, found, strict=True):
            if name:
                yield replace(one, op=name)

    def _names(self, found: Sequence[_Operation], ran: Ran) -> list[str]:
        def maps_of(one: _Operation) -> list[Ran]:
            return [c for c in one.calls if is_linear(c.module)]

        def feeds(one: _Operation) -> bool:
            maps = [c.module for c in maps_of(one)]
            while maps and _depthwise(maps[0]):
                maps = maps[1:]
            return len(maps) > 1 and _pointwise(maps[0]) and _pointwise(maps[-1])

        attends = [bool(one.attended) for one in found]
        names = ["mha" if a else "ffn" if feeds(one) else "" for a, one in zip(attends, found, strict=True)]
        if any(attends):
            started = attends.index(True)
            for i, name in enumerate(names):
                names[i] = "ffn" if not name and i > started and not _convolves(maps_of(found[i])) else name
        elif len(found) > 1 and names[-1] == "ffn":
            names = ["mha", *("" for _ in found[2:]), "ffn"]
        elif len(found) == 1 and names == ["ffn"]:
            maps = [c.module for c in maps_of(found[0])]
            if any(_depthwise(m) for m in maps[1:]):  # an inverted bottleneck is a block of convolutions
                names = [""]
        kept = {}
        for i, name in enumerate(names):
            if name == "mha" and attends[i] and "mha" in kept:
                names[i] = "cross" if "cross" not in kept else ""
            elif name == "ffn" and "ffn" in kept:
                names[kept["ffn"]] = ""
            kept[names[i]] = i
        return names

    def _residuals(self, ran: Ran, widened: bool) -> list[_Operation]:
        """The operations that end in a sum with the residual stream. widened: whether the shortcut is mapped too."""
        source = self.trace.source
        stream = {source(t.tag) for t in (ran.ins if ran.read is None else [ran.read])}
        inner = [c for c in ran.within()]
        normed: dict[int, Ran] = {}
        pending: dict[int, tuple[Seen, Seen]] = {}
        found: list[_Operation] = []
        sums = [s for s in self.trace.sums if ran.start < s[0] < ran.end]
        norms = [c for c in inner if _is_norm(c.module) and c.read is not None and c.said is not None]
        events: list[tuple[int, Any]] = sorted(
            [(s[0], s) for s in sums] + [(c.end, c) for c in norms], key=lambda e: e[0]
        )

        def parts(y: Seen) -> list[Seen]:
            both = pending.get(source(y.tag))
            if both is None or self._producer(inner, y) is not None:
                return [y]
            return [one for side in both for one in parts(side)]

        for at, event in events:
            if isinstance(event, Ran):
                assert event.read is not None and event.said is not None
                if source(event.read.tag) in stream:
                    stream.add(source(event.said.tag))
                    normed[source(event.said.tag)] = event
                continue
            _, a, b, c = event
            here = [source(t.tag) in stream for t in (a, b)]
            if here == [True, True]:
                stream.add(source(c.tag))
            elif any(here):
                for y in parts(b if here[0] else a):
                    one = self._operation(ran, inner, at, y, stream, normed)
                    if one is not None:
                        found.append(one)
                stream.add(source(c.tag))
            elif widened and ran.said is not None and math.prod(c.shape) == math.prod(ran.said.shape):
                for y in (a, b):
                    one = self._operation(ran, inner, at, y, stream, normed)
                    if one is not None and one.attended:
                        found.append(one)
                stream.add(source(c.tag))
            else:
                pending[source(c.tag)] = (a, b)
        return found

    def _producer(self, inner: Sequence[Ran], y: Seen) -> Point | None:
        """Where a tensor is seen first: what a module said, or what goes into one."""
        source = self.trace.source
        said = [c for c in inner if c.said is not None and source(c.said.tag) == source(y.tag) and c.said.streams]
        said = [c for c in said if not _passes(c.module)]
        if said:
            one = min(said, key=lambda c: c.end)
            assert one.said is not None
            return Point(one.path, "out", _last(one.module, one.said))
        read = [c for c in inner if c.read is not None and source(c.read.tag) == source(y.tag) and c.read.streams]
        if read:
            one = min(read, key=lambda c: c.start)
            assert one.read is not None
            return Point(one.path, "in", _last(one.module, one.read))
        return None

    def _operation(
        self, ran: Ran, inner: Sequence[Ran], at: int, y: Seen, stream: set[int], normed: Mapping[int, Ran]
    ) -> _Operation | None:
        source = self.trace.source
        before: set[int] = set()
        ends: set[int] = set()
        todo = [y.tag]
        low = min((t.tag for t in ran.ins), default=0)
        while todo:
            tag = todo.pop()
            if source(tag) in stream:
                ends.add(source(tag))
            elif tag not in before and tag >= low:
                before.add(tag)
                todo += self.trace.parents.get(tag, ())
        calls = [
            c
            for c in inner
            if c.end < at and any(o.tag in before for o in c.outs) and source(c.outs[0].tag) not in stream
        ]
        if not calls or not ends:
            return None
        attended = tuple(a for a in self.trace.attended if ran.start < a.at < ran.end and a.tag in before)
        writes, to = None, y
        if (point := self._producer(inner, y)) is not None:
            writes = point
        else:  # a product with a bare parameter: what it is a product of
            todo = [(y.tag, 0)]
            while todo and writes is None:
                tag, steps = todo.pop(0)
                for parent in sorted(self.trace.parents.get(tag, ()), reverse=True):
                    like = Seen(parent, y.shape, True)
                    writes = writes or (self._producer(inner, like) if parent in before else None)
                    if steps < 3:
                        todo.append((parent, steps + 1))
        if writes is None:
            return None
        to = self._at(inner, writes)
        entry = max(ends, key=lambda tag: (tag in normed, tag))
        maps = [c for c in calls if is_linear(c.module)]
        reads = self._reads(ran, inner, at, entry, calls, normed, to, writes)
        width = (_width(self._at(inner, reads, ran), reads.last), _width(to, writes.last))
        norm = normed.get(entry)
        stream_at = reads
        if norm is not None and norm.read is not None and norm.read.streams and reads != writes:
            stream_at = Point(norm.path, "in", _last(norm.module, norm.read))
        before_norm = [norm] if norm is not None else []
        return _Operation(
            "", reads, writes, stream_at, width, tuple(before_norm + calls if maps or calls else ()), attended
        )

    def _at(self, inner: Sequence[Ran], point: Point, ran: Ran | None = None) -> Seen:
        runs = [*inner, *([ran] if ran else [])]
        call = next(c for c in runs if c.path == point.path)
        seen = call.read if point.side == "in" else call.said
        assert seen is not None
        return seen

    @staticmethod
    def _time(inner: Sequence[Ran], point: Point, ran: Ran) -> int:
        call = next(c for c in (*inner, ran) if c.path == point.path)
        return call.start if point.side == "in" else call.end

    def _reads(
        self,
        ran: Ran,
        inner: Sequence[Ran],
        at: int,
        entry: int,
        calls: Sequence[Ran],
        normed: Mapping[int, Ran],
        to: Seen,
        writes: Point,
    ) -> Point:
        """Where an operation reads: of the places that hold what goes in, one with a token for each that comes out."""
        source = self.trace.source
        n = _tokens(to, writes.last)
        names = {c.path for c in calls}
        points = [
            (c.read, Point(c.path, "in", _last(c.module, c.read)))
            for c in inner
            if c.read is not None and source(c.read.tag) == entry and c.path in names and not _is_norm(c.module)
        ]
        if (norm := normed.get(entry)) is not None:
            assert norm.said is not None and norm.read is not None
            points.append((norm.said, Point(norm.path, "out", _last(norm.module, norm.said))))
            points.append((norm.read, Point(norm.path, "in", _last(norm.module, norm.read))))
        if ran.read is not None:
            points.append((ran.read, Point(ran.path, "in", _last(ran.module, ran.read))))
        for seen, point in points:
            if self._time(inner, point, ran) > self._time(inner, writes, ran):
                continue
            if seen.streams and (_tokens(seen, point.last) == n or len(seen.shape) == len(to.shape) == 4):
                return point
        return writes

    # ---- sites

    def _of_block(self, i: int, info: SiteInfo, out: Point, operations: Sequence[_Operation]) -> Iterator[Site]:
        ran, call = self.blocks[i], self.calls[i]

        def site(
            op: str, name: str, reads: Point, writes: Point, stream: Point, here: SiteInfo, weight: Weight | None = None
        ) -> Site:
            reads, writes, stream = (
                p if p.call is not None or call is None else replace(p, call=call) for p in (reads, writes, stream)
            )
            return Site(op, i, f"{i}_{name}", reads, writes, stream, here, weight)

        for one in operations:
            points = (one.reads, one.writes, one.stream)
            if call is not None and any(self.times[p.path] != self.times[ran.path] for p in points):
                continue
            here = replace(info, reads=one.width[0], writes=one.width[1])
            yield site(one.op, one.op, one.reads, one.writes, one.stream, here)
        read = ran.read
        into = Point(ran.path, "in", _last(ran.module, read)) if read is not None and read.streams else out
        if read is not None and into.side == "in":
            maps = len(read.shape) == len(self._said(i).shape) == 4
            if not maps and _tokens(read, into.last) != _tokens(self._said(i), out.last):
                into = out
        yield site(
            "block", "block", into, out, into, info if into.side == "in" else replace(info, reads=info.out_features)
        )
        for op in operations:
            if len(op.attended) == 1 and call is None and (a := op.attended[0]).known:
                rows, n = a.queries
                tokens = BATCH * _tokens(self._at(list(ran.within()), op.writes, ran), op.writes.last)
                path = a.ran.path
                if path and (rows * n == tokens or rows > BATCH) and _under(path, ran.path):
                    point = Point(path, "in")
                    keys = replace(info, heads=a.keys[0], reads=a.keys[1], writes=a.keys[1])
                    yield site(
                        "attention", f"attention{'' if op.op == 'mha' else '_' + op.op}", point, point, point, keys
                    )
        yield from self._parts(i, info, operations, site)

    def _parts(self, i: int, info: SiteInfo, operations: Sequence[_Operation], site: Any) -> Iterator[Site]:
        ran, call = self.blocks[i], self.calls[i]
        roles: dict[str, str] = {}
        for one in operations:
            maps = [c for c in one.calls if is_linear(c.module)]
            norm = next(
                (c for c in one.calls if _is_norm(c.module) and c.end < min((m.start for m in maps), default=0)), None
            )
            after = [c for c in ran.within() if _is_norm(c.module) and c.read is not None and c.path not in roles]
            if norm is not None:
                roles.setdefault(norm.path, {"mha": "norm1", "ffn": "norm2"}.get(one.op, "norms"))
            for c in maps:
                roles.setdefault(c.path, self._role(one, c, maps))
            del after
        seen: set[str] = set()
        for c in ran.within():
            if c.path in seen or c.read is None or c.said is None:
                continue
            kind = "norms" if _is_norm(c.module) else "conv" if isinstance(c.module, nn.Conv2d) else "linear"
            if not (is_linear(c.module) or (_is_norm(c.module) and getattr(c.module, "weight", None) is not None)):
                continue
            seen.add(c.path)
            if call is not None and self.times[c.path] != self.times[ran.path]:
                continue
            role = roles.get(c.path, kind)
            last = not isinstance(c.module, nn.Conv2d) and len(c.read.shape) == 4 and _last_of(c)
            if len(c.read.shape) not in (2, 3, 4) or not c.read.floating:
                continue
            width = sides(c.module)
            if (_width(c.read, last), _width(c.said, last)) != width:
                continue
            kernel = kernel_of(c.module) if isinstance(c.module, nn.Conv2d) else None
            fused = {"drop", "act"} <= {name for name, _ in c.module.named_children()}
            out = Point(f"{c.path}.drop", "in", last) if fused else Point(c.path, "out", last)
            into = Point(c.path, "in", last)
            here = replace(info, reads=width[0], writes=width[1], kernel=kernel)
            yield site(role, f"{role}_{_short(c.path, ran.path)}", into, out, into, here)
        for mapped in self.trace.mapped if call is None else ():
            if not (ran.start < mapped.at < ran.end) or mapped.weight in seen or not _under(mapped.ran.path, ran.path):
                continue
            seen.add(mapped.weight)
            weight = self.backbone.get_parameter(mapped.weight)
            path = mapped.weight.removesuffix(".weight")
            role = self._role_of_weight(mapped, operations)
            here = replace(info, reads=weight.shape[1], writes=weight.shape[0])
            into, out = Point(path, "in"), Point(path, "out")
            yield site(
                role,
                f"{role}_{_short(path, ran.path)}",
                into,
                out,
                into,
                here,
                Weight(mapped.ran.path, mapped.weight, mapped.bias),
            )

    @staticmethod
    def _role(one: _Operation, call: Ran, maps: Sequence[Ran]) -> str:
        spatial = isinstance(call.module, nn.Conv2d) and not _pointwise(call.module)
        if one.attended and not spatial:
            return "qkv" if call.end < max(a.at for a in one.attended) else "proj"
        if one.op == "ffn" and not spatial:
            return "fc2" if call is [m for m in maps if _pointwise(m.module)][-1] else "fc1"
        return "conv" if isinstance(call.module, nn.Conv2d) else "linear"

    @staticmethod
    def _role_of_weight(mapped: Mapped, operations: Sequence[_Operation]) -> str:
        times = [a.at for one in operations for a in one.attended if a.ran is mapped.ran]
        return "linear" if not times else "qkv" if mapped.at < max(times) else "proj"

    def _one_attention(self, every: Sequence[Site]) -> str | None:
        """The path of the attention in a block, if every block has one at the same."""
        found = [(s.block, s.reads.path) for s in every if s.op == "attention" and s.block is not None]
        names = {path.removeprefix(f"{self.blocks[block].path}.") for block, path in found}
        return names.pop() if len(names) == 1 and len(found) == len(self.blocks) else None

    def _embed(self) -> Iterator[Site]:
        """The affine map that makes the first tokens."""
        first = self.blocks[0]
        before = [c for c in self.finder.calls if c.end < first.start and c.said is not None]
        maps = [c for c in before if is_linear(c.module) and c.said is not None and c.said.shape[0] == BATCH]
        if self.text:
            maps = [c for c in before if _is_norm(c.module) and c.said is not None and c.said.streams]
        if maps:
            c = maps[-1]
            assert c.said is not None
            last = _last(c.module, c.said)
            out = Point(c.path, "out", last)
            width = _width(c.said, last)
            yield Site("embed", None, "embed", out, out, out, SiteInfo(width, width, 1, 0, len(self.blocks)))

    def _norms(self, tail: "_Tail") -> Iterator[Site]:
        found = [
            (f"{path}.{name}".rstrip("."), m)
            for path in (*tail.norm, *tail.post)
            for name, m in self.backbone.get_submodule(path).named_modules()
            if _is_norm(m) and getattr(m, "weight", None) is not None
        ]
        for path, module in found:
            width = len(module.weight)
            name = "norm" if len(found) == 1 else f"norm_{path.replace('.', '_')}"
            first = layout_of(module) != "first"
            fused = {"drop", "act"} <= {name for name, _ in module.named_children()}
            into = Point(path, "in", first)
            out = Point(f"{path}.drop", "in", first) if fused else Point(path, "out", first)
            yield Site("norm", None, name, into, out, into, SiteInfo(width, width, 1, 0, len(self.blocks)))


def _pointwise(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv2d) or max(module.kernel_size) == 1


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and not _pointwise(module)


def _convolves(calls: Sequence[Ran]) -> bool:
    return any(not _pointwise(c.module) for c in calls)


def _passes(module: nn.Module) -> bool:
    """Whether it gives, in evaluation, what it is given."""
    return isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d) or type(module).__name__ == "DropPath"


def _last_of(ran: Ran) -> bool:
    """A linear map or a norm acts on the last dimension, unless it is one of maps."""
    return layout_of(ran.module) != "first"


def _short(path: str, block: str) -> str:
    return path.removeprefix(f"{block}.").replace(".", "_")


# ---- after the blocks


@dataclass(frozen=True)
class _Tail:
    """What follows the blocks; more: a call that has to count as the last block. checked: against the output."""

    norm: tuple[str, ...]
    post: tuple[str, ...]
    pooler: str | None
    pool: str
    prefix: int
    width: int
    checked: bool
    more: Ran | None = None


def _tail(backbone: nn.Module, seen: Trace, blocks: Sequence[Ran], inputs: Mapping[str, Any], prefix: int) -> _Tail:
    """Norm, pooling and what follows, tried out on what the backbone says. Raises SiteError if nothing gives that."""
    after = [c for c in seen.root.within() if c.start > blocks[-1].end]
    if any(p.is_meta for p in backbone.parameters()):
        return _described(backbone, after, prefix, blocks[-1])
    kept: dict[str, list[Any]] = {}
    watched = {blocks[-1].path: blocks[-1].module, **{c.path: c.module for c in after}}

    def keep(path: str) -> Any:
        return lambda m, args, out: kept.setdefault(path, []).append((args, out))

    handles = [module.register_forward_hook(keep(path)) for path, module in watched.items()]
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
            last = _last(source.module, Seen(0, tuple(h.shape), True))
            rest = [c for c in after if c.start > source.end] if more is not seen.root else []
            found = _fitting(h.permute(0, 3, 1, 2) if last else h, rest, targets, prefix, words)
            if found is not None:
                return replace(found, more=more)
    raise SiteError(
        f"the pooling of {type(backbone).__name__} is not known: its blocks are found, its output is not made of them"
    )


def _targets(backbone: nn.Module, out: Any, kept: Mapping[str, list[Any]], seen: Trace) -> Iterator[tuple[str, Tensor]]:
    """What the tail must give: what the classifier reads, the backbone's pooled output, or its last tokens."""
    classifier = next(
        (
            c
            for c in reversed(list(seen.root.within()))
            if isinstance(c.module, nn.Linear)
            and {*c.path.split(".")} & {"head", "fc", "classifier", "heads", "last_linear"}
            and isinstance(out, Tensor)
            and c.said is not None
            and tuple(out.shape) == c.said.shape
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
) -> _Tail | None:
    modules = list(_in_tail(rest))[:14]
    x = as_tokens(h)
    text = words is not None
    image = not text
    for kind, target in targets:
        wanted = target if kind == "tokens" else target.flatten(1)
        for end, k in ((end, k) for end in range(len(modules) + 1) for k in range(end, -1, -1)):
            norm, post = modules[:k], modules[k:end]
            if any(isinstance(m.module, nn.Tanh) for m in post):
                continue  # a pooler that was trained for another task
            try:
                y = through([m.module for m in norm], x)
            except Exception:
                continue
            if kind == "tokens":
                if k == end and _same(y, as_tokens(target)):
                    return _pooled_anyhow(norm, y, prefix, words, target)
                continue
            for pool, skip in _pools(y, prefix, image):
                try:
                    z = through([m.module for m in post], pooled(y, pool, skip)).flatten(1)
                except Exception:
                    continue
                if _same(z, wanted):
                    paths = [tuple(m.path for m in some) for some in (norm, post)]
                    return _Tail(*paths, None, pool, skip, z.shape[1], True)
            if k == end and k < len(modules):
                pooler = modules[k]
                try:
                    z = pooler.module(y)
                except Exception:
                    continue
                if isinstance(z, Tensor) and y.ndim == 3 and y.shape[1] > 1 and z.ndim == 2 and _same(z, wanted):
                    return _Tail(tuple(m.path for m in norm), (), pooler.path, "map", prefix, z.shape[1], True)
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
    said = getattr(config, "classifier_pooling", None)
    if said in ("cls", "mean"):
        return str(said)
    return "mean" if getattr(config, "is_encoder_decoder", False) or hasattr(config, "d_kv") else "cls"


def _pooled_anyhow(norm: Sequence[Ran], y: Tensor, prefix: int, words: str | None, target: Tensor) -> _Tail:
    """Of a backbone that gives its last tokens: the first where there is one before the patches, else their mean."""
    pool = words or ("mean" if target.ndim == 4 or prefix == 0 else "cls")
    return _Tail(tuple(m.path for m in norm), (), None, pool, 0 if words else prefix, y.shape[-1], True)


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
            changes = c.read is not None and c.said is not None and c.read.shape == c.said.shape
            if own or (changes and not _passes(c.module)):
                yield c


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1e-6)
    )


def as_tokens(x: Tensor) -> Tensor:
    """(b, d, h, w), or pooled (b, d) → (b, n, d); tokens as they are."""
    if x.ndim == 2:
        return x[:, None]
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def through(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Tokens (b, n, d) or pooled (b, d), which a module of maps has as (b, d, n, 1)."""
    for module in modules:
        if layout_of(module) == "first":
            said = as_tokens(module(as_tokens(x).transpose(1, 2).unsqueeze(-1)))
            x = said if x.ndim == 3 else said.flatten(1)
        else:
            x = module(x)
    return x


def pooled(x: Tensor, pool: str, prefix: int) -> Tensor:
    if pool == "cls":
        return x[:, 0]
    return x[:, -1] if pool == "last" else x[:, prefix:].mean(1)


def _described(backbone: nn.Module, after: Sequence[Ran], prefix: int, last: Ran) -> _Tail:
    """Of a backbone without values, by shapes alone."""
    modules = [c for c in _in_tail(after) if c.read is not None]
    norm = tuple(c.path for c in modules if c.read is not None and c.read.streams and _is_norm(c.module))
    pool = "cls" if prefix else "mean"
    width = _width(last.said, _last(last.module, last.said)) if last.said else 0
    return _Tail(norm, (), None, pool, prefix, width, False)
