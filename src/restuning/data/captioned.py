"""Pictures with captions, and a picture → the tensor that a VAE reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

from restuning.data.task import Items
from restuning.data.transforms import torchvision
from restuning.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class Captioned(Dataset[tuple["Image", tuple[str, ...]]]):
    """Pictures, each with one caption or several. `names[i]` says where picture i comes from; none is decoded before
    it is asked for."""

    def __init__(self, images: Items, captions: Sequence[tuple[str, ...]]) -> None:
        self.images, self._captions = images, captions
        self.names = images.names

    def __len__(self) -> int:
        return len(self._captions)

    def image(self, i: int) -> "Image":
        """RGB, transparency on white. Raises DataError if it cannot be decoded."""
        return self.images.item(i)  # type: ignore[no-any-return]

    def captions(self, i: int) -> tuple[str, ...]:
        """One or more, none of them empty."""
        return self._captions[i]

    def __getitem__(self, i: int) -> tuple["Image", tuple[str, ...]]:
        return self.image(i), self.captions(i)


def texts(value: object, name: str) -> tuple[str, ...]:
    """A caption, or a list of them, without the blanks around. Raises DataError, with the name, for what is none."""
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise DataError(f"{name} has no caption")
    found = []
    for one in listed:
        if one is not None and not isinstance(one, str):
            raise DataError(f"{name}: the caption is {one!r}: expected a text, or a list of texts")
        if one is None or not one.strip():
            raise DataError(f"{name} has an empty caption")
        found.append(one.strip())
    return tuple(found)


@dataclass(frozen=True)
class Square:
    """A picture → (3, size, size) in [−1, 1]: the short side resized to `size`, the centre cropped, as the paper does
    at 512."""

    size: int = 512
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError(f"size is {self.size}: expected a number of pixels")

    def __call__(self, image: "Image", flip: bool = False) -> Tensor:
        v2 = torchvision()
        image = v2.functional.resize(image, [self.size], v2.InterpolationMode(self.interpolation), antialias=True)
        image = v2.functional.center_crop(image, [self.size, self.size])
        pixels: Tensor = v2.functional.pil_to_tensor(v2.functional.horizontal_flip(image) if flip else image)
        return pixels.float() / 127.5 - 1
