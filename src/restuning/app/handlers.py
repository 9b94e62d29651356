"""What the page's events do, without Gradio: project and inputs in, HTML out."""

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from restuning.app import views
from restuning.app.answers import Answers
from restuning.app.home import Home
from restuning.app.project import Added, from_files, from_folder
from restuning.app.take import finished, take
from restuning.app.views import View
from restuning.app.workbench import Workbench
from restuning.backbones.load import MICRO
from restuning.data.decode import decode
from restuning.errors import DataError, RestuningError


class Handlers:
    """What the page's events call; every refusal is a line on the page.

    Args:
        home: the projects.
        local: whether folders of this machine may be named: those who use the page are those who started it.
    """

    def __init__(self, home: Home, local: bool = True) -> None:
        self.home, self.local, self.answers = home, local, Answers(home)

    def backbone(self, name: str) -> str:
        """The backbone of a project; the bundled one where there is none."""
        try:
            return self.home.bench(name).project.backbone
        except RestuningError:
            return MICRO

    def opened(self, name: str) -> tuple[str, ...]:
        """(summary, checks, gallery, scores, look, take) of a project."""
        if not name:
            hint = views.progress("Make a project: give it a name, then give it pictures.")
            return hint, "", "", "", "", ""
        try:
            bench = self.home.bench(name)
            looked = views.gallery(bench, View("mistakes")) if bench.result else ""
            shown = views.gallery(bench, View())
            return views.summary(bench), views.checks(bench), shown, views.scores(bench), looked, take(bench)
        except RestuningError as error:
            return views.refusal(error), "", "", "", "", ""

    def add(self, name: str, paths: list[str] | None, label: str, folder: str = "") -> str:
        """Add uploaded files, or a folder of this machine; what became of them, as a line."""
        try:
            bench, wanted = self.home.bench(name), label.strip() or None
            if folder and not self.local:
                raise DataError("folders of the server cannot be named here: give the pictures, or a zip")
            given = from_folder(Path(folder.strip())) if folder else from_files([Path(p) for p in paths or []], wanted)
            return views.progress(_told(bench.project.add(given)))
        except RestuningError as error:
            return views.refusal(error)

    def act(self, name: str, view: View, data: dict[str, Any]) -> tuple[str, View]:
        """What a button of a gallery, of the checks, the confusion matrix or the map asks for: (a line, the view)."""
        try:
            bench, act, keys = self.home.bench(name), data["act"], [str(k) for k in data["keys"]]
            if act == "page":
                return "", replace(view, page=int(data["page"]))
            if act in ("show", "alike"):
                return "", View(f"alike:{keys[0]}" if act == "alike" else str(data["what"]))
            if act == "lasso":
                return "", View("keys", keys=tuple(keys))
            if act == "use":
                if bench.result is None or data["what"] not in bench.result.held:
                    raise DataError(f"{data['what']} has not been trained on these labels: train first")
                bench.project.update(method=str(data["what"]))
                return views.progress(f"{data['what']} is in use."), view
            if not keys:
                raise DataError("no picture is picked: pick some first")
            if act == "right":
                bench.project.mark_right(keys)
                return views.progress(f"{len(keys)} marked as right."), view
            if act not in ("label", "remove") or (act == "label" and not str(data["label"]).strip()):
                raise DataError("no class is chosen: choose one, or write a new one")
            before = bench.result
            result = bench.change(keys, str(data["label"]).strip(), remove=act == "remove")
            done = f"{len(keys)} removed" if act == "remove" else f"{len(keys)} labelled {data['label'].strip()}"
            if result is None or before is None:
                return views.progress(f"{done}."), view
            held = result.held[bench.method]
            return views.progress(f"{done}; {bench.method} trained again: {held.mean:.1f} ± {held.spread:.1f} %."), view
        except RestuningError as error:
            return views.refusal(error), view

    def train(self, name: str, backbone: str, weights: str, epochs: float, lr: float) -> Iterator[tuple[str, str]]:
        """Features, then training, then the adapter: (progress, scores) as it goes on."""
        try:
            bench = self.home.bench(name)
            yield views.progress(f"Loading {backbone} …"), ""
            bench.choose_backbone(backbone.strip(), weights.strip() or None)
            for p in bench.compute():
                text = f"Features: {p.done} of {p.total} pictures, {p.left:.0f} s left"
                yield views.progress(text, 100 * p.done / p.total), ""
            yield from self._train(bench, {"epochs": epochs or None, "lr": lr or None})
        except RestuningError as error:
            yield views.refusal(error), ""

    def _train(self, bench: Workbench, settings: dict[str, float | None]) -> Iterator[tuple[str, str]]:
        steps: queue.Queue[tuple[str, int, int, float] | None] = queue.Queue()
        failed: list[Exception] = []

        def work() -> None:
            try:
                bench.train(settings=settings, seen=lambda *step: steps.put(step))
                finished(bench)
            except Exception as error:  # it is shown by the thread that waits
                failed.append(error)
            finally:
                steps.put(None)

        threading.Thread(target=work, daemon=True).start()
        losses: dict[str, list[float]] = {}
        while (step := steps.get()) is not None:
            method, at, of, loss = step
            losses.setdefault(method, []).append(loss)
            if steps.empty():
                yield views.progress(f"Training {method}: step {at} of {of}", 100 * at / of, losses[method]), ""
        if failed:
            raise failed[0]
        yield views.progress("Trained; the adapter is written."), views.scores(bench)

    def look(self, name: str, what: str, how: str = "pca") -> tuple[str, str]:
        """(confusion or map, gallery) of the look tab."""
        try:
            bench = self.home.bench(name)
            if bench.result is None:
                return "", views.progress("Nothing is trained yet: train first.")
            if what == "confusion":
                return views.confusion(bench), views.gallery(bench, View("mistakes"))
            if what == "map":
                return views.the_map(bench, how), ""
            return "", views.gallery(bench, View(what))
        except RestuningError as error:
            return "", views.refusal(error)

    def ask(self, name: str, path: str | None) -> str:
        """Every task's answer to a picture."""
        if not path:
            return views.answers([])
        try:
            with open(path, "rb") as file:
                image = decode(BytesIO(file.read()), Path(path).name)
            finished(self.home.bench(name))
            found = self.answers.answer(name, image)
            return views.answers(found, "No task of this backbone is trained yet: train first.")
        except (RestuningError, OSError) as error:
            return views.progress(f"Refused: {error}")

    def second(self, name: str, new: str) -> tuple[str, str]:
        """Another project on the same pictures: (its name, a line). It takes no pass of the backbone."""
        try:
            bench, made = self.home.bench(name), self.home.new(new)
            count = bench.project.copy_to(self.home.bench(made).project)
            return made, views.progress(f"{made}: {count} pictures without a class; their features are there already.")
        except RestuningError as error:
            return name, views.refusal(error)

    def inside(self, name: str) -> str:
        """Start `restuning train` on the project, in a process of its own, or say how far it is."""
        try:
            bench = self.home.bench(name)
            log, out = bench.project.own / "inside.log", bench.project.own / "inside"
            if not log.exists():
                command = [sys.executable, "-m", "restuning.cli", "train", "--data", f"folder:{bench.project.path}"]
                command += ["--method", "res-tuning", "--backbone", bench.project.backbone, "--out", str(out)]
                if bench.project.state["weights"]:
                    command += ["--weights", str(bench.project.state["weights"])]
                with open(log, "wb") as file:
                    subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
                return views.progress("Started: res-tuning inside the backbone, 50 epochs, each about three passes.")
            text = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
            return views.progress(text[-1][:300] if text else "It runs.")
        except (RestuningError, OSError) as error:
            return views.progress(f"Refused: {error}")


def _told(added: Added) -> str:
    text = f"{added.count} added"
    text += f", {len(added.there)} were there already" if added.there else ""
    if added.refused:
        text += f", {len(added.refused)} refused: {'; '.join(added.refused[:3])}{'; …' * (len(added.refused) > 3)}"
    return text
