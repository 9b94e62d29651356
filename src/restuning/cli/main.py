"""The command line: parse, call, print. Bad input is one line on standard error and exit code 2; Ctrl-C is 130.

A command is a row of `COMMANDS` and a module of this package with `EXAMPLE`, `arguments(parser)` and `run(args)`, which
is imported when the command is called: `restuning --help` needs no torch.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from restuning._version import __version__
from restuning.cli.arguments import Parser
from restuning.errors import RestuningError

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "Tune a frozen backbone on a data set, test it, save it."),
    "bank": (
        "bank",
        "Compute a frozen backbone's features once and keep them on disk; `train --bank` then needs no backbone.",
    ),
    "sweep": (
        "sweep",
        "Train a whole grid from a bank at once: validation chooses, then each seed's best is tested.",
    ),
    "search": ("search", "Search a mix of adapter, LoRA and prompt under a parameter limit (NOAH)."),
    "train-diffusion": ("train_diffusion", "Tune a text-to-image base on captioned images."),
    "generate": ("generate", "Generate images from prompts with tuned files, or with the base alone."),
    "score": (
        "score",
        "Measure generated images: Fréchet and kernel distance to real ones (FID, KID), CLIP score.",
    ),
    "reproduce": (
        "reproduce",
        "Run an experiment of the paper, or of the small edition: choose on validation, train again, test once.\n"
        "A killed one goes on where it was, and several processes may work in one --out.",
    ),
    "report": ("report", "Set results beside the paper's: a page and Markdown, with tables, differences and pictures."),
    "bench": (
        "bench",
        "Measure what tuning costs beside full fine-tuning, linear probing, LST, DTL and PEFT, in one run.",
    ),
    "evaluate": ("evaluate", "Measure a saved adapter on a data set's test split."),
    "predict": (
        "predict",
        "Classify an image, a folder of images, a text or a file of texts with saved adapters of one backbone.",
    ),
    "methods": ("methods", "List the named methods."),
    "sites": ("sites", "List where a backbone's operations read and write."),
    "params": ("params", "Count parameters: tuners and head apart; no weights are loaded."),
    "data": (
        "data",
        "Describe a data set: splits, classes, how many there are of each; check every item. Or list the paper's data\n"
        "sets; or check one of them against what is known of it.",
    ),
}
"""Command → its module in this package, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return import_module(f"restuning.cli.{COMMANDS[args.command][0]}").run(args) or 0
    except RestuningError as error:
        print(f"restuning: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("restuning: interrupted; a training run goes on with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, `command` its name. Raises RestuningError for bad ones, one line."""
    parser = Parser(prog="restuning", description="Tune frozen foundation models by Res-Tuning and its bypass.")
    parser.add_argument("--version", action="version", version=f"restuning {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND", parser_class=Parser)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, about) in COMMANDS.items():
        shape = argparse.RawTextHelpFormatter
        command = commands.add_parser(name, help=about, description=about, formatter_class=shape)
        if name == asked:
            chosen = import_module(f"restuning.cli.{module}")
            command.epilog = f"example: {chosen.EXAMPLE}"
            chosen.arguments(command)
    return parser.parse_args(argv)
