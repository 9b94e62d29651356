"""LST."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Tokens
from restuning.errors import MethodError, line
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork, check_grid, require_one_width
from restuning.side.features import Features

TEMPERATURE = 0.1


@dataclass(frozen=True)
class Ladder(SideConfig):
    """LST (Sung et al. 2022): a side transformer of width d / reduction, all of it trained; see `LadderNet`.

    init: where its blocks come from: the backbone's own, structurally pruned by `magnitude` or by `fisher` information
    on the training data, or `random`. grid: as in `Bypass`.
    """

    reduction: int = 16
    init: Literal["magnitude", "fisher", "random"] = "magnitude"
    grid: int | None = None

    def __post_init__(self) -> None:
        if type(self.reduction) is not int or self.reduction < 1:
            raise MethodError(f"Ladder(reduction={self.reduction!r}): expected a whole number of at least 1")
        if self.init not in ("magnitude", "fisher", "random"):
            raise MethodError(f"Ladder(init={self.init!r}): expected magnitude, fisher or random")
        check_grid("Ladder", self.grid)

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        return self.init != "random"

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.init == "fisher"

    def from_bank(self) -> bool:
        return not self.needs_weights and self.grid is not None

    def build(self, info: FeatureInfo) -> "LadderNet":
        require_one_width("a ladder", info)
        width, heads = info.head.out_features, info.head.heads
        side = width // self.reduction
        if side < heads or width % self.reduction or side % heads:
            raise MethodError(f"a ladder of width {width} / {self.reduction}: expected a multiple of its {heads} heads")
        net = LadderNet(info.blocks, width, side, heads, max(info.hidden // self.reduction, 1))
        if self.needs_weights and info.weights is not None:
            try:
                prune(net, info.weights(), lambda weight: weight.detach().abs())
            except (RuntimeError, IndexError) as error:
                raise MethodError(
                    f"{info.name} cannot be pruned into a ladder ({line(error)}): use init='random'"
                ) from error
        return net


class LadderNet(SideNetwork):
    """Ladder side-tuning (Sung et al. 2022): a thin transformer along a frozen backbone's features.

    s_0 = D_0 x_0;  s_l = block_l(μ_l s_{l−1} + (1 − μ_l) D_l x_l),  μ_l = sigmoid(a_l / 0.1), a_l = 0 at
    initialisation; U s_L takes the place of the final norm's input. D (width → side width) and U have no bias. mask (b,
    n): which tokens are no padding, and are attended to.
    """

    def __init__(self, depth: int, width: int, side: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, side, bias=False) for _ in range(depth + 1))
        self.blocks = nn.ModuleList(SideBlock(side, heads, hidden) for _ in range(depth))
        self.up = nn.Linear(side, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(depth))

    def forward(self, features: Features) -> Tokens:
        """Tokens (b, n, d) in place of the final norm's input."""
        mask = features.mask
        layers = [features.layers[layer] for layer in range(len(self.down))]
        x = self.down[0](layers[0])
        mu = torch.sigmoid(self.gate / TEMPERATURE)
        for block, down, h, weight in zip(self.blocks, self.down[1:], layers[1:], mu, strict=True):
            h = down(h)
            x = block(torch.lerp(h, x.to(h.dtype), weight.to(h.dtype)), mask)
        out: Tensor = self.up(x)
        return out


class SideBlock(nn.Module):
    """A pre-norm transformer block, (b, n, side) → (b, n, side)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tokens, mask: Tensor | None = None) -> Tokens:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None].bool()
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).reshape(b, n, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


Roles = Mapping[str, Sequence[Any]]
"""A backbone block's affine modules: norm1, qkv (one fused, or three), proj, norm2, fc1, fc2."""


@torch.no_grad()
def prune(net: LadderNet, blocks: Sequence[Roles], score: Callable[[nn.Parameter], Tensor]) -> None:
    """Give `net` the most important rows and columns of the backbone's own blocks (LST, section 3.3).

    score(weight) is each weight's importance: its magnitude, or its Fisher information. One choice of the stream's
    channels for all blocks, by what writes to them; in each block the best dimensions of each head (queries with
    their keys, values with the projection's columns), and the best hidden units.
    Raises MethodError where a block lacks one of the modules.
    """
    first: Any = net.blocks[0]
    side, heads = net.up.in_features, first.heads
    for roles in blocks:
        missing = [role for role in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2") if not roles.get(role)]
        if missing:
            raise MethodError(f"pruning the backbone into a ladder needs its {', '.join(missing)}: use init='random'")
        if len(roles["fc1"]) > 1 or roles["fc1"][0].out_features != roles["fc2"][0].in_features:
            raise MethodError("pruning the backbone into a ladder needs an ungated FFN: use init='random'")
    writes = [score(r[role][0].weight).sum(1) for r in blocks for role in ("proj", "fc2")]
    stream = _best(torch.stack(writes).sum(0), side)
    block: Any
    for block, r in zip(net.blocks, blocks, strict=True):
        (q, k, v), biases = _qkv(r["qkv"])
        (sq, sk, sv), _ = _qkv(r["qkv"], score)
        proj, fc1, fc2 = (r[role][0] for role in ("proj", "fc1", "fc2"))
        queries = _best_by_head((sq + sk)[:, stream].sum(1), heads, side)
        values = _best_by_head(sv[:, stream].sum(1) + score(proj.weight)[stream].sum(0), heads, side)
        hidden = _best(score(fc1.weight)[:, stream].sum(1) + score(fc2.weight)[stream].sum(0), block.fc1.out_features)
        rows = (queries, queries, values)
        fewer = (side / len(q)) ** 0.25  # softmax divides by the root of a head's width: keep the size of its scores
        scales = (fewer, fewer, 1.0)
        parts = [w[i][:, stream] * s for w, i, s in zip((q, k, v), rows, scales, strict=True)]
        block.qkv.weight.copy_(torch.cat(parts))
        nn.init.zeros_(block.qkv.bias)
        if biases is not None:
            block.qkv.bias.copy_(torch.cat([b[i] * s for b, i, s in zip(biases, rows, scales, strict=True)]))
        _copy(block.proj, proj, stream, values)
        _copy(block.fc1, fc1, hidden, stream)
        _copy(block.fc2, fc2, stream, hidden)
        _copy(block.norm1, r["norm1"][0], stream)
        _copy(block.norm2, r["norm2"][0], stream)


def _qkv(
    modules: Sequence[Any], score: Callable[[nn.Parameter], Tensor] = lambda w: w
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    """Queries', keys' and values' weights and biases, of one fused module or of three."""
    weights = [score(m.weight) for m in modules]
    biases = [m.bias for m in modules]
    if len(modules) == 1:
        return weights[0].chunk(3), None if biases[0] is None else biases[0].chunk(3)
    return weights, None if any(b is None for b in biases) else biases


def _copy(to: Any, of: Any, rows: Tensor, columns: Tensor | None = None) -> None:
    to.weight.copy_(of.weight[rows] if columns is None else of.weight[rows][:, columns])
    nn.init.zeros_(to.bias)
    if getattr(of, "bias", None) is not None:
        to.bias.copy_(of.bias[rows])


def _best(importance: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest, in their own order."""
    return importance.topk(count).indices.sort().values


def _best_by_head(importance: Tensor, heads: int, count: int) -> Tensor:
    each = importance.view(heads, -1)
    starts = torch.arange(heads, device=each.device)[:, None] * each.shape[1]
    return (each.topk(count // heads, dim=1).indices.sort(dim=1).values + starts).flatten()
