"""Does keeping derivatives in 8 bits cost accuracy? A real ImageNet ViT-Ti/16, two tasks, `plain` beside `compact`.

Res-Tuning on 1,000 training images of 96 × 96 pixels, 8 epochs, rate 0.005, tested once, at the last epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from restuning.paper.experiments.measured import Place, mean, table, trained
from restuning.paper.results import Record
from restuning.runs.settings import Run
from restuning.training.config import TrainConfig

TASKS = {
    "EuroSAT": "tar:{}/eurosat/eurosat_rgb64_every6th.tar",
    "Caltech-101": "tar:{}/caltech101/caltech101_short128_max40.tar",
}
MODES = ("plain", "compact")


@dataclass(frozen=True)
class MemoryAccuracy:
    """Two modes on two tasks.

    Args:
        seeds: how many, from 0.
        test: images of each test.
    """

    seeds: int = 3
    test: int = 1500

    def run(self, place: Place) -> Iterator[Record]:
        for seed in range(self.seeds):
            for task, data in TASKS.items():
                for mode in MODES:
                    run = Run(
                        data=data.format(place.data),
                        method="res-tuning",
                        backbone="vit_tiny_patch16_224",
                        weights=f"{place.data}/vit_tiny_patch16_224_in1k/model.safetensors",
                        image_size=96,
                        train_size=1000,
                        test_size=self.test,
                        lrs=(0.005,),
                        training=TrainConfig(epochs=8, seed=seed),
                        memory=mode,
                    )
                    done = trained(run, place.out / f"{task}-{mode}-{seed}")
                    yield {"task": task, "memory": mode, "seed": seed, **done}

    def text(self, records: Sequence[Record]) -> str:
        rows = []
        for task in TASKS:
            found = {
                mode: [r["test_accuracy"] for r in records if (r["task"], r["memory"]) == (task, mode)]
                for mode in MODES
            }
            if all(found.values()):
                apart = (f"{c - p:+.2f}" for p, c in zip(*(found[mode] for mode in MODES), strict=False))
                rows.append([task, *(mean(found[mode]) for mode in MODES), ", ".join(apart)])
        return f"""# Derivatives in 8 bits: accuracy

Res-Tuning on an ImageNet ViT-Ti/16, 96 × 96 pixels, 1,000 training and {self.test:,} test images, 8 epochs, rate
0.005, the last epoch; test accuracy in percent, mean ± standard deviation over {self.seeds} seeds.

{table(["task", *MODES, "compact − plain, seed by seed"], rows)}"""
