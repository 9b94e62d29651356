"""The laws, over every tuner, every operation and every tiny backbone."""

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import adapt, as_features, plain_features, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HIERARCHIES, MORE, REFUSED, TINY, Tiny, small
from torch import Tensor, nn

import restuning as rt
from restuning.backbones.families import ANATOMIES
from restuning.errors import RestuningError
from restuning.hooks.taps import tap
from restuning.methods.files import from_dict, to_dict
from restuning.side.features import FeatureRequest
from restuning.utils.profiling import saved_bytes


class Mixer(nn.Module):
    """An own tuner: it mixes tokens, and reads what the operation said."""

    def __init__(self, info: rt.SiteInfo) -> None:
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.randn(info.in_features, info.out_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) @ self.w + 0.1 * y


ZERO = {
    "adapter": rt.Adapter(4),
    "adapter-scalar": rt.Adapter(4, scale="scalar"),
    "adapter-channel": rt.Adapter(4, scale="channel", act="relu"),
    "prefix": rt.Prefix(3),
    "prefix-channel": rt.Prefix(3, scale="channel"),
    "adapter-kaiming": rt.Adapter(4, init="kaiming", factor=0.5),
    "lora": rt.Lora(3, alpha=6.0),
    "ssf-identity": rt.Ssf(init="identity"),
    "bias": rt.Bias(),
}
OTHER = {
    "adapter-xavier": rt.Adapter(4, init="xavier", act="silu"),
    "prefix-xavier": rt.Prefix(3, init="xavier", scale="scalar"),
    "prompt": rt.Prompt(3),
    "prompt-channel": rt.Prompt(3, scale="channel"),
    "own": Mixer,
    "adapter-stream": rt.Adapter(4, init="bert", source="stream"),
    "adapter-out": rt.Adapter(4, init="houlsby", source="out", factor=2.0),
    "ssf": rt.Ssf(),
}
TUNERS: dict[str, Any] = {**ZERO, **OTHER}
OPS = ("mha", "ffn", "block")
FAMILY = {name: rt.find_sites(tiny.backbone(), tiny.anatomy).anatomy.family for name, tiny in (TINY | MORE).items()}
OPS_OF = {"": OPS, "text": OPS, "convnext": ("conv", "ffn", "block"), "conv": ("block", "conv")}
ALIKE = HIERARCHIES.keys() - {"timm-convnext", "timm-resnet", "timm-swin"}  # these are tried with fewer tuners
FEW = ("adapter", "lora", "own")
FEW_METHODS = ("full", "linear", "lora", "ssf", "prefix", "lst", "res-tuning", "bypass", "bypass-grid2")
FEW_METHODS += ("linear-all", "bypass-query", "bypass-attention", "last")
SQUEEZED = ("timm-regnet", "timm-efficientnet", "timm-mobilenetv3")  # convolutions after a ReLU of one or two channels


def places(tuners: Iterable[str]) -> list[Any]:
    """(backbone, operation, tuner)"""
    return [
        (name, op, tuner)
        for name in TINY
        for op in OPS_OF[FAMILY[name]]
        for tuner in tuners
        if (name not in ALIKE or tuner in FEW) and not (op == "conv" and name in SQUEEZED)
    ]


each_backbone = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
each_tuner = pytest.mark.parametrize("config", TUNERS.values(), ids=TUNERS)


def tried(name: str, method: str) -> bool:
    return name not in ALIKE or method in FEW_METHODS


def unequal(tiny: Tiny, op: str, config: Any) -> bool:
    """Whether a prompt is refused: it needs one width, and convolutions change theirs."""
    infos = [s.info for s in rt.find_sites(tiny.backbone(), tiny.anatomy).at(op)]
    if isinstance(config, rt.Prompt) and any(p.in_features != p.out_features for p in infos):
        with pytest.raises(RestuningError, match="Prompt needs an operation of one width; this one"):
            adapt(tiny, rt.Residual({op: config}))
        return True
    return False


def hooks(backbone: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())


@pytest.mark.parametrize(("name", "op", "tuner"), places(ZERO))
def test_identity_at_birth(name: str, op: str, tuner: str) -> None:
    tiny = TINY[name]
    tuned, inputs = adapt(tiny, rt.Residual({op: ZERO[tuner]})), tiny.inputs()
    last = plain_features(tiny, tuned.backbone, inputs)[-1]
    assert torch.equal(tuned.features(**inputs).last, tuned.request.tokens(last, inputs.get("attention_mask")))


