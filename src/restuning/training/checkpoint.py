"""The state file of a run: plain values and tensors, written whole or not at all."""

import io
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning.errors import CheckpointError, RestuningError
from restuning.utils.files import atomic_write

FORMAT = "restuning.train/1"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace the file in one move: whenever the power goes, either the old state or the new one is there."""
    # serialised in memory: the zip writer turns a full disk into errors of its own, and a state is small
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    try:
        atomic_write(path, buffer.getbuffer())
    except OSError as error:
        kept = "the previous state is intact" if path.exists() else "no state was written before"
        raise RestuningError(f"cannot write the state {path}: {error.strerror or error}; {kept}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The state in a file, on the CPU; CheckpointError if the file is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
            damaged = file.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"cannot read the state {path}: it is damaged or not a state file; remove it") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot read the state {path}: it is damaged or not a state file; remove it")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"the state {path} is of another kind: expected {FORMAT}, found {state.get('format')}")
    return state


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that training changes, copied: the trainable parameters and the buffers."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # a clone, not a view: a view would be saved with all of its storage
    return {name: t.detach().cpu().clone() for name, t in [*trained, *model.named_buffers()]}


@torch.no_grad()
def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors:
            t.copy_(tensors[name])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done: half a step must never be what is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


def described(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}


def refuse_other(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """CheckpointError that names the first difference, if there is one."""
    for name in [*now, *then]:
        was, here = then.get(name, "absent"), now.get(name, "absent")
        if was != here:
            raise CheckpointError(f"cannot resume {path}: {name} was {was}, and is {here} now")
