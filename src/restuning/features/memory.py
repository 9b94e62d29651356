"""Features kept: what a frozen backbone said of each example, read again in every epoch instead of computed again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from restuning._types import Features
from restuning.model.tuned import Tuned
from restuning.side.features import TokenSelection
from restuning.training.evaluate import Examples, back, by_length, loader, padded, to_device

LIMIT = 2 * 2**30
"""Bytes of features that a run keeps in memory; beyond it the backbone runs in every epoch."""


class CachedFeatures:
    """Features of a data set, in memory: item i is (x_0 … x_L of example i, label); batches are taken at once."""

    def __init__(self, features: Features, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Features, Tensor]:
        return tuple(x[i] for x in self.features), self.labels[i]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Features, Tensor]:
        return tuple(x[indices] for x in self.features), self.labels[indices]

    def collate(self, batch: tuple[Features, Tensor]) -> tuple[Features, Tensor]:
        """What `__getitems__` gives is a batch already."""
        return batch


class FromFeatures(nn.Module):
    """A tuned model that reads kept features where it would have read images or texts: the same logits, no pass."""

    def __init__(self, tuned: Tuned, kept: TokenSelection | None = None, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.tuned, self.kept, self.layers = tuned, kept, layers

    def forward(self, features: Any) -> Tensor:
        """features: those of `layers` (by default the ones that the adapter reads), of the tokens that are `kept`."""
        if self.layers is not None:
            at = dict(zip(self.layers, features, strict=True))
            features = [at[layer] for layer in self.tuned._layers(self.kept)]
        return self.tuned.from_features(tuple(features), self.kept)  # type: ignore[no-any-return]


def bytes_per_item(tuned: Tuned, examples: Examples) -> int:
    """Bytes that the features of one example take, of the longest if they differ in length."""
    return sum(x.nbytes for x in tapped(tuned, examples, by_length(examples, range(len(examples)))[-1:])[0])


@torch.no_grad()
def tapped(
    tuned: Tuned,
    examples: Examples,
    rows: Sequence[int],
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
) -> tuple[Features, Tensor]:
    """One pass of the backbone over these rows: what the active adapters read, and the labels, on the CPU.

    Only for adapters that read features and change none. Texts are read in the order of their lengths, and shorter
    ones padded where every token is kept. dtype: what is kept in; None: as it is said.
    """
    assert tuned.reads_features
    device = next(tuned.parameters()).device
    order = by_length(examples, rows)
    batches, labels = [], []
    for inputs, label in loader(examples, batch_size, sampler=order):
        batches.append(
            [x.to("cpu", dtype if x.is_floating_point() else None) for x in tuned.features(to_device(inputs, device))]
        )
        labels.append(label)
    again = back(order, rows)
    return tuple(padded(layer)[again] for layer in zip(*batches, strict=True)), torch.cat(labels)[again]


def cache_features(tuned: Tuned, examples: Examples, batch_size: int = 32) -> CachedFeatures:
    """What the active adapters read of every example, in memory."""
    return CachedFeatures(*tapped(tuned, examples, range(len(examples)), batch_size))
