"""Convolutional backbones of several stages."""

from dataclasses import replace
from typing import Any

from restuning.backbones.anatomy import Anatomy, Op, into
from restuning.backbones.families.shared import MAPS, mean, pool_type

_CONV: dict[str, Any] = {**MAPS, "ops": {}, "parts": {"conv": ("*",), "norms": ("*",)}, "family": "conv"}
_RESNET = Anatomy(
    "timm ResNet, ResNeXt",
    blocks="layer[1-9]",
    width=("conv3.weight", "conv2.weight"),
    reads=("conv1",),
    embed="conv1",
    pool=pool_type("global_pool"),
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
    pool=pool_type("head.global_pool"),
    family="convnext",
    **MAPS,
)

CONVNET: tuple[Anatomy, ...] = (
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
        pool=mean,
        family="convnext",
        **MAPS,
    ),
    _RESNET,
    replace(_RESNET, name="torchvision ResNet", pool=mean),
    Anatomy(  # also BiT, whose norms come first in a block
        "timm ResNetV2",
        blocks="stages.*.blocks",
        width=("conv3.weight", "conv2.weight"),
        reads=("conv1",),
        embed="stem.conv",
        norm="norm",
        pool=pool_type("head.global_pool"),
        **_CONV,
    ),
    Anatomy(
        "timm RegNet",
        blocks="s[1-9]",
        width="conv3.conv.weight",
        reads=("conv1.conv",),
        embed="stem.conv",
        norm="final_conv",
        pool=pool_type("head.global_pool"),
        **_CONV,
    ),
    Anatomy(
        "timm EfficientNet, MobileNet V2",
        blocks="blocks.*",
        width=("conv_pwl.weight", "conv_pw.weight", "conv.weight"),
        reads=("conv_exp", "conv_pw", "conv"),
        embed="conv_stem",
        norm=("conv_head", "bn2"),
        pool=pool_type("global_pool"),
        **_CONV,
    ),
    Anatomy(
        "timm MobileNet V3",
        blocks="blocks.*",
        width=("conv_pwl.weight", "conv_pw.weight", "conv.weight"),
        reads=("conv_exp", "conv_pw", "conv"),
        embed="conv_stem",
        post=("conv_head", "norm_head", "act2"),
        pool=pool_type("global_pool"),
        **_CONV,
    ),
    Anatomy(
        "transformers ResNet",
        blocks="encoder.stages.*.layers",
        width=("layer.2.convolution.weight", "layer.1.convolution.weight"),
        reads=("layer.0.convolution",),
        embed="embedder.embedder.convolution",
        pool=mean,
        **_CONV,
    ),
)
"""In the order in which they are tried."""
