"""Backbones of several stages: maps and tokens, widths and grids that change, convolutions as operations."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import COMPILES, adapt, as_features, plain_features, shake
from tiny import HIERARCHIES, REFUSED, TINY, small
from torch import Tensor, nn
from torch.nn import functional as F

import restuning as rt
from restuning.backbones.load import STAGES, describe_backbone
from restuning.bench.peers import subject
from restuning.data import Preprocess, load_task
from restuning.errors import CheckpointError, MethodError, RestuningError, SiteError
from restuning.features.bank import Bank, FromFeatures, build
from restuning.methods.named import FAMILIES, find_method
from restuning.side.features import ALL, MEAN
from restuning.tuners.lora import ConvLoraTuner
from restuning.utils.profiling import saved_bytes

REAL = Path(__file__).parents[2] / "shared" / "data" / "resnet18_in1k_stage123" / "model.safetensors"
each = pytest.mark.parametrize("name", HIERARCHIES)


def family(name: str) -> str:
    return rt.find_sites(HIERARCHIES[name].backbone()).anatomy.family


@each
def test_every_convolution_and_norm_of_a_block_is_a_site(name: str) -> None:
    backbone = HIERARCHIES[name].backbone()
    sites = rt.find_sites(backbone)
    assert len({s.name for s in sites}) == len(sites) and sites.stages[-1] == len(sites.blocks) and not sites.uniform
    paths = [s.reads.path for s in sites.at("affine") if s.block is not None]
    kinds = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d)
    inside = [
        f"{block}.{path}"
        for block in sites.blocks
        for path, m in backbone.get_submodule(block).named_modules()
        if isinstance(m, kinds) and "cpb_mlp" not in path
    ]
    assert sorted(paths) == sorted(inside)
    for site in sites.at("affine"):
        m: Any = backbone.get_submodule(site.reads.path)
        assert site.info.out_features == len(m.weight)
        if isinstance(m, nn.Conv2d) and site.block is not None:
            assert site.info.in_features == m.in_channels and site.info.kernel.groups == m.groups


@each
def test_the_tail_is_the_backbones_own(name: str) -> None:
    tiny = HIERARCHIES[name]
    tuned, inputs = adapt(tiny, "linear", None, torch.float64), tiny.inputs(dtype=torch.float64)
    with torch.no_grad():
        own = tuned.backbone(**inputs)
        torch.testing.assert_close(tuned(**inputs), own if isinstance(own, Tensor) else own.pooler_output.flatten(1))


def test_torchvisions_and_what_is_inside_a_classifier() -> None:
    model = torchvision.models.resnet18().eval()
    tuned, x = rt.adapt(model, "linear"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.fc(tuned(x)), model(x))
    assert rt.find_sites(model).anatomy.name == "torchvision ResNet"
    assert len(rt.find_sites(timm.create_model("resnet18", num_classes=7)).stages) == 4


@each
@pytest.mark.parametrize("pool", ["cls", "cls+mean"])
def test_there_is_no_cls_token(name: str, pool: str) -> None:
    with pytest.raises(SiteError, match=f"pooling '{pool.replace('+', '.')}': .* has no CLS token here; use mean"):
        adapt(HIERARCHIES[name], "linear", pool=pool)


# ---- the law, written out


def says(tuner: Any, x: Tensor, y: Tensor) -> Tensor:
    """What a tuner adds to a map (b, d, h, w); a finer map that it reads is averaged over the cells of y."""
    x = F.adaptive_avg_pool2d(x, y.shape[2:])
    rows = [t.flatten(2).transpose(1, 2) for t in (x, y)]
    added = tuner(*rows) if tuner.input != "output" else tuner(rows[1], rows[1])
    return added.transpose(1, 2).reshape(y.shape)


def by_hand_convnext(block: Any, x: Tensor, t: dict[str, nn.Module]) -> Tensor:
    y = block.conv_dw(x)
    y = y + says(t["conv"], x, y)
    n = block.norm(y.permute(0, 2, 3, 1))
    z = (block.mlp(n) * block.gamma).permute(0, 3, 1, 2)
    out = x + z + says(t["ffn"], n.permute(0, 3, 1, 2), z)
    return out + says(t["block"], x, out)


def by_hand_resnet(block: Any, x: Tensor, t: dict[str, nn.Module]) -> Tensor:
    y = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))) + (block.downsample or nn.Identity())(x))
    return y + says(t["block"], x, y)


def by_hand_swin(block: Any, x: Tensor, t: dict[str, nn.Module]) -> Tensor:
    def first(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def last(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    y = block._attn(block.norm1(x))
    m = x + y + last(says(t["mha"], first(block.norm1(x)), first(y)))
    z = block.mlp(block.norm2(m))
    out = m + z + last(says(t["ffn"], first(block.norm2(m)), first(z)))
    return out + last(says(t["block"], first(x), first(out)))


class Sum(nn.Module):
    """Reads both sides."""

    def __init__(self, info: rt.SiteInfo) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(info.in_features, info.out_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ self.w + y.cos()


@pytest.mark.parametrize("config", [rt.Adapter(4), rt.Adapter(4, source="out"), rt.Prefix(3), Sum])
@pytest.mark.parametrize(
    ("name", "block", "ops"),
    [
        ("timm-convnext", by_hand_convnext, ("conv", "ffn", "block")),
        ("timm-resnet", by_hand_resnet, ("block",)),
        ("timm-swin", by_hand_swin, ("mha", "ffn", "block")),
    ],
)
def test_the_law_written_out(name: str, block: Any, ops: tuple[str, ...], config: Any) -> None:
    tiny = HIERARCHIES[name]
    tuned = shake(adapt(tiny, rt.Residual(dict.fromkeys(ops, config)), None, torch.float64, pool="none"))
    x, tuners = tiny.inputs(dtype=torch.float64)["x"], tuned.adapters["default"].tuners
    body: Any = tuned.backbone
    stages = {"timm-convnext": "stages", "timm-swin": "layers"}
    if name == "timm-resnet":
        y, lists = body.maxpool(body.act1(body.bn1(body.conv1(x)))), [getattr(body, f"layer{i}") for i in range(1, 5)]
    else:
        y = body.stem(x) if name == "timm-convnext" else body.patch_embed(x)
        lists = list(getattr(body, stages[name]))
    i = 0
    with torch.no_grad():
        for stage in lists:
            if name != "timm-resnet":
                y, stage = stage.downsample(y), stage.blocks
            for one in stage:
                y = block(one, y, {op: tuners[f"{i}_{op}"] for op in ops})
                i += 1
        y = y if name == "timm-swin" else y.permute(0, 2, 3, 1)
        torch.testing.assert_close(tuned.features(x).tensors()[0], y.flatten(1, 2), rtol=1e-11, atol=1e-11)


# ---- what merges


@each
@pytest.mark.parametrize("method", ["lora", "ssf", "bitfit"])
def test_a_merged_backbone_says_what_was_tuned(name: str, method: str) -> None:
    if method in REFUSED[name]:
        return
    tiny = HIERARCHIES[name]
    tuned = shake(adapt(tiny, small(method, family(name)), None, torch.float64)).eval()
    inputs = tiny.inputs(dtype=torch.float64)
    with torch.no_grad():
        expected = tuned(**inputs)
        if name == "timm-swin-v2" and method != "lora":  # its bias is put together on the spot
            with pytest.raises(RestuningError, match="no bias is there to take what 0_qkv adds"):
                tuned.merge_and_unload()
            return
        own = tuned.merge_and_unload()(**inputs)
    torch.testing.assert_close(own if isinstance(own, Tensor) else own.pooler_output.flatten(1), expected)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("rank", [1, 4, 8, 500])
def test_lora_of_a_convolution_is_a_change_of_its_weight(groups: int, rank: int) -> None:
    conv = nn.Conv2d(8, 16, (3, 5), (2, 1), (1, 2), (1, 2), groups=groups).double()
    kernel = rt.Kernel(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    tuner = rt.Lora(rank, alpha=3.0 * rank, dropout=0.0)(rt.SiteInfo(8, 16, kernel=kernel)).double()
    assert isinstance(tuner, ConvLoraTuner)
    assert sum(p.numel() for p in tuner.parameters()) <= max(conv.weight.numel(), 16 + 8 // groups * 15)
    assert len(tuner.a) == min(rank, max(1, 16 * 120 // groups // (16 + 120 // groups)))
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    assert not tuner(x, conv(x)).any(), "zero at initialisation"
    with torch.no_grad():
        tuner.b.normal_()
        weight, bias = tuner.merged(conv.weight, conv.bias)
        expected = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)
        torch.testing.assert_close(conv(x) + tuner(x, conv(x)), expected)


def test_convolutions_that_lora_cannot_follow() -> None:
    with pytest.raises(MethodError, match="LoRA beside a convolution needs one whose padding is fixed"):
        rt.adapt(describe_backbone("tf_efficientnet_b0"), "lora", 3)
    tuned = rt.adapt(timm.create_model("resnetv2_50x1_bit", num_classes=0), rt.Residual({"conv": rt.Lora(2)}, [0]), 3)
    with pytest.raises(MethodError, match="standardises its weight: nothing can be merged into it"):
        tuned.merge_and_unload()


def test_pefts_files_of_convolutions(tmp_path: Path) -> None:
    """Written here, read by PEFT (which knows no dilation), and read back; grouped ones have no file."""
    peft = pytest.importorskip("peft")
    tiny = HIERARCHIES["hf-resnet"]
    tuned = shake(adapt(tiny, rt.Residual({"conv": rt.Lora(2, dropout=0.0)}), None)).eval()
    inputs = tiny.inputs()
    rt.save_peft(tuned, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.backbone(), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).pooler_output.flatten(1), tuned(**inputs))
        again = rt.Tuned(tiny.backbone())
        rt.load_peft(again, tmp_path)
        torch.testing.assert_close(again.eval()(**inputs), tuned(**inputs))
    grouped = adapt(HIERARCHIES["timm-convnext"], rt.Residual({"conv": rt.Lora(2)}))
    with pytest.raises(MethodError, match=r"no LoRA of a grouped convolution such as stages.0.blocks.0.conv_dw"):
        rt.save_peft(grouped, tmp_path / "other")


# ---- recomputed, compiled

IN_TURN = [(n, m) for n in ("timm-convnext", "timm-resnet", "timm-swin") for m in ("res-tuning", "lora")]


@pytest.mark.parametrize(("name", "method"), IN_TURN)
def test_recomputed_blocks_and_one_graph(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    tiny = HIERARCHIES[name]
    tuned = shake(adapt(tiny, small(method, family(name)), dtype=torch.float64)).eval()
    inputs = tiny.inputs(dtype=torch.float64)

    def run() -> list[Tensor]:
        y = tuned(**inputs)
        return [y, *torch.autograd.grad(y.square().sum(), list(tuned.adapters.parameters()))]

    expected = run()
    tuned.gradient_checkpointing_enable()
    torch.testing.assert_close(run(), expected)
    tuned.gradient_checkpointing_disable()
    if COMPILES:
        tuned.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(run(), expected)


def test_a_backbone_without_checkpoints() -> None:
    with pytest.raises(MethodError, match=r"ResNetModel does not support (activation|gradient) checkpointing"):
        adapt(HIERARCHIES["hf-resnet"], "res-tuning").gradient_checkpointing_enable()


# ---- frozen statistics


@pytest.mark.parametrize("method", ["res-tuning", "bypass", "lora"])
def test_batch_statistics_never_drift(method: str) -> None:
    tiny = HIERARCHIES["timm-resnet"]
    tuned = adapt(tiny, small(method, "conv")).train()
    before = {k: v.clone() for k, v in tuned.backbone.state_dict().items()}
    for _ in range(3):
        tuned(**tiny.inputs()).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in tuned.backbone.state_dict().items())
    full = adapt(tiny, "full").train()
    full(**tiny.inputs())
    assert int(full.backbone.bn1.num_batches_tracked) == 1, "full fine-tuning follows its batches"


# ---- the bypass


def pooled(x: np.ndarray, tokens: int) -> np.ndarray:
    """Means over equal cells, from one square grid to a coarser one."""
    b, n, d = x.shape
    a, c = round(n**0.5), round(tokens**0.5)
    return x.reshape(b, c, a // c, c, a // c, d).mean((2, 4)).reshape(b, tokens, d)


@pytest.mark.parametrize("over", ["stages", "blocks"])
@pytest.mark.parametrize("name", ["timm-convnext", "timm-resnet", "timm-swin"])
def test_bypass_is_equation_8_with_transitions(name: str, over: Any) -> None:
    tiny = HIERARCHIES[name]
    tuned = shake(adapt(tiny, rt.Bypass(rt.Adapter(3), rt.Adapter(3), over=over), dtype=torch.float64))
    inputs = tiny.inputs(dtype=torch.float64)
    every = plain_features(tiny, tuned.backbone, inputs)
    sites, side = tuned.sites, tuned.adapters["default"].side
    path = sites.stages if over == "stages" else range(len(sites.blocks) + 1)
    assert list(tuned.request.layers) == list(path)
    features = [every[layer].numpy() for layer in path]
    assert all(torch.equal(a, every[layer]) for a, layer in zip(tuned.features(**inputs).tensors(), path, strict=True))

    def through(tuner: nn.Module, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return x + tuner(*[torch.from_numpy(x)] * 2).numpy()

    x = features[0]
    for step, (h, a) in enumerate(zip(features[1:], side.gate.tolist(), strict=True)):
        if x.shape[1] != h.shape[1]:
            x = pooled(x, h.shape[1])
        if x.shape[2] != h.shape[2]:
            x = x @ side.across[str(step)].weight.detach().numpy().T
        weight = 1 / (1 + np.exp(-a))
        x = weight * through(side.horizontal[str(step)], h) + (1 - weight) * through(side.vertical[str(step)], x)
    torch.testing.assert_close(
        side(as_features(dict(zip(path, map(torch.from_numpy, features), strict=True)))), torch.from_numpy(x)
    )
    tail, head = tuned.reader("default").tail, tuned.adapters["default"].head
    torch.testing.assert_close(tuned(**inputs), head(tail(torch.from_numpy(x))))


def test_a_transition_begins_at_zero() -> None:
    tuned = adapt(HIERARCHIES["timm-convnext"], "bypass")
    across = tuned.adapters["default"].side.across
    assert {k: tuple(m.weight.shape) for k, m in across.items()} == {"1": (12, 8), "2": (16, 12)}
    assert not any(m.weight.any() for m in across.values())


def test_paths_that_cannot_be() -> None:
    convnext = HIERARCHIES["timm-convnext"]
    with pytest.raises(SiteError, match=r"no step \[3\]: the path has steps 0 to 2"):
        adapt(convnext, rt.Bypass(rt.Adapter(2), blocks=(3,)))
    tuned = adapt(convnext, rt.Bypass(rt.Adapter(2), rt.Adapter(2), blocks=(2,)))
    assert list(tuned.adapters["default"].side.horizontal) == ["2"]
    with pytest.raises(MethodError, match=r"Bypass\(over='stages'\): timm ViT.* has one stage; leave it out"):
        rt.adapt(rt.load_backbone("restuning-micro"), rt.Bypass(over="stages"))
    with pytest.raises(MethodError, match=r"Bypass\(over='all'\): expected blocks, stages or None"):
        rt.Bypass(over="all")
    wide = {"x": torch.randn(2, 3, 32, 48)}
    with pytest.raises(MethodError, match="needs square maps"):
        adapt(convnext, "bypass")(**wide)
    assert adapt(convnext, "res-tuning")(**wide).shape == (2, 4), "tuners of the blocks need no square"
    assert adapt(convnext, "bypass-mean")(**wide).shape == (2, 4), "nor does a path of means"


# ---- the mean token


@each
def test_the_mean_token_is_exact_where_it_is_claimed(name: str) -> None:
    tiny = HIERARCHIES[name]
    for method in ("linear", "side-tuning", "res-tuning", "bypass", "bypass-none", "bypass-mean"):
        tuned = shake(adapt(tiny, small(method, family(name)), dtype=torch.float64))
        averaged = not tuned.sites.norm and "bypass" not in method
        assert (tuned.request.tokens == MEAN) == (averaged or method == "bypass-mean")
        inputs = tiny.inputs(dtype=torch.float64)
        out = tuned(**inputs)
        if averaged:
            assert tuned.features(**inputs).last.shape[1] == 1
            adapter = tuned.adapter("default")
            adapter.request = dataclasses.replace(adapter.request, tokens=ALL)
            torch.testing.assert_close(tuned(**inputs), out)


@pytest.mark.parametrize("name", ["timm-convnext", "timm-efficientnet", "timm-mobilenetv3", "hf-resnet"])
@pytest.mark.parametrize("tokens", [1, 2, None])
def test_a_bank_is_live(name: str, tokens: int | None, tmp_path: Path) -> None:
    """Whatever its tail is, with nothing of the backbone but that tail."""
    tiny = HIERARCHIES[name]
    task = load_task("digits", train_size=12, test_size=4)
    preprocess = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    live = adapt(tiny, rt.Bypass(grid=tokens), None)
    build(live, task, preprocess, tmp_path / "bank")
    bank = Bank(tmp_path / "bank")
    assert bank.layers == list(live.sites.stages)
    reads = {1: ["linear", "bypass-mean"], 2: ["bypass-grid2"], None: ["linear", "bypass", "bypass-grid4"]}[tokens]
    with torch.device("meta"):
        described = tiny.build()
    away = bank.tuned(described)
    pixels = torch.stack([preprocess(task.train.item(i)) for i in range(5)])
    for method in reads:
        if tokens == 1 and method == "linear" and live.sites.norm:
            with pytest.raises(CheckpointError, match="the method reads 'all'"):
                away.add_adapter(method, method, 3)
                bank.accepts(away)
            continue
        away.add_adapter(method, small(method), 3)
        shake(away)
        bank.accepts(away)
        live.add_adapter(method, small(method), 3)
        live.adapters[method].load_state_dict(away.adapters[method].state_dict())
        model = FromFeatures(away)
        features, _ = bank.rows("train").fetch(range(5))
        torch.testing.assert_close(model(features), live(*pixels[None]), rtol=1e-4, atol=1e-5)


# ---- methods by family


def test_names_mean_what_a_family_has() -> None:
    for name in ("timm-convnext", "timm-resnet", "timm-swin"):
        tuned = adapt(HIERARCHIES[name], "res-tuning")
        spec = find_method("res-tuning", tuned.family)
        assert tuned.adapter_config().method == "res-tuning" and tuned.adapters["default"].method == spec
        assert json.loads(json.dumps(tuned.adapter_config().spec)) == tuned.adapter_config().spec
    alone = {name for names in FAMILIES.values() for name in names} - rt.METHODS.keys()
    assert alone == {"prompt", "scedit"}  # the U-Net's
    assert find_method("res-tuning", "another") == rt.METHODS["res-tuning"]


# ---- memory


def test_what_a_step_keeps_for_backward() -> None:
    """Res-Tuning less than full fine-tuning, PEFT's LoRA on the convolutions more, a bypass a fraction."""
    pytest.importorskip("peft")
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    kept = {}
    for name in ("full", "linear", "bypass", "res-tuning", "lora", "peft-lora", "peft-lora-equal"):
        torch.manual_seed(0)
        model = subject(name, timm.create_model("resnet50", num_classes=0), 10)
        kept[name] = saved_bytes(lambda m=model: m(x, labels=labels)["loss"], model.parameters())
    assert kept["linear"] < kept["bypass"] < 0.2 * kept["full"]
    assert kept["res-tuning"] < 0.75 * kept["peft-lora-equal"] < kept["peft-lora-equal"] < kept["full"]
    assert kept["lora"] < 0.6 * kept["peft-lora"]


