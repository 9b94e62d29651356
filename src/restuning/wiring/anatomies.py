"""The table of anatomies: a row for each family of backbones."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

from restuning.wiring.anatomy import Anatomy, Loose, Op, Point, Weight, cls_pool, into, out_of

_TIMM_POOLS = {"token": "cls", "avg": "mean", "fast": "mean", "fastavg": "mean", "": "none"}


def _timm_pool(root: Any) -> str:
    if root.global_pool == "map" and root.num_prefix_tokens and not getattr(root, "pool_include_prefix", True):
        return "map of the patches alone"
    return _TIMM_POOLS.get(root.global_pool, str(root.global_pool))


def _pool_type(module: str) -> Callable[[Any], str]:
    """The pooling that a timm pooling module says of itself."""
    return partial(_pool_said, module)


def _pool_said(module: str, root: Any) -> str:
    kind = attrgetter(f"{module}.pool_type")(root)
    return _TIMM_POOLS.get(kind, str(kind))


def _mean(_: Any) -> str:
    return "mean"


def _none(_: Any) -> str:
    return "none"


def _registers(root: Any) -> int:
    return 1 + int(root.config.num_register_tokens)


def _qv_biases(block: Any) -> bool:
    return block.attn.qkv is not None and block.attn.q_bias is not None


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
        prefix=_registers,
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
    family="text",
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
        pool=_mean,
        family="convnext",
        **_MAPS,
    ),
    _RESNET,
    replace(_RESNET, name="torchvision ResNet", pool=_mean),
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
        pool=_mean,
        **_CONV,
    ),
    _SWIN,
    replace(  # normed after the operations; its cosine attention takes no prefix
        _SWIN,
        name="timm Swin V2",
        ops={"mha": Op(into(""), into("drop_path1")), "ffn": Op(into("mlp"), into("drop_path2"))},
        parts={**_TIMM.parts, "qkv": (Weight("attn", "attn.qkv.weight"),)},
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
        pool=_mean,
        **_MAPS,
    ),
)
"""Backbones of several stages: convolutions, and windows of attention."""


def _unet_loose(unet: Any) -> dict[str, list[Loose]]:
    """ResNet blocks, the middle, the decoder, and the skip connections as the decoder's ResNet blocks read them:
    the last channels of what is put together."""

    def whole(path: str, reads: int, writes: int) -> Loose:
        return Loose(Op(into(path), out_of(path)), reads, writes)

    found = {p: m for p, m in unet.named_modules() if p.split(".")[-2:-1] == ["resnets"]}
    order = sorted(found, key=lambda path: ("down_blocks", "mid_block", "up_blocks").index(path.split(".")[0]))
    width = _ends(unet.mid_block)[1]
    skips, decoder = [], []
    for i, block in enumerate(unet.up_blocks):
        decoder.append(whole(f"up_blocks.{i}", width, _ends(block)[1]))
        for j, module in enumerate(block.resnets):
            channels = module.in_channels - width
            here = Point(f"up_blocks.{i}.resnets.{j}", "in", channels=channels)
            skips.append(Loose(Op(here, here), channels, channels))
            width = module.out_channels
    return {
        "resnet": [whole(path, found[path].in_channels, found[path].out_channels) for path in order],
        "mid": [whole("mid_block", *_ends(unet.mid_block))],
        "decoder": decoder,
        "skip": skips,
    }


def _ends(block: Any) -> tuple[int, int]:
    """The channels that a block of a U-Net reads, its skip connection's among them, and says."""
    return block.resnets[0].in_channels, block.resnets[-1].out_channels


_DIFFUSERS = Anatomy(
    "diffusers U-Net (Stable Diffusion 1, 2, XL)",
    blocks=(
        "down_blocks.*.attentions.*.transformer_blocks",
        "mid_block.attentions.*.transformer_blocks",
        "up_blocks.*.attentions.*.transformer_blocks",
    ),
    ops={
        "mha": Op(into("attn1"), out_of("attn1"), into("norm1")),
        "cross": Op(into("attn2"), out_of("attn2"), into("norm2")),
        "ffn": Op(into("ff"), out_of("ff"), into("norm3")),
    },
    parts={
        "norm1": ("norm1",),
        "qkv": tuple(f"{attention}.to_{name}" for attention in ("attn1", "attn2") for name in "qkv"),
        "proj": ("attn1.to_out.0", "attn2.to_out.0"),
        "norm2": ("norm2", "norm3"),
        "fc1": ("ff.net.0.proj",),
        "fc2": ("ff.net.2",),
    },
    attention=("attn1", "attn2"),
    width="attn1.to_out.0.weight",
    heads="attn1.heads",
    embed="conv_in",
    pool=_none,
    prefix=_zero,
    family="unet",
    join="conv_norm_out",
    stems=("mid_block", "up_blocks.*"),
    widths=_ends,
    loose=_unet_loose,
)
_DENOISERS: tuple[Anatomy, ...] = (
    _DIFFUSERS,
    replace(
        _DIFFUSERS,
        name="diffusers PixArt, DiT",
        blocks="transformer_blocks",
        ops={**_DIFFUSERS.ops, "cross": Op(into("attn2"), out_of("attn2")), "ffn": Op(into("ff"), out_of("ff"))},
        embed="pos_embed.proj",
        join="norm_out",
        stems=(),
        widths=None,
        loose=None,
    ),
)
"""Backbones that denoise."""


ANATOMIES: tuple[Anatomy, ...] = (
    *_HIERARCHIES,
    *_DENOISERS,
    replace(  # BEiT too: the weight is used with a bias that is put together on the spot
        _TIMM,
        name="timm EVA, BEiT",
        parts={**_TIMM.parts, "qkv": (Weight("attn", "attn.qkv.weight"),)},
        fits=_qv_biases,
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
        pool=cls_pool,
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
        family="text",
    ),
)
