"""Side paths and carried states against their papers' formulas, written out in numpy; how they begin."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adapt, plain_features, shake
from tiny import TINY
from torch import Tensor, nn
from torch.nn import functional as F

import restuning as rt
from restuning.cli.main import main
from restuning.errors import MethodError
from restuning.methods.files import to_dict
from restuning.training.initialise import fisher, initialise, needs_data

VIT = TINY["timm-vit"]


def n(t: Tensor) -> np.ndarray:
    return t.detach().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def layer_norm(x: np.ndarray, m: Any) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + m.eps)
    return x * n(m.weight) + n(m.bias)


def linear(x: np.ndarray, m: Any) -> np.ndarray:
    return x @ n(m.weight).T + (0 if m.bias is None else n(m.bias))


def gelu(x: np.ndarray) -> np.ndarray:
    return n(F.gelu(torch.from_numpy(x)))


def side_block(x: np.ndarray, m: Any) -> np.ndarray:
    b, t, d = x.shape
    qkv = linear(layer_norm(x, m.norm1), m.qkv).reshape(b, t, 3, m.heads, d // m.heads)
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(d // m.heads))
    out = (scores / scores.sum(-1, keepdims=True)) @ v
    x = x + linear(out.transpose(0, 2, 1, 3).reshape(b, t, d), m.proj)
    return x + linear(gelu(linear(layer_norm(x, m.norm2), m.fc1)), m.fc2)


def test_the_ladder_is_lst() -> None:
    """side_l = block_l(μ_l side_{l−1} + (1 − μ_l) D_l x_l), μ_l = sigmoid(α_l / 0.1); outputs and gradients' norm."""
    tuned = shake(adapt(VIT, rt.Ladder(4), None, torch.float64, pool="none"))
    inputs = VIT.inputs(dtype=torch.float64)
    features = [n(f) for f in plain_features(VIT, tuned.backbone, inputs)]
    net = tuned.adapters["default"].side
    x = linear(features[0], net.down[0])
    for layer, block in enumerate(net.blocks):
        mu = sigmoid(net.gate[layer].item() / 0.1)
        x = side_block(mu * x + (1 - mu) * linear(features[layer + 1], net.down[layer + 1]), block)
    expected = layer_norm(linear(x, net.up), tuned.backbone.norm)
    np.testing.assert_allclose(n(tuned(**inputs)), expected, rtol=1e-10, atol=1e-10)


def test_ladders_are_pruned_from_the_backbone() -> None:
    """Every row of the side network is one of the backbone's own: the most important of the stream, of each head."""
    tuned = adapt(VIT, rt.Ladder(2), None)
    net, blocks = tuned.adapters["default"].side, tuned.backbone.blocks
    importance = sum(m.weight.detach().abs().sum(1) for b in blocks for m in (b.attn.proj, b.mlp.fc2))
    stream = importance.topk(16).indices.sort().values
    for ours, theirs in zip(net.blocks, blocks, strict=True):
        torch.testing.assert_close(ours.norm1.weight, theirs.norm1.weight[stream])
        torch.testing.assert_close(ours.proj.bias, theirs.attn.proj.bias[stream])
        rows = theirs.mlp.fc1.weight[:, stream]
        hidden = [int((rows == row).all(1).nonzero()) for row in ours.fc1.weight]
        score = theirs.mlp.fc1.weight.abs()[:, stream].sum(1) + theirs.mlp.fc2.weight.abs()[stream].sum(0)
        assert sorted(hidden) == hidden and set(hidden) == set(score.topk(64).indices.tolist())
        torch.testing.assert_close(ours.fc2.weight, theirs.mlp.fc2.weight[stream][:, hidden])
        values = theirs.attn.qkv.weight[64:, stream]
        kept = [int((values == row).all(1).nonzero()) for row in ours.qkv.weight[32:]]
        assert [k // 8 for k in kept] == [i // 4 for i in range(16)], "each head keeps half of its own dimensions"
        torch.testing.assert_close(ours.proj.weight, theirs.attn.proj.weight[stream][:, kept])
    scores = rt.adapt(VIT.backbone(), rt.Ladder(2, init="random"), None).adapters["default"].side
    assert not torch.allclose(scores.blocks[0].norm1.weight, net.blocks[0].norm1.weight)


class Examples:
    def __init__(self, count: int = 12) -> None:
        self.pixels = torch.randn(count, 3, 16, 16)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.pixels[i], i % 3


def test_fisher_information_on_a_grid() -> None:
    tuned, examples = adapt(VIT, rt.Ladder(4, init="fisher", grid=2), 3), Examples()
    found = fisher(tuned, tuned.adapter("default"), examples)
    assert all(found[block.mlp.fc1.weight].sum() > 0 for block in tuned.backbone.blocks)


def test_fisher_information_is_the_mean_squared_gradient() -> None:
    tuned, examples = adapt(VIT, rt.Ladder(4, init="fisher"), 3), Examples()
    assert needs_data(tuned)
    before = {k: v.clone() for k, v in tuned.adapters["default"].side.state_dict().items()}
    found = fisher(tuned, tuned.adapter("default"), examples)
    weight = tuned.backbone.blocks[0].mlp.fc1.weight
    weight.requires_grad_(True)
    total = torch.zeros_like(weight)
    for pixels, label in (examples[i] for i in range(len(examples))):
        logits = tuned.adapters["default"].head(tuned.backbone(pixels[None]))
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([label])), weight)
        total += grad.square() / len(examples)
    torch.testing.assert_close(found[weight], total, rtol=1e-4, atol=1e-12)
    weight.requires_grad_(False)
    initialise(tuned, examples)
    assert all(not p.requires_grad for p in tuned.backbone.parameters())
    after = tuned.adapters["default"].side.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before if "blocks" in k)
    assert all(torch.equal(before[k], after[k]) for k in before if "blocks" not in k)


