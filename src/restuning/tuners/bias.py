"""BitFit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restuning._types import SiteInfo, Input, Output


@dataclass(frozen=True)
class Bias:
    """BitFit (Ben Zaken et al. 2022): the change b of an affine map's bias; `writes` parameters, zero at
    initialisation.

    A map without a bias gets one. It merges into the bias.
    """

    def __call__(self, info: SiteInfo) -> nn.Module:
        return BiasTuner(info.out_features)


class BiasTuner(nn.Module):
    """(b, n, writes) → (b, n, writes); see `Bias`."""

    mixes_tokens = False
    merges = True
    source = "out"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Input, y: Output) -> Output:
        return self.bias.expand_as(y)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight, bias + self.bias
