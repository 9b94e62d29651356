"""The search for a backbone's operations, by the table of anatomies."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate
from operator import attrgetter
from typing import Any, Literal

from torch import nn

from restuning._types import Kernel, SiteInfo
from restuning.backbones.anatomy import BLOCK, Affine, Anatomy, Point, Weight, as_tuple
from restuning.backbones.families import ANATOMIES
from restuning.backbones.masks import check_mask
from restuning.backbones.site import Found as Found
from restuning.backbones.site import Site as Site
from restuning.backbones.site import Sites as Sites
from restuning.backbones.site import is_named
from restuning.errors import SiteError


def find_sites(
    backbone: nn.Module,
    anatomy: "Anatomy | Sites | None" = None,
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Sites:
    """The sites of a backbone, by the first row of ANATOMIES that fits, by the anatomy given, or as a trace finds them.

    Args:
        backbone: the frozen model; of a model with several towers, one of them.
        anatomy: how it is built, or sites that have been found already; None: the table, and where no row of it fits,
            one traced forward.
        inputs: keyword arguments of a forward to trace, three rows; None: as the backbone's own configuration says.

    Raises:
        SiteError: where a given anatomy does not fit, where one fits in two places (a CLIP with both its towers: pass
            one of them), or where a trace finds no blocks that hold most of the parameters.
    """
    if isinstance(anatomy, Sites):
        return anatomy
    rows = ANATOMIES if anatomy is None else (anatomy,)
    if inputs is None:
        for row in rows:
            holders = _holders(backbone, row.blocks)
            found = [root for root, lists in holders.items() if _fits(backbone, root, lists, row)]
            if len(found) > 1:
                places = ", ".join(root or "the backbone itself" for root in found)
                raise SiteError(
                    f"{row.name} fits in {len(found)} places ({places}): pass the one that is meant, or name its tower="
                )
            if found:
                sites = _describe(backbone, found[0], holders[found[0]], row)
                alone = _covers(backbone, sites) and not _blocks_beside(backbone, found[0])
                if anatomy is not None or sites.join is not None or alone:
                    if anatomy is None:
                        check_mask(backbone, found[0], row)
                    return sites
    if anatomy is None:
        from restuning.backbones.auto import find

        return find(backbone, inputs)
    has = sorted({re.sub(r"\d+", "*", n) for n, _ in backbone.named_modules() if n})
    more = f" and {len(has) - 40} more" if len(has) > 40 else ""
    raise SiteError(
        f"{anatomy.name} does not fit {type(backbone).__name__}; looked for {anatomy.blocks}.*."
        f"({', '.join(anatomy.paths())}), {', '.join(as_tuple(anatomy.norm))}; "
        f"the model has {', '.join(has[:40])}{more}"
    )


def tower_of(backbone: nn.Module, tower: str) -> nn.Module:
    """One tower of a model that has several. Raises SiteError for a path that is not there."""
    try:
        return backbone.get_submodule(tower)
    except AttributeError as error:
        has = ", ".join(name for name, _ in backbone.named_children())
        raise SiteError(f"no tower {tower!r} in {type(backbone).__name__}: it has {has}") from error


MOST = 0.6
"""The share of a backbone's parameters that a row of the table must hold, or it has found a part of another family."""


CLASSIFIERS = {"head", "heads", "fc", "classifier", "last_linear"}
"""Names under which a classifier stands."""


def _blocks_beside(backbone: nn.Module, root: str) -> bool:
    """Whether there are lists of blocks outside of where a row fits: another tower, or what reads this one."""
    for path, module in backbone.named_modules():
        inside = not root or path == root or path.startswith(f"{root}.") or root.startswith(f"{path}.")
        if isinstance(module, nn.ModuleList) and not inside:
            kinds = [type(child) for child in module if sum(p.ndim > 1 for p in child.parameters()) > 1]
            if len(kinds) > len({*kinds}):
                return True
    return False


def _covers(backbone: nn.Module, sites: Sites) -> bool:
    """Whether blocks, embedding and tail are most of a backbone; words and a classifier do not count."""
    paths = (*sites.blocks, *sites.norm, *sites.post, *(s.reads.path for s in sites.all if s.block is None))
    paths = (*paths, *((sites.pooler,) if sites.pooler else ()))
    embed = sites.anatomy.embed or " "
    paths = (*paths, *(path for path, _ in backbone.named_modules() if is_named(path, embed)))
    held = {id(p): p.numel() for path in paths for p in backbone.get_submodule(path).parameters()}
    total = {id(p): p.numel() for p in backbone.parameters()}
    for path, module in backbone.named_modules():
        head = isinstance(module, nn.Linear) and CLASSIFIERS & {*path.split(".")}
        if isinstance(module, nn.Embedding) or head:
            for p in module.parameters():
                if id(p) not in held:
                    total.pop(id(p), None)
    return sum(held.values()) >= MOST * sum(total.values())


