"""`methods`, `sites`, `params`, `data`."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from restuning.cli.flags import DATA, SHOTS, Add, backbone_flags, blocks, size_flags, table
from restuning.errors import RestuningError


def add_commands(add: Add) -> None:
    add("methods", _methods, "List the named methods.", "restuning methods --json")

    sites = add(
        "sites",
        _sites,
        "List where a backbone's operations read and write.",
        "restuning sites --backbone vit_base_patch16_224",
    )
    backbone_flags(sites, weights=False)

    params = add(
        "params",
        _params,
        "Count parameters: tuners and head apart; no weights are loaded.",
        "restuning params --backbone vit_base_patch16_224 --method res-tuning --classes 100 --json",
    )
    backbone_flags(params, weights=False)
    params.add_argument("--method", help="one method (default: all)")
    params.add_argument("--classes", type=int, default=100)
    params.add_argument("--paper", action="store_true", help="set ours beside every count that the paper prints")
    params.add_argument("--size", type=int, help="width of every adapter, tokens of every prefix and prompt")
    params.add_argument("--blocks", type=blocks, help="blocks that carry tuners, from 0: 0-5 or 0,3,7 (default all)")

    data = add(
        "data",
        _data,
        "Describe a data set: splits, classes, how many there are of each; check every item. Or list the paper's data\n"
        "sets; or check one of them against what is known of it.",
        "restuning data tar:photos.tar; restuning data list; restuning data check vtab/dtd ~/vtab-1k/dtd",
    )
    data.add_argument("data", nargs="+", metavar="SPEC", help=f"{DATA}; or list; or check NAME PATH")
    data.add_argument("--check", action="store_true", help="decode every image of it")
    size_flags(data)
    data.add_argument("--shots", type=int, metavar="K", help=SHOTS)
    data.add_argument("--seed", type=int, default=0)


def _methods(args: argparse.Namespace) -> None:
    from restuning.methods.files import to_dict
    from restuning.methods.named import ABOUT, FAMILIES, METHODS, NOTES

    if args.json:
        print(json.dumps({name: {"about": ABOUT[name], **to_dict(method)} for name, method in METHODS.items()}))
    else:
        table(["method", "what is trained"], [[name, ABOUT[name]] for name in METHODS])
        for family, own in FAMILIES.items():
            print(f"\non {family} backbones ({NOTES[family]}): {', '.join(own)}")


def _sites(args: argparse.Namespace) -> None:
    from restuning.backbones.load import MICRO, describe_backbone
    from restuning.backbones.sites import find_sites

    found = find_sites(describe_backbone(args.backbone or MICRO))
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
    if args.json:
        by = None if found.found is None else asdict(found.found)
        print(
            json.dumps(
                {
                    "anatomy": found.anatomy.name,
                    "found": by,
                    "pool": found.pool,
                    "heads": found.info.heads,
                    "sites": rows,
                }
            )
        )
    else:
        stages = "" if found.uniform else f" in {len(found.stages)} stages"
        print(f"{found.anatomy.name}: {len(found.blocks)} blocks{stages}, pooling {found.pool}")
        if found.found is not None:
            share, notes = found.found.share, "".join(f"; {note}" for note in found.found.notes)
            print(f"found by a trace, {share:.0%} of the parameters in it, sure: {found.found.sure}{notes}")
        table(["op", "block", "reads", "writes", "width"], [[str(v) for v in row.values()] for row in rows])


def _params(args: argparse.Namespace) -> None:
    from restuning.backbones.load import MICRO, describe_backbone
    from restuning.backbones.sites import find_sites
    from restuning.methods.named import FAMILIES, METHODS, find_method
    from restuning.methods.spec import on_blocks, resize
    from restuning.model.count import count
    from restuning.model.tuned import adapt

    if args.paper:
        _paper(args)
        return
    if args.classes < 1:
        raise RestuningError(f"--classes {args.classes}: expected at least 1")
    backbone = describe_backbone(args.backbone or MICRO)
    counts, refused = {}, {}
    sites = find_sites(backbone)
    family, classes = sites.anatomy.family, args.classes if sites.join is None else None
    for name in [args.method] if args.method else {**METHODS, **FAMILIES.get(family, {})}:
        method = find_method(name, family)
        method = method if args.size is None else resize(method, args.size)
        method = method if args.blocks is None else on_blocks(method, args.blocks)
        try:
            tuned = adapt(backbone, method, classes)
        except RestuningError as error:
            if args.method:
                raise
            refused[name] = str(error)
            continue
        counts[name] = count(tuned)
        tuned.unload()
    if args.json:
        said = {name: {"refused": why} for name, why in refused.items()}
        print(json.dumps(counts[args.method] if args.method else {**counts, **said}))
    else:
        columns = ["trainable", "tuners", "head", "total"]
        table(["method", *columns], [[name, *(f"{c[k]:,}" for k in columns)] for name, c in counts.items()])
        for name, why in refused.items():
            print(f"{name}: {why}")


def _paper(args: argparse.Namespace) -> None:
    from restuning.paper.counts import compare

    rows = list(compare())
    if args.json:
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


def _data(args: argparse.Namespace) -> None:
    from restuning.data import check, load_task

    if args.data == ["list"]:
        _known(args)
        return
    if args.data[0] == "check":
        _inspect(args)
        return
    if len(args.data) != 1:
        raise RestuningError(f"data {' '.join(args.data)}: expected one SPEC, or list, or check NAME PATH")
    (spec,) = args.data
    sizes = {f"{name}_size": getattr(args, f"{name}_size") for name in ("train", "test")}
    task = load_task(spec, **sizes, val_size=args.val_size or 0, shots=args.shots, seed=args.seed)
    splits = {name: items for name, items in (("train", task.train), ("val", task.val), ("test", task.test)) if items}
    if args.check:
        for items in splits.values():
            check(items)
    counts = {name: _counts(task.kind, items.labels, len(task.classes)) for name, items in splits.items()}
    sizes = {name: len(items) for name, items in splits.items()}
    if args.json:
        said = {"data": spec, "kind": task.kind, "classes": list(task.classes), "examples": sizes}
        print(json.dumps({**said, "labels": counts, "checked": args.check}))
        return
    total = ", ".join(f"{name} {n}" for name, n in sizes.items())
    print(f"{spec}: {task.kind}, {len(task.classes)} classes; {total}{'; all readable' if args.check else ''}")
    about = "mean" if task.kind == "regression" else "class"
    table([about, *counts], [[c, *(f"{n[i]:g}" for n in counts.values())] for i, c in enumerate(task.classes)])


def _known(args: argparse.Namespace) -> None:
    from restuning.data.known import KNOWN

    if args.json:
        print(json.dumps([{**asdict(k), "spec": k.spec("PATH")} for k in KNOWN.values()]))
        return
    rows = [
        [
            k.name,
            k.about,
            f"{k.classes:,}",
            f"{k.train:,}" if k.train else "shots",
            f"{k.test:,}",
            k.spec("PATH"),
            k.note,
        ]
        for k in KNOWN.values()
    ]
    table(["name", "data set", "classes", "train", "test", "as --data", "from"], rows)


def _inspect(args: argparse.Namespace) -> None:
    from restuning.data import load_source
    from restuning.data.inspect import inspect
    from restuning.data.known import find

    if len(args.data) != 3:
        raise RestuningError(
            "data check: expected a NAME (of `restuning data list`, or -) and a PATH (or, after -, a SPEC)"
        )
    _, name, path = args.data
    known = None if name == "-" else find(name)
    spec = path if known is None else known.spec(path)
    if known is not None and known.kind == "glue":
        raise RestuningError(f"{name} is texts from a hub: restuning data {spec} --check")
    found = inspect(load_source(spec), known)
    if args.json:
        print(json.dumps({"data": spec, **asdict(found)}))
    else:
        total = ", ".join(f"{split} {n} images of {found.seen[split]} classes" for split, n in found.counts.items())
        print(f"{spec}: {total}; {found.pixels} pixels")
        for note in (*found.wrong, *found.notes):
            print(f"- {note}")
    if found.wrong:
        more = f" (and {len(found.wrong) - 1} more)" if len(found.wrong) > 1 else ""
        raise RestuningError(f"{spec}: {found.wrong[0]}{more}")


def _counts(kind: str, labels: Sequence[Any], classes: int) -> list[float]:
    """How many items (or words) there are of each class; under regression, the targets' means."""
    if kind in ("multi-label", "regression"):
        sums = [sum(label[i] for label in labels) for i in range(classes)]
        return [s / len(labels) for s in sums] if kind == "regression" else sums
    flat = Counter(v for label in labels for v in (label if kind == "per-token" else [label]))
    return [flat[i] for i in range(classes)]
