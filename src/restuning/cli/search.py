"""`restuning search`."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled, given
from restuning.cli.output import say
from restuning.runs.search import METHOD, SearchSettings, search
from restuning.runs.settings import Run
from restuning.training.config import TrainConfig
from restuning.utils.options import Json, Option, Quiet

EXAMPLE = (
    "restuning search --data folder:photos --out runs/search && "
    "restuning train --data folder:photos --method runs/search/method.json --out runs/found"
)
_OF_RUN = (
    "data",
    "backbone",
    "weights",
    "image_size",
    "tokenizer",
    "max_length",
    "train_size",
    "val_size",
    "test_size",
)


@dataclass(frozen=True)
class SearchCommand:
    """What is not the search's own."""

    out: Annotated[Path, Option("folder for method.json and search.json")]
    resume: Annotated[bool, Option("continue the search in --out")] = False
    quiet: Quiet = False
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(SearchCommand)
    parser.settings(SearchSettings)
    parser.settings(Run, only=_OF_RUN)
    parser.settings(TrainConfig, only=("lr", "epochs", "batch_size", "seed"))


def run(args: argparse.Namespace) -> None:
    own, training = filled(SearchCommand, args), given(TrainConfig, args)
    rate = {"lrs": (training.pop("lr"),)} if "lr" in training else {}
    settings = {"val_size": 200, **given(Run, args), **rate, "method": "noah", "training": TrainConfig(**training)}
    progress = not (own.quiet or own.json)
    found = search(Run(**settings), own.out, filled(SearchSettings, args), resume=own.resume, progress=progress)
    score = f"validation score {found['validation_score']:.2f} with {found['parameters']:,} parameters"
    say(own.json, found, f"{score}; restuning train --method {own.out / METHOD} trains it")
