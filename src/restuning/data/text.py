"""`text:PATH`: sentences, pairs of sentences, or words, in a tsv, csv or jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

from restuning.data.table import LABELS, Table, labels_of, settings_of, tables_of
from restuning.data.task import Items, Source
from restuning.errors import DataError

SETTINGS = ("text", "pair", "label", "kind")
TEXTS = {
    "sentence1": "sentence2",
    "premise": "hypothesis",
    "question1": "question2",
    "question": "sentence",
    "sentence": None,
    "text": None,
    "tokens": None,
    "words": None,
}
"""Columns that hold a text, and the one that is its pair if it is there; the first that is there is meant."""


class Texts(Items):
    """Texts: one string, or two, or one list of words."""

    def __init__(self, texts: Sequence[tuple[Any, ...]], labels: Sequence[Any], names: Sequence[str]) -> None:
        self.texts, self.labels, self.names = texts, labels, names

    def item(self, i: int) -> tuple[Any, ...]:
        return self.texts[i]


def load_text(rest: str) -> Source:
    """`PATH[?text=COLUMN&pair=COLUMN&label=COLUMN&kind=KIND]`; see `tables_of` for PATH, `labels_of` for the kinds.

    Raises DataError, with the line, for what cannot be used.
    """
    path, settings = settings_of(rest, SETTINGS)
    return source_of(tables_of(path), settings)


def source_of(tables: Mapping[str, Table], settings: Mapping[str, str], classes: Sequence[str] | None = None) -> Source:
    """Tables by split as texts and labels. classes: the labels' names in order, if they are known."""
    train = tables["train"]
    text = train.column("text", settings.get("text"), TEXTS)
    pair = settings.get("pair")
    if pair is None and "text" not in settings and (usual := TEXTS[text]) in train.columns:
        pair = usual
    columns = (text,) if pair is None else (text, train.column("pair", pair, ()))
    label = train.column("label", settings.get("label"), LABELS)
    for table in tables.values():
        for column in (*columns, label):
            table.column("text", column, ())
    texts = {split: [_text(table, n, columns) for n in range(len(table.rows))] for split, table in tables.items()}
    split_words = isinstance(texts["train"][0][0], list)
    for split, rows in texts.items():
        for name, row in zip(tables[split].names, rows, strict=True):
            if isinstance(row[0], list) != split_words or any(isinstance(part, list) for part in row[1:]):
                raise DataError(f"{name}: {text!r} is not of the kind of the first row's: words or a text in every row")
    words = {split: [t[0] for t in rows] for split, rows in texts.items()} if split_words else None
    labels = labels_of(tables, label, settings.get("kind"), words, classes)
    if labels.kind == "per-token" and (words is None or len(columns) > 1):
        raise DataError(f"{train.where}: per-token labels need {text!r} as a list of words, and no pair")
    made = {s: Texts(rows, labels.splits[s], tables[s].names) for s, rows in texts.items()}
    return Source(labels.classes, made["train"], made.get("val"), made.get("test"), labels.kind)


def _text(table: Table, n: int, columns: Sequence[str]) -> tuple[Any, ...]:
    values = tuple(table.rows[n].get(column) for column in columns)
    for column, value in zip(columns, values, strict=True):
        words = value if isinstance(value, list) else [value]
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            empty = not words or all(word is None or isinstance(word, str) for word in words)
            raise DataError(
                f"{table.names[n]}: {column!r} is {'empty' if empty else repr(value)}: expected a text, or words"
            )
    return values
