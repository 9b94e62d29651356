"""`restuning predict`."""

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import Format, stream
from restuning.errors import RestuningError
from restuning.model.files import CONFIG
from restuning.runs.predict import predict_rows
from restuning.utils.files import check_output
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
    inputs: Annotated[
        tuple[str, ...],
        Option(
            "images, folders of images in depth, texts, .txt files of a text a line (pairs by a tab)",
            metavar="INPUT",
            positional=True,
        ),
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
    html: Annotated[Path | None, Option("a page of the answers, with the images", metavar="FILE")] = None
    format: Format = "text"
    json: Json = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RestuningError(f"--batch-size {self.batch_size}: expected at least 1")


def arguments(parser: Parser) -> None:
    parser.settings(Predict)


def run(args: argparse.Namespace) -> None:
    own = filled(Predict, args)
    form = "json" if own.json else own.format
    if own.html is not None:
        check_output(own.html, "--html", *(Path(word) for word in own.inputs if os.path.isdir(word)))
    if own.server is not None:
        rows: Iterator[dict[str, Any]] = iter(_ask(own, own.server))
    else:
        adapters, inputs = _parted(own)
        rows = predict_rows(
            adapters, inputs, own.top, own.weights, own.embeddings, own.device, own.batch_size, own.skip_bad
        )
    if own.html is not None:
        from restuning.app.report import report_answers

        rows = iter(report_answers(own.html, rows))
    if form == "json":
        print(json.dumps(list(rows)))
    elif form == "jsonl":
        stream(rows, form)
    elif form == "csv":
        stream((flat for row in rows for flat in _flat(row)), form)
    else:
        for row in list(rows):
            print(printable(f"{row['input']}  {row['adapter']}  {_text(row)}"))


def _parted(own: Predict) -> tuple[list[Path], list[str]]:
    """Adapters and inputs, which follow each other: folders that hold a saved adapter come first."""
    words = [*map(str, own.adapters), *own.inputs]
    adapters = list(itertools.takewhile(lambda word: "\0" not in word and (Path(word) / CONFIG).exists(), words))
    inputs = words[len(adapters) :]
    if not adapters and len(words) > 1:  # the error is that of the first one
        return [Path(words[0])], inputs[1:]
    if not adapters or not inputs:
        what = "input" if adapters else "adapter"
        raise RestuningError(f"no {what}: expected folders of saved adapters, then images, folders or texts")
    return list(map(Path, adapters)), inputs


def _text(row: dict[str, Any]) -> str:
    if "values" in row:
        return ", ".join(f"{name} {value:.4f}" for name, value in row["values"].items())
    if "words" in row:
        return " ".join(f"{word['word']}/{word['class']}" for word in row["words"])
    return ", ".join(f"{c['class']} {100 * c['probability']:.1f} %" for c in row["top"])


def _flat(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a table: one for each class, value or word of an answer."""
    about = {"input": row["input"], "adapter": row["adapter"]}
    for name, value in row.get("values", {}).items():
        yield {**about, "name": name, "value": value}
    for one in (*row.get("words", ()), *row.get("top", ())):
        yield {**about, **one}


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
        names = list((texts_of(own.inputs, False) if texts else load_images(*map(Path, own.inputs))).names)
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
