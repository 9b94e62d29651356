"""`sprites:location`, `:orientation`, `:scale` and `sprites:count`: generated after dSprites, labelled as in VTAB.

dSprites (Matthey et al. 2017): white shapes on black, 64 x 64; 3 shapes (square, ellipse, heart) x 6 scales in
[.5, 1] x 40 orientations in [0, 2π] x 32 x 32 positions in [0, 1]: 737,280 pictures. VTAB's `dsprites_loc` asks for the
horizontal position and `dsprites_ori` for the orientation, each in 16 equal bins of its index: bin = index · 16 //
values. As in dSprites, a square looks the same at four orientations and an ellipse at two (and the first and the last
orientation are one), so orientation has a ceiling below 100 %. `count` asks how many shapes there are, 1 to 8, after
`clevr_count`.
"""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from restuning.data.task import Items, Source
from restuning.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, FINE, BINS = 64, 4, 16
SIZES = (3, 6, 40, 32, 32)  # shape, scale, orientation, x, y
FACTOR = {"location": 3, "orientation": 2, "scale": 1}
POOL = 60_000  # pictures that training and test images are drawn from, spread over all
MOST = 8  # shapes in a scene

Shape = tuple[int, float, float, float, float, int]
"""Which shape, radius, angle, x and y of the centre, grey; in parts of the side."""


class _Names(Sequence[str]):
    def __init__(self, indices: Tensor) -> None:
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i: int | slice) -> str | Sequence[str]:
        return _Names(self.indices[i]) if isinstance(i, slice) else f"sprite {int(self.indices[i])}"


class Sprites(Items):
    """The sprites with these indices, drawn when read."""

    def __init__(self, indices: Tensor, factor: int) -> None:
        self.indices = indices
        self.factors = torch.stack(torch.unravel_index(indices, SIZES), -1)
        self.labels = (self.factors[:, factor] * _bins(factor) // SIZES[factor]).tolist()
        self.names = _Names(indices)

    def item(self, i: int) -> "Image":
        shape, scale, turn, x, y = self.factors[i].tolist()
        return draw(shape, 0.5 + 0.5 * scale / 5, 2 * math.pi * turn / 39, x / 31, y / 31)


def draw(shape: int, scale: float, angle: float, x: float, y: float) -> "Image":
    """One sprite; x and y in [0, 1] move its centre over the part of the frame in which it is wholly inside."""
    cx, cy = (0.17 + p * (1 - 2 * 0.17) for p in (x, y))
    return _drawn([(shape, 0.16 * scale, angle, cx, cy, 255)])  # the radius of the circle around the shape


def _drawn(shapes: Sequence[Shape]) -> "Image":
    """On black."""
    from PIL import Image, ImageDraw

    fine = SIDE * FINE
    image = Image.new("L", (fine, fine))
    for shape, radius, angle, x, y, grey in shapes:
        cos, sin = math.cos(angle), math.sin(angle)
        ends = [(x + radius * (cos * u - sin * v), y + radius * (sin * u + cos * v)) for u, v in OUTLINES[shape]]
        ImageDraw.Draw(image).polygon([(fine * u, fine * v) for u, v in ends], fill=grey)
    return image.reduce(FINE).convert("RGB")


class Scenes(Items):
    """Scenes of 1 to 8 shapes that do not touch, drawn when read; scene i has i mod 8 + 1."""

    def __init__(self, indices: range) -> None:
        self.indices = indices
        self.labels = [i % MOST for i in indices]
        self.names = [f"scene {i}" for i in indices]

    def item(self, i: int) -> "Image":
        draw = random.Random(self.indices[i])
        shapes: list[Shape] = []
        while len(shapes) <= self.labels[i]:
            radius = draw.uniform(0.06, 0.12)
            x, y = (draw.uniform(radius, 1 - radius) for _ in "xy")
            if all(math.hypot(x - s[3], y - s[4]) > radius + s[1] + 0.05 for s in shapes):
                shapes.append((draw.randrange(3), radius, draw.uniform(0, 2 * math.pi), x, y, draw.randrange(110, 256)))
        return _drawn(shapes)


def _outlines() -> tuple[list[tuple[float, float]], ...]:
    """Square, ellipse (2 : 1) and heart, each in the unit circle, centred on their mass."""
    turns = [2 * math.pi * k / 64 for k in range(64)]
    square = [(a * math.sqrt(0.5), b * math.sqrt(0.5)) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    ellipse = [(math.cos(t), 0.5 * math.sin(t)) for t in turns]
    curve = [
        (
            16 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in turns
    ]
    areas = [a[0] * b[1] - b[0] * a[1] for a, b in zip(curve, curve[1:] + curve[:1], strict=True)]
    middle = (
        sum((a[1] + b[1]) * w for a, b, w in zip(curve, curve[1:] + curve[:1], areas, strict=True)) / sum(areas) / 3
    )
    size = max(math.hypot(u, v - middle) for u, v in curve)
    return square, ellipse, [(u / size, (v - middle) / size) for u, v in curve]


OUTLINES = _outlines()


def _bins(factor: int) -> int:
    return min(BINS, SIZES[factor])


def load_sprites(kind: str) -> Source:
    """Training and test images are drawn from disjoint parts of a fixed permutation of all pictures."""
    if kind == "count":
        train, test = (Scenes(range(start, start + POOL // 2)) for start in (0, POOL // 2))
        return Source(tuple(str(n + 1) for n in range(MOST)), train, test=test)
    if kind not in FACTOR:
        raise DataError(
            f"unknown sprites {kind!r}: expected {', '.join(f'sprites:{k}' for k in FACTOR)} or sprites:count"
        )
    order = torch.randperm(math.prod(SIZES), generator=torch.Generator().manual_seed(0))
    factor = FACTOR[kind]
    bins, of = _bins(factor), SIZES[factor]
    edges = [math.ceil(b * of / bins) for b in range(bins + 1)]
    classes = tuple(f"{a}-{b - 1} of {of}" if b - a > 1 else f"{a} of {of}" for a, b in pairwise(edges))
    return Source(classes, Sprites(order[: POOL // 2], factor), test=Sprites(order[POOL // 2 : POOL], factor))
