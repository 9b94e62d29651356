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
from restuning.errors import CheckpointError, MethodError, SiteError
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


# ---- operations of PEFT's on adapters that are there


def drawn(tuned: rt.Tuned, name: str = "default", seed: int = 5) -> rt.Tuned:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.adapter(name).parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return tuned


MERGES: dict[str, tuple[Callable[[], nn.Module], rt.Residual]] = {
    "bert": (bert, rt.Residual({"all-linear": rt.Lora(4, 8), "words": rt.Lora(2)})),
    "Conv1D": (gpt2, rt.Residual({"all-linear": rt.Lora(4)})),
    "dora": (bert, rt.Residual({"all-linear": rt.Lora(4, dora=True)})),
    "copies": (bert, rt.Residual({"qkv": rt.Lora(4)}, modules_to_save=("embeddings.LayerNorm", "output.dense"))),
}


@pytest.mark.parametrize("case", MERGES.values(), ids=MERGES)
def test_a_merge_in_place_is_the_tuned_model_and_is_undone_to_the_bit(case: Any) -> None:
    build, method = case
    tuned = drawn(rt.adapt(build(), method, 3))
    before = {key: value.clone() for key, value in tuned.backbone.state_dict().items()}
    parameters = dict(tuned.backbone.named_parameters())
    with torch.no_grad():
        out = tuned(input_ids=IDS)
        tuned.merge_adapter()
        torch.testing.assert_close(tuned(input_ids=IDS), out, rtol=1e-4, atol=1e-5)
        merged = tuned.backbone(input_ids=IDS).last_hidden_state
        assert not torch.allclose(merged, build()(input_ids=IDS).last_hidden_state, atol=1e-3)
        tuned.unmerge_adapter()
        assert torch.equal(tuned(input_ids=IDS), out)
    after = tuned.backbone.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p is parameters[name] for name, p in tuned.backbone.named_parameters())
    tuned.merge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in tuned.unload().state_dict().items())


