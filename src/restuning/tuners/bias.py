"""BitFit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restuning._types import Input, Output, SiteInfo
from restuning.tuners.base import Tuner


@dataclass(frozen=True)
class Bias:
    """BitFit (Ben Zaken et al. 2022): the change b of an affine map's bias; `out_features` parameters, zero at
    initialisation.

    A map without a bias gets one. It merges into the bias.
    """

    def __call__(self, info: SiteInfo) -> nn.Module:
        return BiasTuner(info.out_features)


class BiasTuner(Tuner):
    """(b, n, out_features) → (b, n, out_features); see `Bias`."""

    mixes_tokens = False
    input = "output"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Input, y: Output) -> Output:
        return self.bias.expand_as(y)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight, bias + self.bias
