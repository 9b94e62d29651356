"""Table 7 as data: which tuner goes to which operation, or which network runs beside the backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from restuning.errors import MethodError
from restuning.side import (
    AlexNet,
    Bypass,
    BypassAttention,
    BypassQuery,
    Ladder,
    Last,
    LinearAll,
    Losa,
    Mist,
    Sherl,
    SideTuning,
    SmallCnn,
    UniPt,
    Vqt,
)
from restuning.side.base import SideConfig
from restuning.tuners import Adapter, Bias, Convpass, Dtl, Lora, Prefix, PrefixTuning, Prompt, PromptTuning, Ssf
from restuning.tuners.base import TunerConfig, check_config, resized


@dataclass(frozen=True)
class Residual:
    """OP(x) + tuner(x, OP(x)) (Res-Tuning, Eq. 7). No tuners at all is linear probing.

    Args:
        tuners: operation → settings of its tuner. Operations are `mha`, `ffn`, `block`, the affine modules `norm1`,
            `qkv`, `proj`, `norm2`, `fc1`, `fc2`, `conv`, `norms`, `embed`, `norm` (`affine`: all of them), and the
            `attention` itself, as far as the backbone has them; `all-linear`, every linear map and convolution of the
            blocks; `words`, the tables of embeddings; a module by its name or the end of its path, and `re:` with a
            regular expression that its whole path matches.
        blocks: the blocks that carry tuners, counted from 0; None: all.
        exclude: modules that are left out, named in the same ways.
        modules_to_save: modules of any kind, named in the same ways, of which a copy is trained in their place, as
            PEFT does under that name.

    Raises:
        MethodError: settings that make no module.
    """

    tuners: Mapping[str, TunerConfig] = field(default_factory=dict)
    blocks: Sequence[int] | None = None
    exclude: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        for op, config in self.tuners.items():
            check_config(f"Residual: the tuner of {op!r}", config)

    def resized(self, size: int) -> "Residual":
        """The same with every tuner of this size."""
        return replace(self, tuners={op: resized(config, size) for op, config in self.tuners.items()})

    def on_blocks(self, blocks: Sequence[int]) -> "Residual":
        """The same with tuners in these blocks alone."""
        return replace(self, blocks=tuple(blocks))


Part: TypeAlias = Residual | SideConfig


@dataclass(frozen=True)
class Mix:
    """Several methods in one adapter: other tuners in other blocks, LoRA beside prefixes, a side network beside tuners.

    Args:
        parts: any number of `Residual`, and one side network at most.

    Raises:
        MethodError: something else among the parts, or several side networks.
    """

    parts: Sequence[Part]

    def __post_init__(self) -> None:
        wrong = [part for part in self.parts if not isinstance(part, Part)]
        if wrong:
            raise MethodError(f"Mix: {wrong[0]!r} is no part of a mix: expected Residual, {', '.join(_SIDES)}")
        if sum(not isinstance(part, Residual) for part in self.parts) > 1:
            raise MethodError("Mix: several side paths: expected one at most, beside any number of Residual parts")

    def resized(self, size: int) -> "Mix":
        """The same with every part of this size."""
        return Mix(tuple(part.resized(size) for part in self.parts))

    def on_blocks(self, blocks: Sequence[int]) -> "Mix":
        """The same with tuners in these blocks alone."""
        return Mix(tuple(part.on_blocks(blocks) for part in self.parts))


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter of the backbone is trained."""

    def resized(self, size: int) -> "Full":
        """The same: nothing has a size."""
        return self

    def on_blocks(self, blocks: Sequence[int]) -> "Full":
        """The same: every block is trained."""
        return self


Method: TypeAlias = Part | Mix | Full

_NEIGHBOURS = (Last, Losa, Mist, Vqt, UniPt, Sherl)
_SIDES: dict[str, Any] = {
    config.__name__: config
    for config in (Bypass, Ladder, SideTuning, LinearAll, BypassQuery, BypassAttention, *_NEIGHBOURS)
}
KINDS: dict[str, Any] = {c.__name__.lower(): c for c in (Residual, *_SIDES.values(), Mix, Full)}
"""Methods by the names that files have for them; a new side network is a row here."""

_TUNERS = (Adapter, Bias, Convpass, Dtl, Lora, Prefix, PrefixTuning, Prompt, PromptTuning, Ssf, AlexNet, SmallCnn)
TUNER_CONFIGS: dict[str, Any] = {config.__name__.lower(): config for config in _TUNERS}
"""Settings of tuners by the names that files have for them; a new tuner is a row here."""


def resize(method: Method, size: int) -> Method:
    """The same method with every tuner of this width, of this rank or of this many tokens (Table 13)."""
    return method.resized(size)


def on_blocks(method: Method, blocks: Sequence[int]) -> Method:
    """The same method with tuners in these blocks only (Tables 14 and 15)."""
    return method.on_blocks(blocks)


def parts_of(method: Method) -> Sequence[Part]:
    """A mix's parts, or the method alone; full fine-tuning has none."""
    if isinstance(method, Full):
        return ()
    return method.parts if isinstance(method, Mix) else (method,)


def residuals_of(method: Method) -> Sequence[Residual]:
    """The parts that are added inside the backbone."""
    return [part for part in parts_of(method) if isinstance(part, Residual)]


def side_of(method: Method) -> SideConfig | None:
    """The part that runs beside the backbone, if there is one."""
    return next((part for part in parts_of(method) if isinstance(part, SideConfig)), None)


def grid_of(method: Method) -> int | None:
    """Cells a side of the grid on which a side path runs and its head reads, if it does."""
    side = side_of(method)
    return None if side is None or side.own_output else side.grid


def reads_all_tokens(method: Method) -> bool:
    """Whether the head reads a side network's own output in place of the backbone's pooled features."""
    side = side_of(method)
    return side is not None and side.own_output


def reads_every_token(method: Method) -> bool:
    """Whether a side network reads every token in full."""
    side = side_of(method)
    return side is not None and side.every_token


def with_components(method: Method, count: int) -> Method:
    """The method as it reads a bank of so many components: a path that leaves their number open has these."""
    if isinstance(method, Mix):
        return Mix(tuple(with_components(part, count) for part in method.parts))  # type: ignore[misc]
    return method.with_components(count) if isinstance(method, SideConfig) else method
