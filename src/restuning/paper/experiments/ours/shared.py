"""A thousand tasks on one path: what is lost where keys and values are shared. ViT-Ti/16 at 96 pixels.

Tasks are trained alone, from banks of the same components, on a path of their own or on weights that were trained on
several tasks at once and are frozen then: on all six of the small edition, the task among them; on the three that are
tested; on the other five, as for a task that comes later; or on none, random. Rates are chosen on validation.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restuning.errors import RestuningError
from restuning.features.bank.format import MANIFEST
from restuning.paper.experiments.measured import Place, mean, table
from restuning.paper.experiments.small import TASKS
from restuning.paper.results import Record, where
from restuning.runs.banks import BankSettings, build_bank
from restuning.runs.share import Share, share
from restuning.runs.sweep import SWEEP, Sweep, sweep
from restuning.training.config import TrainConfig
from restuning.utils.reading import read_json

TESTED = ("Caltech-101", "EuroSAT", "sprite location")
NAMES = tuple(task.name for task in TASKS)
OWN, SIX, THREE, FIVE, NONE = "its own", "of the six tasks", "of the three", "of the other five", "random"
WAYS = (OWN, SIX, THREE, FIVE, NONE)


@dataclass(frozen=True)
class SharedPath:
    """Three tasks, each on five paths.

    Args:
        ways: parts of the paths' names, between commas; empty: all.
        seeds: how many, from 0.
        epochs: of the shared weights' training.
        lr: its rate.
    """

    ways: str = ""
    seeds: int = 3
    epochs: int = 20
    lr: float = 0.003

    def __post_init__(self) -> None:
        for part in filter(None, self.ways.split(",")):
            if not any(part.strip() in way for way in WAYS):
                raise RestuningError(f"ways {part!r}: expected of {', '.join(WAYS)}")

    def run(self, place: Place) -> Iterator[Record]:
        wanted = [part.strip() for part in self.ways.split(",") if part.strip()]
        for way in (way for way in WAYS if not wanted or any(part in way for part in wanted)):
            for name in TESTED:
                file = self._file(place, way, name)
                folder = place.out / "sweeps" / f"{slug(way)}-{slug(name)}"
                method = "bypass-query" if way == OWN else "bypass-query-shared"
                settings = Sweep(
                    str(bank(place, name)),
                    (method,),
                    lrs=(0.005, 0.002),
                    epochs=(20,),
                    seeds=tuple(range(self.seeds)),
                    shared=None if file is None else str(file),
                    training=TrainConfig(label_smoothing=0.1),
                )
                done = (folder / SWEEP).exists()
                found: Any = (read_json(folder / SWEEP) if done else sweep(settings, folder, resume=True))["methods"]
                row = found[method]
                about = {
                    "path": way,
                    "task": name,
                    "parameters": row["parameters"],
                    "seconds": row["seconds"],
                    **where(),
                }
                for one in row["seeds"]:
                    yield {**about, "seed": one["seed"], "lr": one["lr"], "test_accuracy": one["test_score"]}

    def _file(self, place: Place, way: str, name: str) -> Path | None:
        """The shared weights, trained if they are not there."""
        others = tuple(n for n in NAMES if n != name)
        pool = {SIX: NAMES, THREE: TESTED, FIVE: others}.get(way)
        if pool is None:
            return None
        file = place.out / "shared" / f"{slug(way)}{f'-{slug(name)}' if way == FIVE else ''}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            config = TrainConfig(epochs=self.epochs, lr=self.lr, label_smoothing=0.1)
            share(Share(tuple(str(bank(place, n)) for n in pool), training=config), file)
        return file

    def text(self, records: Sequence[Record]) -> str:
        rows = []
        for way in WAYS:
            found = {n: [r for r in records if (r["path"], r["task"]) == (way, n)] for n in TESTED}
            if not all(found.values()):
                continue
            scores = {n: [r["test_accuracy"] for r in of] for n, of in found.items()}
            means = [statistics.fmean(of) for of in zip(*scores.values(), strict=True)]
            tuners = found[TESTED[0]][0]["parameters"]["tuners"]
            rows.append([way, *(mean(of) for of in scores.values()), mean(means), f"{tuners:,}"])
        return f"""# A thousand tasks on one path

`bypass-query` and `bypass-query-shared` on an ImageNet ViT-Ti/16, 96 × 96 pixels, banks of 64 components (those of
Caltech-101, for all), 1,000 training images a task. A task trains its own part alone; what it shares is frozen. Shared
weights: {self.epochs} epochs at {self.lr:g} of several tasks at once. A task: 20 epochs, 0.005 or 0.002 by validation,
labels smoothed by 0.1, tested once, at the last epoch; accuracy in percent, mean ± standard deviation over
{self.seeds} seeds.

{table(["what it shares was trained on", *TESTED, "mean", "own parameters, without the head"], rows)}"""


def bank(place: Place, name: str) -> Path:
    """The bank of a task of the small edition, built if it is not there; Caltech-101's components are those of all."""
    out = place.out / "banks" / slug(name)
    if not (out / MANIFEST).exists():
        first = TASKS[0].name
        tokens = "pca:64" if name == first else f"pca:64:{bank(place, first) / 'components.safetensors'}"
        build_bank(
            BankSettings(
                data=next(task.spec for task in TASKS if task.name == name).replace("{root}", place.data),
                backbone="vit_tiny_patch16_224",
                weights=f"{place.data}/vit_tiny_patch16_224_in1k/model.safetensors",
                image_size=96,
                tokens=tokens,
                dtype="float16",
            ),
            out,
            resume=True,
            progress=False,
        )
    return out


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")
