"""Vision transformers of one width: timm, open_clip, torchvision, transformers."""

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

from restuning.backbones.anatomy import Anatomy, Op, Weight, cls_pool, into, out_of
from restuning.backbones.families.shared import HF_4_ATTENTION, HF_PARTS, TIMM_POOLS, zero


def _timm_pool(root: Any) -> str:
    if root.global_pool == "map" and root.num_prefix_tokens and not getattr(root, "pool_include_prefix", True):
        return "map of the patches alone"
    return TIMM_POOLS.get(root.global_pool, str(root.global_pool))


def _registers(root: Any) -> int:
    return 1 + int(root.config.num_register_tokens)


def _qv_biases(block: Any) -> bool:
    return block.attn.qkv is not None and block.attn.q_bias is not None


_DINOV2 = Anatomy(
    "transformers 5 DINOv2",
    blocks="encoder.layer",
    ops={
        "mha": Op(into("attention"), out_of("layer_scale1"), into("norm1")),
        "ffn": Op(into("mlp"), out_of("layer_scale2"), into("norm2")),
    },
    parts={"norm1": ("norm1",), "norm2": ("norm2",), **HF_PARTS},
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
    parts={**_DINOV2.parts, **HF_4_ATTENTION},
    attention="attention.attention",
    heads="attention.attention.num_attention_heads",
)


def _map_or_mean(root: Any) -> str:
    return "map" if root.use_head else "mean"


def _open_clip_pool(root: Any) -> str:
    if root.attn_pool is not None or (root.pool_type == "avg" and root.final_ln_after_pool):
        return "attentional, or before the norm"
    return {"tok": "cls", "avg": "mean"}.get(root.pool_type, str(root.pool_type))


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
        prefix=_registers,
    )


TIMM = Anatomy(  # the input of drop_path is the one point after both forms of LayerScale (module, bare parameter)
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

VIT: tuple[Anatomy, ...] = (
    replace(  # BEiT too: the weight is used with a bias that is put together on the spot
        TIMM,
        name="timm EVA, BEiT",
        parts={**TIMM.parts, "qkv": (Weight("attn", "attn.qkv.weight"),)},
        fits=_qv_biases,
    ),
    TIMM,
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
        pool=cls_pool,
    ),
    Anatomy(
        "transformers 5 ViT",
        blocks="layers",
        ops={
            "mha": Op(into("attention"), out_of("attention.o_proj"), into("layernorm_before")),
            "ffn": Op(into("mlp"), out_of("mlp"), into("layernorm_after")),
        },
        parts={"norm1": ("layernorm_before",), "norm2": ("layernorm_after",), **HF_PARTS},
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
            **HF_4_ATTENTION,
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
        prefix=zero,
    ),
    _CLIP,
)
"""In the order in which they are tried."""
