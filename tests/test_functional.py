"""Affine maps without a module: nn.MultiheadAttention and EVA hand their weights to torch's functions."""

import copy
from typing import Any

import jaxtyping
import pytest
import torch
from helpers import compiles
from tiny import MORE, TINY
from torch import Tensor, nn
from torch.nn import functional as F

import restuning as rt
from restuning.errors import MethodError, SiteError
from restuning.hooks.attention import on_call, opened

LORA_AND_PREFIX = {"qkv": rt.Lora(2), "proj": rt.Lora(3), "attention": rt.PrefixTuning(3)}


def shaken(tuned: rt.Tuned) -> rt.Tuned:
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned.eval()


def on_open_clip(method: Any, classes: int | None = None, **more: Any) -> rt.Tuned:
    torch.manual_seed(0)
    return shaken(rt.adapt(TINY["open-clip"].backbone(torch.float64), method, classes, **more))


def pixels() -> Tensor:
    torch.manual_seed(5)
    return TINY["open-clip"].inputs(dtype=torch.float64)["x"]


def by_hand(attn: nn.MultiheadAttention, x: Tensor, tuners: dict[str, Any]) -> Tensor:
    """Attention with LoRA in its weights, and with prefixes put before its keys and values (Eq. 2)."""
    b, n, d = x.shape
    qkv, proj, prefix = tuners["qkv"], tuners["proj"], tuners["attention"]
    q, k, v = (x @ (attn.in_proj_weight + qkv.b @ qkv.a).T + attn.in_proj_bias).chunk(3, -1)
    k = torch.cat([prefix.keys.expand(b, -1, -1), k], 1)
    v = torch.cat([prefix.values.expand(b, -1, -1), v], 1)
    q, k, v = (t.view(b, -1, attn.num_heads, d // attn.num_heads).transpose(1, 2) for t in (q, k, v))
    said = (q @ k.transpose(2, 3) * (d // attn.num_heads) ** -0.5).softmax(-1) @ v
    weight = attn.out_proj.weight + proj.b @ proj.a
    return said.transpose(1, 2).reshape(b, n, d) @ weight.T + attn.out_proj.bias


@pytest.mark.parametrize("order", [list(LORA_AND_PREFIX), list(LORA_AND_PREFIX)[::-1]], ids=["maps", "prefix"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "slow path"])
@pytest.mark.parametrize("frozen", [True, False])
def test_lora_and_prefix_in_one_attention(order: list[str], fast: bool, frozen: bool) -> None:
    tuned, x = on_open_clip(rt.Residual({op: LORA_AND_PREFIX[op] for op in order}), pool="none"), pixels()
    clip: Any = tuned.backbone
    h = clip.conv1(x).flatten(2).transpose(1, 2)
    h = clip.ln_pre(torch.cat([clip.class_embedding.expand(3, 1, -1), h], 1) + clip.positional_embedding)
    tuners = tuned.adapters["default"].tuners
    for i, block in enumerate(clip.transformer.resblocks):
        h = h + by_hand(block.attn, block.ln_1(h), {op: tuners[f"{i}_{op}"] for op in LORA_AND_PREFIX})
        h = h + block.mlp(block.ln_2(h))
    expected = clip.ln_post(h)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.set_grad_enabled(not frozen):
            got = tuned(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if not frozen:
        parameters = list(tuned.adapters.parameters())
        a, b = (torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal, added": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)},
    "causal, a hint": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True},
    "by head": {"attn_mask": torch.linspace(-1, 1, 300, dtype=torch.float64).view(12, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])},
    "both": {
        "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5]),
    },
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [False, True])
def test_opened_it_is_the_same_attention(mask: dict[str, Tensor], batch_first: bool, bias: bool, cross: bool) -> None:
    """Seen and left alone, or with a prefix of no weight: what torch says, forward and gradients."""
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(32, 4, bias=bias, batch_first=batch_first).double().eval()
    for p in attn.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True) if cross else x

    def run() -> tuple[Tensor, ...]:
        q, k = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
        said = attn(q, q if q is k else k, k if cross else q, need_weights=False, **mask)[0]
        said = said if batch_first else said.transpose(0, 1)
        return said, *torch.autograd.grad(said.square().sum(), [x, y, *attn.parameters()], allow_unused=True)

    if not cross:
        y = x
    expected = run()
    with on_call(attn, lambda c: F.scaled_dot_product_attention(c.q, c.k, c.v, c.mask, scale=c.scale)):
        torch.testing.assert_close(run(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["open-clip", "torchvision", "timm-eva"])
def test_dropout_and_any_tuner_act_there(name: str) -> None:
    """What is added is the law's, OP(x) + tuner(x, OP(x)), so it is not confined to what merges."""
    tuned, x = (
        rt.adapt((TINY | MORE)[name].backbone(), rt.Residual({"qkv": rt.Adapter(4)}), 3),
        TINY["timm-vit"].inputs(),
    )
    before = tuned(**x)
    assert not torch.allclose(shaken(tuned)(**x), before)
    tuned = shaken(rt.adapt((TINY | MORE)[name].backbone(), rt.Residual({"qkv": rt.Lora(4, dropout=0.5)}), 3))
    assert torch.equal(tuned(**x), tuned(**x))
    tuned.train()
    assert not torch.equal(tuned(**x), tuned(**x))


def test_a_copy_and_other_precision_find_their_own_weights() -> None:
    tuned, x = on_open_clip(rt.Residual(LORA_AND_PREFIX), 3), pixels()
    y = tuned(x)
    other = copy.deepcopy(tuned).float()
    shaken(tuned)
    torch.testing.assert_close(other(x.float()), y.float(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tuned(x), y)


def test_what_cannot_be_seen_or_merged_is_said() -> None:
    attn = nn.MultiheadAttention(32, 4)
    x = torch.randn(5, 3, 32)
    with on_call(attn, lambda c: c.q), pytest.raises(SiteError, match=r"weights that are returned"):
        attn(x, x, x)
    assert torch.overrides._get_current_function_mode() is None
    with pytest.raises(SiteError, match="add_zero_attn"):
        opened(x, x, x, 32, 4, attn.in_proj_weight, None, None, None, True, 0.0, x, None, need_weights=False)
    for kind in ("unused", "dropout"):
        clip = TINY["open-clip"].backbone()
        if kind == "dropout":
            clip.transformer.resblocks[0].attn.dropout = 0.5
            tuned = rt.adapt(clip, "prefix", 3, train_mode=True).train()
            with pytest.raises(SiteError, match="attention dropout is on"):
                tuned(torch.randn(2, 3, 16, 16))
        else:
            clip.transformer.resblocks[0].attn.forward = lambda q, k, v, **_: (q, None)
            with pytest.raises(SiteError, match=r"makes no call of F.linear with the weight that is tuned"):
                rt.adapt(clip, "lora", 3)(torch.randn(2, 3, 16, 16))
    eva = shaken(rt.adapt(TINY["timm-eva"].backbone(), "ssf", 3))
    with pytest.raises(MethodError, match="no bias is there to take what 0_qkv adds"):
        eva.merge_and_unload()
    for block in (clip := TINY["open-clip"].backbone()).transformer.resblocks:
        block.attn.batch_first = False
    with pytest.raises(SiteError, match="no known anatomy fits OpenClip"):
        rt.find_sites(clip)


@compiles
@pytest.mark.parametrize("name", ["open-clip", "timm-eva"])
def test_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    method = rt.Residual(
        LORA_AND_PREFIX if name == "open-clip" else {"qkv": rt.Lora(2), "attention": rt.PrefixTuning(3)}
    )
    tuned, x = shaken(rt.adapt(TINY[name].backbone(), method, 3)), TINY[name].inputs()
    expected = tuned(**x)
    tuned.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuned(**x), expected, rtol=1e-5, atol=1e-5)


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    with pytest.raises(MethodError, match=r"a compiled pass needs torch 2.12, and this is 2.10.0"):
        rt.adapt(TINY["timm-vit"].backbone(), "linear", 2).compile()
