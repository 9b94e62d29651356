"""Where a backbone's operations read and write: one table of anatomies, and the search for them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from operator import attrgetter
from typing import Any, Literal, overload

from torch import nn

from restuning._types import Kernel, Port
from restuning.errors import SiteError


@dataclass(frozen=True)
class Point:
    """One side of a module's call: the first argument going in, or the (first) tensor coming out.

    last: a map there is (b, h, w, d), and not (b, d, h, w).
    """

    path: str
    side: Literal["in", "out"]
    last: bool = False


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


PARTS = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2", "conv", "norms")
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
    """How a family of backbones is built. Paths in `ops`, `parts`, `attention`, `width`, `reads`, `heads` and `has` are
    relative to a block, `embed`, `norm` and `post` to the module that holds `blocks`.

    blocks: the list of blocks, or a pattern of several, one for each stage (`stages.*.blocks`, `layer[1-9]`).
    ops: operation → Op (`block` is always there). parts: the affine modules inside a block, by role (`norm1`, `qkv`,
    `proj`, `norm2`, `fc1`, `fc2`, `conv`, `norms`); each of the paths that a block has is a site that reads what goes
    into the module and writes what comes out; `*`: all convolutions (`conv`) or all norms (`norms`) of a block; a
    `Weight`: where no module is called. attention: the module inside which softmax(QKᵀ)V is called. width: a parameter
    of a block whose first size is the width d that it writes; reads: a convolution that reads what the block reads,
    where that may be another width; of several, the first that a block has. heads: an attribute of a block, the number
    of attention heads; none: 1 head. keys: two attributes of a block, the heads of its keys and the width of each,
    where queries share keys (grouped-query attention). has: what else a block must have; fits: what else is asked of
    it. embed: the affine module that makes the first tokens. norm: the final norm, or several modules, before pooling;
    post: those after pooling; pooler: the module that pools tokens (b, n, d) into (b, d), if the backbone has one. pool
    and prefix: the backbone's own pooling (`cls`, `mean`, `last` or `map`, the pooler's) and its number of tokens
    before the patches, read off the module that holds `blocks`. grid: whether the tokens after the prefix are a grid of
    patches. last: maps between a block's modules are (b, h, w, d), where these do not tell. family: which of
    `restuning.methods.FAMILIES` the names of methods mean.
    """

    name: str
    blocks: str
    ops: Mapping[str, Op]
    width: str | tuple[str, ...]
    reads: tuple[str, ...] = ()
    heads: str | None = None
    keys: tuple[str, str] | None = None
    has: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str | Weight, ...]] = field(default_factory=dict)
    attention: str | None = None
    fits: Callable[[Any], bool] = field(default=_any)
    embed: str | None = None
    norm: str | tuple[str, ...] | None = None
    post: str | tuple[str, ...] | None = None
    pooler: str | None = None
    pool: Callable[[Any], str] = field(default=_cls)
    prefix: Callable[[Any], int] = field(default=_one)
    grid: bool = False
    last: bool = False
    family: str = ""

    def paths(self) -> list[str]:
        """What a block must have; of several after a `|`, one."""
        points = {p.path for op in self.ops.values() for p in (op.reads, op.writes, op.stream) if p and p.path}
        weights = {c.weight for found in self.parts.values() for c in found if isinstance(c, Weight)}
        several = {"|".join(_several(some)) for some in (self.width, self.reads) if some}
        return sorted(points | weights | {*self.has} | several)


def _several(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths or ()


_TIMM_POOLS = {"token": "cls", "avg": "mean", "fast": "mean", "fastavg": "mean", "": "none"}


def _timm_pool(root: Any) -> str:
    if root.global_pool == "map" and root.num_prefix_tokens and not getattr(root, "pool_include_prefix", True):
        return "map of the patches alone"
    return _TIMM_POOLS.get(root.global_pool, str(root.global_pool))


def _pool_type(module: str) -> Callable[[Any], str]:
    """The pooling that a timm pooling module says of itself."""

    def pool(root: Any) -> str:
        kind = attrgetter(f"{module}.pool_type")(root)
        return _TIMM_POOLS.get(kind, str(kind))

    return pool


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
    fits=_batch_first("attn"),
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
_MAPS: dict[str, Any] = {"prefix": _zero, "grid": True}
_CONV: dict[str, Any] = {**_MAPS, "ops": {}, "parts": {"conv": ("*",), "norms": ("*",)}, "family": "conv"}
_RESNET = Anatomy(
    "timm ResNet, ResNeXt",
    blocks="layer[1-9]",
    width=("conv3.weight", "conv2.weight"),
    reads=("conv1",),
    embed="conv1",
    pool=_pool_type("global_pool"),
    **_CONV,
)
_CONVNEXT = Anatomy(  # what goes into drop_path is what comes after LayerScale
    "timm ConvNeXt, ConvNeXt V2",
    blocks="stages.*.blocks",
    ops={"ffn": Op(into("mlp.fc1"), into("drop_path"), into("norm"))},
    parts={"conv": ("conv_dw",), "norm1": ("norm",), "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)},
    width="norm.weight",
    has=("conv_dw",),
    embed="stem.0",
    norm="norm_pre",
    post=("head.norm", "head.pre_logits"),
    pool=_pool_type("head.global_pool"),
    family="convnext",
    **_MAPS,
)
_SWIN = Anatomy(
    "timm Swin",
    blocks="layers.*.blocks",
    ops={
        "mha": Op(out_of("norm1"), into("drop_path1"), into("norm1")),
        "ffn": Op(into("mlp"), into("drop_path2"), into("norm2")),
    },
    parts=_TIMM.parts,
    attention="attn",
    width="norm1.weight",
    heads="attn.num_heads",
    has=("attn.relative_position_bias_table",),
    embed="patch_embed.proj",
    norm="norm",
    pool=_pool_type("head.global_pool"),
    last=True,
    **_MAPS,
)
_HIERARCHIES: tuple[Anatomy, ...] = (
    _CONVNEXT,
    replace(_CONVNEXT, name="timm ConvNeXt, normed before pooling", post=None),
    Anatomy(
        "transformers ConvNeXt, ConvNeXt V2",
        blocks="encoder.stages.*.layers",
        ops={"ffn": Op(into("pwconv1"), into("drop_path"), into("layernorm"))},
        parts={"conv": ("dwconv",), "norm1": ("layernorm",), "fc1": ("pwconv1",), "fc2": ("pwconv2",)},
        width="layernorm.weight",
        has=("dwconv",),
        embed="embeddings.patch_embeddings",
        post="layernorm",
        pool=lambda root: "mean",
        family="convnext",
        **_MAPS,
    ),
    _RESNET,
    replace(_RESNET, name="torchvision ResNet", pool=lambda root: "mean"),
    Anatomy(  # also BiT, whose norms come first in a block
        "timm ResNetV2",
        blocks="stages.*.blocks",
        width=("conv3.weight", "conv2.weight"),
        reads=("conv1",),
        embed="stem.conv",
        norm="norm",
        pool=_pool_type("head.global_pool"),
        **_CONV,
    ),
    Anatomy(
        "timm RegNet",
        blocks="s[1-9]",
        width="conv3.conv.weight",
        reads=("conv1.conv",),
        embed="stem.conv",
        norm="final_conv",
        pool=_pool_type("head.global_pool"),
        **_CONV,
    ),
    Anatomy(
        "timm EfficientNet, MobileNet V2",
        blocks="blocks.*",
        width=("conv_pwl.weight", "conv_pw.weight", "conv.weight"),
        reads=("conv_exp", "conv_pw", "conv"),
        embed="conv_stem",
        norm=("conv_head", "bn2"),
        pool=_pool_type("global_pool"),
        **_CONV,
    ),
    Anatomy(
        "timm MobileNet V3",
        blocks="blocks.*",
        width=("conv_pwl.weight", "conv_pw.weight", "conv.weight"),
        reads=("conv_exp", "conv_pw", "conv"),
        embed="conv_stem",
        post=("conv_head", "norm_head", "act2"),
        pool=_pool_type("global_pool"),
        **_CONV,
    ),
    Anatomy(
        "transformers ResNet",
        blocks="encoder.stages.*.layers",
        width=("layer.2.convolution.weight", "layer.1.convolution.weight"),
        reads=("layer.0.convolution",),
        embed="embedder.embedder.convolution",
        pool=lambda root: "mean",
        **_CONV,
    ),
    _SWIN,
    replace(  # normed after the operations; its cosine attention takes no prefix
        _SWIN,
        name="timm Swin V2",
        ops={"mha": Op(into(""), into("drop_path1")), "ffn": Op(into("mlp"), into("drop_path2"))},
        attention=None,
        has=("attn.logit_scale",),
    ),
    Anatomy(
        "transformers 5 Swin",
        blocks="encoder.layers.*.blocks",
        ops={
            "mha": Op(out_of("layernorm_before"), into("drop_path"), into("layernorm_before")),
            "ffn": Op(into("mlp"), out_of("mlp"), into("layernorm_after")),
        },
        parts={"norm1": ("layernorm_before",), "norm2": ("layernorm_after",), **_HF_PARTS},
        attention="attention",
        width="layernorm_before.weight",
        heads="attention.num_attention_heads",
        embed="embeddings.patch_embeddings.projection",
        norm="layernorm",
        pool=lambda root: "mean",
        **_MAPS,
    ),
)
"""Backbones of several stages: convolutions, and windows of attention."""


ANATOMIES: tuple[Anatomy, ...] = (
    *_HIERARCHIES,
    replace(  # BEiT too: the weight is used with a bias that is put together on the spot
        _TIMM,
        name="timm EVA, BEiT",
        parts={**_TIMM.parts, "qkv": (Weight("attn", "attn.qkv.weight"),)},
        fits=lambda block: block.attn.qkv is not None and block.attn.q_bias is not None,
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
        fits=_batch_first("self_attention"),
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
        path = self.reads.path
        at = self.weight or Weight("", f"{path}.weight", f"{path}.bias")
        return Affine(attrgetter(at.weight)(backbone), None if at.bias is None else _reached(backbone, at.bias))


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """All sites of a backbone, block by block, and what its tail needs to know.

    stages: the layers at which stages end. features: the port of every layer x_0 … x_L, as something that reads it and
    says as much. port: that of what the head reads. norm and post: the modules before and after pooling.
    """

    anatomy: Anatomy
    blocks: tuple[str, ...]
    stages: tuple[int, ...]
    features: tuple[Port, ...]
    all: tuple[Site, ...]
    port: Port
    norm: tuple[str, ...]
    post: tuple[str, ...]
    pooler: str | None
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
        """Where a layer can be seen: 0 is what the first block reads, l what block l says."""
        return Point(self.blocks[max(layer - 1, 0)], "out" if layer else "in", self.anatomy.last)

    def at(self, op: str, blocks: Sequence[int] | None = None) -> tuple[Site, ...]:
        """The sites of one operation (`affine`: of all affine modules; or a module's own name, such as `query`), in all
        blocks or in those named; sites of no block are always among them.

        Raises SiteError for an operation or a block that is not there.
        """
        ops = AFFINE if op == "affine" and self.anatomy.parts else (op,)
        named = [s for s in self.all if s.op in ops or (s.op in PARTS and s.reads.path.split(".")[-1] == op)]
        if not named:
            raise SiteError(f"no operation {op!r} here: {self.anatomy.name} has {', '.join(self.ops)}")
        check_blocks(blocks, len(self.blocks))
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


def check_blocks(blocks: Sequence[int] | None, count: int, what: str = "block", where: str = "this backbone") -> None:
    """Raises SiteError for those named that are not among the first `count`, and if none is named."""
    wrong = [i for i in blocks or () if not 0 <= i < count]
    if wrong or (blocks is not None and not blocks):
        raise SiteError(f"no {what} {wrong or '(empty list)'}: {where} has {what}s 0 to {count - 1}")


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
        f"{row.name}: {row.blocks}.*.({', '.join(row.paths())}), {', '.join(_several(row.norm))}" for row in rows
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


def _holders(backbone: nn.Module, blocks: str) -> dict[str, list[str]]:
    """Paths of the lists of blocks, in order, for every holder: wherever a path ends as the pattern says."""
    wanted = blocks.split(".")
    found: dict[str, list[str]] = {}
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
        for path in (*_several(row.norm), *_several(row.post)):
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
        there = [_join(root, path) for path in _several(paths)]
        return tuple(path for path in there if not isinstance(backbone.get_submodule(path), nn.Identity))

    holder = backbone.get_submodule(root)
    children = [[_join(path, name) for name, _ in backbone.get_submodule(path).named_children()] for path in lists]
    blocks = tuple(path for stage in children for path in stage)
    norm, post = tail(row.norm), tail(row.post)
    grid = row.prefix(holder) if row.grid else None
    ports = [_port(backbone.get_submodule(path), row, i, len(blocks), grid) for i, path in enumerate(blocks)]
    said = [replace(port, reads=port.writes) for port in ports]
    first = replace(ports[0], writes=ports[0].reads)
    return Sites(
        anatomy=row,
        blocks=blocks,
        stages=tuple(accumulate(map(len, children))),
        features=(first, *said),
        all=tuple(_sites(backbone, root, blocks, row, ports, (*norm, *post))),
        port=replace(said[-1], writes=_widened(backbone, (*norm, *post), said[-1].writes)),
        norm=norm,
        post=post,
        pooler=_join(root, row.pooler) if row.pooler is not None and row.pool(holder) == "map" else None,
        pool=row.pool(holder),
        prefix=row.prefix(holder),
    )


def _port(block: nn.Module, row: Anatomy, i: int, depth: int, grid: int | None) -> Port:
    width = len(_first(block, _several(row.width)))
    reads = _first(block, row.reads).in_channels if row.reads else width
    heads = 1 if row.heads is None else int(attrgetter(row.heads)(block))
    return Port(reads, width, heads, i, depth, grid)


def _widened(backbone: nn.Module, tail: Sequence[str], width: int) -> int:
    """The width after the tail's modules."""
    for module in (m for path in tail for m in backbone.get_submodule(path).modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            width = len(module.weight)
    return width


_KINDS: dict[str, Callable[[Any], bool]] = {
    "conv": lambda m: isinstance(m, nn.Conv2d),
    "norms": lambda m: getattr(getattr(m, "weight", None), "ndim", 0) == 1,
}


def _sites(
    backbone: nn.Module, root: str, blocks: Sequence[str], row: Anatomy, ports: Sequence[Port], tail: Sequence[str]
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
        port = ports[block or 0]
        shape = () if getattr(affine, "weight", None) is None else affine.weight.shape
        writes = getattr(affine, "out_features", shape[0] if shape else port.writes)
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
        here = replace(port, reads=reads, writes=writes, kernel=kernel)
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
                found.append((candidate.split(".")[-1], _join(block, candidate), None))
        return ((f"_{name}" if len(found) > 1 else "", path, weight) for name, path, weight in found)

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
            yield Site(op, i, f"{i}_{op}", at(where.reads), at(where.writes), at(where.stream or where.reads), ports[i])
        if row.attention is not None:
            call = Point(_join(block, row.attention), "in")
            keys = ports[i]
            if row.keys is not None:
                heads, each = attrgetter(*row.keys)(backbone.get_submodule(block))
                keys = replace(keys, heads=heads, writes=heads * each)
            yield Site("attention", i, f"{i}_attention", call, call, call, keys)
        for role, candidates in row.parts.items():
            for name, path, weight in parts(role, candidates, block):
                yield part(role, i, f"{i}_{role}{name}", path, weight)
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
