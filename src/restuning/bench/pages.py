"""What was tried of families of backbones, as a file, as totals, as a page."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from restuning.bench.families import METHODS, RIGHT, Checked
from restuning.errors import RestuningError, line
from restuning.utils.files import as_json, atomic_write


def read(path: Path) -> list[dict[str, Any]]:
    """What `save` has written. Raises RestuningError for a file that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RestuningError(f"{path} cannot be read as checked families: {line(error)}") from error
    keys = {one.name for one in fields(Checked)}
    if not isinstance(found, list) or not all(isinstance(one, dict) and keys <= one.keys() for one in found):
        raise RestuningError(
            f"{path} holds no checked families: expected what `restuning backbones check --out` writes"
        )
    return found


def save(path: Path, done: Sequence[Mapping[str, Any]]) -> None:
    atomic_write(path, as_json(list(done)))


def save_text(path: Path, text: str) -> None:
    atomic_write(path, text.encode())


def totals(done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many families of each library and kind there are, how they are found, and which methods are right."""
    rows = []
    for library, kind in sorted({(one["library"], one["kind"]) for one in done}):
        here = [one for one in done if (one["library"], one["kind"]) == (library, kind)]
        found = {how: sum(one["found"] == how for one in here) for how in ("table", "trace", "refused")}
        right = {m: sum(one["methods"].get(m) == RIGHT for one in here) for m in METHODS}
        wrong = sum(
            one["found"] == "wrong" or any(v.startswith("wrong") for v in one["methods"].values()) for one in here
        )
        built = sum(one["found"] != "not built" for one in here)
        rows.append(
            {"library": library, "kind": kind, "families": len(here), "built": built, **found, **right, "wrong": wrong}
        )
    return rows


INTRODUCTION = (
    "Families of module of timm, transformers and torchvision, tried with one small random model each; those that are",
    "not listed here have not been tried.",
    "Written by `restuning backbones page` from what `restuning backbones check` tried, a file for each library and",
    "kind in `docs/results/backbones`; `make backbones` tries what is not there, and `--family NAME` one anew.",
    "",
    "`table`: found by a row of `restuning.backbones.families`; `trace`: by one traced forward, with the share of the",
    "parameters in the blocks and what follows them (`restuning.backbones.auto`). A method is ✓ if, on a random model,",
    "features are those that hooks of the check's own see, the pooled feature is the model's own, the output at",
    "initialisation is the backbone's (but for bypass and prefix, which are not zero then), the backbone has no",
    "gradient, what is saved and loaded gives the same output to the bit (to rounding where a model's own differs from",
    "call to call), and the backbone is after `unload` as it was before. LoRA is on `all-linear`, but for convolutions",
    "whose padding depends on the map.",
    "",
    "Fourteen families are tried further, with anatomies found by a trace: a training step, features in memory or",
    "in a bank, a mixed batch and a compiled pass each (`pytest tests/test_auto.py -k found_family`). GPT-2,",
    "DistilBERT, T5's encoder, ALBERT, Phi and SegFormer have no row in the table, and PEFT's tests and examples",
    "use them; BERT, Llama, ViT, CLIP, SigLIP, DINOv2, Swin and ConvNeXt are what its tests, and image projects on",
    "timm and transformers, begin from. They were chosen by where they are named: download counts were not to be",
    "had.",
)


def page(done: Sequence[Mapping[str, Any]]) -> str:
    """A page of all families: totals, a row for each, and why methods and families are refused."""
    lines = [
        "# Backbones",
        "",
        *INTRODUCTION,
        "",
        f"| library | reads | families | built | table | trace | refused | {' | '.join(METHODS)} | wrong |",
        f"|---|---|{'---:|' * (6 + len(METHODS))}",
        *("| " + " | ".join(str(v) for v in row.values()) + " |" for row in totals(done)),
        "",
    ]
    for library, kind in sorted({(one["library"], one["kind"]) for one in done}):
        here = [one for one in done if (one["library"], one["kind"]) == (library, kind)]
        lines += [
            f"## {library}: {kind}s",
            "",
            f"| family | found | blocks | pooling | {' | '.join(METHODS)} |",
            f"|---|---|---:|---|{'---|' * len(METHODS)}",
        ]
        for one in sorted(here, key=lambda one: one["family"]):
            share = "" if one["share"] is None else f" {one['share']:.0%}"
            tower = f" ({one['tower']})" if one["tower"] else ""
            marks = [_mark(one["methods"].get(m)) for m in METHODS]
            blocks = (
                "" if not one["blocks"] else str(one["blocks"]) + (f" in {one['stages']}" if one["stages"] > 1 else "")
            )
            lines.append(
                f"| {one['family']}{tower} | {one['found']}{share} | {blocks} | {one['pool']} | {' | '.join(marks)} |"
            )
        lines += ["", *_reasons(here), ""]
    return "\n".join(lines).rstrip() + "\n"


def _mark(outcome: str | None) -> str:
    return "" if outcome is None else {RIGHT: "✓"}.get(outcome, outcome.partition(":")[0])


def _reasons(here: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why families, and methods on them, are refused: a reason, and the families that it is of."""
    found: dict[str, list[str]] = {}
    for one in here:
        if one["why"]:
            found.setdefault(one["why"], []).append(one["family"])
        for method, outcome in one["methods"].items():
            if outcome != RIGHT:
                reason = re.sub(r" here: .*", "", outcome.partition(": ")[2])
                found.setdefault(f"{method}: {reason}", []).append(one["family"])
    return [f"- {', '.join(names)}: {why.replace('|', '/')}" for why, names in found.items()]
