"""What the page shows of a project, as HTML. Everything that a person named is escaped by jinja."""

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader  # torch needs it, so it is there

from restuning.app.answers import Answer
from restuning.app.inside import PASSES, Inside, Tuning
from restuning.app.look import MAPS, named, worst_pairs
from restuning.app.project import FEW, Item
from restuning.app.workbench import Workbench
from restuning.backbones.load import describe_backbone, reading_of
from restuning.data import Preprocess
from restuning.errors import DataError, RestuningError, line
from restuning.utils.hub import MINILM

TOLD = 60
"""Problems that are shown at once."""
PAGE = 24
"""Pictures of a gallery that are shown at once."""
CELLS = 1000
"""Cells of a larger one that are drawn at most, beside its diagonal."""
EXCERPT = 280
"""Characters of a text that a card shows."""
SMALL = 25
"""Classes up to which a confusion matrix has numbers."""
NOTHING = "Nothing is trained yet: give pictures, or texts, of two classes or more, then train."
ASSETS = Path(__file__).parent / "assets"
JINJA = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class View:
    """What a gallery shows. what: `all`, `unlabelled`, `class:NAME`, `mistakes`, `wrong`, `cell:I:J`, `alike:KEY` or
    `keys`; page: from 0; keys: those of `keys`; how: of the map above it."""

    what: str = "all"
    page: int = 0
    keys: tuple[str, ...] = ()
    how: str = "pca"


def rendered(template: str, **values: Any) -> str:
    """A template of this folder as HTML."""
    return JINJA.get_template(f"{template}.jinja").render(**values)


def uri(data: bytes, kind: str = "jpeg") -> str:
    """An image as an address that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def priced(backbone: str) -> str:
    """A backbone's name with what it costs: parameters, and pixels or tokens."""
    if backbone == MINILM:  # transformers takes seconds to import
        return f"{MINILM}: 22.7 M parameters, texts of up to 512 tokens"
    try:
        module = describe_backbone(backbone)
        how = reading_of(module)
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        read = f"{how.size[0]} pixels" if isinstance(how, Preprocess) else f"texts of up to {how.limit} tokens"
        return f"{backbone}: {millions:.1f} M parameters, {read}"
    except RestuningError:
        return backbone


def colour(i: int) -> str:
    """Of class i: neighbours differ most."""
    return f"hsl({round(i * 137.508) % 360} 65% {38 + 9 * (i % 3)}%)"


def predictions(bench: Workbench) -> dict[str, tuple[str, float, bool]]:
    """Key → (class that it is taken for, percent, whether that is another than its own and not confirmed)."""
    result = bench.result
    if result is None:
        return {}
    p, confirmed = bench.probabilities(), bench.confirmed()
    sure, best = p.max(-1)
    rows = zip(result.keys, best.tolist(), sure.tolist(), result.labels.tolist(), strict=True)
    return {key: (result.classes[b], 100 * s, b != y and i not in confirmed) for i, (key, b, s, y) in enumerate(rows)}


def listed(bench: Workbench, view: View) -> tuple[str, str, Sequence[str]]:
    """(title, what it means, keys) of what a gallery shows."""
    what, _, rest = view.what.partition(":")
    result = bench.result
    if what in ("mistakes", "wrong", "cell") and result is None:
        raise DataError(NOTHING)
    if what == "mistakes" and result is not None:
        keys = [result.keys[i] for i in bench.mistakes()]
        about = f"held-out {bench.project.kind} that are taken for another class, the most confident first"
        return "Mistakes", about, keys
    if what == "wrong" and result is not None:
        order, flagged = bench.wrong_labels()
        about = f"the likeliest wrong one first; confident learning doubts {flagged} of them"
        return "Labels that may be wrong", about, [result.keys[i] for i in order[: max(flagged, PAGE)]]
    if what == "cell" and result is not None:
        i, j = (int(n) for n in rest.split(":"))
        if max(i, j) >= len(result.classes):
            raise DataError("there is no such cell any more: the classes are others since")
        best, y = bench.probabilities().argmax(-1), result.labels
        keys = [key for key, b, t in zip(result.keys, best.tolist(), y.tolist(), strict=True) if (t, b) == (i, j)]
        return f"{result.classes[i]} taken for {result.classes[j]}", "", keys
    pictures = {p.key: p for p in bench.project.items()}
    if what == "alike":
        if rest not in bench.store.rows or rest not in pictures:
            raise DataError("it is gone, or was added since the features were computed: train again")
        return (
            "Most alike",
            f"by the backbone's features, to the {bench.project.kind[:-1]} that comes first",
            bench.alike(rest),
        )
    if what == "keys":
        return "What was drawn around", "", [key for key in view.keys if key in pictures]
    if what == "unlabelled":
        return (
            "Without a class",
            f"pick {bench.project.kind} and label them",
            [k for k, p in pictures.items() if p.label is None],
        )
    if what == "class":
        return rest, "", [key for key, p in pictures.items() if p.label == rest]
    return f"All {bench.project.kind}", "", list(pictures)


