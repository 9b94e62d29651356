"""Probabilities that mean what they say: one temperature, fitted on held-out logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from restuning.errors import DataError


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Args:
        temperature: T; probabilities are softmax(logits / T).
        before: the expected calibration error of softmax(logits), between 0 and 1.
        after: the same of softmax(logits / T).
    """

    temperature: float
    before: float
    after: float

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax(logits / T).

        Args:
            logits: (…, classes).
        """
        return (logits / self.temperature).softmax(-1)


def calibrate(logits: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """Fit a temperature to logits of items that were not trained on (Guo et al. 2017, arXiv 1706.04599).

    The temperature is the one of the least cross-entropy, between 0.01 and 100.

    Args:
        logits: (n, classes), of held-out items.
        labels: (n,), their classes by index.
        bins: of equal width in confidence, of the expected calibration error.

    Raises:
        DataError: no items, logits that are no finite numbers, or labels that do not fit them.
    """
    logits = logits.detach().double()
    fits = logits.ndim == 2 and labels.shape == logits.shape[:1] and len(labels) > 0
    if not fits or not bool(logits.isfinite().all()):
        raise DataError(
            f"logits of shape {tuple(logits.shape)} with labels of shape {tuple(labels.shape)}: expected finite "
            "(n, classes) and (n,), n at least 1"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise DataError(f"labels from {int(labels.min())} to {int(labels.max())}: expected 0 to {logits.shape[1] - 1}")

    def slope(log_scale: float) -> float:
        """Of the cross-entropy against 1 / T, which is convex in it."""
        scale = torch.tensor(log_scale, dtype=torch.float64).exp()
        p = (logits * scale).softmax(-1)
        return float(((p * logits).sum(-1) - logits.gather(1, labels[:, None]).squeeze(1)).mean())

    low, high = torch.tensor([0.01, 100.0], dtype=torch.float64).log().tolist()
    for _ in range(60):  # bisection: the slope rises
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    temperature = float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())
    errors = [calibration_error(x.softmax(-1), labels, bins) for x in (logits, logits / temperature)]
    return Calibration(temperature, *errors)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Σ over bins of (items in it / n) |accuracy − mean confidence|, between 0 and 1.

    Args:
        probabilities: (n, classes).
        labels: (n,).
        bins: of equal width in the probability of the likeliest class.
    """
    return sum(count * abs(right - sure) for _, count, right, sure in reliability(probabilities, labels, bins)) / max(
        len(labels), 1
    )


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> list[tuple[int, int, float, float]]:
    """(bin, items in it, accuracy, mean confidence) of every bin that has items.

    Args:
        probabilities: (n, classes).
        labels: (n,).
        bins: as `calibration_error` has them.
    """
    confidence, best = probabilities.double().max(-1)
    right = (best == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(which, minlength=bins)
    sums = [torch.zeros(bins, dtype=torch.float64).index_add(0, which, x) for x in (right, confidence)]
    return [
        (i, int(counts[i]), float(sums[0][i] / counts[i]), float(sums[1][i] / counts[i]))
        for i in range(bins)
        if counts[i]
    ]
