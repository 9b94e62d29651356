"""`digits`: scikit-learn's 1,797 handwritten digits, 8 x 8."""

from typing import TYPE_CHECKING, Any

from restuning.data.task import Items, Source
from restuning.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from PIL.Image import Image


class Arrays(Items):
    """Grey images (n, h, w) in uint8."""

    def __init__(self, pixels: Any, labels: list[int], name: str) -> None:
        self.pixels, self.labels = pixels, labels
        self.names = [f"{name}[{i}]" for i in range(len(labels))]

    def item(self, i: int) -> "Image":
        from PIL import Image

        return Image.fromarray(self.pixels[i]).convert("RGB")


def load_digits(rest: str) -> Source:
    """Grey levels 0 to 16 become 0 to 255."""
    if rest:
        raise DataError(f"digits takes no further part, got {rest!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "data") from error
    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype("uint8")
    return Source(tuple("0123456789"), Arrays(pixels, data.target.tolist(), "digits"))
