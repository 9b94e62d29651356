"""Backbones that no row of the table has: found by one traced forward, and right."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from helpers import COMPILES
from timm.models.mlp_mixer import MlpMixer
from tiny import GROUPED, HF, MORE, TEXT, TINY, Keywords, Tiny, small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import restuning as rt
from restuning.backbones.auto import find
from restuning.backbones.sites import find_sites
from restuning.backbones.zoo import build, families
from restuning.bench.families import METHODS, check_backbone
from restuning.bench.pages import page, totals
from restuning.cli.main import main
from restuning.data import Preprocess, load_task
from restuning.errors import RestuningError, SiteError, TowersError
from restuning.features.bank import Bank
from restuning.features.bank import build as build_bank
from restuning.hooks.tail import tail_of
from restuning.hooks.taps import tap
from restuning.side.features import FeatureRequest
from restuning.utils.notes import Note
from restuning.utils.profiling import saved_bytes

SMALL = ("timm-resnext",)
"""At this size its stem holds more than its blocks, which a trace does not take for a backbone's."""

WRITTEN = {n: tiny for n, tiny in (TINY | MORE).items() if tiny.anatomy is None and n not in SMALL}

NOT_ITS_OWN = ("timm-deit", "open-clip")
"""The row's pooled feature is not the model's own output, on purpose: that is the mean of two heads' tokens, or a
projection. A trace takes the whole for the last block there."""


class Recorder(nn.Module):
    """Adds nothing, and keeps what it is given."""

    kept: list[tuple[Tensor, Tensor]]

    def __init__(self, info: rt.SiteInfo) -> None:
        super().__init__()
        self.info, self.kept = info, []

    def forward(self, x: Tensor, y: Tensor) -> None:
        assert x.shape[-1] == self.info.in_features and y.shape[-1] == self.info.out_features
        self.kept.append((x, y))


def recorded(tiny: Tiny, sites: Any, op: str) -> list[tuple[Tensor, Tensor]]:
    """What goes into an operation, and what comes out, in every block."""
    torch.manual_seed(0)
    tuned = rt.adapt(tiny.backbone(), rt.Residual({op: Recorder}), anatomy=sites)
    with torch.no_grad():
        tuned(**tiny.inputs())
    return [kept for tuner in tuned.adapters["default"].tuners.values() for kept in tuner.kept]


@pytest.mark.parametrize("tiny", WRITTEN.values(), ids=WRITTEN)
def test_written_rows_and_found_ones_agree(tiny: Tiny, request: pytest.FixtureRequest) -> None:
    """The same blocks, stages and pooled feature, and the same tensors at every operation that both name."""
    backbone, inputs = tiny.backbone(), tiny.inputs(batch=3)
    if "attention_mask" in inputs:
        inputs = {"input_ids": torch.randint(3, 50, (3, 12))}
    written, found = find_sites(backbone), find(backbone, inputs)
    if request.node.callspec.id in NOT_ITS_OWN:
        assert found.blocks == (*written.blocks, "")
        return
    assert found.blocks == written.blocks and found.stages == written.stages
    assert [i.out_features for i in found.features] == [i.out_features for i in written.features]
    with torch.no_grad():
        pooled = []
        for sites in (written, found):
            with tap(backbone, sites, FeatureRequest(tuple(range(len(sites.blocks) + 1)))) as taps:
                backbone(**inputs)
            pool = None if found.pool == written.pool else written.pool
            pooled.append((taps.features.tensors(), tail_of(backbone, sites, pool)(taps.features.last)))
        (features, wanted), (others, got) = pooled
        assert all(torch.equal(a, b) for a, b in zip(features, others, strict=True))
        torch.testing.assert_close(got, wanted)
    for op in {"mha", "ffn", "block"} & {*written.ops}:
        pairs = zip(recorded(tiny, written, op), recorded(tiny, found, op), strict=True)
        for (x, y), (other_x, other_y) in pairs:
            assert torch.equal(y, other_y), op
            assert torch.equal(x, other_x), op


