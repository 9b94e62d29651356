"""Res-Tuning-Bypass."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Features
from restuning.side.again import again
from restuning.tuners.grid import cells, grid_side


class BypassNet(nn.Module):
    """Res-Tuning-Bypass (Res-Tuning, Eq. 8): a side path along a frozen backbone's features.

    x_0^byp = x_0;  x_l^byp = λ_l T_h(x_l) + (1 − λ_l) T_v(x_{l−1}^byp),  λ_l = sigmoid(a_l), a_l = 0 at initialisation.
    T(x) = x + tuner(x) holds its own skip; a layer without a tuner has T(x) = x. Features x_0 … x_L (b, n, d), which
    carry no gradient, become the tokens (b, n, d) that take the place of the final norm's input.

    Where x_l is of another grid or width than x_{l−1}, the path is averaged over the cells of the new grid, and mapped
    to the new width without a bias, before T_v. widths: of x_0 … x_L. These maps are zero at initialisation: the last
    stage alone speaks.

    joins: the path ends in a map from its width to the same, without a bias and zero at initialisation; its result is
    added to x_L. Features may then be maps (b, d, h, w) that become finer on the way (the nearest cell), as in a
    decoder.

    gate: λ at initialisation. by_channel: λ_l is a vector, one of each channel of x_l. normed: features are normalised
    over their channels, without weights, before the path reads them.
    """

    def __init__(
        self,
        widths: Sequence[int],
        horizontal: Mapping[int, nn.Module],
        vertical: Mapping[int, nn.Module],
        joins: bool = False,
        gate: float = 0.5,
        by_channel: bool = False,
        normed: bool = False,
    ) -> None:
        super().__init__()
        a = math.log(gate / (1 - gate))
        # vectors, which weight decay never touches
        self.gate: Any = (
            nn.ParameterList(torch.full((width,), a) for width in widths[1:])
            if by_channel
            else nn.Parameter(torch.full((len(widths) - 1,), a))
        )
        self.normed = normed
        self.horizontal = nn.ModuleDict({str(layer): tuner for layer, tuner in horizontal.items()})
        self.vertical = nn.ModuleDict({str(layer): tuner for layer, tuner in vertical.items()})
        self.across = nn.ModuleDict()
        for layer, (a, b) in enumerate(pairwise(widths)):
            if a != b:
                self.across[str(layer)] = linear = nn.Linear(a, b, bias=False)
                if not joins:
                    nn.init.zeros_(linear.weight)
        self.out = nn.Linear(widths[-1], widths[-1], bias=False) if joins else None
        if self.out is not None:
            nn.init.zeros_(self.out.weight)

    @property
    def mixes_tokens(self) -> bool:
        """Whether any of the tuners does; the path itself does not, but for its pooling."""
        return any(mixes_tokens(tuner) for tuner in (*self.horizontal.values(), *self.vertical.values()))

    @property
    def keeps_mean(self) -> bool:
        return not (self.horizontal or self.vertical or self.normed)

    def forward(self, features: Features) -> Tensor:
        grids = [x.shape[2:] if x.ndim == 4 else None for x in features]
        x = self._read(features[0])
        gates = [a.sigmoid() for a in self.gate] if isinstance(self.gate, nn.ParameterList) else self.gate.sigmoid()
        for layer, (h, weight) in enumerate(zip(features[1:], gates, strict=True)):
            step = partial(self._step, layer, grids[layer], grids[layer + 1])
            # of a decoder's maps, no more is kept for backward than what is read
            x = step(x, h, weight) if self.out is None else again(step, (x, h, weight), self._of(layer))
        x = x if self.out is None else self.out(x)
        return x if grids[-1] is None else x.transpose(1, 2).unflatten(2, grids[-1])

    def _step(self, layer: int, was: Any, grid: Any, x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        h = self._read(h)
        x = self._across(layer, x, h, was, grid)
        return torch.lerp(_with(self.vertical, layer, x), _with(self.horizontal, layer, h), weight)

    def _read(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        return F.layer_norm(x, x.shape[-1:]) if self.normed else x

    def _of(self, layer: int) -> list[nn.Parameter]:
        """A step's parameters, but for its gate."""
        parts = (side[str(layer)] for side in (self.horizontal, self.vertical, self.across) if str(layer) in side)
        return [p for part in parts for p in part.parameters()]

    def _across(self, layer: int, x: Tensor, to: Tensor, was: Any, grid: Any) -> Tensor:
        if x.shape[1] > to.shape[1] and _square(x) and _square(to):
            x = cells(x, 0, grid_side(to, 0))
        elif x.shape[1] != to.shape[1] and was is None:  # stretches of the sequence
            x = F.adaptive_avg_pool1d(x.transpose(1, 2), to.shape[1]).transpose(1, 2)
        x = self.across[str(layer)](x).to(to.dtype) if str(layer) in self.across else x
        if x.shape[1] < to.shape[1]:  # after the map, which is the same and costs less
            x = F.interpolate(x.transpose(1, 2).unflatten(2, was), grid).flatten(2).transpose(1, 2)
        return x


def _square(x: Tensor) -> bool:
    return math.isqrt(x.shape[1]) ** 2 == x.shape[1]


def _with(tuners: nn.ModuleDict, layer: int, x: Tensor) -> Tensor:
    """T(x): the tuner's own skip is here, so that a tuner never adds one."""
    name = str(layer)
    return x + tuners[name](x, x) if name in tuners else x


def mixes_tokens(module: nn.Module | None) -> bool:
    """Whether an output token may depend on other input tokens: what a tuner declares, and yes where it is silent."""
    return module is not None and bool(getattr(module, "mixes_tokens", True))


def keeps_mean(module: nn.Module | None) -> bool:
    """Whether the mean of what it says of some tokens is what it says of their mean."""
    return module is None or bool(getattr(module, "keeps_mean", False))
