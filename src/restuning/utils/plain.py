"""Plain data, as JSON holds it, to settings: by msgspec, which is needed only where something is read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from restuning.errors import MissingExtra, RestuningError

T = TypeVar("T")


def from_plain(
    kind: type[T], data: Any, where: str, fail: type[RestuningError] = RestuningError, *, strict: bool = True
) -> T:
    """Plain data as a dataclass, its settings of the declared types (not `strict`: or text of them). Raises `fail`, one
    line, for one that is unknown, missing, or of another type; `where` begins it."""
    unknown = _unknown(kind, data)
    if unknown:
        raise fail(f"{where} has unknown settings: {', '.join(unknown)}")
    if isinstance(data, Mapping) and (lacking := [f.name for f in fields(kind) if _required(f) and f.name not in data]):  # type: ignore[arg-type]
        raise fail(f"{where} is incomplete: it lacks {', '.join(lacking)}")
    found: T = convert(kind, data, f"{where} is damaged", fail, strict=strict)
    return found


def convert(
    kind: Any, data: Any, where: str, fail: type[RestuningError] = RestuningError, *, strict: bool = True
) -> Any:
    """Plain data as a declared type (lists become tuples). Raises `fail` for data of another type."""
    try:
        import msgspec
    except ImportError as error:
        raise MissingExtra("msgspec", "cli") from error
    try:
        return msgspec.convert(data, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise fail(f"{where}: {error}") from error


def read_plain(path: Path, kind: type[T], change: Callable[[Any], Any] = lambda data: data) -> T:
    """A JSON file as a dataclass. change: made to its data first. Raises RestuningError, one line, where it is not
    there or does not fit."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RestuningError(f"no recorded run at {path}: expected a {path.name}") from error
    except ValueError as error:
        raise RestuningError(f"{path} is damaged: {error}") from error
    return from_plain(kind, change(data) if isinstance(data, dict) else data, str(path))


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _unknown(kind: Any, data: Any) -> list[str]:
    """Settings that a dataclass, or one of its fields, does not have."""
    if not (is_dataclass(kind) and isinstance(data, Mapping)):
        return []
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    inner = [f"{name}.{one}" for name in names if name in data for one in _unknown(hints[name], data[name])]
    return sorted(set(data) - set(names)) + inner
