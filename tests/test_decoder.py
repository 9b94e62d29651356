"""Decoder language models: the last token of a row, caches of keys, larger models around them."""

from typing import Any

import pytest
import torch
import transformers as hf
from tiny import GROUPED, MORE, TINY, small
from torch import Tensor, nn

import restuning as rt
from restuning.errors import MethodError, SiteError
from restuning.side.features import LAST, last

FAMILIES: dict[str, Any] = {
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralModel(hf.MistralConfig(**GROUPED, sliding_window=4)),
    "qwen2": lambda: hf.Qwen2Model(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3Model(hf.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma3": TINY["gemma3"].build,
}
INSIDE = ("lora", "adapter", "prefix", "bitfit", "ssf", "res-tuning", "mam-adapter")


def tuned_on(name: str, method: Any, **more: Any) -> rt.Tuned:
    torch.manual_seed(1)
    tuned = rt.adapt(FAMILIES[name]().eval(), method, **more).double().eval()
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned


def padded(side: str) -> dict[str, Tensor]:
    ids, mask = torch.randint(3, 50, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask if side == "right" else mask.flip(1)}


def test_the_last_token_that_is_attended_to() -> None:
    x, right = torch.randn(3, 7, 4), padded("right")["attention_mask"]
    assert torch.equal(last(x, right)[:, 0], x[range(3), [6, 4, 1]])
    assert torch.equal(last(x, right.bool().flip(1))[:, 0], x[:, 6])
    assert torch.equal(last(x, None), x[:, -1:])
    longer = torch.cat([torch.ones(3, 5), right], 1)  # with what a cache holds
    assert torch.equal(last(x, longer), last(x, right))
    assert torch.equal(last(x[:, :1], right), x[:, :1])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["linear", "bypass", "lst", "lora", "prefix", "res-tuning"])
def test_a_row_says_the_same_alone_and_padded(name: str, side: str, method: str) -> None:
    tuned = tuned_on(name, rt.Ladder(4, init="random") if method == "lst" else small(method), num_classes=3)
    inputs = padded(side)
    assert tuned.sites.pool == "last" and (tuned.request.tokens == LAST) == (method != "lst")
    features = tuned.features(**inputs)
    assert features.last.shape[1] == (7 if method == "lst" else 1), "one token is tapped where no other is seen"
    together = tuned(**inputs)
    assert together.isfinite().all()
    for i, kept in enumerate(inputs["attention_mask"].bool()):
        alone = {"input_ids": inputs["input_ids"][i : i + 1, kept]}
        where = {"position_ids": kept.nonzero().T} if side == "left" else {}  # rotary angles are single precision
        torch.testing.assert_close(together[i : i + 1], tuned(**alone, **where), rtol=1e-6, atol=1e-6)


def test_adapters_that_read_other_tokens_share_a_pass() -> None:
    tuned, inputs = tuned_on("llama", small("bypass"), num_classes=3), padded("right")
    tuned.add_adapter("all", rt.Ladder(4, init="random"), 3)
    tuned.add_adapter("mean", small("bypass"), 3, pool="mean")
    tuned.double()
    alone = {}
    for name in list(tuned.adapters):
        tuned.set_adapter(name)
        alone[name] = tuned(**inputs)
    tuned.set_adapter(list(tuned.adapters))
    for name, y in tuned(**inputs).items():
        torch.testing.assert_close(y, alone[name])


def cache(model: nn.Module) -> Any:
    return hf.DynamicCache(config=model.config)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("method", INSIDE)
@pytest.mark.parametrize("steps", [(4, 3), (4, 1, 1, 1)], ids=str)
def test_steps_with_a_cache_are_one_pass(name: str, method: str, steps: tuple[int, ...]) -> None:
    tuned, inputs = tuned_on(name, small(method), pool="none"), padded("left")
    whole, said, start, past = tuned(**inputs), [], 0, cache(tuned.backbone)
    for n in steps:
        part = {"input_ids": inputs["input_ids"][:, start : start + n]}
        part["attention_mask"] = inputs["attention_mask"][:, : start + n]
        said.append(tuned(**part, past_key_values=past, use_cache=True))
        start += n
    there = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(said, 1)[there], whole[there], rtol=1e-6, atol=1e-6)
    assert past.get_seq_length() == 7


