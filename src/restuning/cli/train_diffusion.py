"""`restuning train-diffusion`."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled, given
from restuning.cli.output import say
from restuning.diffusion.training import OF_HEADS, RECIPE, DiffusionRun, execute, read_run
from restuning.errors import RestuningError
from restuning.methods.named import recorded
from restuning.runs.settings import RUN
from restuning.utils.distributed import is_main_process
from restuning.utils.options import CAPTIONS, Json, Option, Quiet

EXAMPLE = "restuning train-diffusion --base sd-v1-5 --data captions:photos --method bypass --out runs/photos"


@dataclass(frozen=True)
class TrainDiffusion:
    """What is not the run's own."""

    out: Annotated[Path, Option("folder for run.json, the adapter and result.json")]
    resume: Annotated[bool, Option("continue the run in --out, to the same bits")] = False
    quiet: Quiet = False
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(TrainDiffusion)
    parser.settings(DiffusionRun, without=(*OF_HEADS, "workers"), partial=True)


def run(args: argparse.Namespace) -> None:
    own, settings = filled(TrainDiffusion, args), recorded(given(DiffusionRun, args))
    before = read_run(own.out / RUN) if own.resume and (own.out / RUN).exists() else None
    settings["training"] = filled(type(RECIPE), args, before.training if before else RECIPE)
    missing = [f"--{name}" for name in ("base", "data") if name not in settings]
    if before is not None:
        run = replace(before, **settings)
    elif missing:
        raise RestuningError(f"{' and '.join(missing)} missing: a pipeline of diffusers, and {CAPTIONS}")
    else:
        run = DiffusionRun(**settings)
    result = execute(run, own.out, resume=own.resume, progress=not own.quiet)
    if is_main_process():
        count = result["parameters"]
        about = f"loss {result['loss']:.4f}, {count['tuners']:,} trained of {count['total']:,} → {own.out}"
        say(own.json, result, about)
