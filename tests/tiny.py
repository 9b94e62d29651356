"""Tiny random backbones of every anatomy, and what to feed them. Width 32, two or three blocks."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer as TorchvisionViT

import restuning as rt
from restuning.methods.named import find_method

torch.backends.mha.set_fastpath_enabled(False)  # it rounds otherwise, and is taken or not as gradients are wanted

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
GROUPED = {**HF, "vocab_size": 50, "pad_token_id": 0, "num_key_value_heads": 2}
TEXT = {**HF, "vocab_size": 50, "max_position_embeddings": 40, "pad_token_id": 0}


class KeywordBlock(nn.Module):
    """Called by keyword only; says a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.drop = nn.Dropout(0.5)

    def forward(self, *, stream: Tensor, flag: bool = True) -> tuple[Tensor, str]:
        stream = stream + self.drop(self.mix(input=self.norm(stream)))
        return stream + self.mlp(input=self.norm(stream)), "beside"


class Keywords(nn.Module):
    """No row of the table fits it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.batch_norm = nn.Linear(8, 32), nn.BatchNorm1d(5)
        self.layers = nn.ModuleList(KeywordBlock() for _ in range(3))
        self.final = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch_norm(self.embed(x))
        for layer in self.layers:
            x, _ = layer(stream=x)
        return self.final(x)[:, 0]


OWN = rt.Anatomy(
    name="keywords",
    blocks="layers",
    ops={
        "mha": rt.Op(rt.into("mix"), rt.out_of("mix")),
        "ffn": rt.Op(rt.into("mlp"), rt.out_of("mlp")),
    },
    width="norm.weight",
    norm="final",
)


@dataclass(frozen=True)
class Tiny:
    build: Callable[[], nn.Module]
    kind: str = "image"
    anatomy: rt.Anatomy | None = None
    side: int = 16

    def backbone(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(1)
        model = self.build().eval().to(dtype)
        with torch.no_grad():  # away from the zeros and ones that hide mistakes
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
            for name, b in model.named_buffers():
                if "running" in name:
                    b.add_(0.2 * torch.rand_like(b))
        return model

    def inputs(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        if self.kind == "text":
            ids = torch.randint(3, 50, (batch, 7))
            mask = torch.ones_like(ids)
            mask[1, 5:] = 0
            return {"input_ids": ids, "attention_mask": mask}
        if self.kind == "vector":
            return {"x": torch.randn(batch, 5, 8, dtype=dtype)}
        return {"pixel_values" if self.kind == "hf" else "x": torch.randn(batch, 3, self.side, self.side, dtype=dtype)}


class ResidualAttentionBlock(nn.Module):
    """open_clip's, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.ls_1, self.ln_2 = nn.Identity(), nn.LayerNorm(32)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(32, 64), gelu=nn.GELU(), c_proj=nn.Linear(64, 32)))
        self.ls_2 = nn.Identity()

    def forward(self, q_x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(q_x)
        x = q_x + self.ls_1(self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """open_clip's, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(ResidualAttentionBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return x


class OpenClip(nn.Module):
    """The structure of open_clip's VisionTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.class_embedding, self.positional_embedding = (
            nn.Parameter(torch.randn(32)),
            nn.Parameter(torch.randn(5, 32)),
        )
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(32), Transformer(), nn.LayerNorm(32)
        self.attn_pool, self.pool_type, self.final_ln_after_pool = None, "tok", False
        self.proj = nn.Parameter(torch.randn(32, 8))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x)))[:, 0] @ self.proj


def _eva(**more: Any) -> nn.Module:
    return Eva(**{**VIT, "depth": 2}, **more)


def _mobile(kind: Any, *stages: str) -> nn.Module:
    return kind(decode_arch_def([[stage] for stage in stages]), num_classes=0, stem_size=8, num_features=40)


