"""`folder:PATH`: class/file, or train|val|test/class/file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from restuning.data.decode import SUFFIXES, decode
from restuning.data.task import Items, Source
from restuning.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val", "test")


class Files(Items):
    """Images in files."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.names, self.labels = [str(p) for p in paths], labels

    def item(self, i: int) -> "Image":
        try:
            with open(self.names[i], "rb") as file:
                return decode(file, self.names[i])
        except OSError as error:
            raise DataError(f"{self.names[i]} cannot be read: {error.strerror}") from error

    def head(self, i: int) -> bytes:
        with open(self.names[i], "rb") as file:
            return file.read(8)

    def size(self, i: int) -> int:
        return os.path.getsize(self.names[i])


def load_folder(path: str) -> Source:
    """Raises DataError for a folder that is missing, without classes, or with an empty class."""
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"no such folder: {root.absolute()} (expected class/file, or train|val|test/class/file)")
    top = _folders(root)
    if SPLITS[0] in top:
        found = {name: _classes(root / name) for name in SPLITS if name in top}
    else:
        found = {SPLITS[0]: _classes(root)}
    return source_of(str(root.absolute()), found, Files)


def load_images(path: Path) -> Items:
    """One image, or all of a folder (not of those below it), without labels: every label is 0."""
    if os.path.isdir(path):
        files = _files(path)
        if not files:
            raise DataError(f"no image in {path.absolute()} (expected {', '.join(sorted(SUFFIXES))})")
        return Files(files, [0] * len(files))
    if not os.path.exists(path):
        raise DataError(f"no such image or folder: {path.absolute()}")
    return Files([path], [0])


def source_of(where: str, splits: Mapping[str, Mapping[str, Sequence]], images: type) -> Source:  # type: ignore[type-arg]
    """split → class → items, checked and made into a source. `images` is built from (items, labels)."""
    classes = tuple(sorted(splits["train"]))
    if len(classes) < 2:
        raise DataError(
            f"{where} has {len(classes) or 'no'} class folder{'s' * (len(classes) != 1)}: expected two or more"
        )
    made = {}
    for split, found in splits.items():
        at = where if len(splits) == 1 else f"{where}, {split}"
        strange = sorted(set(found) - set(classes))
        if strange:
            raise DataError(f"{at}: class {strange[0]!r} is not among the training classes")
        for name, items in found.items():
            if not items:
                raise DataError(f"{at}: class {name!r} is empty (expected {', '.join(sorted(SUFFIXES))})")
        labelled = [(item, i) for i, name in enumerate(classes) for item in found.get(name, ())]
        made[split] = images([item for item, _ in labelled], [label for _, label in labelled])
    return Source(classes, made["train"], made.get("val"), made.get("test"))


def _classes(root: Path) -> dict[str, list[Path]]:
    return {name: _files(root / name) for name in _folders(root)}


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
