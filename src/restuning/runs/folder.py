"""The output folder of a run: one process at a time, nothing of an earlier run overwritten."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from restuning.errors import RestuningError
from restuning.runs.settings import RESULT, RUN, read_run
from restuning.utils.files import as_json, atomic_write, check_outside, contents, locked
from restuning.utils.notes import note
from restuning.utils.reading import read_json


class Settings(Protocol):
    """What decides a run's outcome, as plain data."""

    def to_dict(self) -> dict[str, Any]: ...


def _inputs(settings: dict[str, Any]) -> list[Path]:
    """The folders that a run reads."""
    named = [settings.get(name) for name in ("data", "bank", "base", "latents")]
    texts = [str(one).partition("?")[0].split(":")[-1] for one in named if one]
    return [Path(one) for one in texts if one not in ("", ".") and Path(one).is_dir()]


def finished(
    out: Path, run: Settings, read: Callable[[Path], Settings] = read_run, done: str = RESULT
) -> dict[str, Any] | None:
    """What this run recorded, if it was finished in `out`: to go on with it is no error, and there is nothing to do."""
    if not ((out / RUN).exists() and (out / done).exists() and read(out / RUN) == run):
        return None
    note(f"{out} holds this run, finished: nothing was left to do")
    found: dict[str, Any] = read_json(out / done)
    return found


@contextlib.contextmanager
def run_directory(
    out: Path, run: Settings, resume: bool, read: Callable[[Path], Settings] = read_run, done: str = RESULT
) -> Iterator[None]:
    """The output folder for this run alone. Nothing of an earlier one is overwritten. read: of a recorded one; done:
    the file that a finished one has."""
    made = not out.exists()
    check_outside(out, "the output folder", *_inputs(run.to_dict()))
    with locked(out):
        record = out / RUN
        there = contents(out)
        new = not there
        if record.exists() and not resume:
            state = "a finished run" if (out / done).exists() else "an unfinished run: continue it with --resume"
            raise RestuningError(f"{out} holds {state}; choose another folder for a new one")
        if there and not record.exists():
            raise RestuningError(f"{out} is not empty and holds no run ({', '.join(there[:3])}): choose another folder")
        if record.exists() and read(record) != run:
            before, now = read(record).to_dict(), run.to_dict()
            other = [f"{k} was {before[k]}, is {now[k]}" for k in now if as_json(before[k]) != as_json(now[k])]
            raise RestuningError(f"{out} holds a run of other settings: {'; '.join(other)}")
        try:
            atomic_write(record, as_json(run.to_dict()))
            yield
        except OSError as error:
            raise RestuningError(f"cannot write to {out}: {error.strerror or error}") from error
        except Exception:
            own = {RUN, ".lock"}
            if new and all(p.is_dir() or p.name in own for p in out.rglob("*")):
                for name in own:  # a run that never started leaves nothing behind
                    (out / name).unlink(missing_ok=True)
                if made:
                    shutil.rmtree(out)
            raise
