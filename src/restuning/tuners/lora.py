"""LoRA."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Input, InputMaps, Kernel, Output, OutputMaps, SiteInfo
from restuning.errors import MethodError
from restuning.tuners.base import Tuner
from restuning.tuners.scale import check_rate, check_size


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al. 2022): (alpha / rank) · x A Bᵀ beside an affine map; rank · (in_features + out_features)
    parameters.

    Beside a convolution, A is one of its kernel and stride, to r channels, and B one of 1 × 1: r (in_features · k² +
    out_features). In a grouped one ΔW is the matrix BA, r (in_features / groups · k² + out_features). Ranks that would
    cost more than the convolution itself are cut to what it costs.

    rank: r. alpha: its numerator; None: the rank, so a factor of one. dropout: on x, in training.
    A is kaiming-uniform, B zero: the map is unchanged at initialisation. It merges into the map's weight.
    Raises MethodError for a rank below 1 or above the widths, and beside a convolution whose padding is not fixed.
    """

    SIZE: ClassVar[str] = "rank"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_size("Lora", "rank", self.rank)
        check_rate("Lora", self.dropout)

    def __call__(self, info: SiteInfo) -> nn.Module:
        if info.kernel is not None:
            return ConvLoraTuner(info.in_features, info.out_features, info.kernel, self)
        if self.rank > min(info.in_features, info.out_features):
            raise MethodError(
                f"Lora(rank={self.rank}): expected at most the widths, {info.in_features} and {info.out_features}"
            )
        return LoraTuner(info.in_features, info.out_features, self.rank, self.factor, self.dropout)

    @property
    def factor(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


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
        return weight + self.factor * self.b @ self.a, bias


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
