"""BitFit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restuning._types import Port, Read, Said


@dataclass(frozen=True)
class Bias:
    """BitFit (Ben Zaken et al. 2022): the change b of an affine map's bias; `writes` parameters, zero at birth.

    A map without a bias gets one. It merges into the bias.
    """

    def __call__(self, port: Port) -> nn.Module:
        return BiasTuner(port.writes)


class BiasTuner(nn.Module):
    """(b, n, writes) → (b, n, writes); see `Bias`."""

    mixes_tokens = False
    merges = True
    source = "out"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Read, y: Said) -> Said:
        return self.bias.expand_as(y)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight, bias + self.bias
