"""The command line: parse, call, print. Bad input is one line on standard error and exit code 2; Ctrl-C is 130."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from restuning.cli.door import FLAGS, door
from restuning.errors import RestuningError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RestuningError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. See `restuning.cli.door` for what becomes of errors."""

    def command(words: Sequence[str]) -> int | None:
        args = _parser().parse_args(words)
        run: Callable[[argparse.Namespace], int | None] = args.run_command
        return run(args)

    return door(command, sys.argv[1:] if argv is None else argv)


def _parser() -> argparse.ArgumentParser:
    from restuning.cli import comparing, describing, pictures, training, using  # Ctrl-C meanwhile is one line too

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
        for flag, what in FLAGS.items():
            command.add_argument(flag, action="store_true", help=what)
        return command

    for module in (training, pictures, comparing, using, describing):
        module.add_commands(add)
    return parser
