"""Backbones that denoise: diffusers' U-Nets and transformers."""

from dataclasses import replace
from typing import Any

from restuning.backbones.anatomy import Anatomy, GlobalOp, Op, Point, into, out_of
from restuning.backbones.families.shared import none, zero


def _unet_loose(unet: Any) -> dict[str, list[GlobalOp]]:
    """ResNet blocks, the middle, the decoder, and the skip connections as the decoder's ResNet blocks read them:
    the last channels of what is put together."""

    def whole(path: str, reads: int, writes: int) -> GlobalOp:
        return GlobalOp(Op(into(path), out_of(path)), reads, writes)

    found = {p: m for p, m in unet.named_modules() if p.split(".")[-2:-1] == ["resnets"]}
    order = sorted(found, key=lambda path: ("down_blocks", "mid_block", "up_blocks").index(path.split(".")[0]))
    width = _ends(unet.mid_block)[1]
    skips, decoder = [], []
    for i, block in enumerate(unet.up_blocks):
        decoder.append(whole(f"up_blocks.{i}", width, _ends(block)[1]))
        for j, module in enumerate(block.resnets):
            channels = module.in_channels - width
            here = Point(f"up_blocks.{i}.resnets.{j}", "in", channels=channels)
            skips.append(GlobalOp(Op(here, here), channels, channels))
            width = module.out_channels
    return {
        "resnet": [whole(path, found[path].in_channels, found[path].out_channels) for path in order],
        "mid": [whole("mid_block", *_ends(unet.mid_block))],
        "decoder": decoder,
        "skip": skips,
    }


def _ends(block: Any) -> tuple[int, int]:
    """The channels that a block of a U-Net reads, its skip connection's among them, and those of its output."""
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
    pool=none,
    prefix=zero,
    family="unet",
    join="conv_norm_out",
    stems=("mid_block", "up_blocks.*"),
    widths=_ends,
    loose=_unet_loose,
)
UNET: tuple[Anatomy, ...] = (
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
