"""Side-Tuning."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from restuning._types import SiteInfo
from restuning.errors import MethodError, MissingExtra
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork
from restuning.side.features import Features
from restuning.tuners.base import TunerConfig, check_config, make, resized
from restuning.tuners.scale import check_size


@dataclass(frozen=True)
class AlexNet:
    """torchvision's AlexNet features (2,469,696 parameters), 6 × 6 pooled, then Linear(9216, width) without bias."""

    def __call__(self, info: SiteInfo) -> nn.Module:
        try:
            from torchvision.models import alexnet
        except ImportError as error:
            raise MissingExtra("torchvision", "timm") from error
        _check_images(info)
        model = alexnet()
        return nn.Sequential(
            _AtLeast(63),
            model.features,
            nn.AdaptiveAvgPool2d(6),
            nn.Flatten(),
            nn.Linear(9216, info.out_features, bias=False),
        )


@dataclass(frozen=True)
class SmallCnn:
    """Four 3×3 convolutions of stride 2 with batch norm, widths w, 2w, 4w, 8w; pooled, then Linear(8w, width)."""

    SIZE: ClassVar[str] = "width"

    width: int = 32

    def __post_init__(self) -> None:
        check_size("SmallCnn", "width", self.width)

    def __call__(self, info: SiteInfo) -> nn.Module:
        _check_images(info)
        widths = [3, *(self.width * 2**i for i in range(4))]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], info.out_features))


class _AtLeast(nn.Module):
    """Refuses images that the convolutions after it would shrink to nothing."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, pixels: Tensor) -> Tensor:
        if min(pixels.shape[-2:]) < self.side:
            raise MethodError(
                f"this side network needs images of {self.side} pixels a side: got {tuple(pixels.shape[-2:])}"
            )
        return pixels


def _check_images(info: SiteInfo) -> None:
    if info.grid is None:
        raise MethodError("this side network reads images, and the backbone does not")


@dataclass(frozen=True)
class SideTuning(SideConfig):
    """Side-Tuning (Zhang et al. 2020): a side network on the pixels, blended with the pooled features; see `SideNet`.

    net: settings, site → module from images (b, 3, h, w) to (b, site.out_features). distil: epochs in which the side
    network first learns to give the backbone's own pooled features, on the training images.
    """

    net: TunerConfig = field(default_factory=AlexNet)
    distil: int = 0

    def __post_init__(self) -> None:
        check_config("SideTuning: the side network", self.net)

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.distil > 0

    def layers(self, info: FeatureInfo) -> Sequence[int]:
        return (len(info.layers) - 1,)

    def reads_pixels(self) -> bool:
        return True

    def build(self, info: FeatureInfo) -> "SideNet":
        return SideNet(make(self.net, info.head, "side-tuning"))

    def resized(self, size: int) -> "SideTuning":
        return replace(self, net=resized(self.net, size))


class SideNet(SideNetwork):
    """Side-Tuning (Zhang et al. 2020): σ(α) · base + (1 − σ(α)) · side of the pooled features, α = 0 at
    initialisation."""

    output = "beside"
    mixes_tokens = False  # it reads pixels, and of the backbone what the head reads
    keeps_mean = True
    reads_padding = False

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, features: Features) -> Tensor:
        """The side network's own output, (b, out_features)."""
        out: Tensor = self.net(features.pixels)
        return out

    def blend(self, pooled: Tensor, side: Tensor) -> Tensor:
        """Args:
        pooled: what the head would have read, (b, out_features).
        side: of `forward`.
        """
        return side + self.alpha.sigmoid() * (pooled - side)  # under autocast their dtypes differ
