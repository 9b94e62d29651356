"""Files written whole or not at all."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout  # torch needs it, so it is there

from restuning.errors import Locked, RestuningError

PARTIAL = ".tmp"
"""How names end of what is not written to its end."""


def as_json(data: Any) -> bytes:
    """What a JSON file holds. Raises ValueError for numbers that are not finite: JSON has none."""
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Replace a file in one move: whenever the power goes, either the old one or the new one is there.

    Raises OSError, the old file intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = write_beside(path, data)
    try:
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_beside(path: Path, data: bytes | memoryview) -> Path:
    """The data in a file of a name that no other process has, in the same folder, ready to be moved to `path`."""
    temporary = path.with_name(f"{path.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary


_OVERWRITING: ContextVar[bool] = ContextVar("overwriting", default=False)


@contextmanager
def overwriting(allowed: bool = True) -> Iterator[None]:
    """While it lasts, a file that a person names for an output may replace another."""
    token = _OVERWRITING.set(allowed)
    try:
        yield
    finally:
        _OVERWRITING.reset(token)


def check_output(path: Path, what: str, *inputs: Path) -> None:
    """A file that a person names for an output is new, and is not among what is read; or it is to be replaced.

    Raises RestuningError for a folder, for a file that is there, and for one inside a folder of `inputs`.
    """
    if path.is_dir():
        raise RestuningError(f"cannot write {what} {path}: it is a folder; expected the name of a file")
    if _OVERWRITING.get():
        return
    if path.exists() or path.is_symlink():
        raise RestuningError(f"{what} {path} is there: choose another name, or give --overwrite")
    check_outside(path, what, *inputs)


def check_outside(path: Path, what: str, *inputs: Path) -> None:
    """Raises RestuningError for an output inside a folder that is read: it would be read the next time."""
    for folder in inputs:
        if folder.is_dir() and path.resolve().is_relative_to(folder.resolve()) and not _OVERWRITING.get():
            raise RestuningError(
                f"{what} {path} lies inside {folder}, which is read: choose another, or give --overwrite"
            )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While it lasts, no other process writes two files that belong together into this folder; it waits its turn."""
    try:
        import fcntl
    except ImportError:  # Windows, where a folder cannot be locked
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the move itself last; where a folder cannot be opened (Windows), the system does it in its own time."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def contents(folder: Path) -> list[str]:
    """Names of what is in it, but for locks and what a killed process left half-written."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(PARTIAL))


def in_use(out: Path) -> bool:
    """Whether another process has a folder `locked`."""
    if not (out / ".lock").exists():
        return False
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A folder, made where it is missing, for one process alone; what is refused inside leaves neither the lock nor an
    empty folder that was made for it. Raises Locked if another process has it."""
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    new_lock = not (out / ".lock").exists()
    lock = FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Locked(f"{out} is in use by another run: choose another folder, or wait for it") from error
    except OSError as error:
        raise RestuningError(f"cannot write to {out}: {error.strerror}") from error
    try:
        for left in out.glob(f"*{PARTIAL}"):  # by a process that was killed: this one alone writes here now
            with suppress(OSError):
                left.unlink()
        yield
    except Exception:
        with suppress(OSError):
            if new_lock:
                (out / ".lock").unlink(missing_ok=True)
            for folder in new_folders:  # but for what is kept in them
                folder.rmdir()
        raise
    finally:
        lock.release()
