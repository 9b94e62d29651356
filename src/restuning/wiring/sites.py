"""Where a backbone's operations read and write: one table of anatomies, and the search for them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, overload

from torch import nn

from restuning._types import Port
from restuning.errors import SiteError


@dataclass(frozen=True)
class Point:
    """One side of a module's call: the first argument going in, or the (first) tensor coming out."""

    path: str
    side: Literal["in", "out"]


def into(path: str) -> Point:
    return Point(path, "in")


def out_of(path: str) -> Point:
    return Point(path, "out")


@dataclass(frozen=True)
class Op:
    """An operation is a pair: where it reads, and where what it says can be added to."""

    reads: Point
    writes: Point


BLOCK = Op(into(""), out_of(""))  # the block itself: reads the stream, writes the stream


def _cls(_: Any) -> str:
    return "cls"


def _one(_: Any) -> int:
    return 1


@dataclass(frozen=True)
class Anatomy:
    """How a family of backbones is built. Paths in `ops`, `width` and `heads` are relative to a block, `norm` and
    `post` to the module that holds `blocks`.

    blocks: the list of blocks. ops: operation → Op (`block` is always there). width: a parameter of a block whose
    last size is the width d. heads: an attribute of a block, the number of attention heads; none: 1 head.
    norm: the final norm, before pooling; post: a norm after pooling. pool and prefix: the backbone's own pooling
    (`cls` or `mean`) and its number of tokens before the patches, read off the module that holds `blocks`.
    """

    name: str
    blocks: str
    ops: Mapping[str, Op]
    width: str
    heads: str | None = None
    norm: str | None = None
    post: str | None = None
    pool: Callable[[Any], str] = field(default=_cls)
    prefix: Callable[[Any], int] = field(default=_one)

    def paths(self) -> list[str]:
        """The modules that a block must have."""
        return sorted({p.path for op in self.ops.values() for p in (op.reads, op.writes)} | {self.width})


def _timm_pool(root: Any) -> str:
    return {"token": "cls", "avg": "mean"}.get(root.global_pool, str(root.global_pool))


ANATOMIES: tuple[Anatomy, ...] = (
    Anatomy(  # the input of drop_path is the one point after both forms of LayerScale (module, bare parameter)
        "timm ViT, DeiT, DINOv2, EVA",
        blocks="blocks",
        ops={"mha": Op(into("attn"), into("drop_path1")), "ffn": Op(into("mlp"), into("drop_path2"))},
        width="norm1.weight",
        heads="attn.num_heads",
        norm="norm",
        post="fc_norm",
        pool=_timm_pool,
        prefix=attrgetter("num_prefix_tokens"),
    ),
    Anatomy(
        "transformers 5 ViT",
        blocks="layers",
        ops={"mha": Op(into("attention"), out_of("attention.o_proj")), "ffn": Op(into("mlp"), out_of("mlp"))},
        width="layernorm_before.weight",
        heads="attention.num_attention_heads",
        norm="layernorm",
    ),
    Anatomy(
        "transformers 4 ViT",
        blocks="encoder.layer",
        ops={
            "mha": Op(into("attention"), out_of("attention.output.dense")),
            "ffn": Op(into("intermediate"), out_of("output.dense")),
        },
        width="layernorm_before.weight",
        heads="attention.attention.num_attention_heads",
        norm="layernorm",
    ),
    Anatomy(
        "transformers DINOv2 with registers",
        blocks="encoder.layer",
        ops={"mha": Op(into("attention"), out_of("layer_scale1")), "ffn": Op(into("mlp"), out_of("layer_scale2"))},
        width="norm1.weight",
        heads="attention.num_attention_heads",
        norm="layernorm",
        prefix=lambda root: 1 + int(root.config.num_register_tokens),
    ),
    Anatomy(
        "transformers DINOv2",
        blocks="encoder.layer",
        ops={"mha": Op(into("attention"), out_of("layer_scale1")), "ffn": Op(into("mlp"), out_of("layer_scale2"))},
        width="norm1.weight",
        heads="attention.num_attention_heads",
        norm="layernorm",
    ),
    Anatomy(
        "transformers CLIP vision",
        blocks="encoder.layers",
        ops={"mha": Op(into("self_attn"), out_of("self_attn.out_proj")), "ffn": Op(into("mlp"), out_of("mlp"))},
        width="layer_norm1.weight",
        heads="self_attn.num_heads",
        norm="post_layernorm",
    ),
    Anatomy(  # post-norm: the residual is added inside attention.output and output, and there is no final norm
        "transformers BERT, RoBERTa, MiniLM",
        blocks="encoder.layer",
        ops={
            "mha": Op(into("attention"), out_of("attention.output.dense")),
            "ffn": Op(into("intermediate"), out_of("output.dense")),
        },
        width="output.LayerNorm.weight",
        heads="attention.self.num_attention_heads",
    ),
)


