"""One small random model of every family that timm, transformers and torchvision have."""

import copy
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from restuning.errors import MissingExtra, RestuningError, line

LIBRARIES = ("timm", "transformers", "torchvision")

LARGE = 130_000_000
"""Parameters above which a model is not built for a check."""


class Unbuilt(RestuningError):
    """A family of which no small model can be built."""


def families(library: str) -> dict[str, str]:
    """Family → what it reads: `image` or `text`. Raises RestuningError for a library that is not known."""
    if library == "timm":
        return dict.fromkeys(_timm().list_modules(), "image")
    if library == "torchvision":
        return dict.fromkeys(sorted(_torchvision_names()), "image")
    if library == "transformers":
        return _transformers_families()
    raise RestuningError(f"unknown library {library!r}: expected one of {', '.join(LIBRARIES)}")


def build(library: str, family: str) -> nn.Module:
    """A small random model of a family, in eval mode, without a classifier where it can be had without one.

    Raises RestuningError for a family that is not known, Unbuilt where none is small enough or can be built at all.
    """
    known = families(library)
    if family not in known:
        near = difflib.get_close_matches(family, known, 3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise RestuningError(f"unknown family {family!r} of {library}{hint}")
    made: Callable[[str], nn.Module] = {"timm": _of_timm, "torchvision": _of_torchvision}.get(library, _of_transformers)
    with warnings.catch_warnings(), _seeded():
        warnings.simplefilter("ignore")
        model = made(family).eval()
        with torch.no_grad():  # away from the zeros and ones that hide mistakes
            for p in model.parameters():
                if p.is_floating_point():
                    p.add_(0.02 * torch.randn_like(p))
    return model


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# ---- timm

_SMALL = (
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "_xxs",
    "xxtiny",
    "xtiny",
    "_xs",
    "tiny",
    "micro",
    "mini",
    "_s0",
    "small",
    "18",
    "b0",
    "_0",
)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra("timm", "timm") from error
    return timm


def _of_timm(family: str) -> nn.Module:
    timm = _timm()
    names = timm.list_models(module=family) or timm.list_models(module=family, include_tags=True)

    def rank(name: str) -> tuple[int, int]:
        return next((i for i, part in enumerate(_SMALL) if part in name), len(_SMALL)), len(name)

    sizes = {}
    for name in sorted(names, key=rank)[:4]:
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
        except Exception:  # some cannot be described
            sizes[name] = LARGE - 1
    name = min(sizes, key=lambda name: sizes[name])
    more: dict[str, Any]
    for more in ({"img_size": 112, "depth": 3}, {"depth": 3}, {"img_size": 112}):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in timm.create_model(name, num_classes=0, **more).parameters())
            if size > LARGE:
                continue
            smaller: nn.Module = timm.create_model(name, num_classes=0, **more)
            _works(smaller.eval())
        except Exception:  # not every family can be told a size
            continue
        return smaller
    if sizes[name] > LARGE:
        raise Unbuilt(f"no small {family} can be built: {name} has {sizes[name]:,} parameters, and is not shrunk")
    model: nn.Module = timm.create_model(name, num_classes=0)
    return model


# ---- torchvision


def _torchvision_names() -> dict[str, str]:
    """Family (the file that it is in) → its smallest-looking classifier."""
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtra("torchvision", "timm") from error
    found: dict[str, str] = {}
    for name in models.list_models(module=models):
        family = models.get_model_builder(name).__module__.rpartition(".")[2]
        best = found.get(family)
        if best is None or (len(name), name) < (len(best), best):
            found[family] = name
    return found | {"vision_transformer": "vit_b_32"}


def _of_torchvision(family: str) -> nn.Module:
    from torchvision import models

    more = {"init_weights": False, "aux_logits": False} if family in ("inception", "googlenet") else {}
    model: nn.Module = models.get_model(_torchvision_names()[family], weights=None, **more)
    return model


# ---- transformers


def _transformers_families() -> dict[str, str]:
    try:
        from transformers.models.auto import modeling_auto as auto
    except ImportError as error:
        raise MissingExtra("transformers", "transformers") from error
    alone = auto.MODEL_MAPPING_NAMES
    image = {*auto.MODEL_FOR_IMAGE_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    text = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    found = {name: "text" for name in sorted(text) if name in alone and name not in image}
    return found | {name: "image" for name in sorted(image) if name in alone}


EXACT = ("head_dim", "rotary_dim", "qk_rope_head_dim")
"""Settings that go with the width: they are set even where they are smaller already."""

UNSAID = (
    "vocab_size",
    "n_routed_experts",
    "num_experts",
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "num_local_experts",
)
"""Settings without which some models cannot be built, and that some configurations leave open."""

WORD_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 256),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "num_decoder_layers": 3,
    **dict.fromkeys(("n_group", "topk_group"), 1),
}
"""Sizes that make a configuration small, by the names that configurations give them."""

