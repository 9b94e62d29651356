"""What the page shows of a project, as HTML. Everything that a person named is escaped by jinja."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader  # torch needs it, so it is there

from restuning.app.answers import Answer
from restuning.app.look import MAPS, named, worst_pairs
from restuning.app.project import FEW, Picture
from restuning.app.workbench import Workbench
from restuning.backbones.load import describe_backbone, reading_of
from restuning.data import Preprocess
from restuning.errors import DataError, RestuningError

PAGE = 24
"""Pictures of a gallery that are shown at once."""
SMALL = 25
"""Classes up to which a confusion matrix has numbers."""
ASSETS = Path(__file__).parent / "assets"
JINJA = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class View:
    """What a gallery shows. what: `all`, `unlabelled`, `class:NAME`, `mistakes`, `wrong`, `cell:I:J`, `alike:KEY` or
    `keys`; page: from 0; keys: those of `keys`."""

    what: str = "all"
    page: int = 0
    keys: tuple[str, ...] = ()


def rendered(template: str, **values: Any) -> str:
    """A template of this folder as HTML."""
    return JINJA.get_template(f"{template}.jinja").render(**values)


def uri(data: bytes, kind: str = "jpeg") -> str:
    """An image as an address that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def priced(backbone: str) -> str:
    """A backbone's name with what it costs: parameters and pixels."""
    try:
        module = describe_backbone(backbone)
        how = reading_of(module)
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        return (
            f"{backbone}: {millions:.1f} M parameters, {how.size[0]} pixels"
            if isinstance(how, Preprocess)
            else backbone
        )
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
        return "Nothing is trained yet", "", []
    if what == "mistakes" and result is not None:
        keys = [result.keys[i] for i in bench.mistakes()]
        return "Mistakes", "held-out pictures that are taken for another class, the most confident first", keys
    if what == "wrong" and result is not None:
        order, flagged = bench.wrong_labels()
        about = f"the likeliest wrong one first; confident learning doubts {flagged} of them"
        return "Labels that may be wrong", about, [result.keys[i] for i in order[: max(flagged, PAGE)]]
    if what == "cell" and result is not None:
        i, j = (int(n) for n in rest.split(":"))
        best, y = bench.probabilities().argmax(-1), result.labels
        keys = [key for key, b, t in zip(result.keys, best.tolist(), y.tolist(), strict=True) if (t, b) == (i, j)]
        return f"{result.classes[i]} taken for {result.classes[j]}", "", keys
    pictures = {p.key: p for p in bench.project.pictures()}
    if what == "alike":
        return "Most alike", "by the backbone's features; the first is the picture itself", bench.alike(rest)
    if what == "keys":
        return "What was drawn around", "", [key for key in view.keys if key in pictures]
    if what == "unlabelled":
        return "Without a class", "pick pictures and label them", [k for k, p in pictures.items() if p.label is None]
    if what == "class":
        return rest, "", [key for key, p in pictures.items() if p.label == rest]
    return "All pictures", "", list(pictures)