@dataclass(frozen=True)
class Site:
    """An operation of one block: absolute paths in the backbone, and the port that a tuner there is built for."""

    op: str
    block: int
    reads: Point
    writes: Point
    port: Port


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """All sites of a backbone, block by block, and what its tail needs to know."""

    anatomy: Anatomy
    blocks: tuple[str, ...]
    port: Port
    norm: str | None
    post: str | None
    pool: str
    prefix: int

    @property
    def ops(self) -> tuple[str, ...]:
        return (*self.anatomy.ops, "block")

    @property
    def all(self) -> tuple[Site, ...]:
        def at(block: str, point: Point) -> Point:
            return Point(".".join(filter(None, (block, point.path))), point.side)

        ops = {**self.anatomy.ops, "block": BLOCK}
        return tuple(
            Site(name, i, at(block, op.reads), at(block, op.writes), self.port)
            for i, block in enumerate(self.blocks)
            for name, op in ops.items()
        )

    def at(self, op: str, blocks: Sequence[int] | None = None) -> tuple[Site, ...]:
        """The sites of one operation, in all blocks or in those named. Raises SiteError for one that is not there."""
        if op not in self.ops:
            raise SiteError(f"unknown operation {op!r}: {self.anatomy.name} has {', '.join(self.ops)}")
        wrong = [i for i in blocks or () if not 0 <= i < len(self.blocks)]
        if wrong or (blocks is not None and not blocks):
            raise SiteError(f"no block {wrong or '(empty list)'}: this backbone has blocks 0 to {len(self.blocks) - 1}")
        return tuple(s for s in self.all if s.op == op and (blocks is None or s.block in blocks))

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
        found = [root for root, blocks in _lists(backbone, row.blocks) if _fits(backbone, root, blocks, row)]
        if len(found) > 1:
            places = ", ".join(root or "the backbone itself" for root in found)
            raise SiteError(f"{row.name} fits in {len(found)} places ({places}): pass the one that is meant")
        if found:
            return _describe(backbone, found[0], row)
    looked = "; ".join(f"{row.name}: {row.blocks}.*.({', '.join(row.paths())}), {row.norm}" for row in rows)
    has = sorted({re.sub(r"\d+", "*", n) for n, _ in backbone.named_modules() if n})
    more = f" and {len(has) - 40} more" if len(has) > 40 else ""
    raise SiteError(
        f"no known anatomy fits {type(backbone).__name__}; looked for {looked}; the model has "
        f"{', '.join(has[:40])}{more}; describe it with restuning.Anatomy and pass anatomy="
    )


def _lists(backbone: nn.Module, blocks: str) -> Iterator[tuple[str, nn.Module]]:
    """(path of the holder, list of blocks) wherever a non-empty list of that name is found."""
    for path, module in backbone.named_modules():
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
        if listed and (path == blocks or path.endswith("." + blocks)):
            yield path.removesuffix(blocks).removesuffix("."), module


def _fits(backbone: nn.Module, root: str, blocks: nn.Module, row: Anatomy) -> bool:
    try:
        for block in blocks.children():
            for path in row.paths():
                attrgetter(path)(block) if path else None
        holder = backbone.get_submodule(root)
        for path in filter(None, (row.norm, row.post)):
            holder.get_submodule(path)
        row.prefix(holder)
    except AttributeError:
        return False
    return True


def _describe(backbone: nn.Module, root: str, row: Anatomy) -> Sites:
    def under(path: str | None) -> str | None:
        return None if path is None else ".".join(filter(None, (root, path)))

    holder = backbone.get_submodule(root)
    blocks = [name for name, _ in holder.get_submodule(row.blocks).named_children()]
    first = holder.get_submodule(f"{row.blocks}.{blocks[0]}")
    width = int(attrgetter(row.width)(first).shape[-1])
    heads = 1 if row.heads is None else int(attrgetter(row.heads)(first))
    return Sites(
        anatomy=row,
        blocks=tuple(f"{under(row.blocks)}.{name}" for name in blocks),
        port=Port(width, width, heads),
        norm=under(row.norm),
        post=under(row.post),
        pool=row.pool(holder),
        prefix=row.prefix(holder),
    )
