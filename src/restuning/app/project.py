"""A project: a folder class/file that `folder:` reads, and beside the classes, hidden from it, what the page keeps."""

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from restuning.app.given import MOST_BYTES, kept, read_text_of
from restuning.backbones.load import MICRO
from restuning.data.decode import SUFFIXES, decode
from restuning.data.folder import NAMED, TEXT
from restuning.errors import CheckpointError, DataError, RestuningError
from restuning.utils.files import PARTIAL, as_json, atomic_write
from restuning.utils.hub import MINILM
from restuning.utils.reading import open_regular, read_json

OWN, UNLABELLED, REMOVED = ".restuning", ".unlabelled", ".removed"
STATE, FORMAT = "project.json", "restuning-project/1"
FEW = 5
"""A class with fewer items has too few, and the page tells so."""
LEFT_OUT = "; with one alone it is left out of training"
MOST = 20_000
"""Items that are added at once."""
KINDS = {"pictures": SUFFIXES, "texts": frozenset([TEXT])}
"""What a project is of, and how its files end."""
BACKBONES = {"pictures": MICRO, "texts": MINILM}
"""What a project begins with."""
TOLD = 200
"""Items after which those who wait are told how many are in."""


@dataclass(frozen=True)
class Item:
    """A picture or a text of a project. key: tells it by its content; label: its class; None: it has none yet."""

    path: Path
    key: str
    label: str | None


