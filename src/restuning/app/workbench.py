"""A project at work: features, training, what is looked at, changes that train again, answers. No page is needed."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning.app import look
from restuning.app.features import FROZEN, Engine, FeatureStore, Progress, engine
from restuning.app.project import Item, Project
from restuning.app.recipes import RECIPES
from restuning.app.training import HeldOut, cross_validate, fit_all, folds_of, shorter
from restuning.data.objective import confusion
from restuning.errors import CheckpointError, DataError, line
from restuning.features.novelty import Novelty, novelty
from restuning.methods.files import to_dict
from restuning.runs.settings import RUN, Run
from restuning.training.calibrate import Calibration, calibrate
from restuning.utils.files import as_json, atomic_write

HELD = "held-out.safetensors"
ADAPTER = "adapter"
ABOUT = "about.json"
"""Beside the adapter: how it was trained, its held-out accuracy and calibration."""
Seen = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Result:
    """What training gave.

    Args:
        keys: of the pictures, n.
        labels: (n,), by index into `classes`.
        classes: as the folders are called.
        held: method → its logits and scores on pictures that it did not see.
    """

    keys: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    held: Mapping[str, HeldOut]

    @property
    def best(self) -> str:
        """The method of the highest mean; of equals the cheapest."""
        return max(self.held, key=lambda name: (round(self.held[name].mean, 6), -list(RECIPES).index(name)))


class Workbench:
    """A project and what is computed of it. Threads may share one: what changes it is done one at a time.

    Args:
        project: the pictures.
    """

    def __init__(self, project: Project) -> None:
        self.project, self.lock = project, threading.RLock()
        self._store: FeatureStore | None = None
        self._result: Result | None = None
        self._calibration: dict[str, Calibration] = {}
        self._maps: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._novelty: tuple[tuple[str, ...], Novelty] | None = None
        self._result = self._read_result()

    # ---- data and features

    @property
    def engine(self) -> Engine:
        return engine(self.project.backbone, self.project.state["weights"])

    @property
    def store(self) -> FeatureStore:
        with self.lock:
            if self._store is None or self._store.engine is not self.engine:
                self._store = FeatureStore(self.project.own, self.engine)
            return self._store

    def choose_backbone(self, backbone: str, weights: str | None = None) -> None:
        """Take another backbone: features and results are its own. Raises as `restuning.load_backbone` does."""
        kind = engine(backbone, weights).kind
        if self.project.state["kind"] not in (kind, None):
            raise DataError(f"{backbone} reads {kind}, and this project is of {self.project.kind}: choose another one")
        with self.lock:
            if (backbone, weights) != (self.project.backbone, self.project.state["weights"]):
                self.project.update(backbone=backbone, weights=weights, seconds=None)
                self._store = self._result = self._novelty = None

    def compute(self) -> Iterator[Progress]:
        """The features that are missing; see `FeatureStore.compute`."""
        start, done = time.perf_counter(), 0
        for progress in self.store.compute(self.project.items()):
            done = progress.done
            yield progress
        if done:
            self.project.update(seconds=(time.perf_counter() - start) / done)

    def labelled(self) -> list[Item]:
        """The pictures that can be trained on: of a class with one of them, none could be held out."""
        items = [p for p in self.project.items(labelled=True) if p.key in self.store.rows]
        counts = Counter(p.label for p in items)
        return [p for p in items if counts[p.label] > 1]

    def embeddings(self, keys: Sequence[str]) -> Tensor:
        """(n, d): the backbone's own pooled features."""
        with torch.no_grad():
            frozen = self.engine.tuned.reader(FROZEN)
            features = frozen.select(self.store.features(self.engine.probing, keys))
            found: Tensor = frozen(features.map(lambda x: x.to(self.engine.device))).cpu()
            return found

    # ---- training

    @property
    def result(self) -> Result | None:
        """The latest, whether or not labels have changed since."""
        return self._result

    def fresh(self) -> bool:
        """Whether the result is of the pictures and labels that there are now."""
        if self._result is None:
            return False
        classes = self._result.classes
        had = {key: classes[y] for key, y in zip(self._result.keys, self._result.labels.tolist(), strict=True)}
        return had == {p.key: p.label for p in self.labelled()}

    def train(
        self,
        methods: Sequence[str] | None = None,
        settings: Mapping[str, float | None] = {},
        seen: Seen = lambda method, step, steps, loss: None,
    ) -> Result:
        """Train methods side by side, each picture held out once, and keep what they say of it.

        Args:
            methods: names of recipes; None: all that run on this backbone.
            settings: epochs and lr, where they are to be others than the recipe's.
            seen: told the method, its step, of how many, and the mean loss.

        Raises:
            DataError: fewer than two classes with two pictures or more.
        """
        with self.lock:
            pictures, recipes = self.labelled(), self.engine.recipes
            classes = tuple(sorted({str(p.label) for p in pictures}))
            at = {name: i for i, name in enumerate(classes)}
            keys = tuple(p.key for p in pictures)
            labels = torch.tensor([at[str(p.label)] for p in pictures], dtype=torch.long)
            folds = folds_of(labels)
            held = {}
            for name in [m for m in RECIPES if m in recipes and (methods is None or m in methods)]:

                def step(at: int, of: int, loss: float, name: str = name) -> None:
                    seen(name, at, of, loss)

                features = self.store.features(name, keys)
                recipe = shorter(recipes[name], settings)
                held[name] = cross_validate(self.engine, recipe, features, labels, len(classes), folds, step)
            if not held:
                raise DataError(f"none of {', '.join(methods or RECIPES)} runs on {self.engine.backbone}")
            self._set_result(Result(keys, labels, classes, held))
            self._write_result()
            assert self._result is not None
            return self._result

    @property
    def method(self) -> str:
        """The chosen one: what a person has chosen, where it was trained, or the best."""
        chosen, result = self.project.state["method"], self._need()
        return str(chosen) if chosen in result.held else result.best

    def change(self, keys: Sequence[str], label: str | None = None, *, remove: bool = False) -> Result | None:
        """Relabel pictures (or remove them) and train the chosen method again, at once; None where no training was."""
        with self.lock:
            if remove:
                self.project.remove(keys)
            else:
                self.project.label(keys, label)
            if self._result is None:
                return None
            return self.train([self.method])

    # ---- what is looked at

    def calibration(self) -> Calibration:
        """Of the chosen method, on held-out pictures."""
        if self.method not in self._calibration:
            result = self._need()
            self._calibration[self.method] = calibrate(result.held[self.method].logits, result.labels)
        return self._calibration[self.method]

    def probabilities(self) -> Tensor:
        """(n, classes), held out and calibrated, of the chosen method."""
        return self.calibration().probabilities(self._need().held[self.method].logits).float()

    def all_probabilities(self) -> Tensor:
        """(n, classes), held out and calibrated: the mean over all methods that were trained."""
        result = self._need()
        each = [calibrate(h.logits, result.labels).probabilities(h.logits) for h in result.held.values()]
        return torch.stack(each).mean(0).float()

    def confirmed(self) -> set[int]:
        """Indices of pictures that a person has marked as right."""
        right = set(self.project.state["right"])
        return {i for i, key in enumerate(self._need().keys) if key in right}

    def mistakes(self) -> list[int]:
        return look.mistakes(self.probabilities(), self._need().labels, self.confirmed())

    def wrong_labels(self) -> tuple[list[int], int]:
        return look.wrong_labels(self.all_probabilities(), self._need().labels, self.confirmed())

    def confusion(self) -> Tensor:
        return confusion(self.probabilities(), self._need().labels)

    def map(self, how: str = "pca") -> Tensor:
        """(n, 2), of the result's pictures; computed once for the same pictures."""
        key = (how, self._need().keys)
        if key not in self._maps:
            self._maps = {key: look.places(self.embeddings(self._need().keys), how)}
        return self._maps[key]

    def alike(self, key: str, most: int = 24) -> list[str]:
        """Keys of the pictures most alike one, itself first."""
        keys = [p.key for p in self.project.items() if p.key in self.store.rows]
        rows = self.embeddings(keys)
        return [keys[i] for i in look.alike(rows, rows[keys.index(key)], most)]

    def novelty(self) -> Novelty:
        """Of the pictures that were trained on; computed once for the same pictures."""
        keys = self._need().keys
        if self._novelty is None or self._novelty[0] != keys:
            self._novelty = keys, novelty(self.embeddings(keys))
        return self._novelty[1]

    # ---- what is taken away

    @property
    def adapter(self) -> Path:
        return self.project.own / ADAPTER

    def finish(self) -> Path:
        """Train the chosen method on all pictures and write the adapter's folder; the temperature is taken into its
        head, so that whatever reads it gives calibrated probabilities."""
        with self.lock:
            result, method, own = self._need(), self.method, self.engine
            recipe = own.recipes[method]
            name = fit_all(own, recipe, self.store.features(method, result.keys), result.labels, result.classes)
            head = own.tuned.adapter(name).head
            assert isinstance(head, nn.Linear)
            calibration = self.calibration()
            with torch.no_grad():
                head.weight.div_(calibration.temperature)
                head.bias.div_(calibration.temperature)
            try:
                own.tuned.save_pretrained(self.adapter, name)
            finally:
                with own.lock:
                    own.tuned.delete_adapter(name)
            run = Run("python", recipe.method if isinstance(recipe.method, str) else to_dict(recipe.method))
            run = Run(**{**vars(run), "backbone": own.backbone, "weights": own.weights})
            atomic_write(self.adapter / RUN, as_json(run.to_dict()))
            new = self.novelty()
            about = {
                "method": method,
                "pictures": len(result.keys),
                "trained_on": self.signature(),
                "held_out": {m: [h.mean, h.spread, len(h.scores)] for m, h in result.held.items()},
                "temperature": calibration.temperature,
                "calibration_error": [calibration.before, calibration.after],
                "novelty": [new.threshold, new.false_alarms],
            }
            atomic_write(self.adapter / ABOUT, as_json(about))
            return self.adapter

    def signature(self) -> str:
        """What tells the latest result, and the method in use, from others."""
        result = self._need()
        told = (self.method, result.classes, result.keys, result.labels.tolist(), self.engine.key)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def about(self) -> dict[str, Any] | None:
        """What the latest adapter was trained on; None: there is none."""
        try:
            found: dict[str, Any] = json.loads((self.adapter / ABOUT).read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):
            return None

    # ---- inside

    def _need(self) -> Result:
        if self._result is None:
            raise DataError(f"project {self.project.name} has not been trained yet")
        return self._result

    def _set_result(self, result: Result) -> None:
        self._result, self._calibration = result, {}

    def _write_result(self) -> None:
        from safetensors.torch import save

        result = self._need()
        meta = {
            "keys": list(result.keys),
            "classes": list(result.classes),
            "scores": {name: list(h.scores) for name, h in result.held.items()},
            "backbone": [self.project.backbone, self.project.state["weights"]],
        }
        tensors = {f"logits.{name}": h.logits.contiguous() for name, h in result.held.items()}
        data = save({**tensors, "labels": result.labels}, {"about": json.dumps(meta)})
        atomic_write(self.project.own / HELD, data)

    def _read_result(self) -> Result | None:
        from safetensors import safe_open

        path = self.project.own / HELD
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["about"])
                if meta["backbone"] != [self.project.backbone, self.project.state["weights"]]:
                    return None  # of another backbone, which was in use before
                labels = file.get_tensor("labels")
                scores = meta["scores"]
                held = {m: HeldOut(file.get_tensor(f"logits.{m}"), tuple(s)) for m, s in scores.items() if m in RECIPES}
            if not held or any(h.logits.shape != (len(meta["keys"]), len(meta["classes"])) for h in held.values()):
                raise ValueError("its parts do not fit")
        except Exception as error:  # safetensors has errors of its own
            raise CheckpointError(f"{path} is damaged: {line(error)}; remove it to train anew") from error
        return Result(tuple(meta["keys"]), labels, tuple(meta["classes"]), held)
