"""What commands print."""

import json
import sys
from typing import Any

from restuning.errors import MissingExtra


def say(as_json: bool, data: Any, text: str) -> None:
    """The result for machines, or for people."""
    print(json.dumps(data) if as_json else text)


def table(columns: list[str], rows: list[list[str]]) -> None:
    """A table of text. Raises MissingExtra without rich."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise MissingExtra("rich", "train") from error
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numbers = all(row[i].replace(",", "").isdigit() for row in rows)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=numbers or i == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)  # in a pipe, a row is a line
