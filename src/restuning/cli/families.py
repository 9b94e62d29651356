"""`restuning backbones`."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from restuning.backbones.zoo import LIBRARIES, families
from restuning.bench.families import METHODS, check_family
from restuning.bench.pages import page, read, save, save_text, totals
from restuning.cli.arguments import Parser, filled
from restuning.cli.output import table
from restuning.errors import RestuningError
from restuning.utils.options import Json, Option

EXAMPLE = "restuning backbones check --library timm --out timm.json; restuning backbones page timm.json --out page.md"


@dataclass(frozen=True)
class Backbones:
    """Which families."""

    what: Annotated[
        tuple[str, ...], Option("check; or page FILE …, files that check has written", metavar="WHAT", positional=True)
    ]
    library: Annotated[Literal["timm", "transformers", "torchvision"] | None, Option("(default: all of them)")] = None
    family: Annotated[tuple[str, ...], Option("these families alone, anew if --out has them", metavar="NAME")] = ()
    kind: Annotated[Literal["image", "text"] | None, Option("families that read images, or texts, alone")] = None
    out: Annotated[str | None, Option("a file written as families are done; those in it are not tried again")] = None
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Backbones)


def run(args: argparse.Namespace) -> int:
    own = filled(Backbones, args)
    if own.what[0] == "page":
        return _page(own)
    if own.what != ("check",):
        raise RestuningError(f"backbones {' '.join(own.what)}: expected check, or page and files")
    known = {library: families(library) for library in ([own.library] if own.library else LIBRARIES)}
    unknown = [name for name in own.family if not any(name in found for found in known.values())]
    if unknown:
        every = ", ".join(name for found in known.values() for name in found)
        raise RestuningError(f"unknown family {unknown[0]!r}: expected one of {every}")
    done = read(Path(own.out)) if own.out and Path(own.out).exists() else []
    done = [one for one in done if one["family"] not in own.family or one["library"] not in known]
    have = {(one["library"], one["family"]) for one in done}
    for library, found in known.items():
        for name, kind in found.items():
            if (own.family and name not in own.family) or own.kind not in (None, kind) or (library, name) in have:
                continue
            done.append(check_family(library, name, kind).data())
            if own.out:
                save(Path(own.out), done)
            if not own.json:
                _show(done[-1])
    if own.json:
        print(json.dumps(done))
    else:
        rows = [[str(v) for v in row.values()] for row in totals(done)]
        table(["library", "reads", "families", "built", "table", "trace", "refused", *METHODS, "wrong"], rows)
    return 1 if any(_is_wrong(one) for one in done) else 0


def _is_wrong(one: dict[str, Any]) -> bool:
    return one["found"] == "wrong" or any(outcome.startswith("wrong") for outcome in one["methods"].values())


def _show(one: dict[str, Any]) -> None:
    how = one["found"] + (f" ({one['share']:.0%}, {one['sure']})" if one["share"] is not None else "")
    methods = ", ".join(f"{name} {outcome.partition(':')[0]}" for name, outcome in one["methods"].items())
    print(f"{one['library']} {one['family']}: {how}; {methods or one['why']}", flush=True)


def _page(own: Backbones) -> int:
    if len(own.what) < 2:
        raise RestuningError(
            "backbones page: expected the files that `restuning backbones check --out FILE` has written"
        )
    done = [one for name in own.what[1:] for one in read(Path(name))]
    if own.out:
        save_text(Path(own.out), page(done))
    else:
        print(json.dumps(done) if own.json else page(done))
    return 0