STAGES = {"depths": (1, 2, 1, 1), "dims": (8, 8, 12, 16), "num_classes": 0, "patch_size": 2, "output_stride": 16}
HF_STAGES = {"num_stages": 2, "hidden_sizes": [12, 20], "depths": [1, 2]}
RESNET = {"layers": (1, 2, 1, 1), "num_classes": 0, "channels": (8, 8, 12, 16), "output_stride": 16}
REGNET = RegNetCfg(depth=4, w0=8, wa=12.0, wm=1.5, group_size=4, se_ratio=0.0, stem_width=8, num_features=40)
PREACT = {"conv_layer": create_conv2d, "norm_layer": BatchNormAct2d}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 0}
HF_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
HIERARCHIES: dict[str, Tiny] = {
    "timm-convnext": Tiny(lambda: ConvNeXt(**STAGES, ls_init_value=0.4), side=32),
    "timm-convnext-v2": Tiny(
        lambda: ConvNeXt(**STAGES, conv_mlp=True, use_grn=True, ls_init_value=None, head_norm_first=True), side=32
    ),
    "hf-convnext": Tiny(
        lambda: hf.ConvNextModel(hf.ConvNextConfig(**HF_STAGES, layer_scale_init_value=0.3)), "hf", side=32
    ),
    "hf-convnext-v2": Tiny(lambda: hf.ConvNextV2Model(hf.ConvNextV2Config(**HF_STAGES)), "hf", side=32),
    "timm-resnet": Tiny(lambda: ResNet(BasicBlock, **RESNET), side=32),
    "timm-resnext": Tiny(
        lambda: ResNet(Bottleneck, **RESNET, cardinality=2, base_width=32, stem_type="deep", avg_down=True), side=32
    ),
    "hf-resnet": Tiny(
        lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2])), "hf", side=32
    ),
    "timm-resnetv2": Tiny(lambda: ResNetV2([1, 2], channels=(16, 24), stem_chs=8, num_classes=0, **PREACT), side=32),
    "timm-regnet": Tiny(lambda: RegNet(REGNET, num_classes=0, output_stride=16), side=32),
    "timm-efficientnet": Tiny(
        lambda: _mobile(EfficientNet, "ds_r1_k3_s1_e1_c8_se0.25", "ir_r2_k3_s2_e2_c16_se0.25", "er_r1_k3_s2_e2_c24"),
        side=32,
    ),
    "timm-mobilenetv3": Tiny(
        lambda: _mobile(MobileNetV3, "ds_r1_k3_s2_e1_c8_se0.25_nre", "ir_r2_k5_s2_e2_c16", "cn_r1_k1_s1_c24"), side=32
    ),
    "timm-swin": Tiny(lambda: SwinTransformer(**SWIN, window_size=4, drop_path_rate=0.2), side=32),
    "timm-swin-v2": Tiny(lambda: SwinTransformerV2(**SWIN, window_size=4), side=32),
    "hf-swin": Tiny(lambda: hf.SwinModel(hf.SwinConfig(**HF_SWIN)), "hf", side=32),
}
"""Backbones of several stages: convolutions, and windows of attention."""

TINY: dict[str, Tiny] = {
    "timm-vit": Tiny(lambda: VisionTransformer(**VIT)),
    "timm-vit-mean": Tiny(lambda: VisionTransformer(**VIT, global_pool="avg", class_token=False)),
    "timm-vit-layerscale": Tiny(lambda: VisionTransformer(**VIT, init_values=0.3, drop_path_rate=0.5)),
    "timm-deit": Tiny(lambda: VisionTransformerDistilled(**VIT)),
    "timm-dinov2-registers": Tiny(lambda: VisionTransformer(**VIT, init_values=0.2, reg_tokens=2, no_embed_class=True)),
    "timm-eva": Tiny(lambda: _eva(init_values=0.2, global_pool="token")),
    "timm-eva02": Tiny(lambda: _eva(swiglu_mlp=True, use_rot_pos_emb=True, drop_path_rate=0.3)),
    "hf-vit": Tiny(lambda: hf.ViTModel(hf.ViTConfig(**HF)), "hf"),
    "hf-dinov2": Tiny(lambda: hf.Dinov2Model(hf.Dinov2Config(**HF)), "hf"),
    "hf-dinov2-registers": Tiny(
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**HF, num_register_tokens=2)), "hf"
    ),
    "hf-clip": Tiny(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**HF)), "hf"),
    "hf-siglip": Tiny(lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**HF)), "hf"),
    "open-clip": Tiny(OpenClip),
    "gemma3": Tiny(lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**GROUPED, head_dim=16)), "text"),
    "bert": Tiny(lambda: hf.BertModel(hf.BertConfig(**TEXT)), "text"),
    "roberta": Tiny(lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)), "text"),
    "own": Tiny(Keywords, "vector", OWN),
    **HIERARCHIES,
}

MORE: dict[str, Tiny] = {
    "timm-siglip": Tiny(lambda: VisionTransformer(**VIT, global_pool="map", class_token=False)),
    "hf-dinov3": Tiny(lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF, num_register_tokens=2)), "hf"),
    "torchvision": Tiny(lambda: TorchvisionViT(16, 8, 2, 4, 32, 64)),
    "llama": Tiny(lambda: hf.LlamaModel(hf.LlamaConfig(**GROUPED)), "text"),
}
"""Of families that are in TINY by a near relative: for the tests of what they do not share."""


