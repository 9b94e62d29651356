"""Numbers of a table: ours over seeds, the paper's, how far apart they are."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from restuning.paper.experiments import COSTS, EXPERIMENTS, Experiment, Row
from restuning.paper.results import Record

MEANS = ("Group", "All")


@dataclass(frozen=True)
class Score:
    """Over seeds: mean, standard deviation, how many."""

    mean: float
    spread: float = 0.0
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Cell:
    """ours None: not there (yet); fits: whether it is in the accepted range, None where there is none."""

    ours: Score | None
    paper: float | None
    fits: bool | None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.paper is None else self.ours.mean - self.paper


@dataclass(frozen=True)
class Table:
    """lines: (row, cell of each column), for rows that the paper or we have values for; records: ours, as they are."""

    experiment: Experiment
    lines: list[tuple[str, list[Cell]]]
    records: list[Record]


def tables(records: Sequence[Record]) -> list[Table]:
    """One for each experiment that there are results of, in the order of the paper."""
    names = dict.fromkeys(str(r["experiment"]) for r in records)
    known = [e for name, e in EXPERIMENTS.items() if name in names]
    own = [_unknown(name, records) for name in names if name not in EXPERIMENTS]
    return [table(e, [r for r in records if r["experiment"] == e.name]) for e in (*known, *own)]


def table(experiment: Experiment, records: Sequence[Record]) -> Table:
    lines = []
    for row in experiment.rows:
        mine = [r for r in records if r["row"] == row.name]
        cells = [_cell(experiment, row, column, mine) for column in experiment.columns]
        if any(c.ours is not None or c.paper is not None for c in cells):
            lines.append((row.name, cells))
    return Table(experiment, lines, list(records))


def _cell(experiment: Experiment, row: Row, column: str, records: Sequence[Record]) -> Cell:
    if column in COSTS:
        ours = _cost(column, records)
    elif column in MEANS:
        ours = _mean(experiment, column, records)
    else:
        ours = _of(r["score"] for r in records if r["column"] == column)
    within = experiment.accepts(row, column)
    fits = None if ours is None or within is None else within[0] <= ours.mean <= within[1]
    return Cell(ours, row.paper.get(column), fits)


def _of(values: Iterable[float | None]) -> Score | None:
    found = [v for v in values if v is not None]
    return Score.of(found) if found else None


def _cost(column: str, records: Sequence[Record]) -> Score | None:
    if column == "parameters_M":
        values = [r["parameters"]["trainable"] / 1e6 for r in records if r.get("parameters")]
    elif column == "memory_GB":
        values = [r["peak_bytes"] / 1e9 for r in records if r.get("peak_bytes")]
    else:
        values = []
    return Score(statistics.fmean(values), 0.0, len(values)) if values else None


def _mean(experiment: Experiment, which: str, records: Sequence[Record]) -> Score | None:
    """For each seed that has all columns: the mean of the groups' means, or of all columns; where there are targets, of
    these alone."""
    groups: dict[str, list[str]] = {}
    elsewhere = [task for task in experiment.tasks if task.targets]
    for task in elsewhere or experiment.tasks:
        groups.setdefault(task.group, []).extend(task.targets or [task.name])
    columns = [name for group in groups.values() for name in group]
    at = {(r["column"], r["seed"]): r["score"] for r in records if r["score"] is not None}
    seeds = [s for s in dict.fromkeys(r["seed"] for r in records) if all((c, s) in at for c in columns)]
    parts = list(groups.values()) if which == "Group" else [columns]
    return _of(statistics.fmean(statistics.fmean(at[c, s] for c in part) for part in parts) for s in seeds)


def _unknown(name: str, records: Sequence[Record]) -> Experiment:
    """Results of an experiment that this version has no entry of."""
    mine = [r for r in records if r["experiment"] == name]
    columns = tuple(dict.fromkeys(str(r["column"]) for r in mine))
    rows = tuple(Row(row, None, {}) for row in dict.fromkeys(str(r["row"]) for r in mine))
    return Experiment(name, name, columns, rows)


def curves(found: Table) -> dict[str, dict[str, list[tuple[int, Score]]]]:
    """Few-shot results: group → row → (shots, score), where a column is named `…, SHOTS`."""
    made: dict[str, dict[str, list[tuple[int, Score]]]] = {}
    for task in found.experiment.tasks:
        name, _, shots = task.name.rpartition(", ")
        if name and shots.isdecimal():
            at = found.experiment.columns.index(task.name)
            for row, cells in found.lines:
                score = cells[at].ours
                if score is not None:
                    made.setdefault(name, {}).setdefault(row, []).append((int(shots), score))
    return {name: rows for name, rows in made.items() if any(len(line) > 1 for line in rows.values())}


def gates(found: Table) -> dict[tuple[str, str], list[Score]]:
    """(row, column) → λ of each layer, over seeds."""
    seen: dict[tuple[str, str], list[list[float]]] = {}
    for r in found.records:
        if r.get("gates"):
            seen.setdefault((r["row"], r["column"]), []).append(r["gates"])
    return {key: [Score.of(layer) for layer in zip(*runs, strict=True)] for key, runs in seen.items()}


def points(found: Table) -> list[tuple[str, float, float, float | None]]:
    """(row, score, parameters in millions, MiB that a batch keeps for backward) of each row: the score is All where
    there is one, else that of the first column."""
    columns = found.experiment.columns
    at = columns.index("All") if "All" in columns else 0
    made = []
    for row, cells in found.lines:
        mine = [r for r in found.records if r["row"] == row]
        parameters, kept = _cost("parameters_M", mine), [r["kept_bytes"] / 2**20 for r in mine if r.get("kept_bytes")]
        score = cells[at].ours
        if score is not None and parameters is not None:
            made.append((row, score.mean, parameters.mean, statistics.fmean(kept) if kept else None))
    return made
