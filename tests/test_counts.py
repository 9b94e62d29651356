"""Golden numbers: the paper's counts on ViT-B/16 with 100 classes, to the parameter, and arithmetic for the rest."""

import json
from pathlib import Path

import pytest

import restuning as rt
from restuning.backbones.load import describe_backbone
from restuning.cli.main import main
from restuning.paper.counts import PRINTED

PAPER = Path(__file__).parents[2] / "shared" / "design" / "paper_tables.json"

HEAD, BODY = 76_900, 85_798_656


@pytest.fixture(scope="module")
def vit():
    return describe_backbone("vit_base_patch16_224")


def trained(vit, method) -> int:
    tuned = rt.adapt(vit, method, 100)
    counts = rt.count(tuned)
    tuned.unload()
    assert counts["trainable"] == counts["tuners"] + counts["head"] and counts["head"] == HEAD
    whole = BODY + HEAD + (0 if method == "full" else counts["tuners"])
    assert counts["total"] == whole
    return counts["trainable"]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", 85_875_556),
        ("linear", 76_900),
        ("res-tuning-single", 169_060),
        ("res-tuning", 482_644),
        ("res-tuning-tri", 676_300),
        ("bypass-none", 76_912),
        ("bypass-horizontal", 270_568),
        ("bypass-vertical", 270_568),
        ("bypass", 464_224),
    ],
)
def test_table_3(vit, method: str, expected: int) -> None:
    assert trained(vit, method) == expected


@pytest.mark.parametrize(
    ("width", "expected", "printed"),
    [(5, 298_204, 0.30), (10, 482_644, 0.48), (20, 851_524, 0.85), (50, 1_958_164, 1.96), (100, 3_802_564, 3.80)],
)
def test_table_13_dual(vit, width: int, expected: int, printed: float) -> None:
    found = trained(vit, rt.resize(rt.METHODS["res-tuning"], width))
    assert found == expected == 24 * (1537 * width + 768 + 768) + HEAD
    assert round(found / 1e6, 2) == printed


@pytest.mark.parametrize(("width", "printed"), [(5, 0.37), (10, 0.46), (20, 0.64), (50, 1.19), (100, 2.11)])
def test_table_13_bypass_fits_when_one_side_stays_at_10(vit, width: int, printed: float) -> None:
    found = trained(vit, rt.Bypass(rt.Adapter(width), rt.Adapter(10)))
    assert abs(found / 1e6 - printed) < 0.0145


@pytest.mark.parametrize(
    ("k", "dual", "bypass"),
    [(1, 0.111, 0.109), (3, 0.178, 0.174), (6, 0.280, 0.271), (9, 0.381, 0.367), (12, 0.483, 0.464)],
)
def test_table_14(vit, k: int, dual: float, bypass: float) -> None:
    assert round(trained(vit, rt.on_blocks(rt.METHODS["res-tuning"], range(k))) / 1e6, 3) == dual
    assert round(trained(vit, rt.on_blocks(rt.METHODS["bypass"], range(k))) / 1e6, 3) == bypass


@pytest.mark.parametrize("op", ["mha", "ffn", "block"])
def test_tuners_alone(vit, op: str) -> None:
    per_block = {
        rt.Adapter(10): 16_138,
        rt.Adapter(10, scale="channel"): 16_906,
        rt.Prefix(10): 15_360,
        rt.Prompt(10): 7_680,
    }
    for config, expected in per_block.items():
        assert trained(vit, rt.Residual({op: config})) == 12 * expected + HEAD


