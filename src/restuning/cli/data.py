"""`restuning data`."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import table
from restuning.data import check, load_source, load_task
from restuning.data.inspect import inspect
from restuning.errors import RestuningError
from restuning.utils.known import KNOWN, find
from restuning.utils.options import DATA, Json, Option, Shots, TestSize, TrainSize, ValSize

EXAMPLE = "restuning data tar:photos.tar; restuning data list; restuning data vtab/dtd ~/vtab-1k/dtd --check"


@dataclass(frozen=True)
class Data:
    """Which data, and what of them."""

    data: Annotated[
        tuple[str, ...], Option(f"{DATA}; or list; or NAME PATH, with --check", metavar="SPEC", positional=True)
    ]
    check: Annotated[
        bool, Option("decode every image of it; with a NAME of the list, compare with what is known of that")
    ] = False
    train_size: TrainSize = None
    val_size: ValSize = 0
    test_size: TestSize = None
    shots: Shots = None
    seed: Annotated[int, Option()] = 0
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Data)


def run(args: argparse.Namespace) -> None:
    own = filled(Data, args)
    if own.data == ("list",):
        _known(own)
        return
    if own.data[0] == "check":  # the older spelling
        own = replace(own, data=own.data[1:], check=True)
    if own.check and len(own.data) > 1:
        _inspect(own)
        return
    if len(own.data) != 1:
        raise RestuningError(f"data {' '.join(own.data)}: expected one SPEC, or list, or NAME PATH with --check")
    (spec,) = own.data
    sizes = {k: getattr(own, k) for k in ("train_size", "val_size", "test_size", "shots", "seed")}
    task = load_task(spec, **sizes)
    splits = {name: items for name, items in (("train", task.train), ("val", task.val), ("test", task.test)) if items}
    if own.check:
        for items in splits.values():
            check(items)
    counts = {name: _counts(task.kind, items.labels, len(task.classes)) for name, items in splits.items()}
    sizes = {name: len(items) for name, items in splits.items()}
    if own.json:
        found = {"data": spec, "kind": task.kind, "classes": list(task.classes), "examples": sizes}
        print(json.dumps({**found, "labels": counts, "checked": own.check}))
        return
    total = ", ".join(f"{name} {n}" for name, n in sizes.items())
    print(f"{spec}: {task.kind}, {len(task.classes)} classes; {total}{'; all readable' if own.check else ''}")
    about = "mean" if task.kind == "regression" else "class"
    table([about, *counts], [[c, *(f"{n[i]:g}" for n in counts.values())] for i, c in enumerate(task.classes)])


def _known(own: Data) -> None:
    if own.json:
        print(json.dumps([{**asdict(k), "spec": k.spec("PATH")} for k in KNOWN.values()]))
        return
    rows = [
        [
            k.name,
            k.about,
            f"{k.classes:,}",
            f"{k.train:,}" if k.train else "shots",
            f"{k.test:,}",
            k.spec("PATH"),
            k.note,
        ]
        for k in KNOWN.values()
    ]
    table(["name", "data set", "classes", "train", "test", "as --data", "from"], rows)


def _inspect(own: Data) -> None:
    if len(own.data) != 2:
        raise RestuningError(
            "data --check: expected a NAME (of `restuning data list`, or -) and a PATH (or, after -, a SPEC)"
        )
    name, path = own.data
    known = None if name == "-" else find(name)
    spec = path if known is None else known.spec(path)
    if known is not None and known.kind == "glue":
        raise RestuningError(f"{name} is texts from a hub: restuning data {spec} --check")
    found = inspect(load_source(spec), known)
    if own.json:
        print(json.dumps({"data": spec, **asdict(found)}))
    else:
        total = ", ".join(f"{split} {n} images of {found.seen[split]} classes" for split, n in found.counts.items())
        print(f"{spec}: {total}; {found.pixels} pixels")
        for note in (*found.wrong, *found.notes):
            print(f"- {note}")
    if found.wrong:
        more = f" (and {len(found.wrong) - 1} more)" if len(found.wrong) > 1 else ""
        raise RestuningError(f"{spec}: {found.wrong[0]}{more}")


def _counts(kind: str, labels: Sequence[Any], classes: int) -> list[float]:
    """How many items (or words) there are of each class; under regression, the targets' means."""
    if kind in ("multi-label", "regression"):
        sums = [sum(label[i] for label in labels) for i in range(classes)]
        return [s / len(labels) for s in sums] if kind == "regression" else sums
    flat = Counter(v for label in labels for v in (label if kind == "per-token" else [label]))
    return [flat[i] for i in range(classes)]
