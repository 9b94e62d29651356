"""Table 7 as data: a method says which tuner goes to which operation, or runs beside the backbone."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from torch import nn

from restuning._types import Recipe
from restuning.errors import MethodError, line
from restuning.side import AlexNet, SmallCnn
from restuning.tuners import (
    Adapter,
    Bias,
    Convpass,
    Dtl,
    Lora,
    Prefix,
    PrefixTuning,
    Prompt,
    PromptTuning,
    Ssf,
)
from restuning.tuners.scale import check_size


def _check_recipe(where: str, recipe: Any) -> None:
    if not callable(recipe):
        raise MethodError(f"{where} is {recipe!r}: expected a recipe such as restuning.Adapter(10), or a module class")
    if isinstance(recipe, nn.Module):
        raise MethodError(
            f"{where} is a {type(recipe).__name__} module, already built: pass its class, "
            "or a function port → module, so that every block gets its own"
        )


def _check_grid(kind: str, grid: Any) -> None:
    if grid is not None and (type(grid) is not int or grid < 1):
        raise MethodError(f"{kind}(grid={grid!r}): expected a whole number of at least 1")


@dataclass(frozen=True)
class Residual:
    """OP(x) + tuner(x, OP(x)) (Eq. 7): operation → recipe of a tuner.

    Operations are `mha`, `ffn`, `block`, the affine modules `norm1`, `qkv`, `proj`, `norm2`, `fc1`, `fc2`, `conv`,
    `norms`, `embed`, `norm` (`affine`: all of them), and the `attention` itself, as far as the backbone has them.
    blocks: the blocks that carry tuners, counted from 0; None: all. No tuners at all is linear probing.
    """

    tuners: Mapping[str, Recipe] = field(default_factory=dict)
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for op, recipe in self.tuners.items():
            _check_recipe(f"Residual: the tuner of {op!r}", recipe)


@dataclass(frozen=True)
class Bypass:
    """Res-Tuning-Bypass (Eq. 8): recipes of the horizontal and the vertical tuners; None is an identity tuner.

    blocks: the blocks that carry tuners, counted from 0 (over stages: the steps between them); None: all. Every block
    keeps its λ.
    grid: g, not the paper's: the path runs on CLS and on the patches pooled to a g × g grid, and the head reads all of
    these tokens; None: on the tokens that the head's pooling can see.
    over: what the path runs over, all `blocks` or, from the first to the last, the outputs of the `stages`; None: the
    stages where there are several.
    gate: λ at birth; the paper's is 0.5; towards 1 the path begins as the backbone's own output. gates: one λ a
    `layer`, as in the paper, or one a `channel`. normed: features are normalised (LayerNorm without weights) before the
    path reads them. These three are ours.
    """

    horizontal: Recipe | None = None
    vertical: Recipe | None = None
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
                _check_recipe(f"Bypass: the {side} tuner", getattr(self, side))


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

    net: Recipe = field(default_factory=AlexNet)
    distil: int = 0

    def __post_init__(self) -> None:
        _check_recipe("SideTuning: the side network", self.net)


@dataclass(frozen=True)
class LinearAll:
    """A linear head on every layer: the first token and the mean of the patches (of texts: the mean of the tokens),
    each token normalised (LayerNorm without weights); see `Readout`. Ours.

    gated: the layers are summed by gates, so that the head reads twice the width and not that of every layer.
    """

    gated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.gated, bool):
            raise MethodError(f"LinearAll(gated={self.gated!r}): expected true or false")


@dataclass(frozen=True)
class BypassQuery:
    """Learned queries that attend to the tokens of all layers, stage by stage, beside a linear read-out of every layer;
    see `QueryNet`. Ours.

    width: of the path, a multiple of the `heads`. stages: runs of layers. readout: what the head reads besides, `full`
    or `gated` as in `LinearAll`, or `none`. components: how many of each layer's fixed components are read, not its
    whole width; they are fitted to the training data, or come with a bank; None: what a bank holds, or all.
    grid: g, the path runs on CLS and on the patches pooled to a g × g grid; None: on every token, over stages of maps
    on 7 × 7. stem: a convolutional stem reads the pixels too.
    """

    width: int = 64
    stages: int = 4
    queries: int = 8
    heads: int = 4
    readout: Literal["full", "gated", "none"] = "full"
    components: int | None = None
    grid: int | None = None
    stem: bool = False

    def __post_init__(self) -> None:
        check_size("BypassQuery", "queries", self.queries)
        _check_path(self)


@dataclass(frozen=True)
class BypassAttention:
    """Self-attention among the tokens of all layers, stage by stage, beside a linear read-out of every layer; see
    `AttentionNet`. Ours, in the manner of LAST (2402.04009). Settings are those of `BypassQuery`."""

    width: int = 64
    stages: int = 4
    heads: int = 4
    readout: Literal["full", "gated", "none"] = "full"
    components: int | None = None
    grid: int | None = None
    stem: bool = False

    def __post_init__(self) -> None:
        _check_path(self)


def _check_path(part: BypassQuery | BypassAttention) -> None:
    kind = type(part).__name__
    for name in ("width", "stages", "heads"):
        check_size(kind, name, getattr(part, name))
    if part.width % part.heads:
        raise MethodError(f"{kind}(width={part.width}): expected a multiple of its {part.heads} heads")
    if part.readout not in ("full", "gated", "none"):
        raise MethodError(f"{kind}(readout={part.readout!r}): expected full, gated or none")
    if part.components is not None:
        check_size(kind, "components", part.components)
    if not isinstance(part.stem, bool):
        raise MethodError(f"{kind}(stem={part.stem!r}): expected true or false")
    _check_grid(kind, part.grid)


OwnOutput: TypeAlias = LinearAll | BypassQuery | BypassAttention
"""Side paths whose own output the head reads: the frozen final norm and the backbone's pooling have no part in it."""


