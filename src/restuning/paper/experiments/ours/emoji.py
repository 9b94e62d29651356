"""Seven methods on a real small text-to-image base: a held-out category of emoji, three seeds.

The base, the images and their split are those of scripts/pretrain_emoji.py. Each method is tuned on a category's
training images, at the rate that a fifth of the first category's chose, and evaluated on its test images: the loss at
fixed draws, and the kernel distance of what it generates from their captions (features of an ImageNet ViT-Ti).
"""

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from restuning.data.captions import load_captions
from restuning.diffusion.base import denoiser_of, load_base, scheduler_of
from restuning.diffusion.generation import Asked, draw, grid, pictures
from restuning.diffusion.latents import keep_latents
from restuning.diffusion.quality import score
from restuning.diffusion.training import Denoiser, DiffusionRun, execute, held_out_loss
from restuning.model.tuned import Tuned
from restuning.paper.experiments.measured import DONE, Place, mean, once, table
from restuning.paper.results import Record
from restuning.runs.settings import RESULT, RUN
from restuning.training.config import TrainConfig

METHODS = ("full", "lora", "adapter", "prefix", "prompt", "res-tuning", "bypass")
RATES = dict.fromkeys(METHODS, (0.001, 0.003)) | {
    "full": (1e-4, 3e-4),
    "prefix": (3e-3, 1e-2),
    "prompt": (3e-3, 1e-2),
}
CATEGORIES = ("nature",)
SEEDS = (0, 1, 2)
BATCH, DRAWS, STEPS, TRIAL, SHOWN = 8, 16, 12, 6, 12