def mixer() -> nn.Module:
    model: Any = MlpMixer(img_size=16, patch_size=8, embed_dim=32, num_blocks=2, num_classes=0)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "fixed_input_size": True}
    return model


SEG = {"num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2]}
SEG |= {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
POOL = {"num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2]}
POOL |= {"padding": [2, 1], "mlp_ratio": 2.0}
WORDS = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

FOUND: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**WORDS)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40)
    ),
    "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)),
    "t5-encoder": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "opt": lambda: hf.OPTModel(
        hf.OPTConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64)
    ),
    "phi": lambda: hf.PhiModel(hf.PhiConfig(**GROUPED)),
    "segformer": lambda: hf.SegformerModel(hf.SegformerConfig(**SEG)),
    "poolformer": lambda: hf.PoolFormerModel(hf.PoolFormerConfig(**POOL)),
    "mixer": mixer,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = FOUND[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", FOUND)
def test_families_without_a_row_are_right(name: str) -> None:
    """By the check of `restuning backbones check`, which has hooks and sums of its own."""
    checked = check_backbone(made(name))
    assert checked.found == "trace" and (checked.share or 0) >= 0.6
    assert [checked.methods[m] for m in METHODS[:4]] == ["right"] * 4, checked.methods
    assert not any(outcome.startswith("wrong") for outcome in checked.methods.values())


def test_one_layer_called_three_times_is_three_blocks() -> None:
    torch.manual_seed(1)
    model = hf.AlbertModel(hf.AlbertConfig(**{**TEXT, "num_hidden_layers": 3}, embedding_size=16)).eval()
    sites = find_sites(model)
    assert len(sites.blocks) == 3 and len({*sites.blocks}) == 1
    ids = torch.randint(3, 50, (2, 7))
    outs: list[Tensor] = []
    handle = model.get_submodule(sites.blocks[0]).register_forward_hook(
        lambda m, args, out: outs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad(), tap(model, sites, FeatureRequest((0, 1, 2, 3))) as taps:
        model(input_ids=ids)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(taps.features.tensors()[1:], outs, strict=True))
    tuned = rt.adapt(model, rt.Residual({"block": rt.Adapter(3)}, blocks=(1,)))
    nn.init.normal_(tuned.adapters["default"].tuners["1_block"].up.bias)
    with torch.no_grad():
        changed = tuned.features(input_ids=ids)
    assert not torch.equal(changed.last, outs[-1])


def test_a_text_is_pooled_by_what_sees_all_of_it() -> None:
    assert find_sites(made("gpt2")).pool == "last" and find_sites(made("opt")).pool == "last"
    assert find_sites(made("distilbert")).pool == "cls" and find_sites(made("t5-encoder")).pool == "mean"


def test_a_model_without_a_configuration_is_traced_on_what_it_is_given() -> None:
    model, x = Keywords().eval(), torch.randn(3, 5, 8)
    with pytest.raises(SiteError, match="no known anatomy fits Keywords, and it does not say what it reads"):
        find_sites(model)
    sites = find_sites(model, inputs={"x": x})
    assert sites.blocks == ("layers.0", "layers.1", "layers.2") and sites.norm == ("final",) and sites.pool == "cls"
    tuned = rt.adapt(model, rt.Residual({"block": rt.Adapter(3)}), anatomy=sites)
    with torch.no_grad():
        assert torch.equal(tuned(x), model(x))


def test_what_has_no_blocks_is_refused_in_one_line() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    with pytest.raises(
        SiteError, match=r"no known anatomy fits Sequential, .* blocks with 0% .*describe it: restuning"
    ) as refused:
        find_sites(model, inputs={"input": torch.randn(3, 3, 4, 4)})
    assert "\n" not in str(refused.value)


def test_a_row_that_holds_a_part_of_a_model_does_not_fit() -> None:
    """HRNet has a `layer1` of ResNet's blocks, and most of its parameters elsewhere."""
    with torch.device("meta"):
        model = timm.create_model("hrnet_w18_small", num_classes=0)
    try:
        assert find_sites(model).anatomy.name == "found in HighResolutionNet"
    except SiteError as error:
        assert "ResNet, ResNeXt" not in str(error)


def clip() -> nn.Module:
    text = {**{k: v for k, v in TEXT.items() if k not in ("image_size", "patch_size")}, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=HF)).eval()


