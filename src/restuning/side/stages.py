"""What side networks that mix tokens by attention share: their inputs, stage by stage, and the attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.errors import CheckpointError, MethodError
from restuning.side.attending import affine, attend
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork, check_grid
from restuning.side.features import ALL, Features, TokenSelection, normalised, summary
from restuning.side.readout import Readout, every_layer, readout_of
from restuning.tuners.scale import check_size

FIXED_SEED = 20_231_030
"""Of projections that are fixed: the same for all tasks."""


class Stages(nn.Module):
    """Tokens of all layers → the inputs g_1 … g_S of as many stages, (b, n, w) each.

    The layers are cut into S runs, the first of them one layer longer where they do not divide; g_j is the sum of
    h_l = LN(x_l) D_l over its run, with LN without weights and D_l (d_l × w) without a bias, truncated normal of
    standard deviation (d_l (L + 1) / (S + 1))^−½.

    fixed: D_l are buffers, the same in every network of these sizes: g_1 … g_S are then common to all tasks.
    components: k; then h_l = τ_l D_l with τ_l = LN(x_l) V_l, where V_l (d_l × k) is fixed, a buffer, and D_l (k × w).
    """

    def __init__(
        self, widths: Sequence[int], width: int, stages: int, components: int | None = None, fixed: bool = False
    ) -> None:
        super().__init__()
        same = torch.Generator().manual_seed(FIXED_SEED) if fixed else None
        self.runs = [part.tolist() for part in torch.arange(len(widths), device="cpu").tensor_split(stages)]
        self.down: Any = Buffers() if fixed else nn.ParameterList()
        self.components = components
        for layer, d in enumerate(widths):
            rows = d if components is None else min(components, d)
            std = (d * len(widths) / (stages + 1)) ** -0.5
            weight = torch.empty(rows, width, device="cpu" if fixed else None)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=same)
            self.down.append(weight.to(torch.get_default_device()) if fixed else nn.Parameter(weight))
            if components is not None:
                self.register_buffer(f"basis_{layer}", torch.eye(d)[:, :rows].clone())

    def basis(self, layer: int) -> Tensor:
        return self.get_buffer(f"basis_{layer}")

    def forward(self, layers: Sequence[Tensor], components: bool) -> list[Tensor]:
        """
        Args:
            layers: x_0 … x_L (b, n, d_l), or their components (b, n, k).
            components: which of these they are.
        """
        return [self._stage(run, [layers[i] for i in run], components) for run in self.runs]

    def _stage(self, run: Sequence[int], layers: Sequence[Tensor], components: bool) -> Tensor:
        if not components:
            layers = [normalised(x) for x in layers]
            if self.components is not None:  # before the product with D: no more than these is kept for backward
                layers = [t @ self.basis(i).to(t.dtype) for i, t in zip(run, layers, strict=True)]
        # one product, not a sum of them
        return torch.cat(list(layers), -1) @ torch.cat([self.down[i] for i in run])


class Buffers(nn.Module):
    """A list of tensors that are not trained."""

    def append(self, x: Tensor) -> None:
        self.register_buffer(str(len(self._buffers)), x)

    def __getitem__(self, i: int) -> Tensor:
        return self.get_buffer(str(i))


class Attention(nn.Module):
    """Multi-head attention (b, m, w) → (b, m, w), after a norm; its weights begin as torch's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        bound = (6 / (width + 3 * width)) ** 0.5  # xavier, of one matrix of queries, keys and values
        for linear in (self.q, self.kv):
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """seen: (b, 1, 1 or m, m), which of the tokens are attended to; None: all."""
        x = self.norm(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(x).chunk(2, -1)))
        out = F.scaled_dot_product_attention(q, k, v, seen)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(Attention):
    """The same from few queries (b, m, w) to many tokens (b, n, w), which have a norm of their own.

    With t = γ t' + β of tokens t' normalised without weights, qᵀ(W_k t + b_k) is (γ W_kᵀ q)ᵀ t' up to a constant that
    softmax does not see, and Σ a (W_v t + b_v) is W_v (γ Σ a t' + β) + b_v. So the tokens pass no map: neither keys nor
    values are kept for backward, and where several networks attend to the same tokens these are worked on once.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.norm_kv = nn.LayerNorm(width)

    def forward(self, x: Tensor, tokens: Tensor, seen: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """tokens: normalised, without weights. seen: (b, n), which of them are attended to; None: all."""
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1))
        keys, values = self.kv.weight.view(2, self.heads, -1, x.shape[-1])
        q = torch.einsum("bmhe,hew->bhmw", q, keys).flatten(1, 2)
        read = attend(
            q * (self.norm_kv.weight * (x.shape[-1] // self.heads) ** -0.5),
            tokens,
            tokens,
            None if seen is None else seen[:, None],
        )
        read = read * self.norm_kv.weight + self.norm_kv.bias
        read = read.reshape(read.shape[0], self.heads, -1, x.shape[-1])
        out = torch.einsum("bhmw,hew->bmhe", read, values).flatten(2) + self.kv.bias.chunk(2)[1]
        return self.proj(out)  # type: ignore[no-any-return]


class SharedAttention(nn.Module):
    """Multi-head attention from few queries (b, m, w) to keys and values that many networks share; the norm of the
    queries has no weights, for those of the map after it do its work."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        bound = (6 / (width + 3 * width)) ** 0.5  # as in `Attention`
        nn.init.uniform_(self.q.weight, -bound, bound)
        nn.init.zeros_(self.q.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        """x: (1, m, w) where it is the same for all. keys, values: (b, heads, n, w / heads), the keys by the root of
        their width smaller. seen: (b, n)."""
        q = torch.unflatten(affine(normalised(x), self.q.weight, self.q.bias), -1, (self.heads, -1)).transpose(1, 2)
        seen = None if seen is None else seen[:, None, None]
        read = attend(q.expand(keys.shape[0], -1, -1, -1), keys, values, seen).transpose(1, 2).flatten(2)
        return affine(read, self.proj.weight, self.proj.bias)


class PixelStem(nn.Module):
    """Three 3×3 convolutions of stride 2, widths w/4, w/2, w; images (b, 3, h, w) → (b, patches, w), averaged over the
    cells of the backbone's own grid of patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        a, b = max(width // 4, 1), max(width // 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, a), (a, b), (b, width)))

    def forward(self, pixels: Tensor, patches: int) -> Tensor:
        x = pixels
        for i, conv in enumerate(self.convs):
            x = conv(F.gelu(x) if i else x)
        rows = max(round((patches * pixels.shape[2] / pixels.shape[3]) ** 0.5), 1)  # of the oblong that they make
        return F.adaptive_avg_pool2d(x, (rows, patches // rows)).flatten(2).transpose(1, 2)


STAGE_GRID = 7
"""Cells a side to which maps are averaged for a path over stages, whatever their own sizes."""


@dataclass(frozen=True)
class PathConfig(SideConfig):
    """Settings of a path through all layers, `BypassQuery` or `BypassAttention`.

    Args:
        width: of the path, a multiple of the `heads`.
        stages: runs of layers.
        heads: of the attention.
        readout: what the head reads besides, `full` or `gated` as in `LinearAll`, or `none`.
        components: how many of each layer's fixed components are read, not its whole width; they are fitted to the
            training data, or come with a bank; None: what a bank holds, or all.
        grid: g, the path runs on CLS and on the patches pooled to a g × g grid; None: on every token, over stages of
            maps on 7 × 7.
        stem: a convolutional stem reads the pixels too.
        readout_last: of how many layers, from the last, the read-out is; None: of all.

    Raises:
        MethodError: a size below 1, a width that the heads do not divide, an unknown read-out.
    """

    width: int = 64
    stages: int = 4
    heads: int = 4
    readout: Literal["full", "gated", "none"] = "full"
    components: int | None = None
    grid: int | None = None
    stem: bool = False
    readout_last: int | None = None

    own_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name in ("width", "stages", "heads"):
            check_size(kind, name, getattr(self, name))
        if self.width % self.heads:
            raise MethodError(f"{kind}(width={self.width}): expected a multiple of its {self.heads} heads")
        if self.readout not in ("full", "gated", "none"):
            raise MethodError(f"{kind}(readout={self.readout!r}): expected full, gated or none")
        for name in ("components", "readout_last"):
            if getattr(self, name) is not None:
                check_size(kind, name, getattr(self, name))
        if not isinstance(self.stem, bool):
            raise MethodError(f"{kind}(stem={self.stem!r}): expected true or false")
        check_grid(kind, self.grid)

    def layers(self, info: FeatureInfo) -> Sequence[int]:
        return every_layer(info)

    def tokens(self, info: FeatureInfo) -> TokenSelection:
        """Every token, or pooled patches where that is asked for, or where stages have grids of their own."""
        grid = self.grid or (None if info.uniform else STAGE_GRID)
        return ALL if grid is None else info.grid(grid)

    def reads_pixels(self) -> bool:
        return self.stem

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.components is not None

    def from_bank(self) -> bool:
        return not self.stem and self.grid is None

    def accepts(self, components: int | None) -> bool:
        return self.grid is None and self.components == components

    def with_components(self, count: int) -> Self:
        return replace(self, components=count) if self.components is None else self

    def resized(self, size: int) -> Self:
        return replace(self, width=size)


@dataclass(frozen=True)
class PathInfo:
    """What a path through all layers is built of.

    Args:
        path: the layers that it reads.
        widths: theirs.
        prefix: how many tokens come before the patches.
        readout: what is read of every layer besides; None: nothing.
        width: of the path, a multiple of the heads.
        stages: at most as many as there are layers.
        heads: of the attention.
        components: of `Stages`.
        stem: whether the first stage is given a convolutional stem's reading of the pixels.
    """

    path: tuple[int, ...]
    widths: tuple[int, ...]
    prefix: int
    readout: Readout | None
    width: int
    stages: int
    heads: int
    components: int | None
    stem: bool

    @classmethod
    def of(cls, part: PathConfig, info: FeatureInfo) -> "PathInfo":
        path = tuple(every_layer(info))
        if part.stem and info.prefix is None:
            raise MethodError("a stem reads images, and this backbone does not")
        prefix = info.prefix or 0
        return cls(
            path,
            tuple(info.layers[layer].out_features for layer in path),
            min(prefix, 1) if part.grid else prefix,  # of pooled patches, the first token alone is kept
            None if part.readout == "none" else readout_of(info, part.readout == "gated", part.readout_last),
            part.width,
            min(part.stages, len(path)),
            part.heads,
            part.components,
            part.stem,
        )


class PathNetwork(SideNetwork):
    """What networks of a path through all layers share: the stages' inputs, the pixel stem, the read-out."""

    output = "pooled"
    attentions: nn.ModuleList
    """One of each stage."""

    def __init__(self, info: PathInfo, fixed: bool = False) -> None:
        super().__init__()
        self.path, self.prefix, self.readout = info.path, info.prefix, info.readout
        self.stages = Stages(info.widths, info.width, info.stages, info.components, fixed)
        self.stem = PixelStem(info.width) if info.stem else None

    def branches(self) -> list[tuple[nn.Module, float]]:
        return [(attention, j / len(self.attentions)) for j, attention in enumerate(self.attentions)]

    def banked(self, features: Features) -> Features:
        """As a bank of components has them: tokens normalised, or their components, and summaries, each made once."""
        if features.tokens.tokens == "components":
            return features
        tokens = {layer: normalised(features.layers[layer]) for layer in self.path}
        summaries = (
            {} if self.readout is None else {i: summary(t, self.prefix, features.mask) for i, t in tokens.items()}
        )
        if self.stages.components is not None:
            tokens = {layer: t @ self.stages.basis(i).to(t.dtype) for i, (layer, t) in enumerate(tokens.items())}
        selection = TokenSelection("components", self.prefix, self.stages.components)
        return replace(features, layers=tokens, tokens=selection, summaries=summaries)

    def inputs(self, features: Features) -> list[Tensor]:
        """g_1 … g_S (b, n, w)."""
        layers = [features.layers[layer] for layer in self.path]
        found: list[Tensor] = self.stages(layers, features.tokens.tokens == "components")
        if self.stem is not None and features.pixels is not None:
            stem = self.stem(features.pixels, found[0].shape[1] - self.prefix)
            found[0] = found[0] + F.pad(stem, (0, 0, self.prefix, 0))
        return found

    def read_out(self, features: Features) -> tuple[Tensor, ...]:
        """What is read of every layer besides, (b, k), or nothing."""
        if self.readout is None:
            return ()
        read = self.path[-self.readout.layers :]
        summaries = features.summaries or {
            layer: summary(normalised(features.layers[layer]), self.prefix, features.mask) for layer in read
        }
        return (self.readout([summaries[layer] for layer in read]),)

    def beside_readout(self, out: Tensor, features: Features) -> Tensor:
        """The read-out and `out` (b, k) together."""
        return torch.cat([*self.read_out(features), out], -1)

    @torch.no_grad()
    def set_components(self, bases: Mapping[int, Tensor]) -> None:
        """Components that were fitted, (d_l, k) by layer; nothing for a path that reads tokens."""
        if self.stages.components is not None:
            for i, layer in enumerate(self.path):
                self.stages.basis(i).copy_(bases[layer])

    @torch.no_grad()
    def set_shared(self, state: Mapping[str, Tensor]) -> None:
        """Fixed weights, by the names of its buffers, in place of those that it began with.

        Raises:
            CheckpointError: they are of other sizes.
        """
        own = dict(self.named_buffers())
        shapes, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, state))
        if not own or shapes != found:
            raise CheckpointError(
                f"shared weights of other sizes: given are {_sizes(found)}; {type(self).__name__} has {_sizes(shapes)}"
            )
        for name, t in own.items():
            t.copy_(state[name])


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The first of each kind."""
    kinds: dict[str, str] = {}
    for name, shape in shapes.items():
        kinds.setdefault(name.rstrip("0123456789._"), " × ".join(map(str, shape)))
    return ", ".join(f"{kind} {shape}" for kind, shape in kinds.items()) or "none"
