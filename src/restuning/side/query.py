"""`bypass-query`: learned queries that attend to the tokens of all layers, beside a read-out of every layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.side.features import normalised, summary
from restuning.side.readout import Readout
from restuning.side.stages import CrossAttention, PixelStem, Stages


class QueryNet(nn.Module):
    """q_0 = Q (queries × w), N(0, ½²); q_j = q_{j−1} + MHA_j(LN q_{j−1}; LN' g_j) for the stages j = 1 … S, whose
    inputs g_j are those of `Stages`. Its output is the read-out and LN q_S, flattened, (b, out_features), which the
    head reads in place of the backbone's own pooled features. Ours.

    Queries see every token that is no padding, as the last token of a decoder does.
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
        queries: int = 8,
        components: int | None = None,
        fixed: bool = False,
        stem: bool = False,
    ) -> None:
        """
        Args:
            widths: d_0 … d_L, of the layers that are read.
            prefix: how many tokens come before the patches.
            readout: what is read of every layer besides; None: nothing.
            width: w, a multiple of the heads.
            stages: S, at most as many as there are layers.
            heads: of the attention.
            queries: how many.
            components, fixed: of `Stages`.
            stem: whether the first stage is given a convolutional stem's reading of the pixels.
        """
        super().__init__()
        self.prefix, self.readout = prefix, readout
        self.queries = nn.Parameter(0.5 * torch.randn(queries, width))
        self.stages = Stages(widths, width, stages, components, fixed)
        self.stem = PixelStem(width) if stem else None
        self.attentions = nn.ModuleList(CrossAttention(width, heads) for _ in range(stages))
        self.norm = nn.LayerNorm(width)
        self.out_features = queries * width + (0 if readout is None else readout.out_features)

    def forward(
        self,
        layers: Sequence[Tensor],
        summaries: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            layers: x_0 … x_L (b, n, d_l); or, with `summaries`, their components (b, n, k).
            summaries: of every layer, (b, 1 or 2, d_l).
            mask: (b, n), which tokens are no padding.
            pixels: (b, 3, h, w), for the stem.
        """
        inputs = self.stages(layers, summaries is not None)
        if self.stem is not None and pixels is not None:
            inputs[0] = inputs[0] + F.pad(self.stem(pixels, inputs[0].shape[1] - self.prefix), (0, 0, self.prefix, 0))
        seen = None if mask is None else mask.bool()
        q = self.queries.expand(len(layers[0]), -1, -1)
        for attention, g in zip(self.attentions, inputs, strict=True):
            q = q + attention(q, normalised(g), seen)
        out: Tensor = self.norm(q).flatten(1)
        if self.readout is None:
            return out
        if summaries is None:
            summaries = [summary(normalised(x), self.prefix, mask) for x in layers]
        return torch.cat([self.readout(summaries), out], -1)
