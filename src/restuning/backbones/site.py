"""What is found of a backbone: its operations, block by block, and what its tail needs to know."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, overload

from torch import nn

from restuning._types import SiteInfo
from restuning.backbones.anatomy import AFFINE, LINEAR, PARTS, Affine, Anatomy, Point, Weight
from restuning.errors import SiteError
from restuning.side.base import check_indices


@dataclass(frozen=True)
class Site:
    """An operation of one block, or of none (`embed`, `norm`): absolute paths in the backbone, and the port that a
    tuner there is built for. `name` tells it from every other site. weight: set where no module is called; the points
    are a name then."""

    op: str
    block: int | None
    name: str
    reads: Point
    writes: Point
    stream: Point
    info: SiteInfo
    weight: Weight | None = None

    def affine(self, backbone: nn.Module) -> Affine:
        """The affine map at a part, at `embed` or at `norm`, of a module or of none."""
        at = self.parameters
        weight = attrgetter(at.weight)(backbone)
        bias = None if at.bias is None else _reached(backbone, at.bias)
        return Affine(weight.T if self.turned(backbone) else weight, bias)

    @property
    def parameters(self) -> Weight:
        """The paths of the affine map's parameters."""
        return self.weight or Weight("", f"{self.reads.path}.weight", f"{self.reads.path}.bias")

    def turned(self, backbone: nn.Module) -> bool:
        """Whether the map's weight is (in, out), as GPT-2's."""
        return self.weight is None and type(backbone.get_submodule(self.reads.path)).__name__ == "Conv1D"


@dataclass(frozen=True)
class Found:
    """What a trace found of a backbone that no row of the table fits.

    share: of the parameters, those inside the blocks (words are not counted, which are looked up). sure: `high`,
    `medium` or `low`. notes: what could not be found, a line each. instead: which pooling stands in for the backbone's
    own, and why; empty: it is the backbone's own.
    """

    share: float
    sure: str
    notes: tuple[str, ...] = ()
    instead: str = ""


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """All sites of a backbone, block by block, and what its tail needs to know.

    stages: the layers at which stages end. stems: the modules that say the layers x_1 … x_L, the blocks as a rule, of
    which the first reads x_0. features: the port of every layer x_0 … x_L, as something whose input and output it is.
    port: that of what the head reads. norm, post and pooler: the
    modules before and after pooling, and in its place. points: where the layers x_0 … x_L are seen, if not at the
    stems' ends. found: of sites that no row of the table has, what a trace says of them. rewritten: the layers
    to which the backbone writes once more, in place.
    """

    anatomy: Anatomy
    blocks: tuple[str, ...]
    stages: tuple[int, ...]
    stems: tuple[str, ...]
    features: tuple[SiteInfo, ...]
    all: tuple[Site, ...]
    info: SiteInfo
    norm: tuple[str, ...]
    post: tuple[str, ...]
    pooler: str | None
    join: str | None
    pool: str
    prefix: int
    points: tuple[Point, ...] = ()
    found: Found | None = None
    rewritten: tuple[int, ...] = ()

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.op for site in self.all))

    @property
    def uniform(self) -> bool:
        """Whether all blocks are of one stage, so of one width and one number of tokens."""
        return len(self.stages) == 1

    def layer(self, layer: int) -> Point:
        """Where a layer can be seen: 0 is what the first stem reads, l the output of stem l."""
        if self.points:
            return self.points[layer]
        return Point(self.stems[max(layer - 1, 0)], "out" if layer else "in", self.anatomy.last)

    def at(self, op: str, blocks: Sequence[int] | None = None, exclude: Sequence[str] = ()) -> tuple[Site, ...]:
        """The sites of one operation, in all blocks or in those named; sites of no block are always among them.

        Args:
            op: an operation; `affine`: all affine modules that are told by their role; `all-linear`: all linear maps
                and convolutions of the blocks; a module's own name, such as `query`, or the end of its path, such as
                `attn.q_proj`; `re:` and a regular expression that all of a module's path matches.
            blocks: counted from 0; None: all.
            exclude: names, ends of paths or `re:` expressions of modules that are left out.

        Raises:
            SiteError: for an operation or a block that is not there, and where everything is excluded.
        """
        affine = (*AFFINE, "linear") if self.found else AFFINE
        ops = {"affine": affine, "all-linear": LINEAR}.get(op, (op,)) if self.anatomy.parts else (op,)
        named = [s for s in self.all if s.op in ops]
        if op == "all-linear":
            named = [s for s in named if s.block is not None]
        named = named or [s for s in self.all if s.op in (*PARTS, "words") and is_named(s.reads.path, op)]
        if not named:
            raise SiteError(f"no operation {op!r} here: {self.anatomy.name} has {', '.join(self.ops)}")
        check_indices(blocks, len(self.blocks), "block", "this backbone")
        kept = [s for s in named if not any(is_named(s.reads.path, name) for name in exclude)]
        if not kept:
            raise SiteError(f"everything of {op!r} is excluded by {', '.join(exclude)}")
        return tuple(s for s in kept if blocks is None or s.block is None or s.block in blocks)

    def modules(self, backbone: nn.Module, name: str) -> tuple[Site, ...]:
        """The modules of any kind that a name or the end of a path means, the outermost of them, each as a site: of the
        operation `tail` where the tail runs it, else `module`. Raises SiteError where there is none."""
        found: list[Site] = []
        for path, _ in backbone.named_modules():
            if path and is_named(path, name) and not any(path.startswith(f"{s.reads.path}.") for s in found):
                tail = (*self.norm, *self.post, *filter(None, (self.pooler,)))
                ours = any(f"{path}.".startswith(f"{t}.") or f"{t}.".startswith(f"{path}.") for t in tail)
                into, out = Point(path, "in"), Point(path, "out")
                key = f"module_{path.replace('.', '_')}"
                found.append(Site("tail" if ours else "module", None, key, into, out, into, self.info))
        if not found:
            raise SiteError(f"modules_to_save: no module {name!r} in {self.anatomy.name}")
        return tuple(found)

    def __len__(self) -> int:
        return len(self.all)

    @overload
    def __getitem__(self, i: int) -> Site: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Site]: ...
    def __getitem__(self, i: int | slice) -> Site | Sequence[Site]:
        return self.all[i]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.all)


def is_named(path: str, name: str) -> bool:
    """Whether a name means a module: the end of its path, or an expression that all of it matches."""
    if name.startswith("re:"):
        try:
            return re.fullmatch(name[3:], path) is not None
        except re.error as error:
            raise SiteError(f"{name!r} is no regular expression: {error}") from error
    return path == name or path.endswith(f".{name}")


def _reached(backbone: nn.Module, path: str) -> Any:
    """None where nothing has that name: norms without a bias have not even the name of one."""
    parent, _, name = path.rpartition(".")
    return getattr(backbone.get_submodule(parent), name, None)
