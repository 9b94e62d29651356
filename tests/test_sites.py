"""Finding operations, and saying what was looked for where there are none."""

import re

import pytest
import timm
import torch
import transformers as hf
from timm.models.vision_transformer import VisionTransformer
from tiny import HF, HIERARCHIES, MORE, TEXT, TINY, VIT, Tiny
from torch import nn

import restuning as rt
from restuning.backbones.anatomy import AFFINE, PARTS
from restuning.errors import SiteError, TowersError

EVERY = TINY | MORE

PLAIN = {name: tiny for name, tiny in EVERY.items() if name not in HIERARCHIES}


@pytest.mark.parametrize("tiny", PLAIN.values(), ids=PLAIN)
def test_every_block_has_its_operations(tiny: Tiny) -> None:
    backbone = tiny.backbone()
    sites = rt.find_sites(backbone, tiny.anatomy)
    depth = len(sites.blocks)
    assert depth in (2, 3) and len({s.name for s in sites}) == len(sites)
    for op in ("mha", "ffn", "block") if tiny.anatomy else ("mha", "ffn", "block", "attention", *PARTS[:6]):
        found, keys = sites.at(op), sites.anatomy.keys is not None and op == "attention"
        heads = 1 if tiny.anatomy else 2 if keys else 4
        assert sorted({s.block for s in found}) == [s.info.block for s in found[:: len(found) // depth]]
        assert all(s.info.depth == depth and s.info.heads == heads for s in found)
    if not tiny.anatomy:  # every affine map and norm of the body, once
        affine = {s.writes.path for s in sites.at("affine")}
        kinds = ("Linear", "LayerNorm", "Conv2d", "RMSNorm")
        there = {name for name, m in backbone.named_modules() if type(m).__name__.endswith(kinds)}
        there |= {name for name, p in backbone.named_parameters() if name.endswith("in_proj_weight")}
        beyond = {name.split("vision_model.")[-1] for name in there - affine}
        known = re.compile(
            r"pooler\.dense|pre_layrnorm|ln_pre|heads?\..*|attn_pool\..*|.*self_attn\.[qk]_norm|.*\.post_\w+norm"
        )
        assert all(map(known.fullmatch, beyond)) and affine <= there, beyond | (affine - there)
        for site in sites.at("affine"):
            weight = site.affine(backbone).weight
            assert site.info.out_features == len(weight) and site.op in AFFINE


def test_widths_are_the_modules_own() -> None:
    sites = rt.find_sites(TINY["timm-vit"].backbone())
    widths = {s.op: (s.info.in_features, s.info.out_features) for s in sites if s.block in (0, None)}
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
        ("timm-siglip", "map", 0),
        ("hf-siglip", "map", 0),
        ("open-clip", "cls", 1),
        ("torchvision", "cls", 1),
        ("hf-dinov3", "cls", 3),
        ("llama", "last", 0),
    ],
)
def test_pooling_is_the_backbones_own(name: str, pool: str, prefix: int) -> None:
    sites = rt.find_sites(EVERY[name].backbone())
    assert (sites.pool, sites.prefix) == (pool, prefix)


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean", "timm-eva02", "timm-dinov2-registers", "timm-siglip"])
def test_the_tail_is_timms(name: str) -> None:
    tiny = EVERY[name]
    tuned, inputs = rt.adapt(tiny.backbone(), "linear"), tiny.inputs()
    with torch.no_grad():
        torch.testing.assert_close(tuned(**inputs), tuned.backbone(**inputs))


def test_the_tail_is_transformers() -> None:
    for name in ("hf-dinov2", "hf-dinov3", "hf-clip", "hf-siglip"):
        tiny = EVERY[name]
        tuned, inputs = rt.adapt(tiny.backbone(), "linear"), tiny.inputs()
        with torch.no_grad():
            torch.testing.assert_close(tuned(**inputs), tuned.backbone(**inputs).pooler_output)


def test_the_tail_is_the_models_own() -> None:
    for name, said in (("open-clip", lambda m, y: y @ m.proj), ("torchvision", lambda m, y: m.heads(y))):
        tiny = EVERY[name]
        tuned, inputs = rt.adapt(tiny.backbone(), "linear"), tiny.inputs()
        with torch.no_grad():
            torch.testing.assert_close(said(tuned.backbone, tuned(**inputs)), tuned.backbone(**inputs))


def test_a_siglip_without_its_head_pools_by_the_mean() -> None:
    backbone = hf.SiglipVisionModel(hf.SiglipVisionConfig(**HF, vision_use_head=False)).eval()
    tuned, inputs = rt.adapt(backbone, "linear"), TINY["hf-siglip"].inputs()
    with torch.no_grad():
        torch.testing.assert_close(tuned(**inputs), backbone(**inputs).last_hidden_state.mean(1))
    with pytest.raises(SiteError, match="unknown pooling 'map of the patches alone'"):
        rt.adapt(VisionTransformer(**VIT, global_pool="map"), "linear")


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_dinov3", "deit3_small_patch16_224", "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"],
)
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
        rt.find_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), TINY["own"].anatomy)
    text = str(caught.value)
    assert "keywords does not fit Sequential" in text and "layers.*.(" in text and "the model has *" in text
    assert "\n" not in text


def test_of_two_towers_one_must_be_passed() -> None:
    text = {k: v for k, v in TEXT.items() if k not in ("image_size", "patch_size")} | {"eos_token_id": 2}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=HF, projection_dim=8))
    with pytest.raises(TowersError, match="CLIPModel has 2 towers"):
        rt.find_sites(clip)
    assert rt.find_sites(clip.vision_model).anatomy.name == "transformers CLIP vision"
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
