"""Records of a benchmark as JSON lines, tables and pictures; no torch is needed to draw them again."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from restuning.errors import MissingExtra, RestuningError
from restuning.utils.files import atomic_write

Record = dict[str, Any]
"""what, name, values (unit → median), ratios ("unit / name" → min, median, max, wanted), settings; absent: why."""

PAPER = (19, 0.19)  # so many tasks, in parts of as many fully fine-tuned models (Res-Tuning, Figure 4)


def tables(records: Sequence[Record]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Tables, columns and rows of text: the values, the ratios with their spread, and what each operation keeps."""
    units = list(dict.fromkeys(unit for r in records for unit in r["values"]))
    yield (
        ["", *(unit.replace("_bytes", ", MiB").replace("_", " ") for unit in units)],
        [[r["name"], *(_text(u, r["values"].get(u)) for u in units)] for r in records if "absent" not in r],
    )
    yield (
        ["ratio", "of", "minimum", "median", "maximum", "wanted"],
        [
            [f"{r['name']} / {to}", unit.replace("_", " ")]
            + [f"{found[k]:.4g}" for k in ("min", "median", "max")]
            + [found.get("wanted", "").replace("<=", "≤").replace(">=", "≥")]
            for r in records
            for (unit, to), found in _ratios(r)
        ],
    )
    kept = [r for r in records if "operations" in r]
    if kept:
        largest = {op: max(r["operations"].get(op, 0) for r in kept) for r in kept for op in r["operations"]}
        total = max(sum(r["operations"].values()) for r in kept)
        yield (
            ["kept for backward, MiB", *(r["name"] for r in kept)],
            [
                [op, *(_text("_bytes", r["operations"].get(op)) for r in kept)]
                for op in sorted(largest, key=lambda op: -largest[op])
                if largest[op] > total / 1000
            ],
        )


def absent(records: Sequence[Record]) -> list[str]:
    """What could not be measured, and why, a line each."""
    return [f"{r['name']} is absent: {r['absent']}" for r in records if "absent" in r]


