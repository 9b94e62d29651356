"""Rows of a tsv, csv or jsonl file, columns by name; what their labels ask for; and `table:PATH`, images so listed."""

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from restuning.data.folder import Files
from restuning.data.objective import KINDS
from restuning.data.task import Source
from restuning.errors import DataError

SUFFIXES = (".tsv", ".csv", ".jsonl")
SPLITS = {"train": ("train",), "val": ("dev", "val", "valid", "validation"), "test": ("test",)}
LABELS = ("label", "labels", "class", "target", "score", "tags", "ner_tags")


@dataclass(frozen=True)
class Table:
    """Rows by column; `names` says where each of them comes from."""

    where: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    names: Sequence[str]

    def column(self, what: str, given: str | None, known: Iterable[str]) -> str:
        """The column that was given, or the first of the known ones. Raises DataError that lists those there are."""
        found = given or next((name for name in known if name in self.columns), None)
        has = f"it has {', '.join(self.columns)}"
        if found is None:
            raise DataError(
                f"{self.where}: no {what} column is known; {has}: name it, as in {self.where}?{what}=COLUMN"
            )
        if found not in self.columns:
            near = difflib.get_close_matches(found, self.columns, 1)
            raise DataError(
                f"{self.where}: no column {found!r}{f' (did you mean {near[0]!r}?)' if near else ''}; {has}"
            )
        return found


