"""Linear probing, bypass and res-tuning on a real ImageNet ViT-Ti/16: four tasks, 1,000 training images each.

python scripts/bench_vit_tiny.py [--data ../shared/data] [--image-size 96]

Every method's learning rate is chosen on 200 of the 1,000 training images; then it is trained again on all of them
and tested once, at the last epoch. Killed, it goes on where it was. Writes docs/results/vit_tiny.jsonl and .md.
"""

import argparse
import json
import subprocess
from pathlib import Path

from restuning.runs.run import execute
from restuning.runs.settings import RESULT, RUN, Run
from restuning.training.config import TrainConfig

RATES = (0.01, 0.005, 0.001)
TASKS = {
    "EuroSAT": "tar:{}/eurosat/eurosat_rgb64_every6th.tar",
    "Caltech-101": "tar:{}/caltech101/caltech101_short128_max40.tar",
    "sprite location": "sprites:location",
    "sprite orientation": "sprites:orientation",
}
EPOCHS = {"linear": 100, "bypass-none": 100, "bypass": 100, "res-tuning": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("runs/vit_tiny"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    args = parser.parse_args()
    for method in args.methods:
        for task in args.tasks:
            rates = RATES if method != "res-tuning" else RATES[:2]
            run = Run(
                data=TASKS[task].format(args.data),
                method=method,
                backbone="vit_tiny_patch16_224",
                weights=str(args.data / "vit_tiny_patch16_224_in1k/model.safetensors"),
                image_size=args.image_size,
                train_size=1000,
                val_size=200,
                test_size=1500,
                lrs=rates,
                training=TrainConfig(epochs=EPOCHS[method]),
            )
            out = folder(args.out, task, method)
            if not (out / RESULT).exists():
                result = execute(run, out, resume=(out / RUN).exists())
                (out / RESULT).write_text(json.dumps({**result, "commit": commit()}, indent=2) + "\n")
                print(f"{task}, {method}: {result['test_accuracy']:.2f} % at lr {result['lr']}", flush=True)
    record(args)


def folder(out: Path, task: str, method: str) -> Path:
    return out / f"{task.replace(' ', '-')}-{method}"


def record(args: argparse.Namespace) -> None:
    """Both files, from what is done so far."""
    args.results.mkdir(parents=True, exist_ok=True)
    tasks, rows = list(TASKS), []
    for method in EPOCHS:
        for task in tasks:
            done = folder(args.out, task, method) / RESULT
            if done.exists():
                rows.append({"task": task, "method": method, **json.loads(done.read_text())})
    lines = [json.dumps({k: v for k, v in row.items() if k != "epochs"}) for row in rows]
    (args.results / "vit_tiny.jsonl").write_text("\n".join(lines) + "\n")
    found = {(row["task"], row["method"]): row for row in rows}
    methods = [m for m in EPOCHS if any(row["method"] == m for row in rows)]
    table = [f"| method | epochs | trained | {' | '.join(tasks)} |", f"|---|--:|--:|{'--:|' * len(tasks)}"]
    for m in methods:
        cells = [
            f"{found[t, m]['test_accuracy']:.1f} (lr {found[t, m]['lr']})" if (t, m) in found else "–" for t in tasks
        ]
        trained = next(r["parameters"] for r in rows if r["method"] == m)
        table.append(f"| {m} | {EPOCHS[m]} | {trained['tuners']:,} + head | {' | '.join(cells)} |")
    first = rows[0]
    seed, side = first["settings"]["training"]["seed"], args.image_size
    text = f"""# A real ViT-Ti/16, 1,000 training images

Test accuracy in percent on 1,500 images, at the last epoch; seed {seed}; images resized to {side} x {side} (position
embeddings interpolated), no augmentation, batch 32, CLS head for all. Each rate was chosen on 200 of the 1,000 training
images, then the method was trained again on all of them.

{chr(10).join(table)}

Command: `python scripts/bench_vit_tiny.py --image-size {args.image_size}`; commit {first["commit"]};
torch {first["versions"]["torch"]}, CPU. Every figure with its settings: `vit_tiny.jsonl`.
"""
    (args.results / "vit_tiny.md").write_text(text)


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
