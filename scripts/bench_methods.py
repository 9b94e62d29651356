"""Every method on a real ImageNet ViT-Ti/16: EuroSAT and sprite location, 1,000 training images each.

python scripts/bench_methods.py [--data ../shared/data] [--image-size 96]

Every method has two learning rates, chosen between on 200 of the 1,000 training images; then it is trained again on all
of them and tested once, at the last epoch. Killed, it goes on where it was. Writes methods.jsonl, .md and .png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bench_vit_tiny import TASKS, commit, folder

import restuning as rt
from restuning.runs.run import execute
from restuning.runs.settings import RESULT, RUN, Run
from restuning.training.config import TrainConfig
from restuning.utils.profiling import saved_bytes

BESIDE = (50, (0.005, 0.001))  # a side path, from features kept in memory: epochs, learning rates
INSIDE = (6, (0.005, 0.001))  # a pass through the backbone and back in every step
PLAN: dict[str, tuple[int, tuple[float, ...]]] = {
    "linear": BESIDE,
    "bypass-none": BESIDE,
    "bypass-horizontal": BESIDE,
    "bypass-vertical": BESIDE,
    "bypass": (50, (0.01, 0.005)),
    "bypass-mean": (50, (0.005, 0.002)),
    "bypass-grid2": (50, (0.005, 0.002)),
    "bypass-grid4": (50, (0.005, 0.002)),
    "ladder-grid4": (50, (0.005, 0.002)),
    "lora": INSIDE,
    "res-tuning": INSIDE,
    "dtl": INSIDE,
    "lst": BESIDE,
    "prefix": (6, (0.02, 0.005)),
    "adapter-houlsby": (6, (0.002, 0.001)),
    "ssf": INSIDE,
    "vpt-deep": (6, (0.01, 0.005)),
    "res-tuning-single": INSIDE,
    "convpass": INSIDE,
    "adaptformer": INSIDE,
    "bitfit": INSIDE,
    "dtl-plus": INSIDE,
    "noah": INSIDE,
    "mam-adapter": INSIDE,
    "res-tuning-tri": INSIDE,
    "adapter": INSIDE,
    "adapter-pfeiffer": INSIDE,
    "vpt-shallow": (6, (0.02, 0.005)),
    "side-tuning": (10, (0.001, 0.0003)),
    "full": (6, (0.0003, 0.0001)),
}
CHEAP = {method for method, (epochs, _) in PLAN.items() if epochs >= 10}
CHOSEN = ("sprite location", "EuroSAT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--methods", nargs="+", choices=PLAN, default=list(PLAN))
    args = parser.parse_args()
    assert set(PLAN) == set(rt.METHODS), set(rt.METHODS) ^ set(PLAN)
    for method in args.methods:
        for task in CHOSEN:
            epochs, rates = PLAN[method]
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
                training=TrainConfig(epochs=epochs),
            )
            out = folder(args.out, task, method)
            if not (out / RESULT).exists():
                result = execute(run, out, resume=(out / RUN).exists())
                (out / RESULT).write_text(json.dumps({**result, "commit": commit()}, indent=2) + "\n")
                print(f"{task}, {method}: {result['test_accuracy']:.2f} % at lr {result['lr']}", flush=True)
    record(args)


def record(args: argparse.Namespace) -> None:
    """The three files, from what is done so far."""
    rows: list[dict[str, Any]] = []
    for method in PLAN:
        for task in CHOSEN:
            done = folder(args.out, task, method) / RESULT
            if done.exists():
                rows.append({"task": task, "method": method, **json.loads(done.read_text())})
    lines = [json.dumps({k: v for k, v in row.items() if k != "epochs"}) for row in rows]
    (args.results / "methods.jsonl").write_text("\n".join(lines) + "\n")
    found = {(row["task"], row["method"]): row for row in rows}
    shown = [method for method in PLAN if any((task, method) in found for task in CHOSEN)]
    memory = {method: kept_for_backward(method, args.image_size) for method in shown}
    table = [
        f"| method | epochs | trained, head apart | MiB kept for backward | {' | '.join(CHOSEN)} |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for method in sorted(shown, key=lambda m: -sum(found[t, m]["test_accuracy"] for t in CHOSEN if (t, m) in found)):
        cells = []
        for task in CHOSEN:
            row = found.get((task, method))
            cells.append("–" if row is None else f"{row['test_accuracy']:.1f} (lr {row['lr']})")
        trained = next(row["parameters"]["tuners"] for row in rows if row["method"] == method)
        memory_text = f"{memory[method] / 2**20:.2f}"
        table.append(f"| {method} | {PLAN[method][0]} | {trained:,} | {memory_text} | {' | '.join(cells)} |")
    side, first = args.image_size, rows[0]
    text = f"""# Every method on a real ViT-Ti/16, 1,000 training images

Test accuracy in percent on 1,500 images, at the last epoch; one seed; images of {side} x {side} (position embeddings
interpolated), no augmentation, batch 32, CLS head for all. Of two learning rates one was chosen on 200 of the 1,000
training images, then the method was trained again on all of them. Where that diverged, as the training loss told
(vpt-deep at 0.02, adapter-houlsby at 0.005), lower rates were tried instead. Methods that run backwards through the
backbone had few epochs, for a CPU's sake: their order is that of short training. Kept for backward: bytes that autograd
saves at batch 8, each storage once, parameters left out. Best mean first; – was not run.

![accuracy against parameters and against memory](methods.png)

{chr(10).join(table)}

Command: `python scripts/bench_methods.py --image-size {side}`; commit {first["commit"]}; torch
{first["versions"]["torch"]}, CPU. Every figure with its settings: `methods.jsonl`.
"""
    (args.results / "methods.md").write_text(text)
    picture(args.results / "methods.png", found, memory)


def kept_for_backward(method: str, side: int) -> int:
    """Bytes that autograd saves for one training step at batch 8, parameters left out."""
    tuned = rt.adapt(rt.load_backbone("vit_tiny_patch16_224", "random", side), method, 10).train()
    x, labels = torch.randn(8, 3, side, side), torch.arange(8)
    return saved_bytes(lambda: tuned(x, labels=labels)["loss"], tuned.parameters())


def picture(path: Path, found: dict[tuple[str, str], dict[str, Any]], memory: dict[str, int]) -> None:
    """Like the paper's Figure 4: accuracy against parameters (left) and against memory (right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(CHOSEN), 2, figsize=(13, 5.2 * len(CHOSEN)), sharey="row")
    for (task, method), row in found.items():
        ours = method.startswith(("res-tuning", "bypass"))
        mark = {"color": "black" if ours else "0.55", "marker": "o" if method in CHEAP else "^"}
        for axis, x in zip(
            axes[CHOSEN.index(task)],
            (max(row["parameters"]["tuners"], 10), memory[method] / 2**20),
            strict=True,
        ):
            axis.scatter(x, row["test_accuracy"], s=34, **mark)
            axis.annotate(
                method,
                (x, row["test_accuracy"]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
                weight="bold" if ours else "normal",
            )
    for task, pair in zip(CHOSEN, axes, strict=True):
        pair[0].set_ylabel(f"{task}: test accuracy, %")
        for axis, label in zip(pair, ("parameters, head apart", "MiB kept for backward, batch 8"), strict=True):
            axis.set_xscale("log")
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
    figure.suptitle("ViT-Ti/16, 1,000 images; circles: beside the backbone, triangles: inside it; black: Res-Tuning")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
