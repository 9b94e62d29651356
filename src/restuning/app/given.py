"""What a person gives, as files by class: a folder of this machine, files, zips of folders, tables of texts."""

import lzma
import os
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from restuning.data.decode import SUFFIXES
from restuning.data.folder import JUNK, NAMED, TEXT, TEXT_BYTES
from restuning.data.table import LABELS, read_table
from restuning.data.table import SUFFIXES as TABLES
from restuning.data.text import TEXTS
from restuning.errors import DataError, RestuningError
from restuning.utils.reading import open_regular

READ = SUFFIXES | {TEXT}
UNZIPPED = (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What a damaged or locked zip raises."""
MOST_BYTES = 64 * 2**20
"""Of one item that is added."""
MOST_ZIPPED = 8 * 2**30
"""Of all that is read of one zip, as its table has it: no entry gives more than that says."""


def from_folder(path: Path) -> Iterator[tuple[str, bytes, str | None]]:
    """The items of a folder of this machine: the folder that one is in is its class; those on top have none."""
    if not path.is_dir():
        raise DataError(f"no such folder: {path}")
    wanted = _read_of(name for _, _, names in os.walk(path) for name in names)
    for at, inside, names in os.walk(path):
        inside[:] = sorted(filter(kept, inside))
        label = None if Path(at) == path or Path(at).name.lower() in NAMED else Path(at).name
        for name in sorted(filter(kept, names)):
            file = Path(at) / name
            if file.suffix.lower() in wanted and file.stat().st_size <= MOST_BYTES:
                with suppress(RestuningError, OSError), open_regular(str(file)) as opened:
                    yield name, opened.read(), label


def from_files(paths: Sequence[Path], label: str | None = None) -> Iterator[tuple[str, bytes, str | None]]:
    """Items, zips of them, whose folders are classes, and tables of texts. Nothing of a zip is written but what is
    decoded."""
    for path in paths:
        if path.suffix.lower() == ".zip":
            yield from _from_zip(path, label)
        elif path.suffix.lower() in TABLES:
            yield from _from_table(path, label)
        elif path.stat().st_size > MOST_BYTES:
            yield path.name, b"", label
        else:
            yield path.name, path.read_bytes(), label


def _from_zip(path: Path, label: str | None) -> Iterator[tuple[str, bytes, str | None]]:
    try:
        with zipfile.ZipFile(path) as archive:
            total = 0
            wanted = _read_of(archive.namelist())
            for entry in archive.infolist():
                parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
                if entry.is_dir() or not parts or not all(map(kept, parts)) or ".." in parts:
                    continue
                if Path(parts[-1]).suffix.lower() not in wanted:
                    continue
                total += entry.file_size
                if total > MOST_ZIPPED:
                    raise DataError(f"{path.name} unpacks to more than {MOST_ZIPPED >> 30} GiB: give it in parts")
                folder = parts[-2] if len(parts) > 1 and parts[-2].lower() not in NAMED else None
                yield parts[-1], _unpacked(archive, entry), label or folder
    except (*UNZIPPED, OSError) as error:
        raise DataError(f"{path.name} cannot be read as a zip: {error}") from error


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """An entry's bytes; none, which no decoder takes, where it is damaged, locked or too large."""
    if entry.file_size > MOST_BYTES:
        return b""
    with suppress(*UNZIPPED), archive.open(entry) as file:
        return file.read()
    return b""


def _read_of(names: Iterable[str]) -> Collection[str]:
    """The suffixes that are read: a text beside pictures is no item, but says something of them."""
    return SUFFIXES if any(Path(name).suffix.lower() in SUFFIXES for name in names) else READ


def _from_table(path: Path, label: str | None) -> Iterator[tuple[str, bytes, str | None]]:
    """Texts of a tsv, csv or jsonl; a row's class is in its column of labels, where it has one."""
    try:
        table = read_table(path)
    except DataError as error:  # of a copy, wherever that is
        raise DataError(str(error).replace(str(path), path.name)) from error
    text = next((name for name in TEXTS if name in table.columns), None)
    if text is None:
        raise DataError(f"{path.name} has the columns {', '.join(table.columns)}: expected one called text, and label")
    if TEXTS[text] in table.columns:
        raise DataError(f"{path.name} has pairs ({text}, {TEXTS[text]}): the page takes single texts")
    column = next((name for name in LABELS if name in table.columns), None)
    for i, row in enumerate(table.rows):
        value = None if column is None else row.get(column)
        own = None if value is None or not str(value).strip() else str(value)
        yield f"{path.stem}-{i + 1}{TEXT}", str(row.get(text) or "").encode(), label or own


def read_text_of(data: bytes, name: str) -> str:
    """The text of a file. Raises DataError where there is none, or too much."""
    try:
        text = data[: TEXT_BYTES + 1].decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8; save the file as UTF-8") from error
    if not text or len(data) > TEXT_BYTES:
        raise DataError(f"{name} has {len(data):,} bytes: expected a text of at most {TEXT_BYTES:,}")
    return text


def kept(name: str) -> bool:
    """Whether a name is one that a person gave, and that can be written on a page: it is UTF-8."""
    return not name.startswith(".") and name.lower() not in JUNK and name.encode(errors="ignore").decode() == name
