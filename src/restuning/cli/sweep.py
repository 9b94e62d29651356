"""`restuning sweep`."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import table
from restuning.runs.sweep import Sweep, sweep
from restuning.training.config import TrainConfig
from restuning.utils.options import Engine, Json, Option, Workers

EXAMPLE = (
    "restuning sweep --bank banks/photos --method bypass bypass-grid4 --lr 0.05 0.01 0.005 0.001 "
    "--epochs 50 100 --seeds 0 1 2 --out sweeps/photos"
)


@dataclass(frozen=True)
class SweepCommand:
    """What is not the sweep's own."""

    out: Annotated[Path, Option("folder for sweep.json and each seed's best")]
    resume: Annotated[bool, Option("continue the sweep in --out")] = False
    engine: Engine = "local"
    workers: Workers = None
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(SweepCommand)
    parser.settings(Sweep, without=("training",))
    parser.settings(
        TrainConfig, only=("head_lr_factor", "batch_size", "weight_decay", "warmup_epochs", "label_smoothing")
    )


def run(args: argparse.Namespace) -> None:
    own = filled(SweepCommand, args)
    found = sweep(filled(Sweep, args), own.out, resume=own.resume, engine=own.engine, workers=own.workers)
    if own.json:
        print(json.dumps(found))
        return
    rows = [
        [
            name,
            "diverged" if m["test_score"] is None else f"{m['test_score']:.2f} ± {m['spread']:.2f}",
            f"{m['parameters']['tuners']:,}",
            str(m["points"]),
            f"{m['seconds']:.1f}",
            ", ".join(f"{s['lr']:g}/{s['epochs']}" for s in m["seeds"]),
        ]
        for name, m in found["methods"].items()
    ]
    table(["method", "test score", "parameters", "points", "seconds", "chosen (lr/epochs by seed)"], rows)
