"""Tiny random backbones of every anatomy, and what to feed them. Width 32, two or three blocks."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer as TorchvisionViT

import restuning as rt

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
    about: dict[str, Any] = field(default_factory=dict)

    def backbone(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(1)
        model = self.build().eval().to(dtype)
        with torch.no_grad():  # away from the zeros and ones that hide mistakes
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return model

    def inputs(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        if self.kind == "text":
            ids = torch.randint(3, 50, (batch, 7))
            mask = torch.ones_like(ids)
            mask[1, 5:] = 0
            return {"input_ids": ids, "attention_mask": mask}
        if self.kind == "vector":
            return {"x": torch.randn(batch, 5, 8, dtype=dtype)}
        return {"pixel_values" if self.kind == "hf" else "x": torch.randn(batch, 3, 16, 16, dtype=dtype)}


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
}

MORE: dict[str, Tiny] = {
    "timm-siglip": Tiny(lambda: VisionTransformer(**VIT, global_pool="map", class_token=False)),
    "hf-dinov3": Tiny(lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF, num_register_tokens=2)), "hf"),
    "torchvision": Tiny(lambda: TorchvisionViT(16, 8, 2, 4, 32, 64)),
    "llama": Tiny(lambda: hf.LlamaModel(hf.LlamaConfig(**GROUPED)), "text"),
}
"""Of families that are in TINY by a near relative: for the tests of what they do not share."""


def small(method: str) -> Any:
    """A named method at a size for width 32 and 16 × 16 pixels."""
    if method == "lst":
        return rt.Ladder(4)
    if method == "ladder-grid4":
        return rt.Ladder(4, grid=2)
    if method == "side-tuning":
        return rt.SideTuning(rt.SmallCnn(4))
    return rt.resize(rt.methods[method], 3)


_GRID = ("convpass", "dtl-plus", "side-tuning", "bypass-grid2", "bypass-grid4", "ladder-grid4")
_NO_GRID = dict.fromkeys(_GRID, "grid of patches|reads images")
_ROTARY = dict.fromkeys(("vpt-shallow", "vpt-deep", "noah"), "rotary")
_GATED = {"lst": "an ungated FFN"}
_NO_PARTS = {
    **dict.fromkeys(("lora", "bitfit", "ssf", "noah", "prefix"), "no operation '(qkv|affine|attention)' here"),
    "mam-adapter": "no operation 'attention' here",
    "lst": "needs its norm1, qkv, proj, norm2, fc1, fc2: use init='random'",
}
REFUSED: dict[str, dict[str, str]] = {
    "timm-eva02": {**_ROTARY, **_GATED, "ladder-grid4": "an ungated FFN"},
    "hf-dinov3": _ROTARY,
    "llama": {**_NO_GRID, **_ROTARY, **_GATED},
    "gemma3": {**_NO_GRID, **_ROTARY, **_GATED},
    "bert": _NO_GRID,
    "roberta": _NO_GRID,
    "own": {**_NO_GRID, **_NO_PARTS},
}
"""Which backbone refuses which method, and in which words."""
