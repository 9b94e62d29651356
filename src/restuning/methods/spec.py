"""Table 7 as data: a method says which tuner goes to which operation, or runs beside the backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch import nn

from restuning.errors import MethodError
from restuning.side import AlexNet, SmallCnn
from restuning.tuners import Adapter, Bias, Convpass, Dtl, Lora, Prefix, PrefixTuning, Prompt, PromptTuning, Ssf
from restuning.tuners.base import TunerConfig


def _check_config(where: str, config: Any) -> None:
    if not callable(config):
        raise MethodError(f"{where} is {config!r}: expected a recipe such as restuning.Adapter(10), or a module class")
    if isinstance(config, nn.Module):
        raise MethodError(
            f"{where} is a {type(config).__name__} module, already built: pass its class, "
            "or a function port → module, so that every block gets its own"
        )


def _check_grid(kind: str, grid: Any) -> None:
    if grid is not None and (type(grid) is not int or grid < 1):
        raise MethodError(f"{kind}(grid={grid!r}): expected a whole number of at least 1")


@dataclass(frozen=True)
class Residual:
    """OP(x) + tuner(x, OP(x)) (Eq. 7): operation → recipe of a tuner.

    Operations are `mha`, `ffn`, `block`, the affine modules `norm1`, `qkv`, `proj`, `norm2`, `fc1`, `fc2`, `conv`,
    `norms`, `embed`, `norm` (`affine`: all of them), and the `attention` itself, as far as the backbone has them;
    `all-linear`, every linear map and convolution of the blocks; `words`, the tables of embeddings; a module by its
    name or the end of its path, and `re:` with a regular expression that its whole path matches.
    blocks: the blocks that carry tuners, counted from 0; None: all. No tuners at all is linear probing.
    exclude: modules that are left out, named in the same ways.
    """

    tuners: Mapping[str, TunerConfig] = field(default_factory=dict)
    blocks: Sequence[int] | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        for op, config in self.tuners.items():
            _check_config(f"Residual: the tuner of {op!r}", config)


@dataclass(frozen=True)
class Bypass:
    """Res-Tuning-Bypass (Eq. 8): recipes of the horizontal and the vertical tuners; None is an identity tuner.

    blocks: the blocks that carry tuners, counted from 0 (over stages: the steps between them); None: all. Every block
    keeps its λ.
    grid: g, not the paper's: the path runs on CLS and on the patches pooled to a g × g grid, and the head reads all of
    these tokens; None: on the tokens that the head's pooling can see.
    over: what the path runs over, all `blocks` or, from the first to the last, the outputs of the `stages`; None: the
    stages where there are several.
    gate: λ at initialisation; the paper's is 0.5; towards 1 the path begins as the backbone's own output. gates: one λ
    a `layer`, as in the paper, or one a `channel`. normed: features are normalised (LayerNorm without weights) before
    the path reads them. These three are ours.
    """

    horizontal: TunerConfig | None = None
    vertical: TunerConfig | None = None
    blocks: Sequence[int] | None = None
    grid: int | None = None
    over: Literal["blocks", "stages"] | None = None
    gate: float = 0.5
    gates: Literal["layer", "channel"] = "layer"
    normed: bool = False

    def __post_init__(self) -> None:
        _check_grid("Bypass", self.grid)
        if not (isinstance(self.gate, float) and 0 < self.gate < 1):
            raise MethodError(f"Bypass(gate={self.gate!r}): expected a number between 0 and 1")
        if self.gates not in ("layer", "channel"):
            raise MethodError(f"Bypass(gates={self.gates!r}): expected layer or channel")
        if not isinstance(self.normed, bool):
            raise MethodError(f"Bypass(normed={self.normed!r}): expected true or false")
        if self.over not in (None, "blocks", "stages"):
            raise MethodError(f"Bypass(over={self.over!r}): expected blocks, stages or None")
        for side in ("horizontal", "vertical"):
            if getattr(self, side) is not None:
                _check_config(f"Bypass: the {side} tuner", getattr(self, side))


@dataclass(frozen=True)
class Ladder:
    """LST (Sung et al. 2022): a side transformer of width d / reduction, all of it trained; see `LadderNet`.

    init: where its blocks come from: the backbone's own, structurally pruned by `magnitude` or by `fisher` information
    on the training data, or `random`. grid: as in `Bypass`.
    """

    reduction: int = 16
    init: Literal["magnitude", "fisher", "random"] = "magnitude"
    grid: int | None = None

    def __post_init__(self) -> None:
        if type(self.reduction) is not int or self.reduction < 1:
            raise MethodError(f"Ladder(reduction={self.reduction!r}): expected a whole number of at least 1")
        if self.init not in ("magnitude", "fisher", "random"):
            raise MethodError(f"Ladder(init={self.init!r}): expected magnitude, fisher or random")
        _check_grid("Ladder", self.grid)


@dataclass(frozen=True)
class SideTuning:
    """Side-Tuning (Zhang et al. 2020): a side network on the pixels, blended with the pooled features; see `SideNet`.

    net: a recipe, port → module from images (b, 3, h, w) to (b, port.writes). distil: epochs in which the side network
    first learns to give the backbone's own pooled features, on the training images.
    """

    net: TunerConfig = field(default_factory=AlexNet)
    distil: int = 0

    def __post_init__(self) -> None:
        _check_config("SideTuning: the side network", self.net)


@dataclass(frozen=True)
class Mix:
    """Several methods in one adapter: other tuners in other blocks, LoRA beside prefixes, a side path beside tuners."""

    parts: Sequence["Residual | Bypass | Ladder | SideTuning"]

    def __post_init__(self) -> None:
        wrong = [part for part in self.parts if not isinstance(part, Residual | Bypass | Ladder | SideTuning)]
        if wrong:
            raise MethodError(f"Mix: {wrong[0]!r} is no part of a mix: expected Residual, Bypass, Ladder or SideTuning")
        if sum(not isinstance(part, Residual) for part in self.parts) > 1:
            raise MethodError("Mix: several side paths: expected one at most, beside any number of Residual parts")


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter of the backbone is trained."""