def settings_of(rest: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`PATH?name=value&…` → path, settings. Raises DataError for a setting that is not known."""
    path, _, query = rest.partition("?")
    pairs = (one.partition("=") for one in query.split("&") if one)
    settings = {name: unquote(value) for name, _, value in pairs}  # %26 is a & in a value; a + is a +
    strange = sorted(settings.keys() - set(known))
    if strange or (query and not settings):
        raise DataError(f"{rest}: unknown setting {strange[0] if strange else query}: expected {', '.join(known)}")
    if settings.get("kind", KINDS[0]) not in KINDS:
        raise DataError(f"{rest}: unknown kind {settings['kind']!r}: expected one of {', '.join(KINDS)}")
    return path, settings


def tables_of(path: str) -> dict[str, Table]:
    """A file as the training table, or a folder's `train.*`, `dev.*` (or `val*`) and `test*.*`, by split.

    Where a folder has no test file, its validation file is what is tested on, as GLUE is reported.
    Raises DataError for files that are not there, are two for one split, or cannot be read.
    """
    root = Path(path)
    if root.is_file():
        return {"train": read_table(root)}
    if not root.is_dir():
        raise DataError(
            f"no such file or folder: {root.absolute()} (expected {', '.join(SUFFIXES)}, or train, dev, test)"
        )
    found: dict[str, list[Path]] = {}
    for file in sorted(root.iterdir()):
        for split, stems in SPLITS.items():
            if file.suffix in SUFFIXES and re.fullmatch(rf"({'|'.join(stems)})([^a-z].*)?", file.stem):
                found.setdefault(split, []).append(file)
    if "train" not in found:
        raise DataError(f"{root.absolute()} has no training file: expected train{' or train'.join(SUFFIXES)}")
    for split, files in found.items():
        if len(files) > 1:
            raise DataError(f"{root.absolute()} has {len(files)} {split} files: {', '.join(f.name for f in files)}")
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return {split: read_table(files[0]) for split, files in found.items()}


def read_table(path: Path) -> Table:
    """Raises DataError, with the line, for what is not UTF-8, for broken JSON and for a row of another length."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {at}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    found = list(_json_lines(path, text) if path.suffix == ".jsonl" else _separated(path, text))
    if not found:
        raise DataError(f"{path} has no rows")
    columns = tuple(found[0][1])
    return Table(str(path), columns, [row for _, row in found], [f"{path}, line {n}" for n, _ in found])


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for n, one in enumerate(text.split("\n"), 1):
        if one.strip():
            try:
                row = json.loads(one)
            except ValueError as error:
                raise DataError(f"{path}, line {n}: no JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {n}: expected an object with columns")
            yield n, row


def _separated(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """A tsv's quotes are text, as in GLUE's files."""
    tabs = path.suffix == ".tsv"
    style: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    columns: list[str] = []
    try:
        for fields in reader:
            if not columns:
                columns = fields
            elif fields:
                if len(fields) != len(columns):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, expected {len(columns)} "
                        f"({', '.join(columns)})"
                    )
                yield reader.line_num, dict(zip(columns, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


@dataclass(frozen=True)
class Labels:
    """What a label column asks for: kind, classes, and the labels of each split."""

    kind: str
    classes: tuple[str, ...]
    splits: Mapping[str, list[Any]]


def labels_of(
    tables: Mapping[str, Table],
    column: str,
    kind: str | None = None,
    words: Mapping[str, Sequence[Sequence[str]]] | None = None,
    classes: Sequence[str] | None = None,
) -> Labels:
    """The labels of every split, encoded as `Items` has them.

    kind: None: per-token where there are `words`, multi-label for lists, regression for numbers with a point that are
    no text, single-label else. In a tsv or csv, several labels are separated by `|`. classes: theirs, in order; None:
    those of the training rows, sorted.
    Raises DataError for a label that is missing, unseen in training, or of another kind.
    """
    if kind is None:
        kind = _kind([row.get(column) for row in tables["train"].rows], words is not None)
    raw = {split: list(_raw(table, column, kind)) for split, table in tables.items()}
    if kind == "regression":
        wide = {len(v) for rows in raw.values() for v in rows}
        if len(wide) != 1:
            raise DataError(
                f"{tables['train'].where}: rows of {', '.join(map(str, sorted(wide)))} targets: expected one number"
            )
        count = wide.pop()
        return Labels(kind, (column,) if count == 1 else tuple(f"{column}_{i}" for i in range(count)), raw)
    listed_raw = {s: [v if isinstance(v, list) else [v] for v in rows] for s, rows in raw.items()}
    known = list(classes or sorted({v for row in listed_raw["train"] for v in row}, key=lambda v: (str(type(v)), v)))
    index = {v: i for i, v in enumerate(known)}
    if len(known) < 2 and kind != "multi-label":
        raise DataError(f"{tables['train'].where}: one label ({known[0]!r}) in column {column!r}: expected two or more")
    made: dict[str, list[Any]] = {}
    for split, rows in listed_raw.items():
        made[split] = []
        for n, row in enumerate(rows):
            strange = next((v for v in row if v not in index), None)
            if strange is not None:
                some = f"{', '.join(map(str, known[:5]))}{', …' if len(known) > 5 else ''}"
                raise DataError(f"{tables[split].names[n]}: label {strange!r} is never seen in training ({some})")
            if kind == "per-token" and words is not None and len(row) != len(words[split][n]):
                raise DataError(f"{tables[split].names[n]}: {len(row)} labels for {len(words[split][n])} words")
            ids = [index[v] for v in row]
            chosen = {"multi-label": lambda ids: [float(i in ids) for i in range(len(known))], "per-token": list}
            made[split].append(chosen[kind](ids) if kind in chosen else ids[0])
    return Labels(kind, tuple(map(str, known)), made)


def _kind(labels: Sequence[Any], words: bool) -> str:
    """What the labels of all training rows are, by their types; in a tsv or csv, numbers are written with a point."""
    if any(isinstance(label, list) for label in labels):
        return "per-token" if words else "multi-label"
    numbers = [label for label in labels if isinstance(label, int | float) and not isinstance(label, bool)]
    texts = [label for label in labels if isinstance(label, str)]
    pointed = any(isinstance(v, float) for v in numbers) or any("." in v for v in texts)
    written = not numbers and all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", v.strip()) for v in texts)
    whole = len(numbers) == len(labels) or (len(texts) == len(labels) and written)
    return "regression" if pointed and whole else "single-label"


def _raw(table: Table, column: str, kind: str) -> Iterator[Any]:
    """Labels as they stand: one, or a list."""
    for name, row in zip(table.names, table.rows, strict=True):
        value = row.get(column)
        if value is None or value == "":
            raise DataError(f"{name}: no {column!r}")
        if kind == "single-label":
            if not isinstance(value, str | int | float):
                raise DataError(f"{name}: {column!r} is a {type(value).__name__}: expected one label")
            yield value
            continue
        values: list[Any] = list(value) if isinstance(value, list | tuple) else str(value).split("|")
        if kind == "regression":
            try:
                values = [float(v) for v in values]
            except (TypeError, ValueError) as error:
                raise DataError(f"{name}: {column!r} is {value!r}: expected a number") from error
            if not all(map(math.isfinite, values)):
                raise DataError(f"{name}: {column!r} is {value!r}: expected a finite number")
        elif not all(isinstance(v, str | int | float) for v in values):
            raise DataError(f"{name}: {column!r} is {value!r}: expected a list of labels")
        yield values


def _beside(table: Table, column: str) -> list[Path]:
    for name, row in zip(table.names, table.rows, strict=True):
        if not isinstance(row.get(column), str) or not row[column]:
            raise DataError(f"{name}: {column!r} is {row.get(column)!r}: expected the name of a file")
    return [Path(table.where).parent / row[column] for row in table.rows]


def load_table(rest: str) -> Source:
    """`table:PATH[?image=COLUMN&label=COLUMN&kind=KIND]`: rows that name image files, beside the table."""
    path, settings = settings_of(rest, ("image", "label", "kind"))
    tables = tables_of(path)
    train = tables["train"]
    image = train.column("image", settings.get("image"), ("file_name", "image", "file", "path"))
    label = train.column("label", settings.get("label"), LABELS)
    for table in tables.values():
        table.column("image", image, ())
        table.column("label", label, ())
    labels = labels_of(tables, label, settings.get("kind"))
    if labels.kind == "per-token":
        raise DataError(f"{train.where}: images have no words for per-token labels")
    made = {split: Files(_beside(table, image), labels.splits[split]) for split, table in tables.items()}
    return Source(labels.classes, made["train"], made.get("val"), made.get("test"), labels.kind)
