"""`restuning predict`."""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from restuning.cli.arguments import Parser, filled
from restuning.errors import RestuningError
from restuning.runs.predict import predict
from restuning.utils.options import Device, Json, Option
from restuning.utils.reading import printable

EXAMPLE = "restuning predict runs/photos runs/sprites picture.jpg --top 3"


@dataclass(frozen=True, kw_only=True)
class Predict:
    """What answers, and what is asked."""

    adapters: Annotated[
        tuple[Path, ...],
        Option("folders of saved adapters; with --server, names of its tasks", metavar="ADAPTER", positional=True),
    ] = ()
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
    skip_bad: Annotated[bool, Option("leave out images that cannot be decoded, and tell them")] = False
    device: Device = None
    server: Annotated[
        str | None, Option("ask a `restuning serve` there (its key: RESTUNING_API_KEY)", metavar="URL")
    ] = None
    json: Json = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RestuningError(f"--batch-size {self.batch_size}: expected at least 1")


def arguments(parser: Parser) -> None:
    parser.settings(Predict)


def run(args: argparse.Namespace) -> None:
    own = filled(Predict, args)
    if own.server is not None:
        rows = _ask(own, own.server)
    elif not own.adapters:
        raise RestuningError("no adapter: expected folders of saved adapters, then an input")
    else:
        rows = predict(
            own.adapters, own.input, own.top, own.weights, own.embeddings, own.device, own.batch_size, own.skip_bad
        )
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
        print(printable(f"{row['input']}  {row['adapter']}  {text}"))


def _ask(own: Predict, server: str) -> list[dict[str, Any]]:
    """The same rows, from a server."""
    from restuning.data import load_images
    from restuning.runs.predict import texts_of
    from restuning.serving import Client

    if own.weights or own.embeddings or own.device:
        raise RestuningError("--weights, --embeddings and --device are the server's matter: leave them out")
    rows: list[dict[str, Any]] = []
    with Client(server, os.environ.get("RESTUNING_API_KEY")) as client:
        texts = client.reads_texts()
        names = list((texts_of(own.input, False) if texts else load_images(Path(own.input))).names)
        pairs = [name.split("\t") for name in names]
        items: list[Any] = [pair if len(pair) > 1 else pair[0] for pair in pairs] if texts else names
        tasks = [str(name) for name in own.adapters] or None
        for i in range(0, len(names), own.batch_size):
            part = items[i : i + own.batch_size]
            images, own_texts = ((), part) if texts else (part, ())
            found = client.predict(images, own_texts, tasks, own.top)
            for name, answers in zip(names[i:], found, strict=False):
                rows += [{"input": name, "adapter": task, **answer} for task, answer in answers.items()]
    return rows
