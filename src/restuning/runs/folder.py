"""The output folder of a run: one process at a time, nothing of an earlier run overwritten."""

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from restuning._version import __version__
from restuning.model.tuned import Tuned, adapt
from restuning.backbones.load import MICRO, describe_backbone, load_backbone, preprocessing_of, reading_of
from restuning.features.bank import (
    LIMIT,
    Bank,
    FromBank,
    FromFeatures,
    CachedFeatures,
    build,
    bytes_per_item,
    cache_features,
)
from restuning.data import (
    Items,
    Prepared,
    Preprocess,
    Reading,
    Task,
    Tokenise,
    check,
    load_task,
    prepared,
    reading,
    split,
)
from restuning.errors import CheckpointError, Diverged, RestuningError
from restuning.training.evaluate import Examples, evaluate
from restuning.utils.files import as_json, contents, locked, atomic_write
from restuning.training.initialise import initialise, needs_data
from restuning.model.count import count
from restuning.methods.spec import Bypass, Full, Method, on_blocks, resize
from restuning.methods.named import find_method
from restuning.data.objective import Objective, balanced, objective, sort_key
from restuning.utils.distributed import is_main_process, barrier
from restuning.training.logging import bar
from restuning.training.config import TrainConfig
from restuning.training.loop import fit
from restuning.side.features import MEAN

from restuning.runs.settings import RESULT, RUN, read_run


class Settings(Protocol):
    """What decides a run's outcome, as plain data."""

    def to_dict(self) -> dict[str, Any]: ...


@contextlib.contextmanager
def run_directory(
    out: Path, run: Settings, resume: bool, read: Callable[[Path], Settings] = read_run, done: str = RESULT
) -> Iterator[None]:
    """The output folder for this run alone. Nothing of an earlier one is overwritten. read: of a recorded one; done:
    the file that a finished one has."""
    made = not out.exists()
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
        if record.exists() and (out / done).exists():
            raise RestuningError(f"{out} holds a finished run: there is nothing to resume")
        try:
            atomic_write(record, as_json(run.to_dict()))
            yield
        except OSError as error:
            raise RestuningError(f"cannot write to {out}: {error.strerror or error}") from error
        except RestuningError:
            own = {RUN, ".lock"}
            if new and all(p.is_dir() or p.name in own for p in out.rglob("*")):
                for name in own:  # a run that never started leaves nothing behind
                    (out / name).unlink(missing_ok=True)
                if made:
                    shutil.rmtree(out)
            raise
