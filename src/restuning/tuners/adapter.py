"""Res-Adapter."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Input, Output, SiteInfo
from restuning.errors import MethodError
from restuning.tuners.base import Tuner, TunerInput
from restuning.tuners.scale import Scale, branch_scale, check_init, check_rate, check_size

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class Adapter:
    """Res-Adapter (Res-Tuning, Eq. 6): s · (φ(z W_down + b_down) W_up + b_up), beside the operation.

    width: the bottleneck r; (2d + 1) r + d parameters at width d (16,138 at d = 768, r = 10).
    act: φ, one of gelu, relu, silu.
    scale: a learned weight of the branch, none, scalar or channel (d more parameters), one at initialisation.
    init: `zero` (W_up and biases zero, so the operation is unchanged at initialisation), `kaiming` (the same with
        LoRA's W_down; He et al. 2022), `xavier` (the paper's: both weights xavier-uniform, biases N(0, 1e-6)),
        `houlsby` (weights N(0, 1e-3) cut at two deviations; Houlsby et al. 2019), `bert` (weights N(0, 0.02); Pfeiffer
        et al. 2021) or `zeros` (both weights zero, so that b_up alone ever learns: the adapter of Jia et al. 2022).
    source: z, what the operation read (`normed`), the residual stream before its norm (`stream`), or what it said
        (`out`: the sequential adapter).
    factor: s, a constant. dropout: after φ, in training.
    Raises MethodError for a width below 1 or an unknown choice.
    """

    SIZE: ClassVar[str] = "width"
    TOKENWISE: ClassVar[bool] = True

    width: int = 10
    act: str = "gelu"
    scale: Scale = "none"
    init: Literal["zero", "kaiming", "xavier", "houlsby", "bert", "zeros"] = "zero"
    source: Literal["normed", "stream", "out"] = "normed"
    factor: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_size("Adapter", "width", self.width)
        check_rate("Adapter", self.dropout)
        check_init("Adapter", self.init, tuple(_INITS))
        if self.source not in ("normed", "stream", "out"):
            raise MethodError(f"Adapter(source={self.source!r}): expected one of normed, stream, out")
        if self.act not in ACTIVATIONS:
            raise MethodError(f"Adapter(act={self.act!r}): expected one of {', '.join(ACTIVATIONS)}")

    def __call__(self, info: SiteInfo) -> nn.Module:
        in_features = info.out_features if self.source == "out" else info.in_features
        return AdapterTuner(in_features, info.out_features, self)


class AdapterTuner(Tuner):
    """(b, n, in_features) → (b, n, out_features); see `Adapter`."""

    mixes_tokens = False

    def __init__(self, in_features: int, out_features: int, config: Adapter) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, config.width)
        self.up = nn.Linear(config.width, out_features)
        self.scale = branch_scale(config.scale, out_features)
        self.act, self.input = ACTIVATIONS[config.act], _INPUT[config.source]
        self.factor, self.dropout = config.factor, config.dropout
        down, up, bias = _INITS[config.init]
        down(self.down.weight)
        up(self.up.weight)
        bias(self.down.bias)
        bias(self.up.bias)

    def forward(self, x: Input, y: Output) -> Output:
        weight: Tensor = self.up.weight
        bias: Tensor = self.up.bias
        if self.scale is not None:  # folded into W_up: nothing of the size of the tokens is kept for backward
            weight, bias = weight * self.scale[:, None], bias * self.scale
        if self.factor != 1:
            weight, bias = weight * self.factor, bias * self.factor
        return F.linear(F.dropout(self.act(self.down(x)), self.dropout, self.training), weight, bias)

    def extra_repr(self) -> str:
        return f"act={getattr(self.act, '__name__', self.act)}, scale={None if self.scale is None else len(self.scale)}"


_INPUT: dict[str, TunerInput] = {"normed": "normed", "stream": "residual", "out": "output"}
_lora = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
_houlsby = partial(nn.init.trunc_normal_, std=1e-3, a=-2e-3, b=2e-3)
_bert = partial(nn.init.normal_, std=0.02)
_zero, _xavier = nn.init.zeros_, nn.init.xavier_uniform_
_INITS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "zero": (_xavier, _zero, _zero),
    "kaiming": (_lora, _zero, _zero),
    "xavier": (_xavier, _xavier, partial(nn.init.normal_, std=1e-6)),
    "houlsby": (_houlsby, _houlsby, _zero),
    "bert": (_bert, _bert, _zero),
    "zeros": (_zero, _zero, _zero),
}
"""How W_down, W_up and the biases begin."""
