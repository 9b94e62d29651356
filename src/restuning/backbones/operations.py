"""The operations of a block, by what it computes: the sums that end them, the softmax or the maps inside them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from restuning.backbones.anatomy import Point
from restuning.backbones.modules import (
    convolves,
    depthwise,
    is_norm,
    last_of_map,
    passes,
    pointwise,
    tokens_in,
    width_of,
)
from restuning.backbones.sites import is_linear
from restuning.backbones.trace import Attended, Ran, Seen, Trace


@dataclass(frozen=True)
class Operation:
    """An operation of a block: where it reads and writes, and the calls during it."""

    op: str
    reads: Point
    writes: Point
    stream: Point
    width: tuple[int, int]
    calls: tuple[Ran, ...]
    attended: tuple[Attended, ...]


def operations_of(trace: Trace, ran: Ran) -> list["Operation"]:
    """The operations of one call of a block, in their order, each with a name."""
    return list(_Operations(trace).operations(ran))


def seen_at(runs: Sequence[Ran], point: Point) -> Seen:
    """The tensor at a point of one of some calls."""
    call = next(c for c in runs if (c.path, c.nth) == (point.path, point.call))
    seen = call.input if point.side == "in" else call.output
    assert seen is not None
    return seen


class _Operations:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def operations(self, ran: Ran) -> Iterator[Operation]:
        found = self._residuals(ran, False) or self._residuals(ran, True)
        if not found:
            return
        names = self._names(found, ran)
        for name, one in zip(names, found, strict=True):
            if name:
                yield replace(self._past_depthwise(one, ran) if name == "ffn" else one, op=name)

    def _past_depthwise(self, one: Operation, ran: Ran) -> Operation:
        """Where a depthwise convolution comes first, as in ConvNeXt, the feed-forward part begins after it."""
        maps = [c for c in one.calls if is_linear(c.module)]
        if not maps or not depthwise(maps[0].module):
            return one
        first = next(c for c in maps if pointwise(c.module))
        norms = [c for c in one.calls if is_norm(c.module) and maps[0].end < c.start and c.end < first.start]
        to = seen_at([*ran.within(), ran], one.writes)
        if first.input is None or not first.input.streams:
            return one
        reads = Point(first.path, "in", last_of_map(first.module, first.input), call=first.nth)
        if tokens_in(first.input, reads.last) != tokens_in(to, one.writes.last):
            return one
        stream = reads
        if norms and norms[-1].input is not None and norms[-1].input.streams:
            stream = Point(norms[-1].path, "in", last_of_map(norms[-1].module, norms[-1].input), call=norms[-1].nth)
        return replace(one, reads=reads, stream=stream, width=(width_of(first.input, reads.last), one.width[1]))

    def _names(self, found: Sequence[Operation], ran: Ran) -> list[str]:
        def maps_of(one: Operation) -> list[Ran]:
            return [c for c in one.calls if is_linear(c.module)]

        def feeds(one: Operation) -> bool:
            maps = [c.module for c in maps_of(one)]
            while maps and depthwise(maps[0]):
                maps = maps[1:]
            return len(maps) > 1 and pointwise(maps[0]) and pointwise(maps[-1])

        attends = [bool(one.attended) for one in found]
        names = ["mha" if a else "ffn" if feeds(one) else "" for a, one in zip(attends, found, strict=True)]
        if any(attends):
            started = attends.index(True)
            for i, name in enumerate(names):
                names[i] = "ffn" if not name and i > started and not convolves(maps_of(found[i])) else name
        elif len(found) > 1 and names[-1] == "ffn":
            names = ["mha", *("" for _ in found[2:]), "ffn"]
        elif len(found) == 1 and names == ["ffn"]:
            maps = [c.module for c in maps_of(found[0])]
            if any(depthwise(m) for m in maps[1:]):  # an inverted bottleneck is a block of convolutions
                names = [""]
        kept: dict[str, int] = {}
        for i, name in enumerate(names):
            if name == "mha" and attends[i] and "mha" in kept:
                names[i] = "cross" if "cross" not in kept else ""
            elif name == "ffn" and "ffn" in kept:
                names[kept["ffn"]] = ""
            kept[names[i]] = i
        return names

    def _residuals(self, ran: Ran, widened: bool) -> list[Operation]:
        """The operations that end in a sum with the residual stream. widened: whether the shortcut is mapped too."""
        source = self.trace.source
        stream = {source(t.tag) for t in (ran.ins if ran.input is None else [ran.input])}
        inner = list(ran.within())
        normed: dict[int, Ran] = {}
        pending: dict[int, tuple[Seen, Seen]] = {}
        found: list[Operation] = []
        sums = [s for s in self.trace.sums if ran.start < s[0] < ran.end]
        norms = [c for c in inner if is_norm(c.module) and c.input is not None and c.output is not None]
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
                assert event.input is not None and event.output is not None
                if source(event.input.tag) in stream:
                    stream.add(source(event.output.tag))
                    normed[source(event.output.tag)] = event
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
            elif widened and ran.output is not None and math.prod(c.shape) == math.prod(ran.output.shape):
                for y in (a, b):
                    one = self._operation(ran, inner, at, y, stream, normed)
                    if one is not None and one.attended:
                        found.append(one)
                stream.add(source(c.tag))
            else:
                pending[source(c.tag)] = (a, b)
        return found

    def _producer(self, inner: Sequence[Ran], y: Seen) -> Point | None:
        """Where a tensor is seen first: what a module output, or what goes into one."""
        source = self.trace.source
        output = [
            c for c in inner if c.output is not None and source(c.output.tag) == source(y.tag) and c.output.streams
        ]
        output = [c for c in output if not passes(c.module)]
        if output:
            one = min(output, key=lambda c: c.end)
            assert one.output is not None
            return Point(one.path, "out", last_of_map(one.module, one.output), call=one.nth)
        read = [c for c in inner if c.input is not None and source(c.input.tag) == source(y.tag) and c.input.streams]
        if read:
            one = min(read, key=lambda c: c.start)
            assert one.input is not None
            return Point(one.path, "in", last_of_map(one.module, one.input), call=one.nth)
        return None

    def _operation(
        self, ran: Ran, inner: Sequence[Ran], at: int, y: Seen, stream: set[int], normed: Mapping[int, Ran]
    ) -> Operation | None:
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
        writes = self._producer(inner, y)
        near = [(y.tag, 0)]
        while near and writes is None:  # a product with a bare parameter: what it is a product of
            tag, steps = near.pop(0)
            for parent in sorted(self.trace.parents.get(tag, ()), reverse=True):
                like = Seen(parent, y.shape, True)
                writes = writes or (self._producer(inner, like) if parent in before else None)
                if steps < 3:
                    near.append((parent, steps + 1))
        if writes is None:
            return None
        to = seen_at(inner, writes)
        entry = max(ends, key=lambda tag: (tag in normed, tag))
        maps = [c for c in calls if is_linear(c.module)]
        reads = self._reads(ran, inner, at, entry, calls, normed, to, writes)
        width = (width_of(seen_at([*inner, ran], reads), reads.last), width_of(to, writes.last))
        norm = normed.get(entry)
        stream_at = reads
        if norm is not None and norm.input is not None and norm.input.streams and reads != writes:
            stream_at = Point(norm.path, "in", last_of_map(norm.module, norm.input), call=norm.nth)
        before_norm = [norm] if norm is not None else []
        return Operation(
            "", reads, writes, stream_at, width, tuple(before_norm + calls if maps or calls else ()), attended
        )

    @staticmethod
    def _time(inner: Sequence[Ran], point: Point, ran: Ran) -> int:
        call = next(c for c in (*inner, ran) if (c.path, c.nth) == (point.path, point.call))
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
        n = tokens_in(to, writes.last)
        names = {c.path for c in calls}
        points = [
            (c.input, Point(c.path, "in", last_of_map(c.module, c.input), call=c.nth))
            for c in inner
            if c.input is not None and source(c.input.tag) == entry and c.path in names and not is_norm(c.module)
        ]
        if (norm := normed.get(entry)) is not None:
            assert norm.output is not None and norm.input is not None
            points.append((norm.output, Point(norm.path, "out", last_of_map(norm.module, norm.output), call=norm.nth)))
            points.append((norm.input, Point(norm.path, "in", last_of_map(norm.module, norm.input), call=norm.nth)))
        if ran.input is not None:
            points.append((ran.input, Point(ran.path, "in", last_of_map(ran.module, ran.input), call=ran.nth)))
        for seen, point in points:
            if self._time(inner, point, ran) > self._time(inner, writes, ran):
                continue
            if seen.streams and (tokens_in(seen, point.last) == n or len(seen.shape) == len(to.shape) == 4):
                return point
        return writes
