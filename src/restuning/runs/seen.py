"""What an estimator was trained on, as features in its folder: `partial_fit` goes on from there."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.errors import CheckpointError, MissingExtra, line
from restuning.features.bank.format import numbered, unnumbered
from restuning.features.by_content import widened
from restuning.model.tuned import Tuned
from restuning.side.features import Features
from restuning.utils.files import atomic_write
from restuning.utils.reading import read_bytes

SEEN = "seen.safetensors"
_LABELS = "labels"


def write_seen(folder: Path, features: Features, labels: Tensor) -> None:
    """
    Args:
        folder: of the adapter.
        features: of n items.
        labels: (n, …), indices of classes, or targets.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtra("safetensors", "images") from error
    tensors = {str(number): x.contiguous() for number, x in numbered(features).items()}
    atomic_write(folder / SEEN, save({**tensors, _LABELS: labels.contiguous()}))


def read_seen(folder: Path, tuned: Tuned) -> tuple[Features, Any] | None:
    """Features and labels, as an array; None where there are none.

    Args:
        folder: of the adapter.
        tuned: it, on its backbone.

    Raises:
        CheckpointError: a file that is damaged, or of another adapter.
    """
    if not (folder / SEEN).exists():
        return None
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise MissingExtra("safetensors", "images") from error
    try:
        found = load(read_bytes(folder / SEEN))
        labels = found.pop(_LABELS)
        features = unnumbered({int(name): x for name, x in found.items()}, widened(tuned).tokens)
        if {len(x) for x in features.tensors()} != {len(labels)}:
            raise ValueError("as many labels as items expected")
        with torch.no_grad():
            tuned.from_features(features.rows(slice(0, 1)))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, StopIteration) as error:
        raise CheckpointError(f"{folder / SEEN} is damaged, or of another adapter: {line(error)}") from error
    return features, labels.numpy()
