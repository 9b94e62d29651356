"""The report on disk: report.html, which needs nothing beside it, and report.md with its pictures."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader  # torch needs it, so it is there

from restuning.errors import RestuningError
from restuning.paper.experiments import COSTS
from restuning.paper.report.plots import Picture, many_tasks, pictures
from restuning.paper.report.tables import Cell, Table, tables
from restuning.paper.results import Record, read
from restuning.utils.files import atomic_write


@dataclass(frozen=True)
class Part:
    """A section of the report: a table (kind, name and cells of each row), notes, and the command that makes it."""

    title: str
    figures: Sequence[Picture]
    columns: Sequence[str] = ()
    rows: Sequence[tuple[str, str, list[str]]] = ()
    notes: Sequence[str] = ()
    command: str = ""


def write(results: Path, out: Path) -> list[str]:
    """Returns the names of what is in it: experiments, and `multitask` where that benchmark's records are beside them.
    Raises RestuningError where there is nothing to show, or `out` cannot be written."""
    records, bench = read(results), (results if results.is_dir() else results.parent) / MULTITASK
    if not records and not bench.exists():
        raise RestuningError(f"no results in {results}: expected a results.jsonl, or a folder that has one")
    found = tables(records)
    parts = [
        Part(
            table.experiment.about,
            list(pictures(table)),
            [COSTS.get(c, c) for c in table.experiment.columns],
            _lines(table),
            _notes(table),
            table.experiment.shown_command,
        )
        for table in found
    ]
    if bench.exists():
        parts.append(Part(_TASKS, [many_tasks(bench)]))
    try:
        for name, _, svg in (picture for part in parts for picture in part.figures):
            atomic_write(out / f"{name}.svg", svg)
        for name in ("report.html", "report.md"):
            atomic_write(out / name, _rendered(name, parts).encode())
    except OSError as error:
        raise RestuningError(f"cannot write to {out}: {error.strerror or error}") from error
    return [table.experiment.name for table in found] + ["multitask"] * bench.exists()


def _rendered(name: str, parts: Sequence[Part]) -> str:
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= {"base64": lambda data: base64.b64encode(data).decode(), "row": _row}
    bold = {"paper": "{}", "ours": "**{}**", "difference": "*{}*"}
    return jinja.get_template(f"{name}.jinja").render(title=_TITLE, about=_ABOUT, parts=parts, bold=bold)


MULTITASK = "multitask.jsonl"  # as `restuning bench multitask` writes it
_TASKS = "Time against tasks"
_TITLE = "Res-Tuning: ours beside the paper's"
_ABOUT = (
    "Scores are test metrics in percent at the last epoch, settings chosen on validation: mean ± standard deviation "
    "over seeds. Group is the mean of the groups' means, All the mean of the tasks. ✓ and ✗: within the accepted range "
    "of the paper's value, or not. A cell is empty where there is no result."
)


def _lines(table: Table) -> list[tuple[str, str, list[str]]]:
    """(class, name, cells): for each row ours and, where the paper has values, the paper's and the difference."""
    made = []
    for name, cells in table.lines:
        columns = table.experiment.columns
        papers = any(cell.paper is not None for cell in cells)
        if papers:
            made.append(("paper", f"{name}, paper", [_number(cell.paper) for cell in cells]))
        ours = [_ours(column, cell) for column, cell in zip(columns, cells, strict=True)]
        made.append(("ours", f"{name}, ours" if papers else name, ours))
        if papers and any(cell.difference is not None for cell in cells):
            made.append(("difference", "difference", [_difference(cell) for cell in cells]))
    return made


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"


def _ours(column: str, cell: Cell) -> str:
    if cell.ours is None:
        return ""
    if column in COSTS or cell.ours.count == 1:
        return _number(cell.ours.mean)
    return f"{cell.ours.mean:.2f} ± {cell.ours.spread:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _difference(cell: Cell) -> str:
    if cell.difference is None:
        return ""
    mark = "" if cell.fits is None else " ✓" if cell.fits else " ✗"
    return f"{cell.difference:+.2f}{mark}".replace("-", "−")


def _notes(table: Table) -> list[str]:
    """What belongs with the numbers: how, on what, what is missing."""
    e, records = table.experiment, table.records

    def of_all(key: str) -> str:
        values = dict.fromkeys(str(r[key]) for r in records if r.get(key) is not None)
        return ", ".join(values) or "unknown"

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(f"{v:g}" for r in records for v in r.get(key) or ()))

    wanted = {(row.name, task) for row in e.rows if row.method is not None for task in _columns(table)}
    there = {(r["row"], r["column"]) for r in records}
    hours = sum(r.get("seconds") or 0 for r in records) / 3600
    notes = [
        f"Backbone {of_all('backbone')}, {of_all('image_size').replace('unknown', 'its own')} pixels a side; rates "
        f"{all_of('lrs')}; epochs {all_of('epochs')}; seeds {', '.join(sorted({str(r['seed']) for r in records}))}; "
        f"pixels {of_all('pixels')}.",
        f"Commit {of_all('commit')}; {of_all('device')} ({of_all('machine')}); {hours:.1f} hours in all; "
        f"{len(there & wanted)} of {len(wanted)} cells are there.",
    ]
    diverged = sorted({f"{r['row']} on {r['column']}" for r in records if r["score"] is None})
    notes += [f"Diverged: {', '.join(diverged)}."] if diverged else []
    return notes + ([e.note[0].upper() + e.note[1:] + "."] if e.note else [])


def _columns(table: Table) -> list[str]:
    return [name for task in table.experiment.tasks for name in (task.name, *(task.targets or ()))]


def lines(records: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    """(experiment, row, column, score) for a terminal."""
    return [
        (table.experiment.name, row, column, _ours(column, cell))
        for table in tables(records)
        for row, cells in table.lines
        for column, cell in zip(table.experiment.columns, cells, strict=True)
        if cell.ours is not None and column not in COSTS
    ]
