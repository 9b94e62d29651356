"""Adapters in float32 on backbones in half precision, as PEFT has them."""

from typing import Any

import peft
import pytest
import torch
from timm.models import VisionTransformer
from tiny import TINY, VIT
from torch import Tensor, nn

import restuning as rt
from restuning.hooks.memory import MEMORY

HALF = torch.bfloat16
IMAGE_METHODS = [
    "adapter", "adaptformer", "bitfit", "bypass", "bypass-grid2", "bypass-query", "convpass", "dtl", "dtl-plus",
    "linear", "linear-all", "lora", "lst", "mam-adapter", "prefix", "res-tuning", "res-tuning-nlp",
    "res-tuning-single", "ssf", "vpt-deep", "vpt-shallow",
]  # fmt: skip
CASES = [("timm-vit", m) for m in IMAGE_METHODS]
CASES += [("bert", m) for m in ("lora", "bypass", "res-tuning", "prefix", "lst")]
CASES += [("timm-swin", m) for m in ("lora", "bypass", "res-tuning")]
CASES += [("timm-resnet", m) for m in ("lora", "bypass", "ssf")]


def half(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    tiny = TINY[name]
    return tiny.backbone(HALF), tiny.inputs(dtype=HALF)


def shaken(tuned: rt.Tuned, size: float = 0.05) -> rt.Tuned:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(size * torch.randn(p.shape, generator=draw).to(p.dtype))
    return tuned


@pytest.mark.parametrize(("name", "method"), CASES)
def test_adapters_are_in_float32_and_what_they_read_is_cast(name: str, method: str, tmp_path: Any) -> None:
    backbone, inputs = half(name)
    spec: Any = rt.Ladder(4) if method == "lst" else method
    tuned = shaken(rt.adapt(backbone, spec, 3))
    assert {p.dtype for p in tuned.adapters.parameters()} == {torch.float32}
    assert {p.dtype for p in backbone.parameters()} == {HALF}
    features = tuned.features(**inputs)
    assert {x.dtype for x in features.layers.values()} == {HALF}  # the backbone's stream is in its own dtype
    out = tuned.from_features(features)
    assert out.dtype == torch.float32 and out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tuned.adapters.parameters())
    exact = rt.adapt(half(name)[0].float(), spec, 3)
    exact.adapters.load_state_dict(tuned.adapters.state_dict())
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(out, exact(**wide), rtol=0.1, atol=0.1)  # of the rounding of the backbone alone
    tuned.save_pretrained(tmp_path)
    again = rt.Tuned.from_pretrained(half(name)[0], tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs), tuned(**inputs))
    narrow = rt.Tuned.from_pretrained(half(name)[0], tmp_path, autocast_adapter_dtype=False)
    assert {p.dtype for p in narrow.adapters.parameters()} == {HALF}
    with torch.no_grad():
        torch.testing.assert_close(narrow(**inputs).float(), out, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("settings", [{}, {"autocast_adapter_dtype": False}])
@pytest.mark.parametrize("lora", [rt.Lora(4, 8, 0.0), rt.Lora(4, 8, 0.0, dora=True), rt.Lora(4, 8, 0.0, init="pissa")])
def test_a_bfloat16_backbone_with_lora_is_pefts(lora: rt.Lora, settings: Any) -> None:
    more = {"use_dora": True} if lora.dora else {"init_lora_weights": "pissa"} if lora.init == "pissa" else {}
    backbone, inputs = half("bert")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tuned = rt.adapt(backbone, rt.Residual({"query": lora, "value": lora}), pool="none", **settings)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], **more)
    other: Any = peft.get_peft_model(half("bert")[0], config, **settings)
    draw = torch.Generator().manual_seed(3)
    layers = {n.removeprefix("base_model.model."): m for n, m in other.named_modules() if hasattr(m, "lora_A")}
    pairs: list[tuple[Any, Any]] = []
    for key, site in tuned.adapters["default"].sites.items():
        mine, theirs = tuned.adapters["default"].tuners[key], layers[site.reads.path]
        pairs += [(mine.a, theirs.lora_A["default"].weight), (mine.b, theirs.lora_B["default"].weight)]
        if lora.dora:
            pairs.append((mine.length, theirs.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for a, b in pairs:
            assert a.dtype == b.dtype == (HALF if settings else torch.float32)
            if lora.init == "kaiming":
                a.add_(0.2 * torch.randn(a.shape, generator=draw).to(a.dtype))
                b.copy_(a)
            elif not settings:
                torch.testing.assert_close(a @ a.T, b @ b.T, rtol=1e-2, atol=1e-3)  # to the signs of singular vectors
    out, want = tuned(**inputs), other(input_ids=ids, attention_mask=mask).last_hidden_state
    shown = mask.bool()
    torch.testing.assert_close(out[shown].float(), want[shown].float(), rtol=2e-2, atol=3e-2)
    if lora.init == "kaiming" and not settings:
        out[shown].float().square().sum().backward()
        want[shown].float().square().sum().backward()
        for a, b in pairs:
            torch.testing.assert_close(a.grad, b.grad, rtol=5e-2, atol=5e-2 * float(b.grad.abs().max()))
    merged: Any = tuned.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {HALF}
    with torch.no_grad():
        mine, theirs = merged.state_dict(), other.merge_and_unload().state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-2, atol=1e-2)


def test_a_network_on_pixels_reads_them_in_float32() -> None:
    torch.manual_seed(0)
    tuned = rt.adapt(VisionTransformer(**VIT | {"img_size": 64}).to(HALF), "side-tuning", 3)
    out = tuned(torch.randn(2, 3, 64, 64, dtype=HALF))
    out.sum().backward()
    assert out.dtype == torch.float32 and all(p.grad is not None for p in tuned.adapters.parameters())


def test_initialisation_leaves_a_half_precision_backbone_to_the_bit() -> None:
    for name in ("timm-vit", "bert", "timm-resnet"):
        backbone, inputs = half(name)
        with torch.no_grad():
            want = rt.adapt(backbone, "linear", pool="none")(**inputs)
            for lora in (rt.Lora(4), rt.Lora(2, rank_stabilized=True)):
                assert torch.equal(rt.adapt(backbone, rt.Residual({"all-linear": lora}), pool="none")(**inputs), want)


@pytest.mark.parametrize("method", ["lora", "res-tuning", "bypass", "prefix"])
def test_a_mixed_batch_and_a_stack_are_the_adapters_alone(method: str) -> None:
    backbone, inputs = half("timm-vit")
    tuned = rt.adapt(backbone, method, 3, "one")
    tuned.add_adapter("two", method, 5)
    tuned.add_adapter("narrow", method, 3, autocast_adapter_dtype=False)
    shaken(tuned)
    alone = {}
    for name in ("one", "two", "narrow"):
        tuned.set_adapter(name)
        with torch.no_grad():
            alone[name] = tuned(**inputs)
    with torch.no_grad():
        rows = tuned(**inputs, adapter_names=["two", "narrow", "one"])
        for i, (name, classes) in enumerate((("two", 5), ("narrow", 3), ("one", 3))):
            torch.testing.assert_close(rows[i, :classes], alone[name][i].float(), rtol=2e-2, atol=2e-2)
        if method == "bypass":
            tuned.set_adapter(["one", "two", "narrow"])
            for name, out in tuned(**inputs).items():
                torch.testing.assert_close(out, alone[name], rtol=1e-2, atol=1e-2)
    predictor = rt.Predictor.of(tuned)
    for name in alone:
        torch.testing.assert_close(predictor.predict(inputs)[name].float(), alone[name].float(), rtol=2e-2, atol=2e-2)


def test_features_kept_in_another_dtype_are_read() -> None:
    backbone, inputs = half("timm-vit")
    for method in ("linear", "bypass", rt.Ladder(4)):
        tuned = shaken(rt.adapt(backbone, method, 3))
        features = tuned.features(**inputs)
        for kept in (torch.float32, torch.float16):
            out = tuned.from_features(features.map(lambda x, kept=kept: x.to(kept)))
            torch.testing.assert_close(out, tuned(**inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("memory", [m for m in MEMORY if m != "plain"])
@pytest.mark.parametrize("name", ["timm-vit", "bert"])
def test_modes_of_memory_give_the_same_gradients(name: str, memory: str) -> None:
    backbone, inputs = half(name)
    grads = {}
    for mode in ("plain", memory):
        torch.manual_seed(4)
        tuned = shaken(rt.adapt(backbone, "res-tuning", 3, memory=mode))
        tuned(**inputs).square().sum().backward()
        grads[mode] = torch.cat([p.grad.flatten() for p in tuned.adapters.parameters()])
        tuned.unload()
    error = (grads[memory] - grads["plain"]).norm() / grads["plain"].norm()
    assert grads[memory].dtype == torch.float32 and error < 0.05, error


def test_a_step_too_small_for_bfloat16_is_taken() -> None:
    """What float32 is for: 1 + 1e-4 is 1 in bfloat16."""
    moved = {}
    for wide in (True, False):
        backbone, inputs = half("timm-vit")
        tuned = rt.adapt(backbone, "ssf", 3, autocast_adapter_dtype=wide)
        own = list(tuned.adapters["default"].tuners.parameters())
        with torch.no_grad():
            for p in own:
                p.fill_(1.0)
        tuned(**inputs).float().sum().backward()
        for p in own:
            p.grad = torch.full_like(p, 1e-4)
        torch.optim.SGD(own, lr=1.0).step()
        moved[wide] = {bool((p != 1).all()) for p in own}
    assert moved == {True: {True}, False: {False}}
