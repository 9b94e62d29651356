"""Unbound equals bound (Res-Tuning, Table 1): forward and all gradients, in every precision, and after training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm.layers
import torch
import transformers as hf
from helpers import as_features
from timm.models.vision_transformer import VisionTransformer
from tiny import GROUPED, HF, TEXT, TINY, VIT, Tiny
from torch import Tensor, nn
from torch.nn import functional as F

import restuning as rt
from restuning.errors import MethodError, SiteError
from restuning.hooks import attention as unbind

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # four of its last bits


def _eager(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = build()
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        return model

    return made


def _bert(kind: str) -> nn.Module:
    return hf.BertModel(hf.BertConfig(**TEXT, attn_implementation=kind))


BACKBONES = {
    "timm, fused qkv, SDPA": Tiny(lambda: VisionTransformer(**VIT)),
    "timm, fused qkv, eager": Tiny(_eager(lambda: VisionTransformer(**VIT))),
    "timm, LayerScale and normed q and k": Tiny(lambda: VisionTransformer(**VIT, init_values=0.3, qk_norm=True)),
    "transformers ViT, SDPA": Tiny(lambda: hf.ViTModel(hf.ViTConfig(**HF, attn_implementation="sdpa")), "hf"),
    "transformers ViT, eager": Tiny(lambda: hf.ViTModel(hf.ViTConfig(**HF, attn_implementation="eager")), "hf"),
    "BERT with padding, SDPA": Tiny(lambda: _bert("sdpa"), "text"),
    "BERT with padding, eager": Tiny(lambda: _bert("eager"), "text"),
    "nn.MultiheadAttention": TINY["open-clip"],
}


def _qwen(kind: str) -> nn.Module:
    return hf.Qwen3Model(hf.Qwen3Config(**GROUPED, head_dim=16, attn_implementation=kind))


PREFIXED = {
    **BACKBONES,
    "causal, grouped queries with padding, SDPA": Tiny(lambda: _qwen("sdpa"), "text"),
    "causal, grouped queries with padding, eager": Tiny(lambda: _qwen("eager"), "text"),
}


def tolerance(tiny: Tiny, dtype: torch.dtype) -> float:
    """transformers' eager ViT takes its softmax in float32 whatever it is given, its decoders their RMS norm."""
    own = tiny in (BACKBONES["transformers ViT, eager"], *list(PREFIXED.values())[-2:])
    return max(TOLERANCE[dtype], 1e-6 if own else 0.0)


