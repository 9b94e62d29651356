"""Ten tasks generated side by side on the small text-to-image base: exact, and on a trajectory that they share.

Ten bypasses (ten seeds on the category of `emoji`; what is missing is trained), the same prompts and noise. Times are
of all ten, all ways in turn; a deviation is the root mean square of the pixels' difference from what each task
generates alone, over that between the tuned and the untuned base.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.data.captions import load_captions
from restuning.diffusion.base import denoiser_kwargs, denoiser_of, load_base, pictures_of, texts_of
from restuning.diffusion.generation import SHARES, Asked, Share, painted
from restuning.model.tuned import Tuned
from restuning.paper.experiments.measured import Place, ratio, table
from restuning.paper.experiments.ours.emoji import CATEGORIES, Emoji
from restuning.paper.results import Record, where
from restuning.utils.profiling import in_turn, spread

SEEDS, PROMPTS, ROUNDS = range(10), 2, 5


@dataclass(frozen=True)
class Tasks:
    """base, images: as in `Emoji`. steps: of the sampler."""

    base: str = "runs/emoji/pipeline"
    images: str = "runs/emoji/data"
    epochs: int = 6
    steps: int = 20

    def run(self, place: Place) -> Iterator[Record]:
        trainer, category = Emoji(self.base, self.images, self.epochs), CATEGORIES[0]
        rate, pipe = trainer.rate(place, "bypass"), load_base(self.base)
        tuned, names = Tuned(denoiser_of(pipe)), [f"{category}-bypass-{seed}" for seed in SEEDS]
        for name, seed in zip(names, SEEDS, strict=True):
            trainer.tuned(place, place.out / name, category, "bypass", rate, seed)
            tuned.load_adapter(place.out / name, name)
        data = load_captions(f"captions:{Path(self.images) / f'{category}-test'}")
        prompts = tuple(data.captions(i)[0] for i in range(0, len(data), len(data) // PROMPTS))[:PROMPTS]
        asked = Asked(prompts, steps=self.steps, sampler="dpm")
        given = denoiser_kwargs(pipe, texts_of(pipe, [*("" for _ in prompts), *prompts]), 64)
        noise = torch.randn((len(prompts), 32, 8, 8), generator=torch.Generator().manual_seed(0))

        def generate(share: Share, some: list[str]) -> Tensor:
            found = painted(pipe, tuned, some, replace(asked, share=share), noise, given)
            return torch.stack([found[name] for name in some])

        def alone() -> Tensor:
            return torch.cat([generate("exact", [name]) for name in names])

        calls: dict[str, Callable[[], Tensor]] = {"one after another": alone}
        calls |= {share: lambda share=share: generate(share, names) for share in SHARES}  # type: ignore[misc]
        exact = _pixels(pipe, alone())
        far = _rms(exact - _pixels(pipe, generate("exact", [""])))
        deviation = {name: _rms(_pixels(pipe, call()) - exact) / far for name, call in calls.items()}
        times = in_turn(calls, ROUNDS)
        for name in calls:
            compared = spread(times[name], times["one after another"])
            row = {"way": name, "seconds": statistics.median(times[name]), "ratio": compared}
            facts = {"tasks": len(names), "prompts": list(prompts), "steps": self.steps, **where()}
            yield {**row, "deviation": deviation[name], **facts}

    def text(self, records: Sequence[Record]) -> str:
        rows = [
            [r["way"], f"{r['seconds']:.1f}", ratio(r["ratio"]), f"{r['deviation']:.3f}"] for r in records if "way" in r
        ]
        return f"""# Ten tasks side by side

{len(SEEDS)} bypasses on the small text-to-image base of `emoji`, {PROMPTS} prompts each, of one noise; DPM-Solver,
{self.steps} steps, guidance 3. A deviation is the root mean square of the pixels' difference from what each task
generates alone, over the same between tuned and untuned base: below 1, an image is nearer to the task's own than the
base's is. Median of {ROUNDS} rounds, all ways in turn.

{table(["", "seconds", "of one after another", "deviation"], rows)}"""


def _pixels(pipe: Any, latents: Tensor) -> Tensor:
    """Latents (n, b, c, h, w) → images, in [0, 1]."""
    import numpy

    images = pictures_of(pipe, latents.flatten(0, 1))
    return torch.stack([torch.from_numpy(numpy.asarray(i).copy()) for i in images]).float().view(len(latents), -1) / 255


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
