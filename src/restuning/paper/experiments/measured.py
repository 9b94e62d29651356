"""Experiments of our own: their records as JSON lines, Markdown and a picture; what is done is not done again."""

import json
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from restuning.backbones.load import load_backbone
from restuning.errors import RestuningError
from restuning.model.tuned import adapt
from restuning.paper.experiments.ours import OWN
from restuning.paper.results import Record, where
from restuning.runs.run import execute
from restuning.runs.settings import RESULT, RUN, Run
from restuning.utils.files import as_json, atomic_write, locked
from restuning.utils.plain import from_plain
from restuning.utils.profiling import saved_bytes

DONE = "done.json"


@dataclass(frozen=True)
class Place:
    """Where data are, and where what is made goes."""

    data: str
    out: Path


class Own(Protocol):
    """An experiment; its fields are its settings."""

    def run(self, place: Place) -> Iterator[Record]:
        """A record after the other, those of an earlier call first read from `place.out`."""

    def text(self, records: Sequence[Record]) -> str:
        """Markdown of the records that there are, without the line on what made them."""


@runtime_checkable
class Pictured(Protocol):
    """An experiment that has a picture."""

    def picture(self, place: Place, records: Sequence[Record], file: Path) -> None:
        """Draw `file`."""


def find_own(name: str, settings: Sequence[str] = ()) -> Own:
    """The experiment of that name. settings: `key=value`, in place of its own. Raises RestuningError for one that it
    does not have, or of another type."""
    module, kind, _ = OWN[name]
    found = getattr(import_module(f"restuning.paper.experiments.ours.{module}"), kind)
    if wrong := [s for s in settings if "=" not in s]:
        raise RestuningError(f"--set {wrong[0]}: expected KEY=VALUE, of {', '.join(f.name for f in fields(found))}")
    made: Own = from_plain(found, dict(s.split("=", 1) for s in settings), f"--set of {name}", strict=False)
    return made


def measure(name: str, experiment: Own, place: Place) -> list[Record]:
    """Run it; NAME.jsonl and NAME.md in `place.out` after every record, NAME.png at the end. Returns the records."""
    records: list[Record] = []
    with locked(place.out):
        for record in experiment.run(place):
            records.append(record)
            write(name, experiment, place.out, records)
        if isinstance(experiment, Pictured):
            experiment.picture(place, records, place.out / f"{name}.png")
            write(name, experiment, place.out, records, pictured=True)
    return records


def write(name: str, experiment: Own, out: Path, records: Sequence[Record], pictured: bool = False) -> None:
    """Both files, whole. Raises RestuningError where they cannot be written."""
    commits = ", ".join(dict.fromkeys(str(r["commit"]) for r in records if "commit" in r))
    given = " ".join(shlex.quote(f"{k}={v}") for k, v in _given(experiment).items())
    command = f"restuning reproduce {name} --data-root DATA --out runs/{name}{f' --set {given}' if given else ''}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    made = f"Command: `{command}`; commit {commits}; torch {torch.__version__}; {device}. Every figure: `{name}.jsonl`."
    text = [experiment.text(records).strip(), *([f"![{name}]({name}.png)"] if pictured else []), made]
    try:
        atomic_write(out / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
        atomic_write(out / f"{name}.md", ("\n\n".join(text) + "\n").encode())
    except OSError as error:
        raise RestuningError(f"cannot write to {out}: {error.strerror or error}") from error


def _given(experiment: Any) -> dict[str, Any]:
    """Its settings that are not the defaults."""
    return {f.name: value for f in fields(experiment) if (value := getattr(experiment, f.name)) != f.default}


def once(file: Path, make: Callable[[], Mapping[str, Any]]) -> Record:
    """What a file holds; made, with what computed it, where it is not there."""
    if not file.exists():
        atomic_write(file, as_json({**make(), **where()}))
    record: Record = json.loads(file.read_text(encoding="utf-8"))
    return record


def trained(run: Run, out: Path, kept: Callable[[], int] | None = None) -> Record:
    """The result of a run in `out`, done once. kept: the bytes that its backward pass keeps, counted then."""

    def make() -> Record:
        finished = out / RESULT
        done = json.loads(finished.read_text()) if finished.exists() else None
        result = done or execute(run, out, resume=(out / RUN).exists())
        seconds = statistics.median(epoch["seconds"] for epoch in result.pop("epochs"))
        return {**result, "epoch_seconds": seconds, **({"saved_bytes": kept()} if kept else {})}

    return once(out / DONE, make)


def kept_of_images(backbone: str, method: str, side: int, batch: int) -> int:
    """Bytes that autograd keeps of one batch of images, parameters left out; 10 classes."""
    tuned = adapt(load_backbone(backbone, "random", side), method, 10).train()
    x, labels = torch.randn(batch, 3, side, side), torch.arange(batch) % 10
    return saved_bytes(lambda: tuned(x, labels=labels)["loss"], tuned.parameters())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, numbers to the right."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def mean(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, of several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def ratio(found: Mapping[str, float], digits: int = 3) -> str:
    """The median of ratios, and how far they go."""
    low, middle, high = (f"{found[k]:.{digits}f}" for k in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def mib(size: float) -> str:
    return f"{size / 2**20:.2f}"
