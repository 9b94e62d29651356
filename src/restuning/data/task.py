"""A data set as a task: classes, and training, validation and test images drawn the same way at every call."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from restuning.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class Images(ABC, Dataset[tuple["Image", int]]):
    """Labelled RGB images. `names[i]` says where image i comes from; `labels` never decodes an image."""

    names: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, i: int) -> "Image":
        """Image i, RGB. Raises DataError if it cannot be decoded."""

    def __getitem__(self, i: int) -> tuple["Image", int]:
        return self.image(i), int(self.labels[i])


class View(Images):
    """Some images of others, in the order of `indices`."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, list(indices)
        self.names = [images.names[i] for i in self.indices]
        self.labels = [int(images.labels[i]) for i in self.indices]

    def image(self, i: int) -> "Image":
        return self.images.image(self.indices[i])


@dataclass(frozen=True)
class Source:
    """What a loader found: its own splits, as far as it has them."""

    classes: tuple[str, ...]
    train: Images
    val: Images | None = None
    test: Images | None = None


@dataclass(frozen=True)
class Task:
    """`spec` names the data; labels are indices into `classes`."""

    spec: str
    classes: tuple[str, ...]
    train: Images
    val: Images | None
    test: Images


def split(spec: str, source: Source, train_size: int | None, val_size: int, test_size: int | None, seed: int) -> Task:
    """Draw the splits by class. The test images depend on neither `train_size` nor `seed`."""
    for name, size in (("train_size", train_size), ("val_size", val_size or None), ("test_size", test_size)):
        if size is not None and size < 1:
            raise DataError(f"{spec}: {name} is {size}, expected at least 1")
    if source.test is None:
        count = max(1, len(source.train) // 5) if test_size is None else test_size
        _enough(spec, "test_size", count, len(source.train) - 1)
        tested, rest = _draw(source.train, range(len(source.train)), count, seed=0)
        test: Images = View(source.train, tested)
    else:
        rest = list(range(len(source.train)))
        test = source.test
        if test_size is not None:
            _enough(spec, "test_size", test_size, len(test))
            test = View(test, _draw(test, range(len(test)), test_size, seed=0)[0])
    if train_size is not None:
        _enough(spec, "train_size", train_size, len(rest))
        rest = _draw(source.train, rest, train_size, seed)[0]
    val = source.val
    if val_size:
        if val_size >= len(rest):
            raise DataError(f"{spec}: val_size is {val_size}, expected fewer than the {len(rest)} training images")
        held, rest = _draw(source.train, rest, val_size, seed)
        val = View(source.train, held)
    return Task(spec, source.classes, View(source.train, rest), val, test)


def _enough(spec: str, name: str, size: int, there: int) -> None:
    if size > there:
        raise DataError(f"{spec}: {name} is {size}, expected at most the {there} images that there are for it")


def _draw(images: Images, among: Sequence[int], count: int, seed: int) -> tuple[list[int], list[int]]:
    """`count` of `among`, each class by its share (largest remainders; one of each where possible); and the rest."""
    order = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed)).tolist()
    by_class: dict[int, list[int]] = {}
    for i in (among[k] for k in order):
        by_class.setdefault(int(images.labels[i]), []).append(i)
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


def check(images: Images) -> None:
    """Decode every image once. Raises DataError at the first that cannot be used."""
    for i in range(len(images)):
        images.image(i)
