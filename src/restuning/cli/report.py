"""`restuning report`."""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import say, table
from restuning.errors import RestuningError
from restuning.paper.report import write
from restuning.paper.report.page import lines
from restuning.paper.results import read
from restuning.utils.files import check_output
from restuning.utils.options import Json, Option

EXAMPLE = "restuning report runs/tab4 --out report && restuning report runs/a runs/b"

RESULT = "result.json"


@dataclass(frozen=True)
class Report:
    """What is reported, and where."""

    results: Annotated[
        tuple[Path, ...],
        Option("a results.jsonl, or a folder that has one; or folders of runs, which are compared", positional=True),
    ]
    out: Annotated[Path | None, Option("folder for report.html and report.md (default: print the scores)")] = None
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Report)


def run(args: argparse.Namespace) -> None:
    own = filled(Report, args)
    if len(own.results) > 1 or os.path.exists(own.results[0] / RESULT):
        _compare(own)
        return
    (results,) = own.results
    if own.out is not None:
        found = write(results, own.out)
        say(own.json, found, f"{', '.join(found)}: {own.out / 'report.html'}, report.md beside it")
        return
    rows = lines(read(results))
    if not rows:
        raise RestuningError(f"no results in {results}: expected a results.jsonl, or a folder that has one")
    if own.json:
        print(json.dumps(rows))
    else:
        table(["experiment", "row", "column", "score"], [list(row) for row in rows])


def _compare(own: Report) -> None:
    """Runs of `restuning train`, side by side."""
    from restuning.app.report import PAGE, compare

    if own.out is not None:
        check_output(own.out / PAGE, "--out")
    rows = compare(own.results, own.out)
    if own.json:
        print(json.dumps(rows))
        return
    columns = ("run", "method", "backbone", "data", "score", "lr", "epochs", "seed", "parameters", "seconds")
    table(list(columns), [[_text(row[name]) for name in columns] for row in rows])
    if own.out is not None:
        print(own.out / PAGE)


def _text(value: object) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) and value > 1 else str(value)
