"""argparse's arguments from the fields of settings dataclasses, and settings from what was given.

tyro 1.0 and jsonargparse 4.53 were tried. tyro cannot read `predict ADAPTER... INPUT` (the first positional takes all),
shows older names in the help, prints an error as a box of lines and exits by itself; jsonargparse reads `--lr 0.005
0.001` as `--lr [0.005,0.001]`, `--resume` as `--resume true`, and no `--no-keep-features`. Either costs 0.15 to 0.25 s
of import, and more code to bend than this file has.
"""

import argparse
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from restuning.errors import RestuningError
from restuning.utils.options import Option

S = TypeVar("S")


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise RestuningError(f"{message} (see {self.prog} --help)")

    def settings(
        self, settings: Any, *, only: Collection[str] = (), without: Collection[str] = (), partial: bool = False
    ) -> None:
        """A flag for every field that has an `Option`, of nested settings too.

        Args:
            settings: a dataclass, or one of its instances, whose values are the defaults then.
            only: of these fields alone.
            without: but for these fields, of nested settings too.
            partial: nothing is required: what is missing comes from elsewhere.
        """
        kind = settings if isinstance(settings, type) else type(settings)
        for field, hint, option in _options(kind):
            if field.name in without or (only and field.name not in only):
                continue
            default = _default(field) if settings is kind else getattr(settings, field.name)
            if is_dataclass(default):
                self.settings(default, without=without, partial=True)
            elif option is not None:
                self._one(f"{kind.__name__}.{field.name}", field.name, hint, option, default, partial)

    def _one(self, place: str, name: str, hint: Any, option: Option, default: Any, partial: bool) -> None:
        many, kind = _kind(hint)
        told: dict[str, Any] = {"dest": place, "default": argparse.SUPPRESS, "help": _help(option.help, default)}
        names = [f"--{flag.replace('_', '-')}" for flag in (option.flag or name, *option.aliases)]
        if kind is bool:
            names = [f"--no-{flag[2:]}" if default is True else flag for flag in names]
            told["action"] = "store_false" if default is True else "store_true"
        else:
            literal = get_origin(kind) is Literal and option.parse is None
            choices = option.choices or (get_args(kind) if literal else None)
            parse = option.parse and _parser_of(option.parse)
            told |= {"type": parse or (str if choices or not isinstance(kind, type) else kind), "choices": choices}
            told["metavar"] = option.metavar or (None if choices else (option.flag or name).replace("-", "_").upper())
            if many and option.parse is None:
                told["nargs"] = "*" if option.positional and default is not MISSING else "+"
            elif option.positional and default is not MISSING:
                told["nargs"] = "?"
        if option.positional:
            self.add_argument(told.pop("dest"), **told)
            return
        self.add_argument(names[0], required=default is MISSING and not partial, **told)
        for older in names[1:]:
            self.add_argument(older, **{**told, "help": argparse.SUPPRESS})


def given(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a settings dataclass that were given, by name; not of nested settings."""
    values = {f.name: vars(args).get(f"{kind.__name__}.{f.name}", MISSING) for f in fields(kind)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not MISSING}


def filled(kind: type[S], args: argparse.Namespace, base: S | None = None, **more: Any) -> S:
    """Settings of what was given, on those of `base` (default: the dataclass's own defaults); nested ones too.

    Args:
        more: further fields, below what was given.
    """
    values = {**more, **given(kind, args)}
    for field, _, _ in _options(kind):
        start = _default(field) if base is None else getattr(base, field.name)
        if field.name not in values and is_dataclass(start):
            values[field.name] = filled(type(start), args, start)
    return kind(**values) if base is None else replace(base, **values)  # type: ignore[type-var]


def _options(kind: type) -> Iterator[tuple[Field[Any], Any, Option | None]]:
    """Fields, their types, and how they are flags: the last `Option` stands."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        notes = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Option)]
        yield field, getattr(hint, "__origin__", hint) if notes else hint, notes[-1] if notes else None


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _kind(hint: Any) -> tuple[bool, Any]:
    """Whether there are several, and the type of one."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(one for one in get_args(hint) if one is not NoneType)
    return (True, get_args(hint)[0]) if get_origin(hint) is tuple else (False, hint)


def _parser_of(parse: Any) -> Any:
    def read(text: str) -> Any:
        try:
            return parse(text)
        except RestuningError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _help(text: str, default: Any) -> str:
    if default is MISSING or not (default or type(default) in (int, float)) or default is True or "(default" in text:
        return text.replace("%", "%%")
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default {shown})".strip().replace("%", "%%")
