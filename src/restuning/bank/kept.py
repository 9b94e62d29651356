"""Features kept: what a frozen backbone said of each image, read again in every epoch instead of computed again."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from restuning._types import Features
from restuning.adapt import Tuned
from restuning.evaluate import Examples
from restuning.wiring.live import View

LIMIT = 2 * 2**30
"""Bytes of features that a run keeps in memory; beyond it the backbone runs in every epoch."""


class Kept:
    """Features of a data set, in memory: item i is (x_0 … x_L of image i, label)."""

    def __init__(self, features: Features, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Features, int]:
        return tuple(x[i] for x in self.features), int(self.labels[i])


class FromFeatures(nn.Module):
    """A tuned model that reads kept features where it would have read images: the same logits, no backbone pass."""

    def __init__(self, tuned: Tuned, kept: View | None = None, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.tuned, self.kept, self.layers = tuned, kept, layers

    def forward(self, features: Any) -> Tensor:
        """features: those of `layers` (by default the ones that the adapter reads), of the tokens that are `kept`."""
        if self.layers is not None:
            at = dict(zip(self.layers, features, strict=True))
            features = [at[layer] for layer in self.tuned._layers()]
        return self.tuned.from_features(tuple(features), self.kept)  # type: ignore[no-any-return]


def bytes_each(tuned: Tuned, pixels: Tensor) -> int:
    """Bytes that the features of one image (3, h, w) take."""
    return sum(x.nbytes for x in tuned.features(pixels[None].to(next(tuned.parameters()).device)))


def keep(tuned: Tuned, images: Examples, batch_size: int = 32, seen: Callable[[int], None] = lambda done: None) -> Kept:
    """One pass of the backbone over `images`. Only for adapters that read features and change none."""
    assert tuned.reads_features
    device = next(tuned.parameters()).device
    batches, labels = [], []
    for pixels, label in DataLoader(cast(Dataset[Any], images), batch_size):
        batches.append([x.cpu() for x in tuned.features(pixels.to(device))])
        labels.append(label)
        seen(sum(map(len, labels)))
    return Kept(tuple(torch.cat(layer) for layer in zip(*batches, strict=True)), torch.cat(labels))