def write(records: Sequence[Record], out: Path) -> None:
    """WHAT.jsonl, WHAT.md and WHAT.png in `out`, each whole, in place of an earlier one.

    Raises RestuningError where `out` cannot be written to, MissingExtra without matplotlib.
    """
    plt, what, settings = pyplot(), records[0]["what"], records[0]["settings"]
    text = [f"# restuning bench {what}", "", ", ".join(f"{k} {_said(v)}" for k, v in settings.items()) + ".", ""]
    text += ["Values are medians over the rounds; ratios are taken round by round.", "", f"![{what}]({what}.png)", ""]
    for columns, rows in tables(records):
        text += [_row(columns), "|" + "---|" + "--:|" * (len(columns) - 1), *map(_row, rows), ""]
    text += [f"- {reason}" for reason in absent(records)]
    try:
        atomic_write(out / f"{what}.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
        atomic_write(out / f"{what}.md", ("\n".join(text).rstrip() + "\n").encode())
        figure = {"memory": _memory, "multitask": multitask}.get(what, _bars)(plt, records)
        figure.tight_layout()
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
        plt.close(figure)
        atomic_write(out / f"{what}.png", data.getvalue())
    except OSError as error:
        raise RestuningError(f"cannot write to {out}: {error.strerror or error}") from error


def pyplot() -> Any:
    """matplotlib's, which needs no screen. Raises MissingExtra."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "bench") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def matrix(counts: Sequence[Sequence[int]], classes: Sequence[str], file: Path) -> None:
    """A confusion matrix, rows (what it is) in percent, as a picture; numbers where there is room.

    Raises RestuningError where `file` cannot be written, MissingExtra without matplotlib.
    """
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise RestuningError(f"{file}: expected a .png, a .pdf or a .svg")
    plt, n = pyplot(), len(classes)
    shares = [[100 * c / max(sum(row), 1) for c in row] for row in counts]
    side = min(4 + 0.35 * n, 16)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shares, cmap="Greys", vmin=0, vmax=100)
    axis.set(xlabel="taken for", ylabel="is", title="confusion, percent of each row")
    if n <= 40:
        axis.set_xticks(range(n), classes, rotation=90)
        axis.set_yticks(range(n), classes)
    for i, j in ((i, j) for i in range(n) for j in range(n) if n <= 20 and counts[i][j]):
        axis.text(
            j, i, f"{shares[i][j]:.0f}", ha="center", va="center", color="white" if shares[i][j] > 50 else "black"
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file.suffix.lstrip("."), dpi=120)
    plt.close(figure)
    try:
        atomic_write(file, buffer.getvalue())
    except OSError as error:
        raise RestuningError(f"cannot write {file}: {error.strerror}") from error


def multitask(plt: Any, records: Sequence[Record]) -> Any:
    """Like the paper's Figure 4: time against the number of tasks, and the limit, one pass of the backbone."""
    figure, axis = plt.subplots(figsize=(8, 5.5))
    forward = next(r for r in records if r["name"] == "forward")["values"]["seconds"]
    for word, label, style in (("full", "fully fine-tuned models", "^-"), ("task", "tasks of one bypass", "o-")):
        line = [r["values"] for r in records if "tasks" in r["values"] and word in r["name"]]
        colour = "black" if word == "task" else "0.55"
        axis.plot([v["tasks"] for v in line], [v["seconds"] for v in line], style, color=colour, label=label)
    axis.axhline(forward, linestyle="--", color="black", label="the limit: one pass of the backbone")
    axis.scatter(
        PAPER[0], PAPER[0] * PAPER[1] * forward, marker="*", s=90, color="black", label="the paper's 0.19", zorder=3
    )
    axis.set(xscale="log", yscale="log", xlabel="tasks on every image", ylabel="seconds a batch", title=_title(records))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


LEGEND = "stars: Res-Tuning\nbars: the limit of what is exact\nand computes nothing twice"


def _memory(plt: Any, records: Sequence[Record]) -> Any:
    """Like the paper's Figure 4: memory against parameters, and the least that an exact method keeps."""
    figure, axes = plt.subplots(1, 2, figsize=(13.5, 5))
    kinds = ("saved_bytes", "saved for backward"), ("peak_bytes", "at the peak, above the loaded model")
    for axis, (unit, label) in zip(axes, kinds, strict=True):
        for i, record in enumerate(r for r in records if r["values"]):
            x, y = record["values"]["parameters"], max(record["values"][unit], 1) / 2**20
            ours = record["name"].startswith(("bypass", "res-tuning"))
            marks = {"marker": "*" if ours else "os^vDPX"[i % 7], "s": 130 if ours else 45}
            axis.scatter(x, y, color=plt.cm.tab20(i % 20), label=record["name"], **marks)
            if unit == "saved_bytes" and "limit_bytes" in record["values"]:
                least = record["values"]["limit_bytes"] / 2**20
                axis.scatter(x, least, color=plt.cm.tab20(i % 20), marker="_", s=400)
        axis.set(xscale="log", yscale="log", xlabel="trained parameters, head included", ylabel=f"MiB {label}")
        axis.grid(alpha=0.3)
    axes[-1].legend(
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        title=LEGEND,
    )
    figure.suptitle(_title(records))
    return figure


def _bars(plt: Any, records: Sequence[Record]) -> Any:
    """Every ratio, its spread and what is wanted of it."""
    found = [(f"{r['name']} / {to}", ratio) for r in records for (_, to), ratio in _ratios(r)]
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.32 * len(found)))
    for y, (_, ratio) in enumerate(found):
        axis.plot([ratio["min"], ratio["max"]], [y, y], color="0.55", linewidth=4)
        axis.plot(ratio["median"], y, "o", color="black")
        if "wanted" in ratio:
            axis.plot(float(ratio["wanted"].split()[1]), y, "|", color="tab:red", markersize=16)
    axis.set(xscale="log", xlabel="ratio: median, spread, and what is wanted (red)", title=_title(records))
    axis.set_yticks(range(len(found)), [name for name, _ in found], fontsize=8)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    return figure


def _ratios(record: Record) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for key, found in record["ratios"].items():
        unit, _, to = key.partition(" / ")
        yield (unit, to), found


def _title(records: Sequence[Record]) -> str:
    settings = records[0]["settings"]
    return f"{settings['backbone']}, {settings['image_size']} pixels, batch {settings['batch']}"


def _said(value: Any) -> str:
    return " ".join(value) if isinstance(value, list | tuple) else str(value)


def _text(unit: str, value: float | None) -> str:
    if value is None:
        return ""
    if unit.endswith("_bytes"):
        return f"{value / 2**20:,.2f}"
    return f"{value:,.0f}" if unit in ("parameters", "tasks", "largest_batch") else f"{value:.4g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
