"""What commands print."""

import csv
import json
import sys
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from restuning.errors import MissingExtra
from restuning.utils.options import Option
from restuning.utils.reading import printable

Format = Annotated[
    Literal["text", "json", "jsonl", "csv"],
    Option("of what is printed: lines for people, JSON, or a JSON object or a row of csv as each is known"),
]


def stream(rows: Iterable[dict[str, Any]], form: str) -> None:
    """Rows as JSON lines or csv, each printed as it comes; the first one's keys are the columns."""
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if form == "jsonl":
            print(json.dumps(row), flush=True)
            continue
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


def say(as_json: bool, data: Any, text: str) -> None:
    """The result for machines, or for people."""
    print(json.dumps(data) if as_json else text)


def table(columns: list[str], rows: list[list[str]]) -> None:
    """A table of text. Raises MissingExtra without rich."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MissingExtra("rich", "train") from error
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numbers = all(row[i].replace(",", "").isdigit() for row in rows)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=numbers or i == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, map(printable, row)))  # no name is a control sequence, nor rich's markup
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)  # in a pipe, a row is a line
