"""The backbone's features, taken as its forward runs."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.sites import Sites
from restuning.errors import MethodError, SiteError
from restuning.hooks.points import argument, as_tokens, before, on_input
from restuning.side.features import ALL, FeatureRequest, Features


class Taps:
    """What is asked for of the features of one forward; the rest is not kept.

    Frozen layers of one shape go to one piece of memory, made with the first: small pieces that outlive the large ones
    between them would keep an allocator from giving those back.
    """

    def __init__(
        self, request: FeatureRequest, one_shape: bool, maps: bool = False, copied: Sequence[int] = ()
    ) -> None:
        """
        Args:
            request: layers, tokens, mask, pixels.
            one_shape: whether all layers have one shape.
            maps: whether layers are kept whole, as they come.
            copied: layers to which the backbone writes once more.
        """
        self.request, self.one_shape, self.maps, self.copied = request, one_shape, maps, copied
        self.layers: dict[int, Tensor] = {}
        self.mask: Tensor | None = None
        self.pixels: Tensor | None = None
        self.memory: Tensor | None = None
        self.oblong = False  # whether a map was not square

    def take(self, layer: int, x: Tensor) -> None:
        """Keep the wanted tokens of one layer."""
        x = x.clone() if layer in self.copied else x
        tokens = self.request.tokens
        if self.maps:
            self.layers[layer] = x
            return
        self.oblong = self.oblong or (x.ndim == 4 and x.shape[2] != x.shape[3])
        if x.ndim == 4 and isinstance(tokens.tokens, int):  # its cells are as oblong as it is
            x = F.adaptive_avg_pool2d(x, tokens.tokens)
        x = as_tokens(x)
        selected = tokens(x, self.mask)
        if x.requires_grad or selected is x or not self.one_shape:  # a slice would hold the memory of all
            self.layers[layer] = selected.clone() if tokens.tokens in ("first", "last") else selected
            return
        if self.memory is None or self.memory.shape[1:] != selected.shape or self.memory.dtype != selected.dtype:
            self.memory = selected.new_empty(len(self.request.layers), *selected.shape)
        self.layers[layer] = self.memory[self.request.layers.index(layer)].copy_(selected)

    @property
    def features(self) -> Features:
        """What was taken; without padding, the mask is one of ones."""
        layers = {layer: self.layers[layer] for layer in self.request.layers}
        mask = None
        if self.request.mask:
            last = layers[self.request.layers[-1]]
            mask = last.new_ones(last.shape[:2]) if self.mask is None else self.mask
        return Features(layers, self.request.tokens, mask, self.pixels)

    def take_mask(self, m: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook of the backbone."""
        mask = inspect.signature(m.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise MethodError(f"an attention mask {tuple(mask.shape)}: expected (b, n), to tell tokens from padding")
        self.mask = mask

    def take_pixels(self, m: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook of the backbone."""
        self.pixels = argument(m, args, kwargs)[1]


@contextmanager
def tap(backbone: nn.Module, sites: Sites, request: FeatureRequest) -> Iterator[Taps]:
    """While it lasts, what is asked for is taken from every forward of the backbone.

    Raises:
        MethodError: the backbone is called by another thread, which would meet these hooks.
    """
    owner = get_ident()

    def same_thread(m: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and get_ident() != owner:
            raise MethodError(
                "the backbone is called while another thread has hooks on it: call a restuning.Predictor from threads"
            )

    taps = Taps(request, sites.uniform, sites.join is not None, sites.rewritten)
    with ExitStack() as stack:
        stack.enter_context(before(backbone, same_thread, first=True))
        if request.tokens.by_mask or request.mask:
            stack.enter_context(before(backbone, taps.take_mask))
        if request.pixels:
            stack.enter_context(before(backbone, taps.take_pixels))
        for layer in request.layers:
            stack.enter_context(on_input(backbone, sites.layer(layer), partial(taps.take, layer), first=True)())
        yield taps


def check_square(taps: Taps, sites: Sites) -> None:
    """Raises MethodError where a side path over stages was given maps that are not square."""
    request = taps.request
    if taps.oblong and request.tokens == ALL and len(request.layers) > 1 and not sites.uniform:
        raise MethodError("a side path over stages needs square maps: images as high as wide")


def check_widths(taps: Taps, sites: Sites) -> None:
    """
    Args:
        taps: of one forward.
        sites: of the backbone.

    Raises:
        SiteError: a layer is of another width than the anatomy says.
    """
    for layer, x in taps.layers.items():
        width = sites.features[layer].out_features
        if x.ndim == 3 and x.shape[-1] != width:
            raise SiteError(
                f"layer {layer} has width {x.shape[-1]}, and the anatomy {sites.anatomy.name} says {width}: "
                "describe the backbone with anatomy="
            )
