"""What is taken away of a trained project: the adapter's folder, a card, the lines that use it."""

import shlex
from pathlib import Path

from restuning.app.views import rendered
from restuning.app.workbench import Workbench
from restuning.data import Tokenise
from restuning.errors import DataError
from restuning.utils.files import atomic_write

CARD = "README.md"


def lines(bench: Workbench) -> list[tuple[str, str]]:
    """(title, commands) that serve the adapter, ask it, and train on the same pictures."""
    folder, name = bench.adapter, task_name(bench.project.name)
    data = f"folder:{bench.project.path}"
    serve = f"restuning serve {shlex.quote(f'{name}={folder}')} --port 8000"
    texts = bench.project.kind == "texts"
    item = "'a text to tell the class of'" if texts else "picture.jpg"
    field = f"text={item}" if texts else f"image=@{item}"
    curl = f"curl -F {field} -F tasks={name} -F top=3 http://127.0.0.1:8000/v1/predict"
    python = (
        "import restuning as rt\n\n"
        f"classifier = rt.Classifier.load({str(folder)!r})\n"
        f"print(classifier.predict([{item if texts else repr(item)}]))"
    )
    own = shlex.quote(str(folder))
    first = next((p.path for p in bench.project.items(labelled=True)), bench.project.path)
    some = shlex.quote(str(first if texts else first.parent))
    backbone = bench.project.backbone
    how = bench.engine.how
    cut = f" --max-length {how.max_length}" if isinstance(how, Tokenise) else ""
    inside = f"--method res-tuning --backbone {shlex.quote(backbone)}{cut} --out runs/inside"
    push = (
        "import restuning as rt\n\n"
        f"tuned = rt.Tuned.from_pretrained(rt.load_backbone({backbone!r}), {str(folder)!r})\n"
        "tuned.push_to_hub('owner/name')"
    )
    return [
        ("Serve it", serve),
        ("Ask the server", curl),
        ("In Python", python),
        ("On the command line", f"restuning predict {own} {item} --top 3"),
        ("One graph for onnxruntime", f"restuning export {own} --out exported --inputs {some}"),
        (
            f"Tune inside the backbone, on the same {bench.project.kind}",
            f"restuning train --data {shlex.quote(data)} {inside}",
        ),
        ("Push to the hub", push),
    ]


def finished(bench: Workbench) -> None:
    """The adapter and its card written, trained anew where labels, items or the method in use have changed since."""
    with bench.lock:
        about = bench.about()
        if bench.result is not None and (about is None or about.get("trained_on") != bench.signature()):
            bench.finish()
            write_card(bench)


def write_card(bench: Workbench) -> Path:
    """README.md in the adapter's folder, in the hub's format. Raises DataError where nothing was trained."""
    about, result = bench.about(), bench.result
    if about is None or result is None:
        raise DataError(f"project {bench.project.name} has no adapter yet: train first")
    rows = [
        f"| {name} | {mean:.1f} | {spread:.1f} | {folds} |" for name, (mean, spread, folds) in about["held_out"].items()
    ]
    counts, kind = bench.project.counts(), bench.project.kind
    tag = "text-classification" if kind == "texts" else "image-classification"
    before, after = about["calibration_error"]
    threshold, alarms = about["novelty"]
    text = f"""---
library_name: restuning
pipeline_tag: {tag}
tags: [restuning, parameter-efficient-fine-tuning, {tag}]
license: other
---

# {_plain(bench.project.name)}

A `{about["method"]}` adapter on the frozen backbone `{_plain(bench.project.backbone)}`, trained by `restuning app`.

## Data

{about["pictures"]} {kind} in {len(counts)} classes: {", ".join(f"{_plain(n)} ({c})" for n, c in counts.items())}.

## Numbers

Held-out accuracy in percent, mean and standard deviation over folds, each trained with a seed of its own; the adapter
itself was then trained on all {kind}.

| method | mean | standard deviation | folds |
|---|--:|--:|--:|
{chr(10).join(rows)}

Expected calibration error on held-out {kind}: {before:.3f} before, {after:.3f} after division by temperature
{about["temperature"]:.2f}, which is in the head's weights. {kind.capitalize()} farther than
{threshold:.3f} (1 − cosine) from all training {kind} are unlike anything in training; {100 * alarms:.1f} % of the
training {kind} are.

## Limits

It knows these classes and no others, and gives one of them to whatever it is asked. The numbers hold for {kind} that
come from where those of the project do.

## Licence

Not chosen yet: write it here, and in the head of this file. The backbone has a licence of its own.
"""
    path = bench.adapter / CARD
    atomic_write(path, text.encode())
    return path


def take(bench: Workbench) -> str:
    """The same for the page."""
    about = bench.about()
    if about is None or bench.result is None:
        return rendered("take", about=None)
    mean, spread, folds = about["held_out"][about["method"]]
    score = f"{mean:.1f} ± {spread:.1f} % over {folds} folds"
    return rendered("take", about=about, score=score, folder=bench.adapter, lines=lines(bench), kind=bench.project.kind)


def task_name(name: str) -> str:
    """A task's name in a server's addresses: letters, digits, - and _."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name).strip("-")[:64] or "task"


def _plain(text: str) -> str:
    """In Markdown, as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|~$" else c for c in text)