@pytest.mark.parametrize(("name", "op", "tuner"), places(TUNERS))
def test_only_the_adapter_learns_and_every_part_of_it(name: str, op: str, tuner: str) -> None:
    tiny, config = TINY[name], TUNERS[tuner]
    if unequal(tiny, op, config):
        return
    tuned, inputs = shake(adapt(tiny, rt.Residual({op: config}))), tiny.inputs()
    before = plain_features(tiny, tuned.backbone, inputs)[-1]
    assert not torch.allclose(
        tuned.features(**inputs).last, tuned.request.tokens(before, inputs.get("attention_mask")), atol=1e-4
    ), "the tuner acts"
    tuned(**inputs).square().sum().backward()
    assert all(p.grad is None for p in tuned.backbone.parameters())
    for key, p in tuned.adapters.named_parameters():
        assert p.grad is not None
        dead = name in HIERARCHIES and getattr(config, "act", "") == "relu"  # it reads what has been through a ReLU
        assert p.grad.abs().sum() > 0 or dead, key


def says(tuner: Any, x: Tensor, y: Tensor, stream: Tensor) -> Tensor:
    """What a tuner adds, given what it asks for."""
    return tuner({"normed": x, "output": y, "residual": stream}[tuner.input], y)


def by_hand_timm(block: Any, x: Tensor, t: dict[str, nn.Module]) -> Tensor:
    """A pre-norm block with LayerScale, written out."""
    n = block.norm1(x)
    y = block.ls1(block.attn(n))
    m = x + y + says(t["mha"], n, y, x)
    n = block.norm2(m)
    y = block.ls2(block.mlp(n))
    out = m + y + says(t["ffn"], n, y, m)
    return out + says(t["block"], x, out, x)


def by_hand_bert(layer: Any, x: Tensor, t: dict[str, nn.Module]) -> Tensor:
    """A post-norm layer, written out: the residual is inside."""
    y = layer.attention.output.dense(layer.attention.self(x)[0])
    m = layer.attention.output.LayerNorm(y + says(t["mha"], x, y, x) + x)
    y = layer.output.dense(layer.intermediate(m))
    out = layer.output.LayerNorm(y + says(t["ffn"], m, y, m) + m)
    return out + says(t["block"], x, out, x)


