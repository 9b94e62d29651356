"""`train`, `bank`, `sweep`, `search`."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from restuning.cli.flags import (
    DATA,
    POOLS,
    SHOTS,
    Add,
    backbone_flags,
    blocks,
    rates,
    recipe_flags,
    size_flags,
    table,
    text_flags,
)
from restuning.errors import RestuningError


def add_commands(add: Add) -> None:
    train = add(
        "train",
        _train,
        "Tune a frozen backbone on a data set, test it, save it.",
        "restuning train --data folder:photos --method res-tuning --lr 0.005 0.001 --out runs/photos",
    )
    train.add_argument("--out", type=Path, required=True, help="folder for run.json, the adapter and result.json")
    train.add_argument("--run", type=Path, metavar="RUN.JSON", help="repeat a recorded run; other settings override it")
    train.add_argument("--resume", action="store_true", help="continue the run in --out, to the same bits")
    train.add_argument("--data", help=DATA)
    train.add_argument("--bank", metavar="DIR", help="train from a bank's features, without data and backbone")
    train.add_argument("--method", help="see `restuning methods`, or a method's .json file (default res-tuning)")
    backbone_flags(train)
    train.add_argument("--size", type=int, help="width of every adapter, tokens of every prefix and prompt")
    train.add_argument("--blocks", type=blocks, help="blocks that carry tuners, from 0: 0-5 or 0,3,7 (default all)")
    train.add_argument("--pool", choices=POOLS, help="what the head reads (default: the backbone's)")
    size_flags(train)
    train.add_argument("--shots", type=int, metavar="K", help=SHOTS)
    text_flags(train)
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
    recipe_flags(train, 50, 32, "10, at most a fifth of all")
    train.add_argument("--patience", type=int, help="stop after so many epochs without a better validation score")
    train.add_argument("--workers", type=int, help="processes that load images (default 0)")
    train.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into OUT/tensorboard")
    train.add_argument(
        "--shard", action="store_true", help="of several processes, each holds a share of the frozen backbone (FSDP2)"
    )

    bank = add(
        "bank",
        _bank,
        "Compute a frozen backbone's features once and keep them on disk; `train --bank` then needs no backbone.",
        "restuning bank --data folder:photos --dtype float16 --out banks/photos && "
        "restuning train --bank banks/photos --method bypass --out runs/photos",
    )
    bank.add_argument("--out", type=Path, required=True, help="folder for the shards and their manifest")
    bank.add_argument("--resume", action="store_true", help="continue the bank in --out, to the same bytes")
    bank.add_argument("--data", required=True, help=DATA)
    backbone_flags(bank)
    text_flags(bank)
    bank.add_argument("--crop", action="store_true", help="the backbone's centre crop, not the whole image")
    bank.add_argument(
        "--tokens",
        help="first, last, mean, all, int8 (all, quantised), G for CLS and a G x G grid, pooled (what linear-all "
        "reads), or pca:K[:FILE], K components of every token, fitted or from a file (default: what the pooling sees)",
    )
    bank.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "float64"], default="float32")
    bank.add_argument("--views", type=int, default=1, metavar="K", help="augmented views of each training image")
    size_flags(bank)
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
    sweep.add_argument("--pool", choices=POOLS, help="what the head reads (default: the backbone's)")
    size_flags(sweep, "train", "val")
    sweep.add_argument("--shots", type=int, metavar="K", help=SHOTS)
    sweep.add_argument("--batch-size", type=int, help="(default 32)")
    sweep.add_argument("--weight-decay", type=float, help="(default 0.05)")
    sweep.add_argument("--warmup-epochs", type=float, help="(default 10, at most a fifth of all)")
    sweep.add_argument("--label-smoothing", type=float, help="share of a label that all classes have (default 0)")

    search = add(
        "search",
        _search,
        "Search a mix of adapter, LoRA and prompt under a parameter limit (NOAH).",
        "restuning search --data folder:photos --out runs/search && "
        "restuning train --data folder:photos --method runs/search/method.json --out runs/found",
    )
    search.add_argument("--out", type=Path, required=True, help="folder for method.json and search.json")
    search.add_argument("--resume", action="store_true", help="continue the search in --out")
    search.add_argument("--data", required=True, help=DATA)
    backbone_flags(search)
    text_flags(search)
    search.add_argument("--limit", type=int, default=360_000, help="most tuner parameters (default 360,000)")
    search.add_argument("--population", type=int, default=16, help="subnets in a generation (default 16)")
    search.add_argument("--generations", type=int, default=4, help="(default 4)")
    size_flags(search)
    search.add_argument("--lr", type=rates, dest="lrs", metavar="LR", help="learning rate (default 0.001)")
    search.add_argument("--epochs", type=int, help="of the supernet (default 50)")
    search.add_argument("--batch-size", type=int, help="(default 32)")
    search.add_argument("--seed", type=int, help="(default 0)")
    search.add_argument("--quiet", action="store_true", help="no progress bar")


def _train(args: argparse.Namespace) -> None:
    from restuning.methods.files import to_dict
    from restuning.methods.named import find_method
    from restuning.runs.banks import from_bank
    from restuning.runs.run import execute
    from restuning.runs.settings import RUN, Run, read_run
    from restuning.training.config import TrainConfig
    from restuning.utils.distributed import is_main_process

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
        raise RestuningError(f"--data is missing: expected {DATA}, or --bank")
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
    if not is_main_process():
        return
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"test {result['metric']} {result['test_' + result['metric']]:.2f} "
            f"on {result['examples']['test']} examples; saved in {args.out}"
        )


def _bank(args: argparse.Namespace) -> None:
    from restuning.backbones.load import MICRO
    from restuning.runs.banks import build_bank

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
        say=(lambda each, items: None) if args.quiet or args.json else _say_bytes,
    )
    size = sum(shard["bytes"] for shard in manifest["shards"])
    rows = sum(shard["rows"] for shard in manifest["shards"])
    if args.json:
        print(
            json.dumps({"rows": rows, "bytes": size, "shards": len(manifest["shards"]), "layers": manifest["layers"]})
        )
    else:
        print(f"{rows} rows in {len(manifest['shards'])} shards, {size / 2**20:.1f} MiB, in {args.out}")


def _say_bytes(each: int, items: int) -> None:
    print(f"{each:,} bytes an item, {each * items / 2**20:,.1f} MiB for {items:,}", file=sys.stderr)


def _sweep(args: argparse.Namespace) -> None:
    from restuning.runs.sweep import Sweep, sweep
    from restuning.training.config import TrainConfig

    given = {k: v for k, v in vars(args).items() if v is not None}
    recipe = {k: given[k] for k in ("batch_size", "weight_decay", "warmup_epochs", "label_smoothing") if k in given}
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
    table(["method", "test score", "parameters", "points", "seconds", "chosen (lr/epochs by seed)"], rows)


def _search(args: argparse.Namespace) -> None:
    from restuning.runs.search import METHOD, search
    from restuning.runs.settings import Run
    from restuning.training.config import TrainConfig

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