GOLDEN = {
    "full": 85_875_556,
    "linear": 76_900,
    "adapter": 1_856_740,
    "lora": 371_812,
    "prefix": 261_220,
    "vpt-shallow": 76_900 + 768 * 90,
    "vpt-deep": 76_900 + 768 * 12 * 61,
    "convpass": 404_452,
    "ssf": 282_724,
    "bitfit": 179_812,
    "adaptformer": 1_266_532,
    "mam-adapter": 10_082_404,
    "side-tuning": 9_624_485,
    "lst": 932_272,
    "dtl": 76_900 + 12 * 4 * 768,
    "res-tuning-single": 169_060,
    "res-tuning": 482_644,
    "res-tuning-tri": 676_300,
    "bypass-none": 76_912,
    "bypass-horizontal": 270_568,
    "bypass-vertical": 270_568,
    "bypass": 464_224,
    "last": 76_900 + 13 * (4 * 768 * 16 + 2 * 768),
    "mist": 76_900 + 4 * (4 * 768 * 16 + 2 * 768),
    "losa": 76_900 + 13 * (2 * 768 * 16 + 16 + 768 + 2 * 768 * 8 + 3 * 768),
    "unipt": 76_900 + 14 * (768 * 32 + 32) + 32 * 768 + 768 + 32,
    "sherl": 76_900 + 14 * (768 * 32 + 32) + 32 * 768 + 768 + 2 * 32 + 1,
    "vqt": 12 * 768 + 100 * (13 * 768 + 1),
}


def test_params_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--backbone", "vit_base_patch16_224", "--classes", "100", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert {name: counts[name]["trainable"] for name in GOLDEN} == GOLDEN
    assert set(counts) == set(rt.METHODS)
    assert counts["noah"]["tuners"] <= 360_000
    tokens = {"bypass-mean": 2, "bypass-grid2": 5, "bypass-grid4": 17, "ladder-grid4": 17, "linear-all-gated": 2}
    reads = {name: 768 * n for name, n in tokens.items()}  # what the head reads, if not one token
    every = 2 * 13 * 768
    reads |= {"linear-all": every, "bypass-query": every + 8 * 64, "bypass-attention": every + 2 * 64, "vqt": 13 * 768}
    reads |= {"bypass-query-shared": every + 4 * 48}
    for name, c in counts.items():
        assert c["trainable"] == c["tuners"] + c["head"]
        assert c["head"] == 100 * (reads.get(name, 768) + 1)
    for name, c in counts.items():
        if name != "full":
            assert c["total"] == 85_798_656 + c["trainable"]


def test_paths_of_attention(vit) -> None:
    """By arithmetic: projections of 13 layers, queries, and of 4 stages the attention and its norms."""
    attention = 4 * (64 * 64 + 64)
    query = {"tuners": 8 * 64 + 4 * (attention + 4 * 64) + 2 * 64, "head": 100 * (2 * 13 * 768 + 8 * 64 + 1)}
    alone = {"tuners": 4 * (attention + 2 * 64) + 2 * 64, "head": 100 * (2 * 13 * 768 + 2 * 64 + 1)}
    for part, expected in ((rt.BypassQuery, query), (rt.BypassAttention, alone)):
        for components, rows in ((None, 768), (64, 64)):
            counts = rt.count(rt.adapt(vit, part(components=components), 100))
            assert counts["tuners"] == expected["tuners"] + 13 * rows * 64 and counts["head"] == expected["head"]
        gated = rt.count(rt.adapt(vit, part(readout="gated"), 100))
        assert gated["tuners"] == expected["tuners"] + 13 * 768 * 64 + 2 * 13 * 768
        assert gated["head"] == expected["head"] - 100 * 2 * 12 * 768


