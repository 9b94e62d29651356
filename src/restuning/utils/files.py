"""Files written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout  # torch needs it, so it is there

from restuning.errors import Locked, RestuningError


def as_json(data: Any) -> bytes:
    """What a JSON file holds."""
    return (json.dumps(data, indent=2) + "\n").encode()


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Replace a file in one move: whenever the power goes, either the old one or the new one is there.

    Raises OSError, the old file intact.
    """
    # one fixed name: what a killed run leaves is overwritten by the next
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the move itself last; where a folder cannot be opened (Windows), the system does it in its own time."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def contents(folder: Path) -> list[str]:
    """Names of what is in it, but for locks and what a killed process left half-written."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp"))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A folder, made where it is missing, for one process alone. Raises Locked if another has it."""
    lock = FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Locked(f"{out} is in use by another run: choose another folder, or wait for it") from error
    except OSError as error:
        raise RestuningError(f"cannot write to {out}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