each_backbone = pytest.mark.parametrize("tiny", BACKBONES.values(), ids=BACKBONES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@contextmanager
def bound_prefix(tuned: rt.Tuned) -> Iterator[None]:
    """Eq. 2 as it is written: [K_pre; K] and [V_pre; V] in the backbone's own attention, put there by replacing the
    functions that it calls; no code of the library's takes part."""
    tuners = iter(list(tuned.adapters["default"].tuners.values()))
    heads = tuned.sites.at("attention")[0].info.heads
    fused = F.scaled_dot_product_attention

    def grown(t: Tensor, more: Tensor) -> Tensor:
        more = more.view(len(more), heads, -1).transpose(0, 1).repeat_interleave(t.shape[1] // heads, 0)
        return torch.cat([more.expand(len(t), -1, -1, -1), t], 2)

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Tensor:
        tuner = next(tuners)
        if is_causal:
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        if attn_mask is not None:
            value = True if attn_mask.dtype == torch.bool else 0.0
            attn_mask = F.pad(attn_mask, (len(tuner.keys), 0), value=value)
        return fused(q, grown(k, tuner.keys), grown(v, tuner.values), attn_mask, **rest)

    patch = pytest.MonkeyPatch()
    patch.setattr(F, "scaled_dot_product_attention", attention)
    try:
        yield
    finally:
        patch.undo()


def fused_twin(tiny: Tiny) -> Tiny:
    """The same weights with SDPA: what the bound form of an eager backbone is computed with."""
    twins = {"timm, fused qkv, eager": "timm, fused qkv, SDPA"}
    name = next(name for name, other in PREFIXED.items() if other is tiny)
    return PREFIXED[twins.get(name, name.replace("eager", "SDPA"))]


def shaken(tiny: Tiny, method: rt.Residual, dtype: torch.dtype) -> rt.Tuned:
    torch.manual_seed(3)
    # the bound forms run tuners within the backbone, in its own dtype
    tuned = rt.adapt(tiny.backbone(dtype), method, 4, pool="mean", autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.3 * torch.randn_like(p))
    # gradients of the backbone too: what is lost on the way through the attention would show there
    tuned.backbone.requires_grad_(True)
    return tuned


def by_the_book(tuned: rt.Tuned, inputs: dict[str, Tensor]) -> Tensor:
    """The bare backbone's last block, then tail and head: none of the tuners is attached."""
    kept: list[Any] = []
    last = tuned.backbone.get_submodule(tuned.sites.blocks[-1])
    handle = last.register_forward_hook(lambda m, args, out: kept.append(out if isinstance(out, Tensor) else out[0]))
    tuned.backbone(**inputs)
    handle.remove()
    mask = inputs.get("attention_mask", torch.ones(kept[0].shape[:2]))
    return tuned.from_features(as_features({len(tuned.sites.blocks): kept[0]}, mask))


def outcome(tuned: rt.Tuned, inputs: dict[str, Tensor], bound: bool = False) -> dict[str, Tensor]:
    tuned.zero_grad()
    out = by_the_book(tuned, inputs) if bound else tuned(**inputs)
    out.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **grads}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    scale = max(t.double().norm() for name, t in b.items() if name != "output")
    for name, t in b.items():
        size = max(float(t.double().norm()), 1e-3 * float(scale))
        error = float((a[name].double() - t.double()).norm()) / size
        assert error <= tolerance, (name, error)


PREFIX = rt.Residual({"attention": rt.PrefixTuning(5)})


MASKED = [
    (name, padded) for name, tiny in PREFIXED.items() for padded in (True, False) if padded or tiny.kind == "text"
]


@pytest.mark.parametrize(("name", "padded"), MASKED)
@each_dtype
def test_unbound_prefix_is_the_bound_one(name: str, dtype: torch.dtype, padded: bool) -> None:
    tiny = PREFIXED[name]
    inputs = tiny.inputs(dtype=dtype)
    if not padded:
        del inputs["attention_mask"]
    unbound, bound = shaken(tiny, PREFIX, dtype), shaken(fused_twin(tiny), PREFIX, dtype)
    with bound_prefix(bound):
        expected = outcome(bound, inputs, bound=True)
    same(outcome(unbound, inputs), expected, tolerance(tiny, dtype))


@each_backbone
@each_dtype
@pytest.mark.parametrize("span", ["block", "rest"], ids=["deep", "shallow"])
def test_unbound_prompts_are_the_bound_ones(tiny: Tiny, dtype: torch.dtype, span: str) -> None:
    inputs = tiny.inputs(dtype=dtype)
    blocks = (0,) if span == "rest" else None
    outcomes = [
        outcome(
            shaken(tiny, rt.Residual({"block": rt.PromptTuning(3, span=span, unbound=unbound)}, blocks), dtype),
            inputs,
        )
        for unbound in (True, False)
    ]
    same(*outcomes, tolerance(tiny, dtype))


@pytest.mark.parametrize("span", ["block", "rest"], ids=["deep", "shallow"])
def test_bound_prompts_are_vpt(span: str) -> None:
    """Against VPT written out over timm's own blocks."""
    tiny = BACKBONES["timm, fused qkv, SDPA"]
    blocks = (0,) if span == "rest" else None
    tuned = shaken(tiny, rt.Residual({"block": rt.PromptTuning(3, span=span)}, blocks), torch.float64)
    x = tiny.inputs(dtype=torch.float64)["x"]
    vit, tuners = tuned.backbone, list(tuned.adapters["default"].tuners.values())
    h = vit._pos_embed(vit.patch_embed(x))
    n = h.shape[1]
    for i, block in enumerate(vit.blocks):
        if i < len(tuners):
            h = torch.cat([h[:, :1], tuners[i].tokens.expand(len(x), -1, -1), h[:, 1:n]], 1)
        h = block(h)
        if span == "block" or i == 1:
            h = torch.cat([h[:, :1], h[:, 4:]], 1)
    out = tuned.adapters["default"].head(vit.norm(h)[:, 1:].mean(1))
    torch.testing.assert_close(tuned(x), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_sequential_adapter_is_an_unbound_one(dtype: torch.dtype) -> None:
    """Eq. 6 with z = FFN(x): against the adapter put inside the backbone."""
    tiny = BACKBONES["timm, fused qkv, SDPA"]
    inputs = tiny.inputs(dtype=dtype)
    method = rt.Residual({"ffn": rt.Adapter(5, source="out", init="xavier")})
    unbound, bound = (shaken(tiny, method, dtype) for _ in range(2))

    class Sequential(nn.Module):
        def __init__(self, mlp: nn.Module, tuner: Any) -> None:
            super().__init__()
            self.mlp, self.tuner = mlp, [tuner]

        def forward(self, x: Tensor) -> Tensor:
            y, (tuner,) = self.mlp(x), self.tuner
            return y + tuner.up(F.gelu(tuner.down(y)))

    a = outcome(unbound, inputs)
    adapter = bound.adapters["default"]
    for i, block in enumerate(bound.backbone.blocks):
        block.mlp = Sequential(block.mlp, adapter.tuners[f"{i}_ffn"])
    b = {name.replace(".mlp.mlp.", ".mlp."): t for name, t in outcome(bound, inputs, bound=True).items()}
    same(a, b, TOLERANCE[dtype])


def test_fifty_steps_of_training_agree() -> None:
    for name in ("timm, fused qkv, SDPA", "BERT with padding, SDPA"):
        tiny = BACKBONES[name]
        inputs = tiny.inputs(dtype=torch.float64)
        labels = torch.tensor([0, 1, 2])
        ends = []
        for way in ("unbound", "bound", "prompt unbound", "prompt bound"):
            method = (
                PREFIX if "prompt" not in way else rt.Residual({"block": rt.PromptTuning(3, unbound=way[7] == "u")})
            )
            tuned = shaken(tiny, method, torch.float64)
            tuned.backbone.requires_grad_(False)
            parameters = [p for p in tuned.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=0.01)
            for _ in range(50):
                optimizer.zero_grad()
                if way == "bound":
                    with bound_prefix(tuned):
                        loss = F.cross_entropy(by_the_book(tuned, inputs), labels)
                else:
                    loss = F.cross_entropy(tuned(**inputs), labels)
                loss.backward()
                optimizer.step()
            assert loss < 0.5, "it learns"
            ends.append(torch.cat([p.detach().flatten() for p in parameters]))
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ends[2], ends[3], rtol=1e-8, atol=1e-8)


CASES = ["plain", "boolean mask", "additive mask", "causal", "turned"]


def call_and_pieces(case: str, dtype: torch.dtype) -> tuple[unbind.Call, list[tuple[Tensor, Tensor]], list[Tensor]]:
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    more = [torch.randn(3, 4, 8, dtype=dtype, requires_grad=True) for _ in range(4)]
    mask = None
    if "mask" in case:
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        mask[1, ..., 6:] = False
        mask = mask.expand(2, 1, 9, 9)
        if case == "additive mask":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -1e4)
    if case == "turned":  # maps as heads, as LowFormer has them: the width is not the innermost dimension
        q, k, v = (torch.randn(2, 3, 8, 9, dtype=dtype).transpose(2, 3).requires_grad_() for _ in range(3))
    call = unbind.Call(q, k, v, mask, case == "causal", 0.4)
    return call, [(more[0], more[1]), (more[2], more[3])], [q, k, v, *more]


