"""What several commands share: flags, types of flags, tables."""

import argparse
import sys
from collections.abc import Callable

from restuning.errors import MissingExtra

Add = Callable[[str, Callable[[argparse.Namespace], int | None], str, str], argparse.ArgumentParser]
"""Name, function, what it is, example → the command's parser."""

DATA = (
    "folder:PATH, tar:PATH, table:PATH, text:PATH, glue:NAME, hf:NAME, digits, sprites:location, sprites:orientation, "
    "sprites:count, or a layout of the paper's sets, see `restuning data list`"
)
SHOTS = "items of each class to train on, in place of --train-size"
POOLS = ("cls", "mean", "cls+mean", "last", "map")
SIZES = {
    "train": "items to train on, those held out for validation among them (default all)",
    "val": "items held out of them for validation (default 0: the data's own, or a fifth where a rate is to be chosen)",
    "test": "items to test on (default all, or a fifth where there is no test split)",
}


def backbone_flags(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    parser.add_argument(
        "--backbone",
        help="restuning-micro (default, bundled), a timm model, hf:FOLDER, all-MiniLM-L6-v2, or resnet18-stages",
    )
    parser.add_argument("--tower", help="of a model with several, the one that is meant: vision_model, encoder, …")
    if weights:
        parser.add_argument(
            "--weights", help="file of pretrained weights, or 'random' (default: bundled, or from the hub)"
        )
        parser.add_argument("--image-size", type=int, help="pixels a side (default: the backbone's own)")


def size_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    for name, about in ((name, SIZES[name]) for name in names or SIZES):
        parser.add_argument(f"--{name}-size", type=int, metavar="N", help=about)


def text_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", help="a tokenizer's folder or hub id (default: the backbone's own)")
    parser.add_argument(
        "--max-length", type=int, help="tokens that texts are cut to (default: longer ones are refused)"
    )


def recipe_flags(parser: argparse.ArgumentParser, epochs: int, batch: int, warmup: str) -> None:
    """Of `TrainConfig`, but for the rate."""
    parser.add_argument("--epochs", type=int, help=f"(default {epochs})")
    parser.add_argument("--batch-size", type=int, help=f"(default {batch})")
    parser.add_argument("--weight-decay", type=float, help="never on scales, gates, biases, norms (default 0.05)")
    parser.add_argument("--warmup-epochs", type=float, help=f"(default {warmup})")
    parser.add_argument("--label-smoothing", type=float, help="share of a label that all classes have (default 0)")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], help="mixed precision (default no)")
    parser.add_argument("--accumulate", type=int, help="batches per step (default 1)")
    parser.add_argument("--clip", type=float, help="largest gradient norm (default none)")
    parser.add_argument("--seed", type=int, help="(default 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def blocks(text: str) -> tuple[int, ...]:
    try:
        found: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
        return tuple(found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected blocks such as 0-5 or 0,3,7") from error


def rates(text: str) -> tuple[float]:
    try:
        return (float(text),)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number") from error


def table(columns: list[str], rows: list[list[str]]) -> None:
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
