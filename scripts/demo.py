"""Tune the bundled backbone on small tasks by linear probing, bypass and res-tuning: a table and a picture.

python scripts/demo.py [--out runs/demo]      two tasks, 300 pictures; needs no network
python scripts/demo.py --full                 three tasks and 1,000 pictures, as in docs/demo.png

Real pictures, satellite photographs of EuroSAT, where DATA has them (--data-root), else handwritten digits; and drawn
shapes to be counted.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from restuning.runs.run import execute
from restuning.runs.settings import Run
from restuning.training.config import TrainConfig

EUROSAT = "eurosat/eurosat_rgb64_every6th.tar"
FULL = {"digits": "digits", "sprites:location": "sprite location", "sprites:orientation": "sprite orientation"}
METHODS = {  # method: epochs, learning rate and batch; the first two train from kept features
    "linear": (60, 0.01, 32),
    "bypass": (60, 0.01, 32),
    "res-tuning": (9, 0.005, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    out: Path = args.out
    real = args.data_root / EUROSAT
    first = {f"tar:{real}": "satellite photographs"} if real.exists() else {"digits": "digits"}
    tasks = FULL if args.full else {**first, "sprites:count": "counting shapes"}
    train_size, test_size = (1000, 500) if args.full else (300, 100)
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    found: dict[tuple[str, str], dict] = {}
    for task, name in tasks.items():
        for method, (epochs, lr, batch) in METHODS.items():
            if method == "res-tuning" and not args.full:
                epochs, batch = 3, 8  # few pictures: more steps in the same time
            run = Run(
                data=task,
                method=method,
                train_size=train_size,
                test_size=test_size,
                lrs=(lr,),
                training=TrainConfig(epochs=epochs, lr=lr, batch_size=batch),
            )
            found[task, method] = execute(run, folder(out, name, method), progress=sys.stderr.isatty())
            print(f"{name}, {method}: {found[task, method]['test_accuracy']:.1f} %", flush=True)
    table = Table(
        title=f"restuning-micro, {train_size:,} training images, {test_size} test images "
        f"({time.perf_counter() - start:.0f} s)"
    )
    for column in ("task", *METHODS):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, name in tasks.items():
        table.add_row(name, *(f"{found[task, m]['test_accuracy']:.1f} %" for m in METHODS))
    table.add_row("trained", *(f"{found[next(iter(tasks)), m]['parameters']['trainable']:,}" for m in METHODS))
    Console().print(table)
    picture(found, tasks, train_size, out / "demo.png")
    print(f"picture: {out / 'demo.png'}; tuned files: {out}/*/adapter_model.safetensors")
    print(f"next: .venv/bin/restuning evaluate {folder(out, next(iter(tasks.values())), 'bypass')} --per-class")
    print(
        "your own pictures, a folder for each class: .venv/bin/restuning train --data folder:PHOTOS --out runs/photos"
    )


def folder(out: Path, name: str, method: str) -> Path:
    return out / f"{name.replace(' ', '-')}-{method}"


def picture(found: dict[tuple[str, str], dict], tasks: dict[str, str], train_size: int, path: Path) -> None:
    """Accuracy by task and method as grouped bars, told apart by hatching too."""
    figure, axes = plt.subplots(figsize=(8, 4))
    for i, (method, hatch) in enumerate(zip(METHODS, ("", "//", "xx"), strict=True)):
        heights = [found[task, method]["test_accuracy"] for task in tasks]
        places = [x + 0.27 * (i - 1) for x in range(len(tasks))]
        shade = ("#d9d9d9", "#7fb0d8", "#2b5f8a")[i]
        bars = axes.bar(places, heights, 0.25, label=method, hatch=hatch, color=shade, edgecolor="black")
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axes.set_xticks(range(len(tasks)), list(tasks.values()))
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 108)
    axes.set_title(f"A frozen 1.6M-parameter ViT, {train_size:,} training images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
