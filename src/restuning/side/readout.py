"""A linear read-out of every layer: the first token and the mean of each, normalised."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SCALE = 0.3
"""Of the read-out in full, so that a head's outputs begin as small as they do on one layer."""


class Readout(nn.Module):
    """The `summary` of every layer, (b, s, d_l) for layers 0 … L, as one vector that a head reads.

    In full: 0.3 · all of them, (b, s Σ d_l): the first tokens of all layers, then their means. Gated: Σ_l γ_l ⊙ t_l for
    each of the s summaries, (b, s d), γ from (L + 1)^−½; for layers of one width.
    """

    def __init__(self, widths: Sequence[int], summaries: int, gated: bool = False) -> None:
        """
        Args:
            widths: d_0 … d_L, of the layers.
            summaries: s, how many summaries there are of each layer.
            gated: whether they are summed by gates.
        """
        super().__init__()
        self.summaries, self.layers = summaries, len(widths)
        self.out_features = summaries * (widths[-1] if gated else sum(widths))
        # a vector, which weight decay never touches
        count = len(widths) * self.out_features
        self.gate = nn.Parameter(torch.full((count,), len(widths) ** -0.5)) if gated else None

    def forward(self, summaries: Sequence[Tensor]) -> Tensor:
        if self.gate is None:
            parts = [x[:, i] for i in range(self.summaries) for x in summaries]
            return SCALE * torch.cat(parts, -1)
        x = torch.stack(list(summaries), 1)  # (b, layers, s, d)
        return (x * self.gate.view(x.shape[1:])).sum(1).flatten(1)


class ReadoutNet(nn.Module):
    """`linear-all`: nothing beside the read-out; the head is linear in the features."""

    def __init__(self, widths: Sequence[int], summaries: int, gated: bool = False) -> None:
        super().__init__()
        self.readout = Readout(widths, summaries, gated)
        self.out_features = self.readout.out_features

    def forward(self, summaries: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.readout(summaries)
        return out