def gallery(bench: Workbench, view: View) -> str:
    """A page of pictures with what can be done to them."""
    title, about, keys = listed(bench, view)
    pictures = {p.key: p for p in bench.project.items()}
    keys = [key for key in keys if key in pictures]
    pages = max(1, -(-len(keys) // PAGE))
    page = min(max(view.page, 0), pages - 1)
    taken = predictions(bench)
    cards = [_card(bench, pictures[key], taken) for key in keys[page * PAGE : (page + 1) * PAGE]]
    empty = {
        "mistakes": f"No mistakes: all held-out {bench.project.kind} are taken for what they are.",
        "all": f"No {bench.project.kind} yet: drop some above, or name a folder.",
    }.get(view.what, f"No {bench.project.kind}.")
    return rendered(
        "gallery", title=title, about=about, total=len(keys), cards=cards, classes=bench.project.classes(), page=page,
        pages=pages, empty=empty, kind=bench.project.kind,
    )  # fmt: skip


def shown(bench: Workbench, item: Item) -> dict[str, str]:
    """A picture's thumbnail as `uri`, or the beginning of a `text`; empty for what cannot be read."""
    try:
        if bench.project.kind == "pictures":
            return {"uri": uri(bench.store.thumbnail(item))}
        text = str(bench.store.content(item))
        return {"text": text[:EXCERPT] + "…" * (len(text) > EXCERPT)}
    except RestuningError as error:
        bench.store.bad[item.key] = str(error)
        return {}


def _card(bench: Workbench, picture: Item, taken: Mapping[str, tuple[str, float, bool]]) -> dict[str, Any]:
    best, sure, wrong = taken.get(picture.key, ("", 0.0, False))
    if wrong and best == picture.label:  # it was relabelled since
        wrong = False
    return {
        "key": picture.key,
        "name": picture.path.name,
        "label": picture.label,
        **shown(bench, picture),
        "taken": best,
        "sure": f"{sure:.0f}",
        "wrong": wrong,
    }


def checks(bench: Workbench) -> str:
    """Counts of the classes and what is wrong with the data."""
    pictures = bench.project.items()
    problems = bench.project.problems(bench.store.bad)
    return rendered(
        "checks",
        counts=sorted(bench.project.counts().items()),
        unlabelled=sum(p.label is None for p in pictures),
        total=len(pictures),
        problems=[(text, shown(bench, about[0]) if about else {}) for text, about in problems[:TOLD]],
        more=max(0, len(problems) - TOLD),
        kind=bench.project.kind,
    )


def scores(bench: Workbench) -> str:
    """The methods side by side."""
    result, refused = bench.result, bench.engine.refused.items()
    if result is None:
        return rendered("scores", rows=[], refused=refused, few=FEW)
    recipes, c = bench.engine.recipes, bench.calibration()
    rows = [
        {"name": name, "about": recipes[name].about, "mean": f"{h.mean:.1f}", "text": f"{h.mean:.1f} ± {h.spread:.1f}",
         "used": name == bench.method}
        for name, h in result.held.items() if name in recipes
    ]  # fmt: skip
    calibration = {"temperature": f"{c.temperature:.2f}", "before": f"{c.before:.3f}", "after": f"{c.after:.3f}"}
    return rendered(
        "scores", rows=rows, folds=max(len(h.scores) for h in result.held.values()), pictures=len(result.keys),
        classes=len(result.classes), fresh=bench.fresh(), calibration=calibration, method=bench.method, refused=refused,
        few=FEW, recipes=len(recipes), kind=bench.project.kind,
    )  # fmt: skip


def progress(text: str, share: float | None = None, losses: Sequence[float] = ()) -> str:
    """What goes on, with a bar and the loss so far."""
    return rendered("progress", text=text, share=None if share is None else round(share), curve=_curve(losses))


def inside(run: Inside, tuning: Tuning, cost: float | None, epochs: int) -> str:
    """What tuning inside the backbone costs, or how far it is."""
    kind, done, line = run.bench.project.kind, len(tuning.losses), ""
    if tuning.state == "running":
        left = "" if tuning.left is None else f", {_time(tuning.left)} left"
        text = f"Tuning inside the backbone: {done} of {tuning.epochs} epochs{left}" if done else "It starts …"
    elif tuning.state == "stopped":
        then = (
            "it goes on from there if nothing has changed"
            if epochs == tuning.epochs
            else f"Start begins again, with {epochs} epochs"
        )
        text = f"Stopped after {done} of {tuning.epochs} epochs; {then}."
    elif tuning.state == "failed":
        text = f"Failed: {tuning.last}"
    elif tuning.state == "finished":
        text = f"res-tuning inside: {tuning.score:.1f} % on {tuning.tested} {kind} that it was not trained on."
        line = f"restuning serve {shlex.quote(f'inside={run.out}')} --port 8000"
    else:
        text = "res-tuning inside: what it costs is known once features are computed."
        if cost is not None:
            text = (
                f"res-tuning inside: {epochs} epochs of about {PASSES} passes each: some {_time(cost)} on this machine."
            )
    share = round(100 * done / tuning.epochs) if tuning.epochs and tuning.state in ("running", "stopped") else None
    return rendered("inside", text=text, share=share, curve=_curve(tuning.losses), line=line)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _curve(losses: Sequence[float]) -> str:
    """Points of a polyline, 300 wide and 60 high."""
    if len(losses) < 2:
        return ""
    losses = losses[:: -(-len(losses) // 300)]
    top = max(losses) or 1.0
    return " ".join(f"{300 * i / max(len(losses) - 1, 1):.1f},{58 - 56 * x / top:.1f}" for i, x in enumerate(losses))


def confusion(bench: Workbench) -> str:
    """The worst pairs by name, and the matrix: with numbers where there are few classes."""
    result = bench.result
    if result is None:
        return ""
    return confusion_of(bench.confusion().tolist(), result.classes)


def confusion_of(matrix: Sequence[Sequence[int]], names: Sequence[str], live: bool = True) -> str:
    """The same of any matrix.

    Args:
        matrix: rows what an item is, columns what it was taken for.
        names: of the classes.
        live: whether its cells open their pictures.
    """
    import torch

    small = len(names) <= SMALL
    pairs = [(named(names, p), p.truth, p.taken) for p in worst_pairs(torch.tensor(matrix), 10 if small else 20)]
    shares = [[100 * n / max(sum(row), 1) for n in row] for row in matrix]
    rows = [
        (names[i], [(n, round(shares[i][j]), f"cell:{i}:{j}" if i != j else "") for j, n in enumerate(row)])
        for i, row in enumerate(matrix)
    ]
    full = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n] if not small else []
    full = sorted(full, key=lambda cell: (cell[1] != cell[2], -cell[0]))[: len(names) + CELLS]
    cells = [
        (i, j, round(0.15 + 0.0085 * shares[i][j], 3), f"{n} of {names[i]} taken for {names[j]}") for n, i, j in full
    ]
    return rendered(
        "confusion", live=live, pairs=pairs, small=small, names=list(names), rows=rows, cells=cells, most=CELLS
    )


def the_map(bench: Workbench, how: str = "pca") -> str:
    """A map of the embeddings."""
    result = bench.result
    if result is None:
        return progress(NOTHING)
    at, p = (20 + 960 * bench.map(how)).round(decimals=1).tolist(), bench.probabilities()
    sure, best = ((100 * p.max(-1).values).round() / 100).tolist(), p.argmax(-1).tolist()
    confirmed, dots, texts = bench.confirmed(), [], bench.project.kind == "texts"
    items = {item.key: item for item in bench.project.items(labelled=True)}
    for i, (key, y) in enumerate(zip(result.keys, result.labels.tolist(), strict=True)):
        if key not in items:
            continue
        wrong = best[i] != y and i not in confirmed
        name = shown(bench, items[key]).get("text", "")[:80] if texts else items[key].path.name
        title = f"{name}: {result.classes[y]}" + f", taken for {result.classes[best[i]]}" * wrong
        dots.append([*at[i], key, y, int(wrong), sure[i], title])
    colours = [colour(i) for i in range(len(result.classes))]
    legend = list(zip(result.classes, colours, strict=True)) if len(colours) <= SMALL else []
    return rendered(
        "map", dots=json.dumps(dots), colours=json.dumps(colours), count=len(dots), legend=legend, maps=MAPS.items(),
        used=how, kind=bench.project.kind,
    )  # fmt: skip


def answers(found: Sequence[Answer], empty: str = "Every trained task answers at once.") -> str:
    """What the tasks say of a picture."""
    return rendered("answers", answers=found, empty=empty)


def summary(bench: Workbench) -> str:
    """One line on the project."""
    pictures = bench.project.items()
    without, result = sum(p.label is None for p in pictures), bench.result
    text = f"{len(pictures)} {bench.project.kind} in {len(bench.project.classes())} classes"
    text += f", {without} without a class" * bool(without)
    if result is not None:
        held = result.held[bench.method]
        text += f" · {bench.method} {held.mean:.1f} ± {held.spread:.1f} % held out"
    return rendered("progress", text=text, share=None, curve="")


REFUSED = (RestuningError, OSError)
"""What a person is told in a line: what was asked wrongly, and what the disk does not do."""


def refusal(error: Exception) -> str:
    """One line that says what was wrong."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else line(error)
    return rendered("progress", text=f"Refused: {text}", share=None, curve="")
