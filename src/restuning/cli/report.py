"""`restuning report`."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import say, table
from restuning.errors import RestuningError
from restuning.paper.report import write
from restuning.paper.report.page import lines
from restuning.paper.results import read
from restuning.utils.options import Json, Option

EXAMPLE = "restuning report runs/tab4 --out report"


@dataclass(frozen=True)
class Report:
    """What is reported, and where."""

    results: Annotated[Path, Option("a results.jsonl, or a folder that has one", positional=True)]
    out: Annotated[Path | None, Option("folder for report.html and report.md (default: print the scores)")] = None
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Report)


def run(args: argparse.Namespace) -> None:
    own = filled(Report, args)
    if own.out is not None:
        found = write(own.results, own.out)
        say(own.json, found, f"{', '.join(found)}: {own.out / 'report.html'}, report.md beside it")
        return
    rows = lines(read(own.results))
    if not rows:
        raise RestuningError(f"no results in {own.results}: expected a results.jsonl, or a folder that has one")
    if own.json:
        print(json.dumps(rows))
    else:
        table(["experiment", "row", "column", "score"], [list(row) for row in rows])
