"""`restuning bench app`: what the page's steps cost beside one pass of the backbone; `restuning bench labels`: how many
planted label errors are among the first that are shown, beside cleanlab alone on linear probing."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restuning.app.answers import Answers
from restuning.app.home import Home
from restuning.app.workbench import Workbench
from restuning.bench.bench import records_of
from restuning.bench.settings import Bench, Measured
from restuning.data import Items, load_task
from restuning.errors import MissingExtra
from restuning.utils.figures import Record

DATA = ("sprites:orientation",)
WRONG = 0.05
"""The share of labels that are planted wrong, and of items that are looked at."""
PER_PASS = "<= 0.3"
WANTED = {
    **{(name, "pass", "seconds"): PER_PASS for name in ("training", "relabel", "second task")},
    ("answer", "single forward", "seconds"): "<= 2",
}


def bench_app(what: str, **given: Any) -> list[Record]:
    """Run `app` or `labels`; a record for every name. batch: pictures of the pass.

    Raises RestuningError for a setting that cannot be.
    """
    settings = Bench(**{"backbone": "restuning-micro", "batch": 500, "rounds": 3, "data": DATA, **given})
    if "weights" not in given and settings.backbone == "restuning-micro":
        settings = replace(settings, weights="pretrained")
    measured = (_costs if what == "app" else _labels)(settings)
    return records_of(what, measured, settings.facts(("data",)), WANTED if what == "app" else {})


def _bench(settings: Bench, home: Home, name: str, items: Items, classes: tuple[str, ...]) -> Workbench:
    """A project of so many of the items, spread over the classes, with its features."""
    bench = home.bench(home.new(name))
    count = min(settings.batch, len(items))

    def pictures() -> Any:
        for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:count].tolist():
            buffer = BytesIO()
            items.item(i).save(buffer, "PNG")
            yield f"{i}.png", buffer.getvalue(), classes[items.labels[i]]

    bench.project.add(pictures())
    few = [c for c, n in bench.project.counts().items() if n < 4]
    bench.project.remove([p.key for p in bench.project.items() if p.label in few])
    for name in few:
        (bench.project.path / name).rmdir()
    bench.choose_backbone(settings.backbone, None if settings.weights == "pretrained" else settings.weights)
    list(bench.compute())
    return bench


def _costs(settings: Bench) -> Measured:
    task, measured = load_task(settings.data[0]), Measured()
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        bench = _bench(settings, home, "first", task.train, tuple(task.classes))
        pictures, answers = bench.labelled(), Answers(home)
        images = [bench.store.content(p) for p in pictures]
        pixels = bench.engine.inputs([bench.engine.read(image) for image in images])
        assert isinstance(pixels, Tensor)
        second = home.bench(home.new("second"))
        bench.project.copy_to(second.project)
        for i, name in enumerate(("even", "odd")):
            second.project.label([p.key for p in second.project.items()][i::2], name)
        bench.train()
        bench.finish()
        classes = bench.project.classes()

        def relabel() -> None:
            key = bench.labelled()[0]
            bench.change([key.key], classes[(classes.index(str(key.label)) + 1) % len(classes)])

        def other_task() -> None:
            fresh = Workbench(second.project)
            list(fresh.compute())
            fresh.train()

        steps: dict[str, Callable[[], object]] = {
            "pass": lambda: [bench.engine.live(part) for part in torch.split(pixels, 32)],
            "training": bench.train,
            "relabel": relabel,
            "second task": other_task,
            "single forward": lambda: bench.engine.live(pixels[:1]),
            "answer": lambda: answers.answer("first", images[0]),
        }
        answers.answer("first", images[0])
        for _ in range(settings.rounds):
            for name, step in steps.items():
                times = 1 if name not in ("single forward", "answer") else 10
                start = time.perf_counter()
                for _ in range(times):
                    step()
                took = (time.perf_counter() - start) / times
                measured.samples.setdefault(name, {}).setdefault("seconds", []).append(took)
    measured.pairs = list(WANTED)
    return measured


def _labels(settings: Bench) -> Measured:
    measured = Measured()
    for spec in settings.data:
        task = load_task(spec)
        with tempfile.TemporaryDirectory() as folder:
            bench = _bench(settings, Home(Path(folder)), "planted", task.train, tuple(task.classes))
            keys, classes = [p.key for p in bench.labelled()], bench.project.classes()
            generator = np.random.default_rng(0)
            planted = set(generator.choice(keys, max(1, round(WRONG * len(keys))), replace=False).tolist())
            for picture in [p for p in bench.labelled() if p.key in planted]:
                others = [c for c in classes if c != picture.label]
                bench.project.label([picture.key], str(generator.choice(others)))
            result = bench.train()
            shown = len(planted)
            ours = [result.keys[i] for i in bench.wrong_labels()[0][:shown]]
            alone = [result.keys[i] for i in cleanlab_alone(bench.embeddings(result.keys), result.labels)[:shown]]
            for name, first in (("restuning app", ours), ("cleanlab on linear probing", alone)):
                found = measured.samples.setdefault(f"{name}, {spec.rsplit('/', 1)[-1]}", {})
                found["found"] = [float(len(planted & set(first)))]
                found["planted"], found["pictures"] = [float(shown)], [float(len(keys))]
    return measured


def cleanlab_alone(features: Tensor, labels: Tensor) -> list[int]:
    """Items by cleanlab's ranking on held-out probabilities of scikit-learn's logistic regression, the worst first.

    Args:
        features: (n, d).
        labels: (n,).
    """
    try:
        from cleanlab.rank import get_label_quality_scores
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("cleanlab", "app") from error
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    y = labels.numpy()
    p = cross_val_predict(probe, features.numpy(), y, cv=4, method="predict_proba")
    found: list[int] = get_label_quality_scores(y, p).argsort(kind="stable").tolist()
    return found
