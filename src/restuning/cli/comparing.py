"""`reproduce`, `report`, `bench`."""

import argparse
import json
from pathlib import Path
from typing import Any

from restuning.cli.flags import Add, backbone_flags, table
from restuning.errors import RestuningError

_BENCHES = ("memory", "step", "multitask", "mixed", "grid", "bank")


def add_commands(add: Add) -> None:
    reproduce = add(
        "reproduce",
        _reproduce,
        "Run an experiment of the paper, or of the small edition: choose on validation, train again, test once.\n"
        "A killed one goes on where it was, and several processes may work in one --out.",
        "restuning reproduce tab4 --data-root ~/data --out runs/tab4 && restuning report runs/tab4 --out report",
    )
    reproduce.add_argument("experiments", nargs="*", metavar="NAME", help="tab4, fig5, small, …; none: list them")
    reproduce.add_argument("--data-root", metavar="DIR", help="where its data are; see `restuning data list`")
    reproduce.add_argument("--out", type=Path, help="folder for results.jsonl, banks and runs")
    reproduce.add_argument("--dry-run", action="store_true", help="say what it would cost, and do nothing")
    reproduce.add_argument("--engine", choices=["local", "ray"], default="local", help="where jobs are done")
    reproduce.add_argument("--workers", type=int, metavar="N", help="start a local Ray cluster of N workers")
    reproduce.add_argument("--row", nargs="+", default=[], dest="rows", help="these rows alone")
    reproduce.add_argument("--column", nargs="+", default=[], dest="columns", help="these columns alone")
    reproduce.add_argument("--seeds", type=int, nargs="+", help="in place of the experiment's")
    reproduce.add_argument("--lr", type=float, nargs="+", dest="lrs", help="in place of the experiment's")
    reproduce.add_argument("--epochs", type=int, nargs="+", help="in place of the experiment's")
    backbone_flags(reproduce)
    reproduce.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the banks"
    )

    report = add(
        "report",
        _report,
        "Set results beside the paper's: a page and Markdown, with tables, differences and pictures.",
        "restuning report runs/tab4 --out report",
    )
    report.add_argument("results", type=Path, metavar="RESULTS", help="a results.jsonl, or a folder that has one")
    report.add_argument("--out", type=Path, help="folder for report.html and report.md (default: print the scores)")

    bench = add(
        "bench",
        _bench,
        "Measure what tuning costs beside full fine-tuning, linear probing, LST, DTL and PEFT, in one run.",
        "restuning bench memory --weights random --out runs/bench",
    )
    bench.add_argument("what", metavar="WHAT", choices=_BENCHES, help=f"one of {', '.join(_BENCHES)}")
    bench.add_argument("--out", type=Path, help="folder for WHAT.jsonl, WHAT.md and WHAT.png (default: none)")
    bench.add_argument("--backbone", help="a timm model (default vit_base_patch16_224), or restuning-micro")
    bench.add_argument("--weights", help="file of pretrained weights (default 'random')")
    bench.add_argument("--image-size", type=int, help="pixels a side (default: the backbone's own)")
    bench.add_argument("--batch", type=int, help="(default 8; mixed 64; grid and bank 32)")
    bench.add_argument("--method", nargs="+", dest="methods", help="memory and step: methods and peers (default: all)")
    bench.add_argument("--rounds", type=int, help="ratios are taken round by round (default 5)")
    bench.add_argument("--classes", type=int, help="of each head (default 100; multitask 10)")
    bench.add_argument("--tasks", type=int, help="multitask: most tasks (default 1000); mixed: adapters (default 19)")
    bench.add_argument("--points", type=int, help="of a grid (default 8)")
    bench.add_argument("--device", help="cpu (default) or cuda")


