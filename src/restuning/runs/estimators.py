"""Tuned models as scikit-learn's estimators: `fit`, `predict`, `score`, in its searches and pipelines."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from restuning.errors import CheckpointError, DataError, MissingExtra
from restuning.runs.estimator import Estimator

try:
    import numpy as np
    from sklearn.base import ClassifierMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
except ImportError as error:
    raise MissingExtra("scikit-learn", "images") from error


class Classifier(ClassifierMixin, Estimator):  # type: ignore[misc]
    """A frozen backbone with a method on it as a scikit-learn classifier.

    X: paths of images, PIL images, uint8 arrays (n, h, w) or (n, h, w, 3), or texts, where the backbone reads these.
    Rows of numbers (n, d) are features that were computed elsewhere: a linear head alone is trained on them. Where a
    method leaves the backbone's features alone, these are computed once for an item, told by its content, and kept for
    all estimators of the process, so that a search over methods and rates needs one pass of the backbone.

    Args:
        backbone: a name that `restuning.load_backbone` knows.
        method: a name of `restuning.METHODS`, a method, or one as data.
        weights: of the backbone, a file; None: its own.
        image_size: pixels a side; None: the backbone's own.
        max_length: tokens that texts are cut to; None: longer ones are refused.
        pool: see `Tuned.add_adapter`.
        lr: learning rate, of AdamW; None: the method's own or, where features of 100 items or more are kept, the best
            of three on a fifth of them, held out; `lr_` holds it.
        epochs: over the items.
        batch_size: of a step, and of a pass of the backbone.
        weight_decay: of matrices.
        seed: of the adapter and of the order of the items.

    Attributes:
        classes_: the labels, sorted.
        model_: the `Tuned` model; a linear map for rows of numbers.
        n_features_in_, feature_names_in_: of rows of numbers.

    Raises:
        DataError: items that cannot be read.
    """

    kind = "single-label"
    classes_: Any

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model.

        Args:
            X: n items.
            y: n labels, of any kind that sorts.
        """
        self._forget()
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Go on with the model that is there, on these items and on those of earlier calls; the head grows by what
        labels are new. A loaded model has the earlier items where it was saved with `seen=True`.

        Args:
            X: n items.
            y: n labels.
            classes: labels that are to come.

        Raises:
            DataError: a loaded model without its earlier items, and none of a class of theirs: it would forget it.
        """
        going_on = hasattr(self, "model_")
        data, y = self._pairs(X, y, reset=not going_on)
        check_classification_targets(y)
        if going_on and not (hasattr(self, "seen_") or hasattr(self, "earlier_")):
            self._need_all(y)
        found = np.unique(y) if classes is None else np.union1d(y, classes)
        if going_on:
            self._grow(np.union1d(self.classes_, found))
        else:
            self.classes_ = found
        data, y = self._also_seen(data, y)
        self._train(data, self._to_targets(y), self._names())
        return self

    def _need_all(self, y: Any) -> None:
        if len(lost := np.setdiff1d(self.classes_, y)):
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise DataError(
                f"no items of {', '.join(map(repr, lost[:3].tolist()))}{more}, which a loaded model would forget: "
                "expected some of every class, or a folder of save(…, seen=True)"
            )

    def _grow(self, classes: Any) -> None:
        """A head of these classes, of which the rows of those that it had stay."""
        if len(classes) == len(self.classes_):
            return
        head = self._head()
        wider = nn.Linear(head.in_features, len(classes), dtype=head.weight.dtype, device=head.weight.device)
        rows = torch.from_numpy(np.searchsorted(classes, self.classes_))
        with torch.no_grad():
            wider.weight.zero_()
            wider.bias.zero_()
            wider.weight[rows], wider.bias[rows] = head.weight, head.bias
        self.classes_ = classes
        if isinstance(self.model_, nn.Linear):
            self.model_ = wider
            return
        adapter = self.model_.adapter("default")
        adapter.head = wider
        adapter.config = replace(adapter.config, num_classes=len(classes), classes=self._names())

    def predict_proba(self, X: Any) -> Any:
        """Probabilities (n, classes), in the order of `classes_`.

        Args:
            X: n items.
        """
        return self._outputs(X).softmax(-1).numpy()

    def predict(self, X: Any) -> Any:
        """The most probable label of each item, (n,).

        Args:
            X: n items.
        """
        best = self._outputs(X).argmax(-1).numpy()
        return self.classes_[best]

    def _names(self) -> tuple[str, ...]:
        return tuple(str(label) for label in self.classes_)

    def _labels(self) -> list[Any]:
        found: list[Any] = self.classes_.tolist()
        return found

    def _take_labels(self, labels: Sequence[Any]) -> None:
        self.classes_ = np.asarray(labels)

    def _to_targets(self, y: Any) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.classes_, y))

    def _from_targets(self, targets: Any) -> Any:
        if targets.ndim != 1 or targets.dtype.kind != "i" or set(targets) - set(range(len(self.classes_))):
            raise CheckpointError(f"labels of seen items: expected indices of {len(self.classes_)} classes")
        return self.classes_[targets]


class Regressor(RegressorMixin, Estimator):  # type: ignore[misc]
    """A frozen backbone with a method on it as a scikit-learn regressor, of one target or several.

    X, and how features are kept: as for `Classifier`. Targets are standardised while it trains; the head's weights take
    that in at the end.

    Args:
        backbone: a name that `restuning.load_backbone` knows.
        method: a name of `restuning.METHODS`, a method, or one as data.
        weights: of the backbone, a file; None: its own.
        image_size: pixels a side; None: the backbone's own.
        max_length: tokens that texts are cut to; None: longer ones are refused.
        pool: see `Tuned.add_adapter`.
        lr: learning rate, of AdamW; None: the method's own or, where features of 100 items or more are kept, the best
            of three on a fifth of them, held out; `lr_` holds it.
        epochs: over the items.
        batch_size: of a step, and of a pass of the backbone.
        weight_decay: of matrices.
        seed: of the adapter and of the order of the items.

    Attributes:
        model_: the `Tuned` model; a linear map for rows of numbers.
        n_features_in_, feature_names_in_: of rows of numbers.

    Raises:
        DataError: items that cannot be read.
    """

    kind = "regression"
    flat_: bool

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model.

        Args:
            X: n items.
            y: targets (n,) or (n, k).
        """
        self._forget()
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Go on with the model that is there, on these items and on those of earlier calls. A loaded model has these
        where it was saved with `seen=True`; else it goes on from its weights alone.

        Args:
            X: n items.
            y: targets (n,) or (n, k).
        """
        data, y = self._pairs(X, y, reset=not hasattr(self, "model_"), multi_output=True, y_numeric=True)
        data, y = self._also_seen(data, y)
        self.flat_ = y.ndim == 1
        targets = self._to_targets(y)
        if not isinstance(data, np.ndarray):
            targets = targets.float()
        self._train(data, targets, [f"target {i}" for i in range(targets.shape[1])])
        return self

    def predict(self, X: Any) -> Any:
        """The targets, (n,) or (n, k) as they were in `fit`.

        Args:
            X: n items.
        """
        found = self._outputs(X).numpy()
        return found[:, 0] if self.flat_ else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _labels(self) -> list[Any]:
        return ["target"] if self.flat_ else []

    def _take_labels(self, labels: Sequence[Any]) -> None:
        self.flat_ = len(labels) == 1

    def _to_targets(self, y: Any) -> Tensor:
        return torch.tensor(np.asarray(y, np.float64).reshape(len(y), -1))

    def _from_targets(self, targets: Any) -> Any:
        if targets.ndim != 2 or targets.dtype.kind != "f":
            raise CheckpointError("targets of seen items: expected numbers (n, k)")
        return targets[:, 0] if self.flat_ else targets
