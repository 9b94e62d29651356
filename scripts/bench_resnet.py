"""Three real stages of an ImageNet ResNet-18 on EuroSAT and Caltech-101: the order of the paper's Table 16.

python scripts/bench_resnet.py [--data ../shared/data]

Every head reads the mean over all positions of the last stage. A method's rate (and, beside the backbone, its weight
decay) is chosen once, with seed 0, on 500 of the training images; then it is trained on all of them with three seeds,
and tested once each, at the last epoch. LoRA and full fine-tuning have one rate and one seed. Killed, it
goes on where it was. Writes docs/results/resnet.jsonl and .md.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from bench_vit_tiny import commit

from restuning.backbones.load import STAGES, load_backbone
from restuning.model.tuned import adapt
from restuning.runs.run import execute
from restuning.runs.settings import RESULT, RUN, Run
from restuning.training.config import TrainConfig
from restuning.utils.profiling import saved_bytes

TASKS = {  # where, pixels a side, training and test images
    "EuroSAT": ("tar:{}/eurosat/eurosat_rgb64_every6th.tar", 64, 3000, 1500),
    "Caltech-101": ("tar:{}/caltech101/caltech101_short128_max40.tar", 96, 2500, 1500),
}
RATES = {
    "linear": (0.01, 0.003),
    "bypass": (0.02, 0.01),
    "res-tuning": (0.01, 0.005),
    "lora": (0.005,),
    "full": (0.0005,),
}
DECAYS = (0.05, 0.5)  # tried beside the backbone; inside it the first
EPOCHS = {"linear": 30, "bypass": 30}  # others, inside the backbone: 8
SEEDS = dict.fromkeys(RATES, (0, 1, 2)) | {"lora": (0,), "full": (0,)}
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/resnet"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    for task in args.tasks:
        for method in RATES:
            tried = [one(args, task, method, RATES[method], decay, 0) for decay in decays(method)]
            best = max(tried, key=lambda r: max(r["validation_score"].values(), default=0.0))
            for seed in SEEDS[method][1:]:
                one(args, task, method, (best["lr"],), best["settings"]["training"]["weight_decay"], seed)
            record(args)


def decays(method: str) -> tuple[float, ...]:
    return DECAYS if method in EPOCHS else DECAYS[:1]


def one(args: argparse.Namespace, task: str, method: str, rates: tuple[float, ...], decay: float, seed: int) -> dict:
    out = folder(args, task, method, decay, seed)
    if (out / RESULT).exists():
        return json.loads((out / RESULT).read_text())
    spec, side, train, test = TASKS[task]
    run = Run(
        data=spec.format(args.data),
        method=method,
        backbone=STAGES,
        weights=str(args.data / "resnet18_in1k_stage123/model.safetensors"),
        image_size=side,
        train_size=train,
        val_size=500 if len(rates) > 1 else 0,
        test_size=test,
        lrs=rates,
        training=TrainConfig(epochs=EPOCHS.get(method, 8), weight_decay=decay, batch_size=BATCH, seed=seed),
    )
    result = execute(run, out, resume=(out / RUN).exists())
    seconds = statistics.median(e["seconds"] for e in result.pop("epochs"))
    more = {"epoch_seconds": seconds, "saved_bytes": kept_for_backward(run), "commit": commit()}
    (out / RESULT).write_text(json.dumps({**result, **more}, indent=2) + "\n")
    print(
        f"{task}, {method}, decay {decay}, seed {seed}: {result['test_accuracy']:.2f} % at lr {result['lr']}",
        flush=True,
    )
    return result


def folder(args: argparse.Namespace, task: str, method: str, decay: float, seed: int) -> Path:
    return args.out / f"{task}-{method}-{decay:g}-{seed}"


def kept_for_backward(run: Run) -> int:
    """Bytes that autograd keeps for one batch."""
    tuned = adapt(load_backbone(run.backbone, "random"), run.method, 10).train()
    x = torch.randn(BATCH, 3, run.image_size, run.image_size)
    return saved_bytes(lambda: tuned(x), tuned.parameters())


def record(args: argparse.Namespace) -> None:
    """Both files, from what is done so far."""
    rows = []
    for task in TASKS:
        for method in RATES:
            for decay in decays(method):  # the one that was chosen has all seeds
                seeds = SEEDS[method]
                files = [folder(args, task, method, decay, seed) / RESULT for seed in seeds]
                if all(file.exists() for file in files):
                    found = [json.loads(file.read_text()) for file in files]
                    rows += [
                        {"task": task, "method": method, "seed": s, **f} for s, f in zip(seeds, found, strict=True)
                    ]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "resnet.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = []
    for task, (_, side, train, test) in TASKS.items():
        mine = [r for r in rows if r["task"] == task]
        if not mine:
            continue
        table += [
            f"## {task}, {side} x {side}: {train:,} training, {test:,} test images",
            "",
            "| method | reads | test accuracy | seeds | epochs | rate | decay | trained | kept, MiB | s an epoch |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for method in RATES:
            same = [r for r in mine if r["method"] == method]
            if not same:
                continue
            found, first = [r["test_accuracy"] for r in same], same[0]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells = [
                method,
                "kept features" if first["kept_features"] else "images",
                f"{statistics.fmean(found):.2f}{spread}",
                str(len(found)),
                str(first["settings"]["training"]["epochs"]),
                f"{first['lr']:g}",
                f"{first['settings']['training']['weight_decay']:g}",
                f"{first['parameters']['trainable']:,}",
                f"{first['saved_bytes'] / 2**20:.2f}",
                f"{statistics.median(r['epoch_seconds'] for r in same):.1f}",
            ]
            table.append(f"| {' | '.join(cells)} |")
        table.append("")
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    text = f"""# Three stages of a real ResNet-18

`{STAGES}`: a ResNet-18 up to its third stage, pretrained on ImageNet, batch norms folded. No augmentation, batch
{BATCH}, the last epoch. Every head reads the mean over the last stage.
`bypass` runs over the three stages. Rates (two each, but for `lora` and `full`) and, for `linear` and `bypass`, weight
decays ({", ".join(map(str, DECAYS))}) were chosen with seed 0 on 500 of the training images. Kept for backward: of one
batch.

{chr(10).join(table)}
Command: `python scripts/bench_resnet.py`; commits {commits}; torch {rows[0]["versions"]["torch"]}, CPU,
{torch.get_num_threads()} thread(s), other work beside it. Every figure with its settings: `resnet.jsonl`.
"""
    (args.results / "resnet.md").write_text(text)


if __name__ == "__main__":
    main()