def _reproduce(args: argparse.Namespace) -> int:
    from functools import cache, partial

    from restuning.paper.experiments import EXPERIMENTS, SUITES, find
    from restuning.paper.reproduce import Engine, Only, Settings, cost, here, plan, reproduce, seconds_each

    if not args.experiments:
        rows = [[e.name, e.about, e.said] for e in EXPERIMENTS.values()]
        suites = [[name, f"all of {', '.join(parts)}", ""] for name, parts in SUITES.items()]
        if args.json:
            print(json.dumps([dict(zip(("name", "what", "command"), row, strict=True)) for row in [*rows, *suites]]))
        else:
            table(["name", "what", "command"], [*rows, *suites])
        return 0
    found = [e for name in args.experiments for e in find(name)]
    for experiment in found:
        if not experiment.tasks:
            raise RestuningError(f"{experiment.name} is made by another command: {experiment.said}")
    if args.data_root is None:
        raise RestuningError("--data-root is missing: expected the folder of the data sets")
    args.data_root = str(Path(args.data_root).absolute())
    given: dict[str, Any] = {
        k: v for k, v in vars(args).items() if v is not None and k in Settings.__dataclass_fields__
    }
    settings = Settings(**(given | {k: tuple(v) for k, v in given.items() if isinstance(v, list)}))
    only = Only(tuple(args.rows), tuple(args.columns))
    only.check(found)
    jobs = [job for experiment in found for job in plan(experiment, settings, only)]
    if args.dry_run:
        costs = cost(jobs, cache(seconds_each))
        if args.json:
            print(json.dumps(costs))
            return 0
        cells = [
            [*(str(c[k]) for k in ("experiment", "column", "jobs", "scores")), f"{c['passes']:,.0f}"] for c in costs
        ]
        cells = [[*cell, f"{c['hours']:.2f}"] for cell, c in zip(cells, costs, strict=True)]
        table(["experiment", "column", "jobs", "scores", "forward passes", "hours here"], cells)
        print(f"about {sum(c['hours'] for c in costs):.1f} hours on this machine")
        return 0
    if args.out is None:
        raise RestuningError("--out is missing: expected a folder")
    if args.workers is not None and (args.engine != "ray" or args.workers < 1):
        raise RestuningError(f"--workers {args.workers}: expected 1 or more, with --engine ray")
    engine: Engine = here
    if args.engine == "ray":
        from restuning.paper.ray import on_ray

        engine = partial(on_ray, workers=args.workers)
    failed = reproduce(jobs, args.out, settings, engine=engine)
    if args.json:
        print(json.dumps({"jobs": len(jobs), "failed": failed}))
    else:
        print(
            f"{len(jobs)} jobs, {len(failed)} failures (missing data are one); restuning report {args.out} shows them"
        )
    if failed:
        raise RestuningError(f"{failed[0]}{f' (and {len(failed) - 1} more)' if len(failed) > 1 else ''}")
    return 0


def _report(args: argparse.Namespace) -> None:
    from restuning.paper.report import write
    from restuning.paper.report.page import lines
    from restuning.paper.results import read

    if args.out is not None:
        found = write(args.results, args.out)
        print(
            json.dumps(found) if args.json else f"{', '.join(found)}: {args.out / 'report.html'}, report.md beside it"
        )
        return
    rows = lines(read(args.results))
    if not rows:
        raise RestuningError(f"no results in {args.results}: expected a results.jsonl, or a folder that has one")
    if args.json:
        print(json.dumps(rows))
    else:
        table(["experiment", "row", "column", "score"], [list(row) for row in rows])


def _bench(args: argparse.Namespace) -> None:
    from restuning.bench.bench import Bench, bench
    from restuning.utils.figures import absent, pyplot, tables, write

    given = {k: v for k, v in vars(args).items() if v is not None and k in Bench.__dataclass_fields__}
    given |= {"methods": tuple(args.methods)} if args.methods else {}
    if args.out is not None:
        pyplot()  # a long run should not fail at its end
        if args.out.exists() and not args.out.is_dir():
            raise RestuningError(f"cannot write to {args.out}: it is no folder")
    records = bench(args.what, **given)
    if args.out is not None:
        write(records, args.out)
    if args.json:
        print("\n".join(map(json.dumps, records)))
        return
    for columns, rows in tables(records):
        if rows:
            table(columns, rows)
    for reason in absent(records):
        print(reason)
