"""LoRA."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Input, InputMaps, Kernel, Output, OutputMaps, SiteInfo
from restuning.errors import MethodError
from restuning.tuners.base import Tuner
from restuning.tuners.scale import check_init, check_rate, check_size


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al. 2022): (alpha / rank) · x A Bᵀ beside an affine map; rank · (in_features + out_features)
    parameters.

    Beside a convolution, A is one of its kernel and stride, to r channels, and B one of 1 × 1: r (in_features · k² +
    out_features). In a grouped one ΔW is the matrix BA, r (in_features / groups · k² + out_features). Ranks that would
    cost more than the convolution itself are cut to what it costs.

    rank: r. alpha: its numerator; None: the rank, so a factor of one. dropout: on x, in training.
    A is kaiming-uniform, B zero: the map is unchanged at initialisation. It merges into the map's weight.
    Beside a table of embeddings, A is a table of r columns, zero, and B is normal, as PEFT has it.
    rank_stabilized: the factor is alpha / √rank (Kalajdzievski 2023). dora: the rows of W + ΔW are scaled to learned
    lengths, those of W at first (Liu et al. 2024); `out_features` parameters more. init: `kaiming`, or `pissa`, A and B
    from the largest singular values of W, of which ΔW is the change (Meng et al. 2024); the map is unchanged at first.
    Raises MethodError for a rank below 1 or above the widths, beside a convolution whose padding is not fixed, and for
    dora and pissa beside anything but a linear map.
    """

    SIZE: ClassVar[str] = "rank"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.1
    rank_stabilized: bool = False
    dora: bool = False
    init: Literal["kaiming", "pissa"] = "kaiming"

    def __post_init__(self) -> None:
        check_size("Lora", "rank", self.rank)
        check_rate("Lora", self.dropout)
        check_init("Lora", self.init, ("kaiming", "pissa"))
        if self.dora and self.init == "pissa":
            raise MethodError("Lora(dora=True, init='pissa'): expected one of the two")

    def __call__(self, info: SiteInfo) -> nn.Module:
        if (self.dora or self.init == "pissa") and (info.kernel is not None or info.words is not None):
            raise MethodError("Lora: dora and pissa go beside linear maps alone")
        if info.words is not None:
            return EmbeddingLoraTuner(info.words, info.out_features, self.rank, self.factor)
        if info.kernel is not None:
            return ConvLoraTuner(info.in_features, info.out_features, info.kernel, self)
        if self.rank > min(info.in_features, info.out_features):
            raise MethodError(
                f"Lora(rank={self.rank}): expected at most the widths, {info.in_features} and {info.out_features}"
            )
        kind = DoraTuner if self.dora else PissaTuner if self.init == "pissa" else LoraTuner
        return kind(info.in_features, info.out_features, self.rank, self.factor, self.dropout)

    @property
    def factor(self) -> float:
        if self.alpha is None and not self.rank_stabilized:
            return 1.0
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoraTuner(Tuner):
    """(b, n, in_features) → (b, n, out_features); see `Lora`. a (rank, in_features) and b (out_features, rank) as
    PEFT has them."""

    mixes_tokens = False

    def __init__(self, in_features: int, out_features: int, rank: int, factor: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        self.factor, self.dropout = factor, dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Input, y: Output) -> Output:
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a), self.b if self.factor == 1 else self.b * self.factor)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if weight.ndim != 2:
            raise MethodError(f"LoRA merges into a linear map; this weight is {tuple(weight.shape)}")
        return weight + self.change(), bias

    def change(self) -> Tensor:
        """ΔW (out_features, in_features)."""
        return self.factor * self.b @ self.a


