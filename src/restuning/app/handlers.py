"""What the page's events do, without Gradio: project and inputs in, HTML out."""

import queue
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from restuning.app import views
from restuning.app.answers import Answers
from restuning.app.given import from_files, from_folder
from restuning.app.home import Home
from restuning.app.inside import Inside
from restuning.app.project import Added
from restuning.app.recipes import BACKBONES
from restuning.app.take import finished, take, task_name, write_card
from restuning.app.views import REFUSED, View
from restuning.app.workbench import Workbench
from restuning.backbones.load import MICRO
from restuning.data.decode import decode
from restuning.errors import DataError
from restuning.model import publish

PARTS: dict[str, Callable[[Workbench], str]] = {
    "summary": views.summary,
    "checks": views.checks,
    "items": lambda bench: views.gallery(bench, View()),
    "scores": views.scores,
    "looked": lambda bench: views.gallery(bench, View("mistakes")) if bench.result else views.progress(views.NOTHING),
    "taken": take,
}
"""What the page shows of a project, in its order."""


class _Cancelled(Exception):
    """A person has had enough of it."""


class Handlers:
    """What the page's events call; every refusal is a line on the page.

    Args:
        home: the projects.
        local: whether folders of this machine may be named: those who use the page are those who started it.
    """

    def __init__(self, home: Home, local: bool = True) -> None:
        self.home, self.local, self.answers = home, local, Answers(home)
        self._inside: dict[str, Inside] = {}
        self._cancelled: set[str] = set()
        self._made = tempfile.TemporaryDirectory(prefix="restuning-")

    def backbone(self, name: str) -> str:
        """The backbone of a project; the bundled one where there is none."""
        try:
            return self.home.bench(name).project.backbone
        except REFUSED:
            return MICRO

    def kind(self, name: str) -> str:
        """Whether a project is of pictures or of texts."""
        try:
            return self.home.bench(name).project.kind
        except REFUSED:
            return "pictures"

    def opened(self, name: str, *parts: str) -> tuple[str, ...]:
        """Parts of what the page shows of a project.

        Args:
            name: of the project.
            parts: keys of PARTS; none: all of them.
        """
        parts = parts or tuple(PARTS)
        try:
            if not name:
                hint = "Make a project: give it a name, then give it pictures, or a table of texts."
                return views.progress(hint), *[""] * (len(parts) - 1)
            bench = self.home.bench(name)
            return tuple(PARTS[part](bench) for part in parts)
        except REFUSED as error:
            return views.refusal(error), *[""] * (len(parts) - 1)

    def add(self, name: str, paths: list[str] | None, label: str, folder: str = "") -> Iterator[str]:
        """Add uploaded files, or a folder of this machine; how many are in, and what became of them, as a line."""
        try:
            bench, wanted = self.home.bench(name), label.strip() or None
            if folder and not self.local:
                raise DataError("folders of the server cannot be named here: give the pictures, or a zip")
            given = from_folder(Path(folder.strip())) if folder else from_files([Path(p) for p in paths or []], wanted)
            for added in bench.project.adding(given):
                yield views.progress(_told(added))
        except REFUSED as error:
            yield views.refusal(error)

    def gallery(self, name: str, view: View) -> str:
        """What a gallery shows, or why there is none."""
        try:
            return views.gallery(self.home.bench(name), view)
        except REFUSED as error:
            return views.refusal(error)

    def act(self, name: str, view: View, data: dict[str, Any]) -> tuple[str, View]:
        """What a button of a gallery, of the checks, the confusion matrix or the map asks for: (a line, the view)."""
        try:
            bench, act, keys = self.home.bench(name), data["act"], [str(k) for k in data["keys"]]
            if act == "page":
                return "", replace(view, page=int(data["page"]))
            if act in ("show", "alike"):
                return "", View(f"alike:{keys[0]}" if act == "alike" else str(data["what"]), how=view.how)
            if act == "lasso":
                return "", View("keys", keys=tuple(keys), how=view.how)
            if act == "use":
                if bench.result is None or data["what"] not in bench.result.held:
                    raise DataError(f"{data['what']} has not been trained on these labels: train first")
                bench.project.update(method=str(data["what"]))
                return views.progress(f"{data['what']} is in use."), view
            if not keys:
                raise DataError("nothing is picked: pick some first")
            if act == "right":
                bench.project.mark_right(keys)
                return views.progress(f"{len(keys)} marked as right."), view
            if act not in ("label", "remove") or (act == "label" and not str(data["label"]).strip()):
                raise DataError("no class is chosen: choose one, or write a new one")
            label = str(data["label"]).strip()
            result = bench.change(keys, label, remove=act == "remove")
            done = f"{len(keys)} removed" if act == "remove" else f"{len(keys)} labelled {label}"
            if result is None:
                return views.progress(f"{done}."), view
            done += (
                f", left out of training until {label} has two"
                if act == "label" and label not in result.classes
                else ""
            )
            held = result.held[bench.method]
            return views.progress(f"{done}; {bench.method} trained again: {held.mean:.1f} ± {held.spread:.1f} %."), view
        except REFUSED as error:
            return views.refusal(error), view

    def train(self, name: str, backbone: str, weights: str, epochs: float, lr: float) -> Iterator[tuple[str, str]]:
        """Features, then training, then the adapter: (progress, scores) as it goes on."""
        try:
            bench = self.home.bench(name)
            self._cancelled.discard(name)
            if not self.local and (weights.strip() or backbone not in BACKBONES):
                raise DataError("files of the server cannot be named here: choose a backbone of the list")
            yield views.progress(f"Loading {backbone} …"), ""
            bench.choose_backbone(backbone.strip(), weights.strip() or None)
            for p in bench.compute():
                text = f"Features: {p.done} of {p.total} {bench.project.kind}, {p.left:.0f} s left"
                yield views.progress(text, 100 * p.done / p.total), ""
                self._go_on(name)
            yield from self._train(bench, {"epochs": epochs or None, "lr": lr or None})
        except _Cancelled:
            yield views.progress("Cancelled; what was computed is kept."), ""
        except REFUSED as error:
            yield views.refusal(error), ""

    def cancel(self, name: str) -> None:
        """Stop the features or the training of a project, after the batch or the step that it is at."""
        self._cancelled.add(name)

    def _go_on(self, name: str) -> None:
        if name in self._cancelled:
            raise _Cancelled

    def _train(self, bench: Workbench, settings: dict[str, float | None]) -> Iterator[tuple[str, str]]:
        steps: queue.Queue[tuple[str, int, int, float] | None] = queue.Queue()
        failed: list[Exception] = []

        def seen(*step: Any) -> None:
            self._go_on(bench.project.name)
            steps.put(step)

        def work() -> None:
            try:
                bench.train(settings=settings, seen=seen)
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
        yield (
            views.progress("Trained: its mistakes are on Look, answers on Try, the adapter on Take away."),
            views.scores(bench),
        )

    def look(self, name: str, what: str, how: str = "pca") -> tuple[str, str]:
        """(confusion or map, gallery) of the look tab."""
        try:
            bench = self.home.bench(name)
            if bench.result is None:
                return "", views.progress(views.NOTHING)
            if what == "confusion":
                return views.confusion(bench), views.gallery(bench, View("mistakes"))
            if what == "map":
                return views.the_map(bench, how), ""
            return "", views.gallery(bench, View(what))
        except REFUSED as error:
            return "", views.refusal(error)

    def ask(self, name: str, path: str | None, text: str = "") -> str:
        """Every task's answer to a picture, or to a text."""
        if not path and not text.strip():
            return views.answers([])
        try:
            item: Any = text.strip()
            if path:
                with open(path, "rb") as file:
                    item = decode(BytesIO(file.read()), Path(path).name)
            finished(self.home.bench(name))
            found = self.answers.answer(name, item)
            return views.answers(found, "No task of this backbone is trained yet: train first.")
        except REFUSED as error:
            return views.refusal(error)

    def second(self, name: str, new: str) -> tuple[str, str]:
        """Another project on the same pictures: (its name, a line). It takes no pass of the backbone."""
        try:
            bench, made = self.home.bench(name), self.home.new(new)
            count = bench.project.copy_to(self.home.bench(made).project)
            return made, views.progress(
                f"{made}: {count} {bench.project.kind} without a class; their features are there already."
            )
        except REFUSED as error:
            return name, views.refusal(error)

    def inside(self, name: str, act: str = "", epochs: float = 0) -> tuple[str, bool]:
        """Tuning inside the backbone: (what it costs, or how far it is, whether it runs).

        Args:
            name: of the project.
            act: `start` or `stop`; empty: neither.
            epochs: of the run that is started.
        """
        try:
            run = self._inside.setdefault(name, Inside(self.home.bench(name)))
            if act == "start":
                run.start(int(epochs))
            elif act == "stop":
                run.stop()
            tuning = run.tuning()
            return views.inside(run, tuning, run.cost(int(epochs)), int(epochs)), tuning.state == "running"
        except REFUSED as error:
            return views.refusal(error), False

    def epochs_inside(self, name: str) -> int:
        """Of the project's last run inside the backbone; 0: there was none."""
        try:
            return self._inside.setdefault(name, Inside(self.home.bench(name))).tuning().epochs if name else 0
        except REFUSED:
            return 0

    def packed(self, name: str) -> tuple[str | None, str]:
        """The adapter's folder as a zip to take away: (its path, a line)."""
        try:
            bench = self._trained(name)
            made = shutil.make_archive(str(Path(self._made.name) / task_name(name)), "zip", bench.adapter)
            return made, ""
        except REFUSED as error:
            return None, views.refusal(error)

    def export(self, name: str, format: str) -> Iterator[str]:
        """One graph of backbone and adapter, in a folder of the project."""
        from restuning.runs.export import export

        try:
            bench = self._trained(name)
            out = bench.project.own / f"exported-{format}"
            yield views.progress(f"Exporting {format} …")
            shutil.rmtree(out, ignore_errors=True)
            about = export(bench.adapter, out, format, bench.project.state["weights"])
            differ = about["checked"]["largest_difference"]
            yield views.progress(
                f"Exported to {out / about['file']}; it differs from the model by {differ:.0e} at most."
            )
        except REFUSED as error:
            yield views.refusal(error)

    def push(self, name: str, repo: str, private: bool) -> Iterator[str]:
        """The adapter and its card on the Hugging Face hub, with the token that this machine has."""
        try:
            if not self.local:
                raise DataError("the token of the server is not for others: push from the machine itself")
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo.strip()):
                raise DataError(f"no repository is called {repo.strip()[:80]!r}: expected owner/name")
            bench = self._trained(name)
            yield views.progress(f"Pushing to {repo.strip()} …")

            def save(folder: Path) -> None:
                shutil.copytree(bench.adapter, folder, dirs_exist_ok=True)

            yield views.progress(f"Pushed: {publish.push(repo.strip(), save, private=private)}")
        except REFUSED as error:
            yield views.refusal(error)

    def _trained(self, name: str) -> Workbench:
        bench = self.home.bench(name)
        finished(bench)
        if bench.about() is None:
            raise DataError(f"project {name} has no adapter yet: train first")
        write_card(bench)
        return bench


def _told(added: Added) -> str:
    text = f"{added.count} added"
    text += f", {len(added.there)} were there already" if added.there else ""
    if added.refused:
        text += f", {len(added.refused)} refused: {'; '.join(added.refused[:3])}{'; …' * (len(added.refused) > 3)}"
    return text
