"""`train-diffusion`, `generate`, `score`."""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from restuning.cli.flags import Add, recipe_flags
from restuning.errors import RestuningError

_DATA = "captions:FOLDER (metadata.jsonl), coco:JSON, captions-tar:TAR or classes:FOLDER?template=a photo of a {}"


def add_commands(add: Add) -> None:
    train = add(
        "train-diffusion",
        _train,
        "Tune a text-to-image base on captioned pictures.",
        "restuning train-diffusion --base sd-v1-5 --data captions:photos --method bypass --out runs/photos",
    )
    train.add_argument("--out", type=Path, required=True, help="folder for run.json, the adapter and result.json")
    train.add_argument("--resume", action="store_true", help="continue the run in --out, to the same bits")
    train.add_argument("--base", help="a pipeline of diffusers: a folder, or a hub id")
    train.add_argument("--data", help=_DATA)
    train.add_argument("--method", help="full, lora, adapter, prefix, prompt, res-tuning, bypass, scedit, a .json file")
    train.add_argument("--size", type=int, help="pixels a side (default 512)")
    train.add_argument("--width", type=int, help="width of every adapter, rank of LoRA, tokens of prefix and prompt")
    train.add_argument("--no-flip", dest="flip", action="store_false", default=None, help="no mirrored pictures")
    train.add_argument("--drop", type=float, help="share of captions left out, for guidance (default 0.1)")
    train.add_argument("--truncate", action="store_true", default=None, help="cut captions that are too long")
    train.add_argument("--prior-prompt", help="DreamBooth's prior preservation: the class, as the base knows it")
    train.add_argument("--prior-images", type=int, help="that the base paints of it (default 100)")
    train.add_argument("--prior-weight", type=float, help="of their loss (default 1)")
    train.add_argument(
        "--latents", help="folder that keeps latents and embeddings for other runs (default: OUT/latents)"
    )
    train.add_argument("--gradient-checkpointing", action="store_true", default=None, help="the U-Net's own")
    train.add_argument("--prompts", nargs="+", help="painted at intervals, into OUT/samples-EPOCH.png")
    train.add_argument("--sample-every", type=int, metavar="EPOCHS", help="(default 1)")
    train.add_argument("--lr", type=float, help="(default 0.0001)")
    train.add_argument("--schedule", choices=["constant", "cosine"], help="(default constant)")
    train.add_argument(
        "--ema", type=float, help="decay of the mean of the weights, which is what is saved (default none)"
    )
    recipe_flags(train, 10, 8, "0")

    paint = add(
        "generate",
        _generate,
        "Paint pictures from prompts with tuned files, or with the base alone.",
        'restuning generate runs/photos runs/dogs --prompts "a photo of a dog" --seeds 0 1 2 --out pictures',
    )
    paint.add_argument("adapters", type=Path, nargs="*", metavar="ADAPTER", help="folders of tuned files of one base")
    paint.add_argument("--base", help="a pipeline of diffusers (default: the one of the first run.json)")
    paint.add_argument("--out", type=Path, required=True, help="folder for the PNGs, with their settings in them")
    paint.add_argument("--prompts", nargs="+", required=True)
    paint.add_argument("--negative", help="what to lead away from (default: the empty prompt)")
    paint.add_argument("--seeds", type=int, nargs="+", help="(default 0)")
    paint.add_argument("--sampler", help="plms (default), ddim or dpm")
    paint.add_argument("--steps", type=int, help="(default 50)")
    paint.add_argument("--guidance", type=float, help="classifier-free (default 3)")
    paint.add_argument("--size", type=int, help="pixels a side (default: that of the first run, or the base's)")
    paint.add_argument(
        "--share", help="how bypasses share the U-Net: exact (default), base-trajectory, mean-trajectory"
    )
    paint.add_argument("--plain", action="store_true", help="the untuned base's pictures too")
    paint.add_argument("--batch-size", type=int, help="(default 8)")
    paint.add_argument(
        "--grid", type=Path, metavar="FILE", help="a picture of all: adapters down, prompts and seeds across"
    )

    judge = add(
        "score",
        _score,
        "Measure painted pictures: Fréchet and kernel distance to real ones (FID, KID), CLIP score.",
        "restuning score pictures --real captions:photos --features inception:weights-inception-2015-12-05.pth",
    )
    judge.add_argument("generated", type=Path, metavar="PICTURES", help="a folder of pictures")
    judge.add_argument("--real", required=True, help=_DATA)
    judge.add_argument(
        "--features", required=True, help="inception:FILE (torch-fidelity's weights), or a backbone of images"
    )
    judge.add_argument("--weights", help="file of the backbone's weights")
    judge.add_argument("--clip", metavar="FOLDER", help="a CLIP model, for the CLIP score of `generate`'s pictures")


