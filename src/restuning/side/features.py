"""A frozen backbone's features: which of them are asked for, and what is there, live, from memory or from a bank."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import SequenceKey, register_pytree_node

from restuning._types import Tokens
from restuning.tuners.grid import cells


@dataclass(frozen=True)
class TokenSelection:
    """What is kept of the tokens (b, n, d) of a layer.

    `all`: every token; `first`: the first alone, (b, 1, d); `last`: the last that is no padding, (b, 1, d); `mean`: the
    mean of those that are none, (b, 1, d); a number g: the first one where there are tokens before the patches
    (`prefix` of them), and the mean of each cell of a g × g grid of the patches, (b, 1 + g², d); `pooled`: the
    `summary` of the normalised tokens, (b, 1 or 2, d); `components`: of every token so many
    fixed components, (b, n, k), and the summary besides; a bank's alone, see `restuning.training.components`.

    The mean is exact where what follows is linear, token by token, up to a mean over all tokens (no norm comes before
    that): for linear probing, for tuners inside the backbone, which act before the last layer, and for a bypass without
    tuners over layers of one grid. In a bypass with tuners every position is live.
    """

    tokens: str | int = "all"
    prefix: int = 1
    components: int | None = None

    def __call__(self, x: Tokens, mask: Tensor | None = None) -> Tensor:
        """mask (b, n): which tokens are no padding; None: all. Of one longer by a cache, `last` reads the end."""
        if self.tokens == "all":
            return x
        if self.tokens == "last":
            return last(x, mask)
        if self.tokens == "mean":
            return mean_of(x, mask)[:, None]
        if self.tokens == "pooled":
            return summary(normalised(x), self.prefix, mask)
        first = x[:, :1]
        if self.tokens == "first":
            return first
        grid = cells(x, self.prefix, int(self.tokens))
        return torch.cat([first, grid], 1) if self.prefix else grid

    def of(self, kept: "TokenSelection") -> "TokenSelection | None":
        """What makes this view of tokens that are a view already; None if they hold too little."""
        if kept == self:
            return ALL
        if kept.tokens == "all":
            return self
        return self if self.tokens == "first" and isinstance(kept.tokens, int) and kept.prefix else None

    @property
    def by_mask(self) -> bool:
        """Whether padding must be told from tokens."""
        return self.tokens in ("last", "mean", "pooled")

    def count(self) -> int:
        """How many tokens a grid leaves."""
        return 1 if self.tokens == "mean" else int(self.tokens) ** 2 + (self.prefix > 0)


def last(x: Tokens, mask: Tensor | None) -> Tensor:
    """The last token of each row that `mask` has, (b, 1, d), on whichever side the padding is."""
    if mask is None:
        return x[:, -1:]
    ahead = mask[:, -x.shape[1] :].flip(1).bool().int().argmax(1)
    return x.gather(1, (x.shape[1] - 1 - ahead)[:, None, None].expand(-1, 1, x.shape[2]))


def mean_of(x: Tokens, mask: Tensor | None = None) -> Tensor:
    """The mean of the tokens (b, n, d) → (b, d) that are no padding by mask (b, n)."""
    if mask is None:
        return x.mean(1)
    weight = mask[..., None].to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum has no room in float16
    return ((x * weight).sum(1, dtype=wide) / weight.sum(1, dtype=wide)).to(x.dtype)


def normalised(x: Tensor) -> Tensor:
    """LayerNorm over the last axis, without weights."""
    return F.layer_norm(x, x.shape[-1:])


def summary(x: Tokens, prefix: int, mask: Tensor | None = None) -> Tensor:
    """The first token where `prefix` tokens come before the patches, and the mean of those after them that are no
    padding by mask (b, n): (b, 2 or 1, d)."""
    mean = mean_of(x[:, prefix:], None if mask is None else mask[:, prefix:])
    return torch.stack([x[:, 0], mean], 1) if prefix else mean[:, None]


ALL, FIRST, LAST, MEAN = TokenSelection(), TokenSelection("first"), TokenSelection("last", 0), TokenSelection("mean", 0)


@dataclass(frozen=True)
class FeatureRequest:
    """What of a backbone's features is read.

    Args:
        layers: by index; 0 is the first block's input, l the output of block l.
        tokens: which tokens of them.
        mask: whether the attention mask is read.
        mask_of_all: whether it is read too where every token is there, of which it tells padding.
        pixels: whether the backbone's own input is read.
    """

    layers: tuple[int, ...]
    tokens: TokenSelection = ALL
    mask: bool = False
    mask_of_all: bool = False
    pixels: bool = False

    @classmethod
    def of_all(cls, requests: Iterable["FeatureRequest"]) -> "FeatureRequest":
        """One that serves all of these: the tokens that they agree on, or every token."""
        found = list(requests)
        selections = {request.tokens for request in found}
        tokens = selections.pop() if len(selections) == 1 else ALL
        return cls(
            tuple(sorted({layer for request in found for layer in request.layers})),
            tokens,
            any(request.mask or (request.mask_of_all and tokens == ALL) for request in found),
            any(request.mask_of_all for request in found),
            any(request.pixels for request in found),
        )


@dataclass(frozen=True)
class Features:
    """Features of a batch of b examples. Who reads them cannot tell whether they are live, cached or from a bank.

    Args:
        layers: x_l by index l, tokens (b, n, d_l), or maps (b, d_l, h, w) of a backbone that denoises.
        tokens: which tokens they hold.
        mask: (b, n), which of all tokens are no padding; None: all of them.
        pixels: the backbone's own input (b, 3, h, w), where a side network reads it.
        summaries: beside components, the `summary` of every layer, (b, 1 or 2, d_l).
        prepared: what several networks that share weights would each make of them first, (b, …) each; see
            `SideNetwork.prepare`.
    """

    layers: Mapping[int, Tensor]
    tokens: TokenSelection
    mask: Tensor | None = None
    pixels: Tensor | None = None
    summaries: Mapping[int, Tensor] = field(default_factory=dict)
    prepared: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.tensors()[0])

    @property
    def last(self) -> Tensor:
        """The last of the layers."""
        return self.layers[max(self.layers)]

    def tensors(self) -> list[Tensor]:
        """All of them, in an order that depends on the layers alone."""
        found = [self.layers[layer] for layer in sorted(self.layers)]
        found += [x for x in (self.mask, self.pixels) if x is not None]
        found += [self.summaries[layer] for layer in sorted(self.summaries)]
        return [*found, *self.prepared]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """The same with every tensor changed."""
        return replace(
            self,
            layers={layer: change(x) for layer, x in self.layers.items()},
            mask=None if self.mask is None else change(self.mask),
            pixels=None if self.pixels is None else change(self.pixels),
            summaries={layer: change(x) for layer, x in self.summaries.items()},
            prepared=tuple(change(x) for x in self.prepared),
        )

    def rows(self, index: Any) -> "Features":
        """Some of the examples.

        Args:
            index: as tensors are indexed along their first axis.
        """
        if not isinstance(index, Tensor) or index.dtype is not torch.long:
            return self.map(lambda x: x[index])
        flat = index.flatten()  # whole rows are copied, several times as fast as what indexes every number
        return self.map(lambda x: torch.unflatten(x.index_select(0, flat), 0, index.shape))

    def as_pooled(self) -> "Features":
        """The summaries that are beside components, as if they were the layers."""
        return Features(self.summaries, TokenSelection("pooled", self.tokens.prefix))

    def trimmed(self) -> "Features":
        """The same without the last tokens, where they are padding in every example."""
        if self.mask is None or not self.layers or self.mask.shape[-1] != self.last.shape[-2]:
            return self
        seen = self.mask.flatten(0, -2).bool().any(0).nonzero()
        count = int(seen.max()) + 1 if len(seen) else 1
        layers = {layer: x[..., :count, :] for layer, x in self.layers.items()}
        return replace(self, layers=layers, mask=self.mask[..., :count])

    def detached(self) -> "Features":
        """The same without a gradient."""
        return self.map(Tensor.detach)

    def select(self, tokens: TokenSelection, layers: Sequence[int] | None = None) -> "Features":
        """Fewer tokens, of fewer layers.

        Raises:
            KeyError: these tokens cannot be had of those that are there; see `TokenSelection.of`.
        """
        selection = tokens.of(self.tokens)
        if selection is None:
            raise KeyError(tokens.tokens)
        chosen = {layer: self.layers[layer] for layer in (self.layers if layers is None else layers)}
        if selection != ALL:
            chosen = {layer: selection(x, self.mask) for layer, x in chosen.items()}
        return replace(self, layers=chosen, tokens=tokens)

    @staticmethod
    def joined(parts: Sequence["Features"], join: Callable[[Sequence[Tensor]], Tensor]) -> "Features":
        """Those of several batches as one.

        Args:
            parts: of the same layers and tokens.
            join: how tensors of one kind become one, `torch.cat` as a rule.
        """
        first = parts[0]
        return replace(
            first,
            layers={layer: join([part.layers[layer] for part in parts]) for layer in first.layers},
            mask=None if first.mask is None else join([p.mask for p in parts if p.mask is not None]),
            pixels=None if first.pixels is None else join([p.pixels for p in parts if p.pixels is not None]),
            summaries={layer: join([part.summaries[layer] for part in parts]) for layer in first.summaries},
        )


def _flatten(features: Features) -> tuple[list[Tensor], tuple[object, ...]]:
    shape = (
        tuple(sorted(features.layers)),
        features.tokens,
        features.mask is not None,
        features.pixels is not None,
        tuple(sorted(features.summaries)),
        len(features.prepared),
    )
    return features.tensors(), shape


def _unflatten(tensors: Iterable[Tensor], shape: tuple[object, ...]) -> Features:
    layers, tokens, mask, pixels, summaries, prepared = shape
    rest = iter(tensors)
    return Features(
        {layer: next(rest) for layer in layers},  # type: ignore[attr-defined]
        tokens,  # type: ignore[arg-type]
        next(rest) if mask else None,
        next(rest) if pixels else None,
        {layer: next(rest) for layer in summaries},  # type: ignore[attr-defined]
        tuple(next(rest) for _ in range(prepared)),  # type: ignore[call-overload]
    )


def _flatten_with_keys(features: Features) -> tuple[list[tuple[Any, Any]], tuple[object, ...]]:
    tensors, shape = _flatten(features)
    return [(SequenceKey(i), x) for i, x in enumerate(tensors)], shape


# so that torch's transforms (vmap, compile) see the tensors in it; torch.export of 2.8 asks for keys
register_pytree_node(Features, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)
