"""`restuning generate`."""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from restuning.cli.arguments import Parser, filled, given
from restuning.cli.output import say
from restuning.diffusion.base import denoiser_of, load_base
from restuning.diffusion.generation import Asked, grid, pictures
from restuning.diffusion.training import read_run
from restuning.errors import RestuningError
from restuning.model.files import changes_the_base, check_adapter
from restuning.model.tuned import Tuned
from restuning.runs.settings import RUN
from restuning.utils.files import check_output
from restuning.utils.options import Json, Option

EXAMPLE = 'restuning generate runs/photos runs/dogs --prompts "a photo of a dog" --seeds 0 1 2 --out images'


@dataclass(frozen=True)
class Generate:
    """By what, and where the images go."""

    out: Annotated[Path, Option("folder for the PNGs, with their settings in them")]
    adapters: Annotated[
        tuple[Path, ...], Option("folders of tuned files of one base", metavar="ADAPTER", positional=True)
    ] = ()
    base: Annotated[str | None, Option("a pipeline of diffusers (default: the one of the first run.json)")] = None
    plain: Annotated[bool, Option("the untuned base's images too")] = False
    grid: Annotated[Path | None, Option("an image of all: adapters down, prompts and seeds across", metavar="FILE")] = (
        None
    )
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Generate)
    parser.settings(Asked)


def run(args: argparse.Namespace) -> None:
    own, settings = filled(Generate, args), given(Asked, args)
    twice = next(
        (x for values in (settings["prompts"], settings.get("seeds", ())) for x, n in Counter(values).items() if n > 1),
        None,
    )
    if twice is not None:
        raise RestuningError(f"{twice!r} is asked for twice: each prompt and seed is painted once")
    if not own.adapters and not own.base:
        raise RestuningError("nothing to paint with: expected a tuned file, or --base")
    if own.out.exists() and any(own.out.glob("*.png")):
        raise RestuningError(f"{own.out} holds pictures: choose another folder")
    if own.grid is not None:
        check_output(own.grid, "--grid")
    run = read_run(own.adapters[0] / RUN) if own.adapters and (own.adapters[0] / RUN).exists() else None
    if run is None and own.base is None:
        raise RestuningError(f"{own.adapters[0]} has no {RUN} that names its base: expected --base")
    asked = Asked(**{"size": run.size if run else None, **settings})
    base, device = own.base or run.base, "cuda" if torch.cuda.is_available() else "cpu"  # type: ignore[union-attr]
    named = {f"adapter{i}": folder for i, folder in enumerate(own.adapters)}
    labels = dict(zip(("", *named), _labels(own.adapters), strict=True))
    full = [name for name, folder in named.items() if changes_the_base(folder)]
    plain = [""] * (own.plain or not named)
    groups = [[*plain, *(name for name in named if name not in full)], *([name] for name in full)]
    rows: dict[str, list[Any]] = {labels[name]: [] for name in (*plain, *named)}
    paths, seconds = [], 0.0
    for names in filter(None, groups):
        pipe = load_base(base, device)
        tuned = Tuned(denoiser_of(pipe))
        for folder in own.adapters:
            check_adapter(tuned, folder)
        for name in filter(None, names):
            tuned.load_adapter(named[name], name)
        tuned.to(pipe.device)
        start = time.perf_counter()
        for picture in pictures(pipe, tuned, asked, names):
            label = labels[picture.adapter]
            paths.append(own.out / f"{label}-{asked.prompts.index(picture.prompt):03}-{picture.seed}.png")
            replace(picture, adapter=label if picture.adapter else "").save(paths[-1])
            rows[label].append(picture.image)
        seconds += time.perf_counter() - start
    if own.grid is not None:
        columns = [f"{seed} {prompt}" for prompt in asked.prompts for seed in asked.seeds]
        grid(own.grid, rows, columns)
    each = seconds / len(paths)
    found = {"pictures": [str(path) for path in paths], "seconds_each": each}
    say(own.json, found, f"{len(paths)} pictures, {each:.2f} s each → {own.out}")


def _labels(folders: Sequence[Path]) -> list[str]:
    """What pictures are called by: `base`, and each folder's own name, numbered where that is taken."""
    found = ["base"]
    for folder in folders:
        name = folder.resolve().name
        found.append(next(x for x in (name, *(f"{name}-{i}" for i in range(2, len(found) + 2))) if x not in found))
    return found
