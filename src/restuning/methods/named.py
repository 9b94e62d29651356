"""The paper's named methods."""

import difflib
from collections.abc import Mapping
from typing import Any

from restuning.errors import MethodError, line
from restuning.methods.files import from_dict, to_dict
from restuning.methods.spec import KINDS, Full, Method, Residual
from restuning.side import (
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
    UniPt,
    Vqt,
)
from restuning.tuners import Adapter, Bias, Convpass, Dtl, Lora, Prefix, PrefixTuning, Prompt, PromptTuning, Ssf
from restuning.utils.reading import read_json

_DUAL = {"mha": Adapter(10, scale="channel"), "ffn": Adapter(10, scale="channel")}

METHODS: dict[str, Method] = {
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
    "bypass-query-shared": BypassQuery(width=48, stages=2, queries=4, heads=2, shared=True),
    "bypass-attention": BypassAttention(),
    "last": Last(),
    "losa": Losa(),
    "mist": Mist(),
    "vqt": Vqt(),
    "unipt": UniPt(),
    "sherl": Sherl(),
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
    "adapter": "the tables' Adapter: after the FFN, width 96, both weights zero at initialisation (Jia et al. 2022)",
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
    "bypass-query-shared": "the same, of four queries to keys and values that all tasks share: a thousand tasks (ours)",
    "bypass-attention": "self-attention among the tokens of all layers, beside linear-all (ours)",
    "last": "a chain of low-rank attention on all layers (in the manner of Tang et al. 2024)",
    "losa": "a low-rank mixer of channels and tokens on all layers (in the manner of Mercea et al. 2024)",
    "mist": "a chain of low-rank attention on the sum of all layers (in the manner of MIST, CVPR 2025)",
    "vqt": "learned queries that pass the frozen blocks, read by the head (Tu et al. 2023)",
    "unipt": "the last layer's tokens query every layer (Diao et al. 2024)",
    "sherl": "the layers, weighted by redundancy, queried by the last (in the manner of Diao et al. 2024)",
}


RATES = {"full": 1e-4, "side-tuning": 1e-3, "mam-adapter": 1e-3, "adapter-houlsby": 2e-3}
"""Rates of AdamW at batch 32 where 0.005 is too high: those that validation chose in docs/results/methods.md."""
TRIED = (5e-3, 2e-2, 1e-3)
"""Rates to choose among where features are kept, so that a training costs little: docs/results/defaults.md."""
CHOICE = 100
"""Items to train on from which a fifth is held out to choose a rate; a fifth of fewer tells nothing."""


def rates_of(method: str | Mapping[str, Any] | Method, items: int, kept: bool) -> tuple[float, ...]:
    """The learning rate where none is asked for; several: to be compared on a fifth of the items, held out.

    Args:
        method: any.
        items: to train on.
        kept: whether features that were computed once are what it trains on.
    """
    if isinstance(find_method(method), Full):
        return (1e-4,)
    if isinstance(method, str) and method in RATES:
        return (RATES[method],)
    return TRIED if kept and items >= CHOICE else TRIED[:1]


def recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what a method's .json file holds in place of its name, for a run that records them."""
    method = settings.get("method")
    if isinstance(method, str) and method.endswith(".json"):
        return {**settings, "method": to_dict(find_method(method))}
    return dict(settings)


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
    if method in METHODS:
        return METHODS[method]
    if method.endswith(".json"):
        try:
            return from_dict(read_json(method))
        except (OSError, ValueError) as error:
            raise MethodError(f"{method} cannot be read as a method: {line(error)}") from error
    known = list({**METHODS, **own})
    near = difflib.get_close_matches(method, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise MethodError(
        f"unknown method {method!r}{hint}: expected one of {', '.join(known)}, a .json file, or a method object"
    )
