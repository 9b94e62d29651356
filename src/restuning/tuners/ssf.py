"""SSF."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from restuning._types import SiteInfo, Input, Output
from restuning.tuners.scale import check_init


@dataclass(frozen=True)
class Ssf:
    """SSF (Lian et al. 2022): γ ⊙ y + β of what an operation says, so (γ − 1) ⊙ y + β beside it; 2 · writes parameters.

    init: `normal`, γ ~ N(1, 0.02) and β ~ N(0, 0.02) as published, or `identity`, γ = 1 and β = 0, which leaves the
    operation unchanged at initialisation. It merges into the weight and bias of an affine map or a norm.
    """

    init: Literal["normal", "identity"] = "normal"

    def __post_init__(self) -> None:
        check_init("Ssf", self.init, ("normal", "identity"))

    def __call__(self, info: SiteInfo) -> nn.Module:
        return SsfTuner(info.out_features, self.init)


class SsfTuner(nn.Module):
    """(b, n, writes) → (b, n, writes); see `Ssf`."""

    mixes_tokens = False
    merges = True
    source = "out"

    def __init__(self, width: int, init: str) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        if init == "normal":
            nn.init.normal_(self.scale, 1.0, 0.02)
            nn.init.normal_(self.shift, 0.0, 0.02)

    def forward(self, x: Input, y: Output) -> Output:
        return torch.addcmul(self.shift, self.scale - 1, y)

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        by_row = self.scale.reshape(-1, *[1] * (weight.ndim - 1))
        return weight * by_row, bias * self.scale + self.shift
