"""Tiny random backbones of every anatomy, and what to feed them. Width 32, two or three blocks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import restuning as rt

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
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
    "bert": Tiny(lambda: hf.BertModel(hf.BertConfig(**TEXT)), "text"),
    "roberta": Tiny(lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)), "text"),
    "own": Tiny(Keywords, "vector", OWN),
}


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
_FUNCTIONAL = dict.fromkeys(("lora", "bitfit", "ssf", "noah"), "calls no module at 0_qkv")
_ROTARY = dict.fromkeys(("vpt-shallow", "vpt-deep", "noah"), "rotary")
_NO_PARTS = {
    **dict.fromkeys(("lora", "bitfit", "ssf", "noah", "prefix"), "no operation '(qkv|affine|attention)' here"),
    "mam-adapter": "no operation 'attention' here",
    "lst": "needs its norm1, qkv, proj, norm2, fc1, fc2: use init='random'",
}
REFUSED: dict[str, dict[str, str]] = {
    "timm-eva": _FUNCTIONAL,  # its qkv weight is used without calling the module
    "timm-eva02": {**_FUNCTIONAL, **_ROTARY, "lst": "an ungated FFN", "ladder-grid4": "an ungated FFN"},
    "bert": _NO_GRID,
    "roberta": _NO_GRID,
    "own": {**_NO_GRID, **_NO_PARTS},
}
"""Which backbone refuses which method, and in which words."""
