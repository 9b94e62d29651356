"""`bypass-query`: learned queries that attend to the tokens of all layers, beside a read-out of every layer."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from restuning.errors import MethodError
from restuning.side.attending import normalised_tokens
from restuning.side.base import FeatureInfo
from restuning.side.features import Features, normalised
from restuning.side.stages import (
    FIXED_SEED,
    Buffers,
    CrossAttention,
    PathConfig,
    PathInfo,
    PathNetwork,
    SharedAttention,
)
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class BypassQuery(PathConfig):
    """Learned queries that attend to the tokens of all layers, stage by stage, beside a linear read-out of every layer;
    see `QueryNet`. Ours.

    Args:
        queries: how many; the other settings are those of `PathConfig`.
        fixed: the projections of the layers are not trained, and the same for all tasks, so that what the queries
            attend to is common to them: another task costs its queries and its head.
        shared: neither are the maps to keys and values: they come from a file of `restuning share`, trained on other
            tasks, or are random, and images are worked on once for all tasks. A task is its queries, its maps of
            queries and of what they read, and its head.
    """

    queries: int = 8
    fixed: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        check_size("BypassQuery", "queries", self.queries)
        for name in ("fixed", "shared"):
            if not isinstance(getattr(self, name), bool):
                raise MethodError(f"BypassQuery({name}={getattr(self, name)!r}): expected true or false")
        if self.shared and self.stem:
            raise MethodError("BypassQuery(shared=True): its stages are common to all tasks, and a stem is not")
        if self.shared and self.readout == "gated":
            raise MethodError("BypassQuery(shared=True): its read-out is common to all tasks, and gates are not")
        super().__post_init__()

    def build(self, info: FeatureInfo) -> "QueryNet | SharedQueryNet":
        if self.shared:
            return SharedQueryNet(PathInfo.of(self, info), queries=self.queries)
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
        return torch.cat(self.parts(features), -1)

    def parts(self, features: Features) -> tuple[Tensor, ...]:
        seen = None if features.mask is None else features.mask.bool()
        features = self.banked(features)
        q = self.queries.expand(features.last.shape[0], -1, -1)
        for attention, g in zip(self.attentions, self.inputs(features), strict=True):
            q = q + attention(q, normalised_tokens(g), seen)
        return *self.read_out(features), self.norm(q).flatten(1)


class SharedQueryNet(PathNetwork):
    """`QueryNet` with one part that is common to all tasks, buffers, D_l and [K_j, V_j] (w × 2 w), and one of each
    task's own, parameters: q_j = q_{j−1} + O_j softmax(W_j LN(q_{j−1}) (LN(g_j) K_j)ᵀ) LN(g_j) V_j for each head, with
    LN without weights. Keys and values of an image are the same for all tasks, whose queries attend to them together.
    Ours.
    """

    def __init__(self, info: PathInfo, queries: int = 8) -> None:
        """
        Args:
            info: the layers and sizes.
            queries: how many.
        """
        super().__init__(info, fixed=True)
        width, same = info.width, torch.Generator().manual_seed(FIXED_SEED + 1)
        self.keys_values, bound = Buffers(), (6 / (4 * width)) ** 0.5
        for _ in range(info.stages):
            both = torch.empty(width, 2 * width, device="cpu").uniform_(-bound, bound, generator=same)
            self.keys_values.append(both.to(torch.get_default_device()))
        self.heads = info.heads
        self.queries = nn.Parameter(0.5 * torch.randn(queries, width))
        self.attentions = nn.ModuleList(SharedAttention(width, info.heads) for _ in range(info.stages))
        self.out_features = queries * width + (0 if info.readout is None else info.readout.out_features)

    def forward(self, features: Features) -> Tensor:
        """(b, out_features)."""
        return torch.cat(self.parts(features), -1)

    def parts(self, features: Features) -> tuple[Tensor, ...]:
        seen = None if features.mask is None else features.mask.bool()
        prepared = features.prepared or self.prepare(features).prepared
        q = self.queries[None]  # in the first stage, of all images alike
        for j, attention in enumerate(self.attentions):
            q = q + attention(q, prepared[2 * j], prepared[2 * j + 1], seen)
        return *prepared[2 * len(self.attentions) :], normalised(q).flatten(1)

    def prepare(self, features: Features) -> Features:
        """Keys and values (b, heads, n, w / heads) of every stage, and the read-out; the layers are read no more."""
        made: list[Tensor] = []
        features = self.banked(features)
        for j, g in enumerate(self.inputs(features)):
            both = torch.unflatten(normalised_tokens(g) @ self.keys_values[j], -1, (2 * self.heads, -1)).transpose(1, 2)
            keys, values = both.chunk(2, 1)
            made += (keys * keys.shape[-1] ** -0.5, values)
        return replace(features, layers={}, summaries={}, prepared=(*made, *self.read_out(features)))

    def shared(self) -> list[Tensor]:
        """What is common to all tasks, and may be trained on many together."""
        return [*self.stages.down.buffers(), *self.keys_values.buffers()]

    def share_with(self, other: "SharedQueryNet") -> None:
        """Hold the other's common weights as its own, the same tensors."""
        self.stages.down, self.keys_values = other.stages.down, other.keys_values
