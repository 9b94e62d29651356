"""The command line: parse, call, print. Bad input is one line on standard error and exit code 2; Ctrl-C is 130.

A command is a row of `COMMANDS` and a module of this package with `EXAMPLE`, `arguments(parser)` and `run(args)`, which
is imported when the command is called: `restuning --help` needs no torch.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from importlib import import_module

from restuning._version import __version__
from restuning.cli.arguments import Parser
from restuning.cli.door import FLAGS, door
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
    "share": (
        "share",
        "Train on the banks of several tasks at once what their paths share, so that another task costs little.",
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
    "serve": ("serve", "Serve saved adapters of one backbone over HTTP: every task of a request from one forward."),
    "app": ("app", "Open the page: from a folder of pictures to a task, in a browser on this machine."),
    "export": (
        "export",
        "Write a saved adapter with its backbone as one graph, which onnxruntime or torch runs without this library.",
    ),
    "methods": ("methods", "List the named methods."),
    "sites": ("sites", "List where a backbone's operations read and write."),
    "backbones": (
        "families",
        "Try every family of backbones, one small random model each: what is found, which methods are right on it,\n"
        "why others are refused. `page` writes what was tried as a page.",
    ),
    "params": ("params", "Count parameters: tuners and head apart; no weights are loaded."),
    "data": (
        "data",
        "Describe a data set: splits, classes, how many there are of each; check every item. Or list the paper's data\n"
        "sets; or check one of them against what is known of it.",
    ),
}
"""Command → its module in this package, and what it does."""


TOWER = "of a model with several, the one that is meant: vision_model, encoder, … (hf:FOLDER#TOWER says the same)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. See `restuning.cli.door` for what becomes of errors."""

    def command(words: Sequence[str]) -> int | None:
        args = parse(words)
        found: int | None = import_module(f"restuning.cli.{COMMANDS[args.command][0]}").run(args)
        return found

    try:
        return door(command, sys.argv[1:] if argv is None else argv)
    finally:
        if argv is None:  # the process ends: its last collection would visit every object of torch, for a second
            gc.freeze()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, `command` its name. Raises RestuningError for bad ones, one line."""
    parser, command = parsers(next((word for word in argv if not word.startswith("-")), None))
    args = parser.parse_args(argv)
    if command is not None and vars(args).get("tower"):
        backbone = command._option_string_actions["--backbone"]
        if backbone.dest not in args:
            raise RestuningError(f"--tower {args.tower}: expected the --backbone that it is of")
        setattr(args, backbone.dest, f"{getattr(args, backbone.dest)}#{args.tower}")
    return args


def parsers(asked: str | None) -> tuple[Parser, Parser | None]:
    """The parser of the command line, and that of a command, which alone has its arguments; None: there is no such."""
    parser = Parser(prog="restuning", description="Tune frozen foundation models by Res-Tuning and its bypass.")
    parser.add_argument("--version", action="version", version=f"restuning {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND", parser_class=Parser)
    found: Parser | None = None
    for name, (module, about) in COMMANDS.items():
        shape = argparse.RawTextHelpFormatter
        command = commands.add_parser(name, help=about, description=about, formatter_class=shape)
        if name == asked:
            chosen = import_module(f"restuning.cli.{module}")
            command.epilog = f"example: {chosen.EXAMPLE}"
            chosen.arguments(command)
            for flag, what in FLAGS.items():
                command.add_argument(flag, action="store_true", help=what)
            if "--backbone" in command._option_string_actions:
                command.add_argument("--tower", help=TOWER)
            found = command
    return parser, found
