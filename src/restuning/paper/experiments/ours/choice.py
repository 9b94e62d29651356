"""What a whole choice costs: rates compared on validation, three seeds, the winners trained again and tested; from a
bank, and inside the backbone, both from nothing.

Caltech-101, 1,000 training and 800 test images at 96 pixels, an ImageNet ViT-Ti/16. CPU seconds of this process, so
that what else the machine does has no part in them. A training inside the backbone is of `inside` epochs, its seconds
times 20 / inside: its cost is that of its steps.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from restuning.paper.experiments.measured import Place, once, table
from restuning.paper.results import Record
from restuning.runs.banks import BankSettings, build_bank
from restuning.runs.run import execute
from restuning.runs.settings import Run
from restuning.runs.sweep import Sweep, sweep
from restuning.training.config import TrainConfig

EPOCHS, RATES, SEEDS = 20, (0.005, 0.002), (0, 1, 2)


@dataclass(frozen=True)
class Choice:
    """The seconds of both.

    Args:
        beside: the method from a bank.
        method: the one inside the backbone.
        inside: epochs that a training inside runs; its seconds count for 20 of them.
        seeds: how many of the three seeds run inside; their seconds count for three.
    """

    beside: str = "bypass-query"
    method: str = "ssf"
    inside: int = EPOCHS
    seeds: int = len(SEEDS)

    def run(self, place: Place) -> Iterator[Record]:
        for name, make in (("bank", self._beside), ("inside", self._inside)):
            yield {"from": name, **once(place.out / f"choice-{name}.json", partial(make, place))}

    def _beside(self, place: Place) -> Record:
        bank, out = place.out / "choice-bank", place.out / "choice-sweep"
        for folder in (bank, out):
            shutil.rmtree(folder, ignore_errors=True)  # from nothing
        settings = BankSettings(tokens="pca:64", dtype="float16", **_images(place))
        built = _seconds(lambda: build_bank(settings, bank, progress=False))
        training = TrainConfig(label_smoothing=0.1)
        grid = Sweep(str(bank), (self.beside,), RATES, (EPOCHS,), SEEDS, training=training)
        swept: dict[str, Any] = {}
        chosen = _seconds(lambda: swept.update(sweep(grid, out)))
        score = swept["methods"][self.beside]["test_score"]
        return {"method": self.beside, "seconds": built + chosen, "bank_seconds": built, "score": score}

    def _inside(self, place: Place) -> Record:
        seconds, scores = 0.0, []
        for seed in SEEDS[: self.seeds]:
            out = place.out / f"choice-inside-{seed}"
            shutil.rmtree(out, ignore_errors=True)
            training = TrainConfig(epochs=self.inside, seed=seed, label_smoothing=0.1)
            run = Run(method=self.method, lrs=RATES, training=training, **_images(place))
            result: dict[str, Any] = {}
            found = _seconds(partial(_run, run, out, result))
            # what is not training, a pass over the tests, is a hundredth of it
            seconds += found * EPOCHS / self.inside * len(SEEDS) / self.seeds
            scores.append(result["test_accuracy"])
        return {"method": self.method, "seconds": seconds, "scores": scores, "epochs": self.inside, "seeds": self.seeds}

    def text(self, records: Sequence[Record]) -> str:
        rows = [[r["method"], r["from"], f"{r['seconds']:,.0f}"] for r in records]
        found = {r["from"]: r["seconds"] for r in records}
        ratio = f"\n\nRatio: {found['bank'] / found['inside']:.4f}." if len(found) == 2 else ""
        cut = ""
        if (self.inside, self.seeds) != (EPOCHS, len(SEEDS)):
            cut = f" Inside, {self.inside} of {EPOCHS} epochs and {self.seeds} of {len(SEEDS)} seeds ran: scaled."
        return f"""# What a whole choice costs

Caltech-101, 1,000 training and 800 test images at 96 pixels, ViT-Ti/16: rates {", ".join(map(str, RATES))} compared
on a fifth of the training images, {EPOCHS} epochs, {len(SEEDS)} seeds, the winners trained again on all and tested; CPU
seconds, the bank's building and the backbone's loading included.{cut}

{table(["method", "", "CPU seconds"], rows)}{ratio}"""


def _images(place: Place) -> dict[str, Any]:
    return {
        "data": f"part:1000,800:tar:{place.data}/caltech101/caltech101_short128_max40.tar",
        "backbone": "vit_tiny_patch16_224",
        "weights": f"{place.data}/vit_tiny_patch16_224_in1k/model.safetensors",
        "image_size": 96,
    }


def _run(run: Run, out: Any, result: dict[str, Any]) -> None:
    result.update(execute(run, out, progress=False))


def _seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of this process, threads included."""
    start = time.process_time()
    call()
    return time.process_time() - start
