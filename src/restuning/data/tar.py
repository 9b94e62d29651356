"""`tar:PATH`: the layout of a folder inside a tar; nothing is extracted to disk."""

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from restuning.data.decode import SUFFIXES, decode
from restuning.data.folder import JUNK, NAMED, SPLITS, source_of
from restuning.data.task import Items, Source
from restuning.errors import DataError, line
from restuning.utils.reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

MEMBER_BYTES, TEXT_BYTES = 2**30, 2**20
Member = tuple[str, str, int, int]
"""tar, name, offset, size; for a compressed tar the offset is that of the unpacked stream."""


class Members(Items):
    """Images in a tar, read at their offsets; each process opens the file for itself."""

    def __init__(self, members: Sequence[Member], labels: Sequence[int]) -> None:
        self.members, self.labels = members, labels
        self.names = [f"{tar}:{name}" for tar, name, _, _ in members]

    def item(self, i: int) -> "Image":
        tar, _, offset, size = self.members[i]
        return decode(io.BytesIO(_read(tar, offset, size)), self.names[i])

    def head(self, i: int) -> bytes:
        tar, _, offset, size = self.members[i]
        return _read(tar, offset, min(size, 8))

    def size(self, i: int) -> int:
        return self.members[i][3]

    def raw(self, i: int) -> bytes:
        tar, _, offset, size = self.members[i]
        return _read(tar, offset, size)


def _read(tar: str, offset: int, size: int) -> bytes:
    try:
        with _open(tar) as file:
            file.seek(offset)
            return file.read(size)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{tar} cannot be read: {line(error)}") from error


def _open(tar: str) -> io.BufferedIOBase:
    """The tar's plain stream, whatever packs it."""
    stream: io.BufferedIOBase = _opener(tar)(tar, "rb")
    return stream


def _opener(tar: str) -> Any:
    """By the file's first bytes."""
    import bz2
    import gzip
    import lzma

    with open_regular(tar) as file:
        magic = file.read(2)
    return {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}.get(magic, open)


def members_of(path: str) -> list[Member]:
    """The files in a tar. Raises DataError for what is no tar or is cut short."""
    where = str(Path(path).absolute())
    if "\0" in path or not os.path.isfile(path):
        raise DataError(f"no such tar: {where!r}")
    try:
        with tarfile.open(path) as tar:
            files = [m for m in tar.getmembers() if m.isfile() and not m.issparse()]
            size = os.path.getsize(path)
    except Exception as error:  # of damaged headers and streams it can be anything
        raise DataError(f"{where} cannot be read as a tar: {line(error)}") from error
    big = next((m for m in files if m.size > MEMBER_BYTES), None)
    if big is not None:
        raise DataError(f"{where}: {big.name} has {big.size:,} bytes: expected at most {MEMBER_BYTES:,}")
    if _opener(path) is open and any(m.offset_data + m.size > size for m in files):
        raise DataError(
            f"{where} is cut short: expected {max(m.offset_data + m.size for m in files)} bytes, has {size}"
        )
    return [(path, m.name, m.offset_data, m.size) for m in files]


def contents(path: str, suffix: str) -> dict[str, bytes]:
    """What the files with a suffix hold, by name, in one pass. Raises DataError."""
    try:
        with tarfile.open(path) as tar:
            chosen = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(suffix) and m.size < TEXT_BYTES]
            return {m.name: file.read() for m in chosen if (file := tar.extractfile(m)) is not None}
    except Exception as error:
        raise DataError(f"{Path(path).absolute()} cannot be read as a tar: {line(error)}") from error


def load_tar(path: str) -> Source:
    """Raises DataError for what is no tar, is cut short, or holds no classes."""
    where = str(Path(path).absolute())
    named = [(PurePosixPath(member[1]), member) for member in members_of(path)]
    parts = [(name.parts, member) for name, member in named if name.suffix.lower() in SUFFIXES]
    kept = [
        (p, m)
        for p, m in parts
        if not any((part.startswith(".") and part != ".") or part.lower() in JUNK for part in p)
    ]
    tops = {p[0] for p, _ in kept}
    if len(tops) == 1 and all(len(p) > 2 for p, _ in kept) and NAMED.get(next(iter(tops)).lower()) != SPLITS[0]:
        kept = [(p[1:], m) for p, m in kept]  # one folder around it all
    by_split = all(len(p) > 2 and p[0].lower() in NAMED for p, _ in kept)
    by_split = by_split and any(NAMED[p[0].lower()] == SPLITS[0] for p, _ in kept)
    splits: dict[str, dict[str, list[Member]]] = {}
    for p, m in sorted(kept, key=lambda pair: pair[1][1]):
        if len(p) < 2:
            raise DataError(f"{where}: {m[1]} is in no class folder")
        split, name = (NAMED[p[0].lower()], p[1]) if by_split else (SPLITS[0], p[0])
        splits.setdefault(split, {}).setdefault(name, []).append(m)
    return source_of(where, splits or {SPLITS[0]: {}}, Members)
