"""Bytes → an RGB image, or one line that says why not."""

import warnings
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, cast

from restuning.errors import DataError, MissingExtra, line

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".webp",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
        ".heic",
        ".heif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".j2k",
    ]
)
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "AVIF", "PPM", "JPEG2000")
"""Pillow's names of what is decoded, told by a file's first bytes and not by its suffix. Others, PostScript among them,
which runs a program, are not."""
MEGAPIXELS = 100
BRIGHTEST = 4096
"""A 16-bit image of no value above this is 12 bits in 16, or black to the eye: it is not guessed which."""


def decode(file: IO[bytes], name: str, formats: Sequence[str] | None = None, megapixels: float = MEGAPIXELS) -> "Image":
    """Upright, RGB, transparency on white. Raises DataError if it is unreadable, truncated or too large.

    The size is read from the header: an image of more than `megapixels` is refused before it is decoded. 16 bits are
    scaled to 8, and floats from 0 to 1 to 0 to 255; where the range is not known, the image is refused. formats: the
    only ones that are tried, by Pillow's names; None: all of FORMATS.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra("pillow", "data") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            kinds = [kind for kind in _formats(file, name) if formats is None or kind in formats]
            image = Image.open(file, formats=[kind for kind in kinds if kind in Image.OPEN])
            width, height = image.size
            if width * height > megapixels * 10**6:
                raise DataError(f"{name} has {width} x {height} pixels: expected at most {megapixels:g} megapixels")
            deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
            top = _stated_top(image)
            return _rgb(ImageOps.exif_transpose(image), name, deep, top)
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large: expected at most {megapixels:g} megapixels") from error
    except (DataError, MissingExtra, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} cannot be read as an image: it is of none of {', '.join(FORMATS)}") from error
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{name} cannot be read as an image: {line(error)}") from error


def _formats(file: IO[bytes], name: str) -> tuple[str, ...]:
    """What may be in the file. Raises MissingExtra for a HEIC that nothing here reads."""
    head = file.read(12)
    file.seek(0)
    if head[4:8] != b"ftyp" or head[8:12] not in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return FORMATS
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        if head[8:12] == b"mif1":  # AVIF may say so too
            return FORMATS
        raise MissingExtra("pillow-heif", "heic") from error
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _rgb(image: "Image", name: str, deep: bool, top: int | None) -> "Image":
    """deep: of 16 bits; top: the greatest value that it can have, if it says so."""
    from PIL import Image

    if image.mode == "F":
        low, high = _range(image)
        if not 0 <= low <= high <= 1:
            raise DataError(f"{name} holds floats from {low:g} to {high:g}: expected 0 to 1, or 8 or 16 bits")
        image = image.point(lambda v: v * 255 + 0.5).convert("L")
    elif image.mode.startswith("I"):  # to 8 bits, which convert() would clip
        image = image.convert("I")
        low, high = _range(image)
        if low < 0 or high > 65_535 or (top is not None and high > top):
            raise DataError(f"{name} holds values from {low} to {high}: expected 8 or 16 bits")
        if top is None and 0 < high < BRIGHTEST:
            raise DataError(
                f"{name} is of 16 bits, and no value is above {high}: 12 bits or fewer? save it with 8 bits"
            )
        scale = 1 / 256 if top is None else 255 / top
        image = image.point(lambda v: v * scale).convert("L")
    elif deep and image.mode in ("RGB", "RGBA"):  # their upper bytes are what there is now
        bands = [_range(band) for band in image.split()[:3]]
        if 0 < max(high for _, high in bands) < BRIGHTEST // 256:
            raise DataError(f"{name} is of 16 bits, and nearly black: 12 bits or fewer? save it with 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _range(image: "Image") -> tuple[float, float]:
    low, high = cast(tuple[float, float], image.getextrema())
    return low, high


def _stated_top(image: "Image") -> int | None:
    """A TIFF's own greatest value (MaxSampleValue)."""
    tags = getattr(image, "tag_v2", None) or {}
    value = tags.get(281)
    value = value[0] if isinstance(value, tuple) else value
    return value if isinstance(value, int) and 0 < value <= 65_535 else None
