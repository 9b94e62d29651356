"""The adapters that are served: a snapshot that requests read, and the changes that replace it whole."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from restuning.backbones.load import load_backbone, preprocessing_of
from restuning.data import Preprocess, Reading, Texts, Tokenise, Tokenised
from restuning.data.objective import IGNORED
from restuning.errors import CheckpointError, DataError, RestuningError
from restuning.model.files import CONFIG, MODEL, changes_the_base, read_config
from restuning.model.predictor import Inputs, Predictor
from restuning.model.tuned import Tuned
from restuning.runs.load import backbone_of, transform_of, weights_of
from restuning.serving.settings import Refused, ServeSettings

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Snapshot:
    """What one batch is answered from: a predictor, and how the items of each of its tasks are read."""

    predictor: Predictor
    readings: Mapping[str, Reading]


class Adapters:
    """The served adapters. Reading `current` needs no lock; changes come one at a time.

    Made in the thread that starts the server. Raises CheckpointError for adapters that are damaged or not of one
    backbone.
    """

    def __init__(self, settings: ServeSettings, device: torch.device, added: Callable[[], None] = lambda: None) -> None:
        """added: called whenever an adapter has been."""
        self.settings, self._lock, self._added = settings, Lock(), added
        self._tokenizers: dict[tuple[Tokenise, bool], Any] = {}
        self._readings: dict[Reading, Reading] = {}  # equal ones are one object
        self._stamps: dict[str, Any] = {}  # of what `scan` has seen: name → files, sizes and times
        named = _named(settings.adapters)
        found = [] if settings.root is None or not settings.watch else _inside(settings.root)
        first = next(iter(named.values()), found[0] if found else None)
        weights = settings.weights
        if settings.backbone is not None:
            backbone = load_backbone(settings.backbone, weights, settings.image_size)
            self.backbone = settings.backbone
        elif first is not None:
            weights = weights_of(first) if weights is None else weights
            backbone, self.backbone = backbone_of(first, weights), str(read_config(first).backbone["name"])
        else:
            raise RestuningError("nothing to serve: give an adapter, or --backbone NAME")
        tuned = Tuned(backbone.to(device), backbone_name=self.backbone)
        self.size = preprocessing_of(backbone).size if tuned.family != "text" else None
        self.source = self.backbone, weights
        self.alone = len(named) == 1 and changes_the_base(next(iter(named.values())))
        empty = Predictor.of(tuned)
        if settings.compile:
            empty = empty.compiled()
        if self.alone:
            ((name, folder),) = named.items()
            tuned.load_adapter(folder, name)
            self.current = Snapshot(
                Predictor.of(tuned), {name: transform_of(folder, tuned.adapter_config(name).preprocessing)}
            )
            self._prepare(self.current.readings[name])
        else:
            self.current = Snapshot(empty, {})
            for name, folder in named.items():
                self._add(name, folder)

    @property
    def reads_texts(self) -> bool:
        """Whether the backbone reads texts, and not images."""
        return self.size is None

    # ---- changes

    def add(self, name: str, path: str | None = None, hub: str | None = None, revision: str | None = None) -> None:
        """Add an adapter from inside the root, or from the hub by its full revision, or replace the one of that name;
        nothing is seen of it before it has been checked and has answered once.

        Raises Refused for a name, a path or an id that cannot be, and for an adapter that does not fit.
        """
        if not NAME.fullmatch(name):
            raise Refused(
                422, f"an adapter cannot be named {name[:80]!r}: use letters, digits, '_' and '-', at most 64"
            )
        if (path is None) == (hub is None):
            raise Refused(422, "expected a path inside the folder of adapters, or a hub id with its revision")
        try:
            if hub is not None:
                if not self.settings.allow_hub:
                    raise Refused(403, "adapters from the hub are not allowed here (--allow-hub)")
                if not HUB_ID.fullmatch(hub) or not REVISION.fullmatch(revision or ""):
                    raise Refused(422, "expected a hub id, owner/name, and a revision of 40 hexadecimal digits")
                from restuning.model.files import fetch

                folder = fetch(hub, revision)
            else:
                folder = self._inside_root(str(path))
            with self._lock:
                self._add(name, folder, strict=True)
                self._stamps[name] = _stamp(folder)
        except Refused:
            raise
        except RestuningError as error:
            raise Refused(422, str(error).replace(f"{self.settings.root}{os.sep}", "")) from error

    def remove(self, name: str) -> None:
        """Serve an adapter no more. Raises Refused for a name that is not there."""
        with self._lock:
            now = self.current
            if name not in now.readings:
                raise Refused(404, f"no adapter named {name[:80]!r}")
            left = {key: how for key, how in now.readings.items() if key != name}
            self.current = Snapshot(now.predictor.without(name), left)

    def load(self, name: str, folder: Path) -> None:
        """Add an adapter that another process has checked. Raises CheckpointError for one that does not fit."""
        with self._lock:
            self._add(name, folder)

    def scan(self) -> list[tuple[str, str]]:
        """What has come, gone or changed in the root: (name, what happened), a line each. A folder that does not hold a
        sound adapter is told once, and tried again when its files change."""
        assert self.settings.root is not None
        events, there = [], {folder.name: folder for folder in _inside(self.settings.root)}
        for name, folder in there.items():
            stamp = _stamp(folder)
            if self._stamps.get(name) == stamp or not NAME.fullmatch(name):
                continue
            try:
                with self._lock:
                    self._add(name, folder, strict=bool(self.current.readings))
                events.append((name, "added"))
            except RestuningError as error:
                events.append((name, f"refused: {error}"))
            self._stamps[name] = stamp
        for name in [name for name in self._stamps if name not in there]:
            del self._stamps[name]
            if name in self.current.readings and name not in _named(self.settings.adapters):
                self.remove(name)
                events.append((name, "removed"))
        return events

    def _inside_root(self, path: str) -> Path:
        """A folder inside the root, links followed. Raises Refused."""
        root = self.settings.root
        if root is None:
            raise Refused(403, "adapters cannot be added here: there is no folder of them (--adapters)")
        try:
            top, folder = root.resolve(), (root / path).resolve()
            fits = path and folder.is_relative_to(top) and folder != top and folder.is_dir()
            files = fits and all((folder / name).resolve().is_relative_to(top) for name in (CONFIG, MODEL))
        except (OSError, ValueError, RuntimeError):
            files = False
        if not files:
            raise Refused(422, f"no adapter at {path[:200]!r} inside the folder of adapters")
        return folder

    def _add(self, name: str, folder: Path, strict: bool = False) -> None:
        """strict: its items must be read as the server already does, and no tokenizer is loaded for it."""
        if any(not (folder / file).is_file() for file in (CONFIG, MODEL)):  # no pipe, no device
            raise CheckpointError(f"{folder} is no saved adapter: expected the files {CONFIG} and {MODEL}")
        now = self.current
        how = transform_of(folder, read_config(folder).preprocessing)
        if strict:
            self._fits(how)
        self._prepare(how)
        how = self._readings.setdefault(how, how)
        predictor = now.predictor.with_adapter(name, folder)
        example = self.example(how, predictor.adapter_config(name).kind == "per-token")
        trial = replace(predictor, forward=None).predict(example, [name])[name]  # a graph takes a minute to compile
        if not torch.isfinite(trial).all():
            raise CheckpointError(f"{folder}: its output is no number")
        self.current = Snapshot(predictor, {**now.readings, name: how})
        self._added()

    def _fits(self, how: Reading) -> None:
        if isinstance(how, Preprocess):
            if how.size != self.size:
                raise DataError(f"its images are {how.size[0]} x {how.size[1]}; those served are {self.size}")
            values = (*how.mean, *how.std)
            if len(values) != 6 or not all(isinstance(v, int | float) and abs(v) < 1e4 for v in values) or 0 in how.std:
                raise DataError("its mean and standard deviation are not three finite numbers each")
        elif replace(how, max_length=None) not in {replace(one, max_length=None) for one, _ in self._tokenizers}:
            raise DataError("its texts are read by another tokenizer than those served")

    def _prepare(self, how: Reading) -> None:
        if isinstance(how, Tokenise):
            for by_word in (False, True):
                if (how, by_word) not in self._tokenizers:
                    self._tokenizers[how, by_word] = how.load(by_word)

    # ---- items

    def tokenised(self, texts: Sequence[tuple[Any, ...]], how: Tokenise, by_word: bool) -> Tokenised:
        """Texts as token ids. Raises DataError for one beyond the model's length."""
        labels = [list(range(len(text[0]))) if by_word else 0 for text in texts]
        names = [f"text {i + 1}" for i in range(len(texts))]
        return Tokenised(Texts(texts, labels, names), how, self._tokenizers[how, by_word])

    def example(self, how: Reading, by_word: bool = False) -> Inputs:
        """A batch of one, to try an adapter with."""
        if isinstance(how, Preprocess):
            return torch.zeros(1, 3, *how.size)
        return self.collate_of(how, by_word)([self._words(how, by_word)[0][0]])

    def collate_of(self, how: Reading, by_word: bool = False) -> Callable[[Sequence[Any]], Inputs]:
        """What makes a batch of items: of images, or of texts as token ids."""
        if isinstance(how, Preprocess):
            return _stacked
        made, label = self._words(how, by_word), [IGNORED] if by_word else 0
        return lambda items: made.collate([(item, label) for item in items])[0]

    def _words(self, how: Tokenise, by_word: bool) -> Tokenised:
        return self.tokenised([(["a", "word"],) if by_word else ("a word",)], how, by_word)

    def about(self, name: str) -> dict[str, Any]:
        """An adapter as /v1/models lists it."""
        config = self.current.predictor.adapter_config(name)
        return {
            "id": name,
            "object": "model",
            "owned_by": "restuning",
            "parent": self.backbone,
            "kind": config.kind,
            "classes": None if config.classes is None else list(config.classes),
            "num_classes": config.num_classes,
            "method": config.method,
            "pool": config.pool,
        }