@dataclass(frozen=True)
class Mix:
    """Several methods in one adapter: other tuners in other blocks, LoRA beside prefixes, a side path beside tuners."""

    parts: Sequence["Part"]

    def __post_init__(self) -> None:
        wrong = [part for part in self.parts if not isinstance(part, Part)]
        if wrong:
            expected = "Residual, Bypass, Ladder, SideTuning, LinearAll, BypassQuery or BypassAttention"
            raise MethodError(f"Mix: {wrong[0]!r} is no part of a mix: expected {expected}")
        if sum(not isinstance(part, Residual) for part in self.parts) > 1:
            raise MethodError("Mix: several side paths: expected one at most, beside any number of Residual parts")


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter of the backbone is trained."""


Part: TypeAlias = Residual | Bypass | Ladder | SideTuning | LinearAll | BypassQuery | BypassAttention
Method: TypeAlias = Part | Mix | Full
KINDS: dict[str, Any] = {
    c.__name__.lower(): c
    for c in (Residual, Bypass, Ladder, SideTuning, LinearAll, BypassQuery, BypassAttention, Mix, Full)
}

_DUAL = {"mha": Adapter(10, scale="channel"), "ffn": Adapter(10, scale="channel")}

methods: dict[str, Method] = {
    "full": Full(),
    "linear": Residual(),
    "adapter": Residual({"ffn": Adapter(96, init="zeros", source="out")}),
    "adapter-houlsby": Residual(dict.fromkeys(("mha", "ffn"), Adapter(64, init="houlsby", source="out"))),
    "adapter-pfeiffer": Residual({"ffn": Adapter(48, act="relu", init="bert", source="out")}),
    "prefix": Residual({"attention": PrefixTuning(10)}),
    "vpt-shallow": Residual({"block": PromptTuning(90, span="rest")}, blocks=(0,)),
    "vpt-deep": Residual({"block": PromptTuning(61)}),
    "lora": Residual({"qkv": Lora(8)}),
    "bitfit": Residual({"affine": Bias()}),
    "adaptformer": Residual({"ffn": Adapter(64, act="relu", init="kaiming", source="stream", factor=0.1, dropout=0.1)}),
    "ssf": Residual({"affine": Ssf()}),
    "convpass": Residual({"mha": Convpass(8), "ffn": Convpass(8)}),
    "mam-adapter": Residual(
        {"attention": PrefixTuning(30), "ffn": Adapter(512, act="relu", init="kaiming", factor=4.0)}
    ),
    "noah": Residual({"ffn": Adapter(5, source="out"), "qkv": Lora(5), "block": PromptTuning(5)}),
    "side-tuning": SideTuning(),
    "lst": Ladder(16),
    "dtl": Residual({"block": Dtl(2)}),
    "dtl-plus": Residual({"block": Dtl(2, plus=True)}),
    "res-tuning-single": Residual({"ffn": Prompt(10)}),
    "res-tuning": Residual(_DUAL),
    "res-tuning-tri": Residual({**_DUAL, "block": Adapter(10)}),
    "res-tuning-nlp": Residual({"mha": Prefix(10), "ffn": Adapter(10)}),
    "bypass-none": Bypass(),
    "bypass-horizontal": Bypass(horizontal=Adapter(10)),
    "bypass-vertical": Bypass(vertical=Adapter(10)),
    "bypass": Bypass(horizontal=Adapter(10), vertical=Adapter(10)),
    "bypass-mean": Bypass(horizontal=Adapter(10), vertical=Adapter(10), grid=1),
    "bypass-grid2": Bypass(horizontal=Adapter(10), vertical=Adapter(10), grid=2),
    "bypass-grid4": Bypass(horizontal=Adapter(10), vertical=Adapter(10), grid=4),
    "ladder-grid4": Ladder(4, grid=4),
    "linear-all": LinearAll(),
    "linear-all-gated": LinearAll(gated=True),
    "bypass-query": BypassQuery(),
    "bypass-attention": BypassAttention(),
}
"""The named methods of the paper; add your own like to any dict."""

_BOTH = ("conv", "ffn")
FAMILIES: dict[str, dict[str, Method]] = {
    "text": {
        "mam-adapter": Residual(
            {"attention": PrefixTuning(16), "ffn": Adapter(16, act="relu", init="kaiming", factor=2.0)}
        ),
    },
    "conv": {
        "adapter": Residual({"block": Adapter(96, init="zeros", source="out")}),
        "adapter-houlsby": Residual({"block": Adapter(64, init="houlsby", source="out")}),
        "adapter-pfeiffer": Residual({"block": Adapter(48, act="relu", init="bert", source="out")}),
        "lora": Residual({"conv": Lora(8)}),
        "adaptformer": Residual({"block": Adapter(64, act="relu", init="kaiming", factor=0.1, dropout=0.1)}),
        "convpass": Residual({"block": Convpass(8)}),
        "res-tuning": Residual({"block": Adapter(10, scale="channel", source="out")}),
    },
    "convnext": {
        "adapter-houlsby": Residual(dict.fromkeys(_BOTH, Adapter(64, init="houlsby", source="out"))),
        "lora": Residual(dict.fromkeys(("conv", "fc1", "fc2"), Lora(8))),
        "convpass": Residual(dict.fromkeys(_BOTH, Convpass(8))),
        "res-tuning": Residual(dict.fromkeys(_BOTH, Adapter(10))),
        "res-tuning-tri": Residual(dict.fromkeys((*_BOTH, "block"), Adapter(10))),
    },
    "unet": {
        "adapter": Residual({"ffn": Adapter(100, source="out")}),
        "prefix": Residual({"attention": PrefixTuning(100)}),
        "prompt": Residual({"block": PromptTuning(100)}),
        "lora": Residual(dict.fromkeys(("qkv", "proj"), Lora(50, dropout=0.0))),
        "res-tuning": Residual({"mha": Adapter(50, scale="channel"), "ffn": Adapter(50)}),
        "bypass": Bypass(horizontal=Adapter(100), vertical=Adapter(100)),
        "scedit": Residual({"skip": Adapter(100, source="out")}),
    },
}
"""What a name means on a family of backbones (`Anatomy.family`), where that is not what it means on transformers."""

NOTES: dict[str, str] = {
    "text": "BERT, RoBERTa, Llama and the like: prefixes of 16 and a parallel adapter of 16, s = 2",
    "conv": "ResNet, RegNet, EfficientNet, MobileNet: on the block and its convolutions",
    "convnext": "on its depthwise convolution and its FFN",
    "unet": "Stable Diffusion's U-Net and DiT: Table 6's sizes; prompt and scedit (Jiang et al. 2024) are here alone",
}

ABOUT: dict[str, str] = {
    "full": "every parameter of the backbone",
    "linear": "the head alone (linear probing)",
    "adapter": "the tables' Adapter: after the FFN, width 96, both weights zero at birth (Jia et al. 2022)",
    "adapter-houlsby": "sequential adapters after MHA and FFN (Houlsby et al. 2019)",
    "adapter-pfeiffer": "a sequential adapter after the FFN (Pfeiffer et al. 2021)",
    "prefix": "keys and values before every attention, exact (Li and Liang 2021; Eq. 3)",
    "vpt-shallow": "prompts at the first block's input (Jia et al. 2022)",
    "vpt-deep": "fresh prompts at every block's input (Jia et al. 2022)",
    "lora": "low-rank changes of queries, keys and values (Hu et al. 2022)",
    "bitfit": "every bias (Ben Zaken et al. 2022)",
    "adaptformer": "a parallel adapter on the un-normed stream beside the FFN (Chen et al. 2022)",
    "ssf": "scale and shift of every affine map and norm (Lian et al. 2022)",
    "convpass": "convolutional adapters beside MHA and FFN (Jie and Deng 2022)",
    "mam-adapter": "prefixes of 30 and a parallel adapter of 512 (He et al. 2022)",
    "noah": "adapter, LoRA and prompts (Zhang et al. 2022): the uniform subnet; `restuning search` finds others",
    "side-tuning": "a network on the pixels beside the backbone (Zhang et al. 2020)",
    "lst": "a pruned side transformer on the features (Sung et al. 2022)",
    "dtl": "a low-rank path that writes to the last six blocks (Fu et al. 2024)",
    "dtl-plus": "the same through one shared depthwise convolution (Fu et al. 2024)",
    "res-tuning-single": "Table 3a: Res-Prompt on the FFN",
    "res-tuning": "Table 3a, dual: Res-Adapters on MHA and FFN",
    "res-tuning-tri": "Table 3a: Res-Adapters on MHA, FFN and Block",
    "res-tuning-nlp": "Table 17: Res-Prefix on MHA, Res-Adapter on FFN",
    "bypass-none": "Table 3b: Eq. 8 with identity tuners, learned λ",
    "bypass-horizontal": "Table 3b: Eq. 8, horizontal Res-Adapters",
    "bypass-vertical": "Table 3b: Eq. 8, vertical Res-Adapters",
    "bypass": "Table 3b: Eq. 8, horizontal and vertical Res-Adapters (Res-Tuning-Bypass)",
    "bypass-mean": "bypass on CLS and the mean of the patches, the head reads both (ours)",
    "bypass-grid2": "bypass on CLS and a 2 × 2 grid of pooled patches, the head reads all (ours)",
    "bypass-grid4": "bypass on CLS and a 4 × 4 grid of pooled patches, the head reads all (ours)",
    "ladder-grid4": "LST of width d / 4 on CLS and a 4 × 4 grid of pooled patches (ours)",
    "linear-all": "the head alone, on CLS and the mean of every layer (ours)",
    "linear-all-gated": "the same, the layers summed by gates (ours)",
    "bypass-query": "learned queries that attend to the tokens of all layers, beside linear-all (ours)",
    "bypass-attention": "self-attention among the tokens of all layers, beside linear-all (ours)",
}

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

RECIPES: dict[str, Any] = {cls.__name__.lower(): cls for cls in (*SIZES, AlexNet, Bias, Ssf)}


def find_method(method: str | Mapping[str, Any] | Method, family: str = "") -> Method:
    """A method by name (as a `family` of backbones has it), from a JSON file, from data, or as it is. Raises
    MethodError with the nearest names."""
    if isinstance(method, Mapping):
        return from_dict(method)
    if not isinstance(method, str):
        if type(method) not in KINDS.values():
            raise MethodError(f"{method!r} is no method: expected a name or one of {', '.join(KINDS)}")
        return method
    own = FAMILIES.get(family, {})
    if method in own:
        return own[method]
    if method in methods:
        return methods[method]
    if method.endswith(".json"):
        try:
            return from_dict(json.loads(Path(method).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise MethodError(f"{method} cannot be read as a method: {line(error)}") from error
    known = list({**methods, **own})
    near = difflib.get_close_matches(method, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise MethodError(
        f"unknown method {method!r}{hint}: expected one of {', '.join(known)}, a .json file, or a method object"
    )


def resize(method: Method, size: int) -> Method:
    """The same method with every tuner of this width, of this rank or of this many tokens (Table 13)."""

    def sized(recipe: Any) -> Any:
        name = SIZES.get(type(recipe))
        return recipe if name is None else replace(recipe, **{name: size})

    if isinstance(method, Residual):
        return replace(method, tuners={op: sized(recipe) for op, recipe in method.tuners.items()})
    if isinstance(method, Bypass):
        return replace(method, horizontal=sized(method.horizontal), vertical=sized(method.vertical))
    if isinstance(method, SideTuning):
        return replace(method, net=sized(method.net))
    if isinstance(method, BypassQuery | BypassAttention):
        return replace(method, width=size)
    return Mix(tuple(resize(part, size) for part in method.parts)) if isinstance(method, Mix) else method  # type: ignore[misc]


def on_blocks(method: Method, blocks: Sequence[int]) -> Method:
    """The same method with tuners in these blocks only (Tables 14 and 15)."""
    if isinstance(method, Mix):
        return Mix(tuple(on_blocks(part, blocks) for part in method.parts))  # type: ignore[misc]
    return replace(method, blocks=tuple(blocks)) if isinstance(method, Residual | Bypass) else method


def to_dict(method: Method) -> dict[str, Any]:
    """A method as plain data, for JSON. An own tuner is recorded by its name alone."""
    data: dict[str, Any] = _encode(method)
    return data


def from_dict(data: Mapping[str, Any]) -> Method:
    """The inverse of `to_dict`. Raises MethodError for unknown kinds and for own tuners, which no file can hold."""
    if not isinstance(data, Mapping) or data.get("kind") not in KINDS:
        kind = data.get("kind") if isinstance(data, Mapping) else type(data).__name__
        raise MethodError(f"unknown kind of method {kind!r}: expected one of {', '.join(KINDS)}")
    method: Method = _decode(data)
    return method


def _encode(value: Any) -> Any:
    for key, table in (("kind", KINDS), ("tuner", RECIPES)):
        name = type(value).__name__.lower()
        if table.get(name) is type(value):
            return {key: name, **{f.name: _encode(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode(item) for item in value]
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"own": f"{getattr(value, '__module__', '?')}.{name}"}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    if "own" in value:
        raise MethodError(f"this method has an own tuner, {value['own']}: pass method= with the same tuner")
    for key, table in (("kind", KINDS), ("tuner", RECIPES)):
        if isinstance(value.get(key), str):
            return _build(value[key], table, {k: _decode(v) for k, v in value.items() if k != key})
    return {name: _decode(item) for name, item in value.items()}


def _build(name: str, table: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    if name not in table:
        raise MethodError(f"unknown tuner {name!r}: expected one of {', '.join(table)}")
    unknown = settings.keys() - {f.name for f in fields(table[name])}
    if unknown:
        raise MethodError(f"unknown settings of {name}: {', '.join(sorted(unknown))}")
    hints = get_type_hints(table[name])
    for setting, value in settings.items():
        if not _is(value, hints[setting]):
            wanted = getattr(hints[setting], "__name__", hints[setting])
            raise MethodError(f"{name}: {setting} is {value!r}: expected {wanted}")
    try:
        return table[name](**settings)
    except (TypeError, AttributeError) as error:
        raise MethodError(f"{name} cannot be read: {line(error)}") from error


def _is(value: Any, hint: Any) -> bool:
    """Whether a value can be what a setting is declared as; where that is no plain type, its own check decides."""
    kind = get_origin(hint)
    if kind in (Union, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if kind in (Sequence, Mapping):
        return isinstance(value, kind) and not isinstance(value, str)
    wanted = {int: (int,), float: (int, float), bool: (bool,), str: (str,), NoneType: (NoneType,)}.get(hint)
    return wanted is None or (isinstance(value, wanted) and (hint is bool or not isinstance(value, bool)))
