"""`restuning export`."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import say
from restuning.runs.export import FORMATS, export
from restuning.utils.options import Json, Option

EXAMPLE = "restuning export runs/photos --format onnx --out exported/photos"


@dataclass(frozen=True)
class Export:
    """What is written, and where."""

    adapter: Annotated[Path, Option("folder of a saved adapter", positional=True)]
    out: Annotated[Path, Option("a folder that is not there yet")]
    format: Annotated[str, Option(choices=tuple(FORMATS))] = "onnx"
    weights: Annotated[str | None, Option("the backbone's weights, if not those of its run.json")] = None
    inputs: Annotated[
        str | None, Option("images or texts to compare on (default: what the run was tested on)", metavar="PATH")
    ] = None
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Export)


def run(args: argparse.Namespace) -> None:
    own = filled(Export, args)
    about = export(own.adapter, own.out, own.format, own.weights, own.inputs)
    checked = about["checked"]
    text = f"differs from the model by {checked['largest_difference']:.1e} at most"
    say(own.json, about, f"{own.out / about['file']}: {text}, on {checked['items']} of {checked['on']}")
