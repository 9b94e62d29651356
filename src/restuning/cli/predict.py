"""`restuning predict`."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.errors import RestuningError
from restuning.runs.predict import predict
from restuning.utils.options import Device, Json, Option

EXAMPLE = "restuning predict runs/photos runs/sprites picture.jpg --top 3"


@dataclass(frozen=True)
class Predict:
    """What answers, and what is asked."""

    adapters: Annotated[tuple[Path, ...], Option("folders of saved adapters", metavar="ADAPTER", positional=True)]
    input: Annotated[
        str,
        Option("an image, a folder of images, a .txt of a text a line (pairs by a tab), or a text", positional=True),
    ]
    top: Annotated[int, Option("how many classes to print", metavar="K")] = 1
    embeddings: Annotated[
        Path | None, Option("write what every head reads, (items, d), as safetensors", metavar="FILE")
    ] = None
    weights: Annotated[str | None, Option("the backbone's weights, if not those of a run.json")] = None
    batch_size: Annotated[int, Option()] = 32
    device: Device = None
    json: Json = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RestuningError(f"--batch-size {self.batch_size}: expected at least 1")


def arguments(parser: Parser) -> None:
    parser.settings(Predict)


def run(args: argparse.Namespace) -> None:
    own = filled(Predict, args)
    rows = predict(own.adapters, own.input, own.top, own.weights, own.embeddings, own.device, own.batch_size)
    if own.json:
        print(json.dumps(rows))
        return
    for row in rows:
        if "values" in row:
            text = ", ".join(f"{name} {value:.4f}" for name, value in row["values"].items())
        elif "words" in row:
            text = " ".join(f"{word['word']}/{word['class']}" for word in row["words"])
        else:
            text = ", ".join(f"{c['class']} {100 * c['probability']:.1f} %" for c in row["top"])
        print(f"{row['input']}  {row['adapter']}  {text}")
