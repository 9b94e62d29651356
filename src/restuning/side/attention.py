"""`bypass-attention`: self-attention among the tokens of all layers, beside a read-out of every layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.side.features import last, normalised, summary
from restuning.side.readout import Readout
from restuning.side.stages import Attention, PixelStem, Stages


class AttentionNet(nn.Module):
    """s_0 = 0; u_j = s_{j−1} + g_j, s_j = u_j + MHA_j(LN u_j) for the stages j = 1 … S, whose inputs g_j are those of
    `Stages`. Its output is the read-out and the `summary` of LN s_S (first token and mean of the patches; a decoder's:
    the last token), (b, out_features), which the head reads in place of the backbone's own pooled features. A block
    without an FFN, in the manner of LAST (2402.04009); ours.

    causal: as in a decoder, a token sees none that comes after it.
    """

    def __init__(
        self,
        widths: Sequence[int],
        prefix: int,
        readout: Readout | None,
        *,
        width: int = 64,
        stages: int = 4,
        heads: int = 4,
        components: int | None = None,
        stem: bool = False,
        causal: bool = False,
    ) -> None:
        """
        Args:
            widths: d_0 … d_L, of the layers that are read.
            prefix: how many tokens come before the patches.
            readout: what is read of every layer besides; None: nothing.
            width: w, a multiple of the heads.
            stages: S, at most as many as there are layers.
            heads: of the attention.
            components: of `Stages`.
            stem: whether the first stage is given a convolutional stem's reading of the pixels.
            causal: whether the backbone is a decoder.
        """
        super().__init__()
        self.prefix, self.readout, self.causal = prefix, readout, causal
        self.stages = Stages(widths, width, stages, components)
        self.stem = PixelStem(width) if stem else None
        self.attentions = nn.ModuleList(Attention(width, heads) for _ in range(stages))
        self.norm = nn.LayerNorm(width)
        own = (2 if prefix else 1) * width
        self.out_features = own + (0 if readout is None else readout.out_features)

    def forward(
        self,
        layers: Sequence[Tensor],
        summaries: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor:
        """The arguments are those of `QueryNet`."""
        inputs = self.stages(layers, summaries is not None)
        if self.stem is not None and pixels is not None:
            inputs[0] = inputs[0] + F.pad(self.stem(pixels, inputs[0].shape[1] - self.prefix), (0, 0, self.prefix, 0))
        seen = self._seen(inputs[0], mask)
        x = torch.zeros_like(inputs[0])
        for attention, g in zip(self.attentions, inputs, strict=True):
            x = x + g
            x = x + attention(x, seen=seen)
        x = self.norm(x)
        out = (last(x, mask) if self.causal else summary(x, self.prefix, mask)).flatten(1)
        if self.readout is None:
            return out
        if summaries is None:
            summaries = [summary(normalised(x), self.prefix, mask) for x in layers]
        return torch.cat([self.readout(summaries), out], -1)

    def _seen(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        seen = None if mask is None else mask[:, None, None].bool()
        if not self.causal:
            return seen
        n = x.shape[1]
        before = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        # padding sees itself, so that no row is empty
        return before if seen is None else (before & seen) | torch.eye(n, dtype=torch.bool, device=x.device)
