"""SSF."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from restuning._types import Input, Output, SiteInfo
from restuning.tuners.base import Tuner
from restuning.tuners.scale import check_init


@dataclass(frozen=True)
class Ssf:
    """SSF (Lian et al. 2022): γ ⊙ y + β of what an operation says, so (γ − 1) ⊙ y + β beside it; 2 · out_features
    parameters.

    init: `normal`, γ ~ N(1, 0.02) and β ~ N(0, 0.02) as published, or `identity`, γ = 1 and β = 0, which leaves the
    operation unchanged at initialisation. It merges into the weight and bias of an affine map or a norm.
    """

    init: Literal["normal", "identity"] = "normal"

    def __post_init__(self) -> None:
        check_init("Ssf", self.init, ("normal", "identity"))

    def __call__(self, info: SiteInfo) -> nn.Module:
        return SsfTuner(info.out_features, self.init)


class SsfTuner(Tuner):
    """(b, n, out_features) → (b, n, out_features); see `Ssf`."""

    mixes_tokens = False
    input = "output"

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
