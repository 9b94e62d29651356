"""`restuning share`."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.errors import RestuningError
from restuning.runs.share import Share, share
from restuning.training.config import TrainConfig
from restuning.utils.options import Json, Option, Quiet

EXAMPLE = (
    "restuning share --bank banks/photos banks/maps --epochs 20 --lr 0.003 --label-smoothing 0.1 "
    "--out shared.safetensors"
)


@dataclass(frozen=True)
class ShareCommand:
    """What is not the shared weights' own."""

    out: Annotated[Path, Option("the file, which `train` and `sweep` take as --shared", metavar="FILE")]
    quiet: Quiet = False
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(ShareCommand)
    parser.settings(Share, without=("training",))
    parser.settings(
        TrainConfig, only=("epochs", "lr", "batch_size", "weight_decay", "warmup_epochs", "label_smoothing", "seed")
    )


def run(args: argparse.Namespace) -> None:
    own = filled(ShareCommand, args)
    if own.out.is_dir():
        raise RestuningError(f"cannot write to {own.out}: it is a folder")
    settings = filled(Share, args)
    found = share(settings, own.out, not (own.quiet or own.json))
    if own.json:
        print(json.dumps(found))
    else:
        print(f"{found['parameters']:,} numbers shared by {found['tasks']} tasks, {found['items']:,} items: {own.out}")
