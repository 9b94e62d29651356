"""`bypass-attention`: self-attention among the tokens of all layers, beside a read-out of every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restuning.side.base import FeatureInfo
from restuning.side.features import Features, last, summary
from restuning.side.stages import Attention, PathConfig, PathInfo, PathNetwork


@dataclass(frozen=True)
class BypassAttention(PathConfig):
    """Self-attention among the tokens of all layers, stage by stage, beside a linear read-out of every layer; see
    `AttentionNet`. Ours, in the manner of LAST (2402.04009). Settings: those of `PathConfig`."""

    def build(self, info: FeatureInfo) -> "AttentionNet":
        return AttentionNet(PathInfo.of(self, info), causal=info.pool == "last")


class AttentionNet(PathNetwork):
    """s_0 = 0; u_j = s_{j−1} + g_j, s_j = u_j + MHA_j(LN u_j) for the stages j = 1 … S, whose inputs g_j are those of
    `Stages`. Its output is the read-out and the `summary` of LN s_S (first token and mean of the patches; a decoder's:
    the last token), (b, out_features), which the head reads in place of the backbone's own pooled features. A block
    without an FFN, in the manner of LAST (2402.04009); ours.

    causal: as in a decoder, a token sees none that comes after it.
    """

    def __init__(self, info: PathInfo, causal: bool = False) -> None:
        """
        Args:
            info: the layers and sizes.
            causal: whether the backbone is a decoder.
        """
        super().__init__(info)
        self.causal = causal
        self.attentions = nn.ModuleList(Attention(info.width, info.heads) for _ in range(info.stages))
        self.norm = nn.LayerNorm(info.width)
        own = (2 if info.prefix else 1) * info.width
        self.out_features = own + (0 if info.readout is None else info.readout.out_features)

    def forward(self, features: Features) -> Tensor:
        """(b, out_features)."""
        inputs, mask = self.inputs(features), features.mask
        seen = self._seen(inputs[0], mask)
        x = torch.zeros_like(inputs[0])
        for attention, g in zip(self.attentions, inputs, strict=True):
            x = x + g
            x = x + attention(x, seen=seen)
        x = self.norm(x)
        out = last(x, mask) if self.causal else summary(x, self.prefix, mask)
        return self.beside_readout(out.flatten(1), features)

    def _seen(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        seen = None if mask is None else mask[:, None, None].bool()
        if not self.causal:
            return seen
        n = x.shape[1]
        before = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        # padding sees itself, so that no row is empty
        return before if seen is None else (before & seen) | torch.eye(n, dtype=torch.bool, device=x.device)
