"""`restuning train`."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from restuning.cli.arguments import Parser, filled, given
from restuning.cli.output import say
from restuning.data import load_source
from restuning.errors import RestuningError
from restuning.methods.named import recorded
from restuning.runs.banks import from_bank
from restuning.runs.run import execute
from restuning.runs.settings import RUN, Run, read_run
from restuning.training.config import TrainConfig
from restuning.utils.distributed import is_main_process
from restuning.utils.options import DATA, Json, Option, Quiet

WITHOUT_GPU = "bypass-query"
"""Where no method is named: it runs the backbone once, forwards, whatever the epochs and rates. It reads no single
tokens, which `res-tuning` labels then too."""
EXAMPLE = "restuning train --data folder:photos --method res-tuning --lr 0.005 0.001 --out runs/photos"


@dataclass(frozen=True)
class Train:
    """What is not the run's own."""

    out: Annotated[Path, Option("folder for run.json, the adapter and result.json")]
    run: Annotated[Path | None, Option("repeat a recorded run; other settings override it", metavar="RUN.JSON")] = None
    resume: Annotated[bool, Option("continue the run in --out, to the same bits")] = False
    tensorboard: Annotated[bool, Option("write TensorBoard files into OUT/tensorboard")] = False
    shard: Annotated[bool, Option("of several processes, each holds a share of the frozen backbone (FSDP2)")] = False
    quiet: Quiet = False
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Train)
    parser.settings(Run, without=("lr",), partial=True)  # the rates of a run are several


def run(args: argparse.Namespace) -> None:
    own, settings = filled(Train, args), recorded(given(Run, args))
    file = own.run or (own.out / RUN if own.resume else None)
    before = read_run(file) if file else None
    if "bank" in settings:
        settings = {**from_bank(settings["bank"]), **settings}
    if before is not None:
        run = replace(before, **settings, training=filled(TrainConfig, args, before.training))
    elif "data" not in settings:
        raise RestuningError(f"--data is missing: expected {DATA}, or --bank")
    else:
        if (
            not settings.keys() & {"method", "blocks", "size"}
            and not torch.cuda.is_available()
            and ("bank" in settings or load_source(settings["data"]).kind != "per-token")
        ):
            settings["method"] = WITHOUT_GPU
        run = Run(**settings, training=filled(TrainConfig, args))
    result = execute(
        run,
        own.out,
        resume=own.resume,
        progress=not (own.quiet or own.json),
        tensorboard=own.tensorboard,
        shard=own.shard,
    )
    if is_main_process():
        score = f"test {result['metric']} {result['test_' + result['metric']]:.2f}"
        say(own.json, result, f"{score} on {result['examples']['test']} examples; saved in {own.out}")
