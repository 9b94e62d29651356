"""Pages of runs that need nothing beside them: one run, several side by side, answers to pictures."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from restuning.app.features import small_jpeg
from restuning.app.look import mistakes, places
from restuning.app.views import ASSETS, colour, confusion_of, rendered, uri
from restuning.data import Items
from restuning.data.decode import SUFFIXES
from restuning.data.folder import Files
from restuning.data.objective import confusion
from restuning.errors import DataError, RestuningError
from restuning.runs.settings import RESULT
from restuning.training.calibrate import calibrate, reliability
from restuning.utils.files import as_json, atomic_write
from restuning.utils.reading import read_json

PAGE, NUMBERS = "report.html", "report.json"
MOST = 48
"""Mistakes that a page shows."""


def report_run(
    out: Path,
    title: str,
    items: Items,
    classes: Sequence[str],
    logits: Tensor,
    labels: Tensor,
    embedded: Tensor,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Write report.html (metrics, worst pairs and confusion, calibration, mistakes, a map) and report.json in `out`.

    Args:
        out: the folder; it is made if it is not there.
        title: what was measured on what.
        items: n, of which the mistakes are shown.
        classes: their names.
        logits: (n, classes).
        labels: (n,).
        embedded: (n, d), what the head reads.
        metrics: by name.

    Returns:
        what report.json holds.

    Raises:
        RestuningError: `out` cannot be written.
    """
    p, found = logits.float().softmax(-1), calibrate(logits, labels)
    wrong = mistakes(p, labels)
    cards = []
    for i in wrong[:MOST]:
        best = int(p[i].argmax())
        card = {"name": Path(items.names[i]).name, "label": classes[int(labels[i])], "taken": classes[best]}
        cards.append({**card, "sure": f"{100 * float(p[i, best]):.0f}", **_shown(items, i)})
    numbers = {
        "title": title,
        "items": len(labels),
        "metrics": dict(metrics),
        "calibration": {"temperature": found.temperature, "before": found.before, "after": found.after},
        "mistakes": len(wrong),
    }
    dots = []
    for i, (x, y) in enumerate(places(embedded.flatten(1)).tolist() if len(labels) > 1 else ()):
        text = f"{Path(items.names[i]).name}: {classes[int(labels[i])]}"
        fill = colour(int(labels[i]))
        dots.append({"x": round(20 + 960 * x, 1), "y": round(20 + 960 * y, 1), "fill": fill, "title": text})
    bins = [(f"{100 * b / 15:.0f} to {100 * (b + 1) / 15:.0f}", n, f"{100 * a:.1f}", f"{100 * s:.1f}")
            for b, n, a, s in reliability(p, labels)]  # fmt: skip
    table = confusion_of(confusion(logits, labels).tolist(), classes, live=False)
    page = rendered("run", css=_css(), numbers=numbers, cards=cards, dots=dots, bins=bins, confusion=table)
    _write(out, page, numbers)
    return numbers


def compare(runs: Sequence[Path], out: Path | None = None) -> list[dict[str, Any]]:
    """Runs of `restuning train`, the best first: one row each, of its result.json; with `out`, a page too.

    Args:
        runs: their folders.
        out: a folder for report.html and report.json; None: nothing is written.

    Raises:
        DataError: a folder without a result.
    """
    rows = []
    for run in runs:
        if not (run / RESULT).exists():
            raise DataError(f"{run} has no {RESULT}: expected the folder of a run, or of a reproduction")
        found = read_json(run / RESULT)
        try:
            settings = found["settings"]
            method = settings["method"]
            metric = found.get("metric", "score")
            row = {
                "run": str(run),
                "method": method if isinstance(method, str) else method.get("kind", "own"),
                "data": settings["data"],
                "backbone": settings["backbone"],
                "metric": metric,
                "score": found.get(f"test_{metric}", found.get("test_score")),
                "lr": found["lr"],
                "epochs": settings["training"]["epochs"],
                "seed": settings["training"]["seed"],
                "parameters": sum((found.get("parameters") or {}).get(k, 0) for k in ("tuners", "head")),
                "seconds": found.get("seconds"),
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{run / RESULT} is damaged: expected what `restuning train` writes") from error
        rows.append(row)
    rows.sort(key=lambda row: -float("inf") if row["score"] is None else -row["score"])
    if out is not None:
        _write(out, rendered("runs", css=_css(), rows=rows), rows)
    return rows


def report_answers(file: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of `restuning predict` as one page; returns the rows.

    Args:
        file: an .html file.
        rows: of `restuning.runs.predict.predict`, an input being a text or the path of an image.
    """
    found, cards = list(rows), dict[str, dict[str, Any]]()
    for row in found:
        name = str(row["input"])
        if name not in cards:
            image = os.path.isfile(name) and Path(name).suffix.lower() in SUFFIXES
            cards[name] = {"name": name, "answers": [], **(_shown(Files([Path(name)], [0]), 0) if image else {})}
        cards[name]["answers"].append((Path(row["adapter"]).name, _lines(row)))
    try:
        atomic_write(file, rendered("answered", css=_css(), cards=list(cards.values())).encode())
    except OSError as error:
        raise RestuningError(f"cannot write {file}: {error.strerror or error}") from error
    return found


def _lines(row: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    if "values" in row:
        return [(f"{name} {value:.4f}", None) for name, value in row["values"].items()]
    if "words" in row:
        return [(" ".join(f"{word['word']}/{word['class']}" for word in row["words"]), None)]
    return [(f"{c['class']} {100 * c['probability']:.1f} %", 100 * c["probability"]) for c in row["top"]]


def _shown(items: Items, i: int) -> dict[str, str]:
    """A picture's thumbnail, or a text."""
    item = items.item(i)
    if hasattr(item, "getbands"):
        return {"uri": uri(small_jpeg(item))}
    return {"text": " | ".join(map(str, item))[:400]}


def _css() -> str:
    return (ASSETS / "page.css").read_text(encoding="utf-8")


def _write(out: Path, page: str, numbers: Any) -> None:
    try:
        atomic_write(out / PAGE, page.encode())
        atomic_write(out / NUMBERS, as_json(numbers))
    except OSError as error:
        raise RestuningError(f"cannot write to {out}: {error.strerror or error}") from error
