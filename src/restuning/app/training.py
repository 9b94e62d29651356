"""Cross-validated training on kept features, all folds of a method at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import torch
from torch import Tensor

from restuning.app.features import Engine
from restuning.app.recipes import Recipe
from restuning.errors import DataError
from restuning.features.stacked import Point, train
from restuning.model.groups import Prepared
from restuning.model.stack import Stack
from restuning.side.features import Features
from restuning.training.config import TrainConfig

FOLDS = 4
WARMUP = 2
SEED = 0


@dataclass(frozen=True)
class HeldOut:
    """How good a method is on pictures that it was not trained on.

    Args:
        logits: (n, classes), of every picture, by the model that did not see it.
        scores: accuracy in percent of every fold, each trained with a seed of its own.
    """

    logits: Tensor
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.scores)

    @property
    def spread(self) -> float:
        """The standard deviation over the folds and their seeds."""
        return stdev(self.scores) if len(self.scores) > 1 else 0.0


def folds_of(labels: Tensor, count: int = FOLDS) -> Tensor:
    """(n,): which part every item is held out in; every class is spread over the parts evenly.

    Args:
        labels: (n,), each there twice or more.
        count: how many parts.

    Raises:
        DataError: there are fewer than two classes.
    """
    if len(set(labels.tolist())) < 2:
        raise DataError("training needs two classes with two pictures or more each: one of each is held out")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % count
    return folds


def cross_validate(
    engine: Engine,
    recipe: Recipe,
    features: Features,
    labels: Tensor,
    classes: int,
    folds: Tensor,
    seen: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> HeldOut:
    """Train a model for every fold without its pictures, all at once, and ask it about them.

    Args:
        engine: the backbone.
        recipe: the method and its rates.
        features: of n pictures, as the method reads them.
        labels: (n,).
        classes: how many there are.
        folds: (n,), as `folds_of` gives them.
        seen: told the step, of how many, and the mean loss.
    """
    count = int(folds.max()) + 1
    rows = [(folds != k).nonzero().flatten() for k in range(count)]
    fewest = min(map(len, rows))
    # folds of a stack have as many examples as one another: a few of the larger ones are left out, evenly
    rows = [r if len(r) == fewest else r[torch.linspace(0, len(r) - 1, fewest).long()] for r in rows]
    stack, names = _stack(engine, recipe, classes, count)
    features = _read(stack, engine, names[0], features)
    try:
        _train(stack, engine, recipe, features, labels, rows, seen)
        logits = torch.zeros(len(labels), classes)
        with torch.no_grad():
            for part in torch.split(torch.arange(len(labels)), 512):
                out = stack(features.rows(part)).cpu()
                logits[part] = out[folds[part], torch.arange(len(part))]
    finally:
        _delete(engine, names)
    right = (logits.argmax(-1) == labels).double()
    return HeldOut(logits, tuple(100 * float(right[folds == k].mean()) for k in range(count)))


def fit_all(engine: Engine, recipe: Recipe, features: Features, labels: Tensor, classes: Sequence[str]) -> str:
    """Train on all pictures; returns the name of the adapter in the engine's tuned model."""
    stack, names = _stack(engine, recipe, len(classes), 1, classes)
    features = _read(stack, engine, names[0], features)
    try:
        _train(stack, engine, recipe, features, labels, [torch.arange(len(labels))])
    except BaseException:
        _delete(engine, names)
        raise
    stack.write_back()
    return names[0]


def shorter(recipe: Recipe, settings: Mapping[str, float | None]) -> Recipe:
    """The recipe with what a person has set otherwise: epochs, lr."""
    epochs, lr = settings.get("epochs"), settings.get("lr")
    return replace(recipe, epochs=int(epochs or recipe.epochs), fixed=bool(epochs), lr=float(lr or recipe.lr))


def _stack(
    engine: Engine, recipe: Recipe, classes: int, count: int, names: Sequence[str] | None = None
) -> tuple[Stack, list[str]]:
    made: list[str] = []
    with engine.lock, torch.random.fork_rng(devices=[]):
        active = engine.tuned.active()
        for i in range(count):
            torch.manual_seed(SEED + i)
            made.append(engine.name("training"))
            how = engine.how.to_dict()
            engine.tuned.add_adapter(
                made[-1], recipe.method, classes, pool=recipe.pool, classes=names, preprocessing=how
            )
        engine.tuned.set_adapter(active)
        return Stack([engine.tuned.reader(name) for name in made]), made


@torch.no_grad()
def _read(stack: Stack, engine: Engine, name: str, features: Features) -> Features:
    """What the stack reads of them, and what it makes of that with weights that are not trained: once, and not in every
    step."""
    reader = engine.tuned.reader(name)
    return Prepared().of(stack, reader, reader.select(features).map(lambda x: x.to(engine.device)))


def _train(
    stack: Stack,
    engine: Engine,
    recipe: Recipe,
    features: Features,
    labels: Tensor,
    rows: Sequence[Tensor],
    seen: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> None:
    epochs = recipe.epochs_for(len(rows[0]))
    points = [
        Point(
            TrainConfig(epochs=epochs, lr=recipe.lr, batch_size=recipe.batch_size, warmup_epochs=WARMUP, seed=SEED + i),
            own,
        )
        for i, own in enumerate(rows)
    ]
    train(stack, features, labels.to(engine.device), points, seen=seen)


def _delete(engine: Engine, names: Sequence[str]) -> None:
    with engine.lock:
        for name in names:
            engine.tuned.delete_adapter(name)
