"""`restuning reproduce`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled, given
from restuning.cli.output import say, table
from restuning.errors import RestuningError
from restuning.paper.experiments import EXPERIMENTS, SUITES, find
from restuning.paper.experiments.measured import Place, find_own, measure
from restuning.paper.experiments.ours import OWN
from restuning.paper.jobs import Job
from restuning.paper.reproduce import Only, Settings, cost, here, plan, reproduce, seconds_each
from restuning.utils.cluster import check_engine
from restuning.utils.options import Engine, Json, Option, Workers

EXAMPLE = "restuning reproduce tab4 --data-root ~/data --out runs/tab4 && restuning report runs/tab4 --out report"


@dataclass(frozen=True)
class Reproduce:
    """Which experiments, and how they are run."""

    experiments: Annotated[
        tuple[str, ...], Option("tab4, fig5, small, …; none: list them", metavar="NAME", positional=True)
    ] = ()
    out: Annotated[Path | None, Option("folder for results.jsonl, banks and runs")] = None
    dry_run: Annotated[bool, Option("print what it would cost, and do nothing")] = False
    engine: Engine = "local"
    workers: Workers = None
    set: Annotated[
        tuple[str, ...], Option("settings of an experiment of our own, such as unet", metavar="KEY=VALUE")
    ] = ()
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Reproduce)
    parser.settings(Settings, partial=True)
    parser.settings(Only)


def run(args: argparse.Namespace) -> None:
    own, only = filled(Reproduce, args), filled(Only, args)
    if not own.experiments:
        _list(own.json)
        return
    if any(name in OWN for name in own.experiments):
        _own(own, given(Settings, args).get("data_root", ""))
        return
    found = [e for name in own.experiments for e in find(name)]
    for experiment in found:
        if not experiment.tasks:
            raise RestuningError(f"{experiment.name} is made by another command: {experiment.shown_command}")
    if "data_root" not in given(Settings, args):
        raise RestuningError("--data-root is missing: expected the folder of the data sets")
    settings = filled(Settings, args)
    settings = replace(settings, data_root=str(Path(settings.data_root).absolute()))
    only.check(found)
    jobs = [job for experiment in found for job in plan(experiment, settings, only)]
    if own.dry_run:
        _cost(jobs, own.json)
        return
    if own.out is None:
        raise RestuningError("--out is missing: expected a folder")
    check_engine(own.engine, own.workers)
    engine = here
    if own.engine == "ray":
        from restuning.paper.ray import on_ray

        engine = partial(on_ray, workers=own.workers)
    failed = reproduce(jobs, own.out, settings, engine=engine)
    if own.json:
        print(json.dumps({"jobs": len(jobs), "failed": failed}))
    else:
        print(f"{len(jobs)} jobs, {len(failed)} failures (missing data are one); restuning report {own.out} shows them")
    if failed:
        raise RestuningError(f"{failed[0]}{f' (and {len(failed) - 1} more)' if len(failed) > 1 else ''}")


def _own(own: Reproduce, data_root: str) -> None:
    if len(own.experiments) > 1:
        raise RestuningError(f"{' '.join(own.experiments)}: an experiment of our own is run alone")
    if own.out is None:
        raise RestuningError("--out is missing: expected a folder")
    (name,) = own.experiments
    records = measure(name, find_own(name, own.set), Place(data_root, own.out))
    say(own.json, records, f"{len(records)} records: {own.out / f'{name}.jsonl'}, {name}.md beside it")


def _list(as_json: bool) -> None:
    columns = ["name", "what", "command"]
    rows = [[e.name, e.about, e.shown_command] for e in EXPERIMENTS.values()]
    rows += [
        [name, about, f"restuning reproduce {name} --data-root DATA --out runs/{name}"]
        for name, (*_, about) in OWN.items()
    ]
    rows += [[name, f"all of {', '.join(parts)}", ""] for name, parts in SUITES.items()]
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]))
    else:
        table(columns, rows)


def _cost(jobs: Sequence[Job], as_json: bool) -> None:
    costs = cost(jobs, cache(seconds_each))
    if as_json:
        print(json.dumps(costs))
        return
    rows = [
        [*(str(c[k]) for k in ("experiment", "column", "jobs", "scores")), f"{c['passes']:,.0f}", f"{c['hours']:.2f}"]
        for c in costs
    ]
    table(["experiment", "column", "jobs", "scores", "forward passes", "hours here"], rows)
    print(f"about {sum(c['hours'] for c in costs):.1f} hours on this machine")