@dataclass
class Added:
    """What became of items that were given: how many are in, which were there, and why others were refused."""

    count: int = 0
    there: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class Project:
    """Pictures, or texts, by class in a folder. A label is the folder that an item is in, so that nothing else has to
    agree.

    Args:
        path: the folder; it is made if it is not there.

    Raises:
        RestuningError: it is no folder, or is split into train and test already.
        CheckpointError: what the page kept in it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if path.exists() and not path.is_dir():
            raise RestuningError(f"{path} is no folder: expected one, or a name that is free")
        self.path.mkdir(parents=True, exist_ok=True)
        split = [name for name in self.classes() if name.lower() in NAMED]
        if split:
            raise RestuningError(f"{path} is split already ({', '.join(split)}): expected class/file, as a copy has it")
        self._keys: dict[Path, tuple[tuple[int, int], str]] = {}
        self._seen: tuple[float, list[Item]] = 0.0, []
        self._lock = threading.RLock()
        self.own.mkdir(exist_ok=True)
        self.state = self._read()
        if self.state["kind"] is None and (found := self._kind()):
            self._begin(found)

    @property
    def kind(self) -> str:
        """`pictures` or `texts`; pictures where it is empty."""
        return str(self.state["kind"] or "pictures")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def own(self) -> Path:
        """What the page keeps: settings, features, the trained adapter."""
        return self.path / OWN

    @property
    def backbone(self) -> str:
        return str(self.state["backbone"])

    # ---- what it holds

    def classes(self) -> tuple[str, ...]:
        """The class folders, sorted as `folder:` sorts them."""
        return tuple(sorted(p.name for p in self.path.iterdir() if p.is_dir() and kept(p.name)))

    def items(self, labelled: bool = False) -> list[Item]:
        """Those of all classes, and (unless `labelled`) those without; one of the same content is one, the first."""
        found: dict[str, Item] = {}
        for picture in self._all(labelled):
            found.setdefault(picture.key, picture)
        return list(found.values())

    def counts(self) -> dict[str, int]:
        """Pictures of every class."""
        have = Counter(p.label for p in self.items(labelled=True))
        return {name: have[name] for name in self.classes()}

    def problems(self, bad: Mapping[str, str] = {}) -> list[tuple[str, list[Item]]]:
        """What is wrong with the data, a line and the items that it is about.

        Args:
            bad: items that cannot be read, by key, and why.
        """
        by_key: dict[str, list[Item]] = {}
        for picture in self._all(False):
            by_key.setdefault(picture.key, []).append(picture)
        found: list[tuple[str, list[Item]]] = []
        for reason, ps in [(bad[key], ps) for key, ps in by_key.items() if key in bad]:
            found.append((f"cannot be read: {ps[0].path.name}: {reason}", []))
        for ps in by_key.values():
            labels = sorted({p.label for p in ps if p.label is not None})
            if len(labels) > 1:
                found.append((f"in {len(labels)} classes ({', '.join(labels)}): {ps[0].path.name}", ps[:1]))
            elif len(ps) > 1:
                found.append((f"there {len(ps)} times: {', '.join(p.path.name for p in ps[:3])}", ps[:1]))
        counts = self.counts()
        found += [
            (f"too few: class {name} has {count}, {FEW} or more are better" + LEFT_OUT * (count == 1), [])
            for name, count in counts.items()
            if count < FEW
        ]
        if len(counts) < 2:
            found.append((f"{len(counts) or 'no'} class{'es' * (len(counts) != 1)}: two or more are needed", []))
        return found

    # ---- changes

    def add_class(self, name: str) -> None:
        """Raises DataError for a name that no folder can have, or that `folder:` would read as something else."""
        name = checked(name, "class")
        (self.path / name).mkdir(exist_ok=True)

    def add(self, files: Iterable[tuple[str, bytes, str | None]]) -> Added:
        """Add items, (name, bytes, class) each; what cannot be decoded, and what is there already, stays out."""
        *_, added = self.adding(files)
        return added

    def adding(self, files: Iterable[tuple[str, bytes, str | None]]) -> Iterator[Added]:
        """The same, which tells how far it is."""
        added, there = Added(), {p.key for p in self._all(False)}
        for i, (name, data, label) in enumerate(files, 1):
            if i % TOLD == 0:
                self._seen = 0.0, []
                yield added
            shown = PurePosixPath(name.replace("\\", "/")).name
            if i > MOST:
                added.refused.append(f"{shown} and what follows: {MOST} at a time are read")
                break
            try:
                if not data:
                    raise DataError(f"{shown} is empty, damaged, or of more than {MOST_BYTES >> 20} MiB")
                kind = "texts" if shown.lower().endswith(TEXT) else "pictures"
                if self.state["kind"] not in (kind, None):
                    raise DataError(f"{shown}: this project is of {self.kind}: make another one for {kind}")
                if kind == "texts":
                    read_text_of(data, shown)
                else:
                    decode(BytesIO(data), shown)
                if label is not None:
                    self.add_class(label)
            except RestuningError as error:
                added.refused.append(str(error))
                continue
            key = _digest(data)
            if key in there:
                added.there.append(shown)
                continue
            if self.state["kind"] is None:
                self._begin(kind)
            folder = self.path / (UNLABELLED if label is None else label.strip())
            folder.mkdir(exist_ok=True)
            quick_write(_free(folder, shown), data)
            there.add(key)
            added.count += 1
        self._seen = 0.0, []
        yield added

    def label(self, keys: Sequence[str], label: str | None) -> int:
        """Move items to a class, or to those without one; returns how many were moved."""
        if label is not None:
            self.add_class(label)
        return self._move(keys, UNLABELLED if label is None else label.strip())

    def remove(self, keys: Sequence[str]) -> int:
        """Move items out of the project, to a hidden folder in it, from where they can be had again."""
        return self._move(keys, REMOVED)

    def mark_right(self, keys: Sequence[str]) -> None:
        """Labels that a person has looked at: they are no mistakes any more."""
        with self._lock:
            self.update(right=sorted({*self.state["right"], *keys}))

    def update(self, **changes: Any) -> None:
        """Change what project.json holds."""
        with self._lock:
            state = {**self.state, **changes}
            atomic_write(self.own / STATE, as_json(state))
            self.state = state

    def copy_to(self, other: "Project") -> int:
        """Give another project all items, unlabelled, and the features that are there: it needs no pass of the
        backbone."""
        folder = other.path / UNLABELLED
        folder.mkdir(exist_ok=True)
        items = self.items()
        for item in items:
            _link(item.path, _free(folder, item.path.name))
        for part in ("features", "thumbnails"):
            for file in (self.own / part).rglob("*"):
                if file.is_file() and not file.name.endswith((".tmp", ".lock")):
                    target = other.own / file.relative_to(self.own)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not target.exists():
                        _link(file, target)
        other._seen = 0.0, []
        other.update(backbone=self.backbone, weights=self.state["weights"], kind=self.state["kind"])
        return len(items)

    # ---- inside

    def _begin(self, kind: str) -> None:
        """What it is of is known: the first item came."""
        own = self.state["backbone"]
        self.update(kind=kind, backbone=BACKBONES[kind] if own in BACKBONES.values() else own)

    def _kind(self) -> str | None:
        for at, inside, names in os.walk(self.path):
            inside[:] = sorted(name for name in inside if kept(name) or name == UNLABELLED)
            for suffix in (Path(name).suffix.lower() for name in names if Path(at) != self.path and kept(name)):
                for kind, suffixes in KINDS.items():
                    if suffix in suffixes:
                        return kind
        return None

    def _move(self, keys: Sequence[str], folder: str) -> int:
        wanted, target, moved = set(keys), self.path / folder, 0
        with self._lock:
            self._seen = 0.0, []  # a file may have gone since
            target.mkdir(exist_ok=True)
            for picture in [p for p in self._all(False) if p.key in wanted and p.path.parent != target]:
                picture.path.rename(_free(target, picture.path.name))
                moved += 1
            self._seen = 0.0, []
            if set(self.state["right"]) & wanted:
                self.update(right=[key for key in self.state["right"] if key not in wanted])
        return moved

    def _all(self, labelled: bool) -> list[Item]:
        """Walking the folder takes a tenth of the time at most: what was seen holds for ten times as long as that took,
        or until something is changed here."""
        until, items = self._seen
        if (start := time.monotonic()) >= until:
            items = list(self._walked())
            self._seen = start + 11 * (time.monotonic() - start), items
        return [item for item in items if item.label is not None] if labelled else items

    def _walked(self) -> Iterator[Item]:
        folders: list[tuple[Path, str | None]] = [(self.path / name, name) for name in self.classes()]
        for folder, label in [*folders, (self.path / UNLABELLED, None)]:
            for at, inside, names in os.walk(folder):
                inside[:] = sorted(filter(kept, inside))
                for name in sorted(filter(kept, names)):
                    path = Path(at) / name
                    if path.suffix.lower() in KINDS[self.kind] and (key := self._key(path)):
                        yield Item(path, key, label)

    def _key(self, path: Path) -> str:
        """Of the file's content; read again where its size or time is another."""
        try:
            stat = path.stat()
            seen, key = self._keys.get(path, ((0, 0), ""))
            if seen != (now := (stat.st_size, stat.st_mtime_ns)):
                with open_regular(str(path)) as file:
                    key = _digest(file.read())
                self._keys[path] = (now, key)
            return key
        except (OSError, RestuningError):  # it went, or is none
            return ""

    def _read(self) -> dict[str, Any]:
        start: dict[str, Any] = dict.fromkeys(("weights", "method", "kind", "seconds"))
        start |= {"format": FORMAT, "backbone": MICRO, "right": []}
        path = self.own / STATE
        if not path.exists():
            return start
        try:
            state = read_json(path)
            good = isinstance(state, dict) and state.get("format") == FORMAT and isinstance(state.get("right"), list)
            good = good and state.get("kind") in (None, *KINDS)
        except (OSError, ValueError, json.JSONDecodeError):
            good = False
        if not good:
            raise CheckpointError(f"{path} is damaged: expected {FORMAT}; remove it to begin anew")
        return {**start, **state}


def checked(name: str, what: str) -> str:
    """A name that a folder can have and that `folder:` reads as a class, without blanks around it. Raises DataError.

    Args:
        name: as a person has it.
        what: a class or a project, for the error.
    """
    name = name.strip()
    strange = not name or not name.isprintable() or len(name.encode()) > 100 or any(c in name for c in "/\\\0")
    if strange or not kept(name) or name.lower() in NAMED:
        raise DataError(f"no {what} can be called {name[:40]!r}: expected a short name without / that is no split's")
    return name


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _free(folder: Path, name: str) -> Path:
    """A path of this name in the folder, or of one like it, that is not taken."""
    name = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name).lstrip(".") or "picture"
    stem, suffix = Path(name).stem.encode()[:150].decode(errors="ignore"), Path(name).suffix[:20]
    path, i = folder / f"{stem}{suffix}", 2
    while path.exists():
        path, i = folder / f"{stem}-{i}{suffix}", i + 1
    return path


def quick_write(path: Path, data: bytes) -> None:
    """Whole or not at all, but for a power cut: what is written can be given, or made, again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copyfile(source, target)
