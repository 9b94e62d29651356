"""Windows of attention, in several stages."""

from dataclasses import replace

from restuning.backbones.anatomy import Anatomy, Op, Weight, into, out_of
from restuning.backbones.families.shared import HF_PARTS, MAPS, mean, pool_type
from restuning.backbones.families.vit import TIMM

_SWIN = Anatomy(
    "timm Swin",
    blocks="layers.*.blocks",
    ops={
        "mha": Op(out_of("norm1"), into("drop_path1"), into("norm1")),
        "ffn": Op(into("mlp"), into("drop_path2"), into("norm2")),
    },
    parts=TIMM.parts,
    attention="attn",
    width="norm1.weight",
    heads="attn.num_heads",
    has=("attn.relative_position_bias_table",),
    embed="patch_embed.proj",
    norm="norm",
    pool=pool_type("head.global_pool"),
    last=True,
    **MAPS,
)

SWIN: tuple[Anatomy, ...] = (
    _SWIN,
    replace(  # normed after the operations; its cosine attention takes no prefix
        _SWIN,
        name="timm Swin V2",
        ops={"mha": Op(into(""), into("drop_path1")), "ffn": Op(into("mlp"), into("drop_path2"))},
        parts={**TIMM.parts, "qkv": (Weight("attn", "attn.qkv.weight"),)},
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
        parts={"norm1": ("layernorm_before",), "norm2": ("layernorm_after",), **HF_PARTS},
        attention="attention",
        width="layernorm_before.weight",
        heads="attention.num_attention_heads",
        embed="embeddings.patch_embeddings.projection",
        norm="layernorm",
        pool=mean,
        **MAPS,
    ),
)
"""In the order in which they are tried."""
