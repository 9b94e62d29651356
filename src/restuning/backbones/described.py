"""Sites of blocks that a trace found."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import nn

from restuning._types import SiteInfo
from restuning.backbones.anatomy import PARTS, Anatomy, Point, Weight
from restuning.backbones.found_tail import FoundTail, tail_of_blocks
from restuning.backbones.modules import channels_last, is_norm, last_of_map, pointwise, tokens_in, width_of
from restuning.backbones.operations import Operation, operations_of, seen_at
from restuning.backbones.sites import Found, Site, Sites, is_linear, kernel_of, layout_of, sides, words_of
from restuning.backbones.trace import BATCH, Mapped, Ran, Seen, Trace


def under(path: str, holder: str) -> bool:
    return path != holder and (not holder or path.startswith(f"{holder}."))


def common_path(paths: Sequence[str]) -> str:
    split = [path.split(".") for path in paths]
    same = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    while same and same[-1].isdigit():
        same.pop()
    return ".".join(same) or "the backbone itself"


def describe(
    backbone: nn.Module, trace: Trace, blocks: list[Ran], inputs: Mapping[str, Any], share: Callable[..., float]
) -> Sites:
    """The sites of a traced backbone.

    Args:
        blocks: the calls that are its blocks, in their order.
        inputs: those of the trace.
        share: of some calls and some modules, the share of the parameters that they hold.

    Raises:
        SiteError: where what follows the blocks is not known.
    """
    return _Described(backbone, trace, blocks, inputs, share).sites()


class _Described:
    def __init__(
        self,
        backbone: nn.Module,
        trace: Trace,
        blocks: list[Ran],
        inputs: Mapping[str, Any],
        share: Callable[..., float],
    ) -> None:
        self.backbone, self.trace, self.blocks, self.inputs, self.share = backbone, trace, blocks, inputs, share
        self.every = [trace.root, *trace.root.within()]
        self.notes: list[str] = []
        self.text = "input_ids" in inputs
        self.parts: set[str] = set()

    def sites(self) -> Sites:
        tail = tail_of_blocks(self.backbone, self.trace, self.blocks, self.inputs, self.prefix(self.blocks[-1]))
        if tail.more is not None:
            self.blocks = [*self.blocks, tail.more]
            self.notes.append(
                f"{tail.more.path or 'the whole'} counts as the last block: what comes before it branches"
            )
        operations = [operations_of(self.trace, ran) for ran in self.blocks]
        depth = len(self.blocks)
        outs = [self._out(i) for i in range(depth)]
        infos = [self._info(i, outs[i], operations[i]) for i in range(depth)]
        start, first = self._start(outs[0])
        shapes = [(info.out_features, tokens_in(self._output_of(i), outs[i].last)) for i, info in enumerate(infos)]
        lengths = [len(list(group)) for _, group in groupby(shapes)]
        stages = tuple(sum(lengths[: i + 1]) for i in range(len(lengths)))
        every = [site for i in range(depth) for site in self._of_block(i, infos[i], outs[i], operations[i])]
        every = [*self._embed(), *every, *self._norms(tail), *words_of(self.backbone)]
        ops = {site.op for site in every}
        attention = self._one_attention(every)
        parts = {site.op: () for site in every if site.op in PARTS}
        output = [replace(info, in_features=info.out_features) for info in infos]
        for op in ("mha", "ffn"):
            have = {s.block for s in every if s.op == op}
            if len(have) < depth:
                self.notes.append(f"{op} in {len(have)} of {depth} blocks")
        if not tail.checked:
            self.notes.append("the pooling could not be tried out on a backbone that is only described")
        after = [self.backbone.get_submodule(path) for path in (*tail.norm, *tail.post, *filter(None, [tail.pooler]))]
        sure = "low" if not tail.checked else "high" if {"mha", "ffn"} & ops and tail.more is None else "medium"
        anatomy = Anatomy(
            f"found in {type(self.backbone).__name__}",
            blocks=common_path([ran.path for ran in self.blocks]),
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
            features=(replace(output[0], in_features=first, out_features=first), *output),
            all=tuple(every),
            info=replace(output[-1], out_features=tail.width or output[-1].out_features),
            norm=tail.norm,
            post=tail.post,
            pooler=tail.pooler,
            join=None,
            pool=tail.pool,
            prefix=tail.prefix,
            points=(start, *outs),
            rewritten=tail.rewritten,
            found=Found(self.share(self.blocks, after), sure, tuple(self.notes), tail.instead),
        )

    def _family(self, every: Sequence[Site]) -> str:
        if self.text:
            return "text"
        ops = {site.op for site in every}
        if "mha" in ops:
            return ""
        return "convnext" if {"ffn", "conv"} <= ops else "conv"

    def _output_of(self, i: int) -> Seen:
        output = self.blocks[i].output
        assert output is not None
        return output

    def _out(self, i: int) -> Point:
        ran = self.blocks[i]
        return Point(ran.path, "out", last_of_map(ran.module, self._output_of(i)), call=ran.nth)

    def _start(self, first: Point) -> tuple[Point, int]:
        """Where x_0 can be seen, and its width."""
        ran = self.blocks[0]
        read = ran.input
        if read is not None and read.streams:
            last = last_of_map(ran.module, read)
            return Point(ran.path, "in", last, call=ran.nth), width_of(read, last)
        for seen in ran.ins:
            for other in reversed(self.every):
                if seen.streams and other.end < ran.start and other.output is not None and other.output.tag == seen.tag:
                    last = last_of_map(other.module, seen)
                    return Point(other.path, "out", last, call=other.nth), width_of(seen, last)
        return first, width_of(self._output_of(0), first.last)  # nothing before it can be seen

    def prefix(self, ran: Ran) -> int:
        """How many tokens come before a grid of patches."""
        output = ran.output
        if output is None or len(output.shape) != 3 or self.text:
            return 0
        n = output.shape[1]
        maps = [
            math.prod(o.shape[2:])
            for other in self.every
            if other.end < ran.start and is_linear(other.module)
            for o in other.outs[:1]
            if len(o.shape) == 4 and o.shape[0] == BATCH and n - 32 < math.prod(o.shape[2:]) <= n
        ]
        return n - (maps[-1] if maps else math.isqrt(n) ** 2)

    def _info(self, i: int, out: Point, operations: Sequence["Operation"]) -> SiteInfo:
        ran, output = self.blocks[i], self._output_of(i)
        width = width_of(output, out.last)
        read = ran.input
        reads = width_of(read, last_of_map(ran.module, read)) if read is not None and read.streams else width
        heads = next((a.heads for op in operations for a in op.attended), 1)
        grid = None if self.text else self.prefix(ran)
        return SiteInfo(reads, width, heads, i, len(self.blocks), grid)

    def _of_block(self, i: int, info: SiteInfo, out: Point, operations: Sequence[Operation]) -> Iterator[Site]:
        ran = self.blocks[i]

        def site(
            op: str, name: str, reads: Point, writes: Point, stream: Point, here: SiteInfo, weight: Weight | None = None
        ) -> Site:
            return Site(op, i, f"{i}_{name}", reads, writes, stream, here, weight)

        for one in operations:
            here = replace(info, in_features=one.width[0], out_features=one.width[1])
            yield site(one.op, one.op, one.reads, one.writes, one.stream, here)
        read = ran.input
        into = (
            Point(ran.path, "in", last_of_map(ran.module, read), call=ran.nth)
            if read is not None and read.streams
            else out
        )
        if read is not None and into.side == "in":
            maps = len(read.shape) == len(self._output_of(i).shape) == 4
            if not maps and tokens_in(read, into.last) != tokens_in(self._output_of(i), out.last):
                into = out
        yield site(
            "block",
            "block",
            into,
            out,
            into,
            info if into.side == "in" else replace(info, in_features=info.out_features),
        )
        for op in operations:
            if len(op.attended) == 1 and op.attended[0].ran.nth is None and (a := op.attended[0]).known:
                rows, n = a.queries
                tokens = BATCH * tokens_in(seen_at([*ran.within(), ran], op.writes), op.writes.last)
                path = a.ran.path
                if path and (rows * n == tokens or rows > BATCH) and under(path, ran.path):
                    point = Point(path, "in")
                    keys = replace(info, heads=a.keys[0], in_features=a.keys[1], out_features=a.keys[1])
                    yield site(
                        "attention", f"attention{'' if op.op == 'mha' else '_' + op.op}", point, point, point, keys
                    )
        if not ran.nth:  # a map that is shared by several blocks is one: what changes it is there at every call
            yield from self._parts(i, info, operations, site)

    def _parts(self, i: int, info: SiteInfo, operations: Sequence[Operation], site: Any) -> Iterator[Site]:
        ran = self.blocks[i]
        roles: dict[str, str] = {}
        for one in operations:
            maps = [c for c in one.calls if is_linear(c.module)]
            norm = next(
                (c for c in one.calls if is_norm(c.module) and c.end < min((m.start for m in maps), default=0)), None
            )
            if norm is not None:
                roles.setdefault(norm.path, {"mha": "norm1", "ffn": "norm2"}.get(one.op, "norms"))
            for c in maps:
                roles.setdefault(c.path, self._role(one, c, maps))
        seen = self.parts
        for c in ran.within():
            if c.path in seen or c.input is None or c.output is None:
                continue
            kind = "norms" if is_norm(c.module) else "conv" if isinstance(c.module, nn.Conv2d) else "linear"
            if not (is_linear(c.module) or (is_norm(c.module) and getattr(c.module, "weight", None) is not None)):
                continue
            seen.add(c.path)
            role = roles.get(c.path, kind)
            last = not isinstance(c.module, nn.Conv2d) and len(c.input.shape) == 4 and channels_last(c)
            if len(c.input.shape) not in (2, 3, 4) or not c.input.floating:
                continue
            width = sides(c.module)
            if (width_of(c.input, last), width_of(c.output, last)) != width:
                continue
            kernel = kernel_of(c.module) if isinstance(c.module, nn.Conv2d) else None
            fused = {"drop", "act"} <= {name for name, _ in c.module.named_children()}
            out = Point(f"{c.path}.drop", "in", last) if fused else Point(c.path, "out", last)
            into = Point(c.path, "in", last)
            here = replace(info, in_features=width[0], out_features=width[1], kernel=kernel)
            yield site(role, f"{role}_{_short_name(c.path, ran.path)}", into, out, into, here)
        for mapped in self.trace.mapped:
            if not (ran.start < mapped.at < ran.end) or mapped.weight in seen or not under(mapped.ran.path, ran.path):
                continue
            seen.add(mapped.weight)
            weight = self.backbone.get_parameter(mapped.weight)
            path = mapped.weight.removesuffix(".weight")
            role = self._role_of_weight(mapped, operations)
            here = replace(info, in_features=weight.shape[1], out_features=weight.shape[0])
            into, out = Point(path, "in"), Point(path, "out")
            yield site(
                role,
                f"{role}_{_short_name(path, ran.path)}",
                into,
                out,
                into,
                here,
                Weight(mapped.ran.path, mapped.weight, mapped.bias),
            )

    @staticmethod
    def _role(one: Operation, call: Ran, maps: Sequence[Ran]) -> str:
        spatial = isinstance(call.module, nn.Conv2d) and not pointwise(call.module)
        if one.attended and not spatial:
            return "qkv" if call.end < max(a.at for a in one.attended) else "proj"
        if one.op == "ffn" and not spatial:
            return "fc2" if call is [m for m in maps if pointwise(m.module)][-1] else "fc1"
        return "conv" if isinstance(call.module, nn.Conv2d) else "linear"

    @staticmethod
    def _role_of_weight(mapped: Mapped, operations: Sequence[Operation]) -> str:
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
        before = [c for c in self.every if c.end < first.start and c.output is not None]
        maps = [c for c in before if is_linear(c.module) and c.output is not None and c.output.shape[0] == BATCH]
        if self.text:
            maps = [c for c in before if is_norm(c.module) and c.output is not None and c.output.streams]
        if maps:
            c = maps[-1]
            assert c.output is not None
            last = last_of_map(c.module, c.output)
            out = Point(c.path, "out", last)
            width = width_of(c.output, last)
            yield Site("embed", None, "embed", out, out, out, SiteInfo(width, width, 1, 0, len(self.blocks)))

    def _norms(self, tail: "FoundTail") -> Iterator[Site]:
        found = [
            (f"{path}.{name}".rstrip("."), m)
            for path in (*tail.norm, *tail.post)
            for name, m in self.backbone.get_submodule(path).named_modules()
            if is_norm(m) and getattr(m, "weight", None) is not None
        ]
        for path, module in found:
            width = len(module.weight)
            name = "norm" if len(found) == 1 else f"norm_{path.replace('.', '_')}"
            first = layout_of(module) != "first"
            fused = {"drop", "act"} <= {name for name, _ in module.named_children()}
            into = Point(path, "in", first)
            out = Point(f"{path}.drop", "in", first) if fused else Point(path, "out", first)
            yield Site("norm", None, name, into, out, into, SiteInfo(width, width, 1, 0, len(self.blocks)))


def _short_name(path: str, block: str) -> str:
    return path.removeprefix(f"{block}.").replace(".", "_")
