"""Convpass."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Input, Output, SiteInfo
from restuning.errors import MethodError
from restuning.tuners.base import Tuner
from restuning.tuners.grid import patches
from restuning.tuners.scale import check_rate, check_size


@dataclass(frozen=True)
class Convpass:
    """Convpass (Jie and Deng 2022): s · up(QuickGELU(conv₃ₓ₃(QuickGELU(down(x))))), the convolution over the grid of
    patches; CLS and registers pass it as grids of one. (in_features + out_features) r + 9 r² + 2 r + out_features
    parameters.

    width: r. factor: s. dropout: before up, in training. down is xavier-uniform, the convolution the identity, up and
    biases zero: the operation is unchanged at initialisation.
    Raises MethodError where the tokens are no grid of patches.
    """

    SIZE: ClassVar[str] = "width"

    width: int = 8
    factor: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_size("Convpass", "width", self.width)
        check_rate("Convpass", self.dropout)

    def __call__(self, info: SiteInfo) -> nn.Module:
        if info.grid is None:
            raise MethodError("Convpass needs a grid of patches, and this backbone's tokens are none")
        return ConvpassTuner(info.in_features, info.out_features, info.grid, self.width, self.factor, self.dropout)


class ConvpassTuner(Tuner):
    """(b, n, in_features) → (b, n, out_features); see `Convpass`."""

    layout = "patches"

    def __init__(
        self, in_features: int, out_features: int, prefix: int, width: int, factor: float, dropout: float
    ) -> None:
        super().__init__()
        self.prefix, self.factor, self.dropout = prefix, factor, dropout
        self.down, self.up = nn.Linear(in_features, width), nn.Linear(width, out_features)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.conv, self.up):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Input, y: Output) -> Output:
        h = _quick_gelu(self.down(x))
        alone = F.linear(h[:, : self.prefix], self.conv.weight[:, :, 1, 1], self.conv.bias)
        grid = self.conv(patches(h, self.prefix)).flatten(2).transpose(1, 2)
        h = _quick_gelu(torch.cat([alone, grid], 1))
        out: Tensor = self.up(F.dropout(h, self.dropout, self.training))
        return self.factor * out


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