class DoraTuner(LoraTuner):
    """(b, n, in_features) → (b, n, out_features); see `Lora`. length (out_features,): of the rows of the map. The
    frozen map's own weight is referred to, and not held."""

    def __init__(self, in_features: int, out_features: int, rank: int, factor: float, dropout: float) -> None:
        super().__init__(in_features, out_features, rank, factor, dropout)
        self.length = nn.Parameter(torch.ones(out_features))
        self._frozen: tuple[Tensor, Tensor | None] = (torch.empty(0), None)

    def bind(self, weight: Tensor, bias: Tensor | None) -> None:
        """The frozen map's weight (out_features, in_features) and bias (out_features,)."""
        self._frozen = (weight, bias)
        with torch.no_grad():
            self.length.copy_(weight.norm(dim=1))

    def forward(self, x: Input, y: Output) -> Output:
        weight, bias = self._frozen
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
            y = F.linear(x, weight.to(x.dtype))
        elif bias is not None:
            y = y - bias
        # the length of the rows is taken for a constant in the backward pass, as published (Section 4.3)
        scale = self.length / (weight + self.change()).norm(dim=1).detach()
        added: Tensor = (scale - 1) * y + scale * self.factor * F.linear(F.linear(x, self.a), self.b)
        return added

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        changed = weight + self.change()
        return changed * (self.length / changed.norm(dim=1))[:, None], bias


class PissaTuner(LoraTuner):
    """(b, n, in_features) → (b, n, out_features); see `Lora`. first_a, first_b: a and b as they were at first."""

    first_a: Tensor
    first_b: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, factor: float, dropout: float) -> None:
        super().__init__(in_features, out_features, rank, factor, dropout)
        self.register_buffer("first_a", self.a.detach().clone())
        self.register_buffer("first_b", self.b.detach().clone())

    def bind(self, weight: Tensor, bias: Tensor | None) -> None:
        """The frozen map's weight (out_features, in_features), of which the largest singular values are taken."""
        u, s, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        root = (s[: len(self.a)] / self.factor).sqrt()
        with torch.no_grad():
            for mine, first, value in (
                (self.a, self.first_a, root[:, None] * v[: len(self.a)]),
                (self.b, self.first_b, u[:, : len(self.a)] * root),
            ):
                mine.copy_(value)
                first.copy_(mine)

    def forward(self, x: Input, y: Output) -> Output:
        first = F.linear(F.linear(x, self.first_a), self.first_b)
        x = F.dropout(x, self.dropout, self.training)
        return self.factor * (F.linear(F.linear(x, self.a), self.b) - first)

    def change(self) -> Tensor:
        return self.factor * (self.b @ self.a - self.first_b @ self.first_a)


class EmbeddingLoraTuner(Tuner):
    """Words (b, n) → (b, n, out_features); see `Lora`. a (rank, words) and b (out_features, rank) as PEFT has them."""

    mixes_tokens = False
    layout = "map"  # words (b, n) are no tokens with a width

    def __init__(self, words: int, out_features: int, rank: int, factor: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, words))
        self.b = nn.Parameter(torch.randn(out_features, rank))
        self.factor = factor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * F.linear(F.embedding(x, self.a.T), self.b)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight + self.factor * (self.b @ self.a).T, bias


class ConvLoraTuner(Tuner):
    """(b, in_features, h, w) → (b, out_features, h', w'); see `Lora`. a (rank, in_features / groups, k, k) and b
    (out_features, rank, 1, 1), as PEFT has them where there are no groups."""

    layout = "map"

    def __init__(self, in_features: int, out_features: int, kernel: Kernel, config: Lora) -> None:
        super().__init__()
        if kernel.padding is None:
            raise MethodError("LoRA beside a convolution needs one whose padding is fixed")
        shape = (in_features // kernel.groups, *kernel.size)
        inner = math.prod(shape)
        rank = min(config.rank, max(1, out_features * inner // (out_features + inner)))
        self.a = nn.Parameter(torch.empty(rank, *shape))
        self.b = nn.Parameter(torch.zeros(out_features, rank, 1, 1))
        self.groups, self.factor, self.dropout = kernel.groups, config.factor, config.dropout
        self.settings: dict[str, Any] = {
            "stride": kernel.stride,
            "padding": kernel.padding,
            "dilation": kernel.dilation,
        }
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: InputMaps, y: OutputMaps) -> OutputMaps:
        x = F.dropout(x, self.dropout, self.training)
        if self.groups > 1:
            return F.conv2d(x, self._change(), groups=self.groups, **self.settings)
        return F.conv2d(F.conv2d(x, self.a, **self.settings), self.b * self.factor)

    def _change(self) -> Tensor:
        """ΔW (out_features, in_features / groups, k, k)."""
        product = self.b.flatten(1) @ self.a.flatten(1)
        return self.factor * product.view(len(self.b), *self.a.shape[1:])

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight + self._change(), bias
