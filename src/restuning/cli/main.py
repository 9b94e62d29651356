"""The command line: parse, call, print. Bad input is one line on standard error and exit code 2; Ctrl-C is 130."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from restuning.cli import comparing, describing, families, pictures, training, using
from restuning.errors import RestuningError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RestuningError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        if getattr(args, "tower", None):
            args.backbone = f"{args.backbone or ''}#{args.tower}"
        run: Callable[[argparse.Namespace], int | None] = args.run_command
        return run(args) or 0
    except RestuningError as error:
        print(f"restuning: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("restuning: interrupted; a training run goes on with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="restuning", description="Tune frozen foundation models by Res-Tuning and its bypass.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(
        name: str, run: Callable[[argparse.Namespace], int | None], about: str, example: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: {example}",
            formatter_class=argparse.RawTextHelpFormatter,
        )
        command.set_defaults(run_command=run)
        command.add_argument("--json", action="store_true", help="print JSON, for machines")
        return command

    for module in (training, pictures, comparing, using, describing, families):
        module.add_commands(add)
    return parser