def test_several_adapters_merge_as_pefts_do() -> None:
    tuned, other, _ = tuned_and_peft(bert, "query", rt.Lora(4, 8, 0.0), ["query"], lora_alpha=8)
    tuned.add_adapter("second", rt.Residual({"query": rt.Lora(4, 4, 0.0)}), pool="none")
    other.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=4, lora_dropout=0.0, target_modules=["query"]))
    same_as_peft(drawn(tuned, "second"), other, "second")
    bare = bert()(input_ids=IDS).last_hidden_state
    with torch.no_grad():
        tuned.merge_adapter(["default", "second"])
        other.base_model.merge_adapter(["default", "second"])
        wanted = other(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(tuned(input_ids=IDS)["second"], wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted, bare, atol=1e-3)
        tuned.unmerge_adapter()
        tuned.merge_adapter("second")
        other.base_model.unmerge_adapter()
        other.set_adapter("second")
        wanted = other(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(tuned(input_ids=IDS), wanted, rtol=1e-4, atol=1e-5)


def same_as_peft(tuned: rt.Tuned, other: Any, name: str) -> None:
    """Give PEFT's adapter our weights."""
    with torch.no_grad():
        for place, site in tuned.adapter(name).sites.items():
            theirs, mine = other.base_model.model.get_submodule(site.reads.path), tuned.adapter(name).tuners[place]
            theirs.lora_A[name].weight.copy_(mine.a)
            theirs.lora_B[name].weight.copy_(mine.b)


def test_while_merged_what_needs_the_backbones_own_weights_is_refused(tmp_path: Any) -> None:
    tuned = drawn(rt.adapt(bert(), rt.Residual({"query": rt.Lora(4)}), 3))
    tuned.add_adapter("other", "linear", 2)
    predictor = rt.Predictor.of(tuned)
    tuned.merge_adapter("default")
    refused: dict[str, Callable[[], Any]] = {
        "a merge": tuned.merge_adapter,
        "another choice of adapters": lambda: tuned.set_adapter("other"),
        "another adapter": lambda: tuned.add_adapter("third", "linear", 2),
        "delete_adapter": lambda: tuned.delete_adapter("default"),
        "disable_adapter": lambda: tuned.disable_adapter().__enter__(),
        "a mixed batch": lambda: tuned(input_ids=IDS, adapter_names=["default", None]),
        "a predictor": lambda: predictor.predict({"input_ids": IDS}),
        "set_scale": lambda: tuned.set_scale(2.0),
        "training": tuned.train,
        "another Tuned": lambda: rt.adapt(tuned.backbone, "linear", 2),
    }
    for what, call in refused.items():
        with pytest.raises(MethodError, match=f"hold a merged adapter, and {what} needs its own: call unmerge_adapter"):
            call()
    tuned.save_pretrained(tmp_path)
    tuned.unmerge_adapter()
    predictor.predict({"input_ids": IDS})
    tuned.set_adapter("other")
    with pytest.raises(MethodError, match="'bypass' cannot be merged: a side path"):
        tuned.add_adapter("bypass", "bypass", 2)
        tuned.merge_adapter()
    again = rt.Tuned.from_pretrained(bert(), tmp_path)
    tuned.set_adapter("default")
    assert torch.equal(again(input_ids=IDS), tuned(input_ids=IDS))


def test_one_weight_of_two_maps_takes_no_two_changes() -> None:
    model: Any = bert()
    model.encoder.layer[0].attention.self.key.weight = model.encoder.layer[0].attention.self.query.weight
    tuned = drawn(rt.adapt(model, rt.Residual({"query": rt.Lora(2), "key": rt.Lora(2)}), 3))
    with pytest.raises(MethodError, match="shares its weight with another map that is tuned"):
        tuned.merge_adapter()
    tuned.add_adapter("one", rt.Residual({"query": rt.Lora(2)}, blocks=(1,)), 3)
    tuned.merge_adapter("one")


def test_merged_weights_that_overflow_are_refused() -> None:
    tuned = rt.adapt(bert(), rt.Residual({"query": rt.Lora(4)}), 3)
    with torch.no_grad():
        for p in tuned.adapters["default"].tuners.parameters():
            p.fill_(1e30)
    before = {key: value.clone() for key, value in tuned.backbone.state_dict().items()}
    for merge in (tuned.merge_adapter, tuned.merge_and_unload):
        with pytest.raises(CheckpointError, match="not finite"):
            merge(safe_merge=True)
    assert all(torch.equal(value, before[key]) for key, value in tuned.backbone.state_dict().items())
    tuned.merge_adapter(safe_merge=False)
    assert not all(p.isfinite().all() for p in tuned.backbone.parameters())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"svd_rank": 3}),
        ("ties", {"density": 0.5}),
        ("ties_svd", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.3}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties_svd", {"density": 0.5}),
    ],
)
def test_weighted_adapters_are_pefts(kind: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under DARE for the same draws."""
    monkeypatch.setattr(torch, "bernoulli", lambda t: (torch.arange(t.numel()).view_as(t) * 7 % 3 < 1).to(t))
    tuned, other, _ = tuned_and_peft(bert, "query", rt.Lora(4, 8, 0.0), ["query"], lora_alpha=8)
    tuned.add_adapter("second", rt.Residual({"query": rt.Lora(4, 4, 0.0)}), pool="none")
    other.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=4, lora_dropout=0.0, target_modules=["query"]))
    same_as_peft(drawn(tuned, "second"), other, "second")
    both = (["default", "second"], [0.7, -0.4], "both")
    tuned.add_weighted_adapter(*both, kind, **settings)
    other.base_model.add_weighted_adapter(*both, kind, **settings)
    other.set_adapter("both")
    with torch.no_grad():
        wanted = other(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(tuned(input_ids=IDS), wanted, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(wanted, bert()(input_ids=IDS).last_hidden_state, atol=1e-3)


def test_a_weighted_adapter_of_several_operations_is_saved_and_is_the_sum(tmp_path: Any) -> None:
    """By `cat` it is the exact sum of both, wherever each of them is."""
    tuned = drawn(rt.adapt(bert(), rt.Residual({"output.dense": rt.Lora(2, 4), "words": rt.Lora(2)}), 3, "a"), "a")
    tuned.add_adapter("b", rt.Residual({"query": rt.Lora(3), "intermediate.dense": rt.Lora(2)}, blocks=(1,)), 2)
    drawn(tuned, "b", 6)
    tuned.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    assert tuned.adapter_config("sum").num_classes == 3
    with torch.no_grad():
        tuned.set_adapter("sum")
        out = tuned(input_ids=IDS)
        tuned.set_adapter(["a", "b"])
        torch.testing.assert_close(tuned(input_ids=IDS)["a"], out, rtol=1e-4, atol=1e-5)
        tuned.save_pretrained(tmp_path, "sum")
        again = rt.Tuned.from_pretrained(bert(), tmp_path)
        assert torch.equal(again(input_ids=IDS), out)


def test_what_a_weighted_adapter_refuses() -> None:
    tuned = rt.adapt(bert(), rt.Residual({"query": rt.Lora(4)}), name="a")
    tuned.add_adapter("b", rt.Residual({"query": rt.Lora(2)}))
    tuned.add_adapter("c", rt.Residual({"ffn": rt.Adapter(2)}))
    for adapters, weights, kind, settings, match in (
        (["a", "b"], [1, 1], "linear", {}, "needs LoRA of one rank, not of 4, 2: use svd or cat"),
        (["a"], [1, 1], "svd", {}, "2 weights for 1 adapters"),
        (["a"], [1], "sum", {}, "unknown combination_type 'sum'"),
        (["a"], [1], "ties", {}, "ties needs a density"),
        (["a", "c"], [1, 1], "svd", {}, "of plain LoRA: adapter 'c' is not"),
    ):
        with pytest.raises(MethodError, match=match):
            tuned.add_weighted_adapter(adapters, weights, "new", kind, **settings)  # type: ignore[arg-type]
    assert [*tuned.adapters] == ["a", "b", "c"]
    with pytest.raises(MethodError, match="set_scale is of LoRA: adapter 'c' has AdapterTuner"):
        tuned.set_scale(2.0)


def test_a_scale_is_pefts_and_is_saved(tmp_path: Any) -> None:
    tuned, other, plain = tuned_and_peft(bert, "qkv", rt.Lora(4, 8, 0.0), ["query", "key", "value"], lora_alpha=8)
    for scale in (0.25, 0.5):
        tuned.set_scale(scale)
        for module in other.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", scale)
        with torch.no_grad():
            out = tuned(input_ids=IDS)
            torch.testing.assert_close(out, other(input_ids=IDS).last_hidden_state, rtol=1e-4, atol=1e-5)
    tuned.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(rt.Tuned.from_pretrained(bert(), tmp_path)(input_ids=IDS), out)
        tuned.set_scale(0)
        assert torch.equal(tuned(input_ids=IDS), plain(input_ids=IDS).last_hidden_state)


def test_modules_to_save_are_pefts_trained_saved_and_exchanged(tmp_path: Any) -> None:
    names = ["LayerNorm", "word_embeddings"]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["query"], modules_to_save=names)
    torch.manual_seed(2)
    other: Any = peft.get_peft_model(bert(), config)
    with torch.no_grad():
        for p in (p for p in other.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape))
    other.eval().save_pretrained(tmp_path / "theirs")
    backbone = bert()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    tuned = rt.Tuned(backbone)
    rt.load_peft(tuned, tmp_path / "theirs", pool="none")
    out, wanted = tuned(input_ids=IDS), other(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    wanted.square().sum().backward()
    copies = dict(other.named_parameters())
    for place, site in tuned.adapter("default").sites.items():
        if site.op in ("module", "tail"):
            for key, p in tuned.adapter("default").tuners[place].module.named_parameters():
                theirs = copies[f"base_model.model.{site.reads.path}.modules_to_save.default.{key}"]
                torch.testing.assert_close(p.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    tuned.save_pretrained(tmp_path / "ours")
    rt.save_peft(tuned, tmp_path / "ours as theirs")
    again = rt.Tuned.from_pretrained(bert(), tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours as theirs").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS), out)
        torch.testing.assert_close(back(input_ids=IDS).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
        merged: Any = tuned.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


def test_copies_serve_one_adapter_a_pass_and_are_refused_where_they_meet_tuners() -> None:
    tuned = rt.adapt(bert(), rt.Residual(modules_to_save=("embeddings.LayerNorm",)), 3, "a")
    tuned.add_adapter("b", rt.Residual(modules_to_save=("embeddings.LayerNorm",)), 3)
    drawn(tuned, "a")
    drawn(tuned, "b", 6)
    alone = {}
    with torch.no_grad():
        for name in ("a", "b"):
            tuned.set_adapter(name)
            alone[name] = tuned(input_ids=IDS)
        mixed = tuned(input_ids=IDS, adapter_names=["b", "a"])
        torch.testing.assert_close(mixed, torch.stack([alone["b"][0], alone["a"][1]]))
        predicted = rt.Predictor.of(tuned).predict({"input_ids": IDS})
        torch.testing.assert_close(predicted["b"], alone["b"])
        tuned.set_adapter(["a", "b"])
        with pytest.raises(SiteError, match="adapters a and b both train a copy of one LayerNorm"):
            tuned(input_ids=IDS)
    with pytest.raises(MethodError, match=r"is copied, and .* in it has a tuner"):
        rt.adapt(bert(), rt.Residual({"query": rt.Lora(2)}, modules_to_save=("attention.self",)))
    with pytest.raises(SiteError, match="no module 'none' in"):
        rt.adapt(bert(), rt.Residual(modules_to_save=("none",)))


def test_pefts_files_give_the_same_method_whatever_the_order_of_sets(tmp_path: Any) -> None:
    """And LoRA on one of several modules of a name goes there alone."""
    import os
    import subprocess
    import sys

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=r".*(query|intermediate\.dense)|.*0\.output\.dense")
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    code = (
        "import sys, json; sys.path.insert(0, 'tests')\nimport restuning as rt; from tiny import TINY\n"
        f"t = rt.Tuned(TINY['bert'].backbone()); rt.load_peft(t, {str(tmp_path)!r})\n"
        "print([s.reads.path for s in t.adapter('default').sites.values()], t.adapter_config().spec)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout and runs[0].stdout == runs[1].stdout, runs[0].stderr
    assert "'encoder.layer.0.output.dense'" in runs[0].stdout
    assert "attention.output.dense" not in runs[0].stdout and "layer.1.output.dense" not in runs[0].stdout