Q, V = (
    ("q_proj", "v_proj")
    if any(name.endswith("q_proj") for name, _ in TINY["hf-vit"].build().named_modules())
    else ("query", "value")
)
"""The ViT of transformers below 5 has other names."""


def small(method: str, family: str = "") -> Any:
    """A named method, as a family of backbones has it, at a size for width 32 and 16 × 16 pixels."""
    if method == "lst":
        return rt.Ladder(4)
    if method == "ladder-grid4":
        return rt.Ladder(4, grid=2)
    if method in ("bypass-query", "bypass-query-shared", "bypass-attention"):
        return replace(find_method(method), width=8, stages=2, heads=2, **({"queries": 2} if "query" in method else {}))
    if method in ("unipt", "sherl"):
        return rt.resize(find_method(method), 8)  # of three ReLUs, all may be dead
    if method == "side-tuning":
        return rt.SideTuning(rt.SmallCnn(4))
    return rt.resize(find_method(method, family), 3)


NEIGHBOURS = {"last": "LAST", "losa": "LoSA", "mist": "MIST", "vqt": "VQT", "unipt": "UniPT", "sherl": "SHERL"}

_GRID = ("convpass", "dtl-plus", "side-tuning", "bypass-grid2", "bypass-grid4", "ladder-grid4")
_NO_GRID = dict.fromkeys(_GRID, "grid of patches|reads images")
_ROTARY = dict.fromkeys(("vpt-shallow", "vpt-deep", "noah"), "rotary|cannot be run with PromptTuningTuner")
_GATED = {"lst": "an ungated FFN", "vqt": "an ungated FFN"}
_NO_IMAGES = {"vqt": "VQT reads images, and .* does not"}
_NO_PARTS = {
    **dict.fromkeys(("lora", "bitfit", "ssf", "noah", "prefix"), "no operation '(qkv|affine|attention)' here"),
    "mam-adapter": "no operation 'attention' here",
    "lst": "needs its norm1, qkv, proj, norm2, fc1, fc2: use init='random'",
}
_STAGES = {
    **dict.fromkeys(("lst", "ladder-grid4"), "a ladder needs blocks of one width: .* has stages of widths"),
    **dict.fromkeys(("vpt-shallow", "vpt-deep", "noah"), "PromptTuning needs blocks of one width"),
    **dict.fromkeys(("dtl", "dtl-plus"), "Dtl needs blocks of one width"),
    "linear-all-gated": "gates sum layers of one width: .* has",
    **{name: f"{what} needs blocks of one width" for name, what in NEIGHBOURS.items()},
}
_CONVNEXT = {
    **_STAGES,
    **dict.fromkeys(("prefix", "mam-adapter"), "no operation 'attention' here: .* has embed, ffn, block, conv, norm1"),
    "noah": "no operation 'qkv' here",
    "res-tuning-nlp": "no operation 'mha' here",
}
_CONV = {
    **_STAGES,
    **dict.fromkeys(("prefix", "mam-adapter"), "no operation 'attention' here: .* has (embed, )?block, conv, norms"),
    **dict.fromkeys(("res-tuning-single", "noah"), "no operation 'ffn' here"),
    **dict.fromkeys(("res-tuning-tri", "res-tuning-nlp"), "no operation 'mha' here"),
}
REFUSED: dict[str, dict[str, str]] = {
    "timm-eva02": {**_ROTARY, **_GATED, "ladder-grid4": "an ungated FFN"},
    "hf-dinov3": _ROTARY,
    "llama": {**_NO_GRID, **_ROTARY, **_GATED, **_NO_IMAGES},
    "gemma3": {**_NO_GRID, **_ROTARY, **_GATED, **_NO_IMAGES},
    "bert": {**_NO_GRID, **_NO_IMAGES},
    "roberta": {**_NO_GRID, **_NO_IMAGES},
    "own": {**_NO_GRID, **_NO_PARTS, **_NO_IMAGES},
    **{name: _CONVNEXT if "convnext" in name else _STAGES if "swin" in name else _CONV for name in HIERARCHIES},
    "timm-swin-v2": {
        **_STAGES,
        **dict.fromkeys(("prefix", "mam-adapter"), "no operation 'attention' here"),
    },
}
"""Which backbone refuses which method, and in which words."""
