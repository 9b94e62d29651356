"""Tune the bundled backbone on three small tasks by linear probing, bypass and res-tuning: a table and a picture.

python scripts/demo.py [--out runs/demo]      under five minutes on two cores; needs no network
"""

import argparse
import shutil
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

TASKS = {"digits": "digits", "sprites:location": "sprite location", "sprites:orientation": "sprite orientation"}
METHODS = {  # method: epochs and learning rate; the first two train from kept features
    "linear": (60, 0.01),
    "bypass": (60, 0.01),
    "res-tuning": (9, 0.005),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    out: Path = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    found: dict[tuple[str, str], dict] = {}
    for task in TASKS:
        for method, (epochs, lr) in METHODS.items():
            run = Run(
                data=task,
                method=method,
                train_size=1000,
                test_size=500,
                lrs=(lr,),
                training=TrainConfig(epochs=epochs, lr=lr),
            )
            found[task, method] = execute(run, out / f"{task.replace(':', '-')}-{method}", progress=True)
    table = Table(
        title=f"restuning-micro, 1,000 training images, 500 test images ({time.perf_counter() - start:.0f} s)"
    )
    for column in ("task", *METHODS):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, name in TASKS.items():
        table.add_row(name, *(f"{found[task, m]['test_accuracy']:.1f} %" for m in METHODS))
    table.add_row("trained", *(f"{found['digits', m]['parameters']['trainable']:,}" for m in METHODS))
    Console().print(table)
    picture(found, out / "demo.png")
    print(f"picture: {out / 'demo.png'}; tuned files: {out}/*/adapter_model.safetensors")


def picture(found: dict[tuple[str, str], dict], path: Path) -> None:
    """Accuracy by task and method as grouped bars, told apart by hatching too."""
    figure, axes = plt.subplots(figsize=(8, 4))
    for i, (method, hatch) in enumerate(zip(METHODS, ("", "//", "xx"), strict=True)):
        heights = [found[task, method]["test_accuracy"] for task in TASKS]
        places = [x + 0.27 * (i - 1) for x in range(len(TASKS))]
        shade = ("#d9d9d9", "#7fb0d8", "#2b5f8a")[i]
        bars = axes.bar(places, heights, 0.25, label=method, hatch=hatch, color=shade, edgecolor="black")
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axes.set_xticks(range(len(TASKS)), TASKS.values())
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 108)
    axes.set_title("A frozen 1.6M-parameter ViT, 1,000 training images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
