"""Cached features: what a frozen backbone computed of each example, read in every epoch instead of computed again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from restuning.model.tuned import Tuned
from restuning.side.features import Features
from restuning.training.evaluate import Examples, back, by_length, loader, padded, to_device

LIMIT = 2 * 2**30
"""Bytes of features that a run keeps in memory; beyond it the backbone runs in every epoch."""


class CachedFeatures:
    """Features of a data set, in memory: item i is (features of example i, label); batches are taken at once.

    Args:
        features: of all examples.
        labels: (n, …).
    """

    def __init__(self, features: Features, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Features, Tensor]:
        return self.features.map(lambda x: x[i]), self.labels[i]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Features, Tensor]:
        return self.features.map(lambda x: x[indices]), self.labels[indices]

    def collate(self, batch: tuple[Features, Tensor]) -> tuple[Features, Tensor]:
        """What `__getitems__` gives is a batch already; padding that all of it shares is left out."""
        return batch[0].trimmed(), batch[1]


class FromFeatures(nn.Module):
    """A tuned model that reads features where it would have read images or texts: the same logits, no pass.

    Args:
        tuned: with one adapter active that only reads features.
    """

    def __init__(self, tuned: Tuned) -> None:
        super().__init__()
        self.tuned = tuned

    def forward(self, features: Features) -> Tensor:
        """Logits (b, c), from at least the features that the adapter reads."""
        return self.tuned.from_features(features)  # type: ignore[no-any-return]


def bytes_per_item(tuned: Tuned, examples: Examples) -> int:
    """Bytes that the features of one example take, of the longest if they differ in length."""
    longest = by_length(examples, range(len(examples)))[-1:]
    return sum(x.nbytes for x in compute_features(tuned, examples, longest)[0].tensors())


@torch.no_grad()
def compute_features(
    tuned: Tuned,
    examples: Examples,
    rows: Sequence[int],
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    change: Callable[[Features], Features] = lambda features: features,
) -> tuple[Features, Tensor]:
    """One pass of the backbone over these rows: what the active adapters read, and the labels, on the CPU.

    Only for adapters that read features and change none. Texts are read in the order of their lengths, and shorter
    ones padded where every token is kept.

    Args:
        tuned: the backbone and its active adapters.
        examples: (inputs, label) as the backbone takes them.
        rows: indices of examples.
        batch_size: of the pass.
        dtype: what floating-point features are kept in; None: as they are.
        change: of the features of each batch.
    """
    assert tuned.reads_features
    device = next(tuned.parameters()).device
    order = by_length(examples, rows)
    batches, labels = [], []
    for inputs, label in loader(examples, batch_size, sampler=order):
        features = change(tuned.features(to_device(inputs, device)))
        batches.append(features.map(lambda x: x.to("cpu", dtype if x.is_floating_point() else None)))
        labels.append(label)
    inverse_order = back(order, rows)
    return Features.joined(batches, padded).map(lambda x: x[inverse_order]), torch.cat(labels)[inverse_order]


def cache_features(tuned: Tuned, examples: Examples, batch_size: int = 32) -> CachedFeatures:
    """What the active adapters read of every example, in memory."""
    return CachedFeatures(*compute_features(tuned, examples, range(len(examples)), batch_size))
