"""Res-Adapter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Port, Tokens
from restuning.errors import MethodError
from restuning.tuners.scale import Scale, branch_scale, check_init, check_size

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class Adapter:
    """Res-Adapter (Res-Tuning, Eq. 6): φ(x W_down + b_down) W_up + b_up, beside the operation.

    width: the bottleneck r; (2d + 1) r + d parameters at width d (16,138 at d = 768, r = 10).
    act: φ, one of gelu, relu, silu.
    scale: a learned weight of the branch, none, scalar or channel (d more parameters), one at birth.
    init: `zero` (W_up and biases zero, so the operation is unchanged at birth; Houlsby et al. 2019) or `xavier`
        (the paper's: both weights xavier-uniform, biases N(0, 1e-6)).
    Raises MethodError for a width below 1 or an unknown choice.
    """

    width: int = 10
    act: str = "gelu"
    scale: Scale = "none"
    init: Literal["zero", "xavier"] = "zero"

    def __post_init__(self) -> None:
        check_size("Adapter", "width", self.width)
        check_init("Adapter", self.init, ("zero", "xavier"))
        if self.act not in ACTIVATIONS:
            raise MethodError(f"Adapter(act={self.act!r}): expected one of {', '.join(ACTIVATIONS)}")

    def __call__(self, port: Port) -> nn.Module:
        return AdapterTuner(port.reads, port.writes, self.width, self.act, self.scale, self.init)


class AdapterTuner(nn.Module):
    """(b, n, reads) → (b, n, writes); see `Adapter`."""

    mixes_tokens = False

    def __init__(self, reads: int, writes: int, width: int, act: str, scale: Scale, init: str) -> None:
        super().__init__()
        self.down = nn.Linear(reads, width)
        self.up = nn.Linear(width, writes)
        self.scale = branch_scale(scale, writes)
        self.act = ACTIVATIONS[act]
        nn.init.xavier_uniform_(self.down.weight)
        if init == "xavier":
            nn.init.xavier_uniform_(self.up.weight)
            nn.init.normal_(self.down.bias, std=1e-6)
            nn.init.normal_(self.up.bias, std=1e-6)
        else:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tokens, y: Tokens) -> Tokens:
        weight: Tensor = self.up.weight
        bias: Tensor = self.up.bias
        if self.scale is not None:  # folded into W_up: nothing of the size of the tokens is kept for backward
            weight, bias = weight * self.scale[:, None], bias * self.scale
        return F.linear(self.act(self.down(x)), weight, bias)

    def extra_repr(self) -> str:
        return f"act={getattr(self.act, '__name__', self.act)}, scale={None if self.scale is None else len(self.scale)}"
