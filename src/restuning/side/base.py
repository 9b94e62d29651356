"""The contract of a side network: its settings know what it reads, how it is built and how they are resized."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from restuning._types import SiteInfo
from restuning.errors import MethodError, SiteError
from restuning.side.features import MEAN, Features, TokenSelection


@dataclass(frozen=True)
class FeatureInfo:
    """What a side network may know of the backbone whose features it reads.

    Args:
        name: of the backbone's family, for errors.
        layers: of x_0 … x_L, as something with that layer for input and for output.
        stages: the layers at which stages end.
        blocks: how many blocks there are.
        head: of what the head reads by the backbone's own pooling: `out_features`, `heads`, `grid`.
        pool: the backbone's pooling, by name.
        pooled: which tokens that pooling can see.
        hidden: width of a block's FFN.
        denoises: whether the backbone predicts noise, and has no head.
        decoder: whether the layers are those of a U-Net's decoder.
        weights: role → affine maps, block by block; None where there are no weights.
    """

    name: str
    layers: tuple[SiteInfo, ...]
    stages: tuple[int, ...]
    blocks: int
    head: SiteInfo
    pool: str
    pooled: TokenSelection
    hidden: int
    denoises: bool = False
    decoder: bool = False
    weights: Callable[[], Sequence[Mapping[str, Sequence[Any]]]] | None = None

    @property
    def uniform(self) -> bool:
        """Whether all layers are of one stage: of one width and one number of tokens."""
        return len(self.stages) == 1

    @property
    def prefix(self) -> int | None:
        """How many tokens come before the grid of patches; None where there is no grid."""
        return self.head.grid

    def grid(self, cells: int) -> TokenSelection:
        """The patches pooled to a grid of so many cells a side, after the first token where there is one.

        Raises:
            MethodError: the tokens are no grid.
        """
        if cells == 1 and not self.prefix:
            return MEAN
        if self.prefix is None:
            raise MethodError("a side path on a grid needs a grid of patches, and this backbone's tokens are none")
        return TokenSelection(cells, self.prefix)


class SideNetwork(nn.Module):
    """A network on a frozen backbone's features, `forward(features) → Tensor`, which feeds nothing back.

    `output`: `tokens` (b, n, d) that take the place of the final norm's input; `pooled` (b, out_features), which the
    head reads; or `beside`, which `blend` puts together with what the head would have read.
    """

    output: ClassVar[Literal["tokens", "pooled", "beside"]] = "tokens"
    out_features: int = 0
    mixes_tokens: bool = True
    """Whether an output token may depend on other tokens than the same token of each layer."""
    keeps_mean: bool = False
    """Whether the mean of its outputs for some tokens is its output for their mean."""
    reads_padding: bool = True
    """Whether it needs the mask that tells tokens from padding."""

    def blend(self, pooled: Tensor, side: Tensor) -> Tensor:
        raise NotImplementedError

    def prepare(self, features: Features) -> Features:
        """What networks with the same fixed weights (buffers) make of features first, all of them alike: done once for
        any number of them, it is handed to each."""
        return features

    def parts(self, features: Features) -> tuple[Tensor, ...]:
        """Its output in parts (b, k), as a linear head may read it: what is common to many networks is then not copied
        for each."""
        return (self(features),)

    def branches(self) -> list[tuple[nn.Module, float]]:
        """Its modules whose outputs are added along its path, and how deep each is, from 0 (first) to 1; as a rule it
        is one branch, beside the backbone."""
        return [(self, 0.0)]


class SideConfig:
    """The settings of a side network, a frozen dataclass: a part of a method, which answers for itself."""

    needs_weights: bool = False
    """Whether the network begins from the backbone's own weights."""
    needs_data: bool = False
    """Whether it begins from training data."""
    grid: int | None = None
    """Cells a side of the grid of pooled patches on which it runs; None: on tokens."""
    every_token: ClassVar[bool] = False
    """Whether it reads every token in full, of a bank too."""
    own_output: ClassVar[bool] = False
    """Whether the head reads the network's output, and the backbone's norm and pooling have no part in it."""

    def layers(self, info: FeatureInfo) -> Sequence[int]:
        """The layers that it reads."""
        return range(len(info.layers))

    def tokens(self, info: FeatureInfo) -> TokenSelection:
        """The tokens of them that it reads, where the network needs no others to compute these."""
        return info.pooled if self.grid is None else info.grid(self.grid)

    def reads_pixels(self) -> bool:
        """Whether it reads the backbone's own input too."""
        return False

    def build(self, info: FeatureInfo) -> SideNetwork:
        """The network.

        Raises:
            MethodError: the backbone does not fit.
        """
        raise NotImplementedError

    def from_bank(self) -> bool:
        """Whether a bank, of a grid of pooled patches, of components or of all tokens, holds all that it needs."""
        return self.every_token

    def accepts(self, components: int | None) -> bool:
        """Whether so many fixed components of each layer's tokens, with the layers' summaries, are enough for it."""
        return False

    def with_components(self, count: int) -> "SideConfig":
        """The same for so many components of each layer's tokens, where it leaves their number open."""
        return self

    def resized(self, size: int) -> "SideConfig":
        """The same with every width, rank or number of tokens of this size."""
        return self

    def on_blocks(self, blocks: Sequence[int]) -> "SideConfig":
        """The same with tuners in these blocks alone, where it has tuners."""
        return self


def require_one_width(what: str, info: FeatureInfo) -> None:
    """Raises MethodError for backbones of several stages."""
    if not info.uniform:
        widths = ", ".join(str(info.layers[layer].out_features) for layer in info.stages)
        raise MethodError(f"{what} needs blocks of one width: {info.name} has stages of widths {widths}")


def check_grid(kind: str, grid: Any) -> None:
    """Cells a side are a whole number."""
    if grid is not None and (type(grid) is not int or grid < 1):
        raise MethodError(f"{kind}(grid={grid!r}): expected a whole number of at least 1")


def check_indices(indices: Sequence[int] | None, count: int, what: str, where: str) -> None:
    """Raises SiteError for those that are not among the first `count`, and if none is named."""
    wrong = [i for i in indices or () if not 0 <= i < count]
    if wrong or (indices is not None and not indices):
        raise SiteError(f"no {what} {wrong or '(empty list)'}: {where} has {what}s 0 to {count - 1}")
