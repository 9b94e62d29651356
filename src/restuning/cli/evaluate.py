"""`restuning evaluate`."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import Format, stream, table
from restuning.data import check, load_task, prepared
from restuning.data.objective import confusion, objective
from restuning.data.task import some
from restuning.errors import RestuningError
from restuning.model.predictor import Predictor
from restuning.runs.load import load_tuned, transform_of
from restuning.runs.predict import device_of
from restuning.runs.settings import RUN, read_run
from restuning.training.evaluate import loader, predict_logits
from restuning.utils.files import check_output
from restuning.utils.options import DATA, Device, Json, Option, TestSize
from restuning.utils.reading import printable

EXAMPLE = "restuning evaluate runs/photos --data folder:photos"


@dataclass(frozen=True)
class Evaluate:
    """What is measured, and on what."""

    adapters: Annotated[tuple[Path, ...], Option("folders of saved adapters", metavar="ADAPTER", positional=True)]
    data: Annotated[str | None, Option(f"{DATA} (default: the data it was trained on)")] = None
    test_size: TestSize = None
    weights: Annotated[str | None, Option("the backbone's weights, if not those of its run.json")] = None
    batch_size: Annotated[int, Option()] = 32
    device: Device = None
    per_class: Annotated[bool, Option("the metrics of every class too")] = False
    confusion: Annotated[Path | None, Option("an image of what was taken for what", metavar="FILE")] = None
    report: Annotated[
        Path | None, Option("folder for report.html: metrics, mistakes, confusion, calibration, a map", metavar="DIR")
    ] = None
    format: Format = "text"
    json: Json = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RestuningError(f"--batch-size {self.batch_size}: expected at least 1")


def arguments(parser: Parser) -> None:
    parser.settings(Evaluate)


def run(args: argparse.Namespace) -> None:
    own = filled(Evaluate, args)
    form = "json" if own.json else own.format
    for flag, given in (("--confusion", own.confusion), ("--report", own.report)):
        if given is not None and len(own.adapters) > 1:
            raise RestuningError(f"{flag} is of one adapter: {len(own.adapters)} were given")
    if own.confusion is not None:
        check_output(own.confusion, "--confusion")
    if own.report is not None:
        check_output(own.report / "report.html", "--report")
    rows = (_measured(own, adapter) for adapter in own.adapters)
    if form == "json":
        found = list(rows)
        alone = {k: v for k, v in found[0].items() if k != "adapter"}
        print(json.dumps(alone if len(found) == 1 else found))
    elif form == "jsonl":
        stream(rows, form)
    elif form == "csv":
        stream((flat for row in rows for flat in _flat(row)), form)
    else:
        for row in rows:
            which = f"{row['adapter']}: " if len(own.adapters) > 1 else ""
            metrics = {k: v for k, v in row.items() if k not in _ABOUT}
            told = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            print(printable(f"{which}{row['examples']} examples: {told}"))
            if "per_class" in row:
                each = row["per_class"]
                table(
                    ["class", *each],
                    [[c, *(f"{v[i]:.4g}" for v in each.values())] for i, c in enumerate(row["classes"])],
                )


_ABOUT = ("adapter", "data", "examples", "classes", "per_class")


def _flat(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row of a table, or one for each class."""
    if "per_class" not in row:
        yield row
        return
    for i, name in enumerate(row["classes"]):
        yield {"adapter": row["adapter"], "data": row["data"], "class": name} | {
            metric: values[i] for metric, values in row["per_class"].items()
        }


def _measured(own: Evaluate, adapter: Path) -> dict[str, Any]:
    """One adapter's metrics."""
    device = device_of(own.device)
    tuned = load_tuned(adapter, own.weights)
    config = tuned.adapter_config()
    run = read_run(adapter / RUN) if (adapter / RUN).exists() else None
    if own.data is None and run is None:
        raise RestuningError(f"--data is missing, and {adapter} has no {RUN} that names it")
    metrics_of = objective(config.kind)
    if own.report is not None and config.kind != "single-label":
        raise RestuningError(f"--report: of single-label tasks, and this is a {config.kind} one")
    if own.confusion is not None and config.kind not in ("single-label", "per-token"):
        raise RestuningError(f"--confusion: a {config.kind} task has none")
    spec = own.data or (run.data if run else "")
    same = run is not None and spec == run.data
    test = (task := load_task(spec, test_size=run.test_size if run and same else own.test_size)).test
    if same and own.test_size is not None:
        test = some(spec, test, own.test_size)  # of those that it was not trained on
    if (tuple(task.classes), task.kind) != (tuple(config.classes or ()), config.kind):
        raise RestuningError(
            f"{spec} is {task.kind} of {len(task.classes)} classes ({', '.join(task.classes[:3])}, …), the adapter "
            f"{config.kind} of {len(config.classes or ())} ({', '.join((config.classes or ())[:3])}, …): "
            "expected the same"
        )
    check(test)
    reading = transform_of(adapter, config.preprocessing)
    predictor, examples = Predictor.of(tuned.to(device)), prepared(test, reading)
    logits, labels = predict_logits(predictor.as_module("default"), examples, own.batch_size)
    metrics = {name: round(value, 4) for name, value in metrics_of.metrics(logits, labels)}
    each = {}
    if own.per_class:
        each = {name: [round(v, 4) for v in t.tolist()] for name, t in metrics_of.each(logits, labels).items()}
    if own.confusion is not None:
        from restuning.utils.figures import matrix

        matrix(confusion(logits, labels).tolist(), task.classes, own.confusion)
    if own.report is not None:
        from restuning.app.report import report_run

        embedded = [predictor.embed(x, ["default"])["default"].cpu() for x, _ in loader(examples, own.batch_size)]
        title = f"{adapter} on {spec}"
        report_run(own.report, title, test, task.classes, logits.cpu(), labels.cpu(), torch.cat(embedded), metrics)
    found = {"adapter": str(adapter), "data": spec, "examples": len(test), **metrics}
    return {**found, "classes": list(task.classes), "per_class": each} if each else found