@pytest.mark.parametrize("name", ["timm-convnext", "timm-resnext", "timm-efficientnet", "timm-resnetv2"])
def test_frozen_convolutions_keep_nothing_and_say_the_same(name: str) -> None:
    tiny = HIERARCHIES[name]
    tuned = shake(adapt(tiny, small("res-tuning", family(name)), dtype=torch.float64)).train()
    inputs = tiny.inputs(dtype=torch.float64)

    def run() -> tuple[Tensor, list[Tensor], int]:
        y = tuned(**inputs)
        grads = torch.autograd.grad(y.square().sum(), list(tuned.adapters.parameters()))
        return y, list(grads), saved_bytes(lambda: tuned(**inputs), tuned.parameters())

    y, grads, less = run()
    tuned.memory = "plain"
    z, expected, more = run()
    assert torch.equal(y, z) and less < 0.95 * more
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)
    with torch.autocast("cpu", torch.bfloat16):
        half = adapt(tiny, small("res-tuning", family(name)))
        half(**tiny.inputs()).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())


# ---- backbones by name


def test_the_resnet_of_three_stages() -> None:
    with pytest.raises(CheckpointError, match="has no weights of its own: give a file with weights="):
        rt.load_backbone(STAGES)
    model = rt.load_backbone(STAGES, "random", image_size=160)
    assert rt.find_sites(model).stages == (2, 4, 6) and rt.find_sites(model).info.out_features == 256
    assert sum(p.numel() for p in model.parameters()) == 2_780_544