def _score(args: argparse.Namespace) -> None:
    from restuning.diffusion.quality import score

    found = score(args.generated, args.real, features=args.features, weights=args.weights, clip=args.clip)
    _say(args, found, "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))


def _train(args: argparse.Namespace) -> None:
    from restuning.diffusion.training import RECIPE, DiffusionRun, execute, read_run
    from restuning.methods.files import to_dict
    from restuning.methods.named import find_method
    from restuning.runs.settings import RUN
    from restuning.utils.distributed import is_main_process

    given = {k: v for k, v in vars(args).items() if v is not None}
    training = {k: given[k] for k in asdict(RECIPE) if k in given}
    settings = {k: given[k] for k in DiffusionRun.__dataclass_fields__ if k in given}
    settings |= {"prompts": tuple(settings["prompts"])} if "prompts" in settings else {}
    if str(settings.get("method", "")).endswith(".json"):  # the run records what the file holds
        settings["method"] = to_dict(find_method(settings["method"]))
    if args.resume and (args.out / RUN).exists():
        run = read_run(args.out / RUN)
        run = replace(run, **settings, training=replace(run.training, **training))
    else:
        missing = [f"--{name}" for name in ("base", "data") if name not in settings]
        if missing:
            raise RestuningError(f"{' and '.join(missing)} missing: a pipeline of diffusers, and {_DATA}")
        run = DiffusionRun(**settings, training=replace(RECIPE, **training))
    result = execute(run, args.out, resume=args.resume, progress=not args.quiet)
    if not is_main_process():
        return
    count = result["parameters"]
    _say(args, result, f"loss {result['loss']:.4f}, {count['tuners']:,} trained of {count['total']:,} → {args.out}")


def _generate(args: argparse.Namespace) -> None:
    import torch

    from restuning.diffusion.base import denoiser_of, load_base
    from restuning.diffusion.generation import Asked, grid, pictures
    from restuning.diffusion.training import read_run
    from restuning.model.files import changes_the_base, check_adapter
    from restuning.model.tuned import Tuned
    from restuning.runs.settings import RUN

    twice = next((x for given in (args.prompts, args.seeds or ()) for x, n in Counter(given).items() if n > 1), None)
    if twice is not None:
        raise RestuningError(f"{twice!r} is asked for twice: each prompt and seed is painted once")
    if args.grid is not None and args.grid.is_dir():
        raise RestuningError(f"--grid {args.grid} is a folder: expected a file's name, such as grid.png")
    if not args.adapters and not args.base:
        raise RestuningError("nothing to paint with: expected a tuned file, or --base")
    if args.out.exists() and any(args.out.glob("*.png")):
        raise RestuningError(f"{args.out} holds pictures: choose another folder")
    run = read_run(args.adapters[0] / RUN) if args.adapters and (args.adapters[0] / RUN).exists() else None
    if run is None and args.base is None:
        raise RestuningError(f"{args.adapters[0]} has no {RUN} that names its base: expected --base")
    given = {k: v for k, v in vars(args).items() if v is not None and k in Asked.__dataclass_fields__}
    given |= {name: tuple(given[name]) for name in ("prompts", "seeds") if name in given}
    asked = Asked(**{"size": run.size if run else None, **given})
    base, device = args.base or run.base, "cuda" if torch.cuda.is_available() else "cpu"  # type: ignore[union-attr]
    named = {f"adapter{i}": folder for i, folder in enumerate(args.adapters)}
    labels = dict(zip(("", *named), _labels(args.adapters), strict=True))
    full = [name for name, folder in named.items() if changes_the_base(folder)]
    plain = [""] * (args.plain or not named)
    groups = [[*plain, *(name for name in named if name not in full)], *([name] for name in full)]
    rows: dict[str, list[Any]] = {labels[name]: [] for name in (*plain, *named)}
    paths, seconds = [], 0.0
    for names in filter(None, groups):
        pipe = load_base(base, device)
        tuned = Tuned(denoiser_of(pipe))
        for folder in args.adapters:
            check_adapter(tuned, folder)
        for name in filter(None, names):
            tuned.load_adapter(named[name], name)
        tuned.to(pipe.device)
        start = time.perf_counter()
        for picture in pictures(pipe, tuned, asked, names):
            label = labels[picture.adapter]
            paths.append(args.out / f"{label}-{asked.prompts.index(picture.prompt):03}-{picture.seed}.png")
            replace(picture, adapter=label if picture.adapter else "").save(paths[-1])
            rows[label].append(picture.image)
        seconds += time.perf_counter() - start
    if args.grid is not None:
        columns = [f"{seed} {prompt}" for prompt in asked.prompts for seed in asked.seeds]
        grid(args.grid, rows, columns)
    each = seconds / len(paths)
    found = {"pictures": [str(path) for path in paths], "seconds_each": each}
    _say(args, found, f"{len(paths)} pictures, {each:.2f} s each → {args.out}")


def _labels(folders: Sequence[Path]) -> list[str]:
    """What pictures are called by: `base`, and each folder's own name, numbered where that is taken."""
    found = ["base"]
    for folder in folders:
        name = folder.resolve().name
        found.append(next(x for x in (name, *(f"{name}-{i}" for i in range(2, len(found) + 2))) if x not in found))
    return found


def _say(args: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data) if args.json else text)
