"""How a family of backbones is built, as data: where its operations read and write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Point:
    """One side of a module's call: the first argument going in, or the (first) tensor coming out.

    last: a map there is (b, h, w, d), and not (b, d, h, w). channels: the last so many of a map's alone; None: all.
    """

    path: str
    side: Literal["in", "out"]
    last: bool = False
    channels: int | None = None


def into(path: str) -> Point:
    """The first argument of a module's call."""
    return Point(path, "in")


def out_of(path: str) -> Point:
    """The first tensor of a module's output."""
    return Point(path, "out")


@dataclass(frozen=True)
class Op:
    """An operation is a pair: where it reads, and where what it says can be added to.

    stream: where the residual stream goes in, before the block's norm; None: where the operation reads.
    """

    reads: Point
    writes: Point
    stream: Point | None = None


@dataclass(frozen=True)
class GlobalOp:
    """An operation of no block, at absolute points: from `reads` channels to `writes`."""

    op: Op
    reads: int
    writes: int


@dataclass(frozen=True)
class Weight:
    """An affine map that no module is called for: while `owner` runs, its `weight` is handed to torch's functions.

    bias: its path; None: there is none, or the owner puts it together.
    """

    owner: str
    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class Affine:
    """The parameters of an affine map: weight (out, in) or (out,), and bias (out,)."""

    weight: Any
    bias: Any

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[-1])

    @property
    def out_features(self) -> int:
        return len(self.weight)


PARTS = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2", "conv", "norms")
AFFINE = ("embed", *PARTS, "norm")

BLOCK = Op(into(""), out_of(""))  # the block itself: reads the stream, writes the stream


def cls_pool(_: Any) -> str:
    return "cls"


def _one(_: Any) -> int:
    return 1


def _any(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Anatomy:
    """How a family of backbones is built. Paths in `ops`, `parts`, `attention`, `width`, `reads`, `heads` and `has` are
    relative to a block, `embed`, `norm` and `post` to the module that holds `blocks`.

    blocks: the list of blocks, or a pattern of several, one for each stage (`stages.*.blocks`, `layer[1-9]`), or
    several patterns, in their order. ops: operation → Op (`block` is always there). parts: the affine modules inside a
    block, by role (`norm1`, `qkv`, `proj`, `norm2`, `fc1`, `fc2`, `conv`, `norms`); each of the paths that a block has
    is a site that reads what goes into the module and writes what comes out; `*`: all convolutions (`conv`) or all
    norms (`norms`) of a block; a `Weight`: where no module is called. attention: the module, or modules, inside which
    softmax(QKᵀ)V is called. width: a parameter of a block whose first size is the width d that it writes; reads: a
    convolution that reads what the block reads, where that may be another width; of several, the first that a block
    has. heads: an attribute of a block, the number of attention heads; none: 1 head. keys: two attributes of a block,
    the heads of its keys and the width of each, where queries share keys (grouped-query attention). has: what else a
    block must have; fits: what else is asked of it. embed: the affine module that makes the first tokens. norm: the
    final norm, or several modules, before pooling; post: those after pooling; pooler: the module that pools tokens (b,
    n, d) into (b, d), if the backbone has one. pool and prefix: the backbone's own pooling (`cls`, `mean`, `last` or
    `map`, the pooler's) and its number of tokens before the patches, read off the module that holds `blocks`. grid:
    whether the tokens after the prefix are a grid of patches. last: maps between a block's modules are (b, h, w, d),
    where these do not tell. family: which of `restuning.methods.FAMILIES` the names of methods mean.

    Of a backbone that denoises, join: the module whose input a side path adds to; there is no pooling and no head, and
    what it says is its own output. stems: the modules along which its side path reads (patterns, in their order), if
    not the blocks; widths: the channels that such a module reads and says. loose: operations of no block, by name, read
    off the module that holds `blocks`.
    """

    name: str
    blocks: str | tuple[str, ...]
    ops: Mapping[str, Op]
    width: str | tuple[str, ...]
    reads: tuple[str, ...] = ()
    heads: str | None = None
    keys: tuple[str, str] | None = None
    has: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str | Weight, ...]] = field(default_factory=dict)
    attention: str | tuple[str, ...] | None = None
    fits: Callable[[Any], bool] = field(default=_any)
    embed: str | None = None
    norm: str | tuple[str, ...] | None = None
    post: str | tuple[str, ...] | None = None
    pooler: str | None = None
    pool: Callable[[Any], str] = field(default=cls_pool)
    prefix: Callable[[Any], int] = field(default=_one)
    grid: bool = False
    last: bool = False
    family: str = ""
    join: str | None = None
    stems: tuple[str, ...] = ()
    widths: Callable[[Any], tuple[int, int]] | None = None
    loose: Callable[[Any], Mapping[str, Sequence[GlobalOp]]] | None = None

    @property
    def convolutional(self) -> bool:
        return self.family.startswith("conv")

    def paths(self) -> list[str]:
        """What a block must have; of several after a `|`, one."""
        points = {p.path for op in self.ops.values() for p in (op.reads, op.writes, op.stream) if p and p.path}
        weights = {c.weight for found in self.parts.values() for c in found if isinstance(c, Weight)}
        either = {"|".join(as_tuple(some)) for some in (self.width, self.reads) if some}
        return sorted(points | weights | {*self.has} | either)


def as_tuple(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths or ()
