"""Seven methods on a real small text-to-image base: held-out categories of emoji, three seeds.

python scripts/bench_emoji.py [--base runs/emoji/pipeline --pictures runs/emoji/data]

The base, the pictures and their split are those of scripts/pretrain_emoji.py. Each method is tuned on a category's
training pictures, at the rate that a fifth of the first category's chose, and judged on its test pictures: the loss at
fixed draws, and the kernel distance of what it paints from their captions (features of an ImageNet ViT-Ti). Killed, it
goes on where it was. Writes docs/results/emoji.jsonl, .md and .png.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from bench_vit_tiny import commit

from restuning.data.captions import load_captions
from restuning.diffusion.base import denoiser_of, load_base, scheduler_of
from restuning.diffusion.generation import Asked, draw, grid, pictures
from restuning.diffusion.latents import keep_latents
from restuning.diffusion.quality import score
from restuning.diffusion.training import Denoiser, DiffusionRun, execute, held_out_loss
from restuning.model.tuned import Tuned
from restuning.runs.settings import RESULT, RUN, versions
from restuning.training.config import TrainConfig

METHODS = ("full", "lora", "adapter", "prefix", "prompt", "res-tuning", "bypass")
RATES = dict.fromkeys(METHODS, (0.001, 0.003)) | {
    "full": (1e-4, 3e-4),
    "prefix": (3e-3, 1e-2),
    "prompt": (3e-3, 1e-2),
}
CATEGORIES = ("nature",)
SEEDS = (0, 1, 2)
DONE = "done.json"
DRAWS, STEPS, TRIAL, SHOWN = 16, 12, 6, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/emoji/pipeline"))
    parser.add_argument("--pictures", type=Path, default=Path("runs/emoji/data"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the ViT-Ti's weights are")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/tuned"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for category in CATEGORIES:
        judge(args, category, "base", None, 0)
    rates = {method: chosen(args, method) for method in args.methods}
    for seed in args.seeds:
        for category in CATEGORIES:
            for method in args.methods:
                run = run_of(args, category, method, rates[method], seed)
                out = args.out / f"{category}-{method}-{seed}"
                if not (out / RESULT).exists():
                    execute(run, out, resume=(out / RUN).exists())
                judge(args, category, method, out, seed)
                record(args)
    if all((args.out / f"{category}-{method}-0" / RESULT).exists() for category in CATEGORIES for method in METHODS):
        compare(args)


def run_of(
    args: argparse.Namespace, category: str, method: str, rate: float, seed: int, part: str = "train"
) -> DiffusionRun:
    training = TrainConfig(
        epochs=TRIAL if part == "most" else args.epochs,
        lr=rate,
        batch_size=8,
        warmup_epochs=0.5,
        schedule="constant",
        ema=0.97,
        seed=seed,
    )
    name = f"{category}-{part}"
    return DiffusionRun(
        str(args.base),
        f"captions:{args.pictures / name}",
        method,
        size=64,
        flip=False,
        latents=str(args.out / f"latents-{name}"),
        training=training,
    )


def chosen(args: argparse.Namespace, method: str) -> float:
    """The rate by which a fifth of the first category's training pictures are foretold best."""
    category = CATEGORIES[0]
    held = {part: args.pictures / f"{category}-{part}" for part in ("most", "fifth")}
    if not held["fifth"].exists():
        divide(args.pictures / f"{category}-train", held["most"], held["fifth"])
    found = {}
    for rate in RATES[method]:
        out = args.out / f"rate-{method}-{rate:g}"
        if not (out / DONE).exists():
            if not (out / RESULT).exists():
                execute(run_of(args, category, method, rate, 0, "most"), out, resume=(out / RUN).exists())
            loss, _ = loss_of(args, out, held["fifth"])
            (out / DONE).write_text(json.dumps({"loss": loss}))
        found[rate] = json.loads((out / DONE).read_text())["loss"]
    print(f"{method}: {found}", flush=True)
    return min(found, key=found.__getitem__)


