"""Unlike anything in training: how far an item is from its nearest neighbour in the bank."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from restuning.errors import DataError

CHUNK = 1024
"""Rows whose distances are computed at a time."""


@dataclass(frozen=True)
class Novelty:
    """What `novelty` made.

    Args:
        bank: (n, d), unit length, what was trained on.
        threshold: an item that is farther than this from all of the bank is new.
        false_alarms: the share of the bank's own items that are farther than this from all others.
    """

    bank: Tensor
    threshold: float
    false_alarms: float

    def distance(self, features: Tensor) -> Tensor:
        """(b,): 1 − the cosine of the most similar row of the bank, from 0 to 2.

        Args:
            features: (b, d).
        """
        return 1 - (F.normalize(features.float(), dim=-1) @ self.bank.T).amax(1)

    def is_new(self, features: Tensor) -> Tensor:
        """(b,) of bool.

        Args:
            features: (b, d).
        """
        return self.distance(features) > self.threshold


def novelty(bank: Tensor, false_alarms: float = 0.05) -> Novelty:
    """A threshold on the distance to the nearest neighbour, from the bank alone.

    Every item of the bank is set against the others. The threshold is the ⌈(n + 1)(1 − a)⌉-th smallest of these n
    distances (the largest, where that is beyond n), as in conformal prediction (Laxhammar and Falkman 2010): of the
    bank's own items at most a share a is farther, and so are, in the mean, new items of their kind.

    Args:
        bank: (n, d) features, n at least 2.
        false_alarms: a, between 0 and 1.

    Raises:
        DataError: fewer than two rows, features that are no finite numbers, or a share outside 0 to 1.
    """
    if bank.ndim != 2 or len(bank) < 2 or not bool(bank.isfinite().all()):
        raise DataError(f"a bank of shape {tuple(bank.shape)}: expected finite (n, d), n at least 2")
    if not 0 < false_alarms < 1:
        raise DataError(f"false_alarms is {false_alarms}: expected a share above 0 and below 1")
    rows = F.normalize(bank.detach().float(), dim=-1)
    nearest = []
    for start in range(0, len(rows), CHUNK):
        similar = rows[start : start + CHUNK] @ rows.T
        own = torch.arange(len(similar))
        similar[own, own + start] = -math.inf
        nearest.append(1 - similar.amax(1))
    distances = torch.cat(nearest).sort().values
    n = len(distances)
    threshold = float(distances[min(math.ceil((n + 1) * (1 - false_alarms)), n) - 1])
    return Novelty(rows, threshold, float((distances > threshold).float().mean()))
