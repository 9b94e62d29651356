"""`folder:PATH`: class/file, or train|val|test/class/file; images, or texts of a file each."""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from restuning.data.decode import SUFFIXES, decode
from restuning.data.task import Items, Source
from restuning.errors import DataError, line
from restuning.utils.notes import note
from restuning.utils.reading import open_regular, read_text

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val", "test")
NAMED = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What folders of splits are called, in small or capital letters."""
JUNK = ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found")
"""What systems leave in folders, beside hidden files."""
TEXT = ".txt"
"""A text in a file of its own, as scikit-learn's `load_files` and aclImdb have them."""
TEXT_BYTES = 2**20


class Files(Items):
    """Images in files."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.names, self.labels = [str(p) for p in paths], labels

    def item(self, i: int) -> "Image":
        try:
            with open_regular(self.names[i]) as file:
                return decode(file, self.names[i])
        except (OSError, ValueError) as error:  # a name with a null in it
            raise DataError(f"{self.names[i]} cannot be read: {_why(error)}") from error

    def head(self, i: int) -> bytes:
        with open_regular(self.names[i]) as file:
            return file.read(8)

    def size(self, i: int) -> int:
        try:
            return os.path.getsize(self.names[i])
        except (OSError, ValueError) as error:
            raise DataError(f"{self.names[i]} cannot be read: {_why(error)}") from error

    def raw(self, i: int) -> bytes:
        with open_regular(self.names[i]) as file:
            return file.read()


class TextFiles(Files):
    """Texts in files of their own, UTF-8."""

    def item(self, i: int) -> tuple[str]:  # type: ignore[override]
        try:
            text = read_text(self.names[i], TEXT_BYTES).strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.names[i]} is not UTF-8; save the file as UTF-8") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{self.names[i]} cannot be read: {_why(error)}") from error
        if not text:
            raise DataError(f"{self.names[i]} is empty: expected a text")
        return (text,)


def _why(error: OSError | ValueError) -> str:
    return error.strerror or line(error) if isinstance(error, OSError) else line(error)


def load_folder(path: str) -> Source:
    """Images; where there is none, the texts of .txt files. Raises DataError for a folder that is missing, without
    classes, or with an empty class."""
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"no such folder: {root.absolute()} (expected class/file, or train|val|test/class/file)")
    splits = _splits(root)

    def files(suffixes: Collection[str]) -> tuple[dict[str, dict[str, list[Path]]], list[Path]]:
        strange: list[Path] = []
        return {
            name: {c: _below(at, strange, suffixes) for c, at in own.items()} for name, own in splits.items()
        }, strange

    (found, strange), kind = files(SUFFIXES), Files
    if any(p.suffix.lower() == TEXT for p in strange) and not any(any(own.values()) for own in found.values()):
        (found, strange), kind = files((TEXT,)), TextFiles
    if not any(found.values()) and any(p.suffix.lower() in SUFFIXES for p in root.iterdir()):
        raise DataError(f"{root.absolute()} has pictures in no class folder: expected class/file, two classes or more")
    source = source_of(str(root.absolute()), found, kind)
    _tell(root, strange)
    return source


def _splits(root: Path) -> dict[str, dict[str, Path]]:
    """Split → class → folder, whatever the splits' folders are called; a test folder may stand beside the classes."""
    top = _folders(root)
    named: dict[str, str] = {}
    for name in top:
        split = NAMED.get(name.lower())
        if split is not None and split in named:
            raise DataError(f"{root.absolute()} has two folders for {split}: {named[split]} and {name}")
        if split is not None:
            named[split] = name
    own = {split: {c: root / name / c for c in _folders(root / name)} for split, name in named.items()}
    beside = {name: root / name for name in top if name not in named.values()}
    if "train" in named:
        if beside:
            note(f"{root}: {', '.join(sorted(beside)[:5])} beside {named['train']}: not read")
        return {split: own[split] for split in SPLITS if split in own}
    if own and len(beside) > 1 and all(classes and classes.keys() <= beside.keys() for classes in own.values()):
        return {"train": beside, **{split: own[split] for split in SPLITS if split in own}}
    return {"train": {name: root / name for name in top}}


def _tell(root: Path, strange: Sequence[Path]) -> None:
    """A note of the files that no reader knows."""
    if strange:
        kinds = Counter(p.suffix.lower() or "without a suffix" for p in strange)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        names = ", ".join(p.name for p in strange[:3])
        note(
            f"{root}: {len(strange)} files are no images that can be read ({counts}): "
            f"{names}{', …' * (len(strange) > 3)}"
        )


def _walk(folder: Path, strange: list[Path], suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """The files of a folder and of folders below it with these suffixes; others are added to `strange`."""
    files: list[Path] = []
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if _kept(name))
        for name in filter(_kept, names):
            path = Path(at) / name
            (files if path.suffix.lower() in suffixes else strange).append(path)
    return sorted(files)


def _below(folder: Path, strange: list[Path], suffixes: Collection[str]) -> list[Path]:
    """The files of a class: those in its folder, and in folders below that."""
    files = _walk(folder, strange, suffixes)
    if files and not any(p.parent == folder for p in files):
        below = sorted({p.relative_to(folder).parts[0] for p in files})
        note(
            f"{folder}: its files are in folders below it ({', '.join(below[:3])}): "
            f"they are all of class {folder.name!r}"
        )
    return files


def _kept(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in JUNK


def load_images(*paths: Path) -> Items:
    """Images, and all of folders and of those below them, without labels: every label is 0."""
    files = [file for path in paths for file in _images(path)]
    return Files(files, [0] * len(files))


def _images(path: Path) -> list[Path]:
    if "\0" in str(path):
        raise DataError(f"no such image or folder: {str(path)!r}")
    if os.path.isdir(path):
        strange: list[Path] = []
        files = _walk(path, strange)
        if not files:
            raise DataError(f"no image in {path.absolute()} (expected {', '.join(sorted(SUFFIXES))})")
        _tell(path, strange)
        return files
    if not os.path.exists(path):
        raise DataError(f"no such image or folder: {path.absolute()}")
    return [path]


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


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and _kept(p.name))
