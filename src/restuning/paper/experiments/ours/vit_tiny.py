"""An ImageNet ViT-Ti/16 and 1,000 training images of each task: some methods on four tasks, and all of them on two.

A method's rate is chosen on 200 of the training images; then it is trained again on all of them, and tested once, at
the last epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from restuning.paper.experiments.measured import Place, kept_of_images, mib, table, trained
from restuning.paper.results import Record
from restuning.runs.settings import Run
from restuning.training.config import TrainConfig
from restuning.utils.figures import pyplot

BACKBONE = "vit_tiny_patch16_224"
TASKS = {
    "EuroSAT": "tar:{}/eurosat/eurosat_rgb64_every6th.tar",
    "Caltech-101": "tar:{}/caltech101/caltech101_short128_max40.tar",
    "sprite location": "sprites:location",
    "sprite orientation": "sprites:orientation",
}
Plan = Mapping[str, tuple[int, tuple[float, ...]]]  # epochs, rates

SHORT: Plan = {
    **dict.fromkeys(("linear", "bypass-none", "bypass"), (100, (0.01, 0.005, 0.001))),
    "res-tuning": (10, (0.01, 0.005)),
}
_BESIDE = (50, (0.005, 0.001))  # a side path, from features kept in memory
_INSIDE = (6, (0.005, 0.001))  # a pass through the backbone and back in every step
ALL: Plan = {
    **dict.fromkeys(("linear", "bypass-none", "bypass-horizontal", "bypass-vertical"), _BESIDE),
    "bypass": (50, (0.01, 0.005)),
    **dict.fromkeys(("bypass-mean", "bypass-grid2", "bypass-grid4", "ladder-grid4"), (50, (0.005, 0.002))),
    **dict.fromkeys(("lora", "res-tuning", "dtl"), _INSIDE),
    "lst": _BESIDE,
    "prefix": (6, (0.02, 0.005)),
    "adapter-houlsby": (6, (0.002, 0.001)),
    "ssf": _INSIDE,
    "vpt-deep": (6, (0.01, 0.005)),
    **dict.fromkeys(("res-tuning-single", "convpass", "adaptformer", "bitfit", "dtl-plus", "noah"), _INSIDE),
    **dict.fromkeys(("mam-adapter", "res-tuning-tri", "adapter", "adapter-pfeiffer"), _INSIDE),
    "vpt-shallow": (6, (0.02, 0.005)),
    "side-tuning": (10, (0.001, 0.0003)),
    "full": (6, (0.0003, 0.0001)),
}


@dataclass(frozen=True)
class VitTiny:
    """Some methods on four tasks."""

    image_size: int = 96
    plan: ClassVar[Plan] = SHORT
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)
    title: ClassVar[str] = "A real ViT-Ti/16, 1,000 training images"
    note: ClassVar[str] = ""

    def run(self, place: Place) -> Iterator[Record]:
        for method, (epochs, rates) in self.plan.items():
            for task in self.tasks:
                run = Run(
                    data=TASKS[task].format(place.data),
                    method=method,
                    backbone=BACKBONE,
                    weights=f"{place.data}/vit_tiny_patch16_224_in1k/model.safetensors",
                    image_size=self.image_size,
                    train_size=1000,
                    val_size=200,
                    test_size=1500,
                    lrs=rates,
                    training=TrainConfig(epochs=epochs),
                )
                more = partial(kept_of_images, BACKBONE, method, self.image_size, 8)
                done = trained(run, place.out / f"{task.replace(' ', '-')}-{method}", more)
                yield {"task": task, "method": method, **done}

    def text(self, records: Sequence[Record]) -> str:
        found = {(r["task"], r["method"]): r for r in records}
        scores = {m: [found[t, m]["test_accuracy"] for t in self.tasks if (t, m) in found] for m in self.plan}
        rows = []
        for method in sorted(filter(scores.__getitem__, self.plan), key=lambda m: -sum(scores[m])):
            mine = [found.get((task, method)) for task in self.tasks]
            first = next(r for r in mine if r is not None)
            kept = mib(first["saved_bytes"]) if "saved_bytes" in first else ""
            cells = ["–" if r is None else f"{r['test_accuracy']:.1f} (lr {r['lr']})" for r in mine]
            rows.append([method, str(self.plan[method][0]), f"{first['parameters']['tuners']:,}", kept, *cells])
        return f"""# {self.title}

Test accuracy in percent on 1,500 images, at the last epoch; one seed; images of {self.image_size} x {self.image_size}
(position embeddings interpolated), no augmentation, batch 32, CLS head for all. A rate was chosen on 200 of the 1,000
training images, then the method was trained again on all of them.{self.note} Kept for backward: bytes that autograd
saves at batch 8, each storage once, parameters left out. Best mean first; – was not run.

{table(["method", "epochs", "trained, head apart", "MiB kept for backward", *self.tasks], rows)}"""

    def picture(self, place: Place, records: Sequence[Record], file: Path) -> None:
        """Like the paper's Figure 4: accuracy against parameters (left) and against memory (right)."""
        plt = pyplot()
        figure, axes = plt.subplots(len(self.tasks), 2, figsize=(13, 5.2 * len(self.tasks)), sharey="row")
        for row in records:
            ours = row["method"].startswith(("res-tuning", "bypass"))
            beside = self.plan[row["method"]][0] >= 10
            mark = {"color": "black" if ours else "0.55", "marker": "o" if beside else "^"}
            xs = max(row["parameters"]["tuners"], 10), row["saved_bytes"] / 2**20
            for axis, x in zip(axes[self.tasks.index(row["task"])], xs, strict=True):
                at, weight = (x, row["test_accuracy"]), "bold" if ours else "normal"
                axis.scatter(*at, s=34, **mark)
                text = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 7, "weight": weight}
                axis.annotate(row["method"], at, **text)
        for task, pair in zip(self.tasks, axes, strict=True):
            pair[0].set_ylabel(f"{task}: test accuracy, %")
            for axis, label in zip(pair, ("parameters, head apart", "MiB kept for backward, batch 8"), strict=True):
                axis.set(xscale="log", xlabel=label)
                axis.grid(alpha=0.3)
        figure.suptitle(
            "ViT-Ti/16, 1,000 images; circles: beside the backbone, triangles: inside it; black: Res-Tuning"
        )
        figure.tight_layout()
        figure.savefig(file, dpi=110)
        plt.close(figure)


@dataclass(frozen=True)
class Methods(VitTiny):
    """Every method on two tasks."""

    plan: ClassVar[Plan] = ALL
    tasks: ClassVar[tuple[str, ...]] = ("sprite location", "EuroSAT")
    title: ClassVar[str] = "Every method on a real ViT-Ti/16, 1,000 training images"
    note: ClassVar[str] = """ Where that diverged, as
the training loss told (vpt-deep at 0.02, adapter-houlsby at 0.005), lower rates were tried instead. Methods that run
backwards through the backbone had few epochs, for a CPU's sake: their order is that of short training."""
