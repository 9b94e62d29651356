"""`altered:HOW:SPEC`: a data set with every image corrupted, sketched or rotated: tests on what training never saw."""

import hashlib
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from restuning.data.task import Items, Source
from restuning.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class Altered(Items):
    """Others' images, altered when read; the same at every call."""

    def __init__(self, items: Items, how: str) -> None:
        self.items, self.how = items, how
        self.names = [f"{name} ({how})" for name in items.names]
        self.labels = items.labels

    def item(self, i: int) -> "Image":
        image = self.items.item(i)
        if isinstance(image, tuple):
            raise DataError(f"{self.names[i]} is a text: what is altered is images")
        # by its pixels, so that an image is altered in the same way whatever its place
        return HOW[self.how](image, random.Random(hashlib.sha256(image.tobytes()).digest()))

    def head(self, i: int) -> bytes:
        return self.items.head(i)


def _corrupted(image: "Image", draw: random.Random) -> "Image":
    """Less contrast, blur, and noise of a tenth of the range."""
    from PIL import Image, ImageEnhance, ImageFilter

    image = ImageEnhance.Contrast(image).enhance(0.6).filter(ImageFilter.GaussianBlur(max(image.size) / 150))
    noise = Image.frombytes("RGB", image.size, draw.randbytes(3 * image.width * image.height))
    return Image.blend(image, noise, 0.2)


def _sketched(image: "Image", draw: random.Random) -> "Image":
    """Dark edges on white: what is left of a dodge of the grey image by its own blurred negative."""
    from PIL import ImageChops, ImageFilter, ImageOps

    grey = image.convert("L")
    blurred = ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(max(image.size) / 60))
    return ImageOps.autocontrast(ImageChops.add(grey, blurred)).convert("RGB")


def _rotated(image: "Image", draw: random.Random) -> "Image":
    """By 30 to 60 degrees to either side; corners take the mean colour."""
    from PIL import Image, ImageStat

    mean = tuple(int(v) for v in ImageStat.Stat(image).mean)
    angle = draw.choice((-1, 1)) * draw.uniform(30, 60)
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=mean)


HOW: dict[str, Callable[["Image", random.Random], "Image"]] = {
    "corrupted": _corrupted,
    "sketched": _sketched,
    "rotated": _rotated,
}


def altered(source: Source, how: str) -> Source:
    """Raises DataError for an unknown way."""
    if how not in HOW:
        raise DataError(f"altered:{how}: expected one of {', '.join(HOW)}, as in altered:rotated:folder:photos")
    train, val, test = (None if i is None else Altered(i, how) for i in (source.train, source.val, source.test))
    assert train is not None
    return Source(source.classes, train, val, test, source.kind, source.held)