def test_side_tuning_blends_pooled_features_and_can_be_distilled() -> None:
    tuned, inputs = shake(adapt(VIT, rt.SideTuning(rt.SmallCnn(8), distil=20), None)).eval(), VIT.inputs()
    side = tuned.adapters["default"].side
    a = torch.sigmoid(side.alpha)
    expected = a * tuned.backbone(**inputs) + (1 - a) * side.net(inputs["x"])
    torch.testing.assert_close(tuned(**inputs), expected)
    examples = Examples(32)

    def distance() -> float:
        with torch.no_grad():
            return float((side.net.eval()(examples.pixels) - tuned.backbone(examples.pixels)).square().mean())

    before = distance()
    initialise(tuned, examples)
    assert distance() < 0.7 * before


@pytest.mark.parametrize("plus", [False, True])
def test_dtl_written_out(plus: bool) -> None:
    """h_l = h_{l−1} + x_l A_l B_l;  x_{l+1} = block(x_l) + h_l σ(β h_l) in the last blocks; outputs and gradients."""
    method = rt.Residual({"block": rt.Dtl(2, last=1, beta=3.0, plus=plus)})
    tuned = shake(adapt(VIT, method, None, torch.float64, pool="none"))
    inputs = VIT.inputs(dtype=torch.float64)
    vit, tuners = tuned.backbone, list(tuned.adapters["default"].tuners.values())
    x = vit._pos_embed(vit.patch_embed(inputs["x"]))
    h: Any = 0
    for block, tuner in zip(vit.blocks, tuners, strict=True):
        h = h + x @ tuner.a.T @ tuner.b.T
        x = block(x)
        if tuner is tuners[-1]:
            swish = h / (1 + torch.exp(-3.0 * h))
            if plus:
                grid = swish[:, 1:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
                grid = F.conv2d(grid, tuner.conv.weight, padding=1, groups=32)
                swish = torch.cat([swish[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
            x = x + swish
    expected = vit.norm(x)
    torch.testing.assert_close(tuned(**inputs), expected, rtol=1e-12, atol=1e-12)
    parameters = list(tuned.adapters.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (tuned(**inputs), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_blocks_before_dtls_first_write_keep_no_gradient() -> None:
    from restuning.utils.profiling import saved_bytes

    size = {}
    for last in (1, 2):
        tuned = adapt(VIT, rt.Residual({"block": rt.Dtl(2, last=last)}), 3).train()
        size[last] = saved_bytes(lambda t=tuned: t(**VIT.inputs(8)).sum(), tuned.parameters())
    assert size[1] < 0.65 * size[2]


def test_convpass_written_out() -> None:
    tuned = shake(adapt(VIT, rt.Residual({"ffn": rt.Convpass(3, factor=0.5)}), None)).eval()
    tuner = tuned.adapters["default"].tuners["0_ffn"]
    x = torch.randn(2, 5, 32)

    def quick_gelu(t: Tensor) -> Tensor:
        return t * torch.sigmoid(1.702 * t)

    h = quick_gelu(tuner.down(x))
    patch = tuner.conv(h[:, 1:].reshape(2, 2, 2, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(2, 4, 3)
    cls = tuner.conv(h[:, :1].reshape(2, 1, 1, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(2, 1, 3)
    expected = 0.5 * tuner.up(quick_gelu(torch.cat([cls, patch], 1)))
    torch.testing.assert_close(tuner(x, x), expected)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (rt.Ladder(3), r"a ladder of width 32 / 3: expected a multiple of its 4 heads"),
        (rt.Ladder(16), r"a ladder of width 32 / 16: expected a multiple of its 4 heads"),
        (rt.Residual({"qkv": rt.Lora(33)}), r"Lora\(rank=33\): expected at most the widths, 32 and 96"),
        (rt.Residual({"block": rt.Dtl(33)}), r"Dtl\(rank=33\): expected at most the width, 32"),
        (rt.Residual({"ffn": rt.Dtl(2)}), r"Dtl goes to operation 'block', not to 'ffn'"),
        (rt.Residual({"mha": rt.PromptTuning(2)}), r"PromptTuning goes to operation 'block', not to 'mha'"),
        (rt.Bypass(rt.PrefixTuning(2)), r"PrefixTuning acts inside a backbone"),
        ("side-tuning", r"needs images of 63 pixels a side: got \(16, 16\)"),
    ],
    ids=str,
)
def test_what_does_not_fit(method: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words) as caught:
        adapt(VIT, method, 3)(**VIT.inputs())
    assert "\n" not in str(caught.value)


def test_settings_that_make_no_sense() -> None:
    for make, words in {
        lambda: rt.Ladder(0): r"Ladder\(reduction=0\)",
        lambda: rt.Ladder(init="good"): "expected magnitude, fisher or random",
        lambda: rt.Bypass(gate=1.0): r"gate=1.0\): expected a number between 0 and 1",
        lambda: rt.Bypass(gates="head"): r"gates='head'\): expected layer or channel",
        lambda: rt.Bypass(normed=1): r"normed=1\): expected true or false",
        lambda: rt.Lora(0): r"Lora\(rank=0\): expected a whole number of at least 1",
        lambda: rt.Lora(2, dropout=1.0): r"dropout=1.0\): expected 0 or more, and less than 1",
        lambda: rt.Mix((rt.Bypass(), rt.Ladder())): "several side paths",
        lambda: rt.Mix((rt.Full(),)): "is no part of a mix",
    }.items():
        with pytest.raises(MethodError, match=words):
            make()


def test_own_side_networks() -> None:
    class Thumb(nn.Module):
        def __init__(self, info: rt.SiteInfo) -> None:
            super().__init__()
            self.fc = nn.Linear(3, info.out_features)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.fc(pixels.mean((2, 3)))

    tuned = adapt(VIT, rt.SideTuning(Thumb), 3)
    assert rt.count(tuned)["tuners"] == 4 * 32 + 1 and tuned(**VIT.inputs()).shape == (3, 3)


@pytest.mark.parametrize(
    "method", [rt.Ladder(16, init="fisher"), rt.SideTuning(rt.SmallCnn(4), distil=1), rt.METHODS["dtl-plus"]], ids=str
)
def test_runs_that_begin_from_data(method: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "method.json").write_text(json.dumps(to_dict(method)))
    run = ["train", "--data", "digits", "--train-size", "60", "--test-size", "20", "--epochs", "1", "--quiet"]
    accuracies = []
    for name in ("a", "b"):
        out = ["--method", str(tmp_path / "method.json"), "--out", str(tmp_path / name), "--json"]
        assert main([*run, *out]) == 0
        accuracies.append(json.loads(capsys.readouterr().out)["test_loss"])
    assert accuracies[0] == accuracies[1], "the same run twice"
