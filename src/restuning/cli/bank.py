"""`restuning bank`."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from restuning.cli.arguments import Parser, filled, given
from restuning.cli.output import say, table
from restuning.errors import RestuningError
from restuning.features.bank import append, info, merge
from restuning.runs.banks import BankSettings, build_bank
from restuning.utils.options import Json, Option, Quiet

EXAMPLE = (
    "restuning bank --data folder:photos --dtype float16 --out banks/photos && "
    "restuning train --bank banks/photos --method bypass --out runs/photos"
)


@dataclass(frozen=True)
class BankCommand:
    """What is not the bank's own."""

    action: Annotated[
        tuple[str, ...],
        Option(
            "info DIR: what a bank holds; merge DIR DIR ...: a new one of their items, in --out; append DIR OTHER: "
            "OTHER's items to DIR, in place (default: build one)",
            positional=True,
            metavar="ACTION",
        ),
    ] = ()
    out: Annotated[Path | None, Option("folder for the shards and their manifest")] = None
    resume: Annotated[bool, Option("continue the bank in --out, to the same bytes")] = False
    quiet: Quiet = False
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(BankCommand)
    parser.settings(BankSettings, partial=True)


def run(args: argparse.Namespace) -> None:
    own = filled(BankCommand, args)
    if own.action:
        _act(own.action[0], own.action[1:], own)
        return
    if own.out is None or "data" not in given(BankSettings, args):
        raise RestuningError(
            f"--{'out' if own.out is None else 'data'} is missing: a bank is built of data, in a folder"
        )
    settings = filled(BankSettings, args)
    quiet = own.quiet or own.json
    say_bytes = (lambda each, items: None) if quiet else _say_bytes
    manifest = build_bank(settings, own.out, resume=own.resume, progress=not quiet, say=say_bytes)
    shards = manifest["shards"]
    rows, size = (sum(shard[k] for shard in shards) for k in ("rows", "bytes"))
    found = {"rows": rows, "bytes": size, "shards": len(shards), "layers": manifest["layers"]}
    say(own.json, found, f"{rows} rows in {len(shards)} shards, {size / 2**20:.1f} MiB, in {own.out}")


def _act(action: str, folders: tuple[str, ...], own: BankCommand) -> None:
    wanted = {"info": len(folders) == 1, "append": len(folders) == 2, "merge": len(folders) > 1}
    if action not in wanted:
        raise RestuningError(f"bank {action}: expected {', '.join(wanted)}, or no word to build a bank")
    if not wanted[action]:
        expected = {"info": "one folder", "append": "two folders", "merge": "two folders or more"}[action]
        raise RestuningError(f"bank {action}: expected {expected}")
    folder = Path(folders[0])
    if action == "merge":
        if own.out is None:
            raise RestuningError("--out is missing: expected a folder for the merged bank")
        folder = own.out
        merge(folders, folder)
    elif action == "append":
        append(folder, folders[1])
    found = info(folder)
    if own.json:
        print(json.dumps(found))
    else:
        table(["", ""], [[key.replace("_", " "), _shown(value)] for key, value in found.items()])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _say_bytes(each: int, items: int) -> None:
    print(f"{each:,} bytes an item, {each * items / 2**20:,.1f} MiB for {items:,}", file=sys.stderr)
