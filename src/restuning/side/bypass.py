"""Res-Tuning-Bypass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from restuning.errors import MethodError
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork, check_grid, check_indices
from restuning.side.features import Features
from restuning.tuners.base import TunerConfig, as_tuner, check_config, make, mixes_no_tokens, resized
from restuning.tuners.grid import cells, grid_side


@dataclass(frozen=True)
class Bypass(SideConfig):
    """Res-Tuning-Bypass (Eq. 8): settings of the horizontal and the vertical tuners; None is an identity tuner.

    blocks: the blocks that carry tuners, counted from 0 (over stages: the steps between them); None: all. Every block
    keeps its λ.
    grid: g, not the paper's: the path runs on CLS and on the patches pooled to a g × g grid, and the head reads all of
    these tokens; None: on the tokens that the head's pooling can see.
    over: what the path runs over, all `blocks` or, from the first to the last, the outputs of the `stages`; None: the
    stages where there are several.
    gate: λ at initialisation; the paper's is 0.5; towards 1 the path begins as the backbone's own output. gates: one λ
    a `layer`, as in the paper, or one a `channel`. normed: features are normalised (LayerNorm without weights) before
    the path reads them. These three are ours.
    """

    horizontal: TunerConfig | None = None
    vertical: TunerConfig | None = None
    blocks: Sequence[int] | None = None
    grid: int | None = None
    over: Literal["blocks", "stages"] | None = None
    gate: float = 0.5
    gates: Literal["layer", "channel"] = "layer"
    normed: bool = False

    def __post_init__(self) -> None:
        check_grid("Bypass", self.grid)
        if not (isinstance(self.gate, float) and 0 < self.gate < 1):
            raise MethodError(f"Bypass(gate={self.gate!r}): expected a number between 0 and 1")
        if self.gates not in ("layer", "channel"):
            raise MethodError(f"Bypass(gates={self.gates!r}): expected layer or channel")
        if not isinstance(self.normed, bool):
            raise MethodError(f"Bypass(normed={self.normed!r}): expected true or false")
        if self.over not in (None, "blocks", "stages"):
            raise MethodError(f"Bypass(over={self.over!r}): expected blocks, stages or None")
        for side in ("horizontal", "vertical"):
            if getattr(self, side) is not None:
                check_config(f"Bypass: the {side} tuner", getattr(self, side))

    def layers(self, info: FeatureInfo) -> Sequence[int]:
        if info.decoder and self.over is not None:
            raise MethodError(f"Bypass(over={self.over!r}): on {info.name} it runs over its decoder")
        if self.over == "stages" and info.uniform:
            raise MethodError(f"Bypass(over='stages'): {info.name} has one stage; leave it out")
        over_stages = not info.decoder and not info.uniform and self.over != "blocks"
        return info.stages if over_stages else range(len(info.layers))

    def build(self, info: FeatureInfo) -> "BypassNet":
        along = [info.layers[layer] for layer in self.layers(info)]
        count = len(along) - 1
        over_blocks = len(along) > info.blocks
        what, where = ("block", "this backbone") if over_blocks else ("step", "the path")
        check_indices(self.blocks, count, what, where)
        steps = range(count) if self.blocks is None else self.blocks

        def made(config: TunerConfig | None) -> dict[int, nn.Module]:
            if config is None:
                return {}
            tuners = {step: as_tuner(make(config, along[step + 1], "the bypass")) for step in steps}
            if any(tuner.only_on for tuner in tuners.values()):
                raise MethodError(f"{type(config).__name__} acts inside a backbone: it cannot be a tuner of the bypass")
            return tuners

        return BypassNet(
            [site.out_features for site in along],
            made(self.horizontal),
            made(self.vertical),
            path=self.layers(info),
            joins=info.denoises,
            gate=self.gate,
            by_channel=self.gates == "channel",
            normed=self.normed,
            one_grid=info.uniform,
        )

    def from_bank(self) -> bool:
        return all(mixes_no_tokens(config) for config in (self.horizontal, self.vertical) if config is not None)

    def resized(self, size: int) -> "Bypass":
        return replace(self, horizontal=resized(self.horizontal, size), vertical=resized(self.vertical, size))

    def on_blocks(self, blocks: Sequence[int]) -> "Bypass":
        return replace(self, blocks=tuple(blocks))


class BypassNet(SideNetwork):
    """Res-Tuning-Bypass (Res-Tuning, Eq. 8): a side path along a frozen backbone's features.

    x_0^byp = x_0;  x_l^byp = λ_l T_h(x_l) + (1 − λ_l) T_v(x_{l−1}^byp),  λ_l = sigmoid(a_l), a_l = 0 at initialisation.
    T(x) = x + tuner(x) holds its own skip; a layer without a tuner has T(x) = x. Features x_0 … x_L (b, n, d), which
    carry no gradient, become the tokens (b, n, d) that take the place of the final norm's input.

    Where x_l is of another grid or width than x_{l−1}, the path is averaged over the cells of the new grid, and mapped
    to the new width without a bias, before T_v. widths: of x_0 … x_L. These maps are zero at initialisation, where the
    output is that of the last stage alone.

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
        path: Sequence[int] | None = None,
        joins: bool = False,
        gate: float = 0.5,
        by_channel: bool = False,
        normed: bool = False,
        one_grid: bool = True,
    ) -> None:
        """
        Args:
            widths: of the layers that the path reads.
            horizontal: tuners of those layers, by step from 0.
            vertical: tuners of the path, by step from 0.
            path: the indices of the layers; None: 0, 1, ….
            joins, gate, by_channel, normed: see above.
            one_grid: whether all layers have the same tokens.
        """
        super().__init__()
        self.path = tuple(range(len(widths)) if path is None else path)
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

        self.reads_padding = False
        tuners: list[Any] = [*self.horizontal.values(), *self.vertical.values()]
        self.mixes_tokens = any(tuner.mixes_tokens for tuner in tuners)
        self.keeps_mean = one_grid and not (tuners or normed)

    def forward(self, features: Features) -> Tensor:
        """Tokens (b, n, d) in place of the final norm's input; a map (b, d, h, w) that is added, where the path
        joins."""
        along = [features.layers[layer] for layer in self.path]
        grids = [x.shape[2:] if x.ndim == 4 else None for x in along]
        x = self._read(along[0])
        gates = [a.sigmoid() for a in self.gate] if isinstance(self.gate, nn.ParameterList) else self.gate.sigmoid()
        for layer, (h, weight) in enumerate(zip(along[1:], gates, strict=True)):
            step = partial(self._step, layer, grids[layer], grids[layer + 1])
            # of a decoder's maps, no more is kept for backward than what is read
            x = step(x, h, weight) if self.out is None else checkpoint(step, x, h, weight, use_reentrant=False)
        x = x if self.out is None else self.out(x)
        return x if grids[-1] is None else x.transpose(1, 2).unflatten(2, grids[-1])

    def branches(self) -> list[tuple[nn.Module, float]]:
        sides = (self.horizontal, self.vertical)
        found = [(tuner, int(step) / (len(self.path) - 1)) for side in sides for step, tuner in side.items()]
        return found or super().branches()

    def _step(self, layer: int, was: Any, grid: Any, x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        h = self._read(h)
        x = self._across(layer, x, h, was, grid)
        return torch.lerp(_with(self.vertical, layer, x), _with(self.horizontal, layer, h), weight)

    def _read(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        return F.layer_norm(x, x.shape[-1:]) if self.normed else x

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
