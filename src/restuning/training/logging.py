"""How far a run is, and what it shows of that: a bar on a terminal, else a line an epoch; curves in TensorBoard."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from restuning.errors import MissingExtra


@dataclass(frozen=True)
class Epoch:
    """Loss and accuracy (percent; None under regression) over the training examples as they were met; val_score: the
    objective's first metric on the validation examples; lr is the last step's."""

    epoch: int
    loss: float
    accuracy: float | None
    val_score: float | None
    lr: float
    seconds: float

    def curves(self) -> dict[str, float]:
        found = {"train/accuracy": self.accuracy, "val/score": self.val_score}
        return {"train/loss": self.loss, "lr": self.lr, **{k: v for k, v in found.items() if v is not None}}

    def text(self, epochs: int) -> str:
        """The line that a log has of it."""
        parts = [f"epoch {self.epoch + 1}/{epochs}", f"loss {self.loss:.4f}"]
        parts += [] if self.accuracy is None else [f"accuracy {self.accuracy:.1f}%"]
        parts += [] if self.val_score is None else [f"val {self.val_score:.2f}"]
        return "  ".join([*parts, f"lr {self.lr:.2g}", f"{self.seconds:.1f} s"])


@dataclass(frozen=True)
class History:
    epochs: list[Epoch]
    stopped: Literal["finished", "early"]


@dataclass
class Place:
    """How far a run is. `step` counts this epoch's whole optimizer steps; loss and correct are sums over `seen`."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seen: int = 0
    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    mean: dict[str, Tensor] = field(default_factory=dict)

    def text(self, epochs: int, accuracy: bool = True) -> str:
        parts = [f"epoch {self.epoch + 1}/{epochs}", f"loss {self.loss / self.seen:.4f}"]
        parts += [f"accuracy {100 * self.correct / self.seen:.1f}%"] if accuracy else []
        if self.history and self.history[-1].val_score is not None:
            parts.append(f"val {self.history[-1].val_score:.2f}")
        return "  ".join(parts)


@contextmanager
def bar(steps: int, wanted: bool) -> Iterator[Callable[[int, str], None]]:
    """A bar on the terminal (stderr), moved by (steps done, text); nothing where there is no terminal."""
    if not wanted or not sys.stderr.isatty():
        yield lambda done, text: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise MissingExtra("rich", "train") from error
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=steps)
        yield lambda done, text: shown.update(task, completed=done, description=text)


def log(text: str, wanted: bool) -> None:
    """A line on stderr where that is no terminal, so no bar is shown: what runs for hours is not silent."""
    if wanted and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def board(folder: Path | None, first: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """TensorBoard curves from epoch `first` on, fed (epoch, values by name); nothing where there is no folder."""
    if folder is None:
        yield lambda epoch, values: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard", "train") from error
    # purge: what a killed run had drawn and must do again is drawn once
    writer = SummaryWriter(str(folder), purge_step=first)

    def draw(epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    try:
        yield draw
    finally:
        writer.close()
