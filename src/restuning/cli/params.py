"""`restuning params`."""

import argparse
import json
from dataclasses import dataclass
from typing import Annotated

from restuning.backbones.load import MICRO, describe_backbone
from restuning.backbones.sites import find_sites
from restuning.cli.arguments import Parser, filled
from restuning.cli.output import table
from restuning.errors import RestuningError
from restuning.methods.named import FAMILIES, METHODS, find_method
from restuning.methods.spec import on_blocks, resize
from restuning.model.count import count
from restuning.model.tuned import adapt
from restuning.utils.options import BACKBONE, TUNER_SIZE, Blocks, Json, Option

EXAMPLE = "restuning params --backbone vit_base_patch16_224 --method res-tuning --classes 100 --json"


@dataclass(frozen=True)
class Params:
    """Of what."""

    backbone: Annotated[str, Option(BACKBONE)] = MICRO
    method: Annotated[str | None, Option("one method (default: all)")] = None
    classes: Annotated[int, Option("of the head")] = 100
    paper: Annotated[bool, Option("set ours beside every count that the paper prints")] = False
    size: Annotated[int | None, TUNER_SIZE] = None
    blocks: Blocks = None
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Params)


def run(args: argparse.Namespace) -> None:
    own = filled(Params, args)
    if own.paper:
        _paper(own.json)
        return
    if own.classes < 1:
        raise RestuningError(f"--classes {own.classes}: expected at least 1")
    backbone = describe_backbone(own.backbone)
    counts, refused = {}, {}
    sites = find_sites(backbone)
    family, classes = sites.anatomy.family, own.classes if sites.join is None else None
    for name in [own.method] if own.method else {**METHODS, **FAMILIES.get(family, {})}:
        method = find_method(name, family)
        method = method if own.size is None else resize(method, own.size)
        method = method if own.blocks is None else on_blocks(method, own.blocks)
        try:
            tuned = adapt(backbone, method, classes)
        except RestuningError as error:
            if own.method:
                raise
            refused[name] = str(error)
            continue
        counts[name] = count(tuned)
        tuned.unload()
    if own.json:
        absent = {name: {"refused": why} for name, why in refused.items()}
        print(json.dumps(counts[own.method] if own.method else {**counts, **absent}))
    else:
        columns = ["trainable", "tuners", "head", "total"]
        table(["method", *columns], [[name, *(f"{c[k]:,}" for k in columns)] for name, c in counts.items()])
        for name, why in refused.items():
            print(f"{name}: {why}")


def _paper(as_json: bool) -> None:
    from restuning.paper.counts import compare

    rows = list(compare())
    if as_json:
        print(json.dumps(rows))
        return
    cells = [
        [
            row["table"],
            row["row"],
            f"{row['printed']:g}",
            f"{row['parameters']:,}",
            "" if row["difference"] is None else f"{row['difference']:+.4f}",
            row["why"],
        ]
        for row in rows
    ]
    table(["table", "row", "paper (M)", "ours", "difference (M)", "why"], cells)