_MIXED = ["linear_attention", "full_attention", "linear_attention"]
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 99},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"image_size": 64, "width_coefficient": 1.0, "depth_coefficient": 1.0},
    "esm": {"vocab_size": 99, "mask_token_id": 4, "pad_token_id": 1},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1, 1]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "granitemoehybrid": {"layer_types": _MIXED, "layers_block_type": _MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "luke": {"entity_vocab_size": 99},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "prophetnet": {"num_encoder_layers": 3},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": None},
}
"""What the small configurations of some families must say besides, by `model_type`."""

_LAYERS = ("vocab_size", "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
FEWER = {key: WORD_SIZES[key] for key in (*_LAYERS, "num_decoder_layers", "vocab_size_per_layer_input")}
NARROW = {
    **FEWER,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 256),
    **dict.fromkeys(("intermediate_size", "d_ff", "moe_intermediate_size"), 512),
    **{key: WORD_SIZES[key] for key in ("q_lora_rank", "kv_lora_rank", "n_group", "topk_group")},
    **{key: WORD_SIZES[key] for key in ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")},
}
"""Where the sizes do not go together: few layers alone, and these with a narrower stream between heads as they are."""


def _of_transformers(family: str) -> nn.Module:
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    why = ""
    try:
        for sizes in (WORD_SIZES, NARROW, FEWER, {}):
            try:
                config = shrunk(CONFIG_MAPPING[family], sizes)
                with torch.device("meta"):
                    described = AutoModel.from_config(copy.deepcopy(config))
                size = sum(p.numel() for p in described.parameters())
                if size > LARGE:
                    why = why or f"{size:,} parameters at its smallest: larger than is built for a check"
                    continue
                model: nn.Module = AutoModel.from_config(config).float()
                _works(model)
            except ImportError as error:
                raise Unbuilt(f"no {family} can be built: {line(error)}") from error
            except Exception as error:
                why = why if "larger" in why else f"{type(error).__name__}: {line(error)}"
                continue
            return model
    finally:
        logging.set_verbosity(verbosity)
    raise Unbuilt(f"no small {family} can be built: {why}")


def _works(model: nn.Module) -> None:
    from restuning.backbones.inputs import inputs_of

    last: Exception | None = None
    for inputs in inputs_of(model):
        try:
            with torch.no_grad():
                model.eval()(**inputs)
            return
        except Exception as error:
            last = error
    if last is not None:
        raise last


def shrunk(kind: Any, sizes: Mapping[str, Any]) -> Any:
    """A configuration of a kind, with those of `sizes` that it has; smaller numbers and lists are left as they are."""
    known, nested = _smaller(kind(), sizes)
    return kind(**known, **nested)


def _can_be_set(plain: Any, key: str, value: Any) -> bool:
    """Whether a configuration is told it, and does not work it out from others."""
    if not isinstance(getattr(type(plain), key, None), property):
        return True
    try:
        setattr(copy.copy(plain), key, value)
    except (AttributeError, NotImplementedError):
        return False
    return True


def _smaller(plain: Any, sizes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings, and the configurations in it, that are larger than `sizes`."""
    own = getattr(type(plain), "attribute_map", {})

    def has(key: str) -> Any:
        try:
            return getattr(plain, key, None)
        except Exception:  # some differ by layer
            return None

    known = {}
    for key, value in sizes.items():
        there = has(key)
        unsaid = there is None and key in UNSAID and hasattr(plain, key)
        if unsaid or (type(there) is int and there > value and key not in EXACT):
            known[own.get(key, key)] = value
    if "hidden_size" in known or "d_model" in known or "n_embd" in known:
        known |= {key: sizes[key] for key in EXACT if type(has(key)) is int and key in sizes}
    if "vocab_size" in known:
        for i, key in enumerate(
            ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
        ):
            there = has(key)
            if isinstance(there, int) and there >= known["vocab_size"]:
                known[key] = i
            elif isinstance(there, list) and there and max(there) >= known["vocab_size"]:
                known[key] = [i]
    layers = next((known[k] for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if k in known), 0)
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        typed = has(key)
        if isinstance(typed, list) and layers:
            kinds = list(dict.fromkeys(typed))
            known[key] = (kinds * layers)[:layers]
    before = next(
        (has(k) for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if type(has(k)) is int), 0
    )
    for key, value in plain.to_dict().items() if layers else ():
        if key not in known and isinstance(value, list) and len(value) == before:
            known[key] = value[:layers]  # one for each layer
        elif key == "per_layer_config" and isinstance(value, Mapping):
            known[key] = {i: one for i, one in value.items() if int(i) < layers}
    known |= OWN.get(getattr(type(plain), "model_type", ""), {}) if sizes else {}
    known = {key: value for key, value in known.items() if _can_be_set(plain, own.get(key, key), value)}
    nested: dict[str, Any] = {}
    for key in getattr(type(plain), "sub_configs", {}) or {}:
        inner = has(key)
        if inner is not None and hasattr(inner, "to_dict"):
            small, more = _smaller(inner, sizes)
            if small or more:
                nested[key] = {**inner.to_dict(), **small, **more}
    return known, nested
