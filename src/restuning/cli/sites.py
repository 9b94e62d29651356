"""`restuning sites`."""

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Annotated

from restuning.backbones.load import MICRO, describe_backbone
from restuning.backbones.sites import find_sites
from restuning.cli.arguments import Parser, filled
from restuning.cli.output import table
from restuning.utils.options import BACKBONE, Json, Option

EXAMPLE = "restuning sites --backbone vit_base_patch16_224"


@dataclass(frozen=True)
class SitesCommand:
    """Of what."""

    backbone: Annotated[str, Option(BACKBONE)] = MICRO
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(SitesCommand)


def run(args: argparse.Namespace) -> None:
    own = filled(SitesCommand, args)
    found = find_sites(describe_backbone(own.backbone))
    rows = [
        {
            "op": s.op,
            "block": s.block,
            "reads": f"{s.reads.path} ({s.reads.side})",
            "writes": f"{s.writes.path} ({s.writes.side})",
            "width": s.info.in_features,
        }
        for s in found
    ]
    if own.json:
        by = None if found.found is None else asdict(found.found)
        named = {"anatomy": found.anatomy.name, "found": by}
        print(json.dumps({**named, "pool": found.pool, "heads": found.info.heads, "sites": rows}))
    else:
        stages = "" if found.uniform else f" in {len(found.stages)} stages"
        print(f"{found.anatomy.name}: {len(found.blocks)} blocks{stages}, pooling {found.pool}")
        if found.found is not None:
            remarks = (*found.found.notes, *filter(None, [found.found.instead]))
            share, notes = found.found.share, "".join(f"; {note}" for note in remarks)
            print(f"found by a trace, {share:.0%} of the parameters in it, sure: {found.found.sure}{notes}")
        table(["op", "block", "reads", "writes", "width"], [[str(v) for v in row.values()] for row in rows])
