"""Bytes → an RGB image, or one line that says why not."""

import warnings
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from restuning.errors import DataError, MissingExtra, line

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
MEGAPIXELS = 100


def decode(file: IO[bytes], name: str, formats: Sequence[str] | None = None, megapixels: float = MEGAPIXELS) -> "Image":
    """Upright, RGB, transparency on white. Raises DataError if it is unreadable, truncated or too large.

    The size is read from the header: an image of more than `megapixels` is refused before it is decoded. formats: the
    only ones that are tried, by Pillow's names; None: all.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtra("pillow", "data") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=None if formats is None else tuple(formats))
        width, height = image.size
        if width * height > megapixels * 10**6:
            raise DataError(f"{name} has {width} x {height} pixels: expected at most {megapixels:g} megapixels")
        return _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large: expected at most {megapixels:g} megapixels") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{name} cannot be read as an image: {line(error)}") from error


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits to 8, which convert() would clip
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