def test_the_last_token_with_a_cache() -> None:
    tuned, inputs = tuned_on("qwen3", small("bypass"), num_classes=3), padded("left")
    whole, past = tuned(**inputs), cache(tuned.backbone)
    tuned(inputs["input_ids"][:, :5], inputs["attention_mask"][:, :5], past_key_values=past, use_cache=True)
    y = tuned(inputs["input_ids"][:, 5:], inputs["attention_mask"], past_key_values=past, use_cache=True)
    torch.testing.assert_close(y, whole, rtol=1e-6, atol=1e-6)


def test_a_mixed_batch_has_one_cache_for_one_kind() -> None:
    tuned, inputs = tuned_on("llama", small("lora"), num_classes=3), padded("left")
    tuned.add_adapter("other", small("prefix"), 3)
    past = cache(tuned.backbone)
    with pytest.raises(MethodError, match="a cache is of one kind of adapter"):
        tuned(**inputs, past_key_values=past, adapter_names=["default", "other", None])
    mixed = tuned(**inputs, past_key_values=past, adapter_names=["other"] * 3)
    torch.testing.assert_close(mixed, tuned(**inputs))


@pytest.mark.parametrize("build", [hf.LlamaForSequenceClassification, hf.LlamaForCausalLM])
def test_inside_a_larger_model(build: Any) -> None:
    torch.manual_seed(0)
    model, inputs = build(hf.LlamaConfig(**GROUPED)).eval(), padded("right")
    tuned = rt.adapt(model, small("lora"), 3).eval()
    assert {s.writes.path.split(".")[0] for s in tuned.sites} == {"model"} and tuned.sites.pool == "last"
    inner = rt.adapt(model.model, "linear").eval()
    torch.testing.assert_close(tuned.embed(**inputs), inner(**inputs))


def test_what_a_decoder_refuses() -> None:
    llama, inputs = FAMILIES["llama"](), padded("right")
    for unbound in (True, False):
        with pytest.raises(MethodError, match="rotary"):
            rt.adapt(llama, rt.Residual({"block": rt.PromptTuning(2, unbound=unbound)}), 3)(**inputs)
    with pytest.raises(MethodError, match=r"ungated FFN: use init='random'"):
        rt.adapt(llama, rt.Ladder(4), 3)
    with pytest.raises(SiteError, match=r"this transformers Llama.* has none"):
        rt.adapt(llama, "linear", 3, pool="map")
    tuned = rt.adapt(llama, "ssf", 3)
    with pytest.raises(MethodError, match="no bias is there to take what 0_norm1 adds"):
        tuned.merge_and_unload()
    assert list(tuned.adapters) == ["default"]


def test_merging_lora_into_a_decoder() -> None:
    tuned, inputs = (
        tuned_on("qwen3", rt.Residual({"affine": rt.Bias(), "qkv": rt.Lora(2)}), pool="none"),
        padded("left"),
    )
    with pytest.raises(MethodError, match="no bias"):
        tuned.merge_and_unload()
    tuned.add_adapter("only", rt.Residual({"qkv": rt.Lora(2), "fc2": rt.Bias()}), pool="none")
    with torch.no_grad():
        for p in tuned.adapters["only"].parameters():
            p.add_(0.1 * torch.randn_like(p))
        tuned.double()
        expected = tuned(**inputs)
        bare = rt.adapt(tuned.merge_and_unload(), "linear", pool="none")(**inputs)
    torch.testing.assert_close(bare, expected, rtol=1e-6, atol=1e-6)


def test_tiny_decoders_are_of_this_family() -> None:
    for name in ("llama", "gemma3"):
        info = rt.find_sites((TINY | MORE)[name].backbone()).at("attention")[0].info
        assert (info.heads, info.out_features) == (2, {"llama": 16, "gemma3": 32}[name])


def test_capped_scores_refuse_a_prefix() -> None:
    gemma2 = hf.Gemma2Model(hf.Gemma2Config(**GROUPED, head_dim=16, attn_implementation="eager"))
    with pytest.raises(SiteError, match="scores are capped"):
        rt.adapt(gemma2, "prefix", 3)(**padded("right"))
    rt.adapt(gemma2, "res-tuning", 3)(**padded("right"))
