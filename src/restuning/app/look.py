"""What a person wants to see of held-out probabilities and features: mistakes, wrong labels, a map, neighbours."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from restuning.errors import DataError, MissingExtra

MAPS = {"pca": "PCA", "t-sne": "t-SNE", "umap": "UMAP"}
"""Kinds of maps, and how they are written."""


@dataclass(frozen=True)
class Pair:
    """So many items of class `truth` were taken for class `taken`; share: of all items of `truth`, 0 to 1."""

    truth: int
    taken: int
    count: int
    share: float


def worst_pairs(matrix: Tensor, most: int = 20) -> list[Pair]:
    """The pairs of classes that are taken for one another most often, by count and then by share.

    Args:
        matrix: (classes, classes), rows what an item is, columns what it was taken for.
        most: how many.
    """
    rows = matrix.sum(1).tolist()
    found = [
        Pair(i, j, n, n / rows[i])
        for i, j, n in ((i, j, int(matrix[i, j])) for i, j in matrix.nonzero().tolist())
        if i != j
    ]
    return sorted(found, key=lambda p: (-p.count, -p.share, p.truth, p.taken))[:most]


def mistakes(probabilities: Tensor, labels: Tensor, right: Collection[int] = ()) -> list[int]:
    """Items that are taken for another class, the most confident first.

    Args:
        probabilities: (n, classes), held out.
        labels: (n,).
        right: items whose labels a person has confirmed: they are left out.
    """
    sure, best = probabilities.max(-1)
    wrong = [i for i in (best != labels).nonzero().flatten().tolist() if i not in set(right)]
    return sorted(wrong, key=lambda i: (-float(sure[i]), i))


def wrong_labels(probabilities: Tensor, labels: Tensor, right: Collection[int] = ()) -> tuple[list[int], int]:
    """All items, the likeliest wrong label first, and how many of them are thought to be wrong: confident learning
    (Northcutt et al. 2021, arXiv 1911.00068), as cleanlab has it.

    Args:
        probabilities: (n, classes), held out.
        labels: (n,).
        right: items whose labels a person has confirmed: they are left out.

    Raises:
        MissingExtra: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise MissingExtra("cleanlab", "app") from error
    y, p = labels.numpy(), probabilities.double().numpy()
    p = p / p.sum(1, keepdims=True)
    flagged = {int(i) for i in find_label_issues(y, p, n_jobs=1).nonzero()[0]}
    score = get_label_quality_scores(y, p)
    confirmed = set(right)
    order = [i for i in score.argsort(kind="stable").tolist() if i not in confirmed]
    return order, len(flagged - confirmed)


def places(features: Tensor, how: str = "pca") -> Tensor:
    """(n, 2): a map of the items, from 0 to 1 in both directions.

    Args:
        features: (n, d), n at least 2.
        how: `pca`, the two directions of most variance; `t-sne` (van der Maaten and Hinton 2008); `umap` (McInnes et
            al. 2018). The last two begin from the first.

    Raises:
        DataError: an unknown kind of map, or fewer than two items.
        MissingExtra: umap-learn is not installed.
    """
    if how not in MAPS or len(features) < 2:
        raise DataError(f"map {how!r} of {len(features)}: expected {' or '.join(MAPS)}, and two items or more")
    rows = F.normalize(features.float(), dim=-1)
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    axes = vectors[:, -2:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    at = rows @ axes
    if how != "pca" and len(at) > 5:
        at = torch.from_numpy((_tsne if how == "t-sne" else _umap)(rows, at / at[:, 0].std().clamp(min=1e-6)))
    low, high = at.amin(0), at.amax(0)
    found: Tensor = (at - low) / (high - low).clamp(min=1e-9)
    return found


def _tsne(rows: Tensor, start: Tensor) -> Any:
    from sklearn.manifold import TSNE

    made = TSNE(2, perplexity=min(30.0, len(rows) / 4), init=(start * 1e-4).numpy(), random_state=0)
    return made.fit_transform(rows.numpy())


def _umap(rows: Tensor, start: Tensor) -> Any:
    try:
        from umap import UMAP
    except ImportError as error:
        raise MissingExtra("umap-learn", "app") from error
    made = UMAP(n_neighbors=min(15, len(rows) - 1), init=start.numpy(), random_state=0, n_jobs=1)
    return made.fit_transform(rows.numpy())


def alike(features: Tensor, to: Tensor, most: int = 24) -> list[int]:
    """The items most alike one, by the cosine of their features, the likest first.

    Args:
        features: (n, d).
        to: (d,).
        most: how many.
    """
    similar = F.normalize(features.float(), dim=-1) @ F.normalize(to.float(), dim=-1)
    return similar.argsort(descending=True, stable=True)[:most].tolist()


def named(classes: Sequence[str], pair: Pair) -> str:
    """`3 of river (12 %) were taken for lake`."""
    return f"{pair.count} of {classes[pair.truth]} ({100 * pair.share:.0f} %) were taken for {classes[pair.taken]}"
