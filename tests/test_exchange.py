"""Against what others wrote: PEFT's LoRA, prefix tuning and (IA)³, copied weights; LoRA files both ways; merging."""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny import TEXT, TINY, Q, V
from torch import Tensor, nn

import restuning as rt
from restuning.errors import CheckpointError, MethodError

OLD = Q == "query"
LAYERS, ATTENTION = ("layer", "attention.attention") if OLD else ("layers", "attention")
TARGETS = {"timm-vit": ["qkv"], "hf-vit": [Q, V], "bert": ["query", "value", "dense"]}


def last(model: nn.Module, sites: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the last block of a plain model says."""
    kept: list[Any] = []
    module = model.get_submodule(sites.blocks[-1])
    handle = module.register_forward_hook(lambda m, args, out: kept.append(out if isinstance(out, Tensor) else out[0]))
    model(**inputs)
    handle.remove()
    return kept[0]


def shake(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def lora_of_peft(name: str, **more: Any) -> Any:
    """A PEFT model with non-zero LoRA; BERT's `dense` there is every dense layer, the pooler's left out."""
    config = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS[name], **more}
    if name == "bert":
        config["exclude_modules"] = "pooler.*"
    model = peft.get_peft_model(TINY[name].backbone(), peft.LoraConfig(**config)).eval()
    shake(model)
    return model


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}], ids=str)
def test_pefts_lora_file_is_ours(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    if "layers_to_transform" in more:
        more = {**more, "layers_pattern": {"timm-vit": "blocks", "hf-vit": LAYERS, "bert": "layer"}[name]}
    tiny, inputs = TINY[name], TINY[name].inputs()
    theirs = lora_of_peft(name, **more)
    theirs.save_pretrained(tmp_path)
    tuned = rt.adapt(tiny.backbone(), "linear", 3)
    rt.load_peft(tuned, tmp_path, "lora")
    tuned.eval()
    expected = last(theirs.base_model.model, tuned.sites, inputs)
    got = tuned.features(**inputs).tensors()[0]
    torch.testing.assert_close(got, tuned.request.tokens(expected), rtol=1e-5, atol=1e-5)
    got[:, :1].square().sum().backward()
    expected[:, :1].square().sum().backward()
    ours = {site.writes.path: tuned.adapters["lora"].tuners[at] for at, site in tuned.adapter("lora").sites.items()}
    pairs = [
        (getattr(ours[key.split(".lora_")[0].removeprefix("base_model.model.")], half).grad, p.grad)
        for key, p in theirs.named_parameters()
        if p.requires_grad
        for half in ("a" if "lora_A" in key else "b",)
    ]
    assert len(pairs) == 2 * len(ours)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_our_lora_file_is_pefts(name: str, tmp_path: Path) -> None:
    tiny, inputs = TINY[name], TINY[name].inputs()
    mix = rt.Mix((rt.Residual({"qkv": rt.Lora(2, alpha=3.0)}, (0,)), rt.Residual({"qkv": rt.Lora(4)}, (1,))))
    tuned = rt.adapt(tiny.backbone(), mix, 3).eval()
    shake(tuned)
    rt.save_peft(tuned, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.backbone(), tmp_path).eval()
    expected = last(theirs.base_model.model, tuned.sites, inputs)
    torch.testing.assert_close(tuned.features(**inputs).tensors()[0], expected[:, :1], rtol=1e-5, atol=1e-5)
    again = rt.adapt(tiny.backbone(), "linear", 3)
    rt.load_peft(again, tmp_path, "back")
    assert torch.equal(again.eval().features(**inputs).tensors()[0], tuned.features(**inputs).tensors()[0])


def test_peft_files_that_cannot_be_read(tmp_path: Path) -> None:
    lora_of_peft("timm-vit").save_pretrained(tmp_path)
    tuned = rt.adapt(TINY["timm-vit"].backbone(), "linear", 3)
    config, model = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good, state = json.loads(config.read_text()), load_file(model)

    def refused(words: str, **changes: Any) -> None:
        config.write_text(json.dumps({**good, **changes}))
        with pytest.raises(CheckpointError, match=words) as caught:
            rt.load_peft(tuned, tmp_path, "new")
        assert "\n" not in str(caught.value) and list(tuned.adapters) == ["default"]

    refused("PEFT adapter of type 'IA3', expected 'LORA'", peft_type="IA3")
    refused("use_dora=True is not plain LoRA", use_dora=True)
    save_file({"base_model.model.nowhere.lora_A.weight": torch.ones(2, 3)}, model)
    refused("nowhere.lora_A.weight is no LoRA of an affine module of this backbone")
    key = "base_model.model.blocks.0.attn.qkv.lora_A.weight"
    save_file({key: state[key]}, model)
    refused("blocks.0.attn.qkv lacks a half")
    save_file({**state, key: torch.ones(3, 31)}, model)
    refused("for widths 31 and 96; this backbone has 32 and 96")
    model.write_bytes(b"nothing")
    refused("cannot be read as a PEFT adapter")
    with pytest.raises(MethodError, match=r"hold LoRA alone; 0_mha is a AdapterTuner"):
        rt.save_peft(rt.adapt(TINY["timm-vit"].backbone(), "res-tuning", 3), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_ia3_is_ssf_without_a_shift() -> None:
    tiny, inputs = TINY["bert"], TINY["bert"].inputs()
    config = peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])
    theirs = peft.get_peft_model(tiny.backbone(), config).eval()
    shake(theirs)
    tuned = rt.adapt(tiny.backbone(), rt.Residual({"key": rt.Ssf("identity"), "value": rt.Ssf("identity")}), 3).eval()
    found = {k.split(".ia3_l")[0]: p for k, p in theirs.named_parameters() if "ia3" in k}
    scales = {k.removeprefix("base_model.model."): p for k, p in found.items()}
    assert len(scales) == len(tuned.adapter("default").sites) == 4
    for at, site in tuned.adapter("default").sites.items():
        tuned.adapters["default"].tuners[at].scale.data = scales[site.writes.path].detach().flatten().clone()
    expected = last(theirs.base_model.model, tuned.sites, inputs)[:, :1]
    got = tuned.features(**inputs).tensors()[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    for at, site in tuned.adapter("default").sites.items():
        grad = tuned.adapters["default"].tuners[at].scale.grad
        torch.testing.assert_close(grad, scales[site.writes.path].grad.flatten(), rtol=1e-4, atol=1e-5)


def test_prefix_is_pefts_prefix_tuning() -> None:
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**TEXT)).eval()
    if "past_key_values" not in inspect.signature(model.bert.forward).parameters:
        pytest.skip(
            "transformers 5.24 names it `cache`, which PEFT 0.21 does not know: there is nothing to compare with"
        )
    theirs = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    inputs = TINY["bert"].inputs()
    table = theirs.prompt_encoder["default"].embedding.weight  # (tokens, layers · 2 · d), keys before values
    expected = theirs(**inputs).logits
    expected.square().sum().backward()
    tuned = rt.adapt(model.bert, rt.Residual({"attention": rt.PrefixTuning(3)}), None, pool="none").eval()
    halves = table.detach().view(3, 2, 2, 32)
    for layer in range(2):
        tuner = tuned.adapters["default"].tuners[f"{layer}_attention"]
        tuner.keys.data, tuner.values.data = halves[:, layer, 0].clone(), halves[:, layer, 1].clone()
    classifier = theirs.base_model.classifier
    # a prefix counts as positions there: BERT's own begin after it
    logits = classifier(model.bert.pooler(tuned(**inputs, position_ids=torch.arange(3, 10)[None])))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    logits.square().sum().backward()
    ours = torch.stack([p.grad for p in tuned.adapters.parameters()], 1)
    torch.testing.assert_close(ours, table.grad.view(3, 4, 32), rtol=1e-4, atol=1e-6)


MERGES = {
    "lora": rt.Residual({"qkv": rt.Lora(3, alpha=5.0), "fc1": rt.Lora(2)}),
    "ssf": rt.METHODS["ssf"],
    "bitfit": rt.METHODS["bitfit"],
    "all": rt.Mix((rt.Residual({"affine": rt.Ssf()}), rt.Residual({"qkv": rt.Lora(2), "affine": rt.Bias()}))),
}


def test_tuners_of_one_site_see_the_frozen_operation() -> None:
    """In whatever order they are there; and so they merge."""
    outs = []
    for order in ((0, 1), (1, 0)):
        parts = (rt.Residual({"qkv": rt.Lora(3, dropout=0.0)}), rt.Residual({"qkv": rt.Ssf()}))
        torch.manual_seed(0)
        tuned = rt.adapt(TINY["timm-vit"].backbone(torch.float64), rt.Mix(tuple(parts[i] for i in order)))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            by_kind = sorted(tuned.adapters.named_parameters(), key=lambda pair: (pair[0].split(".")[-1], pair[0]))
            for _, p in by_kind:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        x = torch.ones(2, 3, 16, 16, dtype=torch.float64)
        with torch.no_grad():
            outs += [tuned(x), tuned.merge_and_unload()(x)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["timm-vit", "hf-clip", "hf-siglip", "bert", "open-clip"])
@pytest.mark.parametrize("method", MERGES)
def test_merged_weights_are_the_tuners(name: str, method: str) -> None:
    tiny, inputs = TINY[name], TINY[name].inputs()
    tuned = rt.adapt(tiny.backbone(), MERGES[method], None, pool="none").eval()
    shake(tuned)
    with torch.no_grad():
        expected = tuned(**inputs)
        merged = tuned.merge_and_unload()
        assert not isinstance(merged, rt.Tuned) and merged is tuned.backbone
        bare = rt.adapt(merged, "linear", None, pool="none")(**inputs)
    torch.testing.assert_close(bare, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged() -> None:
    words = {
        "adapter": "AdapterTuner at 0_ffn is no change of a weight",
        "prefix": "PrefixTuningTuner at 0_attention",
        "vpt-deep": "PromptTuningTuner at 0_block",
        "bypass": "a side path is no change of frozen weights",
        "full": "full fine-tuning is no change",
    }
    for method, text in words.items():
        tuned = rt.adapt(TINY["timm-vit"].backbone(), method, 3)
        with pytest.raises(MethodError, match=text):
            tuned.merge_and_unload()
        assert list(tuned.adapters) == ["default"]


def test_lora_of_another_part_of_a_larger_model(tmp_path: Path) -> None:
    """Never taken for this part's, however alike the two are."""
    text = {k: v for k, v in TEXT.items() if k not in ("image_size", "patch_size")}
    vision = {k: TEXT[k] for k in TEXT if k not in ("vocab_size", "max_position_embeddings", "pad_token_id")}
    two = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision)).eval()
    for name, targets in {"text": r"text_model.*q_proj", "both": ["q_proj"], "vision": r"vision_model.*q_proj"}.items():
        theirs = peft.get_peft_model(copy.deepcopy(two), peft.LoraConfig(r=2, target_modules=targets))
        shake(theirs)
        theirs.save_pretrained(tmp_path / name)
    tuned = rt.adapt(two.vision_model, "linear", 3)
    for name in ("text", "both"):
        with pytest.raises(CheckpointError, match="text_model"):
            rt.load_peft(tuned, tmp_path / name, "lora")
        assert list(tuned.adapters) == ["default"] and tuned.active_adapters == ("default",)
    rt.load_peft(tuned, tmp_path / "vision", "lora")


@pytest.mark.parametrize("pattern", [rf"{LAYERS}\.[0].*{Q}", f"{LAYERS}.0.{ATTENTION}.{Q}", Q])
def test_alphas_by_pefts_own_patterns(pattern: str, tmp_path: Path) -> None:
    theirs = lora_of_peft("hf-vit", target_modules=[Q], alpha_pattern={pattern: 64})
    theirs.save_pretrained(tmp_path)
    tuned = rt.adapt(TINY["hf-vit"].backbone(), "linear", 3)
    rt.load_peft(tuned, tmp_path, "lora")
    inputs = TINY["hf-vit"].inputs()
    expected = last(theirs.base_model.model, tuned.sites, inputs)
    torch.testing.assert_close(tuned.eval().features(**inputs).tensors()[0], expected[:, :1], atol=1e-5, rtol=1e-4)


def test_lora_that_presumes_other_weights_is_refused(tmp_path: Path) -> None:
    lora_of_peft("hf-vit", init_lora_weights="pissa").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pissa"):
        rt.load_peft(rt.adapt(TINY["hf-vit"].backbone(), "linear", 3), tmp_path)
