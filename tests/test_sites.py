"""Finding operations, and saying what was looked for where there are none."""

import pytest
import timm
import torch
import transformers as hf
from tiny import HF, HIERARCHIES, TEXT, TINY, Tiny
from torch import nn

import restuning as rt
from restuning.errors import SiteError
from restuning.wiring.sites import AFFINE, PARTS


@pytest.mark.parametrize("tiny", [TINY[name] for name in TINY.keys() - HIERARCHIES], ids=TINY.keys() - HIERARCHIES)
def test_every_block_has_its_operations(tiny: Tiny) -> None:
    backbone = tiny.backbone()
    sites = rt.find_sites(backbone, tiny.anatomy)
    depth = len(sites.blocks)
    assert depth in (2, 3) and len({s.name for s in sites}) == len(sites)
    for op in ("mha", "ffn", "block") if tiny.anatomy else ("mha", "ffn", "block", "attention", *PARTS[:6]):
        found = sites.at(op)
        assert sorted({s.block for s in found}) == [s.port.block for s in found[:: len(found) // depth]]
        assert all(s.port.depth == depth and s.port.heads == (1 if tiny.anatomy else 4) for s in found)
    if not tiny.anatomy:  # every affine map and norm of the body, once
        affine = {s.writes.path for s in sites.at("affine")}
        kinds = (nn.Linear, nn.LayerNorm, nn.Conv2d)
        there = {name for name, m in backbone.named_modules() if isinstance(m, kinds)}
        beyond = {name.split("vision_model.")[-1] for name in there - affine}
        assert beyond <= {"pooler.dense", "pre_layrnorm"} and affine <= there
        for site in sites.at("affine"):
            weight = backbone.get_submodule(site.writes.path).weight
            assert site.port.writes == len(weight) and site.op in AFFINE


def test_widths_are_the_modules_own() -> None:
    sites = rt.find_sites(TINY["timm-vit"].backbone())
    widths = {s.op: (s.port.reads, s.port.writes) for s in sites if s.block in (0, None)}
    assert widths["qkv"] == (32, 96) and widths["fc1"] == (32, 128) and widths["fc2"] == (128, 32)
    assert widths["mha"] == widths["norm"] == widths["embed"] == (32, 32)


@pytest.mark.parametrize(
    ("name", "pool", "prefix"),
    [
        ("timm-vit", "cls", 1),
        ("timm-vit-mean", "mean", 0),
        ("timm-deit", "cls", 2),
        ("timm-dinov2-registers", "cls", 3),
        ("hf-dinov2-registers", "cls", 3),
        ("bert", "cls", 0),
    ],
)
def test_pooling_is_the_backbones_own(name: str, pool: str, prefix: int) -> None:
    sites = rt.find_sites(TINY[name].backbone())
    assert (sites.pool, sites.prefix) == (pool, prefix)


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean", "timm-eva02", "timm-dinov2-registers"])
def test_the_tail_is_timms(name: str) -> None:
    tiny = TINY[name]
    tuned, inputs = rt.adapt(tiny.backbone(), "linear"), tiny.inputs()
    with torch.no_grad():
        torch.testing.assert_close(tuned(**inputs), tuned.backbone(**inputs))


def test_the_tail_is_transformers() -> None:
    for name in ("hf-dinov2", "hf-clip"):
        tiny = TINY[name]
        tuned, inputs = rt.adapt(tiny.backbone(), "linear"), tiny.inputs()
        with torch.no_grad():
            torch.testing.assert_close(tuned(**inputs), tuned.backbone(**inputs).pooler_output)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "deit3_small_patch16_224", "eva02_tiny_patch14_224"])
def test_timms_own_models(name: str) -> None:
    if not timm.is_model(name):
        name = "vit_small_patch14_reg4_dinov2"
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert len(rt.find_sites(model).at("mha")) == 12


@pytest.mark.parametrize(
    "build",
    [
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**HF)),
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
    ],
)
def test_inside_a_larger_model(build) -> None:
    assert len(rt.find_sites(build()).at("ffn")) == 2


def test_an_unknown_backbone_is_told_what_was_looked_for_and_what_it_has() -> None:
    with pytest.raises(SiteError) as caught:
        rt.find_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    text = str(caught.value)
    assert "Sequential" in text and "timm ViT" in text and "the model has *" in text and "restuning.Anatomy" in text
    assert "\n" not in text


def test_of_two_towers_the_one_that_fits() -> None:
    text = {k: v for k, v in TEXT.items() if k not in ("image_size", "patch_size")} | {"eos_token_id": 2}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=HF, projection_dim=8))
    assert {s.writes.path.split(".")[0] for s in rt.find_sites(clip)} == {"vision_model"}
    twice = nn.ModuleDict({"left": TINY["timm-vit"].backbone(), "right": TINY["timm-vit"].backbone()})
    with pytest.raises(SiteError, match=r"fits in 2 places \(left, right\)"):
        rt.find_sites(twice)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            rt.Residual({"atention": rt.Adapter()}),
            "no operation 'atention' here: timm ViT.* has embed, mha, ffn, block",
        ),
        (rt.Residual({"mha": rt.Adapter()}, blocks=[0, 2]), r"no block \[2\]: this backbone has blocks 0 to 1"),
        (rt.Residual({"mha": rt.Adapter()}, blocks=[]), "empty list"),
        (rt.Bypass(rt.Adapter(), blocks=[-1]), r"no block \[-1\]"),
    ],
)
def test_what_is_not_there(method, words: str) -> None:
    with pytest.raises(SiteError, match=words):
        rt.adapt(TINY["timm-vit"].backbone(), method, 3)
