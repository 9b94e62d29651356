"""Results as JSON lines: one a score, appended by any number of processes, each key once."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from restuning._version import __version__
from restuning.errors import RestuningError

RESULTS = "results.jsonl"
KEY = ("experiment", "row", "column", "seed")

Record = dict[str, Any]
"""experiment, row, column, seed; score and metric; settings, parameters, seconds, kept_bytes, peak_bytes, device,
versions, commit; of a side path, `gates`: its λ by layer."""


def key_of(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in KEY)


def append(path: Path, records: Sequence[Record]) -> int:
    """Those that are not there yet, on disk when it returns. Returns how many. What a killed writer left of a line is
    taken away. Raises RestuningError where the file cannot be written or is damaged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")), open(path, "a+b") as file:
            file.seek(0)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                file.truncate(len(whole))
            there = {key_of(record) for record in _parsed(path, whole)}
            new = [record for record in records if key_of(record) not in there]
            file.write("".join(json.dumps(record) + "\n" for record in new).encode())
            file.flush()
            os.fsync(file.fileno())
            return len(new)
    except OSError as error:
        raise RestuningError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path) -> list[Record]:
    """The records of a file, or of a folder's results.jsonl; none where there is no file yet."""
    path = path / RESULTS if path.is_dir() else path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RestuningError(f"cannot read {path}: {error.strerror or error}") from error
    return list(_parsed(path, data[: data.rfind(b"\n") + 1]))  # the rest is a line that is being written


def _parsed(path: Path, data: bytes) -> Iterable[Record]:
    for n, line in enumerate(data.splitlines(), 1):
        try:
            record = json.loads(line)
            missing = [name for name in KEY if name not in record]
        except (ValueError, TypeError) as error:
            raise RestuningError(f"{path}, line {n}: no record ({error})") from error
        if missing:
            raise RestuningError(f"{path}, line {n}: a record without {', '.join(missing)}")
        yield record


@cache
def where() -> dict[str, Any]:
    """What computes: versions, the commit of this source (None outside a checkout), the machine."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"restuning": __version__, "python": platform.python_version()}
    for package in ("torch", "timm", "transformers", "torchvision"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "commit": _commit(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
