"""An image → the tensor that a backbone reads."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from restuning.data.task import Items
from restuning.errors import DataError, MissingExtra, line
from restuning.utils.reading import number

if TYPE_CHECKING:
    from PIL.Image import Image

LIMIT = 2 * 2**30


@dataclass(frozen=True)
class Preprocess:
    """size: (height, width). crop None: the whole image resized to the size, as in VTAB-1k's protocol; crop c: the
    short side resized to size / c, then the centre cropped, as at timm's evaluation. mean, std: of pixels in [0, 1]."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`, from JSON. Raises DataError if it is incomplete."""
        try:
            values = {f.name: data[f.name] for f in fields(cls)}
            listed = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            _check_values(listed)
            return cls(**cast(dict[str, Any], listed))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a preprocessing that cannot be read: {line(error)}") from error

    def pixels(self, image: "Image") -> Tensor:
        """uint8 (3, h, w), before normalisation."""
        v2 = torchvision()
        mode = v2.InterpolationMode(self.interpolation)
        if self.crop is None:
            image = v2.functional.resize(image, list(self.size), mode, antialias=True)
        else:
            side = int(min(self.size) / self.crop)
            image = v2.functional.center_crop(
                v2.functional.resize(image, [side], mode, antialias=True), list(self.size)
            )
        return v2.functional.pil_to_tensor(image)  # type: ignore[no-any-return]

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 → float32, (v / 255 − mean) / std."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def __call__(self, image: "Image") -> Tensor:
        return self.normalise(self.pixels(image))

    def augmented(self, image: "Image") -> Tensor:
        """A random resized crop, perhaps flipped (Table 10); by torch's global generator."""
        v2 = torchvision()
        crop = v2.RandomResizedCrop(self.size, interpolation=v2.InterpolationMode(self.interpolation), antialias=True)
        return self.normalise(v2.functional.pil_to_tensor(v2.RandomHorizontalFlip()(crop(image))))


def _check_values(data: Mapping[str, Any]) -> None:
    """Raises ValueError for what no backbone wants of its images."""
    if not isinstance(data["size"], tuple) or len(data["size"]) != 2:
        raise ValueError(f"size is {data['size']!r}: expected height and width")
    for side in data["size"]:
        number(side, 1, 16_384, "size", whole=True)
    for name, low in (("mean", -1e4), ("std", 1e-6)):
        if not isinstance(data[name], tuple) or len(data[name]) != 3:
            raise ValueError(f"{name} is {data[name]!r}: expected three numbers")
        for value in data[name]:
            number(value, low, 1e4, name)
    if data["interpolation"] not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {data['interpolation']!r}: expected one of {', '.join(INTERPOLATIONS)}")
    if data["crop"] is not None:
        number(data["crop"], 0.05, 1, "crop")


INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


def torchvision() -> Any:
    """Its transforms, v2. Raises MissingExtra."""
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise MissingExtra("torchvision", "data") from error
    return v2


class Prepared(Dataset[tuple[Tensor, Any]]):
    """Images as (float32 (3, h, w), label). Augmentation is a function of (seed, epoch, index) alone; without it,
    pixels are kept in memory (uint8, at most 2 GiB) once they are decoded and resized."""

    def __init__(
        self, images: Items, preprocess: Preprocess, augment: bool = False, seed: int = 0, cache: bool = True
    ) -> None:
        self.images, self.preprocess, self.augment, self.seed = images, preprocess, augment, seed
        height, width = preprocess.size
        self.cached: dict[int, Tensor] = {}
        self.cache = cache and not augment and 3 * height * width * len(images) <= LIMIT
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        label = self.images.labels[i]
        label = torch.tensor(label) if isinstance(label, list) else int(label)
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                # a large odd multiplier each, so that neighbouring epochs and images share no seed
                torch.manual_seed(((self.seed * 1_000_003 + self.epoch) * 10_000_019 + i) % 2**63)
                return self.preprocess.augmented(self.images.item(i)), label
        pixels = self.cached.get(i)
        if pixels is None:
            pixels = self.preprocess.pixels(self.images.item(i))
            if self.cache:
                self.cached[i] = pixels
        return self.preprocess.normalise(pixels), label
