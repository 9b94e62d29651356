"""The search for a backbone's operations, by the table of anatomies."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from operator import attrgetter
from typing import Any, Literal, overload

from torch import nn

from restuning._types import Kernel, SiteInfo
from restuning.backbones.anatomy import AFFINE, BLOCK, PARTS, Affine, Anatomy, Point, Weight, as_tuple
from restuning.backbones.families import ANATOMIES
from restuning.errors import SiteError
from restuning.side.base import check_indices


@dataclass(frozen=True)
class Site:
    """An operation of one block, or of none (`embed`, `norm`): absolute paths in the backbone, and the port that a
    tuner there is built for. `name` tells it from every other site. weight: set where no module is called; the points
    are a name then."""

    op: str
    block: int | None
    name: str
    reads: Point
    writes: Point
    stream: Point
    info: SiteInfo
    weight: Weight | None = None

    def affine(self, backbone: nn.Module) -> Affine:
        """The affine map at a part, at `embed` or at `norm`, of a module or of none."""
        path = self.reads.path
        at = self.weight or Weight("", f"{path}.weight", f"{path}.bias")
        return Affine(attrgetter(at.weight)(backbone), None if at.bias is None else _reached(backbone, at.bias))


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """All sites of a backbone, block by block, and what its tail needs to know.

    stages: the layers at which stages end. stems: the modules that say the layers x_1 … x_L, the blocks as a rule, of
    which the first reads x_0. features: the port of every layer x_0 … x_L, as something that reads it and says as much.
    port: that of what the head reads. norm, post and pooler: the
    modules before and after pooling, and in its place.
    """

    anatomy: Anatomy
    blocks: tuple[str, ...]
    stages: tuple[int, ...]
    stems: tuple[str, ...]
    features: tuple[SiteInfo, ...]
    all: tuple[Site, ...]
    info: SiteInfo
    norm: tuple[str, ...]
    post: tuple[str, ...]
    pooler: str | None
    join: str | None
    pool: str
    prefix: int

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.op for site in self.all))

    @property
    def uniform(self) -> bool:
        """Whether all blocks are of one stage, so of one width and one number of tokens."""
        return len(self.stages) == 1

    def layer(self, layer: int) -> Point:
        """Where a layer can be seen: 0 is what the first stem reads, l what stem l says."""
        return Point(self.stems[max(layer - 1, 0)], "out" if layer else "in", self.anatomy.last)

    def at(self, op: str, blocks: Sequence[int] | None = None) -> tuple[Site, ...]:
        """The sites of one operation (`affine`: of all affine modules; or a module's own name, such as `query`), in all
        blocks or in those named; sites of no block are always among them.

        Raises SiteError for an operation or a block that is not there.
        """
        ops = AFFINE if op == "affine" and self.anatomy.parts else (op,)
        named = [s for s in self.all if s.op in ops] or [
            s for s in self.all if s.op in PARTS and s.reads.path.split(".")[-1] == op
        ]
        if not named:
            raise SiteError(f"no operation {op!r} here: {self.anatomy.name} has {', '.join(self.ops)}")
        check_indices(blocks, len(self.blocks), "block", "this backbone")
        return tuple(s for s in named if blocks is None or s.block is None or s.block in blocks)

    def __len__(self) -> int:
        return len(self.all)

    @overload
    def __getitem__(self, i: int) -> Site: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Site]: ...
    def __getitem__(self, i: int | slice) -> Site | Sequence[Site]:
        return self.all[i]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.all)


def find_sites(backbone: nn.Module, anatomy: Anatomy | None = None) -> Sites:
    """The sites of `backbone`, by the first row of ANATOMIES that fits, or by the one given.

    Raises SiteError if none fits, or if one fits in two places (a CLIP with both its towers: pass one of them).
    """
    rows = ANATOMIES if anatomy is None else (anatomy,)
    for row in rows:
        holders = _holders(backbone, row.blocks)
        found = [root for root, lists in holders.items() if _fits(backbone, root, lists, row)]
        if len(found) > 1:
            places = ", ".join(root or "the backbone itself" for root in found)
            raise SiteError(f"{row.name} fits in {len(found)} places ({places}): pass the one that is meant")
        if found:
            return _describe(backbone, found[0], holders[found[0]], row)
    looked = "; ".join(
        f"{row.name}: {row.blocks}.*.({', '.join(row.paths())}), {', '.join(as_tuple(row.norm))}" for row in rows
    )
    has = sorted({re.sub(r"\d+", "*", n) for n, _ in backbone.named_modules() if n})
    more = f" and {len(has) - 40} more" if len(has) > 40 else ""
    raise SiteError(
        f"no known anatomy fits {type(backbone).__name__}; looked for {looked}; the model has "
        f"{', '.join(has[:40])}{more}; describe it with restuning.Anatomy and pass anatomy="
    )


def layout_of(module: nn.Module) -> Literal["first", "last"] | None:
    """Where a module has the channels of a map, by its kind; None if that does not tell."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.GroupNorm) or type(part).__name__.endswith("2d"):  # torch's and timm's names
            return "first"
        if isinstance(part, nn.Linear | nn.LayerNorm):
            return "first" if part.__dict__.get("data_format") == "channels_first" else "last"
    return None


def _holders(backbone: nn.Module, blocks: str | tuple[str, ...]) -> dict[str, list[str]]:
    """Paths of the lists of blocks, in order, for every holder: wherever a path ends as a pattern says."""
    found: dict[str, list[str]] = {}
    for wanted in (pattern.split(".") for pattern in as_tuple(blocks)):
        for path, module in backbone.named_modules():
            names = path.split(".")
            root, own = names[: -len(wanted)], names[-len(wanted) :]
            if len(own) == len(wanted) and all(map(fnmatchcase, own, wanted)) and any(True for _ in module.children()):
                found.setdefault(".".join(root), []).append(path)
    return found


def _fits(backbone: nn.Module, root: str, lists: Sequence[str], row: Anatomy) -> bool:
    try:
        for block in (block for path in lists for block in backbone.get_submodule(path).children()):
            for path in filter(None, (*row.paths(), row.heads)):
                if "|" in path:
                    _first(block, path.split("|"))
                else:
                    attrgetter(path)(block)
            if not row.fits(block):
                return False
        holder = backbone.get_submodule(root)
        for path in (*as_tuple(row.norm), *as_tuple(row.post), *as_tuple(row.join)):
            holder.get_submodule(path)
        row.prefix(holder)
        row.pool(holder)
    except AttributeError:
        return False
    return True


def _first(block: nn.Module, paths: Sequence[str]) -> Any:
    """The first of them that a block has; AttributeError if it has none."""
    for path in paths[:-1]:
        with suppress(AttributeError):
            return attrgetter(path)(block)
    return attrgetter(paths[-1])(block)


def _describe(backbone: nn.Module, root: str, lists: Sequence[str], row: Anatomy) -> Sites:
    def tail(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
        there = [_join(root, path) for path in as_tuple(paths)]
        return tuple(path for path in there if not isinstance(backbone.get_submodule(path), nn.Identity))

    holder = backbone.get_submodule(root)
    children = [[_join(path, name) for name, _ in backbone.get_submodule(path).named_children()] for path in lists]
    blocks = tuple(path for stage in children for path in stage)
    norm, post = tail(row.norm), tail(row.post)
    grid = row.prefix(holder) if row.grid else None
    infos = [_info(backbone.get_submodule(path), row, i, len(blocks), grid) for i, path in enumerate(blocks)]
    stems, along = blocks, infos
    if row.stems:
        stems = tuple(path for stem in row.stems for path in _matching(backbone, _join(root, stem)))
        assert row.widths is not None
        widths = [row.widths(backbone.get_submodule(path)) for path in stems]
        along = [SiteInfo(reads, writes, 1, i, len(stems), None) for i, (reads, writes) in enumerate(widths)]
    said = [replace(info, in_features=info.out_features) for info in along]
    first = replace(along[0], out_features=along[0].in_features)
    return Sites(
        anatomy=row,
        blocks=blocks,
        stages=tuple(accumulate(map(len, children))),
        stems=stems,
        features=(first, *said),
        all=tuple(_sites(backbone, root, blocks, row, infos, (*norm, *post))),
        info=replace(said[-1], out_features=_widened(backbone, (*norm, *post), said[-1].out_features)),
        norm=norm,
        post=post,
        pooler=_join(root, row.pooler) if row.pooler is not None and row.pool(holder) == "map" else None,
        join=None if row.join is None else _join(root, row.join),
        pool=row.pool(holder),
        prefix=row.prefix(holder),
    )


def _matching(backbone: nn.Module, pattern: str) -> list[str]:
    wanted = pattern.split(".")
    paths = (path for path, _ in backbone.named_modules())
    return [path for path in paths if path.count(".") == len(wanted) - 1 and fnmatchcase(path, pattern)]


def _info(block: nn.Module, row: Anatomy, i: int, depth: int, grid: int | None) -> SiteInfo:
    width = len(_first(block, as_tuple(row.width)))
    reads = _first(block, row.reads).in_channels if row.reads else width
    heads = 1 if row.heads is None else int(attrgetter(row.heads)(block))
    return SiteInfo(reads, width, heads, i, depth, grid)


def _widened(backbone: nn.Module, tail: Sequence[str], width: int) -> int:
    """The width after the tail's modules."""
    for module in (m for path in tail for m in backbone.get_submodule(path).modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            width = len(module.weight)
    return width


_KINDS: dict[str, Callable[[Any], bool]] = {
    "conv": lambda m: isinstance(m, nn.Conv2d),
    "norms": lambda m: not isinstance(m, nn.PReLU) and getattr(getattr(m, "weight", None), "ndim", 0) == 1,
}


def _sites(
    backbone: nn.Module, root: str, blocks: Sequence[str], row: Anatomy, infos: Sequence[SiteInfo], tail: Sequence[str]
) -> Iterator[Site]:
    def module(path: str) -> Any:
        try:
            return backbone.get_submodule(path)
        except AttributeError:
            return None

    def last(path: str) -> bool:
        layout = layout_of(module(path)) if path not in blocks else None
        return row.last if layout is None else layout == "last"

    def part(op: str, block: int | None, name: str, path: str, weight: Weight | None = None) -> Site:
        affine: Any = module(path) if weight is None else Affine(attrgetter(weight.weight)(backbone), None)
        info = infos[block or 0]
        shape = () if getattr(affine, "weight", None) is None else affine.weight.shape
        writes = getattr(affine, "out_features", shape[0] if shape else info.out_features)
        reads = getattr(affine, "in_features", getattr(affine, "in_channels", writes))
        side = last(path) if weight is None else row.last
        if block is None:  # pixels or words are not tokens
            reads, read = writes, Point(path, "out", side)
        else:
            read = Point(path, "in", side)
        # a norm that holds its activation is affine up to where its dropout begins
        fused = weight is None and {"drop", "act"} <= {name for name, _ in affine.named_children()}
        said = Point(_join(path, "drop"), "in", side) if fused else Point(path, "out", side)
        kernel = kernel_of(affine) if block is not None and isinstance(affine, nn.Conv2d) else None
        here = replace(info, in_features=reads, out_features=writes, kernel=kernel)
        return Site(op, block, name, read, said, read, here, weight)

    def parts(role: str, candidates: Sequence[str | Weight], block: str) -> Iterator[tuple[str, str, Weight | None]]:
        """What tells them apart, their paths, and their weights where no module is called."""
        found: list[tuple[str, str, Weight | None]] = []
        for candidate in candidates:
            if isinstance(candidate, Weight):
                weight = _under(block, candidate)
                path = weight.weight.removesuffix(".weight")
                found.append((path.split(".")[-1], path, weight))
            elif candidate == "*":
                found += [(path.replace(".", "_"), _join(block, path), None) for path in kinds(block, role)]
            elif module(_join(block, candidate)) is not None:
                found.append((candidate, _join(block, candidate), None))
        short = [name.split(".")[-1] for name, _, _ in found]
        names = short if len({*short}) == len(short) else [name.replace(".", "_") for name, _, _ in found]
        apart = [f"_{name}" if len(found) > 1 else "" for name in names]
        return ((name, path, weight) for name, (_, path, weight) in zip(apart, found, strict=True))

    def kinds(path: str, role: str) -> list[str]:
        """All of a role's kind in it that have weights."""
        return [name for name, m in module(path).named_modules() if _KINDS[role](m)]

    if row.embed is not None and getattr(module(_join(root, row.embed)), "weight", None) is not None:
        yield part("embed", None, "embed", _join(root, row.embed))
    for i, block in enumerate(blocks):

        def at(point: Point, block: str = block) -> Point:
            path = _join(block, point.path)
            return Point(path, point.side, last(path))

        for op, where in {**row.ops, "block": BLOCK}.items():
            yield Site(op, i, f"{i}_{op}", at(where.reads), at(where.writes), at(where.stream or where.reads), infos[i])
        for attention in as_tuple(row.attention):
            call = Point(_join(block, attention), "in")
            apart = f"_{attention}" if len(as_tuple(row.attention)) > 1 else ""
            keys = infos[i]
            if row.keys is not None:
                heads, each = attrgetter(*row.keys)(backbone.get_submodule(block))
                keys = replace(keys, heads=heads, out_features=heads * each)
            yield Site("attention", i, f"{i}_attention{apart}", call, call, call, keys)
        for role, candidates in row.parts.items():
            for name, path, weight in parts(role, candidates, block):
                yield part(role, i, f"{i}_{role}{name}", path, weight)
    loose = row.loose(backbone.get_submodule(root)) if row.loose else {}
    for op, found in loose.items():
        for i, one in enumerate(found):
            reads, writes = (replace(at, path=_join(root, at.path)) for at in (one.op.reads, one.op.writes))
            yield Site(
                op, None, f"{op}_{i}", reads, writes, reads, SiteInfo(one.reads, one.writes, 1, i, len(found), None)
            )
    norms = [_join(path, name) for path in tail for name in kinds(path, "norms")]
    for path in norms:
        yield part("norm", None, "norm" if len(norms) == 1 else f"norm_{path.replace('.', '_')}", path)


def kernel_of(conv: nn.Conv2d) -> Kernel:
    """How a convolution reads its map; `padding` is None where that depends on the map."""
    fixed = conv.padding_mode == "zeros" and not type(conv).__name__.endswith("Same")
    padding = conv.padding if fixed else None
    return Kernel(conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)


def _under(block: str, weight: Weight) -> Weight:
    bias = None if weight.bias is None else _join(block, weight.bias)
    return Weight(_join(block, weight.owner), _join(block, weight.weight), bias)


def _reached(backbone: nn.Module, path: str) -> Any:
    """None where nothing has that name: norms without a bias have not even the name of one."""
    parent, _, name = path.rpartition(".")
    return getattr(backbone.get_submodule(parent), name, None)


def _join(*paths: str) -> str:
    return ".".join(filter(None, paths))
