"""`restuning bench`."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.app.settings import BENCHES as APP
from restuning.bench.bench import BENCHES, bench
from restuning.bench.settings import Bench
from restuning.cli.arguments import Parser, filled, given
from restuning.cli.output import table
from restuning.errors import RestuningError
from restuning.serving.bench import SERVING, bench_serving
from restuning.utils.figures import Record, absent, pyplot, tables, write
from restuning.utils.options import Json, Option

EXAMPLE = "restuning bench memory --weights random --out runs/bench"

WHAT = (*BENCHES, *SERVING, *APP)


@dataclass(frozen=True)
class BenchCommand:
    """Which benchmark, and where its records go."""

    what: Annotated[str, Option(f"one of {', '.join(WHAT)}", positional=True, choices=WHAT)]
    out: Annotated[Path | None, Option("folder for WHAT.jsonl, WHAT.md and WHAT.png (default: none)")] = None
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(BenchCommand)
    parser.settings(Bench)


def _run(what: str) -> Callable[..., list[Record]]:
    if what in APP:
        from restuning.app.bench import bench_app

        return bench_app
    return bench_serving if what in SERVING else bench


def run(args: argparse.Namespace) -> None:
    own = filled(BenchCommand, args)
    if own.out is not None:
        pyplot()  # a long run should not fail at its end
        if own.out.exists() and not own.out.is_dir():
            raise RestuningError(f"cannot write to {own.out}: it is no folder")
    records = _run(own.what)(own.what, **given(Bench, args))
    if own.out is not None:
        write(records, own.out)
    if own.json:
        print("\n".join(map(json.dumps, records)))
        return
    for columns, rows in tables(records):
        if rows:
            table(columns, rows)
    for reason in absent(records):
        print(reason)
