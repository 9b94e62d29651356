"""Does keeping derivatives in 8 bits cost accuracy? A real ImageNet ViT-Ti/16, two tasks, `plain` beside `compact`.

python scripts/bench_memory_accuracy.py [--data ../shared/data] [--seeds 0 1 2]

Res-Tuning on 1,000 training images of 96 x 96 pixels, 8 epochs, lr 0.005, tested once on 1,500 images, at the last
epoch. Killed, it goes on where it was. Writes docs/results/memory_accuracy.jsonl and .md.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from restuning.runs.run import execute
from restuning.runs.settings import RESULT, RUN, Run
from restuning.training.config import TrainConfig

TASKS = {
    "EuroSAT": "tar:{}/eurosat/eurosat_rgb64_every6th.tar",
    "Caltech-101": "tar:{}/caltech101/caltech101_short128_max40.tar",
}
MODES = ("plain", "compact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/memory_accuracy"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for task, data in TASKS.items():
            for mode in MODES:
                run = Run(
                    data=data.format(args.data),
                    method="res-tuning",
                    backbone="vit_tiny_patch16_224",
                    weights=str(args.data / "vit_tiny_patch16_224_in1k/model.safetensors"),
                    image_size=96,
                    train_size=1000,
                    test_size=1500,
                    lrs=(0.005,),
                    training=TrainConfig(epochs=8, seed=seed),
                    memory=mode,
                )
                out = args.out / f"{task}-{mode}-{seed}"
                if not (out / RESULT).exists():
                    execute(run, out, resume=(out / RUN).exists(), progress=False)
                result = json.loads((out / RESULT).read_text())
                rows.append({"task": task, "memory": mode, "seed": seed, "commit": commit.strip(), **result})
                print(f"{task}, {mode}, seed {seed}: {result['test_accuracy']:.2f} %", flush=True)
    record(rows, args.results)


def record(rows: list[dict[str, Any]], results: Path) -> None:
    """Both files."""
    lines = [
        "# Res-Tuning with derivatives in 8 bits",
        "",
        "Test accuracy in percent, mean ± standard deviation over the seeds; ViT-Ti/16 of ImageNet, 96 x 96 pixels,",
        "1,000 training and 1,500 test images, 8 epochs, lr 0.005.",
        "Command: `python scripts/bench_memory_accuracy.py`; commit",
        f"{rows[0]['commit']}; torch {rows[0]['versions']['torch']}, CPU. Every run with its settings:",
        "`memory_accuracy.jsonl`.",
        "",
        "| task | plain | compact | difference, seed by seed |",
        "|---|--:|--:|--:|",
    ]
    for task in TASKS:
        at = {mode: [r["test_accuracy"] for r in rows if (r["task"], r["memory"]) == (task, mode)] for mode in MODES}
        cells = [f"{statistics.fmean(a):.2f} ± {statistics.stdev(a) if len(a) > 1 else 0:.2f}" for a in at.values()]
        more = ", ".join(f"{c - p:+.2f}" for p, c in zip(at["plain"], at["compact"], strict=True))
        lines.append(f"| {task} | {' | '.join(cells)} | {more} |")
    (results / "memory_accuracy.md").write_text("\n".join(lines) + "\n")
    (results / "memory_accuracy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
