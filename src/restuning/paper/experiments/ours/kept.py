"""What tuning inside a backbone keeps for its backward pass, over six backbones of their published sizes.

Weights are random, and a step is counted, not timed: bytes that autograd keeps of one forward pass, parameters left
out. Beside them PEFT's LoRA with as many parameters as `res-tuning`, on the same maps as our `lora`. Of the U-Net,
where PEFT has no such head, beside full fine-tuning.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from restuning.backbones.load import load_backbone
from restuning.bench.peers import subject
from restuning.errors import RestuningError, line
from restuning.hooks.memory import MEMORY
from restuning.model.tuned import Tuned
from restuning.paper.experiments.measured import Place, mib, table
from restuning.paper.results import Record, where
from restuning.utils.profiling import saved_bytes

Call = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """A backbone and a batch for it. build: with random weights. reads: keyword arguments of so many rows."""

    name: str
    build: Callable[[], nn.Module]
    reads: Callable[[int], Mapping[str, Any]]
    batch: int = 2


def _images(batch: int) -> Mapping[str, Any]:
    return {"x": torch.randn(batch, 3, 224, 224)}


def _words(count: int) -> Callable[[int], Mapping[str, Any]]:
    return lambda batch: {"input_ids": torch.randint(100, 1000, (batch, count))}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False).eval()  # type: ignore[no-any-return]


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    return LlamaModel(LlamaConfig(vocab_size=1000, num_hidden_layers=4, **sizes)).eval()  # type: ignore[no-any-return]


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()  # type: ignore[no-any-return]


def _latents(batch: int) -> Mapping[str, Any]:
    sample = torch.randn(batch, 4, 32, 32)
    return {"sample": sample, "timestep": 500, "encoder_hidden_states": torch.randn(batch, 77, 768)}


SUBJECTS = (
    Subject("ViT-B/16", lambda: load_backbone("vit_base_patch16_224", "random"), _images),
    Subject("Swin-B", lambda: load_backbone("swin_base_patch4_window7_224", "random"), _images),
    Subject("ConvNeXt-B", lambda: load_backbone("convnext_base", "random"), _images),
    Subject("BERT-base, 128 tokens", _bert, _words(128)),
    Subject("Llama, 4 blocks of TinyLlama's, 128 tokens", _llama, _words(128)),
    Subject("SD 1.5's U-Net, 256 pixels", _unet, _latents, 1),
)
INSIDE = ("res-tuning", "lora", "adapter", "ssf", "prefix")
PEER = "peft-lora-equal"


@dataclass(frozen=True)
class Kept:
    """Five methods in four modes on six backbones.

    Args:
        backbones: parts of their names, between spaces; empty: all.
    """

    backbones: str = ""

    def __post_init__(self) -> None:
        for part in self.backbones.split():
            if not any(part.lower() in s.name.lower() for s in SUBJECTS):
                raise RestuningError(f"backbones {part!r}: expected of {', '.join(s.name for s in SUBJECTS)}")

    def run(self, place: Place) -> Iterator[Record]:
        wanted = self.backbones.lower().split()
        for one in SUBJECTS:
            if wanted and not any(part in one.name.lower() for part in wanted):
                continue
            for method in ("full", PEER, *INSIDE):
                modes = tuple(MEMORY) if method in INSIDE else ("",)
                for mode in modes:
                    yield {"backbone": one.name, "method": method, "mode": mode, **_count(one, method, mode), **where()}

    def text(self, records: Sequence[Record]) -> str:
        modes, parts = tuple(MEMORY), [f"# Kept for the backward pass, by backbone and mode\n\n{_TEXT}"]
        for one in SUBJECTS:
            found = {(r["method"], r["mode"]): r for r in records if r["backbone"] == one.name}
            if ("full", "") not in found:
                continue
            peer = found.get((PEER, ""), {}).get("bytes") or found["full", ""].get("bytes")
            rows = [[name, mib(r["bytes"])] for name in ("full", PEER) if "bytes" in (r := found.get((name, ""), {}))]
            rows = [[*row, *[""] * (2 * len(modes) - 1)] for row in rows]
            for method in INSIDE:
                cells = [found[method, mode].get("bytes") if (method, mode) in found else None for mode in modes]
                if peer and any(cells):
                    kept = [mib(b) if b else "–" for b in cells]
                    rows.append([method, *kept, *(f"{b / peer:.3f}" if b else "–" for b in cells)])
            against = "PEFT's LoRA" if "bytes" in found.get((PEER, ""), {}) else "full"
            columns = ["MiB", *modes, *(f"{mode} / {against}" for mode in modes)]
            parts.append(f"## {one.name}, batch {one.batch}\n\n{table(columns, rows)}")
            reasons = {f"{m}: {r['absent']}" for (m, _), r in found.items() if "absent" in r}
            parts += [f"Not there: {reason}" for reason in sorted(reasons)]
        return "\n\n".join(parts)


_TEXT = """Random weights of the published sizes, float32, no dropout. Bytes that autograd keeps of one training step,
each storage once, parameters left out. `peft-lora-equal`: PEFT's LoRA on the maps of our `lora`, with as many
parameters as `res-tuning`. What the modes mean: [the guide](../guide.md)."""


def _count(one: Subject, method: str, mode: str) -> Record:
    torch.manual_seed(0)
    backbone, reads = one.build(), dict(one.reads(one.batch))
    try:
        model = (
            _denoiser(backbone, method, mode)
            if "sample" in reads
            else subject(f"{method}:{mode}" if mode else method, backbone, 10)
        )
    except (RestuningError, ImportError) as error:
        return {"absent": line(error)}
    labels = {} if "sample" in reads else {"labels": torch.arange(one.batch) % 10}
    args = (reads.pop("x"),) if "x" in reads else ()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": trained, "bytes": saved_bytes(lambda: model(*args, **reads, **labels), model.parameters())}


def _denoiser(backbone: nn.Module, method: str, mode: str) -> nn.Module:
    if method == PEER:
        raise RestuningError("PEFT's LoRA is counted on backbones with a head")
    tuned = Tuned(backbone, memory=mode or "shared")
    tuned.add_adapter("default", method)
    return tuned.train()
