"""`backbones`."""

import argparse
import json
from pathlib import Path
from typing import Any

from restuning.cli.flags import Add, table
from restuning.errors import RestuningError


def add_commands(add: Add) -> None:
    command = add(
        "backbones",
        _backbones,
        "Try every family of backbones, one small random model each: what is found, which methods are right on it,\n"
        "why others are refused. `page` writes what was tried as a page.",
        "restuning backbones check --library timm --out timm.json; restuning backbones page timm.json --out page.md",
    )
    command.add_argument("what", choices=["check", "page"])
    command.add_argument("files", nargs="*", metavar="FILE", help="after page: files that check has written")
    command.add_argument(
        "--library", choices=["timm", "transformers", "torchvision"], help="(default: all that is installed)"
    )
    command.add_argument("--family", nargs="+", default=[], metavar="NAME", help="these families alone")
    command.add_argument("--kind", choices=["image", "text"], help="families that read images, or texts, alone")
    command.add_argument("--out", help="a file that is written as families are done; those in it are not tried again")


def _backbones(args: argparse.Namespace) -> int:
    if args.what == "page":
        return _page(args)
    from restuning.backbones.zoo import LIBRARIES, families
    from restuning.bench.families import check_family
    from restuning.bench.pages import read, save

    if args.files:
        raise RestuningError(f"backbones check {' '.join(args.files)}: files are for page; name families with --family")
    libraries = [args.library] if args.library else list(LIBRARIES)
    known = {library: families(library) for library in libraries}
    unknown = [name for name in args.family if not any(name in found for found in known.values())]
    if unknown:
        raise RestuningError(
            f"unknown family {unknown[0]!r}: expected one of {', '.join(n for f in known.values() for n in f)}"
        )
    done = read(Path(args.out)) if args.out and Path(args.out).exists() else []
    have = {(one["library"], one["family"]) for one in done}
    for library in libraries:
        for name, kind in known[library].items():
            if (
                (args.family and name not in args.family)
                or (args.kind and kind != args.kind)
                or (library, name) in have
            ):
                continue
            done.append(check_family(library, name, kind).data())
            if args.out:
                save(Path(args.out), done)
            if not args.json:
                _show(done[-1])
    wrong = [one for one in done if _is_wrong(one)]
    if args.json:
        print(json.dumps(done))
    else:
        _totals(done)
    return 1 if wrong else 0


def _is_wrong(one: dict[str, Any]) -> bool:
    return one["found"] == "wrong" or any(said.startswith("wrong") for said in one["methods"].values())


def _show(one: dict[str, Any]) -> None:
    how = one["found"] + (f" ({one['share']:.0%}, {one['sure']})" if one["share"] is not None else "")
    methods = ", ".join(f"{name} {said.partition(':')[0]}" for name, said in one["methods"].items())
    print(f"{one['library']} {one['family']}: {how}; {methods or one['why']}", flush=True)


def _totals(done: list[dict[str, Any]]) -> None:
    from restuning.bench.families import METHODS
    from restuning.bench.pages import totals

    rows = [[str(v) for v in row.values()] for row in totals(done)]
    table(["library", "reads", "families", "built", "table", "trace", "refused", *METHODS, "wrong"], rows)


def _page(args: argparse.Namespace) -> int:
    from restuning.bench.pages import page, read, save_text

    if not args.files:
        raise RestuningError(
            "backbones page: expected the files that `restuning backbones check --out FILE` has written"
        )
    done = [one for name in args.files for one in read(Path(name))]
    text = page(done)
    if args.out:
        save_text(Path(args.out), text)
    elif args.json:
        print(json.dumps(done))
    else:
        print(text)
    return 0
