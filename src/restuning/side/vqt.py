"""VQT: learned queries run through the frozen blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.errors import MethodError
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork, require_one_width
from restuning.side.features import ALL, Features, TokenSelection, normalised
from restuning.tuners.scale import check_size

EPSILON = 1e-6
"""Of the norms of vision transformers."""

ROLES = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")


@dataclass(frozen=True)
class Vqt(SideConfig):
    """Visual query tuning (Tu et al., CVPR 2023); see `VqtNet`. For images, and blocks whose norms come first.

    Args:
        queries: q, of every block.

    Raises:
        MethodError: it is below 1.
    """

    queries: int = 1

    needs_weights = True
    own_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("Vqt", "queries", self.queries)

    def tokens(self, info: FeatureInfo) -> TokenSelection:
        return ALL

    def resized(self, size: int) -> Self:
        return replace(self, queries=size)

    def build(self, info: FeatureInfo) -> "VqtNet":
        require_one_width("VQT", info)
        if info.prefix is None or info.denoises:
            raise MethodError(f"VQT reads images, and {info.name} does not")
        blocks = [] if info.weights is None else list(info.weights())
        for roles in blocks:
            if missing := [role for role in ROLES if not roles.get(role)]:
                raise MethodError(f"VQT runs queries through the backbone's blocks: {info.name} lacks {missing[0]}")
            if len(roles["fc1"]) > 1 or roles["fc1"][0].out_features != roles["fc2"][0].in_features:
                raise MethodError(f"VQT needs an ungated FFN, which {info.name} has not")
        return VqtNet(info.blocks, info.head.out_features, info.head.heads, self.queries, info.prefix, blocks)


class VqtNet(SideNetwork):
    """Of every block l, q learned queries P_l (q × d) pass the frozen block, where they attend to the keys and values
    of the image's tokens x_{l−1}, and no token attends to them: z_l = P_l + proj(Attn(Q(n P_l), K(n x_{l−1}), V(n
    x_{l−1}))), o_l = z_l + fc2(gelu(fc1(n' z_l))), with the block's own norms n, n' and maps, without a LayerScale. The
    head reads 0.3 · [LN(x_L) of the first token, or of the mean; LN(o_1), …, LN(o_L)], LN without weights, (b, d (1 + q
    L)). `q d L` parameters beside the head.
    """

    output = "pooled"

    def __init__(
        self,
        blocks: int,
        width: int,
        heads: int,
        queries: int,
        prefix: int,
        frozen: Sequence[Mapping[str, Sequence[Any]]],
    ) -> None:
        """
        Args:
            blocks: L.
            width, heads: of the backbone.
            queries: q.
            prefix: how many tokens come before the patches.
            frozen: role → affine maps, block by block, which stay the backbone's; none where there are no weights.
        """
        super().__init__()
        self.prompts = nn.Parameter(0.02 * torch.randn(blocks, queries, width))
        self.heads, self.prefix = heads, prefix
        self._frozen = tuple(frozen)  # no part of this module: neither trained nor saved with it
        self.out_features = width * (1 + queries * blocks)

    def forward(self, features: Features) -> Tensor:
        """(b, out_features)."""
        found = [self._block(i, roles, features.layers[i]) for i, roles in enumerate(self._frozen)]
        last = normalised(features.layers[len(self._frozen)])
        first = last[:, 0] if self.prefix else last.mean(1)
        return 0.3 * torch.cat([first, *(normalised(o).flatten(1) for o in found)], -1)

    def _block(self, i: int, roles: Mapping[str, Sequence[Any]], x: Tensor) -> Tensor:
        p = self.prompts[i].expand(len(x), -1, -1)
        norm1, norm2, proj, fc1, fc2 = (roles[name][0] for name in ("norm1", "norm2", "proj", "fc1", "fc2"))
        q = _qkv(roles["qkv"], _norm(norm1, p))[0]
        _, k, v = _qkv(roles["qkv"], _norm(norm1, x))
        q = q.to(k.dtype)  # under autocast, of many adapters at once
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        z = p + _map(proj, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return z + _map(fc2, F.gelu(_map(fc1, _norm(norm2, z))))


def _norm(affine: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], affine.weight, affine.bias, EPSILON)


def _map(affine: Any, x: Tensor) -> Tensor:
    return F.linear(x, affine.weight, affine.bias)


def _qkv(affine: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values, of one fused map or of three."""
    return _map(affine[0], x).chunk(3, -1) if len(affine) == 1 else [_map(each, x) for each in affine]