def joint(call: unbind.Call, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """All keys and values put together, by plain arithmetic."""
    b = len(call.q)
    k = torch.cat([call.k, *(p[0].expand(b, -1, -1, -1) for p in pieces)], 2)
    v = torch.cat([call.v, *(p[1].expand(b, -1, -1, -1) for p in pieces)], 2)
    scores = (
        (call.q @ k.transpose(2, 3)).float() * call.scale
        if call.q.dtype == torch.bfloat16
        else (call.q @ k.transpose(2, 3) * call.scale)
    )
    n = call.k.shape[2]
    if call.causal:
        scores[..., :n] = scores[..., :n].masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    elif call.mask is not None and call.mask.dtype == torch.bool:
        scores[..., :n] = scores[..., :n].masked_fill(~call.mask, -torch.inf)
    elif call.mask is not None:
        scores[..., :n] = scores[..., :n] + call.mask
    return scores.softmax(-1).to(v.dtype) @ v


def gradients(out: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad(out, inputs, weight)
    return {"output": out.detach(), **{str(i): g for i, g in enumerate(grads)}}


@pytest.mark.parametrize("case", CASES)
@each_dtype
@pytest.mark.parametrize("fast", [True, False], ids=["kernel", "reference"])
def test_the_merge_is_the_joint_attention(case: str, dtype: torch.dtype, fast: bool) -> None:
    call, pieces, inputs = call_and_pieces(case, dtype)
    expected = gradients(joint(call, pieces), inputs)
    same(gradients(unbind.merged(call, pieces, fast), inputs), expected, TOLERANCE[dtype])


def test_a_merge_without_the_gradient_of_its_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent danger: a log-sum-exp whose gradient is dropped. The forward is right, the check must fail."""
    call, pieces, inputs = call_and_pieces("plain", torch.float64)
    expected = gradients(joint(call, pieces), inputs)
    honest = unbind.plain

    def dropped(*args: Any) -> tuple[Tensor, Tensor]:
        y, lse = honest(*args)
        return y, lse.detach()

    monkeypatch.setattr(unbind, "plain", dropped)
    planted = gradients(unbind.merged(call, pieces, fast=False), inputs)
    torch.testing.assert_close(planted["output"], expected["output"])
    with pytest.raises(AssertionError, match=r"\('\d'"):
        same(planted, expected, TOLERANCE[torch.float32])


class Blind(nn.Module):
    """Called attention, and is none."""

    num_heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.mix(x)


def test_what_cannot_be_merged_is_said() -> None:
    vit = VisionTransformer(**VIT, attn_drop_rate=0.1)
    tuned = rt.adapt(vit, "prefix", 4, train_mode=True).train()
    with pytest.raises(SiteError, match="attention dropout is on"):
        tuned(torch.randn(2, 3, 16, 16))
    assert torch.overrides._get_current_function_mode() is None, "nothing stays on the stack"
    with pytest.raises(MethodError, match="PrefixTuning goes to operation 'attention', not to 'ffn'"):
        rt.adapt(VisionTransformer(**VIT), rt.Residual({"ffn": rt.PrefixTuning(3)}), 4)
    with pytest.raises(MethodError, match="Adapter goes to operations other than 'attention'"):
        rt.adapt(VisionTransformer(**VIT), rt.Residual({"attention": rt.Adapter(3)}), 4)
    blind = VisionTransformer(**VIT)
    for block in blind.blocks:
        block.attn = Blind()
    with pytest.raises(SiteError, match="Blind makes no attention call that is known"):
        rt.adapt(blind, "prefix", 4)(torch.randn(2, 3, 16, 16))


def test_rotary_positions_refuse_prompts() -> None:
    with pytest.raises(MethodError, match="rotary"):
        rt.adapt(TINY["timm-eva02"].backbone(), "vpt-deep", 4)(**TINY["timm-eva02"].inputs())


def test_timm_really_runs_both_ways() -> None:
    assert timm.layers.use_fused_attn()
    for name, fused in (("timm, fused qkv, SDPA", True), ("timm, fused qkv, eager", False)):
        assert all(b.attn.fused_attn == fused for b in BACKBONES[name].backbone().blocks)
