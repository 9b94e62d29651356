"""What tuned models have in common as scikit-learn's estimators: items, training on cached features, folders."""

import json
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from restuning.backbones.load import MICRO, load_backbone, reading_of
from restuning.data import Items, Reading, Tokenise, prepared
from restuning.data.given import digest, given_items, is_item
from restuning.data.objective import objective
from restuning.data.task import Subset
from restuning.errors import CheckpointError, DataError, MissingExtra, RestuningError
from restuning.features.by_content import ContentCache
from restuning.features.memory import LIMIT, CachedFeatures, FromFeatures
from restuning.methods.files import to_dict
from restuning.methods.named import find_method, rates_of
from restuning.methods.spec import Full, Method
from restuning.model.tuned import Tuned
from restuning.runs.load import load_tuned, transform_of
from restuning.runs.rates import best_rate
from restuning.runs.seen import SEEN, read_seen, write_seen
from restuning.runs.settings import RUN, Run
from restuning.side.features import Features
from restuning.training.config import TrainConfig
from restuning.training.evaluate import Examples, padded, predict_logits
from restuning.training.initialise import initialise, needs_data
from restuning.training.loop import fit
from restuning.utils.files import as_json, atomic_write

try:
    import numpy as np
    from sklearn.base import BaseEstimator
    from sklearn.utils.validation import (
        check_array,
        check_consistent_length,
        check_is_fitted,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    raise MissingExtra("scikit-learn", "images") from error

ESTIMATOR = "estimator.json"
FORMAT = "restuning-estimator/1"
CACHE = ContentCache(LIMIT)
"""Features of all estimators in this process, by content; `CACHE.clear()` forgets them."""
_BACKBONES: OrderedDict[tuple[Any, ...], nn.Module] = OrderedDict()
_BACKBONES_AT_MOST = 2
_ALONE = RLock()
"""Of all threads one computes at a time: backbones, their hooks and the global generator are shared."""


class Estimator(BaseEstimator):  # type: ignore[misc]
    """What both estimators do: settings are attributes, what is fitted ends in `_`."""

    kind: ClassVar[str]
    model_: Any  # a Tuned; a linear map where X is rows of numbers
    reading_: Reading
    lr_: float
    seen_: tuple[Any, Any]  # items and labels
    earlier_: tuple[Features, Any]  # features and labels, of a folder

    def __init__(
        self,
        backbone: str = MICRO,
        method: str | Mapping[str, Any] | Method = "bypass",
        *,
        weights: str | None = None,
        image_size: int | None = None,
        max_length: int | None = None,
        pool: str | None = None,
        lr: float | None = None,
        epochs: int = 50,
        batch_size: int = 32,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.backbone, self.method, self.weights = backbone, method, weights
        self.image_size, self.max_length, self.pool = image_size, max_length, pool
        self.lr, self.epochs, self.batch_size = lr, epochs, batch_size
        self.weight_decay, self.seed = weight_decay, seed

    # ---- what both are asked

    def save(self, folder: str | Path, *, seen: bool = False) -> None:
        """Write the folder that `restuning predict` and `load` read: the adapter, its classes, how items are read.

        Args:
            folder: made if it is not there.
            seen: the features of what it was trained on are written too, so that `partial_fit` of what `load` gives
                forgets none of it.

        Raises:
            RestuningError: fitted on rows of numbers, so that there is no backbone; or features are asked for of a
                method that has none.
        """
        check_is_fitted(self, "model_")
        if not isinstance(self.model_, Tuned):
            raise RestuningError("fitted on rows of numbers: there is no backbone, and no adapter to save")
        if seen and not self.model_.reads_features:
            raise RestuningError("seen is for methods beside the backbone: this one tunes inside it")
        folder, params = Path(folder), self.get_params()
        if not isinstance(self.method, str | Mapping):
            params["method"] = to_dict(self.method)
        self.model_.save_pretrained(folder)
        if self.weights is not None:  # where `restuning predict` looks for them
            run = Run("python", self.method if isinstance(self.method, str) else params["method"], self.backbone)
            atomic_write(folder / RUN, as_json(replace(run, weights=self.weights).to_dict()))
        atomic_write(folder / ESTIMATOR, as_json({"format": FORMAT, "params": params, "labels": self._labels()}))
        (folder / SEEN).unlink(missing_ok=True)
        if seen and (known := self._known()) is not None:
            write_seen(folder, *known)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A fitted estimator, from a folder of `save`, or of `restuning train`.

        Args:
            folder: with an adapter.

        Raises:
            CheckpointError: files that are damaged, or an adapter of another kind of task.
        """
        folder = Path(folder)
        record: dict[str, Any] = {}
        if (folder / ESTIMATOR).exists():
            try:
                record = json.loads((folder / ESTIMATOR).read_text(encoding="utf-8"))
                record = {"params": dict(record["params"]), "labels": record["labels"]}
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{folder / ESTIMATOR} is damaged") from error
        tuned = load_tuned(folder)
        config = tuned.adapter_config()
        if config.kind != cls.kind:
            raise CheckpointError(f"{folder} is of a {config.kind} task: {cls.__name__} is for {cls.kind}")
        known = {k: v for k, v in record.get("params", {}).items() if k in cls().get_params()}
        made = cls(**{"backbone": tuned.backbone_name, "method": config.method or dict(config.spec), **known})
        made.model_, made.reading_ = tuned.eval(), transform_of(folder, config.preprocessing)
        made._take_labels(record.get("labels") or list(config.classes or range(config.num_classes or 0)))
        if (seen := read_seen(folder, tuned)) is not None:
            made.earlier_ = seen[0], made._from_targets(seen[1])
        return made

    def __getstate__(self) -> dict[str, Any]:
        """An adapter is carried as its files, and its backbone by name."""
        state = {k: v for k, v in super().__getstate__().items() if k not in ("seen_", "earlier_")}
        if isinstance(state.get("model_"), Tuned):
            with tempfile.TemporaryDirectory() as folder:
                self.save(folder)
                state["model_"] = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(files := state.get("model_"), dict):
            with tempfile.TemporaryDirectory() as folder:
                for name, content in files.items():
                    (Path(folder) / name).write_bytes(content)
                state["model_"] = load_tuned(Path(folder))
        super().__setstate__(state)

    def _forget(self) -> None:
        for name in [name for name in vars(self) if name.endswith("_") and not name.startswith("__")]:
            delattr(self, name)

    def _labels(self) -> list[Any]:
        raise NotImplementedError

    def _take_labels(self, labels: Sequence[Any]) -> None:
        raise NotImplementedError

    def _to_targets(self, y: Any) -> Tensor:
        raise NotImplementedError

    def _from_targets(self, targets: Any) -> Any:
        raise NotImplementedError

    # ---- data

    def _data(self, X: Any, reset: bool) -> Any:
        """Items as a list, or rows (n, d) in float64."""
        given = _given(X)
        if not reset and (given is None) != isinstance(self.model_, nn.Linear):
            raise DataError("fitted on items and asked of rows of numbers, or the other way round")
        return validate_data(self, X, reset=reset, dtype=np.float64) if given is None else given

    def _pairs(self, X: Any, y: Any, reset: bool, **checks: Any) -> tuple[Any, Any]:
        given = _given(X)
        if given is None:
            return validate_data(self, X, y, reset=reset, dtype=np.float64, **checks)  # type: ignore[no-any-return]
        data = self._data(X, reset)
        check_consistent_length(data, y)
        return data, check_array(y, ensure_2d=False, dtype="numeric") if checks else column_or_1d(y, warn=True)

    def _also_seen(self, data: Any, y: Any) -> tuple[Any, Any]:
        """With those of earlier calls; labels of those, too, of which a folder had the features, first."""
        if hasattr(self, "seen_"):
            before, labels = self.seen_
            data = before + data if isinstance(data, list) else np.concatenate([before, data])
            y = np.concatenate([labels, y])
        self.seen_ = data, y
        return data, np.concatenate([self.earlier_[1], y]) if hasattr(self, "earlier_") else y

    def _known(self) -> tuple[Features, Tensor] | None:
        """Features of all that it was trained on, as far as it is there, and their targets."""
        parts = [self.earlier_] if hasattr(self, "earlier_") else []
        if hasattr(self, "seen_"):
            parts.append((self._features(self.seen_[0]), self.seen_[1]))
        if not parts:
            return None
        y = np.concatenate([labels for _, labels in parts])
        return Features.joined([features for features, _ in parts], padded), self._to_targets(y)

    # ---- training

    def _train(self, data: Any, targets: Tensor, classes: Sequence[str]) -> None:
        """Fit a new model, or go on with the one that is there. A head trains on standardised rows and targets, and
        takes the standardisation into its weights at the end."""
        with _ALONE:
            self._train_alone(data, targets, classes)

    def _train_alone(self, data: Any, targets: Tensor, classes: Sequence[str]) -> None:
        settings = {name: int(getattr(self, name)) for name in ("epochs", "batch_size", "seed")}
        config = TrainConfig(**settings, weight_decay=float(self.weight_decay))  # type: ignore[arg-type]
        going_on, rows = hasattr(self, "model_"), isinstance(data, np.ndarray)
        of_inputs = _moments(torch.tensor(data)) if rows else None
        of_outputs = _moments(targets) if self.kind == "regression" else None
        scaled = targets if of_outputs is None else (targets - of_outputs[0]) / of_outputs[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if not going_on and rows:
                self.model_ = nn.Linear(data.shape[1], len(classes), dtype=torch.float64)
                nn.init.zeros_(self.model_.weight)
            elif not going_on:
                self._add_adapter(data, scaled, classes)
        if going_on:
            _standardise(self._head(), of_inputs, of_outputs)
        else:
            _standardise(self._head(), of_inputs, None)
        module: nn.Module = self.model_
        if of_inputs is not None:
            mean, std = of_inputs
            examples: Any = TensorDataset((torch.tensor(data) - mean) / std, scaled)
        elif self.model_.reads_features:
            features = self._features(data)
            if hasattr(self, "earlier_"):
                features = Features.joined([self.earlier_[0], features], padded)
            module, examples = FromFeatures(self.model_), CachedFeatures(features, scaled)
        else:
            examples = self._examples(data, scaled.tolist(), cache=True)
        if self.lr is not None:
            self.lr_ = float(self.lr)
        elif not (going_on and hasattr(self, "lr_")):
            rates = rates_of(self.method, len(data), not going_on and isinstance(examples, CachedFeatures))
            items = self._items(data, targets.tolist()) if len(rates) > 1 else None
            self.lr_ = rates[0] if items is None else best_rate(rates, module, examples, items, config, self.kind)
        fit(module, examples, None, replace(config, lr=self.lr_), objective=objective(self.kind), progress=False)
        self.model_.eval()
        _restore(self._head(), of_inputs, of_outputs)

    def _add_adapter(self, given: list[Any], targets: Tensor, classes: Sequence[str]) -> None:
        module = self._load_backbone()
        torch.manual_seed(
            int(self.seed)
        )  # a backbone that was loaded for it has drawn numbers, one that was there none
        self.reading_ = reading_of(module, self.image_size, max_length=self.max_length)
        self.model_ = Tuned(module, backbone_name=self.backbone)
        settings: dict[str, Any] = {"pool": self.pool, "classes": classes, "kind": self.kind}
        self.model_.add_adapter("default", self.method, preprocessing=self.reading_.to_dict(), **settings)
        if torch.cuda.is_available():
            self.model_.cuda()
        if needs_data(self.model_):
            initialise(self.model_, self._examples(given, targets.tolist()), int(self.seed))

    def _load_backbone(self) -> nn.Module:
        """One for all estimators of these settings, but where it is itself trained."""
        load = load_backbone if isinstance(find_method(self.method), Full) else shared_backbone
        return load(self.backbone, self.weights, self.image_size)

    def _items(self, given: list[Any], labels: Sequence[Any]) -> Items:
        return given_items(given, labels, isinstance(self.reading_, Tokenise))

    def _examples(self, given: list[Any], labels: Sequence[Any], cache: bool = False) -> Examples:
        return prepared(self._items(given, labels), self.reading_, cache=cache)

    def _features(self, given: list[Any]) -> Any:
        items = self._items(given, [0] * len(given))
        backbone = (self.model_.backbone_name, tuple(self.model_.fingerprint), repr(self.reading_))

        def examples(rows: Sequence[int]) -> Examples:
            return prepared(Subset(items, rows), self.reading_, cache=False)

        return CACHE.features(self.model_, backbone, [digest(one) for one in given], examples, int(self.batch_size))

    @torch.no_grad()
    def _outputs(self, X: Any) -> Tensor:
        """(n, c), in float64."""
        check_is_fitted(self, "model_")
        data = self._data(X, reset=False)
        if isinstance(data, np.ndarray):
            found: Tensor = self.model_(torch.tensor(data))
            return found
        with _ALONE:
            labels, size = [0] * len(data), int(self.batch_size)
            if not self.model_.reads_features:
                return predict_logits(self.model_, self._examples(data, labels), size)[0].double()
            examples = CachedFeatures(self._features(data), torch.tensor(labels))
            return predict_logits(FromFeatures(self.model_), examples, 256)[0].double()

    def _head(self) -> nn.Linear:
        head: nn.Linear = self.model_ if isinstance(self.model_, nn.Linear) else self.model_.adapter("default").head
        return head


def shared_backbone(name: str, weights: str | None, image_size: int | None) -> nn.Module:
    """The backbone that estimators of these settings share; the last two that were asked for are kept.

    Args:
        name, weights, image_size: as `load_backbone` has them.
    """
    key = (name, weights, image_size)
    with _ALONE:
        if key not in _BACKBONES:
            _BACKBONES[key] = load_backbone(*key)
        _BACKBONES.move_to_end(key)
        while len(_BACKBONES) > _BACKBONES_AT_MOST:
            _BACKBONES.popitem(last=False)
        return _BACKBONES[key]


def _given(X: Any) -> list[Any] | None:
    """The items, or None where X is rows of numbers."""
    table = X.to_numpy() if hasattr(X, "iloc") else X
    if isinstance(table, np.ndarray) and table.dtype.kind in "OU" and table.ndim == 2 and table.shape[1] == 1:
        table = table[:, 0]
    if not isinstance(table, list | tuple | np.ndarray) or len(table) == 0:
        return None
    return list(table) if is_item(table[0]) else None


Moments = tuple[Tensor, Tensor]


def _moments(x: Tensor) -> Moments:
    """Mean and standard deviation of each column; 1 where that is zero."""
    std = x.std(0, unbiased=False)
    return x.mean(0), torch.where(std > 0, std, torch.ones_like(std))


@torch.no_grad()
def _standardise(head: nn.Linear, inputs: Moments | None, outputs: Moments | None) -> None:
    """A head of standardised inputs and outputs that computes what it did."""
    if inputs is not None:
        head.bias.add_(head.weight @ inputs[0])
        head.weight.mul_(inputs[1])
    if outputs is not None:
        mean, std = (x.to(head.bias) for x in outputs)
        head.bias.copy_((head.bias - mean) / std)
        head.weight.div_(std[:, None])


@torch.no_grad()
def _restore(head: nn.Linear, inputs: Moments | None, outputs: Moments | None) -> None:
    """The inverse of `_standardise`."""
    if outputs is not None:
        mean, std = (x.to(head.bias) for x in outputs)
        head.weight.mul_(std[:, None])
        head.bias.copy_(head.bias * std + mean)
    if inputs is not None:
        head.weight.div_(inputs[1])
        head.bias.sub_(head.weight @ inputs[0])
