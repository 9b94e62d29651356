"""What tuning costs beside its peers, all in one run: ratios with their spread, as JSON lines, tables and pictures.

A benchmark gives samples, one value of each unit for every round, and the pairs of names whose ratios are taken round
by round. What is wanted of them (`WANTED`) is wanted of ViT-B/16 at 224 x 224 in float32, on two CPU cores (of
`window`, ViT-L/16).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from restuning.bench.cluster import cluster
from restuning.bench.settings import Bench, Measured, short
from restuning.bench.steps import BANKED, memory, steps
from restuning.bench.tasks import bank, grid, mixed, multitask
from restuning.bench.window import window
from restuning.errors import RestuningError
from restuning.utils.figures import Record
from restuning.utils.profiling import spread

WANTED: dict[str, dict[tuple[str, str, str], str]] = {
    "memory": {
        ("bypass", "full", "saved_bytes"): "<= 0.005",
        (f"bypass-query{BANKED}", "full", "saved_bytes"): "<= 0.01",
        ("bypass", "linear", "peak_bytes"): "<= 1.1",
        ("res-tuning", "peft-lora-equal", "saved_bytes"): "<= 0.9",
        ("res-tuning:compact", "peft-lora-equal", "saved_bytes"): "<= 0.62",
        ("res-tuning:recompute", "peft-lora-equal", "saved_bytes"): "<= 0.36",
    },
    "step": {
        ("res-tuning", "peft-lora-equal", "seconds"): "<= 1",
        ("res-tuning:compact", "peft-lora-equal", "seconds"): "<= 1.08",
        ("res-tuning:recompute", "peft-lora-equal", "seconds"): "<= 1.25",
        ("lora", "peft-lora", "seconds"): "<= 1.05",
        ("prefix", "prefix, bound", "seconds"): "<= 1.15",
        ("forward, res-tuning", "forward", "seconds"): "<= 1.08",
        ("bypass", "forward", "seconds"): "<= 1.25",
        (f"bypass-query{BANKED}", "forward", "seconds"): "<= 0.15",
    },
    "multitask": {
        ("19 tasks", "19 full models", "seconds"): "<= 0.058",
        ("1000 tasks", "forward", "seconds"): "<= 1.4",
    },
    "mixed": {
        (f"{method}, 19 mixed", f"{method}, one", "images_per_second"): ">= 0.95"
        for method in ("adapter", "lora", "prefix")
    },
    "grid": {("8 points, a stack", "1 point", "seconds"): "<= 4"},
    "window": {("through a window", "from memory", "steps_per_second"): ">= 0.8"},
    "bank": {(f"step from {where}", "full step", "seconds"): "<= 0.001" for where in ("memory", "disk")},
}

SHARED = {
    ("19 tasks", "19 full models", "seconds"): "<= 0.075",
    ("1000 tasks", "forward", "seconds"): "<= 3",
}
"""Of `multitask` with bypass-query-shared, on any backbone."""


def bench(what: str, **given: Any) -> list[Record]:
    """Run one of `BENCHES` with its defaults or the given settings; a record for every name.

    Raises RestuningError for an unknown benchmark or a setting that cannot be.
    """
    if what not in BENCHES:
        raise RestuningError(f"unknown benchmark {what!r}: expected one of {', '.join(BENCHES)}")
    run, own, defaults = BENCHES[what]
    settings = Bench(**{**defaults, **given})
    wanted = WANTED.get(what, {}) if settings.backbone == {**vars(Bench()), **defaults}["backbone"] else {}
    if what == "multitask" and settings.methods == ("bypass-query-shared",):
        wanted = SHARED
    return records_of(what, run(settings), settings.facts(own), wanted)


def records_of(
    what: str, measured: Measured, facts: Mapping[str, Any], wanted: Mapping[tuple[str, str, str], str]
) -> list[Record]:
    """A record for every name. wanted: of the ratio (name, name, unit)."""
    records = []
    for name, units in measured.samples.items():
        ratios: dict[str, dict[str, Any]] = {}
        for a, b, unit in measured.pairs:
            if a == name and all(measured.samples.get(b, {}).get(unit, [0])):
                found = {k: short(v) for k, v in spread(units[unit], measured.samples[b][unit]).items()}
                bar = {"wanted": wanted[a, b, unit]} if (a, b, unit) in wanted else {}
                ratios[f"{unit} / {b}"] = {**found, **bar}
        values = {unit: short(statistics.median(v)) for unit, v in units.items()}
        operations = {"operations": measured.operations[name]} if name in measured.operations else {}
        records.append(
            {"what": what, "name": name, "values": values, "ratios": ratios, **operations, "settings": facts}
        )
    return records + [
        {"what": what, "name": name, "values": {}, "ratios": {}, "absent": why, "settings": facts}
        for name, why in measured.absent.items()
    ]


BENCHES: dict[str, tuple[Callable[[Bench], Measured], Sequence[str], dict[str, Any]]] = {
    "memory": (memory, ["methods", "memory", "quantise", "components"], {}),
    "step": (steps, ["methods", "found", "components"], {}),
    "multitask": (multitask, ["tasks", "methods"], {"classes": 10, "tasks": 1000, "methods": ("bypass",)}),
    "mixed": (mixed, ["tasks"], {"batch": 64}),
    "grid": (grid, ["points"], {"batch": 32}),
    "bank": (bank, [], {"batch": 32}),
    "cluster": (
        cluster,
        ["methods", "points", "items", "data"],
        {
            "backbone": "vit_tiny_patch16_224",
            "classes": 10,
            "points": 24,
            "items": 1000,
            "rounds": 1,
            "methods": ("linear", "bypass-none", "bypass", "bypass-horizontal"),
        },
    ),
    "window": (window, ["points", "items"], {"backbone": "vit_large_patch16_224", "batch": 64}),
}
"""The benchmarks, the settings that only some of them have, and their defaults where these are not those of `Bench`."""
