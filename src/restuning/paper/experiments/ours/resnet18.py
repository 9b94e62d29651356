"""Three real stages of an ImageNet ResNet-18 on EuroSAT and Caltech-101: the order of the paper's Table 16.

Every head reads the mean over all positions of the last stage. A method's rate (and, beside the backbone, its weight
decay) is chosen once, with seed 0, on 500 of the training images; then it is trained on all of them with three seeds,
and tested once each, at the last epoch. LoRA and full fine-tuning have one rate and one seed.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from restuning.backbones.load import STAGES
from restuning.paper.experiments.measured import Place, kept_of_images, mean, mib, table, trained
from restuning.paper.results import Record
from restuning.runs.settings import Run
from restuning.training.config import TrainConfig

TASKS = {  # where, pixels a side, training and test images
    "EuroSAT": ("tar:{}/eurosat/eurosat_rgb64_every6th.tar", 64, 3000, 1500),
    "Caltech-101": ("tar:{}/caltech101/caltech101_short128_max40.tar", 96, 2500, 1500),
}
PLAN: dict[str, tuple[int, tuple[float, ...], tuple[float, ...], tuple[int, ...]]] = {  # epochs, rates, decays, seeds
    "linear": (30, (0.01, 0.003), (0.05, 0.5), (0, 1, 2)),
    "bypass": (30, (0.02, 0.01), (0.05, 0.5), (0, 1, 2)),
    "res-tuning": (8, (0.01, 0.005), (0.05,), (0, 1, 2)),
    "lora": (8, (0.005,), (0.05,), (0,)),
    "full": (8, (0.0005,), (0.05,), (0,)),
}
BATCH = 32


@dataclass(frozen=True)
class ResNet18:
    """Five methods on two tasks."""

    def run(self, place: Place) -> Iterator[Record]:
        for task in TASKS:
            for method, (_, rates, decays, seeds) in PLAN.items():
                tried = [self._one(place, task, method, rates, decay, 0) for decay in decays]
                best = max(tried, key=lambda r: max(r["validation_score"].values(), default=0.0))
                yield best
                decay = best["settings"]["training"]["weight_decay"]
                yield from (self._one(place, task, method, (best["lr"],), decay, seed) for seed in seeds[1:])

    def _one(self, place: Place, task: str, method: str, rates: tuple[float, ...], decay: float, seed: int) -> Record:
        spec, side, train, test = TASKS[task]
        run = Run(
            data=spec.format(place.data),
            method=method,
            backbone=STAGES,
            weights=f"{place.data}/resnet18_in1k_stage123/model.safetensors",
            image_size=side,
            train_size=train,
            val_size=500 if len(rates) > 1 else 0,
            test_size=test,
            lrs=rates,
            training=TrainConfig(epochs=PLAN[method][0], weight_decay=decay, batch_size=BATCH, seed=seed),
        )
        out = place.out / f"{task}-{method}-{decay:g}-{seed}"
        done = trained(run, out, partial(kept_of_images, STAGES, method, side, BATCH))
        return {"task": task, "method": method, "seed": seed, **done}

    def text(self, records: Sequence[Record]) -> str:
        columns = ["method", "reads", "test accuracy", "seeds", "epochs", "rate", "decay"]
        columns += ["trained", "kept, MiB", "s an epoch"]
        parts = [
            f"""# Three stages of a real ResNet-18

`{STAGES}`: a ResNet-18 up to its third stage, pretrained on ImageNet, batch norms folded. No augmentation, batch
{BATCH}, the last epoch. Every head reads the mean over the last stage; `bypass` runs over the three stages. Rates (two
each, but for `lora` and `full`) and, for `linear` and `bypass`, weight decays (0.05, 0.5) were chosen with seed 0 on
500 of the training images. Kept for backward: of one batch."""
        ]
        for task, (_, side, train, test) in TASKS.items():
            rows = []
            for method in PLAN:
                same = [r for r in records if (r["task"], r["method"]) == (task, method)]
                for first in same[:1]:
                    training = first["settings"]["training"]
                    rows.append(
                        [
                            method,
                            "kept features" if first["kept_features"] else "images",
                            mean([r["test_accuracy"] for r in same]),
                            str(len(same)),
                            str(training["epochs"]),
                            f"{first['lr']:g}",
                            f"{training['weight_decay']:g}",
                            f"{first['parameters']['trainable']:,}",
                            mib(first["saved_bytes"]),
                            f"{statistics.median(r['epoch_seconds'] for r in same):.1f}",
                        ]
                    )
            if rows:
                title = f"## {task}, {side} x {side}: {train:,} training, {test:,} test images"
                parts += [title, table(columns, rows)]
        return "\n\n".join(parts)
