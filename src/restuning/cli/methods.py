"""`restuning methods`."""

import argparse
import json
from dataclasses import dataclass

from restuning.cli.arguments import Parser, filled
from restuning.cli.output import table
from restuning.methods.files import to_dict
from restuning.methods.named import ABOUT, FAMILIES, METHODS, NOTES
from restuning.utils.options import Json

EXAMPLE = "restuning methods --json"


@dataclass(frozen=True)
class Methods:
    """How they are listed."""

    json: Json = False


def arguments(parser: Parser) -> None:
    parser.settings(Methods)


def run(args: argparse.Namespace) -> None:
    if filled(Methods, args).json:
        print(json.dumps({name: {"about": ABOUT[name], **to_dict(method)} for name, method in METHODS.items()}))
        return
    table(["method", "what is trained"], [[name, ABOUT[name]] for name in METHODS])
    for family, own in FAMILIES.items():
        print(f"\non {family} backbones ({NOTES[family]}): {', '.join(own)}")
