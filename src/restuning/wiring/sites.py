"""Where a backbone's operations read and write: one table of anatomies, and the search for them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """An operation is a pair: where it reads, and where what it says can be added to.

    stream: where the residual stream goes in, before the block's norm; None: where the operation reads.
    """

    reads: Point
    writes: Point
    stream: Point | None = None


@dataclass(frozen=True)
class Weight:
    """An affine map that no module is called for: while `owner` runs, its `weight` is handed to torch's functions.

    bias: its path; None: there is none, or the owner puts it together.
    """

    owner: str
    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class Affine:
    """The parameters of an affine map: weight (out, in) or (out,), and bias (out,)."""

    weight: Any
    bias: Any

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[-1])

    @property
    def out_features(self) -> int:
        return len(self.weight)


PARTS = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
AFFINE = ("embed", *PARTS, "norm")

BLOCK = Op(into(""), out_of(""))  # the block itself: reads the stream, writes the stream


def _cls(_: Any) -> str:
    return "cls"


def _one(_: Any) -> int:
    return 1


def _any(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Anatomy:
    """How a family of backbones is built. Paths in `ops`, `parts`, `attention`, `width` and `heads` are relative to a
    block, `embed`, `norm` and `post` to the module that holds `blocks`.

    blocks: the list of blocks. ops: operation → Op (`block` is always there). parts: the affine modules inside a
    block, by role (`norm1`, `qkv`, `proj`, `norm2`, `fc1`, `fc2`); each of the paths that a block has is a site that
    reads what goes into the module and writes what comes out; a `Weight` is one where no module is called. attention:
    the module inside which softmax(QKᵀ)V is called. width: a parameter of a block whose last size is the width d.
    heads: an attribute of a block, the number of attention heads; none: 1 head. keys: two attributes of a block, the
    heads of its keys and the width of each, where queries share keys (grouped-query attention). has: whether a block
    has what else the row needs. embed: the affine module that makes the first tokens. norm: the final norm, before
    pooling; post: a norm after pooling; pooler: the module that pools tokens (b, n, d) into (b, d), if the backbone has
    one. pool and prefix: the backbone's own pooling (`cls`, `mean`, `last` or `map`, the pooler's) and its number of
    tokens before the patches, read off the module that holds `blocks`. grid: whether the tokens after the prefix are a
    grid of patches.
    """

    name: str
    blocks: str
    ops: Mapping[str, Op]
    width: str
    heads: str | None = None
    keys: tuple[str, str] | None = None
    parts: Mapping[str, tuple[str | Weight, ...]] = field(default_factory=dict)
    attention: str | None = None
    has: Callable[[Any], bool] = field(default=_any)
    embed: str | None = None
    norm: str | None = None
    post: str | None = None
    pooler: str | None = None
    pool: Callable[[Any], str] = field(default=_cls)
    prefix: Callable[[Any], int] = field(default=_one)
    grid: bool = False

    def paths(self) -> list[str]:
        """What a block must have."""
        points = {p.path for op in self.ops.values() for p in (op.reads, op.writes, op.stream) if p}
        weights = {c.weight for found in self.parts.values() for c in found if isinstance(c, Weight)}
        return sorted(points | weights | {self.width})


def _timm_pool(root: Any) -> str:
    if root.global_pool == "map" and root.num_prefix_tokens and not getattr(root, "pool_include_prefix", True):
        return "map of the patches alone"
    return {"token": "cls", "avg": "mean"}.get(root.global_pool, str(root.global_pool))


_HF_PARTS = {
    "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "proj": ("attention.o_proj",),
    "fc1": ("mlp.fc1", "mlp.weights_in"),
    "fc2": ("mlp.fc2", "mlp.weights_out"),
}
_HF_4_ATTENTION = {
    "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "proj": ("attention.output.dense",),
}
_DINOV2 = Anatomy(
    "transformers 5 DINOv2",
    blocks="encoder.layer",
    ops={
        "mha": Op(into("attention"), out_of("layer_scale1"), into("norm1")),
        "ffn": Op(into("mlp"), out_of("layer_scale2"), into("norm2")),
    },
    parts={"norm1": ("norm1",), "norm2": ("norm2",), **_HF_PARTS},
    attention="attention",
    width="norm1.weight",
    heads="attention.num_attention_heads",
    embed="embeddings.patch_embeddings.projection",
    norm="layernorm",
    grid=True,
)
_DINOV2_4 = replace(
    _DINOV2,
    name="transformers 4 DINOv2",
    parts={**_DINOV2.parts, **_HF_4_ATTENTION},
    attention="attention.attention",
    heads="attention.attention.num_attention_heads",
)


def _map_or_mean(root: Any) -> str:
    return "map" if root.use_head else "mean"


def _open_clip_pool(root: Any) -> str:
    if root.attn_pool is not None or (root.pool_type == "avg" and root.final_ln_after_pool):
        return "attentional, or before the norm"
    return {"tok": "cls", "avg": "mean"}.get(root.pool_type, str(root.pool_type))


def _last(_: Any) -> str:
    return "last"


def _zero(_: Any) -> int:
    return 0


def _batch_first(attention: str) -> Callable[[Any], bool]:
    return attrgetter(f"{attention}.batch_first")


def _in_and_out(attention: str) -> dict[str, tuple[Weight, ...]]:
    """The maps of nn.MultiheadAttention."""
    return {
        role: (Weight(attention, f"{attention}.{name}weight", f"{attention}.{name}bias"),)
        for role, name in (("qkv", "in_proj_"), ("proj", "out_proj."))
    }


def _with_registers(row: Anatomy) -> Anatomy:
    return replace(
        row,
        name=f"{row.name} with registers",
        prefix=lambda root: 1 + int(root.config.num_register_tokens),
    )


_TIMM = Anatomy(  # the input of drop_path is the one point after both forms of LayerScale (module, bare parameter)
    "timm ViT, DeiT, DINOv2, EVA",
    blocks="blocks",
    ops={
        "mha": Op(into("attn"), into("drop_path1"), into("norm1")),
        "ffn": Op(into("mlp"), into("drop_path2"), into("norm2")),
    },
    parts={
        "norm1": ("norm1",),
        "qkv": ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "proj": ("attn.proj",),
        "norm2": ("norm2",),
        "fc1": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x"),
        "fc2": ("mlp.fc2",),
    },
    attention="attn",
    width="norm1.weight",
    heads="attn.num_heads",
    embed="patch_embed.proj",
    norm="norm",
    post="fc_norm",
    pooler="attn_pool",
    pool=_timm_pool,
    prefix=attrgetter("num_prefix_tokens"),
    grid=True,
)
_CLIP = Anatomy(
    "transformers CLIP vision",
    blocks="encoder.layers",
    ops={
        "mha": Op(into("self_attn"), out_of("self_attn.out_proj"), into("layer_norm1")),
        "ffn": Op(into("mlp"), out_of("mlp"), into("layer_norm2")),
    },
    parts={
        "norm1": ("layer_norm1",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "proj": ("self_attn.out_proj",),
        "norm2": ("layer_norm2",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    },
    attention="self_attn",
    width="layer_norm1.weight",
    heads="self_attn.num_heads",
    embed="embeddings.patch_embedding",
    norm="post_layernorm",
    grid=True,
)
_OPEN_CLIP = Anatomy(
    "open_clip vision",
    blocks="transformer.resblocks",
    ops={
        "mha": Op(into("attn"), out_of("ls_1"), into("ln_1")),
        "ffn": Op(into("mlp"), out_of("ls_2"), into("ln_2")),
    },
    parts={
        "norm1": ("ln_1",),
        **_in_and_out("attn"),
        "norm2": ("ln_2",),
        "fc1": ("mlp.c_fc",),
        "fc2": ("mlp.c_proj",),
    },
    attention="attn",
    width="ln_1.weight",
    heads="attn.num_heads",
    has=_batch_first("attn"),
    embed="conv1",
    norm="ln_post",
    pool=_open_clip_pool,
    grid=True,
)
_LLAMA = Anatomy(
    "transformers Llama, Mistral, Qwen, Phi-3",
    blocks="layers",
    ops={
        "mha": Op(into("self_attn"), out_of("self_attn.o_proj"), into("input_layernorm")),
        "ffn": Op(into("mlp"), out_of("mlp"), into("post_attention_layernorm")),
    },
    parts={
        "norm1": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
        "proj": ("self_attn.o_proj",),
        "norm2": ("post_attention_layernorm",),
        "fc1": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
        "fc2": ("mlp.down_proj",),
    },
    attention="self_attn",
    width="input_layernorm.weight",
    heads="self_attn.config.num_attention_heads",
    keys=("self_attn.config.num_key_value_heads", "self_attn.head_dim"),
    norm="norm",
    pool=_last,
    prefix=_zero,
)


ANATOMIES: tuple[Anatomy, ...] = (
    replace(  # BEiT too: the weight is used with a bias that is put together on the spot
        _TIMM,
        name="timm EVA, BEiT",
        parts={**_TIMM.parts, "qkv": (Weight("attn", "attn.qkv.weight"),)},
        has=lambda block: block.attn.qkv is not None and block.attn.q_bias is not None,
    ),
    _TIMM,
    _OPEN_CLIP,
    replace(
        _OPEN_CLIP,
        name="torchvision ViT",
        blocks="encoder.layers",
        ops={
            "mha": Op(into("self_attention"), out_of("dropout"), into("ln_1")),
            "ffn": Op(into("mlp"), out_of("mlp"), into("ln_2")),
        },
        parts={
            **_OPEN_CLIP.parts,
            **_in_and_out("self_attention"),
            "fc1": ("mlp.0",),
            "fc2": ("mlp.3",),
        },
        attention="self_attention",
        heads="self_attention.num_heads",
        has=_batch_first("self_attention"),
        embed="conv_proj",
        norm="encoder.ln",
        pool=_cls,
    ),
    Anatomy(
        "transformers 5 ViT",
        blocks="layers",
        ops={
            "mha": Op(into("attention"), out_of("attention.o_proj"), into("layernorm_before")),
            "ffn": Op(into("mlp"), out_of("mlp"), into("layernorm_after")),
        },
        parts={"norm1": ("layernorm_before",), "norm2": ("layernorm_after",), **_HF_PARTS},
        attention="attention",
        width="layernorm_before.weight",
        heads="attention.num_attention_heads",
        embed="embeddings.patch_embeddings.projection",
        norm="layernorm",
        grid=True,
    ),
    Anatomy(
        "transformers 4 ViT",
        blocks="encoder.layer",
        ops={
            "mha": Op(into("attention"), out_of("attention.output.dense"), into("layernorm_before")),
            "ffn": Op(into("intermediate"), out_of("output.dense"), into("layernorm_after")),
        },
        parts={
            "norm1": ("layernorm_before",),
            "norm2": ("layernorm_after",),
            **_HF_4_ATTENTION,
            "fc1": ("intermediate.dense",),
            "fc2": ("output.dense",),
        },
        attention="attention.attention",
        width="layernorm_before.weight",
        heads="attention.attention.num_attention_heads",
        embed="embeddings.patch_embeddings.projection",
        norm="layernorm",
        grid=True,
    ),
    _with_registers(_DINOV2),
    _with_registers(_DINOV2_4),
    _DINOV2,
    _DINOV2_4,
    replace(
        _with_registers(_DINOV2),
        name="transformers 5 DINOv3",
        blocks="model.layer",
        parts={**_DINOV2.parts, "fc1": ("mlp.up_proj", "mlp.gate_proj"), "fc2": ("mlp.down_proj",)},
        heads="attention.num_heads",
        embed="embeddings.patch_embeddings",
        norm="norm",
    ),
    replace(
        _CLIP,
        name="transformers SigLIP vision",
        pooler="head",
        pool=_map_or_mean,
        prefix=_zero,
    ),
    _CLIP,
    replace(  # norms after the operations too: what these say is added to after them
        _LLAMA,
        name="transformers Gemma 2 and 3",
        ops={
            "mha": Op(into("self_attn"), out_of("post_attention_layernorm"), into("input_layernorm")),
            "ffn": Op(into("mlp"), out_of("post_feedforward_layernorm"), into("pre_feedforward_layernorm")),
        },
        parts={**_LLAMA.parts, "norm2": ("pre_feedforward_layernorm",)},
    ),
    _LLAMA,
    Anatomy(  # post-norm: the residual is added inside attention.output and output, and there is no final norm
        "transformers BERT, RoBERTa, MiniLM",
        blocks="encoder.layer",
        prefix=_zero,  # the mean of a text is that of all its tokens
        ops={
            "mha": Op(into("attention"), out_of("attention.output.dense")),
            "ffn": Op(into("intermediate"), out_of("output.dense")),
        },
        parts={
            "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
            "proj": ("attention.output.dense",),
            "norm1": ("attention.output.LayerNorm",),
            "fc1": ("intermediate.dense",),
            "fc2": ("output.dense",),
            "norm2": ("output.LayerNorm",),
        },
        attention="attention.self",
        width="output.LayerNorm.weight",
        heads="attention.self.num_attention_heads",
        embed="embeddings.LayerNorm",
    ),
)


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
    port: Port
    weight: Weight | None = None

    def affine(self, backbone: nn.Module) -> Affine:
        """The affine map at a part, at `embed` or at `norm`, of a module or of none."""
        path = self.writes.path
        at = self.weight or Weight("", f"{path}.weight", f"{path}.bias")
        return Affine(attrgetter(at.weight)(backbone), None if at.bias is None else _reached(backbone, at.bias))


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """All sites of a backbone, block by block, and what its tail needs to know."""

    anatomy: Anatomy
    blocks: tuple[str, ...]
    all: tuple[Site, ...]
    port: Port
    norm: str | None
    post: str | None
    pooler: str | None
    pool: str
    prefix: int

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.op for site in self.all))

    def at(self, op: str, blocks: Sequence[int] | None = None) -> tuple[Site, ...]:
        """The sites of one operation (`affine`: of all affine modules; or a module's own name, such as `query`), in all
        blocks or in those named; sites of no block are always among them.

        Raises SiteError for an operation or a block that is not there.
        """
        ops = AFFINE if op == "affine" and self.anatomy.parts else (op,)
        named = [s for s in self.all if s.op in ops or (s.op in PARTS and s.writes.path.split(".")[-1] == op)]
        if not named:
            raise SiteError(f"no operation {op!r} here: {self.anatomy.name} has {', '.join(self.ops)}")
        wrong = [i for i in blocks or () if not 0 <= i < len(self.blocks)]
        if wrong or (blocks is not None and not blocks):
            raise SiteError(f"no block {wrong or '(empty list)'}: this backbone has blocks 0 to {len(self.blocks) - 1}")
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
            for path in (*row.paths(), row.heads):
                attrgetter(path)(block) if path else None
            if not row.has(block):
                return False
        holder = backbone.get_submodule(root)
        for path in filter(None, (row.norm, row.post)):
            holder.get_submodule(path)
        row.prefix(holder), row.pool(holder)
    except AttributeError:
        return False
    return True


def _describe(backbone: nn.Module, root: str, row: Anatomy) -> Sites:
    def under(path: str | None) -> str | None:
        return None if path is None else _join(root, path)

    holder = backbone.get_submodule(root)
    blocks = tuple(_join(root, row.blocks, name) for name, _ in holder.get_submodule(row.blocks).named_children())
    first = backbone.get_submodule(blocks[0])
    width = int(attrgetter(row.width)(first).shape[-1])
    heads = 1 if row.heads is None else int(attrgetter(row.heads)(first))
    port = Port(width, width, heads, depth=len(blocks), grid=row.prefix(holder) if row.grid else None)
    return Sites(
        anatomy=row,
        blocks=blocks,
        all=tuple(_sites(backbone, root, blocks, row, port)),
        port=port,
        norm=under(row.norm),
        post=under(row.post),
        pooler=under(row.pooler) if row.pool(holder) == "map" else None,
        pool=row.pool(holder),
        prefix=row.prefix(holder),
    )


def _sites(backbone: nn.Module, root: str, blocks: Sequence[str], row: Anatomy, port: Port) -> Iterator[Site]:
    def module(path: str) -> nn.Module | None:
        try:
            return backbone.get_submodule(path)
        except AttributeError:
            return None

    def part(op: str, block: int | None, name: str, path: str, weight: Weight | None = None) -> Site:
        affine = module(path) if weight is None else Affine(attrgetter(weight.weight)(backbone), None)
        here = replace(
            port,
            reads=getattr(affine, "in_features", port.reads),
            writes=getattr(affine, "out_features", port.writes),
            block=block or 0,
        )
        reads = into(path) if block is not None else out_of(path)  # of no block: pixels or words are not tokens
        return Site(op, block, name, reads, out_of(path), reads, here, weight)

    if row.embed is not None and module(_join(root, row.embed)) is not None:
        yield part("embed", None, "embed", _join(root, row.embed))
    for i, block in enumerate(blocks):
        here = replace(port, block=i)

        def at(point: Point, block: str = block) -> Point:
            return Point(_join(block, point.path), point.side)

        for op, where in {**row.ops, "block": BLOCK}.items():
            yield Site(op, i, f"{i}_{op}", at(where.reads), at(where.writes), at(where.stream or where.reads), here)
        if row.attention is not None:
            call = Point(_join(block, row.attention), "in")
            keys = here
            if row.keys is not None:
                heads, each = attrgetter(*row.keys)(backbone.get_submodule(block))
                keys = replace(here, heads=heads, writes=heads * each)
            yield Site("attention", i, f"{i}_attention", call, call, call, keys)
        for role, candidates in row.parts.items():
            found = [c for c in candidates if isinstance(c, Weight) or module(_join(block, c)) is not None]
            for candidate in found:
                weight = _under(block, candidate) if isinstance(candidate, Weight) else None
                path = _join(block, str(candidate)) if weight is None else weight.weight.removesuffix(".weight")
                name = f"{i}_{role}" if len(found) == 1 else f"{i}_{role}_{path.split('.')[-1]}"
                yield part(role, i, name, path, weight)
    final = [_join(root, path) for path in (row.norm, row.post) if path is not None]
    for path in [path for path in final if not isinstance(module(path), nn.Identity)][:1]:
        yield part("norm", None, "norm", path)


def _under(block: str, weight: Weight) -> Weight:
    bias = None if weight.bias is None else _join(block, weight.bias)
    return Weight(_join(block, weight.owner), _join(block, weight.weight), bias)


def _reached(backbone: nn.Module, path: str) -> Any:
    """None where nothing has that name: norms without a bias have not even the name of one."""
    parent, _, name = path.rpartition(".")
    return getattr(backbone.get_submodule(parent), name, None)


def _join(*paths: str) -> str:
    return ".".join(filter(None, paths))
