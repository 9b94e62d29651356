"""LoRA everywhere, against PEFT's own numbers."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tiny import TEXT, TINY
from torch import Tensor, nn

import restuning as rt
from restuning.errors import MethodError, SiteError
from restuning.methods.files import from_dict, to_dict

WORDS = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}


def bert() -> nn.Module:
    return TINY["bert"].backbone()


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    model = hf.GPT2Model(hf.GPT2Config(**WORDS)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def tuned_and_peft(
    build: Callable[[], nn.Module], op: str, lora: rt.Lora, targets: Any, **settings: Any
) -> tuple[rt.Tuned, Any, nn.Module]:
    """The same LoRA on the same backbone, by us and by PEFT, with the same weights in it."""
    tuned = rt.adapt(build(), rt.Residual({op: lora}), pool="none")
    config = peft.LoraConfig(r=lora.rank, lora_dropout=0.0, target_modules=targets, **settings)
    other = peft.get_peft_model(build(), config).eval()
    layers = {name.removeprefix("base_model.model."): m for name, m in other.named_modules() if hasattr(m, "lora_A")}
    adapter = tuned.adapters["default"]
    assert {site.reads.path for site in adapter.sites.values()} == {*layers}
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for place, site in adapter.sites.items():
            mine: Any = adapter.tuners[place]
            theirs: Any = layers[site.reads.path]
            embeds = "default" in theirs.lora_embedding_A
            pair = (
                (theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"])
                if embeds
                else (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
            )
            for a, b in zip((mine.a, mine.b), pair, strict=True):
                value = 0.3 * torch.randn(a.shape, generator=draw)
                a.add_(value) if settings.get("init_lora_weights") == "pissa" else a.copy_(value)
                b.copy_(a)
            if hasattr(mine, "length"):
                mine.length.add_(0.1 * torch.randn(mine.length.shape, generator=draw))
                theirs.lora_magnitude_vector["default"].weight.copy_(mine.length)
    return tuned, other, build()


CASES: dict[str, tuple[Callable[[], nn.Module], str, rt.Lora, Any, dict[str, Any]]] = {
    "plain": (bert, "qkv", rt.Lora(4, 8, 0.0), ["query", "key", "value"], {"lora_alpha": 8}),
    "rank-stabilised": (
        bert,
        "query",
        rt.Lora(4, 8, 0.0, rank_stabilized=True),
        ["query"],
        {"lora_alpha": 8, "use_rslora": True},
    ),
    "dora": (
        bert,
        "qkv",
        rt.Lora(4, 8, 0.0, dora=True),
        ["query", "key", "value"],
        {"lora_alpha": 8, "use_dora": True},
    ),
    "pissa": (
        bert,
        "fc1",
        rt.Lora(4, 8, 0.0, init="pissa"),
        r".*intermediate\.dense",
        {"lora_alpha": 8, "init_lora_weights": "pissa"},
    ),
    "an expression": (bert, r"re:.*\.1\..*\.dense", rt.Lora(4, dropout=0.0), r".*\.1\..*\.dense", {"lora_alpha": 4}),
    "Conv1D": (gpt2, "c_attn", rt.Lora(4, dropout=0.0), ["c_attn"], {"lora_alpha": 4, "fan_in_fan_out": True}),
    "embeddings": (bert, "word_embeddings", rt.Lora(4, dropout=0.0), ["word_embeddings"], {"lora_alpha": 4}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lora_is_what_peft_computes_and_merges(case: Any) -> None:
    build, op, lora, targets, settings = case
    tuned, other, plain = tuned_and_peft(build, op, lora, targets, **settings)
    with torch.no_grad():
        bare = plain(input_ids=IDS).last_hidden_state
        wanted = other(input_ids=IDS).last_hidden_state
        got = tuned(input_ids=IDS)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, bare, atol=1e-3)
        merged: Any = tuned.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [rt.Lora(4, dora=True), rt.Lora(4, init="pissa"), rt.Lora(4, rank_stabilized=True)])
@pytest.mark.parametrize("build", [bert, gpt2])
def test_every_kind_leaves_the_output_as_it_is_at_initialisation(build: Any, lora: rt.Lora) -> None:
    tuned = rt.adapt(build(), rt.Residual({"all-linear": lora}), pool="none")
    with torch.no_grad():
        assert torch.equal(tuned(input_ids=IDS), build()(input_ids=IDS).last_hidden_state)


@pytest.mark.parametrize("lora", [rt.Lora(4, dora=True), rt.Lora(4, init="pissa")])
def test_gradients_of_dora_and_pissa_are_pefts(lora: rt.Lora) -> None:
    settings: dict[str, Any] = {"use_dora": True} if lora.dora else {"init_lora_weights": "pissa"}
    lora = rt.Lora(4, 4, 0.0, dora=lora.dora, init=lora.init)
    tuned, other, _ = tuned_and_peft(bert, "query", lora, ["query"], lora_alpha=4, **settings)
    tuned(input_ids=IDS).square().sum().backward()
    other(input_ids=IDS).last_hidden_state.square().sum().backward()
    for place, site in tuned.adapters["default"].sites.items():
        theirs: Any = other.base_model.model.get_submodule(site.reads.path)
        mine: Any = tuned.adapters["default"].tuners[place]
        torch.testing.assert_close(mine.a.grad, theirs.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.b.grad, theirs.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-5)
        if lora.dora:
            magnitude = theirs.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(mine.length.grad, magnitude.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "timm-vit", "hf-vit", "timm-resnet", "timm-eva02", "llama"])
def test_all_linear_is_what_peft_takes_in_the_blocks(name: str) -> None:
    from tiny import MORE

    tiny = (TINY | MORE)[name]
    backbone = tiny.backbone()
    sites = rt.find_sites(backbone)
    mine = {s.weight.weight.removesuffix(".weight") if s.weight else s.reads.path for s in sites.at("all-linear")}
    kinds = (nn.Linear, nn.Conv2d)
    inside = {
        path
        for path, m in backbone.named_modules()
        if isinstance(m, kinds) and any(path.startswith(f"{block}.") for block in sites.blocks)
    }
    assert mine == inside


def test_exclude_leaves_modules_out() -> None:
    sites = rt.find_sites(bert())
    method = rt.Residual({"all-linear": rt.Lora(2)}, exclude=("value", r"re:.*\.0\..*"))
    assert from_dict(to_dict(method)) == method
    tuned = rt.adapt(bert(), method)
    paths = {site.reads.path for site in tuned.adapters["default"].sites.values()}
    every = {s.reads.path for s in sites.at("all-linear")}
    assert paths == {p for p in every if ".1." in p and not p.endswith("value")}
    with pytest.raises(SiteError, match="everything of 'query' is excluded by query"):
        rt.adapt(bert(), rt.Residual({"query": rt.Lora(2)}, exclude=("query",)))
    with pytest.raises(SiteError, match=r"'re:\(' is no regular expression"):
        rt.adapt(bert(), rt.Residual({"re:(": rt.Lora(2)}))


@pytest.mark.parametrize("lora", [rt.Lora(4, dora=True), rt.Lora(4, init="pissa")])
def test_dora_and_pissa_are_saved_and_loaded(lora: rt.Lora, tmp_path: Any) -> None:
    tuned = rt.adapt(bert(), rt.Residual({"qkv": lora}), 3)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        out = tuned(input_ids=IDS)
        tuned.save_pretrained(tmp_path)
        again = rt.Tuned.from_pretrained(bert(), tmp_path)
        assert torch.equal(again(input_ids=IDS), out)


def test_what_lora_refuses() -> None:
    with pytest.raises(MethodError, match="expected one of the two"):
        rt.Lora(4, dora=True, init="pissa")
    with pytest.raises(MethodError, match="expected one of kaiming, pissa"):
        rt.Lora(4, init="svd")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="dora and pissa go beside linear maps alone"):
        rt.adapt(TINY["timm-resnet"].backbone(), rt.Residual({"conv": rt.Lora(4, dora=True)}))


def test_words_are_tuned_and_merged() -> None:
    model = hf.BertModel(hf.BertConfig(**TEXT)).eval()
    tuned = rt.adapt(model, rt.Residual({"words": rt.Lora(2)}), pool="none")
    assert {s.reads.path.split(".")[-1] for s in tuned.adapters["default"].sites.values()} == {
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
    }
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        out: Tensor = tuned(input_ids=IDS)
        merged: Any = tuned.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).last_hidden_state, out, rtol=1e-4, atol=1e-5)