Part: TypeAlias = Residual | Bypass | Ladder | SideTuning
Method: TypeAlias = Part | Mix | Full
KINDS: dict[str, Any] = {c.__name__.lower(): c for c in (Residual, Bypass, Ladder, SideTuning, Mix, Full)}

SIZES: dict[type, str] = {
    Adapter: "width",
    Convpass: "width",
    Dtl: "rank",
    Lora: "rank",
    Prefix: "tokens",
    PrefixTuning: "tokens",
    Prompt: "tokens",
    PromptTuning: "tokens",
    SmallCnn: "width",
}
"""Which setting of a recipe is its size."""

TUNER_CONFIGS: dict[str, Any] = {cls.__name__.lower(): cls for cls in (*SIZES, AlexNet, Bias, Ssf)}


def resize(method: Method, size: int) -> Method:
    """The same method with every tuner of this width, of this rank or of this many tokens (Table 13)."""

    def sized(config: Any) -> Any:
        name = SIZES.get(type(config))
        return config if name is None else replace(config, **{name: size})

    if isinstance(method, Residual):
        return replace(method, tuners={op: sized(config) for op, config in method.tuners.items()})
    if isinstance(method, Bypass):
        return replace(method, horizontal=sized(method.horizontal), vertical=sized(method.vertical))
    if isinstance(method, SideTuning):
        return replace(method, net=sized(method.net))
    return Mix(tuple(resize(part, size) for part in method.parts)) if isinstance(method, Mix) else method  # type: ignore[misc]


def on_blocks(method: Method, blocks: Sequence[int]) -> Method:
    """The same method with tuners in these blocks only (Tables 14 and 15)."""
    if isinstance(method, Mix):
        return Mix(tuple(on_blocks(part, blocks) for part in method.parts))  # type: ignore[misc]
    return replace(method, blocks=tuple(blocks)) if isinstance(method, Residual | Bypass) else method


def grid_of(method: Method) -> int | None:
    """The grid on which a side path runs, if it does."""
    return next((p.grid for p in parts_of(method) if isinstance(p, Bypass | Ladder) and p.grid), None)


def parts_of(method: Method) -> Sequence[Part]:
    """A mix's parts, or the method alone; full fine-tuning has none."""
    if isinstance(method, Full):
        return ()
    return method.parts if isinstance(method, Mix) else (method,)
