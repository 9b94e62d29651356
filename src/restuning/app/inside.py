"""Tuning inside the backbone: `restuning train` on a project, in a process of its own that outlives the page."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from restuning.app.workbench import Workbench
from restuning.data import Tokenise
from restuning.errors import DataError, RestuningError
from restuning.runs.settings import RESULT, RUN
from restuning.utils.files import as_json, atomic_write, in_use
from restuning.utils.reading import read_json

PASSES = 3
"""Of the backbone that a step costs: one forward, and a backward of about two."""
TRAINED = 0.8
"""The share of the items that `folder:` trains on; it tests on the others."""
METHOD = "res-tuning"
EPOCH = re.compile(r"epoch (\d+)/(\d+)  loss ([\d.]+).*?([\d.]+) s$", re.MULTILINE)


@dataclass(frozen=True)
class Tuning:
    """How far it is.

    Args:
        state: `none`, `running`, `stopped`, `failed` or `finished`.
        epochs: of how many.
        losses: of those that are done.
        left: seconds, by the epochs that are done; None: there is none yet.
        last: the last line of its log.
        score: accuracy in percent on the items that were kept out, once it is finished.
        tested: how many these are.
    """

    state: str
    epochs: int = 0
    losses: tuple[float, ...] = ()
    left: float | None = None
    last: str = ""
    score: float | None = None
    tested: int = 0


class Inside:
    """The run of a project.

    Args:
        bench: the project. The run is beside its folder, for no run lies in what it reads.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.out = bench.project.path.parent / ".inside" / bench.project.name
        self.log = self.out.parent / f"{self.out.name}.log"
        self._record = self.out.parent / f"{self.out.name}.json"
        self._process: subprocess.Popen[bytes] | None = None

    def cost(self, epochs: int) -> float | None:
        """Seconds that so many epochs take, by what a pass over the items took here; None: there was none yet."""
        each, items = self.bench.project.state["seconds"], len(self.bench.project.items(labelled=True))
        return None if each is None else epochs * PASSES * TRAINED * items * float(each)

    def start(self, epochs: int) -> None:
        """Start it, or go on where it was stopped: of the same items, labels, backbone and epochs, to the same bits.

        Raises:
            DataError: it runs already, or the project is no task yet.
        """
        if self.running():
            raise DataError("it runs already: stop it first")
        project, how = self.bench.project, self.bench.engine.how
        labels = sorted((p.key, str(p.label)) for p in project.items(labelled=True))
        if len({label for _, label in labels}) < 2:
            raise DataError("every class needs pictures, and there must be two classes")
        settings = {
            "labels": labels,
            "backbone": project.backbone,
            "weights": project.state["weights"],
            "epochs": epochs,
        }
        words = ["train", "--data", f"folder:{project.path}", "--method", METHOD, "--backbone", project.backbone]
        words += ["--epochs", str(epochs), "--out", str(self.out)]
        words += ["--weights", str(project.state["weights"])] if project.state["weights"] else []
        words += ["--max-length", str(how.max_length)] if isinstance(how, Tokenise) else []
        same = self._read().get("settings") == json.loads(json.dumps(settings))
        if not same or (self.out / RESULT).exists():
            shutil.rmtree(self.out, ignore_errors=True)
        words += ["--resume"] if (self.out / RUN).exists() else []
        self.out.parent.mkdir(parents=True, exist_ok=True)
        lower = ["nice", "-n", "10"] if shutil.which("nice") else []
        with open(self.log, "ab" if "--resume" in words else "wb") as log:
            self._process = subprocess.Popen(
                [*lower, sys.executable, "-m", "restuning.cli", *words],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        atomic_write(self._record, as_json({"settings": settings, "pid": self._process.pid}))

    def stop(self) -> None:
        """Stop it; what it has done is kept."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)
        elif self.running():  # of a server that was killed
            with suppress(OSError):
                os.kill(int(self._read()["pid"]), signal.SIGTERM)

    def running(self) -> bool:
        """Whether a process of this server, or of an earlier one, is at it."""
        if self._process is not None and self._process.poll() is None:
            return True
        return in_use(self.out)

    def tuning(self) -> Tuning:
        """How far it is."""
        epochs = int(self._read().get("settings", {}).get("epochs", 0))
        if not epochs:
            return Tuning("none")
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        done = {int(k): (float(loss), float(seconds)) for k, _, loss, seconds in EPOCH.findall(text)}
        losses = tuple(done[k][0] for k in sorted(done))
        left = None if not done else (epochs - len(done)) * sum(s for _, s in done.values()) / len(done)
        last = next((one for one in reversed(text.strip().splitlines()) if one.strip()), "")[:300]
        if self.running():
            return Tuning("running", epochs, losses, left, last)
        try:
            result = read_json(self.out / RESULT)
            score, tested = float(result[f"test_{result['metric']}"]), int(result["examples"]["test"])
            return Tuning("finished", epochs, losses, 0.0, last, score, tested)
        except (OSError, ValueError, KeyError, TypeError):
            ended = self._process is not None and self._process.returncode not in (None, 0, -signal.SIGTERM, 143)
            return Tuning("failed" if ended else "stopped", epochs, losses, left, last)

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self._record)
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError, RestuningError):
            return {}