def by_hand_resnet18(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Three stages of a ResNet-18 with its batch norms folded into the convolutions."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        k = w[f"{name}.weight"].shape[-1]
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, k // 2)

    x = F.max_pool2d(F.relu(conv(x, "conv1", 2)), 3, 2, 1)
    for stage in (1, 2, 3):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = conv(F.relu(conv(x, f"{name}.conv1", stride)), f"{name}.conv2")
            x = F.relu(y + (conv(x, f"{name}.downsample.0", 2) if stride == 2 else x))
    return x.mean((2, 3))


def test_its_forward_written_out() -> None:
    model = rt.load_backbone(STAGES, REAL if REAL.exists() else "random")
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = by_hand_resnet18(model.state_dict(), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rt.adapt(model, "linear")(x), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_see_any_size() -> None:
    model = rt.load_backbone("resnet18", "random", image_size=100)
    assert rt.adapt(model, "bypass-mean", 3)(torch.randn(1, 3, 100, 100)).shape == (1, 3)
    with pytest.raises(RestuningError):
        rt.load_backbone("vit_tiny_patch16_224", "random", image_size=100)


def test_a_side_path_over_stages_wants_square_maps() -> None:
    backbone = HIERARCHIES["timm-resnet"].backbone()
    wide = torch.randn(1, 3, 64, 256, dtype=next(backbone.parameters()).dtype)
    assert rt.adapt(backbone, "linear", 3)(wide).shape == (1, 3)
    with pytest.raises(MethodError, match="square maps"):
        rt.adapt(backbone, "bypass", 3)(wide)
    for method in ("linear-all", "bypass-query", "bypass-attention"):  # of a grid of cells, which are as oblong
        assert rt.adapt(backbone, small(method), 3)(wide).shape == (1, 3)


@pytest.mark.parametrize("name", [*TINY])
def test_a_tuned_model_is_pickled(name: str) -> None:
    """As it goes to a spawned process; no file is ever read so."""
    tuned = rt.adapt(TINY[name].backbone(), "linear", 3, anatomy=TINY[name].anatomy).eval()
    again = pickle.loads(pickle.dumps(tuned))
    x = TINY[name].inputs()
    assert torch.equal(again(**x), tuned(**x))
