"""The command line: parse, call, print. Bad input is one line on standard error and exit code 2; Ctrl-C is 130."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from restuning.diffusion import commands as diffusion
from restuning.errors import MissingExtra, RestuningError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RestuningError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int | None] = args.run_command
        return run(args) or 0
    except RestuningError as error:
        print(f"restuning: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("restuning: interrupted; a training run goes on with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="restuning", description="Tune frozen foundation models by Res-Tuning and its bypass.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(
        name: str, run: Callable[[argparse.Namespace], int | None], about: str, example: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: {example}",
            formatter_class=argparse.RawTextHelpFormatter,
        )
        command.set_defaults(run_command=run)
        command.add_argument("--json", action="store_true", help="print JSON, for machines")
        return command

    train = add(
        "train",
        _train,
        "Tune a frozen backbone on a data set, test it, save it.",
        "restuning train --data folder:photos --method res-tuning --lr 0.005 0.001 --out runs/photos",
    )
    train.add_argument("--out", type=Path, required=True, help="folder for run.json, the adapter and result.json")
    train.add_argument("--run", type=Path, metavar="RUN.JSON", help="repeat a recorded run; other settings override it")
    train.add_argument("--resume", action="store_true", help="continue the run in --out, to the same bits")
    train.add_argument("--data", help=_DATA)
    train.add_argument("--bank", metavar="DIR", help="train from a bank's features, without data and backbone")
    train.add_argument("--method", help="see `restuning methods`, or a method's .json file (default res-tuning)")
    _backbone_flags(train)
    train.add_argument("--size", type=int, help="width of every adapter, tokens of every prefix and prompt")
    train.add_argument("--blocks", type=_blocks, help="blocks that carry tuners, from 0: 0-5 or 0,3,7 (default all)")
    train.add_argument("--pool", choices=_POOLS, help="what the head reads (default: the backbone's)")
    _size_flags(train)
    train.add_argument("--shots", type=int, metavar="K", help=_SHOTS)
    _text_flags(train)
    train.add_argument(
        "--class-weights", choices=["balanced"], help="weigh classes in the loss so that each counts as much"
    )
    train.add_argument(
        "--group-by-length", action="store_true", default=None, help="batches of texts of about one length"
    )
    train.add_argument("--augment", action="store_true", default=None, help="RandomResizedCrop and flip")
    train.add_argument(
        "--crop", action="store_true", default=None, help="the backbone's centre crop, not the whole image"
    )
    train.add_argument(
        "--no-keep-features",
        dest="keep_features",
        action="store_false",
        default=None,
        help="run the backbone in every epoch even where its features could be kept in memory",
    )
    train.add_argument("--lr", type=float, nargs="+", dest="lrs", help="learning rate; several: chosen on validation")
    train.add_argument("--epochs", type=int, help="(default 50)")
    train.add_argument("--batch-size", type=int, help="(default 32)")
    train.add_argument("--weight-decay", type=float, help="never on scales, gates, biases, norms (default 0.05)")
    train.add_argument("--warmup-epochs", type=float, help="(default 10, at most a fifth of all)")
    train.add_argument("--precision", choices=["no", "bf16", "fp16"], help="mixed precision (default no)")
    train.add_argument("--accumulate", type=int, help="batches per step (default 1)")
    train.add_argument("--clip", type=float, help="largest gradient norm (default none)")
    train.add_argument("--patience", type=int, help="stop after so many epochs without a better validation score")
    train.add_argument("--workers", type=int, help="processes that load images (default 0)")
    train.add_argument("--seed", type=int, help="(default 0)")
    train.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into OUT/tensorboard")
    train.add_argument(
        "--shard", action="store_true", help="of several processes, each holds a share of the frozen backbone (FSDP2)"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    diffusion.add_commands(add)

    bank = add(
        "bank",
        _bank,
        "Compute a frozen backbone's features once and keep them on disk; `train --bank` then needs no backbone.",
        "restuning bank --data folder:photos --dtype float16 --out banks/photos && "
        "restuning train --bank banks/photos --method bypass --out runs/photos",
    )
    bank.add_argument("--out", type=Path, required=True, help="folder for the shards and their manifest")
    bank.add_argument("--resume", action="store_true", help="continue the bank in --out, to the same bytes")
    bank.add_argument("--data", required=True, help=_DATA)
    _backbone_flags(bank)
    _text_flags(bank)
    bank.add_argument("--crop", action="store_true", help="the backbone's centre crop, not the whole image")
    bank.add_argument(
        "--tokens", help="first, last, mean, all, or G for CLS and a G x G grid (default: what the pooling sees)"
    )
    bank.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "float64"], default="float32")
    bank.add_argument("--views", type=int, default=1, metavar="K", help="augmented views of each training image")
    _size_flags(bank)
    bank.add_argument("--batch-size", type=int, default=32)
    bank.add_argument("--seed", type=int, default=0)
    bank.add_argument("--quiet", action="store_true", help="no progress bar")

    sweep = add(
        "sweep",
        _sweep,
        "Train a whole grid from a bank at once: validation chooses, then each seed's best is tested.",
        "restuning sweep --bank banks/photos --method bypass bypass-grid4 --lr 0.05 0.01 0.005 0.001 "
        "--epochs 50 100 --seeds 0 1 2 --out sweeps/photos",
    )
    sweep.add_argument("--bank", required=True, metavar="DIR")
    sweep.add_argument("--out", type=Path, required=True, help="folder for sweep.json and each seed's best")
    sweep.add_argument("--resume", action="store_true", help="continue the sweep in --out")
    sweep.add_argument("--method", nargs="+", dest="methods", help="names, or .json files (default bypass)")
    sweep.add_argument("--lr", type=float, nargs="+", dest="lrs", help="(default 0.05 0.01 0.005 0.001)")
    sweep.add_argument("--epochs", type=int, nargs="+", help="(default 50 100)")
    sweep.add_argument("--seeds", type=int, nargs="+", help="(default 0 1 2)")
    sweep.add_argument("--pool", choices=_POOLS, help="what the head reads (default: the backbone's)")
    _size_flags(sweep)
    sweep.add_argument("--shots", type=int, metavar="K", help=_SHOTS)
    sweep.add_argument("--batch-size", type=int, help="(default 32)")
    sweep.add_argument("--weight-decay", type=float, help="(default 0.05)")
    sweep.add_argument("--warmup-epochs", type=float, help="(default 10, at most a fifth of all)")

    search = add(
        "search",
        _search,
        "Search a mix of adapter, LoRA and prompt under a parameter limit (NOAH).",
        "restuning search --data folder:photos --out runs/search && "
        "restuning train --data folder:photos --method runs/search/method.json --out runs/found",
    )
    search.add_argument("--out", type=Path, required=True, help="folder for method.json and search.json")
    search.add_argument("--resume", action="store_true", help="continue the search in --out")
    search.add_argument("--data", required=True, help=_DATA)
    _backbone_flags(search)
    _text_flags(search)
    search.add_argument("--limit", type=int, default=360_000, help="most tuner parameters (default 360,000)")
    search.add_argument("--population", type=int, default=16, help="subnets in a generation (default 16)")
    search.add_argument("--generations", type=int, default=4, help="(default 4)")
    _size_flags(search)
    search.add_argument("--lr", type=_rates, dest="lrs", metavar="LR", help="learning rate (default 0.001)")
    search.add_argument("--epochs", type=int, help="of the supernet (default 50)")
    search.add_argument("--batch-size", type=int, help="(default 32)")
    search.add_argument("--seed", type=int, help="(default 0)")
    search.add_argument("--quiet", action="store_true", help="no progress bar")

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
    _backbone_flags(reproduce)
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

    evaluate = add(
        "evaluate",
        _evaluate,
        "Measure a saved adapter on a data set's test split.",
        "restuning evaluate runs/photos --data folder:photos",
    )
    evaluate.add_argument("adapter", type=Path, help="folder of a saved adapter")
    evaluate.add_argument("--data", help=f"{_DATA} (default: the data it was trained on)")
    evaluate.add_argument("--test-size", type=int, metavar="N", help=_SIZES["test"])
    evaluate.add_argument("--weights", help="the backbone's weights, if not those of its run.json")
    evaluate.add_argument("--batch-size", type=int, default=32)
    evaluate.add_argument("--per-class", action="store_true", help="the metrics of every class too")
    evaluate.add_argument("--confusion", type=Path, metavar="FILE", help="a picture of what was taken for what")

    predict = add(
        "predict",
        _predict,
        "Classify an image, a folder of images, a text or a file of texts with saved adapters of one backbone.",
        "restuning predict runs/photos runs/sprites picture.jpg --top 3",
    )
    predict.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="folders of saved adapters")
    predict.add_argument(
        "input",
        metavar="INPUT",
        help="an image, a folder of images, a .txt of a text a line (pairs by a tab), or a text",
    )
    predict.add_argument("--top", type=int, default=1, metavar="K", help="how many classes to print (default 1)")
    predict.add_argument(
        "--embeddings", type=Path, metavar="FILE", help="write what every head reads, (items, d), as safetensors"
    )
    predict.add_argument("--weights", help="the backbone's weights, if not those of a run.json")

    add("methods", _methods, "List the named methods.", "restuning methods --json")

    sites = add(
        "sites",
        _sites,
        "List where a backbone's operations read and write.",
        "restuning sites --backbone vit_base_patch16_224",
    )
    _backbone_flags(sites, weights=False)

    params = add(
        "params",
        _params,
        "Count parameters: tuners and head apart; no weights are loaded.",
        "restuning params --backbone vit_base_patch16_224 --method res-tuning --classes 100 --json",
    )
    _backbone_flags(params, weights=False)
    params.add_argument("--method", help="one method (default: all)")
    params.add_argument("--classes", type=int, default=100)
    params.add_argument("--paper", action="store_true", help="set ours beside every count that the paper prints")
    params.add_argument("--size", type=int, help="width of every adapter, tokens of every prefix and prompt")
    params.add_argument("--blocks", type=_blocks, help="blocks that carry tuners, from 0: 0-5 or 0,3,7 (default all)")

    data = add(
        "data",
        _data,
        "Describe a data set: splits, classes, how many there are of each; check every item. Or list the paper's data\n"
        "sets; or check one of them against what is known of it.",
        "restuning data tar:photos.tar; restuning data list; restuning data check vtab/dtd ~/vtab-1k/dtd",
    )
    data.add_argument("data", nargs="+", metavar="SPEC", help=f"{_DATA}; or list; or check NAME PATH")
    data.add_argument("--check", action="store_true", help="decode every image of it")
    _size_flags(data)
    data.add_argument("--shots", type=int, metavar="K", help=_SHOTS)
    data.add_argument("--seed", type=int, default=0)
    return parser


_DATA = (
    "folder:PATH, tar:PATH, table:PATH, text:PATH, glue:NAME, hf:NAME, digits, sprites:location, sprites:orientation, "
    "sprites:count, or a layout of the paper's sets, see `restuning data list`"
)
_SHOTS = "items of each class to train on, in place of --train-size"
_POOLS = ("cls", "mean", "cls+mean", "last", "map")
_BENCHES = ("memory", "step", "multitask", "mixed", "grid", "bank")
_SIZES = {
    "train": "items to train on, those held out for validation among them (default all)",
    "val": "items held out of them for validation (default 0: the data's own, or a fifth where a rate is to be chosen)",
    "test": "items to test on (default all, or a fifth where there is no test split)",
}


def _backbone_flags(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    parser.add_argument(
        "--backbone",
        help="restuning-micro (default, bundled), a timm model, hf:FOLDER, all-MiniLM-L6-v2, or resnet18-stages",
    )
    if weights:
        parser.add_argument(
            "--weights", help="file of pretrained weights, or 'random' (default: bundled, or from the hub)"
        )
        parser.add_argument("--image-size", type=int, help="pixels a side (default: the backbone's own)")


def _size_flags(parser: argparse.ArgumentParser) -> None:
    for name, about in _SIZES.items():
        parser.add_argument(f"--{name}-size", type=int, metavar="N", help=about)


def _text_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", help="a tokenizer's folder or hub id (default: the backbone's own)")
    parser.add_argument(
        "--max-length", type=int, help="tokens that texts are cut to (default: longer ones are refused)"
    )


def _blocks(text: str) -> tuple[int, ...]:
    try:
        found: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
        return tuple(found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected blocks such as 0-5 or 0,3,7") from error


def _rates(text: str) -> tuple[float]:
    try:
        return (float(text),)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number") from error


def _train(args: argparse.Namespace) -> None:
    from restuning.methods import find_method, to_dict
    from restuning.processes import is_first
    from restuning.recipe import TrainConfig
    from restuning.run import RUN, Run, execute, from_bank, read_run

    recorded = args.run or (args.out / RUN if args.resume else None)
    run = read_run(recorded) if recorded else None
    given = {k: v for k, v in vars(args).items() if v is not None}
    training = {k: given[k] for k in asdict(TrainConfig()) if k in given}
    settings = {k: given[k] for k in Run.__dataclass_fields__ if k in given and k != "run"}
    settings |= {"lrs": tuple(settings["lrs"])} if "lrs" in settings else {}
    if str(settings.get("method", "")).endswith(".json"):  # the run records what the file holds
        settings["method"] = to_dict(find_method(settings["method"]))
    if "bank" in settings:
        settings = {**from_bank(settings["bank"]), **settings}
    if run is not None:
        run = replace(run, **settings, training=replace(run.training, **training))
    elif "data" not in settings:
        raise RestuningError(f"--data is missing: expected {_DATA}, or --bank")
    else:
        run = Run(**settings, training=TrainConfig(**training))
    result = execute(
        run,
        args.out,
        resume=args.resume,
        progress=not (args.quiet or args.json),
        tensorboard=args.tensorboard,
        shard=args.shard,
    )
    if not is_first():
        return
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"test {result['metric']} {result['test_' + result['metric']]:.2f} "
            f"on {result['examples']['test']} examples; saved in {args.out}"
        )


def _bank(args: argparse.Namespace) -> None:
    from restuning.backbones import MICRO
    from restuning.run import build_bank

    if args.batch_size < 1:
        raise RestuningError(f"--batch-size {args.batch_size}: expected at least 1")
    manifest = build_bank(
        args.data,
        args.out,
        backbone=args.backbone or MICRO,
        weights=args.weights,
        image_size=args.image_size,
        crop=args.crop,
        tokenizer=args.tokenizer,
        max_length=args.max_length,
        tokens=args.tokens,
        sizes={f"{name}_size": getattr(args, f"{name}_size") for name in ("train", "test")}
        | {"val_size": args.val_size or 0, "seed": args.seed},
        progress=not (args.quiet or args.json),
        dtype=args.dtype,
        views=args.views,
        seed=args.seed,
        batch_size=args.batch_size,
        resume=args.resume,
    )
    size = sum(shard["bytes"] for shard in manifest["shards"])
    rows = sum(shard["rows"] for shard in manifest["shards"])
    if args.json:
        print(
            json.dumps({"rows": rows, "bytes": size, "shards": len(manifest["shards"]), "layers": manifest["layers"]})
        )
    else:
        print(f"{rows} rows in {len(manifest['shards'])} shards, {size / 2**20:.1f} MiB, in {args.out}")


def _sweep(args: argparse.Namespace) -> None:
    from restuning.recipe import TrainConfig
    from restuning.sweep import Sweep, sweep

    given = {k: v for k, v in vars(args).items() if v is not None}
    recipe = {k: given[k] for k in ("batch_size", "weight_decay", "warmup_epochs") if k in given}
    settings: dict[str, Any] = {k: v for k, v in given.items() if k in Sweep.__dataclass_fields__}
    settings |= {k: tuple(v) for k, v in settings.items() if isinstance(v, list)}
    found = sweep(Sweep(**settings, training=TrainConfig(**recipe)), args.out, resume=args.resume)
    if args.json:
        print(json.dumps(found))
        return
    rows = [
        [
            name,
            "diverged" if m["test_score"] is None else f"{m['test_score']:.2f} ± {m['spread']:.2f}",
            f"{m['parameters']['tuners']:,}",
            str(m["points"]),
            f"{m['seconds']:.1f}",
            ", ".join(f"{s['lr']:g}/{s['epochs']}" for s in m["seeds"]),
        ]
        for name, m in found["methods"].items()
    ]
    _table(["method", "test score", "parameters", "points", "seconds", "chosen (lr/epochs by seed)"], rows)


def _reproduce(args: argparse.Namespace) -> int:
    from functools import cache, partial

    from restuning.experiments import EXPERIMENTS, SUITES, find
    from restuning.reproduce import Engine, Only, Settings, cost, here, plan, reproduce, seconds_each

    if not args.experiments:
        rows = [[e.name, e.about, e.said] for e in EXPERIMENTS.values()]
        suites = [[name, f"all of {', '.join(parts)}", ""] for name, parts in SUITES.items()]
        _table(["name", "what", "command"], [*rows, *suites])
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
        _table(["experiment", "column", "jobs", "scores", "forward passes", "hours here"], cells)
        print(f"about {sum(c['hours'] for c in costs):.1f} hours on this machine")
        return 0
    if args.out is None:
        raise RestuningError("--out is missing: expected a folder")
    if args.workers is not None and (args.engine != "ray" or args.workers < 1):
        raise RestuningError(f"--workers {args.workers}: expected 1 or more, with --engine ray")
    engine: Engine = here
    if args.engine == "ray":
        from restuning.cluster import on_ray

        engine = partial(on_ray, workers=args.workers)
    failed = reproduce(jobs, args.out, settings, engine=engine)
    if args.json:
        print(json.dumps({"jobs": len(jobs), "failed": failed}))
    else:
        print(f"{len(jobs)} jobs, {len(failed)} of them failed; restuning report {args.out} shows them")
    if failed:
        raise RestuningError(f"{failed[0]}{f' (and {len(failed) - 1} more)' if len(failed) > 1 else ''}")
    return 0


def _report(args: argparse.Namespace) -> None:
    from restuning.report import write
    from restuning.report.page import lines
    from restuning.results import read

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
        _table(["experiment", "row", "column", "score"], [list(row) for row in rows])


def _search(args: argparse.Namespace) -> None:
    from restuning.recipe import TrainConfig
    from restuning.run import Run
    from restuning.search import METHOD, search

    given = {k: v for k, v in vars(args).items() if v is not None}
    training = {k: given[k] for k in asdict(TrainConfig()) if k in given}
    settings = {k: given[k] for k in Run.__dataclass_fields__ if k in given}
    run = Run(**{"val_size": 200, **settings, "method": "noah"}, training=TrainConfig(**training))
    found = search(
        run,
        args.out,
        limit=args.limit,
        population=args.population,
        generations=args.generations,
        resume=args.resume,
        progress=not (args.quiet or args.json),
    )
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"validation score {found['validation_score']:.2f} with {found['parameters']:,} parameters; "
            f"restuning train --method {args.out / METHOD} trains it"
        )


def _bench(args: argparse.Namespace) -> None:
    from restuning.bench import Bench, bench
    from restuning.figures import absent, pyplot, tables, write

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
            _table(columns, rows)
    for reason in absent(records):
        print(reason)


def _evaluate(args: argparse.Namespace) -> None:
    from restuning.data import check, load_task, prepared
    from restuning.evaluate import predict_logits
    from restuning.objective import confusion, objective
    from restuning.run import RUN, card_reading, load_tuned, read_run

    tuned = load_tuned(args.adapter, args.weights)
    card = tuned.card()
    run = read_run(args.adapter / RUN) if (args.adapter / RUN).exists() else None
    if args.data is None and run is None:
        raise RestuningError(f"--data is missing, and {args.adapter} has no {RUN} that names it")
    asked = objective(card.kind)
    if args.confusion is not None and card.kind not in ("single-label", "per-token"):
        raise RestuningError(f"--confusion: a {card.kind} task has none")
    spec = args.data or (run.data if run else "")
    test_size = args.test_size or (run.test_size if run and spec == run.data else None)
    test = (task := load_task(spec, test_size=test_size)).test
    if (tuple(task.classes), task.kind) != (tuple(card.classes or ()), card.kind):
        raise RestuningError(
            f"{spec} is {task.kind} of {len(task.classes)} classes ({', '.join(task.classes[:3])}, …), the adapter "
            f"{card.kind} of {len(card.classes or ())} ({', '.join((card.classes or ())[:3])}, …): expected the same"
        )
    check(test)
    logits, labels = predict_logits(
        tuned, prepared(test, card_reading(args.adapter, card.preprocessing)), args.batch_size
    )
    metrics = {name: round(value, 4) for name, value in asked.metrics(logits, labels)}
    each = {}
    if args.per_class:
        each = {name: [round(v, 4) for v in t.tolist()] for name, t in asked.each(logits, labels).items()}
    if args.confusion is not None:
        from restuning.figures import matrix

        matrix(confusion(logits, labels).tolist(), task.classes, args.confusion)
    if args.json:
        said = {"data": spec, "examples": len(test), **metrics}
        print(json.dumps({**said, "classes": list(task.classes), "per_class": each} if each else said))
        return
    print(f"{len(test)} examples: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    if each:
        rows = [[c, *(f"{values[i]:g}" for values in each.values())] for i, c in enumerate(task.classes)]
        _table(["class", *each], rows)


def _predict(args: argparse.Namespace) -> None:
    from restuning.predict import predict

    rows = predict(args.adapters, args.input, args.top, args.weights, args.embeddings)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        if "values" in row:
            said = ", ".join(f"{name} {value:.4f}" for name, value in row["values"].items())
        elif "words" in row:
            said = " ".join(f"{word['word']}/{word['class']}" for word in row["words"])
        else:
            said = ", ".join(f"{c['class']} {100 * c['probability']:.1f} %" for c in row["top"])
        print(f"{row['input']}  {row['adapter']}  {said}")


def _methods(args: argparse.Namespace) -> None:
    from restuning.methods import ABOUT, FAMILIES, NOTES, methods, to_dict

    if args.json:
        print(json.dumps({name: {"about": ABOUT[name], **to_dict(method)} for name, method in methods.items()}))
    else:
        _table(["method", "what is trained"], [[name, ABOUT[name]] for name in methods])
        for family, own in FAMILIES.items():
            print(f"\non {family} backbones ({NOTES[family]}): {', '.join(own)}")


def _sites(args: argparse.Namespace) -> None:
    from restuning.backbones import MICRO, describe_backbone
    from restuning.wiring.sites import find_sites

    found = find_sites(describe_backbone(args.backbone or MICRO))
    rows = [
        {
            "op": s.op,
            "block": s.block,
            "reads": f"{s.reads.path} ({s.reads.side})",
            "writes": f"{s.writes.path} ({s.writes.side})",
            "width": s.port.reads,
        }
        for s in found
    ]
    if args.json:
        print(json.dumps({"anatomy": found.anatomy.name, "pool": found.pool, "heads": found.port.heads, "sites": rows}))
    else:
        stages = "" if found.uniform else f" in {len(found.stages)} stages"
        print(f"{found.anatomy.name}: {len(found.blocks)} blocks{stages}, pooling {found.pool}")
        _table(["op", "block", "reads", "writes", "width"], [[str(v) for v in row.values()] for row in rows])


def _params(args: argparse.Namespace) -> None:
    from restuning.adapt import adapt
    from restuning.backbones import MICRO, describe_backbone
    from restuning.measure import count
    from restuning.methods import FAMILIES, find_method, methods, on_blocks, resize
    from restuning.wiring.sites import find_sites

    if args.paper:
        _paper(args)
        return
    if args.classes < 1:
        raise RestuningError(f"--classes {args.classes}: expected at least 1")
    backbone = describe_backbone(args.backbone or MICRO)
    counts, refused = {}, {}
    sites = find_sites(backbone)
    family, classes = sites.anatomy.family, args.classes if sites.join is None else None
    for name in [args.method] if args.method else {**methods, **FAMILIES.get(family, {})}:
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
        _table(["method", *columns], [[name, *(f"{c[k]:,}" for k in columns)] for name, c in counts.items()])
        for name, why in refused.items():
            print(f"{name}: {why}")


def _paper(args: argparse.Namespace) -> None:
    from restuning.paper import compare

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
    _table(["table", "row", "paper (M)", "ours", "difference (M)", "why"], cells)


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
    _table([about, *counts], [[c, *(f"{n[i]:g}" for n in counts.values())] for i, c in enumerate(task.classes)])


def _known(args: argparse.Namespace) -> None:
    from restuning.known import KNOWN

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
    _table(["name", "data set", "classes", "train", "test", "as --data", "from"], rows)


def _inspect(args: argparse.Namespace) -> None:
    from restuning.data import load_source
    from restuning.data.inspect import inspect
    from restuning.known import find

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


def _table(columns: list[str], rows: list[list[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise MissingExtra("rich", "train") from error
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numbers = all(row[i].replace(",", "").isdigit() for row in rows)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    sys.exit(main())
