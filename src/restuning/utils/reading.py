"""What is read from outside, bounded: regular files alone, JSON of a size and a depth, numbers that are finite, names
that stay inside their folder.

Everything here raises OSError or ValueError, each with one line, which the callers turn into errors of their own kind.
"""

import errno
import io
import json
import math
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

JSON_BYTES = 256 * 2**20
"""The largest JSON that is read: COCO's captions are 90 MiB."""
DEPTH = 64
FILE_BYTES = 64 * 2**30


def open_regular(path: str | Path) -> io.BufferedReader:
    """A file for reading. A FIFO, a device, a socket or a folder is refused before anything is read of it: the first
    would block for ever, the second never end. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        kind = os.fstat(handle).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: str | Path) -> None:
    """Raises OSError for what is not there, cannot be opened, or is no regular file: ahead of libraries that open files
    by themselves."""
    open_regular(path).close()


def read_bytes(path: str | Path, limit: int = FILE_BYTES) -> bytes:
    """A whole file, of at most `limit` bytes. Raises OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, expected at most {limit:,}", str(path))
        data = file.read(size + 1)
        if len(data) > size:  # it grew, or is one of those that have no size, as in /proc
            data += file.read(min(limit, JSON_BYTES) + 1)
            if len(data) > min(limit, JSON_BYTES):
                raise OSError(errno.EFBIG, f"it has more than {size:,} bytes, and says so many", str(path))
        return data


def read_text(path: str | Path, limit: int = JSON_BYTES) -> str:
    """UTF-8, with or without a byte order mark. Raises OSError, ValueError."""
    return read_bytes(path, limit).decode("utf-8-sig")


def read_json(path: str | Path, limit: int = JSON_BYTES) -> Any:
    """See `parse_json`. Raises OSError, ValueError."""
    return parse_json(read_bytes(path, limit))


def parse_json(data: bytes | str) -> Any:
    """Strict JSON: no NaN, no infinity (1e999 is one), no key twice in an object, no text that is not Unicode, at most
    64 levels. Raises ValueError."""
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        found = json.loads(text, parse_constant=_constant, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEPTH} deep") from error
    level, depth = [found], 0
    while level:
        if depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} deep")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
                inner += value.keys()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{value!r} is no Unicode text") from error
        level, depth = inner, depth + 1
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number: expected a finite one")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice in one object")
    return found


def inside(folder: Path, name: Any) -> Path:
    """The file of that name in a folder, or below it. Raises ValueError for a name that leads out of it."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise ValueError(f"{name!r} is no name of a file")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{name!r} leads out of its folder")
    return folder / name


def number(value: Any, low: float, high: float, what: str, whole: bool = False) -> Any:
    """The value, if it is a number within bounds. Raises ValueError."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise ValueError(f"{what} is {value!r}: expected a {'whole ' * whole}number from {low:g} to {high:g}")
    return value


def printable(text: str) -> str:
    """Text as a terminal can be given it: control characters, line breaks and lone surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
