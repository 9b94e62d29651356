"""The contract of a tuner: what it is given, what it returns, where it can go. One class for each form of call."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, cast, runtime_checkable

from torch import Tensor, nn

from restuning._types import SiteInfo
from restuning.errors import MethodError

TunerInput: TypeAlias = Literal["normed", "residual", "output"]
"""What a tuner reads of an operation: its input, as a rule after the block's norm; the residual stream before that
norm; or its output."""

Layout: TypeAlias = Literal["tokens", "patches", "map"]
"""How tensors come: tokens (b, n, d), maps row by row; tokens without those that prompts append after the grid of
patches; or maps (b, d, h, w) as a convolution has them."""


class Tuner(nn.Module):
    """OP(x) becomes OP(x) + tuner(x, OP(x)) (Res-Tuning, Eq. 7). A tuner adds no residual of its own.

    `forward(x, y)` is given the operation's input x (b, n, in_features) and its output y (b, n, out_features), and
    returns what is added to y, of its shape, or None for nothing. An input of another resolution than the output is
    averaged over the output's cells.
    """

    form: ClassVar[str] = "plain"
    input: TunerInput = "normed"
    layout: Layout = "tokens"
    mixes_tokens: bool = True
    """Whether an output token may depend on other tokens than the same input token."""
    only_on: str | None = None
    """The one operation that it can go on; None: any."""


class StatefulTuner(Tuner):
    """`forward(x, y, state)`: a tuner with a dict that all tuners of its adapter share, empty when a pass of the
    backbone begins."""

    form: ClassVar[str] = "stateful"


class PromptTuner(nn.Module):
    """`forward(x)`: for the stream x (b, n, d) at a block's input, tokens (b, p, d) that are appended to it (Eq. 4).

    span: they are removed again after the block (`block`) or after the last one (`rest`). unbound: stream and tokens
    pass the blocks apart and meet in the attention alone (Eq. 5).
    """

    form: ClassVar[str] = "prompt"
    input: TunerInput = "normed"
    layout: Layout = "tokens"
    mixes_tokens: bool = True
    only_on: str | None = "block"
    span: Literal["block", "rest"] = "block"
    unbound: bool = False


class AttentionTuner(nn.Module):
    """`forward(call)`: for a call of the attention (`restuning.hooks.attention.Call`), keys and values (heads, p,
    head width) each that are merged into its softmax (Eq. 3)."""

    form: ClassVar[str] = "attention"
    input: TunerInput = "normed"
    layout: Layout = "tokens"
    mixes_tokens: bool = True
    only_on: str | None = "attention"


@runtime_checkable
class Mergeable(Protocol):
    """A tuner that is a change of an affine map's own weight and bias."""

    def merged(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the bias with the tuner in them.

        Args:
            weight: (out, in, …) of a map, (out,) of a norm.
            bias: (out,).
        """
        ...


TunerConfig: TypeAlias = Callable[[SiteInfo], nn.Module]
"""How a tuner is made, called once for each site. `restuning.Adapter(10)` is one; so is any `nn.Module` class whose
`__init__` takes a `SiteInfo`."""

_CONTRACT = ("form", "input", "layout", "mixes_tokens", "only_on")


def as_tuner(module: nn.Module) -> Any:
    """The module itself, with the contract's defaults where its class declares nothing: a plain `nn.Module` with
    `forward(x, y)` is a `Tuner`."""
    for name in _CONTRACT:
        if not hasattr(module, name):
            setattr(module, name, getattr(Tuner, name))
    return module


def copy_contract(source: Any, target: Any) -> None:
    """Have `target` declare what `source` declares."""
    for name in (*_CONTRACT, *(("span", "unbound") if source.form == "prompt" else ())):
        setattr(target, name, getattr(source, name))


def is_prompt(tuner: Any) -> bool:
    """Whether it appends tokens to the stream."""
    return cast(str, tuner.form) == "prompt"


def check_config(where: str, config: Any) -> None:
    """Raises MethodError for what makes no modules, and for a module that is built already."""
    if not callable(config):
        raise MethodError(f"{where} is {config!r}: expected settings such as restuning.Adapter(10), or a module class")
    if isinstance(config, nn.Module):
        raise MethodError(
            f"{where} is a {type(config).__name__} module, already built: pass its class, "
            "or a function site → module, so that every block gets its own"
        )


def make(config: TunerConfig, info: SiteInfo, where: str) -> nn.Module:
    """A module for one site. Raises MethodError where the settings make something else."""
    module = config(info)
    if not isinstance(module, nn.Module):
        raise MethodError(f"the tuner of {where} made a {type(module).__name__}: expected an nn.Module")
    return module


def resized(config: Any, size: int) -> Any:
    """The same settings with another width, rank or number of tokens, by the field that `SIZE` names."""
    name = getattr(config, "SIZE", None)
    return config if name is None else replace(config, **{name: size})


def mixes_no_tokens(config: Any) -> bool:
    """Whether tuners of these settings are known to compute each output token from the same input token alone."""
    return bool(getattr(config, "TOKENWISE", False))
