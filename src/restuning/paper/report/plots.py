"""Pictures of a table, told apart by marks and dashes, so that they read in black and white."""

import io
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from restuning.errors import RestuningError
from restuning.paper.report.tables import Table, curves, gates, points
from restuning.utils.figures import multitask, pyplot

MARKS, DASHES = "os^vDPX*<>", ("-", "--", "-.", ":")
GREYS = ("0.0", "0.4", "0.65")

Picture = tuple[str, str, bytes]
"""Name, caption, SVG."""


def pictures(found: Table) -> Iterator[Picture]:
    """(name, caption, SVG) of each that there are numbers for."""
    plt = pyplot()
    name = found.experiment.name
    if len(points(found)) > 1:
        yield (
            f"{name}-costs",
            "Score against trained parameters and what a batch of 32 keeps for its backward pass (log)",
            _svg(plt, _costs(plt, found)),
        )
    if curves(found):
        yield f"{name}-shots", "Score by shots; bars: standard deviation over seeds", _svg(plt, _curves(plt, found))
    if gates(found):
        caption = (
            "λ of each layer, block 1 at the bottom: mean and standard deviation over seeds; dashed: the paper's ½"
        )
        yield f"{name}-lambda", caption, _svg(plt, _forest(plt, found))


def many_tasks(file: Path) -> Picture:
    """The same, of what `restuning bench multitask` wrote. Raises RestuningError for a file of something else."""
    plt = pyplot()
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        figure = multitask(plt, records)
    except (ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        raise RestuningError(f"{file} is damaged, or not of restuning bench multitask") from error
    return "multitask", "Time against the number of tasks on one pass of the backbone, medians (log)", _svg(plt, figure)


def _costs(plt: Any, found: Table) -> Any:
    rows = points(found)
    columns = 2 if sum(row[3] is not None for row in rows) > 1 else 1
    figure, axes = plt.subplots(1, columns, figsize=(12, 5), squeeze=False, layout="constrained")
    for axis, (which, label) in zip(
        axes[0], ((2, "trained parameters, M"), (3, "kept for backward, MiB")), strict=False
    ):
        for (row, score, *costs), mark, grey in zip(rows, cycle(MARKS), cycle(GREYS), strict=False):
            value = costs[which - 2]
            if value:
                face = "white" if grey != "0.0" else "black"
                axis.scatter(value, score, marker=mark, s=52, facecolor=face, edgecolor=grey, label=row)
        axis.set(xscale="log", xlabel=label, ylabel="score")
        axis.grid(alpha=0.25)
    _legend(figure)
    return figure


def _curves(plt: Any, found: Table) -> Any:
    groups = curves(found)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(1 + 4.2 * len(groups), 4), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, (group, rows) in zip(axes[0], groups.items(), strict=True):
        for (row, line), mark, dash, grey in zip(rows.items(), cycle(MARKS), cycle(DASHES), cycle(GREYS), strict=False):
            shots, scores = zip(*line, strict=True)
            means, spreads = [s.mean for s in scores], [s.spread for s in scores]
            axis.errorbar(shots, means, spreads, marker=mark, linestyle=dash, color=grey, label=row, capsize=2)
        axis.set(title=group, xscale="log", xlabel="shots a class", ylabel="score")
        axis.set_xticks(sorted({s for line in rows.values() for s, _ in line}))
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0][-1].legend(fontsize=8)
    return figure


def _forest(plt: Any, found: Table) -> Any:
    """A panel for each column, a mark for each row."""
    seen = gates(found)
    columns = list(dict.fromkeys(column for _, column in seen))
    rows = list(dict.fromkeys(row for row, _ in seen))
    wide = min(len(columns), 6)
    deep = -(-len(columns) // wide)
    figure, axes = plt.subplots(
        deep, wide, figsize=(2 + 2.2 * wide, 3.6 * deep), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, column in zip(axes.flat, columns, strict=False):
        axis.axvline(0.5, linestyle="--", color="0.6", linewidth=0.8)
        for i, (row, mark) in enumerate(zip(rows, cycle(MARKS), strict=False)):
            layers = seen.get((row, column))
            if layers:
                apart = min(0.16, 0.8 / len(rows))
                heights = [layer + 1 + apart * (i - (len(rows) - 1) / 2) for layer in range(len(layers))]
                means, spreads = [s.mean for s in layers], [s.spread for s in layers]
                grey = GREYS[i % len(GREYS)]
                axis.errorbar(
                    means, heights, xerr=spreads, fmt=mark, color=grey, markersize=4, label=row, linewidth=0.8
                )
        axis.set(title=column, xlim=(0, 1))
        axis.grid(alpha=0.2)
    figure.supxlabel("λ: how much of the block's output is taken")
    axes[0][0].set_ylabel("block")
    _legend(figure)
    return figure


def _legend(figure: Any) -> None:
    """One for all panels, each row once."""
    told = {text: mark for axis in figure.axes for mark, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(told.values()), list(told), loc="outside right upper", fontsize=8)


def _svg(plt: Any, figure: Any) -> bytes:
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "restuning"}):  # the same results give the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
