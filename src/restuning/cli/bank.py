"""`restuning bank`."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import say
from restuning.runs.banks import BankSettings, build_bank
from restuning.utils.options import Json, Option, Quiet

EXAMPLE = (
    "restuning bank --data folder:photos --dtype float16 --out banks/photos && "
    "restuning train --bank banks/photos --method bypass --out runs/photos"
)


@dataclass(frozen=True)
class BankCommand:
    """What is not the bank's own."""

    out: Annotated[Path, Option("folder for the shards and their manifest")]
    resume: Annotated[bool, Option("continue the bank in --out, to the same bytes")] = False
    quiet: Quiet = False
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(BankCommand)
    parser.settings(BankSettings)


def run(args: argparse.Namespace) -> None:
    own, settings = filled(BankCommand, args), filled(BankSettings, args)
    quiet = own.quiet or own.json
    say_bytes = (lambda each, items: None) if quiet else _say_bytes
    manifest = build_bank(settings, own.out, resume=own.resume, progress=not quiet, say=say_bytes)
    shards = manifest["shards"]
    rows, size = (sum(shard[k] for shard in shards) for k in ("rows", "bytes"))
    found = {"rows": rows, "bytes": size, "shards": len(shards), "layers": manifest["layers"]}
    say(own.json, found, f"{rows} rows in {len(shards)} shards, {size / 2**20:.1f} MiB, in {own.out}")


def _say_bytes(each: int, items: int) -> None:
    print(f"{each:,} bytes an item, {each * items / 2**20:,.1f} MiB for {items:,}", file=sys.stderr)
