"""Every task of the home on one picture or text, from one forward."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from restuning.app.features import FROZEN, Engine
from restuning.app.home import Home
from restuning.errors import RestuningError
from restuning.model.predictor import Predictor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Answer:
    """A task's answer: the likeliest classes with their calibrated probabilities, and whether the item is unlike
    all that the task was trained on, at a false-alarm rate."""

    task: str
    top: tuple[tuple[str, float], ...]
    new: bool
    distance: float
    threshold: float
    false_alarms: float


class Answers:
    """Predictors by backbone, each with the adapters of all projects on it; renewed where one was trained again.

    Args:
        home: the projects.
    """

    def __init__(self, home: Home) -> None:
        self.home, self._lock = home, threading.Lock()
        self._of: dict[str, tuple[Predictor, dict[str, tuple[str, int]]]] = {}

    def answer(self, project: str, item: "Image | str", top: int = 5) -> list[Answer]:
        """Of every task that shares the project's backbone, the project's own first.

        Args:
            project: by name.
            item: a picture, RGB, or a text.
            top: how many classes at most.
        """
        engine = self.home.bench(project).engine
        predictor, tasks = self._predictor(engine)
        if project in tasks:
            tasks = {project: tasks[project], **tasks}
        logits = predictor.predict(engine.inputs([engine.read(item)]), [FROZEN, *(t for t, _ in tasks.values())])
        found = []
        for name, (task, _) in tasks.items():
            classes = predictor.adapter_config(task).classes or ()
            p = logits[task][0].softmax(-1).cpu()
            best = [(classes[i], float(p[i])) for i in p.argsort(descending=True)[:top].tolist()]
            bench = self.home.bench(name)
            known = bench.novelty()
            distance = float(known.distance(logits[FROZEN].cpu())[0])
            new = distance > known.threshold
            found.append(Answer(name, tuple(best), new, distance, known.threshold, known.false_alarms))
        return found

    def _predictor(self, engine: Engine) -> tuple[Predictor, dict[str, tuple[str, int]]]:
        """The next snapshot, where adapters were written since, and each project's task in it."""
        with self._lock:
            if engine.key not in self._of:
                with engine.lock:
                    self._of[engine.key] = Predictor.of(engine.tuned, [FROZEN]), {}
            predictor, tasks = self._of[engine.key]
            tasks = dict(tasks)
            for name in self.home.names():
                try:
                    bench = self.home.bench(name)
                    file = bench.adapter / "adapter_model.safetensors"
                    if not file.exists() or bench.result is None or bench.engine is not engine:
                        continue
                    written = file.stat().st_mtime_ns
                    if name not in tasks or tasks[name][1] != written:
                        task = tasks[name][0] if name in tasks else f"task-{len(tasks)}"
                        predictor = predictor.with_adapter(task, bench.adapter)
                        tasks[name] = (task, written)
                except (RestuningError, OSError):  # a project that is damaged, or goes, leaves the others
                    continue
            self._of[engine.key] = predictor, tasks
            return predictor, tasks
