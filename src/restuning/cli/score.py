"""`restuning score`."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import say
from restuning.diffusion.quality import score
from restuning.utils.options import CAPTIONS, Json, Option

EXAMPLE = "restuning score images --real captions:photos --features inception:weights-inception-2015-12-05.pth"


@dataclass(frozen=True)
class Score:
    """Which images are measured, and by what."""

    generated: Annotated[Path, Option("a folder of images", metavar="IMAGES", positional=True)]
    real: Annotated[str, Option(CAPTIONS)]
    features: Annotated[str, Option("inception:FILE (torch-fidelity's weights), or a backbone of images")]
    weights: Annotated[str | None, Option("file of the backbone's weights")] = None
    clip: Annotated[str | None, Option("a CLIP model, for the CLIP score of `generate`'s images", metavar="FOLDER")] = (
        None
    )
    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Score)


def run(args: argparse.Namespace) -> None:
    own = filled(Score, args)
    found = score(own.generated, own.real, features=own.features, weights=own.weights, clip=own.clip)
    say(own.json, found, "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))
