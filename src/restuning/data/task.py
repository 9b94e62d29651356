"""A data set as a task: classes, and training, validation and test items drawn the same way at every call."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from restuning.errors import DataError


class Items(ABC, Dataset[tuple[Any, Any]]):
    """Labelled RGB images, or texts. `names[i]` says where item i comes from; `labels` never decodes an image.

    A label is an index into the task's classes; under `multi-label` a 0 or 1 for each of them, under `regression`
    the targets, under `per-token` an index for each word.
    """

    names: Sequence[str]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def item(self, i: int) -> Any:
        """An RGB image; or a text: one string or two, or one list of words. Raises DataError for an image that cannot
        be decoded."""

    def head(self, i: int) -> bytes:
        """The first bytes of its file, which tell its format; none where it comes from no file of its own."""
        return b""

    def size(self, i: int) -> int:
        """Bytes of its file; 0 where it comes from no file of its own."""
        return 0

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.item(i), self.labels[i]


class Subset(Items):
    """Some items of others, in the order of `indices`."""

    def __init__(self, items: Items, indices: Sequence[int]) -> None:
        self.items, self.indices = items, list(indices)
        self.names = [items.names[i] for i in self.indices]
        self.labels = [items.labels[i] for i in self.indices]

    def item(self, i: int) -> Any:
        return self.items.item(self.indices[i])

    def head(self, i: int) -> bytes:
        return self.items.head(self.indices[i])

    def size(self, i: int) -> int:
        return self.items.size(self.indices[i])


@dataclass(frozen=True)
class Source:
    """What a loader found: its own splits, as far as it has them. kind: as `Task` has it. held: so many of the last
    training items are its own draw for validation (VTAB-1k's val200), trained on once the rate is chosen."""

    classes: tuple[str, ...]
    train: Items
    val: Items | None = None
    test: Items | None = None
    kind: str = "single-label"
    held: int = 0


@dataclass(frozen=True)
class Task:
    """`spec` names the data; kind: `single-label`, `multi-label`, `regression` or `per-token` (see `Items`); held: as
    `Source` has it, 0 where the training items are others.

    Under regression, `classes` names the targets.
    """

    spec: str
    classes: tuple[str, ...]
    train: Items
    val: Items | None
    test: Items
    kind: str = "single-label"
    held: int = 0


def split(
    spec: str,
    source: Source,
    train_size: int | None,
    val_size: int,
    test_size: int | None,
    seed: int,
    shots: int | None = None,
) -> Task:
    """Draw the splits, by class where an item has one. The test items depend on neither `train_size` nor `seed`."""
    sizes = (("train_size", train_size), ("val_size", val_size or None), ("test_size", test_size), ("shots", shots))
    if shots is not None and train_size is not None:
        raise DataError(f"{spec}: train_size and shots both say how many to train on: expected one of them")
    if shots is not None and source.kind != "single-label":
        raise DataError(f"{spec}: shots are so many of each class, and a {source.kind} task has no one class an item")
    for name, size in sizes:
        if size is not None and size < 1:
            raise DataError(f"{spec}: {name} is {size}, expected at least 1")
    if source.test is None:
        count = max(1, len(source.train) // 5) if test_size is None else test_size
        _enough(spec, "test_size", count, len(source.train) - 1)
        tested, rest = _draw(source.train, range(len(source.train)), count, seed=0)
        test: Items = Subset(source.train, tested)
    else:
        rest = list(range(len(source.train)))
        test = source.test if test_size is None else some(spec, source.test, test_size)
    if train_size is not None:
        _enough(spec, "train_size", train_size, len(rest))
        rest = _draw(source.train, rest, train_size, seed)[0]
    if shots is not None:
        rest = _of_each(spec, source.train, rest, shots, seed)
    val, whole = source.val, len(rest) == len(source.train)
    if whole and val_size and val_size == source.held:
        rest, held = rest[:-val_size], rest[-val_size:]
        val = Subset(source.train, held)
    elif val_size:
        if val_size >= len(rest):
            raise DataError(f"{spec}: val_size is {val_size}, expected fewer than the {len(rest)} to train on")
        held, rest = _draw(source.train, rest, val_size, seed)
        val = Subset(source.train, held)
    for name, items in (("validation", val), ("test", test)):
        if source.kind == "regression" and items is not None and len(items) < 2:
            raise DataError(f"{spec}: {len(items)} {name} item: a regression is judged on two or more")
    held_last = source.held if whole and not val_size else 0
    return Task(spec, source.classes, Subset(source.train, rest), val, test, source.kind, held_last)


def some(spec: str, items: Items, count: int) -> Items:
    """So many items to test on, each class by its share, the same at every call. Raises DataError if there are not so
    many."""
    if count < 1:
        raise DataError(f"{spec}: test_size is {count}, expected at least 1")
    _enough(spec, "test_size", count, len(items))
    return Subset(items, _draw(items, range(len(items)), count, seed=0)[0])


def part(spec: str, source: Source, train_size: int, test_size: int) -> Source:
    """So many training and test items, drawn once, whatever the seed; a fifth of the first are its own draw for
    validation, as VTAB-1k's val200 are."""
    task = split(spec, source, train_size, 0, test_size, 0)
    held, rest = _draw(task.train, range(train_size), train_size // 5, 0)
    return Source(source.classes, Subset(task.train, [*rest, *held]), None, task.test, source.kind, len(held))


def _enough(spec: str, name: str, size: int, there: int) -> None:
    if size > there:
        raise DataError(f"{spec}: {name} is {size}, expected at most the {there} that there are for it")


def _draw(items: Items, among: Sequence[int], count: int, seed: int) -> tuple[list[int], list[int]]:
    """`count` of `among`, each class by its share (largest remainders; one of each where possible); and the rest."""
    order = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed)).tolist()
    by_class: dict[int, list[int]] = {}
    for i in (among[k] for k in order):
        label = items.labels[i]
        by_class.setdefault(label if isinstance(label, int) else 0, []).append(i)
    share = {c: count * len(members) / len(among) for c, members in by_class.items()}
    floor = 1 if count >= len(by_class) else 0
    take = {c: min(len(by_class[c]), max(floor, int(s))) for c, s in share.items()}
    wanting = sorted(share, key=lambda c: (int(share[c]) - share[c], c))
    while (missing := count - sum(take.values())) != 0:
        for c in wanting if missing > 0 else reversed(wanting):
            if missing > 0 and take[c] < len(by_class[c]):
                take[c], missing = take[c] + 1, missing - 1
            elif missing < 0 and take[c] > floor:
                take[c], missing = take[c] - 1, missing + 1
            if missing == 0:
                break
    drawn = {i for c, members in by_class.items() for i in members[: take[c]]}
    shuffled = [among[k] for k in order]
    return [i for i in shuffled if i in drawn], [i for i in shuffled if i not in drawn]


def _of_each(spec: str, items: Items, among: Sequence[int], shots: int, seed: int) -> list[int]:
    """So many of each class, in the order of the draw."""
    order = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed)).tolist()
    by_class: dict[Any, list[int]] = {}
    for i in (among[k] for k in order):
        by_class.setdefault(items.labels[i], []).append(i)
    fewest = min(by_class.values(), key=len)
    _enough(spec, "shots", shots, len(fewest))
    drawn = {i for members in by_class.values() for i in members[:shots]}
    return [among[k] for k in order if among[k] in drawn]


def check(items: Items) -> None:
    """Decode every image once. Raises DataError at the first that cannot be used."""
    for i in range(len(items)):
        items.item(i)
