"""What a task asks of a model's output: a loss to train by, and the metrics that it is judged by."""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from restuning.errors import MissingExtra, RestuningError

KINDS = ("single-label", "multi-label", "regression", "per-token")

IGNORED = -100
"""The label of a token that has none: padding, a special token, the rest of a word."""

Metrics = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Objective:
    """What one kind of task asks.

    loss: (logits, labels) → the mean over the batch. right: (logits, labels) → (b,), the share of each example that is
    right, shown while training; None: there is no such thing. metrics: (logits, labels) of a whole data set → names and
    values, the first of which chooses, the higher the better. each: the same for every class.
    """

    kind: str
    loss: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor], Tensor] | None
    metrics: Callable[[Tensor, Tensor], Metrics]
    each: Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def objective(kind: str = "single-label", weights: Tensor | None = None, smoothing: float = 0.0) -> Objective:
    """The objective of a kind of task: cross-entropy, binary cross-entropy, squared error, or cross-entropy by token.

    weights: (c,) of the classes, in the loss. smoothing: of the labels. Raises RestuningError for an unknown kind,
    weights under regression, and smoothing where an example has not one label.
    """
    if kind not in KINDS:
        raise RestuningError(f"unknown kind of task {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "regression" and weights is not None:
        raise RestuningError("class weights under regression: there are no classes")
    if smoothing:
        if kind != "single-label" or weights is not None:
            what = kind if weights is None else "class weights"
            raise RestuningError(f"label smoothing under {what}: expected one label an example, of equal weight")
        return replace(_MADE[kind](None), loss=partial(_smoothed, smoothing))
    return _MADE[kind](weights)


def _smoothed(smoothing: float, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy to (1 − s) of the label and s of all classes alike; −inf is no class."""
    logs = logits.log_softmax(-1)
    there = logs > -math.inf
    alike = logs.masked_fill(~there, 0).sum(-1) / there.sum(-1)
    own = logs.gather(-1, labels[..., None]).squeeze(-1)
    return -((1 - smoothing) * own + smoothing * alike).mean()


def sort_key(score: float | None) -> float:
    """A score to choose by: none, and one that is no number (the correlation of a constant), is the worst."""
    return -math.inf if score is None or math.isnan(score) else score


def balanced(kind: str, labels: Sequence[Any], classes: int) -> Tensor:
    """Weights n / (c · count) of the classes, whose mean over the labels is 1. Under `multi-label`: how many labels are
    absent for one that is there. Raises RestuningError under regression."""
    objective(kind, torch.ones(classes))
    if kind == "multi-label":
        there = torch.tensor(labels).sum(0)
        return (len(labels) - there) / there.clamp(min=1)
    flat = torch.tensor([v for label in labels for v in (label if isinstance(label, list) else [label])])
    counts = torch.bincount(flat, minlength=classes).float()
    return len(flat) / (classes * counts.clamp(min=1))


def _single(weights: Tensor | None) -> Objective:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if weights is None:
            return F.cross_entropy(logits, labels)
        by_class = weights.to(logits.device, logits.dtype)
        return (F.cross_entropy(logits, labels, reduction="none") * by_class[labels]).mean()

    def metrics(logits: Tensor, labels: Tensor) -> Metrics:
        yield "accuracy", 100 * (logits.argmax(1) == labels).double().mean().item()
        if logits.shape[1] > 5:
            yield "top5", 100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
        f1 = _torchmetrics().multiclass_f1_score
        yield "f1", 100 * f1(logits, labels, logits.shape[1], average="macro").item()
        yield "loss", F.cross_entropy(logits, labels).item()

    return Objective(
        "single-label",
        loss,
        lambda logits, labels: (logits.argmax(-1) == labels).float(),
        metrics,
        lambda logits, labels: _each("multiclass", logits, labels, logits.shape[1]),
    )


def _multi(weights: Tensor | None) -> Objective:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        weight = None if weights is None else weights.to(logits.device, logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, _like(labels, logits), pos_weight=weight)

    def metrics(logits: Tensor, labels: Tensor) -> Metrics:
        tm, (p, there) = _torchmetrics(), _several(logits.sigmoid(), labels.long())
        c = p.shape[1]
        yield "map", 100 * tm.multilabel_average_precision(p, there, c, average="macro").item()
        yield "f1", 100 * tm.multilabel_f1_score(p, there, c, average="micro").item()
        yield "f1_macro", 100 * tm.multilabel_f1_score(p, there, c, average="macro").item()
        yield "exact", 100 * tm.multilabel_exact_match(p, there, c).item()
        yield "loss", F.binary_cross_entropy_with_logits(logits, labels.float()).item()

    return Objective(
        "multi-label",
        loss,
        lambda logits, labels: ((logits > 0) == (labels > 0)).float().mean(-1),
        metrics,
        lambda logits, labels: _each("multilabel", logits.sigmoid(), labels.long(), logits.shape[1]),
    )


def _regression(weights: Tensor | None) -> Objective:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits, _like(labels, logits))

    def metrics(logits: Tensor, labels: Tensor) -> Metrics:
        tm, labels = _torchmetrics("regression"), labels.float()
        predicted, wanted = (t.squeeze(-1) if t.shape[-1] == 1 else t for t in (logits, labels))
        yield "r2", tm.r2_score(predicted, wanted).item()
        yield "pearson", tm.pearson_corrcoef(predicted, wanted).mean().item()
        yield "spearman", tm.spearman_corrcoef(predicted, wanted).mean().item()
        yield "mae", F.l1_loss(logits, labels).item()
        yield "loss", F.mse_loss(logits, labels).item()

    def each(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"mae": (logits - labels).abs().mean(0), "mse": (logits - labels).square().mean(0)}

    return Objective("regression", loss, None, metrics, each)


def _per_token(weights: Tensor | None) -> Objective:
    """The loss of a text is the mean over its own words."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        counts = (labels != IGNORED).sum(1).clamp(min=1)
        if weights is not None:
            each = each * weights.to(each.device, each.dtype)[labels.clamp(min=0)]
        return (each.sum(1) / counts).mean()

    def right(logits: Tensor, labels: Tensor) -> Tensor:
        counts = (labels != IGNORED).sum(1).clamp(min=1)
        return (logits.argmax(-1) == labels).sum(1) / counts

    def flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen = labels != IGNORED
        return logits[seen], labels[seen]

    def metrics(logits: Tensor, labels: Tensor) -> Metrics:
        yield from _single(None).metrics(*flat(logits, labels))

    return Objective("per-token", loss, right, metrics, lambda *args: _single(None).each(*flat(*args)))


def _each(kind: str, scores: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Precision, recall and F1 in percent, and how many there are, of every class."""
    tm = _torchmetrics()
    wanted = {"precision": f"{kind}_precision", "recall": f"{kind}_recall", "f1": f"{kind}_f1_score"}
    count = labels.sum(0) if labels.ndim == 2 else torch.bincount(labels, minlength=classes)
    if kind == "multilabel":
        scores, labels = _several(scores, labels)
    many = max(classes, 2)
    found = {n: 100 * getattr(tm, f)(scores, labels, many, average="none")[:classes] for n, f in wanted.items()}
    return {**found, "count": count}


def _like(labels: Tensor, logits: Tensor) -> Tensor:
    """Targets in the shape and the dtype of the predictions: collators give (b,) for (b, 1). Raises RestuningError
    where there are not as many."""
    if labels.numel() != logits.numel():
        raise RestuningError(f"labels {tuple(labels.shape)} for outputs {tuple(logits.shape)}: expected as many")
    return labels.reshape(logits.shape).to(logits.dtype)


def _several(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, c) as torchmetrics takes them: it refuses one class alone, whose double has the same means."""
    return (scores.expand(-1, 2), labels.expand(-1, 2)) if scores.shape[1] == 1 else (scores, labels)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """How often class i (row) was taken for j (column), (c, c); of single-label and per-token tasks."""
    if logits.ndim == 3:
        logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
    found: Tensor = _torchmetrics().multiclass_confusion_matrix(logits, labels, logits.shape[1])
    return found


def _torchmetrics(part: str = "classification") -> Any:
    try:
        return importlib.import_module(f"torchmetrics.functional.{part}")
    except ImportError as error:
        raise MissingExtra("torchmetrics", "train") from error


_MADE: dict[str, Callable[[Tensor | None], Objective]] = dict(
    zip(KINDS, (_single, _multi, _regression, _per_token), strict=True)
)