def divide(whole: Path, most: Path, fifth: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metadata.jsonl").read_text().splitlines()]
    for folder, own in ((most, [r for i, r in enumerate(rows) if i % 5]), (fifth, rows[::5])):
        folder.mkdir()
        for row in own:
            shutil.copy(whole / row["file_name"], folder)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


def loss_of(args: argparse.Namespace, adapter: Path | None, test: Path) -> tuple[float, tuple[Any, Tuned]]:
    """On pictures that were not trained on; and the pipeline with what was tuned."""
    pipe = load_base(str(args.base))
    spec = f"captions:{test}"
    latents = keep_latents(pipe, load_captions(spec), args.out / f"latents-{test.name}", size=64)
    tuned = Tuned(denoiser_of(pipe))
    if adapter is None:
        tuned.add_adapter("base", "linear")
    else:
        tuned.load_adapter(adapter)
    model = Denoiser(pipe, tuned, 64)
    return held_out_loss(model, latents, scheduler_of(pipe, "ddim"), draws=DRAWS), (pipe, tuned)


def judge(args: argparse.Namespace, category: str, method: str, adapter: Path | None, seed: int) -> None:
    out = args.out / f"judged-{category}-{method}-{seed}"
    if (out / DONE).exists():
        return
    test = args.pictures / f"{category}-test"
    loss, (pipe, tuned) = loss_of(args, adapter, test)
    data = load_captions(f"captions:{test}")
    prompts = tuple(dict.fromkeys(data.captions(i)[0] for i in range(len(data))))
    shutil.rmtree(out, ignore_errors=True)
    asked = Asked(prompts, seeds=(seed,), steps=STEPS, sampler="dpm", batch_size=32)
    for i, picture in enumerate(pictures(pipe, tuned, asked, tuned.active_adapters)):
        picture.save(out / f"{i:03}.png")
    weights = str(args.data / "vit_tiny_patch16_224_in1k/model.safetensors")
    found = score(out, f"captions:{test}", features="vit_tiny_patch16_224", weights=weights)
    result = {} if adapter is None else json.loads((adapter / RESULT).read_text())
    row = {"category": category, "method": method, "seed": seed, "loss": loss, "kid": found["kid"], "fid": found["fid"]}
    row |= {key: result[key] for key in ("parameters", "kept_bytes", "peak_bytes") if key in result}
    if result:
        row |= {"rate": result["settings"]["training"]["lr"], "training_loss": result["loss"]}
        row |= {"epoch_seconds": statistics.median(e["seconds"] for e in result["epochs"])}
    (out / DONE).write_text(json.dumps({**row, "commit": commit(), "versions": versions()}))
    print({k: row[k] for k in ("category", "method", "seed", "loss", "kid")}, flush=True)


def compare(args: argparse.Namespace) -> None:
    """The same prompts and seeds by every method: a row each."""
    rows: dict[str, list[Any]] = {method: [] for method in ("base", *METHODS)}
    columns = []
    for category in CATEGORIES:
        data = load_captions(f"captions:{args.pictures / f'{category}-test'}")
        some = range(0, len(data), len(data) // SHOWN)[:SHOWN]
        prompts = tuple(data.captions(i)[0] for i in some)
        columns += prompts
        rows.setdefault("real", []).extend(data.image(i) for i in some)
        for method in ("base", *METHODS):
            _, (pipe, tuned) = loss_of(
                args,
                None if method == "base" else args.out / f"{category}-{method}-0",
                args.pictures / f"{category}-test",
            )
            rows[method] += draw(pipe, tuned, Asked(prompts, steps=25, sampler="dpm"))
    grid(args.results / "emoji.png", rows, columns)


def record(args: argparse.Namespace) -> None:
    files = sorted(args.out.glob(f"judged-*/{DONE}"))
    rows = [json.loads(file.read_text()) for file in files]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "emoji.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = ["method", "trained", "rate", "seeds", *(f"{c}: {what}" for c in CATEGORIES for what in ("loss", "KID"))]
    head += ["kept, MiB", "of full", "s a step"]
    table = [f"| {' | '.join(head)} |", f"|---{'|--:' * (len(head) - 1)}|"]

    def cell(found: list[float], digits: int) -> str:
        spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.{digits}f}{spread}"

    full = next((row["kept_bytes"] for row in rows if row["method"] == "full"), None)
    for method in ("base", *METHODS):
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        first = mine[0]
        judged = [
            cell([row[key] for row in mine if row["category"] == category], 4 if key == "loss" else 1)
            for category in CATEGORIES
            for key in ("loss", "kid")
        ]
        cost = ["", "", ""]
        if "kept_bytes" in first and full:
            steps = {c: -(-len(load_captions(f"captions:{args.pictures / f'{c}-train'}")) // 8) for c in CATEGORIES}
            seconds = statistics.median(row["epoch_seconds"] / steps[row["category"]] for row in mine)
            cost = [f"{first['kept_bytes'] / 2**20:.1f}", f"{first['kept_bytes'] / full:.3f}", f"{seconds:.2f}"]
        trained = f"{first['parameters']['trainable']:,}" if "parameters" in first else "0"
        rate = f"{first['rate']:g}" if "rate" in first else ""
        table.append(f"| {' | '.join([method, trained, rate, str(len(mine)), *judged, *cost])} |")
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    text = f"""# Seven methods on a small text-to-image base

The base of [emoji-base.md](../emoji-base.md), tuned on the training pictures of a category that it never saw,
{args.epochs} epochs of batch 8, AdamW at a constant rate (of {min(map(len, RATES.values()))}, a fifth of the
{CATEGORIES[0]} pictures chose, in {TRIAL} epochs), a mean of the weights (0.97); seeds: mean ± deviation.
Loss: of the predicted velocity on the test pictures, {DRAWS} fixed draws of noise and time each. KID: kernel distance
of as many painted pictures as there are test captions (DPM-Solver, {STEPS} steps, guidance 3) to the test pictures, on
features of an ImageNet ViT-Ti; unbiased, of few pictures. A Fréchet distance of fewer pictures than features is
singular: it is in the jsonl alone.

{chr(10).join(table)}

![The same prompts and seeds by every method](emoji.png)

Command: `python scripts/bench_emoji.py`; commits {commits}; torch {torch.__version__}, CPU,
{torch.get_num_threads()} thread(s), other work beside it. Every figure: `emoji.jsonl`.
"""
    (args.results / "emoji.md").write_text(text)


if __name__ == "__main__":
    main()
