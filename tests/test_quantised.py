"""Backbones whose weights are quantised: adapters on top, paths beside, banks from them, files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from timm.models import VisionTransformer
from tiny import TEXT, VIT
from torch import Tensor, nn

import restuning as rt
from restuning.backbones.quantised import KINDS, bytes_of, is_quantised, quantise
from restuning.errors import CheckpointError, MethodError, RestuningError

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs 64 values at a time
BUILD: dict[str, Any] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT | WIDE)),
    "vit": lambda: VisionTransformer(**VIT | {"embed_dim": 64}),
}


def made(name: str, kind: str = "") -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    backbone = BUILD[name]().eval()
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.05 * torch.randn_like(p))
    side = VIT["img_size"]
    inputs = {"input_ids": torch.randint(3, 50, (3, 7))} if name == "bert" else {"x": torch.randn(3, 3, side, side)}
    return quantise(backbone, kind) if kind else backbone, inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_is_trained_over_a_quantised_backbone(name: str, kind: str, tmp_path: Path) -> None:
    backbone, inputs = made(name, kind)
    quantised = [p for p in backbone.parameters() if is_quantised(p)]
    assert quantised and bytes_of(backbone) < bytes_of(made(name)[0])
    with torch.no_grad():
        want = rt.adapt(backbone, "linear", pool="none")(**inputs)
    for method in ("lora", "res-tuning", "bypass"):
        tuned = rt.adapt(backbone, method, 3)
        bare = rt.adapt(backbone, rt.Residual({"all-linear": rt.Lora(2)}), pool="none")
        with torch.no_grad():
            torch.testing.assert_close(bare(**inputs), want)  # at initialisation
        optimizer = torch.optim.AdamW(tuned.adapters.parameters(), lr=1e-2)
        labels, losses = torch.tensor([0, 1, 2]), []
        for _ in range(6):
            optimizer.zero_grad()
            loss = tuned(**inputs, labels=labels)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(p.grad is None for p in backbone.parameters())
        tuned.save_pretrained(tmp_path / method)
        again = rt.Tuned.from_pretrained(made(name, kind)[0], tmp_path / method)
        with torch.no_grad():
            assert torch.equal(again(**inputs), tuned(**inputs))
        rt.Tuned.from_pretrained(made(name)[0], tmp_path / method)  # what is not quantised tells models apart
        other = made(name)[0]
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0)
        with pytest.raises(CheckpointError, match="with other weights"):
            rt.Tuned.from_pretrained(quantise(other, kind), tmp_path / method)
        if method == "bypass":
            features = tuned.features(**inputs)
            assert not any(x.requires_grad for x in features.tensors())
            with torch.no_grad():
                assert torch.equal(tuned.from_features(features), tuned(**inputs))
        predicted = rt.Predictor.of(tuned).predict(inputs)["default"]
        with torch.no_grad():
            torch.testing.assert_close(predicted, tuned(**inputs))


def test_a_fingerprint_is_the_same_for_every_way_to_pack_the_same_weights(tmp_path: Path) -> None:
    tuned = rt.adapt(made("bert", "torchao-int8")[0], "lora", 3)
    tuned.save_pretrained(tmp_path)
    for kind in KINDS:
        rt.Tuned.from_pretrained(made("bert", kind)[0], tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_floating_point_is_refused(kind: str) -> None:
    backbone, _ = made("bert", kind)
    tuned = rt.adapt(backbone, "lora", 3)
    refused: list[Any] = [
        tuned.merge_adapter,
        tuned.merge_and_unload,
        lambda: rt.adapt(backbone, rt.Residual({"query": rt.Lora(2, dora=True)})),
        lambda: rt.adapt(backbone, rt.Residual({"query": rt.Lora(2, init="pissa")})),
        lambda: rt.adapt(backbone, rt.Residual(modules_to_save=("query",))),
        lambda: rt.adapt(backbone, "lst", 3),
        lambda: rt.adapt(backbone, "full", 3),
    ]
    for call in refused:
        with pytest.raises(MethodError, match="needs the backbone's own weights in floating point"):
            call()


def test_a_backbone_that_gives_no_gradient_takes_side_paths_alone() -> None:
    backbone, inputs = made("bert", "bitsandbytes-nf4")
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # as it is where the CPU can
    with pytest.raises(MethodError, match="packs for inference on this CPU"):
        rt.adapt(backbone, "lora", 3)
    tuned = rt.adapt(backbone, "bypass", 3)
    tuned(**inputs).sum().backward()
    assert all(p.grad is not None for p in tuned.adapters.parameters())


def test_a_kind_that_is_not_known_is_named() -> None:
    with pytest.raises(RestuningError, match="quantise 'int3': expected one of torchao-int8"):
        quantise(made("bert")[0], "int3")
