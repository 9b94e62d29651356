"""Text encoders and decoders of transformers."""

from dataclasses import replace
from typing import Any

from restuning.backbones.anatomy import Anatomy, Op, into, out_of
from restuning.backbones.families.shared import last, zero


def _one_stream(block: Any) -> bool:
    """Not Gemma 3n, which has several, nor Moshi, whose maps are modules around maps, nor DeepSeek, whose keys and
    values are of a latent."""
    attention = getattr(block, "self_attn", None)
    first = getattr(attention, "q_proj", None)
    return not (hasattr(block, "altup") or hasattr(first, "linear") or hasattr(attention, "kv_a_proj_with_mqa"))


def _of_one_width(block: Any) -> bool:
    """Neither MobileBERT, whose stream is wider than its blocks, nor CANINE, whose blocks stand between others."""
    return not hasattr(block, "bottleneck") and not hasattr(block.attention, "local")


_LLAMA = Anatomy(
    "transformers Llama, Mistral, Qwen, Phi-3",
    blocks="layers",
    ops={
        "mha": Op(into("self_attn"), out_of("self_attn.o_proj"), into("input_layernorm")),
        "ffn": Op(into("mlp"), out_of("mlp"), into("post_attention_layernorm")),
    },
    parts={
        "norm1": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
        "proj": ("self_attn.o_proj",),
        "norm2": ("post_attention_layernorm",),
        "fc1": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
        "fc2": ("mlp.down_proj",),
    },
    attention="self_attn",
    width="input_layernorm.weight",
    heads="self_attn.config.num_attention_heads",
    keys=("self_attn.config.num_key_value_heads", "self_attn.head_dim"),
    norm="norm",
    pool=last,
    prefix=zero,
    family="text",
    fits=_one_stream,
)

TEXT: tuple[Anatomy, ...] = (
    replace(  # norms after the operations too: what these say is added to after them
        _LLAMA,
        name="transformers Gemma 2 and 3",
        ops={
            "mha": Op(into("self_attn"), out_of("post_attention_layernorm"), into("input_layernorm")),
            "ffn": Op(into("mlp"), out_of("post_feedforward_layernorm"), into("pre_feedforward_layernorm")),
        },
        parts={**_LLAMA.parts, "norm2": ("pre_feedforward_layernorm",)},
    ),
    _LLAMA,
    Anatomy(  # post-norm: the residual is added inside attention.output and output, and there is no final norm
        "transformers BERT, RoBERTa, MiniLM",
        blocks="encoder.layer",
        prefix=zero,  # the mean of a text is that of all its tokens
        ops={
            "mha": Op(into("attention"), out_of("attention.output.dense")),
            "ffn": Op(into("intermediate"), out_of("output.dense")),
        },
        parts={
            "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
            "proj": ("attention.output.dense",),
            "norm1": ("attention.output.LayerNorm",),
            "fc1": ("intermediate.dense",),
            "fc2": ("output.dense",),
            "norm2": ("output.LayerNorm",),
        },
        attention="attention.self",
        width="output.LayerNorm.weight",
        heads="attention.self.num_attention_heads",
        embed="embeddings.LayerNorm",
        family="text",
        fits=_of_one_width,
    ),
)
"""In the order in which they are tried."""
