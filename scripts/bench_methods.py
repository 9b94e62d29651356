"""Every method on a real ImageNet ViT-Ti/16: EuroSAT and sprite location, 1,000 training images each.

python scripts/bench_methods.py [--data ../shared/data] [--image-size 96]

Every method has two learning rates, chosen between on 200 of the 1,000 training images; then it is trained again on all
of them and tested once, at the last epoch. Killed, it goes on where it was. Writes methods.jsonl, .md and .png.
"""

import argparse
import json
from pathlib import Path

from bench_vit_tiny import TASKS, commit, folder

import restuning as rt
from restuning.recipe import TrainConfig
from restuning.run import RESULT, RUN, Run, execute

BESIDE = (50, (0.005, 0.001))  # a side path, from features kept in memory: epochs, learning rates
INSIDE = (6, (0.005, 0.001))  # a pass through the backbone and back in every step
PLAN: dict[str, tuple[int, tuple[float, ...]]] = {
    "linear": BESIDE,
    "bypass-none": BESIDE,
    "bypass-horizontal": BESIDE,
    "bypass-vertical": BESIDE,
    "bypass": (50, (0.01, 0.005)),
    "lora": INSIDE,
    "res-tuning": INSIDE,
    "dtl": INSIDE,
    "lst": BESIDE,
    "prefix": (6, (0.02, 0.005)),
    "adapter-houlsby": INSIDE,
    "ssf": INSIDE,
    "vpt-deep": (6, (0.02, 0.005)),
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
CHOSEN = ("sprite location", "EuroSAT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", nargs="+", choices=PLAN, default=list(PLAN))
    args = parser.parse_args()
    assert set(PLAN) == set(rt.methods), set(rt.methods) ^ set(PLAN)
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


if __name__ == "__main__":
    main()