@pytest.mark.parametrize(
    ("name", "block"),
    [("timm-vit-layerscale", by_hand_timm), ("timm-dinov2-registers", by_hand_timm), ("bert", by_hand_bert)],
)
@each_tuner
def test_the_law_written_out(name: str, block: Any, config: Any) -> None:
    tiny = TINY[name]
    tuned = shake(adapt(tiny, rt.Residual(dict.fromkeys(OPS, config)), None, torch.float64, pool="none"))
    inputs = tiny.inputs(dtype=torch.float64)
    inputs.pop("attention_mask", None)
    x = plain_features(tiny, tuned.backbone, inputs)[0]
    tuners = tuned.adapters["default"].tuners
    for i, path in enumerate(tuned.sites.blocks):
        x = block(tuned.backbone.get_submodule(path), x, {op: tuners[f"{i}_{op}"] for op in OPS})
    torch.testing.assert_close(tuned.features(**inputs).last, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("h", [None, rt.Adapter(4), rt.Prefix(3), rt.Prompt(3)], ids=["-", "A", "F", "P"])
@pytest.mark.parametrize("v", [None, rt.Adapter(4), rt.Prefix(3), rt.Prompt(3), Mixer], ids=["-", "A", "F", "P", "own"])
@pytest.mark.parametrize("options", [{}, {"gate": 0.9, "gates": "channel", "normed": True}], ids=["paper", "ours"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean", "bert", "own"])
def test_bypass_is_equation_8_and_live_is_unpruned(name: str, options: dict[str, Any], h: Any, v: Any) -> None:
    """Forward against Eq. 8 in numpy on all tokens; gradients against the same path run on all tokens."""
    tiny = TINY[name]
    tuned = adapt(tiny, rt.Bypass(h, v, **options), dtype=torch.float64)
    for a in tuned.adapters["default"].side.gate:
        torch.testing.assert_close(a.sigmoid(), torch.full_like(a, options.get("gate", 0.5)))
    shake(tuned)
    inputs = tiny.inputs(dtype=torch.float64)
    features = plain_features(tiny, tuned.backbone, inputs)
    side, tail = tuned.adapters["default"].side, tuned.reader("default").tail

    def through(tuners: nn.ModuleDict, layer: int, x: np.ndarray) -> np.ndarray:
        if str(layer) not in tuners:
            return x
        with torch.no_grad():
            return x + tuners[str(layer)](*[torch.from_numpy(x)] * 2).numpy()

    def read(layer: int) -> np.ndarray:
        x = features[layer].numpy()
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) if options else x

    x = read(0)
    for layer, a in enumerate(side.gate):
        weight = 1 / (1 + np.exp(-a.detach().numpy()))
        x = weight * through(side.horizontal, layer, read(layer + 1)) + (1 - weight) * through(side.vertical, layer, x)
    torch.testing.assert_close(side(as_features(features)), torch.from_numpy(x))
    live = tuned.features(**inputs)
    narrow = (name != "timm-vit-mean" and v is not Mixer) or (h is None and v is None and not options)
    assert all(f.shape[1] == 1 for f in live.tensors()) == narrow, (
        "one token is live, unless the head or a tuner reads more"
    )
    unpruned = tuned.adapters["default"].head(tail(side(as_features(features))))
    torch.testing.assert_close(tuned(**inputs), unpruned)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    a, b = (torch.autograd.grad(out.square().sum(), parameters) for out in (tuned(**inputs), unpruned))
    torch.testing.assert_close(a, b)


@each_backbone
def test_bypass_keeps_nothing_of_the_backbone_for_backward(tiny: Tiny) -> None:
    inputs = tiny.inputs(batch=8)
    size = {}
    for method in ("linear", "bypass-none", "bypass", "full"):
        tuned = adapt(tiny, method).train()
        size[method] = saved_bytes(lambda t=tuned: t(**inputs).sum(), tuned.parameters())
        if method != "full":
            assert not any(f.requires_grad for f in tuned.features(**inputs).tensors())
    widest = max(f.shape[1] * f.shape[2] for f in adapt(tiny, "bypass").features(**inputs).tensors())
    row = 8 * 4 * widest
    assert size["linear"] <= 8 * 4 * tuned.sites.info.out_features + 64, (
        "linear probing keeps the pooled features alone"
    )
    assert size["bypass-none"] <= size["linear"] + 12 * row
    assert size["bypass"] < size["full"]
    assert all(p.grad is None for p in tuned.backbone.parameters())


@each_backbone
@pytest.mark.parametrize("method", ["res-tuning", "bypass"])
def test_hooks_live_during_forward_only_even_when_it_fails(tiny: Tiny, method: str) -> None:
    tuned, inputs = adapt(tiny, method), tiny.inputs()
    tuned(**inputs)
    assert hooks(tuned.backbone) == 0

    def fail(*_: Any) -> None:
        raise ArithmeticError("in the middle")

    last = tuned.backbone.get_submodule(tuned.sites.blocks[-1])
    handle = last.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        tuned(**inputs)
    handle.remove()
    assert hooks(tuned.backbone) == 0


@each_backbone
def test_unload_gives_the_backbone_back_as_it_came(tiny: Tiny) -> None:
    backbone, inputs = tiny.backbone(), tiny.inputs()
    next(iter(backbone.parameters())).requires_grad_(False)
    flags = [p.requires_grad for p in backbone.parameters()]
    with torch.no_grad():
        before = backbone(**inputs)
    attributes = {name: set(vars(m)) for name, m in backbone.named_modules()}
    state = copy.deepcopy(backbone.state_dict())
    backbone.train()
    tuned = rt.adapt(backbone, "res-tuning", 4, anatomy=tiny.anatomy)
    tuned.train()(**inputs).sum().backward()
    assert {name: set(vars(m)) for name, m in backbone.named_modules()} == attributes
    assert tuned.unload() is backbone and backbone.training
    assert [p.requires_grad for p in backbone.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(state.values(), backbone.state_dict().values(), strict=True))
    with torch.no_grad():
        after = backbone.eval()(**inputs)
    before, after = (out if isinstance(out, Tensor) else out[0] for out in (before, after))
    assert torch.equal(before, after)


EVERY = [(name, method) for name in TINY for method in rt.METHODS if tried(name, method)]
EVERY += [(name, m) for name in MORE for m in ("lora", "prefix", "ssf", "noah", "lst", "bypass", "res-tuning-tri")]


@pytest.mark.parametrize(("name", "method"), EVERY)
def test_every_method_on_every_backbone(name: str, method: str, tmp_path: Any) -> None:
    """Refused in words, or: live is unpruned, only the adapter learns, and loading gives it back to the bit."""
    tiny = (TINY | MORE)[name]
    if method in REFUSED.get(name, {}):
        with pytest.raises(RestuningError, match=REFUSED[name][method]):
            adapt(tiny, small(method, FAMILY[name]), 3)(**tiny.inputs())
        return
    spec = small(method, FAMILY[name])
    tuned, inputs = shake(adapt(tiny, spec, 3)).eval(), tiny.inputs()
    assert from_dict(to_dict(spec)) == spec
    out = tuned(**inputs)
    out.square().sum().backward()
    if method == "full":
        with torch.no_grad():
            next(tuned.backbone.parameters()).add_(0.1)
        out = tuned(**inputs)
    else:
        assert all(p.grad is None for p in tuned.backbone.parameters())
        # a ReLU of width 3, or of a squeeze, may be dead, and where blocks mix no tokens no one looks at a prompt
        learns = [
            bool(p.grad is not None and p.grad.abs().sum() > 0) or "se_conv_reduce" in at
            for at, p in tuned.adapters.named_parameters()
        ]
        assert all(learns) or method in ("adapter-pfeiffer", "adaptformer", "mam-adapter") or "vpt" in method
        assert any(learns[:-2]) == (method not in ("linear", "linear-all")) or name == "own"
        if tuned.reads_features:  # every token, where fewer were tapped; of texts, the mask tells which are padding
            plain, request = plain_features(tiny, tuned.backbone, inputs), tuned.request
            mask = inputs.get("attention_mask") if request.mask or request.mask_of_all else None
            every = as_features({layer: plain[layer] for layer in request.layers}, mask)
            every = dataclasses.replace(every, pixels=tuned.features(**inputs).pixels)
            torch.testing.assert_close(tuned.from_features(every), out)
    tuned.save_pretrained(tmp_path)
    again = rt.Tuned.from_pretrained(tiny.backbone(), tmp_path, anatomy=tiny.anatomy).eval()
    assert torch.equal(again(**inputs), out)
    assert hooks(tuned.backbone) == 0


ZERO_AT_BIRTH = ("adapter", "lora", "bitfit", "adaptformer", "convpass", "dtl", "dtl-plus", "res-tuning", "linear")


@pytest.mark.parametrize(("name", "method"), [(n, m) for n in TINY for m in ZERO_AT_BIRTH if tried(n, m)])
def test_methods_that_are_the_backbone_at_birth(name: str, method: str) -> None:
    tiny = TINY[name]
    if method not in REFUSED.get(name, {}):
        spec = small(method, FAMILY[name])
        tuned, inputs = adapt(tiny, spec, None, pool="none").eval(), tiny.inputs()
        tail = tuned.reader("default").tail
        with torch.no_grad():
            expected = tail(plain_features(tiny, tuned.backbone, inputs)[-1])
            # nn.MultiheadAttention is opened where its weights are tuned: its sums are rounded in another order
            opened = name == "open-clip" and method in ("lora", "bitfit")
            torch.testing.assert_close(tuned(**inputs), expected, rtol=0, atol=1e-5 * opened)


def test_mixes_of_everything_save_and_load(tmp_path: Any) -> None:
    tiny = TINY["timm-vit"]
    mix = rt.Mix(
        (
            rt.Residual({"attention": rt.PrefixTuning(3), "qkv": rt.Lora(2)}, blocks=(0,)),
            rt.Residual({"ffn": rt.Adapter(3), "affine": rt.Ssf(), "block": rt.PromptTuning(2)}, blocks=(1,)),
            rt.Residual({"ffn": rt.Prompt(4), "mha": rt.Convpass(2)}),
            rt.Bypass(rt.Adapter(3)),
        )
    )
    assert from_dict(to_dict(mix)) == mix
    tuned, inputs = shake(adapt(tiny, mix, 3)).eval(), tiny.inputs()
    out = tuned(**inputs)
    out.square().sum().backward()
    missing = [n for n, p in tuned.adapters.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not missing, missing
    tuned.save_pretrained(tmp_path)
    assert torch.equal(rt.Tuned.from_pretrained(tiny.backbone(), tmp_path).eval()(**inputs), out)


sizes = st.integers(1, 9)
scales = st.sampled_from(["none", "scalar", "channel"])
recipes = st.one_of(
    st.builds(
        rt.Adapter, sizes, st.sampled_from(["gelu", "relu", "silu"]), scales, st.sampled_from(["zero", "xavier"])
    ),
    st.builds(rt.Prefix, sizes, scales, st.sampled_from(["zero", "xavier"])),
    st.builds(rt.Prompt, sizes, scales),
)
blocks = st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True).map(tuple)
mixtures = st.one_of(
    st.builds(rt.Residual, st.dictionaries(st.sampled_from(OPS), recipes), blocks),
    st.builds(rt.Bypass, st.none() | recipes, st.none() | recipes, blocks),
)


def parameters_of(config: Any, d: int = 32) -> int:
    """By the formulas of the docstrings."""
    scale = {"none": 0, "scalar": 1, "channel": d}[config.scale]
    if isinstance(config, rt.Adapter):
        return (2 * d + 1) * config.width + d + scale
    return (2 if isinstance(config, rt.Prefix) else 1) * config.tokens * d + scale


@settings(max_examples=40, deadline=None)
@given(method=mixtures)
def test_any_mixture_counts_saves_and_loads(method: Any, tmp_path_factory: Any) -> None:
    tiny = TINY["timm-vit"]
    assert from_dict(to_dict(method)) == method
    tuned = shake(adapt(tiny, method))
    carried = 2 if method.blocks is None else len(method.blocks)
    if isinstance(method, rt.Residual):
        expected = carried * sum(map(parameters_of, method.tuners.values()))
    else:
        expected = 2 + carried * sum(parameters_of(r) for r in (method.horizontal, method.vertical) if r)
    assert rt.count(tuned) == {
        "trainable": expected + 33 * 4,
        "tuners": expected,
        "head": 33 * 4,
        "total": expected + 33 * 4 + sum(p.numel() for p in tuned.backbone.parameters()),
    }
    folder, inputs = tmp_path_factory.mktemp("saved"), tiny.inputs()
    tuned.eval().save_pretrained(folder)
    assert torch.equal(tuned(**inputs), rt.Tuned.from_pretrained(tiny.backbone(), folder).eval()(**inputs))


def test_taps_are_what_the_blocks_say() -> None:
    for tiny in (TINY | MORE).values():
        backbone, inputs = tiny.backbone(), tiny.inputs()
        sites = rt.find_sites(backbone, tiny.anatomy)
        with torch.no_grad(), tap(backbone, sites, FeatureRequest(tuple(range(len(sites.blocks) + 1)))) as taps:
            backbone(**inputs)
        expected = plain_features(tiny, backbone, inputs)
        assert all(torch.equal(a, b) for a, b in zip(taps.features.tensors(), expected, strict=True))


def test_every_row_of_the_table_that_this_transformers_has_is_tried() -> None:
    tried = {rt.find_sites(t.backbone(), t.anatomy).anatomy.name for t in (TINY | MORE).values()}
    tried.add("torchvision ResNet")  # in test_hierarchies: it has no small one
    tried |= {a.name for a in ANATOMIES if a.join is not None}  # in test_denoise: they have no head
    other = 4 if int(transformers.__version__.split(".")[0]) >= 5 else 5
    assert {a.name for a in ANATOMIES} - tried == {a.name for a in ANATOMIES if f"transformers {other}" in a.name}


OWN_OUTPUT = ("linear-all", "linear-all-gated", "bypass-query", "bypass-query-shared", "bypass-attention", "vqt")
"""They read every layer in a way of their own, and take no pooling."""

PADDED = [m for m in rt.METHODS if m not in REFUSED["bert"]]


@pytest.mark.parametrize("method", PADDED)
@pytest.mark.parametrize(
    ("name", "pool"), [("bert", "cls"), ("bert", "mean"), ("bert", "cls+mean"), ("roberta", "mean")]
)
def test_padding_is_never_seen(name: str, method: str, pool: str) -> None:
    """A text says the same alone and padded beside a longer one."""
    own: Any = {} if method in OWN_OUTPUT else {"pool": pool}
    tuned = shake(adapt(TINY[name], small(method), dtype=torch.float64, **own)).eval()
    inputs = TINY[name].inputs()
    together = tuned(**inputs)
    alone = tuned(**{key: value[1:2, :5] for key, value in inputs.items()})
    torch.testing.assert_close(together[1:2], alone, rtol=1e-6, atol=1e-6)
    unmasked = tuned(input_ids=inputs["input_ids"][1:2, :5])
    torch.testing.assert_close(alone, unmasked, rtol=1e-6, atol=1e-6)


def test_a_mask_of_another_kind_is_refused() -> None:
    tuned = adapt(TINY["bert"], "bypass", pool="mean")
    inputs = TINY["bert"].inputs()
    with pytest.raises(RestuningError, match=r"an attention mask \(3, 7, 7\): expected \(b, n\)"):
        tuned(inputs["input_ids"], inputs["attention_mask"][:, None].expand(-1, 7, -1))