def test_clip_vit_l_14(tmp_path: Path) -> None:
    """By arithmetic, at width 1024 and 24 blocks; the body is OpenAI's vision tower without its projection."""
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = {"model_type": "clip", "vision_config": {**vision, "image_size": 224, "patch_size": 14}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    clip = describe_backbone(f"hf:{tmp_path}#vision_model")
    assert len(rt.find_sites(clip).blocks) == 24 and rt.find_sites(clip).info.out_features == 1024
    d, depth, head, r = 1024, 24, 1025 * 100, 10
    body = 2 * 2 * d + 3 * 14 * 14 * d + d + 257 * d + depth * (4 * d + 4 * (d * d + d) + 2 * 4 * d * d + 5 * d)
    adapter = (2 * d + 1) * r + d
    expected = {
        "linear": 0,
        "res-tuning": depth * 2 * (adapter + d),
        "res-tuning-tri": depth * (3 * adapter + 2 * d),
        "bypass-none": depth,
        "bypass": depth * (1 + 2 * adapter),
        "prefix": depth * 2 * 10 * d,
    }
    three_maps_or_one = {clip: 3 * (d + d), describe_backbone("vit_large_patch14_clip_224"): d + 3 * d}
    for model, widths in three_maps_or_one.items():
        for method, tuners in {**expected, "lora": depth * 8 * widths}.items():
            counts = rt.count(rt.adapt(model, method, 100))
            assert counts["tuners"] == tuners and counts["head"] == head
            assert counts["total"] == body + tuners + head


def test_beside_the_papers_own_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Every printed figure agrees, or says why not; and the figures are those of the paper."""
    assert main(["params", "--paper", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["table"] for row in rows} >= {"3a", "3b", "3c", "4", "6", "12", "13", "14", "15", "16", "17"}
    for row in rows:
        assert row["why"] or (row["parameters"] and row["difference"] is None), row
    assert sum(row["parameters"] is not None and row["difference"] is None for row in rows) >= 55
    assert main(["params", "--paper"]) == 0
    assert "the paper cuts digits here" in capsys.readouterr().out


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's tables are not beside this checkout")
def test_the_printed_figures_are_the_papers() -> None:
    tables = json.loads(PAPER.read_text())
    for p in PRINTED:
        name = p.row.removesuffix(", at inference, head not counted")
        if p.table in ("3a", "3b", "3c", "4", "12", "6", "17"):
            columns = tables[p.table]["columns"]
            column = "test_parameters_M" if p.table == "17" else "parameters_M"
            printed = tables[p.table]["rows"][name][columns.index(column)]
        else:
            kind, _, key = name.partition(", " if p.table in ("13", "14", "16") else " without ")
            rows = {k.replace(" ,", ",").replace(",11", ", 11"): v for k, v in tables[p.table]["rows"].items()}
            if p.table == "16":
                printed = rows[key][{"ConvNeXt": 1, "ResNet-101": 4}[kind]]
            else:
                printed = rows[key][{"Res-Tuning": 1, "Bypass": 4}[kind]]
        assert printed == p.millions, p


@pytest.mark.parametrize(
    ("name", "method", "tuners", "head", "printed"),
    [
        ("convnext_base", "full", 87_566_464, 102_500, 87.67),
        ("convnext_base", "linear", 0, 102_500, None),
        ("convnext_base", "res-tuning", 758_736, 102_500, None),
        ("convnext_base", "bypass", 763_455, 102_500, None),
        ("convnext_base", _wide := rt.Bypass(*[rt.Adapter(46, scale="channel")] * 2), 1_025_303, 102_500, 1.13),
        ("resnet101", "res-tuning", 715_594, 204_900, 0.92),
        ("resnet101", "bypass", 2_903_103, 204_900, None),
        ("resnet101", _wide, 3_426_583, 204_900, 3.63),
    ],
)
def test_table_16(name: str, method, tuners: int, head: int, printed: float | None) -> None:
    counts = rt.count(rt.adapt(describe_backbone(name), method, 100))
    assert (counts["tuners"], counts["head"]) == (tuners, head)
    assert printed is None or round((tuners + head) / 1e6, 2) == printed


@pytest.mark.parametrize(("name", "expected"), [("convnext_base", 688_128), ("resnet101", 2_752_512)])
def test_the_transitions_of_a_bypass_over_stages(name: str, expected: int) -> None:
    assert rt.count(rt.adapt(describe_backbone(name), "bypass-none", 100))["tuners"] == expected + 3