def _stacked(items: Sequence[Any]) -> Inputs:
    return torch.stack(list(items))


def repeated(inputs: Inputs, count: int) -> Inputs:
    """A batch of so many of one item."""
    if isinstance(inputs, torch.Tensor):
        return inputs.expand(count, *inputs.shape[1:]).contiguous()
    return {name: x.expand(count, *x.shape[1:]).contiguous() for name, x in inputs.items()}


def _named(adapters: Sequence[str]) -> dict[str, Path]:
    """Names and folders. Raises RestuningError for two of one name."""
    named: dict[str, Path] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        path = Path(folder if equals else given)
        name = name if equals else path.resolve().name
        if not NAME.fullmatch(name):
            raise RestuningError(f"an adapter cannot be named {name!r}: say NAME=FOLDER, of letters, digits, '_', '-'")
        if name in named:
            raise RestuningError(f"two adapters are named {name!r}: say NAME=FOLDER for one of them")
        named[name] = path
    return named


def _inside(root: Path) -> list[Path]:
    """Folders of adapters, by name."""
    try:
        return sorted(p for p in root.iterdir() if (p / CONFIG).is_file() and (p / MODEL).is_file())
    except OSError as error:
        raise RestuningError(f"cannot read {root}: {error.strerror or error}") from error


def _stamp(folder: Path) -> Any:
    try:
        stats = [(folder / name).stat() for name in (CONFIG, MODEL)]
    except OSError:
        return None
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]
