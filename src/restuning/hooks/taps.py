"""The backbone's features, taken as its forward runs."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from restuning._types import Features
from restuning.backbones.sites import Sites
from restuning.errors import MethodError
from restuning.hooks.points import argument, as_tokens, before, on_input
from restuning.side.features import ALL, TokenSelection

INPUT = -1
"""The layer before all others: what the backbone itself is given."""

MASK = -2
"""Not a layer: the attention mask (b, n) that the backbone is given, which tells tokens from padding."""


class Taps:
    """The backbone's per-block outputs, x_0 … x_L, as its forward runs; layers that are not wanted are not kept.

    What is kept of frozen layers of one shape goes to one piece of memory, made with the first: small pieces that
    outlive the large ones between them would keep an allocator from giving those back.
    """

    def __init__(self, layers: Iterable[int], view: TokenSelection, one_shape: bool, maps: bool = False) -> None:
        """maps: layers are kept whole, as they come."""
        self.wanted = sorted(set(layers))
        self.view, self.one_shape, self.maps = view, one_shape, maps
        self.kept: dict[int, Tensor] = {}
        self.given: Tensor | None = None  # the attention mask
        self.memory: Tensor | None = None
        self.oblong = False  # whether a map was not square

    def keep(self, layer: int, x: Tensor) -> None:
        if self.maps:
            self.kept[layer] = x
            return
        self.oblong = self.oblong or (x.ndim == 4 and x.shape[2] != x.shape[3])
        if self.oblong and isinstance(self.view.tokens, int) and self.view.tokens > 1:
            raise MethodError(f"a map of {x.shape[2]} x {x.shape[3]}: a grid of its cells needs it square")
        x = as_tokens(x)
        seen = self.view(x, self.given)
        if x.requires_grad or seen is x or not self.one_shape:  # a slice would hold the memory of all
            self.kept[layer] = seen.clone() if self.view.tokens in ("first", "last") else seen
            return
        if self.memory is None or self.memory.shape[1:] != seen.shape or self.memory.dtype != seen.dtype:
            self.memory = seen.new_empty(len(self.wanted), *seen.shape)
        self.kept[layer] = self.memory[self.wanted.index(layer)].copy_(seen)

    @property
    def features(self) -> Features:
        if MASK in self.wanted and MASK not in self.kept:  # no padding
            last = self.kept[self.wanted[-1]]
            self.kept[MASK] = last.new_ones(last.shape[:2])
        return tuple(self.kept[layer] for layer in self.wanted)

    def mask(self, m: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(m.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if given is not None and given.ndim != 2:
            raise MethodError(f"an attention mask {tuple(given.shape)}: expected (b, n), to tell tokens from padding")
        self.given = given
        if given is not None and MASK in self.wanted:
            self.kept[MASK] = given


@contextmanager
def tap(backbone: nn.Module, sites: Sites, layers: Iterable[int], view: TokenSelection = ALL) -> Iterator[Taps]:
    """While it lasts, `layers` are kept (MASK; INPUT; 0: what the first block reads; l: what block l says)."""
    taps = Taps(layers, view, sites.uniform, maps=sites.join is not None)
    with ExitStack() as stack:
        if view.by_mask or MASK in taps.wanted:
            stack.enter_context(before(backbone, taps.mask))
        for layer in taps.wanted:
            if layer == INPUT:

                def whole(m: nn.Module, args: Any, kwargs: Any) -> None:
                    taps.kept[INPUT] = argument(m, args, kwargs)[1]

                stack.enter_context(before(backbone, whole))
                continue
            if layer == MASK:
                continue
            stack.enter_context(on_input(backbone, sites.layer(layer), partial(taps.keep, layer), first=True)())
        yield taps