def layout_of(module: nn.Module) -> Literal["first", "last"] | None:
    """Where a module has the channels of a map, by its kind; None if that does not tell."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.GroupNorm)) or type(part).__name__.endswith("2d"):  # torch's, timm's
            return "first"
        if isinstance(part, (nn.Linear, nn.LayerNorm)):
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
            for path in filter(None, (*row.paths(), row.heads, *(row.keys or ()))):
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
    except Exception:  # a configuration may refuse to say, in a way of its own
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
    outputs = [replace(info, in_features=info.out_features) for info in along]
    first = replace(along[0], out_features=along[0].in_features)
    return Sites(
        anatomy=row,
        blocks=blocks,
        stages=tuple(accumulate(map(len, children))),
        stems=stems,
        features=(first, *outputs),
        all=(*_sites(backbone, root, blocks, row, infos, (*norm, *post)), *words_of(backbone)),
        info=replace(outputs[-1], out_features=_widened(backbone, (*norm, *post), outputs[-1].out_features)),
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
            width = sides(module)[1]
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
        written = Point(_join(path, "drop"), "in", side) if fused else Point(path, "out", side)
        kernel = kernel_of(affine) if block is not None and isinstance(affine, nn.Conv2d) else None
        here = replace(info, in_features=reads, out_features=writes, kernel=kernel)
        return Site(op, block, name, read, written, read, here, weight)

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

    described: list[str] = []
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
                described.append(path)
                yield part(role, i, f"{i}_{role}{name}", path, weight)
    yield from _others(backbone, blocks, row, infos, {*described})
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


def is_linear(module: nn.Module) -> bool:
    """Whether it is one linear map of the last dimension, or one of the channels of a map."""
    weight = getattr(module, "weight", None)
    matrix = weight is not None and weight.ndim in (2, 4)
    return matrix and (isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D")


def sides(module: Any) -> tuple[int, int]:
    """Features that a linear map or a norm takes and gives."""
    weight = module.weight
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features  # a quantised weight may have another shape
    if weight.ndim == 1:
        return len(weight), len(weight)
    wide = weight.shape if type(module).__name__ == "Conv1D" else weight.shape[::-1]
    return int(wide[0]), int(wide[1])


def _others(
    backbone: nn.Module, blocks: Sequence[str], row: Anatomy, infos: Sequence[SiteInfo], described: set[str]
) -> Iterator[Site]:
    """Linear maps and convolutions in the blocks for which the row has no role."""
    for i, block in enumerate(blocks):
        for name, module in backbone.get_submodule(block).named_modules():
            path = _join(block, name)
            inside = any(path.startswith(f"{one}.") for one in described)  # of a part, or of nn.MultiheadAttention
            if (
                not is_linear(module)
                or path in described
                or inside
                or type(module).__name__.startswith("NonDynamically")
            ):
                continue
            reads, writes = sides(module)
            kernel = kernel_of(module) if isinstance(module, nn.Conv2d) else None
            last = layout_of(module) != "first"
            into, out = Point(path, "in", last), Point(path, "out", last)
            here = replace(infos[i], in_features=reads, out_features=writes, kernel=kernel)
            yield Site("linear", i, f"{i}_linear_{name.replace('.', '_')}", into, out, into, here)


def words_of(backbone: nn.Module) -> Iterator[Site]:
    """The tables in which words, positions and the like are looked up."""
    for path, module in backbone.named_modules():
        if isinstance(module, nn.Embedding):
            into, out = Point(path, "in"), Point(path, "out")
            here = SiteInfo(module.embedding_dim, module.embedding_dim, words=module.num_embeddings)
            yield Site("words", None, f"words_{path.replace('.', '_')}", into, out, into, here)


def kernel_of(conv: nn.Conv2d) -> Kernel:
    """How a convolution reads its map; `padding` is None where that depends on the map."""
    fixed = conv.padding_mode == "zeros" and not type(conv).__name__.endswith("Same")
    padding = conv.padding if fixed else None
    return Kernel(conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)


def _under(block: str, weight: Weight) -> Weight:
    bias = None if weight.bias is None else _join(block, weight.bias)
    return Weight(_join(block, weight.owner), _join(block, weight.weight), bias)


def _join(*paths: str) -> str:
    return ".".join(filter(None, paths))
