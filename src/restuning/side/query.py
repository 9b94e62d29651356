"""`bypass-query`: learned queries that attend to the tokens of all layers, beside a read-out of every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restuning.errors import MethodError
from restuning.side.base import FeatureInfo
from restuning.side.features import Features, normalised
from restuning.side.stages import CrossAttention, PathConfig, PathInfo, PathNetwork
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class BypassQuery(PathConfig):
    """Learned queries that attend to the tokens of all layers, stage by stage, beside a linear read-out of every layer;
    see `QueryNet`. Ours.

    Args:
        queries: how many; the other settings are those of `PathConfig`.
        fixed: the projections of the layers are not trained, and the same for all tasks, so that what the queries
            attend to is common to them: another task costs its queries and its head.
    """

    queries: int = 8
    fixed: bool = False

    def __post_init__(self) -> None:
        check_size("BypassQuery", "queries", self.queries)
        if not isinstance(self.fixed, bool):
            raise MethodError(f"BypassQuery(fixed={self.fixed!r}): expected true or false")
        super().__post_init__()

    def build(self, info: FeatureInfo) -> "QueryNet":
        return QueryNet(PathInfo.of(self, info), queries=self.queries, fixed=self.fixed)


class QueryNet(PathNetwork):
    """q_0 = Q (queries × w), N(0, ½²); q_j = q_{j−1} + MHA_j(LN q_{j−1}; LN' g_j) for the stages j = 1 … S, whose
    inputs g_j are those of `Stages`. Its output is the read-out and LN q_S, flattened, (b, out_features), which the
    head reads in place of the backbone's own pooled features. Ours.

    Queries see every token that is no padding, as the last token of a decoder does.
    """

    def __init__(self, info: PathInfo, queries: int = 8, fixed: bool = False) -> None:
        """
        Args:
            info: the layers and sizes.
            queries: how many.
            fixed: of `Stages`.
        """
        super().__init__(info, fixed)
        self.queries = nn.Parameter(0.5 * torch.randn(queries, info.width))
        self.attentions = nn.ModuleList(CrossAttention(info.width, info.heads) for _ in range(info.stages))
        self.norm = nn.LayerNorm(info.width)
        self.out_features = queries * info.width + (0 if info.readout is None else info.readout.out_features)

    def forward(self, features: Features) -> Tensor:
        """(b, out_features)."""
        seen = None if features.mask is None else features.mask.bool()
        q = self.queries.expand(features.last.shape[0], -1, -1)
        for attention, g in zip(self.attentions, self.inputs(features), strict=True):
            q = q + attention(q, normalised(g), seen)
        return self.beside_readout(self.norm(q).flatten(1), features)