@dataclass(frozen=True)
class Emoji:
    """base: the pipeline's folder; images: the folder of the split. Both as scripts/pretrain_emoji.py writes them."""

    base: str = "runs/emoji/pipeline"
    images: str = "runs/emoji/data"
    epochs: int = 24

    def run(self, place: Place) -> Iterator[Record]:
        for category in CATEGORIES:
            yield self._evaluated(place, category, "base", None, 0)
        rates = {method: self.rate(place, method) for method in METHODS}
        for seed in SEEDS:
            for category in CATEGORIES:
                for method in METHODS:
                    out = place.out / f"{category}-{method}-{seed}"
                    self.tuned(place, out, category, method, rates[method], seed)
                    yield self._evaluated(place, category, method, out, seed)

    def tuned(
        self, place: Place, out: Path, category: str, method: str, rate: float, seed: int, part: str = "train"
    ) -> None:
        """Tune on a part of a category, unless that is done."""
        epochs = TRIAL if part == "most" else self.epochs
        options: dict[str, Any] = {"warmup_epochs": 0.5, "schedule": "constant", "ema": 0.97, "seed": seed}
        name = f"{category}-{part}"
        run = DiffusionRun(
            self.base,
            f"captions:{Path(self.images) / name}",
            method,
            size=64,
            flip=False,
            latents=str(place.out / f"latents-{name}"),
            training=TrainConfig(epochs, rate, batch_size=BATCH, **options),
        )
        if not (out / RESULT).exists():
            execute(run, out, resume=(out / RUN).exists())

    def rate(self, place: Place, method: str) -> float:
        """The rate that predicts a fifth of the first category's training images best."""
        category, images = CATEGORIES[0], Path(self.images)
        most, fifth = (images / f"{category}-{part}" for part in ("most", "fifth"))
        if not fifth.exists():
            _divide(images / f"{category}-train", most, fifth)
        found = {}
        for rate in RATES[method]:
            out = place.out / f"rate-{method}-{rate:g}"
            self.tuned(place, out, category, method, rate, 0, "most")
            found[rate] = once(out / DONE, partial(self._held_out, place, out, fifth))["loss"]
        return min(found, key=found.__getitem__)

    def _held_out(self, place: Place, adapter: Path, test: Path) -> Record:
        return {"loss": self._loss(place, adapter, test)[0]}

    def _loss(self, place: Place, adapter: Path | None, test: Path) -> tuple[float, Any, Tuned]:
        """On images that were not trained on; and the pipeline with what was tuned."""
        pipe = load_base(self.base)
        latents = keep_latents(pipe, load_captions(f"captions:{test}"), place.out / f"latents-{test.name}", size=64)
        tuned = Tuned(denoiser_of(pipe))
        if adapter is None:
            tuned.add_adapter("base", "linear")
        else:
            tuned.load_adapter(adapter)
        loss = held_out_loss(Denoiser(pipe, tuned, 64), latents, scheduler_of(pipe, "ddim"), draws=DRAWS)
        return loss, pipe, tuned

    def _evaluated(self, place: Place, category: str, method: str, adapter: Path | None, seed: int) -> Record:
        out, test = place.out / f"evaluated-{category}-{method}-{seed}", Path(self.images) / f"{category}-test"

        def make() -> Record:
            loss, pipe, tuned = self._loss(place, adapter, test)
            data = load_captions(f"captions:{test}")
            prompts = tuple(dict.fromkeys(data.captions(i)[0] for i in range(len(data))))
            shutil.rmtree(out, ignore_errors=True)
            asked = Asked(prompts, seeds=(seed,), steps=STEPS, sampler="dpm", batch_size=32)
            for i, picture in enumerate(pictures(pipe, tuned, asked, tuned.active_adapters)):
                picture.save(out / f"{i:03}.png")
            weights = f"{place.data}/vit_tiny_patch16_224_in1k/model.safetensors"
            found = score(out, f"captions:{test}", features="vit_tiny_patch16_224", weights=weights)
            row = {"category": category, "method": method, "seed": seed, "loss": loss, **found}
            if adapter is not None:
                result = json.loads((adapter / RESULT).read_text())
                row |= {k: result[k] for k in ("parameters", "kept_bytes", "peak_bytes") if k in result}
                row |= {"rate": result["settings"]["training"]["lr"], "training_loss": result["loss"]}
                images = len(load_captions(f"captions:{Path(self.images) / f'{category}-train'}"))
                seconds = statistics.median(epoch["seconds"] for epoch in result["epochs"])
                row |= {"epoch_seconds": seconds, "step_seconds": seconds / -(-images // BATCH)}
            return row

        return once(out / DONE, make)

    def text(self, records: Sequence[Record]) -> str:
        columns = ["method", "trained", "rate", "seeds"]
        columns += [f"{c}: {what}" for c in CATEGORIES for what in ("loss", "KID")]
        full = next((row["kept_bytes"] for row in records if row["method"] == "full"), None)
        rows = []
        for method in ("base", *METHODS):
            mine = [row for row in records if row["method"] == method]
            for first in mine[:1]:
                scores = [
                    mean([row[key] for row in mine if row["category"] == category], digits)
                    for category in CATEGORIES
                    for key, digits in (("loss", 4), ("kid", 1))
                ]
                cost = ["", "", ""]
                if "kept_bytes" in first and full:
                    steps = [row["step_seconds"] for row in mine if "step_seconds" in row]
                    cost = [f"{first['kept_bytes'] / 2**20:.1f}", f"{first['kept_bytes'] / full:.3f}"]
                    cost.append(f"{statistics.median(steps):.2f}" if steps else "")
                trained = f"{first['parameters']['trainable']:,}" if "parameters" in first else "0"
                rate = f"{first['rate']:g}" if "rate" in first else ""
                rows.append([method, trained, rate, str(len(mine)), *scores, *cost])
        return f"""# Seven methods on a small text-to-image base

The base of scripts/pretrain_emoji.py, tuned on the training images of a category that it never saw, {self.epochs}
epochs of batch {BATCH}, AdamW at a constant rate (of {min(map(len, RATES.values()))}, a fifth of the images of
{CATEGORIES[0]} chose, in {TRIAL} epochs), a mean of the weights (0.97); seeds: mean ± deviation. Loss: of the predicted
velocity on the test images, {DRAWS} fixed draws of noise and time each. KID: kernel distance of as many generated
images as there are test captions (DPM-Solver, {STEPS} steps, guidance 3) to the test images, on features of an ImageNet
ViT-Ti; unbiased, of few images. A Fréchet distance of fewer images than features is singular: it is in the jsonl alone.

{table([*columns, "kept, MiB", "of full", "s a step"], rows)}"""

    def picture(self, place: Place, records: Sequence[Record], file: Path) -> None:
        """The same prompts and seeds by every method: a row each."""
        rows: dict[str, list[Any]] = {"base": [], **{method: [] for method in METHODS}, "real": []}
        columns: list[str] = []
        for category in CATEGORIES:
            test = Path(self.images) / f"{category}-test"
            data = load_captions(f"captions:{test}")
            some = range(0, len(data), len(data) // SHOWN)[:SHOWN]
            prompts = tuple(data.captions(i)[0] for i in some)
            columns += prompts
            rows["real"] += [data.image(i) for i in some]
            for method in ("base", *METHODS):
                adapter = None if method == "base" else place.out / f"{category}-{method}-0"
                _, pipe, tuned = self._loss(place, adapter, test)
                rows[method] += draw(pipe, tuned, Asked(prompts, steps=25, sampler="dpm"))
        grid(file, rows, columns)


def _divide(whole: Path, most: Path, fifth: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metadata.jsonl").read_text().splitlines()]
    for folder, own in ((most, [r for i, r in enumerate(rows) if i % 5]), (fifth, rows[::5])):
        folder.mkdir()
        for row in own:
            shutil.copy(whole / row["file_name"], folder)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
