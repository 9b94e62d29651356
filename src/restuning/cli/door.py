"""The one door of the command line: whatever comes out of a command leaves as a code, and one line at most."""

import contextlib
import errno
import itertools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from restuning.errors import RestuningError, line
from restuning.utils.files import overwriting
from restuning.utils.hub import trust_remote_code
from restuning.utils.notes import Note
from restuning.utils.reading import printable

FLAGS = {
    "--debug": "show where an error came from",
    "--trust-remote-code": "run a model folder's own Python code",
    "--overwrite": "replace a file that is there",
}
"""Flags of every command. No file can set them."""
GOES_ON = ("train", "bank", "sweep", "search", "reproduce", "train-diffusion")
PATHS = (
    "--out",
    "--grid",
    "--embeddings",
    "--confusion",
    "--weights",
    "--base",
    "--bank",
    "--data",
    "--latents",
    "--run",
)
DEBUG = "; --debug shows where"


def door(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command and return its exit code: 0; 1 for an error of ours; 2 for bad input, for what the system refuses
    (a full disk, no memory), with one line on standard error; 130 for Ctrl-C and 143 for SIGTERM, with a line that
    says what is kept.

    Args:
        command: what runs the arguments.
        argv: the arguments, without the program's name; FLAGS are taken out of them.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    given = {flag for flag in FLAGS if flag in argv[:end]}
    rest = [word for i, word in enumerate(argv) if i >= end or word not in FLAGS]
    debug = "--debug" in given

    def refuse(code: int, text: str) -> int:
        if debug:
            traceback.print_exc()
        _tell(text)
        return code

    def stopped(number: int) -> int:
        name = "terminated" if number == signal.SIGTERM else "interrupted"
        return refuse(128 + number, f"{name}; {_kept(rest)}")

    with _signals() as signals, _notes() as notes:
        try:
            _check_paths(rest)
            with trust_remote_code("--trust-remote-code" in given), overwriting("--overwrite" in given):
                code = command(rest) or 0
            _flush()
            for text in notes:
                _tell(text, "note: ")
            return code
        except SystemExit as stop:  # --help and --version
            try:
                _flush()
            except OSError as error:
                return _output(error, refuse)
            raise stop
        except RestuningError as error:
            return refuse(2, str(error))
        except KeyboardInterrupt:
            return stopped(signals[0] if signals else signal.SIGINT)
        except MemoryError:
            return refuse(2, "there is not enough memory for this: try a smaller batch, or smaller data")
        except OSError as error:
            return _output(error, refuse)
        except Exception as error:
            if signals:  # which some library has turned into an error of its own
                return stopped(signals[0])
            if "out of memory" in str(error) or "can't allocate memory" in str(error):
                return refuse(2, "there is not enough memory for this: try a smaller batch, or smaller data")
            return refuse(1, f"an error of restuning's own: {type(error).__name__}: {line(error)[:300]}{DEBUG}")


@contextlib.contextmanager
def _notes() -> Iterator[dict[str, None]]:
    """The notes of a command, to be printed once it is done; other packages' warnings are for those who write code."""
    found: dict[str, None] = {}

    def keep(message: Warning | str, *_: object, **__: object) -> None:
        if isinstance(message, Note):
            found[str(message)] = None

    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        warnings.showwarning = keep  # what catch_warnings puts back
        yield found


def _tell(text: str, kind: str = "") -> None:
    """One line on standard error, whatever the text holds; nothing where there is no standard error."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        encoding = sys.stderr.encoding or "utf-8"
        print(
            f"restuning: {kind}{printable(text)}".encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr
        )
        sys.stderr.flush()


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _output(error: OSError, refuse: Callable[[int, str], int]) -> int:
    """Of a system's refusal. What reads our output may have had enough: that is no error."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # else Python flushes again, and prints its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 0
    where = f"{error.filename}: " if isinstance(error.filename, str) else ""
    what = error.strerror or line(error)
    return refuse(
        2, f"{where}{what}{' (nothing more can be printed)' if error.errno == errno.ENOSPC and not where else ''}"
    )


def _check_paths(argv: Sequence[str]) -> None:
    """Raises RestuningError for an empty path, which Python takes for the working folder, and for a null in one."""
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag in PATHS:
            value = value if "=" in word else argv[i + 1] if i + 1 < len(argv) else "-"
            if not value.strip():
                raise RestuningError(f"{flag} {value!r}: expected the name of a file or a folder")
        if "\0" in word:
            raise RestuningError(f"{word!r} holds a null: no name and no text has one")


def _kept(argv: Sequence[str]) -> str:
    """What an interrupted command has left."""
    out = next((Path(b) for a, b in itertools.pairwise(argv) if a == "--out"), None)
    if argv and argv[0] in GOES_ON and out is not None and out.exists():
        return f"what was finished is kept in {out}: the same command with --resume goes on"
    return "nothing was kept"


class _Stopped(KeyboardInterrupt):
    """Of a class of its own: where KeyboardInterrupt itself leaves code that C has started, as packages do when
    they are imported, CPython remembers it and ends the process by SIGINT, whatever the exit code."""


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM raises KeyboardInterrupt as Ctrl-C does while this lasts, in the main thread of the process that started;
    which of them came is told."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    own = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a worker of ours has nothing to say
            os._exit(128 + number)
        came.append(number)
        raise _Stopped

    # where a shell has a command in the background ignore Ctrl-C, that stays
    held = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in held}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