def test_of_two_towers_one_must_be_named() -> None:
    model = clip()
    with pytest.raises(TowersError, match="CLIPModel has 2 towers: name the one that is meant, tower='") as several:
        rt.adapt(model, "linear")
    assert {*several.value.towers} == {"vision_model", "text_model"}
    tuned = rt.adapt(model, "bypass", 3, tower="vision_model")
    assert tuned(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    with pytest.raises(SiteError, match="no tower 'audio' in CLIPModel: it has text_model, vision_model"):
        rt.adapt(model, "linear", tower="audio")


_CLIP_TEXT = {**{k: v for k, v in TEXT.items() if k not in ("image_size", "patch_size")}, "eos_token_id": 2}
_CLIP_TEXT |= {"bos_token_id": 1, "sep_token_id": 2}
_SEQUENCES = {
    f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4))
}
_SEQUENCES |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "vocab_size": 50}
TOWERS: dict[str, tuple[Any, dict[str, str]]] = {
    "SigLIP": (
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=_CLIP_TEXT, vision_config=HF)),
        {"vision_model": "pixels", "text_model": "words"},
    ),
    "BLIP": (
        lambda: hf.BlipModel(hf.BlipConfig(text_config=_CLIP_TEXT, vision_config=HF, projection_dim=8)),
        {"vision_model": "pixels", "text_model": "words"},
    ),
    "BART": (
        lambda: hf.BartModel(hf.BartConfig(**_SEQUENCES, pad_token_id=0)),
        {"encoder": "words", "decoder": "words"},
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_of_every_kind_of_towers_one_is_asked_for(name: str) -> None:
    build, towers = TOWERS[name]
    for tower, reads in towers.items():
        model = build().eval()
        with pytest.raises(TowersError) as several:
            rt.adapt(model, "linear")
        assert several.value.towers == (*towers,)
        tuned = rt.adapt(model, "bypass", 3, tower=tower)
        batch = torch.randn(2, 3, 16, 16) if reads == "pixels" else torch.randint(3, 50, (2, 7))
        assert tuned(batch).shape == (2, 3)


def test_a_model_that_reads_images_into_words_is_its_language_model_unless_a_tower_is_named() -> None:
    """Gemma 3: the vision tower feeds the stream, which is the language model's."""
    text = {k: v for k, v in GROUPED.items() if k not in ("image_size", "patch_size")}
    config = hf.Gemma3Config(text_config={**text, "head_dim": 8}, vision_config=HF, mm_tokens_per_image=4)
    model, ids = hf.Gemma3Model(config).eval(), torch.randint(3, 50, (2, 7))
    sites = find_sites(model)
    assert {path.partition(".")[0] for path in sites.blocks} == {"language_model"}
    assert rt.adapt(model, "bypass", 3, anatomy=sites)(input_ids=ids).shape == (2, 3)
    assert rt.adapt(model, "bypass", 3, tower="vision_tower")(torch.randn(2, 3, 16, 16)).shape == (2, 3)


def test_an_encoder_and_a_decoder_are_apart() -> None:
    model = hf.T5Model(hf.T5Config(**T5)).eval()
    with pytest.raises(TowersError) as several:
        find_sites(model)
    assert several.value.towers == ("encoder", "decoder")
    tuned = rt.adapt(model, "res-tuning", 3, tower="encoder")
    assert tuned(input_ids=torch.randint(3, 50, (2, 7))).shape == (2, 3)


def test_families_are_listed_and_a_small_model_of_one_is_built() -> None:
    assert len(families("timm")) > 80 and {*families("timm").values()} == {"image"}
    assert families("transformers")["gpt2"] == "text" and families("transformers")["vit"] == "image"
    assert "resnet" in families("torchvision")
    first, second = build("transformers", "gpt2"), build("transformers", "gpt2")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(RestuningError, match="unknown family 'gpt-2' of transformers; nearest: gpt2"):
        build("transformers", "gpt-2")


def test_the_check_is_a_command_and_a_page(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out, written = tmp_path / "checked.json", tmp_path / "page.md"
    command = ["backbones", "check", "--library", "transformers", "--family", "gpt2", "bert", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "transformers gpt2: trace (100%, high); linear right, bypass right" in printed and "bert: table" in printed
    assert main([*command, "--json"]) == 0  # what is there is not tried again
    assert main(["backbones", "page", str(out), "--out", str(written)]) == 0
    text = written.read_text()
    assert "| gpt2 | trace 100% | 3 | last | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ |" in text and "| bert | table | 3 | cls |" in text
    assert main(["backbones", "check", "--family", "nonesuch"]) == 2


def test_totals_count_what_is_right_and_what_is_wrong() -> None:
    ok = {
        "library": "timm",
        "kind": "image",
        "family": "a",
        "found": "trace",
        "methods": dict.fromkeys(METHODS, "right"),
    }
    bad = {**ok, "family": "b", "found": "refused", "methods": {}}
    wrong = {**ok, "family": "c", "methods": {**ok["methods"], "lora": "wrong: no"}}
    (row,) = totals([ok, bad, wrong])
    assert (row["families"], row["trace"], row["refused"], row["linear"], row["lora"], row["wrong"]) == (
        3,
        2,
        1,
        2,
        1,
        1,
    )
    more = {"share": 0.9, "tower": "", "blocks": 2, "stages": 1, "pool": "cls", "why": ""}
    assert "| b | refused 90% |" in page([{**one, **more} for one in (ok, bad, wrong)])


ASKED = ("gpt2", "distilbert", "t5-encoder", "albert", "phi", "segformer")
"""Families without a row that PEFT's own tests and examples use most, for text and for images."""

ROWS = ("bert", "llama", "hf-vit", "hf-clip", "hf-siglip", "hf-dinov2", "hf-swin", "hf-convnext")
"""Families with a row that the tests, examples and issues of PEFT, timm and transformers name most; here by trace."""


WHOLE = ("gpt2", "distilbert", "t5-encoder", "bert", "hf-vit", "hf-dinov2")
"""Of which torch makes one graph, forward and backward."""


def asked(name: str) -> tuple[nn.Module, Any]:
    backbone = made(name) if name in FOUND else (TINY | MORE)[name].backbone()
    return backbone, find(backbone)


def examples(name: str, rows: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    side = 64 if name == "segformer" else (TINY | MORE)[name].side if name.startswith("hf-") else 0
    if side:
        return {"pixel_values": torch.randn(rows, 3, side, side, generator=draw)}
    return {"input_ids": torch.randint(3, 50, (rows, 7), generator=draw)}


@pytest.mark.parametrize("name", ["segformer", *(name for name in ROWS if name.startswith("hf-"))])
def test_a_found_family_is_read_from_a_bank(name: str, tmp_path: Any) -> None:
    """Features on disk give the logits and the gradients that pictures give."""
    (backbone, sites), side = asked(name), examples(name, 1)["pixel_values"].shape[-1]
    live = rt.adapt(backbone, small("bypass"), 10, anatomy=sites)
    task, how = load_task("digits", train_size=12, test_size=4), Preprocess((side, side), (0.5,) * 3, (0.5,) * 3)
    build_bank(live, task, how, tmp_path)
    features = Bank(tmp_path).rows("train").fetch([0, 7])[0].map(torch.Tensor.float)
    pixels = torch.stack([how(task.train.item(i)) for i in (0, 7)])
    grads = []
    for logits in (live.from_features(features), live(pixel_values=pixels)):
        grads.append(torch.autograd.grad(logits.square().sum(), [*live.adapters.parameters()]))
    assert any(g.abs().sum() > 0 for g in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for name in (*ASKED, *ROWS) for m in ("bypass", "res-tuning") if name in ASKED or m != "bypass"],
)
def test_a_found_family_is_trained_kept_mixed_and_compiled(name: str, method: str) -> None:
    """A step that lowers the loss, features that are kept and read again, two adapters in one batch, one graph."""
    (backbone, sites), inputs, labels = asked(name), examples(name, 4), torch.tensor([0, 1, 2, 1])
    tuned = rt.adapt(backbone, small(method, sites.anatomy.family), 3, "first", anatomy=sites)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(3):
        loss = tuned(**inputs, labels=labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        out = tuned(**inputs)
        assert torch.equal(tuned.from_features(tuned.features(**inputs)), out)
        tuned.add_adapter("second", small(method, sites.anatomy.family), 3)
        nn.init.normal_(tuned.adapters["second"].head.weight)
        other = tuned(**inputs)
        mixed = tuned(**inputs, adapter_names=["first", "second", None, "first"])
        torch.testing.assert_close(mixed[[0, 3], :3], out[[0, 3]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[[1], :3], other[[1]], rtol=1e-4, atol=1e-5)
        tuned.set_adapter("first")
        if COMPILES:
            torch._dynamo.reset()  # of one function torch keeps so many graphs, whatever the model
            tuned.compile(backend="aot_eager" if name in WHOLE else "eager", fullgraph=name in WHOLE)
            torch.testing.assert_close(tuned(**inputs), out, rtol=1e-4, atol=1e-5)


class Operations(TorchDispatchMode):
    """How often each operation of torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["linear", "bypass", "res-tuning", "lora"])
@pytest.mark.parametrize("name", ["timm-vit", "bert", "timm-swin", "timm-convnext"])
def test_a_found_anatomy_keeps_as_much_for_backward_as_a_written_one(name: str, method: str) -> None:
    tiny = WRITTEN[name]
    inputs = tiny.inputs(batch=3)
    given = {"input_ids": torch.randint(3, 50, (3, 12))} if "input_ids" in inputs else inputs
    kept, operations = [], []
    for found in (False, True):
        backbone = tiny.backbone()
        sites = find(backbone, given) if found else find_sites(backbone)
        spec = small(method, sites.anatomy.family)
        tuned = rt.adapt(backbone, spec, 3, anatomy=sites).train()
        kept.append(saved_bytes(lambda: tuned(**given), tuned.parameters()))  # noqa: B023
        with Operations() as step:
            tuned(**given).sum().backward()
        operations.append(step.counts)
    assert kept[0] == kept[1]
    assert operations[0] == operations[1]  # the same kernels, as often each


def test_what_is_only_described_is_found_as_what_is_there() -> None:
    """A bank and `restuning sites` describe a backbone, on the meta device."""
    for name in ("gpt2", "segformer", "albert"):
        with torch.device("meta"):
            described = FOUND[name]()
        assert find_sites(described) == find_sites(made(name))


class Rewritten(nn.Module):
    """Its last block's output is written to once more, as NASNet's is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)) for _ in range(3)
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x) if self.training else layer(x)
        return self.act(x).mean((2, 3))


def test_features_that_a_backbone_writes_to_in_place_are_those_before() -> None:
    torch.manual_seed(0)
    model, x = Rewritten().eval(), torch.randn(3, 3, 8, 8)
    sites = find_sites(model, inputs={"x": x})
    assert sites.rewritten and sites.norm + sites.post == ("act",)
    tuned = rt.adapt(model, "linear", anatomy=sites)
    with torch.no_grad():
        last = tuned.features(x).last
        torch.testing.assert_close(tuned(x), model(x))
    assert (last < 0).any()


def test_a_pooling_that_stands_in_for_the_models_own_is_told(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    albert = made("albert")
    with pytest.warns(Note, match="AlbertModel: the backbone's own pooler is left out: its first token is used"):
        find_sites(albert)
    albert.save_pretrained(tmp_path)  # type: ignore[operator]
    assert main(["sites", "--backbone", f"hf:{tmp_path}"]) == 0
    assert "own pooler is left out" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        assert find(TINY["timm-vit"].backbone(), {"x": torch.randn(3, 3, 16, 16)}).found.instead == ""  # type: ignore[union-attr]