def gallery(bench: Workbench, view: View) -> str:
    """A page of pictures with what can be done to them."""
    title, about, keys = listed(bench, view)
    pictures = {p.key: p for p in bench.project.pictures()}
    keys = [key for key in keys if key in pictures]
    pages = max(1, -(-len(keys) // PAGE))
    page = min(max(view.page, 0), pages - 1)
    taken = predictions(bench)
    cards = [_card(bench, pictures[key], taken) for key in keys[page * PAGE : (page + 1) * PAGE]]
    empty = (
        "No mistakes: every held-out picture is taken for what it is." if view.what == "mistakes" else "No pictures."
    )
    return rendered(
        "gallery", title=title, about=about, total=len(keys), cards=cards, classes=bench.project.classes(), page=page,
        pages=pages, empty=empty,
    )  # fmt: skip


def thumbnail(bench: Workbench, picture: Picture) -> str:
    """Its address; empty for a picture that cannot be read."""
    try:
        return uri(bench.store.thumbnail(picture))
    except DataError as error:
        bench.store.bad[picture.key] = str(error)
        return ""


def _card(bench: Workbench, picture: Picture, taken: Mapping[str, tuple[str, float, bool]]) -> dict[str, Any]:
    best, sure, wrong = taken.get(picture.key, ("", 0.0, False))
    if wrong and best == picture.label:  # it was relabelled since
        wrong = False
    return {
        "key": picture.key,
        "name": picture.path.name,
        "label": picture.label,
        "uri": thumbnail(bench, picture),
        "taken": best,
        "sure": f"{sure:.0f}",
        "wrong": wrong,
    }


def checks(bench: Workbench) -> str:
    """Counts of the classes and what is wrong with the data."""
    pictures = bench.project.pictures()
    problems = bench.project.problems(bench.store.bad)
    return rendered(
        "checks",
        counts=sorted(bench.project.counts().items()),
        unlabelled=sum(p.label is None for p in pictures),
        total=len(pictures),
        problems=[(text, thumbnail(bench, about[0]) if about else "") for text, about in problems],
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
        few=FEW, recipes=len(recipes),
    )  # fmt: skip


def progress(text: str, share: float | None = None, losses: Sequence[float] = ()) -> str:
    """What goes on, with a bar and the loss so far."""
    curve, top = "", max(losses, default=1.0) or 1.0
    if len(losses) > 1:
        curve = " ".join(f"{300 * i / (len(losses) - 1):.1f},{58 - 56 * x / top:.1f}" for i, x in enumerate(losses))
    return rendered("progress", text=text, share=None if share is None else round(share), curve=curve)


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

    pairs = [(named(names, p), p.truth, p.taken) for p in worst_pairs(torch.tensor(matrix))]
    small = len(names) <= SMALL
    shares = [[100 * n / max(sum(row), 1) for n in row] for row in matrix]
    rows = [
        (names[i], [(n, round(shares[i][j]), f"cell:{i}:{j}" if i != j else "") for j, n in enumerate(row)])
        for i, row in enumerate(matrix)
    ]
    cells = [
        (i, j, round(0.15 + 0.0085 * shares[i][j], 3), f"{n} of {names[i]} taken for {names[j]}")
        for i, row in enumerate(matrix) for j, n in enumerate(row) if n
    ]  # fmt: skip
    return rendered("confusion", live=live, pairs=pairs, small=small, names=list(names), rows=rows, cells=cells)


def the_map(bench: Workbench, how: str = "pca") -> str:
    """A map of the embeddings."""
    result = bench.result
    if result is None:
        return rendered("progress", text="Nothing is trained yet.", share=None, curve="")
    at, p = bench.map(how), bench.probabilities()
    sure, best = p.max(-1)
    confirmed, dots = bench.confirmed(), []
    names = {picture.key: picture.path.name for picture in bench.project.pictures(labelled=True)}
    for i, (key, y) in enumerate(zip(result.keys, result.labels.tolist(), strict=True)):
        wrong = int(best[i]) != y and i not in confirmed
        x, h = at[i].tolist()
        taken = f", taken for {result.classes[int(best[i])]}" if wrong else ""
        dots.append(
            {"x": round(20 + 960 * x, 1), "y": round(20 + 960 * h, 1), "key": key, "by_class": colour(y),
             "error": "#c2283a" if wrong else "#b9c0cc", "sure": f"hsl(222 60% {90 - 55 * float(sure[i]):.0f}%)",
             "title": f"{names.get(key, '')}: {result.classes[y]}{taken}"}
        )  # fmt: skip
    legend = [(name, colour(i)) for i, name in enumerate(result.classes)] if len(result.classes) <= SMALL else []
    return rendered("map", dots=dots, legend=legend, maps=MAPS, used=how)


def answers(found: Sequence[Answer], empty: str = "Give a picture: every trained task answers at once.") -> str:
    """What the tasks say of a picture."""
    return rendered("answers", answers=found, empty=empty)


def summary(bench: Workbench) -> str:
    """One line on the project."""
    pictures = bench.project.pictures()
    without, result = sum(p.label is None for p in pictures), bench.result
    text = f"{len(pictures)} pictures in {len(bench.project.classes())} classes"
    text += f", {without} without a class" * bool(without)
    if result is not None:
        held = result.held[bench.method]
        text += f" · {bench.method} {held.mean:.1f} ± {held.spread:.1f} % held out"
    return rendered("progress", text=text, share=None, curve="")


def refusal(error: RestuningError) -> str:
    """One line that says what was wrong."""
    return rendered("progress", text=f"Refused: {error}", share=None, curve="")
