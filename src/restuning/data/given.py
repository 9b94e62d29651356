"""Items that a program holds: paths, PIL images, arrays of pixels, texts."""

import hashlib
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from restuning.data.decode import decode
from restuning.data.folder import Files
from restuning.data.task import Items
from restuning.data.text import Texts
from restuning.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

EXPECTED = "expected paths, PIL images, uint8 arrays (h, w), (h, w, 3) or (h, w, 4), or texts"


class Images(Items):
    """Images by path, as PIL has them, or as uint8 arrays (h, w), (h, w, 3) or (h, w, 4).

    Args:
        given: the images.
        labels: of each.
    """

    def __init__(self, given: Sequence[Any], labels: Sequence[Any]) -> None:
        self.given, self.labels = given, labels
        self.names = [os.fspath(g) if isinstance(g, str | os.PathLike) else f"item {i}" for i, g in enumerate(given)]

    def item(self, i: int) -> "Image":
        from PIL import Image

        given = self.given[i]
        if isinstance(given, str | os.PathLike):
            return Files([given], [0]).item(0)  # type: ignore[list-item]
        if not isinstance(given, Image.Image):
            if getattr(given, "dtype", None) != "uint8" or given.ndim not in (2, 3):
                raise DataError(f"{self.names[i]} is {type(given).__name__} of {_shape(given)}: {EXPECTED}")
            try:
                given = Image.fromarray(given)
            except (TypeError, ValueError) as error:
                raise DataError(f"{self.names[i]} is an array of {_shape(given)}: {EXPECTED}") from error
        if given.mode == "RGB":
            return given
        file = io.BytesIO()  # other modes as files of them are read: transparency on white, 16 bits to 8
        given.save(file, "PNG" if given.mode != "CMYK" else "TIFF")
        file.seek(0)
        return decode(file, self.names[i])


def _shape(given: Any) -> str:
    return f"{getattr(given, 'dtype', 'no')} values, shape {tuple(getattr(given, 'shape', ()))}"


def is_item(given: Any) -> bool:
    """Whether it is one item, and not a row of numbers: a path, a text, a pair of texts, an image, uint8 pixels."""
    if isinstance(given, str | os.PathLike):
        return True
    if isinstance(given, tuple):
        return bool(given) and all(isinstance(part, str) for part in given)
    pixels = getattr(given, "dtype", None) == "uint8" and getattr(given, "ndim", 0) in (2, 3)
    return pixels or hasattr(given, "getbands")


def given_items(given: Sequence[Any], labels: Sequence[Any], texts: bool) -> Items:
    """Items of what a program holds.

    Args:
        given: paths, PIL images or uint8 arrays; or texts, or pairs of them.
        labels: of each.
        texts: whether strings are texts, and not paths.

    Raises:
        DataError: something else is among them.
    """
    strange = next((i for i, one in enumerate(given) if not is_item(one)), None)
    if strange is not None:
        raise DataError(f"item {strange} is {type(given[strange]).__name__}: {EXPECTED}")
    if not texts:
        return Images(given, labels)
    rows = [one if isinstance(one, tuple) else (one,) for one in given]
    wrong = next(
        (i for i, row in enumerate(rows) if not all(isinstance(part, str) and part.strip() for part in row)), None
    )
    if wrong is not None:
        raise DataError(f"item {wrong} is empty or no text: this backbone reads texts")
    return Texts(rows, labels, [f"item {i}" for i in range(len(rows))])


def digest(given: Any) -> bytes:
    """What tells an item by its content: a file's bytes, pixels, words.

    Raises:
        DataError: a file that cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    if isinstance(given, os.PathLike) or (isinstance(given, str) and os.path.isfile(given)):
        try:
            with open(given, "rb") as file:
                found.update(file.read())
        except OSError as error:
            raise DataError(f"{os.fspath(given)} cannot be read: {error.strerror}") from error
    elif isinstance(given, str | tuple):
        found.update(repr(given).encode())
    elif hasattr(given, "getbands"):
        found.update(f"{given.mode} {given.size}".encode() + given.tobytes())
    else:
        found.update(f"{given.shape}".encode() + given.tobytes())
    return found.digest()
