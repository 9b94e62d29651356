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
from restuning.runs.bank_plan import plan_bank
from restuning.runs.banks import BankSettings, build_bank
from restuning.utils.distributed import is_main_process
from restuning.utils.options import Engine, Json, Option, Quiet, Workers

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
            "OTHER's items to DIR, in place; plan: what one of --items would take (default: build one)",
            positional=True,
            metavar="ACTION",
        ),
    ] = ()
    out: Annotated[Path | None, Option("folder for the shards and their manifest")] = None
    resume: Annotated[bool, Option("continue the bank in --out, to the same bytes")] = False
    engine: Engine = "local"
    workers: Workers = None
    items: Annotated[tuple[int, ...], Option("plan: of how many images")] = (1_281_167, 100_000_000)
    rate: Annotated[float, Option("plan: images a second of one device, assumed")] = 1000.0
    price: Annotated[float, Option("plan: dollars an hour of it, assumed")] = 2.5
    quiet: Quiet = False
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(BankCommand)
    parser.settings(BankSettings, partial=True)


def run(args: argparse.Namespace) -> None:
    own = filled(BankCommand, args)
    if own.action == ("plan",):
        _plan(own, given(BankSettings, args))
        return
    if own.action:
        _act(own.action[0], own.action[1:], own)
        return
    if own.out is None or "data" not in given(BankSettings, args):
        raise RestuningError(
            f"--{'out' if own.out is None else 'data'} is missing: a bank is built of data, in a folder"
        )
    settings = filled(BankSettings, args)
    quiet = own.quiet or own.json
    manifest = build_bank(
        settings,
        own.out,
        resume=own.resume,
        progress=not quiet,
        say=None if quiet else _say_cost,
        engine=own.engine,
        workers=own.workers,
    )
    if not is_main_process():
        return
    shards = manifest["shards"]
    rows, size = (sum(shard[k] for shard in shards) for k in ("rows", "bytes"))
    found = {"rows": rows, "bytes": size, "shards": len(shards), "layers": manifest["layers"]}
    say(own.json, found, f"{rows} rows in {len(shards)} shards, {size / 2**20:.1f} MiB, in {own.out}")


def _plan(own: BankCommand, settings: dict[str, Any]) -> None:
    backbone = settings.get("backbone", "vit_base_patch16_224")
    rows = plan_bank(backbone, own.items, own.rate, own.price)
    if own.json:
        print(json.dumps(rows))
        return
    table(
        ["images", "tokens", "bytes an item", "GB", "hours", "dollars", "files", "GB of names"],
        [
            [
                f"{row['items']:,}",
                row["tokens"],
                f"{row['bytes_an_item']:,}",
                f"{row['bytes'] / 1e9:,.1f}",
                f"{row['hours']:,.1f}",
                f"{row['dollars']:,.2f}",
                f"{row['shards']:,}",
                f"{row['bytes_of_names'] / 1e9:.2f}",
            ]
            for row in rows
        ],
    )


def _act(action: str, folders: tuple[str, ...], own: BankCommand) -> None:
    wanted = {"info": len(folders) == 1, "append": len(folders) == 2, "merge": len(folders) > 1}
    if action not in wanted:
        raise RestuningError(f"bank {action}: expected {', '.join(wanted)}, plan, or no word to build a bank")
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


def _say_cost(each: int, items: int, seconds: float) -> None:
    long = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds:,.0f} seconds"
    print(f"{each:,} bytes an item, {each * items / 2**20:,.1f} MiB for {items:,}, about {long}", file=sys.stderr)
