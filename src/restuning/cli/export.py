"""`restuning export`."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import say
from restuning.runs.export import SUFFIXES, export
from restuning.utils.options import Json, Option

EXAMPLE = "restuning export runs/photos --format onnx --out exported/photos"


@dataclass(frozen=True)
class Export:
    """What is written, and where."""

    adapter: Annotated[
        tuple[Path, ...],
        Option(
            "folders of saved adapters; several: a graph each, beside one of the backbone",
            metavar="ADAPTER",
            positional=True,
        ),
    ]
    out: Annotated[Path, Option("a folder that is not there yet")]
    format: Annotated[str, Option(choices=tuple(SUFFIXES))] = "onnx"
    weights: Annotated[str | None, Option("the backbone's weights, if not those of its run.json")] = None
    inputs: Annotated[
        str | None, Option("images or texts to compare on (default: what the run was tested on)", metavar="PATH")
    ] = None
    apart: Annotated[bool, Option("a graph of the backbone, and a small one of the adapter")] = False
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Export)


def run(args: argparse.Namespace) -> None:
    own = filled(Export, args)
    about = export(own.adapter, own.out, own.format, own.weights, own.inputs, own.apart)
    graphs = [about] if "file" in about else [about["features"], *about["tasks"].values()]
    worst = max(graph["checked"]["largest_difference"] for graph in graphs)
    files, on = ", ".join(str(own.out / graph["file"]) for graph in graphs), graphs[0]["checked"]
    say(own.json, about, f"{files}: differ from the model by {worst:.1e} at most, on {on['items']} of {on['on']}")
