"""Methods as plain data, for JSON."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, get_type_hints

from restuning.errors import MethodError, line
from restuning.methods.spec import KINDS, TUNER_CONFIGS, Method
from restuning.utils.plain import convert


def to_dict(method: Method) -> dict[str, Any]:
    """A method as plain data, for JSON. An own tuner is recorded by its name alone."""
    data: dict[str, Any] = _encode(method)
    return data


def from_dict(data: Mapping[str, Any]) -> Method:
    """The inverse of `to_dict`. Raises MethodError for unknown kinds and for own tuners, which no file can hold."""
    if not isinstance(data, Mapping) or data.get("kind") not in KINDS:
        kind = data.get("kind") if isinstance(data, Mapping) else type(data).__name__
        raise MethodError(f"unknown kind of method {kind!r}: expected one of {', '.join(KINDS)}")
    method: Method = _decode(data)
    return method


def _encode(value: Any) -> Any:
    for key, table in (("kind", KINDS), ("tuner", TUNER_CONFIGS)):
        name = type(value).__name__.lower()
        if table.get(name) is type(value):
            return {key: name, **{f.name: _encode(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode(item) for item in value]
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"own": f"{getattr(value, '__module__', '?')}.{name}"}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    if "own" in value:
        raise MethodError(f"this method has an own tuner, {value['own']}: pass method= with the same tuner")
    for key, table in (("kind", KINDS), ("tuner", TUNER_CONFIGS)):
        if isinstance(value.get(key), str):
            return _build(value[key], table, {k: _decode(v) for k, v in value.items() if k != key})
    return {name: _decode(item) for name, item in value.items()}


def _build(name: str, table: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    if name not in table:
        raise MethodError(f"unknown tuner {name!r}: expected one of {', '.join(table)}")
    unknown = settings.keys() - {f.name for f in fields(table[name])}
    if unknown:
        raise MethodError(f"unknown settings of {name}: {', '.join(sorted(unknown))}")
    hints = get_type_hints(table[name])
    for setting, value in settings.items():
        with suppress(TypeError):  # no plain type, such as a tuner's: its own check decides
            convert(hints[setting], value, f"{name}: {setting} is {value!r}", MethodError)
    try:
        return table[name](**settings)
    except (TypeError, AttributeError) as error:
        raise MethodError(f"{name} cannot be read: {line(error)}") from error
