"""What tuners inside a backbone cost, and what they work with: gradient checkpointing, autocast, torch.compile."""

import copy
import gc
import weakref
from typing import Any

import jaxtyping
import pytest
import torch
from helpers import compiles
from timm.models.vision_transformer import VisionTransformer
from tiny import REFUSED, TINY, small
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

import restuning as rt
from restuning.errors import MethodError
from restuning.utils.profiling import saved_bytes

BACKBONES = ("timm-vit", "timm-deit", "timm-eva", "hf-vit", "hf-dinov2", "hf-clip", "bert", "open-clip", "gemma3")
INSIDE = {m for m, method in rt.METHODS.items() if isinstance(method, rt.Residual | rt.Mix)} - {"linear"}
EXTRA = {
    "unbound-shallow": rt.Residual({"block": rt.PromptTuning(3, span="rest", unbound=True)}, blocks=(0,)),
    "unbound-deep": rt.Residual({"block": rt.PromptTuning(3, unbound=True)}),
    "with-grid": rt.Mix((rt.Residual({"mha": rt.Convpass(3)}), rt.Bypass(rt.Adapter(3), grid=2))),
    "prompted-grid": rt.Mix(
        (rt.Residual({"block": rt.PromptTuning(3, span="rest")}, blocks=(0,)), rt.Residual({"ffn": rt.Convpass(3)}))
    ),
}
PAIRS = [
    (name, method)
    for name in BACKBONES
    for method in (*sorted(INSIDE), *EXTRA)
    if method not in REFUSED.get(name, {})
    and not (name in ("bert", "gemma3") and "grid" in method)
    and not (name == "gemma3" and "unbound" in method)
]


def tuned_on(name: str, method: str, dtype: torch.dtype = torch.float64) -> rt.Tuned:
    tiny = TINY[name]
    torch.manual_seed(0)
    tuned = rt.adapt(tiny.backbone(dtype), EXTRA.get(method) or small(method), 5, anatomy=tiny.anatomy)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned.train()


def gradients(tuned: rt.Tuned, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)  # of the tuners' own dropout
    tuned.zero_grad()
    y = tuned(**inputs)
    y.square().sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}


def hooks(backbone: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_recomputed_blocks_are_tuned_too(name: str, method: str) -> None:
    """Gradient checkpointing changes no output and no gradient, keeps less, and leaves no hook."""
    tuned, inputs = tuned_on(name, method), TINY[name].inputs(dtype=torch.float64)
    y, expected = gradients(tuned, inputs)
    plain = saved_bytes(lambda: tuned(**inputs), tuned.parameters())
    tuned.gradient_checkpointing_enable()
    for _ in range(2):
        z, got = gradients(tuned, inputs)
        assert hooks(tuned.backbone) == 0
        torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)
        assert got.keys() == expected.keys()
        near = (
            {"rtol": 1e-5, "atol": 1e-5} if name == "gemma3" else {"rtol": 1e-9, "atol": 1e-10}
        )  # its norms are single
        for key, g in expected.items():
            torch.testing.assert_close(got[key], g, **near, msg=lambda m, key=key: f"{key}: {m}")
    assert saved_bytes(lambda: tuned(**inputs), tuned.parameters()) < plain
    tuned.gradient_checkpointing_disable()
    assert saved_bytes(lambda: tuned(**inputs), tuned.parameters()) == plain


def test_an_interrupted_backward_pass_leaves_nothing_behind() -> None:
    tuned, inputs = tuned_on("timm-vit", "res-tuning"), TINY["timm-vit"].inputs(dtype=torch.float64)
    tuned.gradient_checkpointing_enable()
    y, expected = gradients(tuned, inputs)

    def stop(grad: Tensor) -> None:
        raise KeyboardInterrupt

    handle = tuned.get_parameter("adapters.default.tuners.0_mha.down.weight").register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        gradients(tuned, inputs)
    handle.remove()
    z, got = gradients(tuned, inputs)
    assert torch.equal(y, z) and all(torch.equal(got[key], g) for key, g in expected.items())
    assert hooks(tuned.backbone) == 0


@pytest.mark.parametrize("method", sorted(INSIDE))
def test_two_passes_before_one_backward(method: str) -> None:
    """With recomputed blocks each pass has its own tuners back, and so has each kind of a mixed batch."""
    tuned = tuned_on("timm-vit", method)
    tuned.add_adapter("other", small("adapter"), 5)
    tuned.set_adapter("default")
    x, y = (TINY["timm-vit"].inputs(dtype=torch.float64)["x"] for _ in range(2))

    def run() -> dict[str, Tensor]:
        torch.manual_seed(3)
        tuned.zero_grad()
        (tuned(x) * tuned(y) * tuned(x, adapter_names=["other", "default", "other"])).sum().backward()
        return {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}

    expected = run()
    tuned.gradient_checkpointing_enable()
    got = run()
    assert got.keys() == expected.keys() and hooks(tuned.backbone) == 0
    for key, g in expected.items():
        torch.testing.assert_close(got[key], g, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def test_what_an_interrupted_backward_pass_left_is_gone_before_anything_else() -> None:
    tuned, x = tuned_on("timm-vit", "adapter"), TINY["timm-vit"].inputs(dtype=torch.float64)["x"]
    bare = tuned.backbone(x).detach()
    tuned.gradient_checkpointing_enable()

    def interrupted() -> None:
        def stop(grad: Tensor) -> None:
            raise RuntimeError("out of memory")

        handle = tuned.get_parameter("adapters.default.tuners.0_ffn.down.weight").register_hook(stop)
        with pytest.raises(RuntimeError, match="out of memory"):
            tuned(x).sum().backward()
        handle.remove()
        assert hooks(tuned.backbone)

    interrupted()
    with tuned.disable_adapter():
        assert torch.equal(tuned(x), bare)
    interrupted()
    backbone = tuned.unload()
    assert torch.equal(backbone(x), bare) and hooks(backbone) == 0
    assert not backbone.grad_checkpointing, "it came without"


def test_a_head_alone_trains_beside_recomputed_blocks() -> None:
    tuned, inputs = tuned_on("timm-vit", "lora"), TINY["timm-vit"].inputs(dtype=torch.float64)
    tuned.adapters["default"].get_submodule("tuners").requires_grad_(False)
    tuned.gradient_checkpointing_enable()
    _, grads = gradients(tuned, inputs)
    assert {name.split(".")[2] for name in grads} == {"head"}


@pytest.mark.parametrize("method", ["unbound-deep", "unbound-shallow", "dtl", "prefix", "vpt-deep"])
def test_nothing_outlives_a_step(method: str) -> None:
    """No cycle keeps activations until a garbage collector comes by."""
    tuned, inputs = tuned_on("timm-vit", method), TINY["timm-vit"].inputs(dtype=torch.float64)
    seen: list[Any] = []
    for block in tuned.backbone.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            gradients(tuned, inputs)
            with torch.enable_grad():
                tuned(**inputs)
        assert len(seen) >= 12 and not [ref for ref in seen if ref() is not None]
    finally:
        gc.enable()


def test_reentrant_checkpoints_are_refused() -> None:
    tuned = tuned_on("hf-vit", "lora")
    tuned.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.raises(MethodError, match="needs use_reentrant=False"),
        pytest.warns(UserWarning, match="requires_grad"),
    ):
        tuned(**TINY["hf-vit"].inputs(dtype=torch.float64))
    with pytest.raises(MethodError, match="has no gradient checkpointing"):
        tuned_on("own", "res-tuning").gradient_checkpointing_enable()


def graphs(compiled: list[int]) -> Any:
    """A backend of torch.compile that counts the graphs that it is given, and runs them eagerly."""

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    return backend


IN_ONE_GRAPH = [("timm-vit", method) for method in rt.METHODS] + [
    (name, method)
    for name in ("hf-vit", "hf-clip", "bert", "timm-eva02", "own")
    for method in ("res-tuning", "prefix", "vpt-deep", "dtl", "bypass")
    if method not in REFUSED.get(name, {})
]
IN_ONE_GRAPH += [("open-clip", "lora"), ("gemma3", "prefix")]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the run-time checks of shapes, which cannot be traced."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()


@compiles
@pytest.mark.parametrize(("name", "method"), IN_ONE_GRAPH)
@pytest.mark.usefixtures("unchecked")
def test_one_graph_for_all_adapters_of_a_kind(name: str, method: str) -> None:
    """compile(fullgraph=True): the same outputs and gradients; a switch between adapters compiles nothing."""
    tiny = TINY[name]
    tuned, inputs = rt.Tuned(tiny.backbone(), anatomy=tiny.anatomy), tiny.inputs()
    names = ("a",) if method == "full" else ("a", "b")
    for adapter in names:
        tuned.add_adapter(adapter, small(method), 5 + (adapter == "b"))
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected = {}
    for adapter in names:
        tuned.set_adapter(adapter)
        expected[adapter] = gradients(tuned, inputs)
    compiled: list[int] = []
    tuned.compile(fullgraph=True, backend=graphs(compiled))
    for adapter in names * 2:
        tuned.set_adapter(adapter)
        y, grads = gradients(tuned, inputs)
        torch.testing.assert_close(y, expected[adapter][0], rtol=1e-5, atol=1e-5)
        assert grads.keys() == expected[adapter][1].keys()
        for key, g in expected[adapter][1].items():
            torch.testing.assert_close(grads[key], g, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert len(compiled) == 1 and hooks(tuned.backbone) == 0


@compiles
@pytest.mark.parametrize("method", ["linear", "res-tuning", "bypass"])
@pytest.mark.usefixtures("unchecked")
def test_another_kind_of_adapter_is_another_graph(method: str) -> None:
    tuned, inputs, compiled = tuned_on("timm-vit", method, torch.float32), TINY["timm-vit"].inputs(), list[int]()
    tuned.compile(fullgraph=True, backend=graphs(compiled))
    with torch.no_grad():
        tuned(**inputs)
        tuned.add_adapter("c", small("linear" if method != "linear" else "bypass"), 5)
        now = tuned(**inputs)
        tuned._compiled = None
        torch.testing.assert_close(now, tuned(**inputs), rtol=1e-5, atol=1e-5)
    assert len(compiled) == 2


@compiles
@pytest.mark.parametrize("method", ["res-tuning", "prefix", "dtl", "vpt-deep", "bypass"])
@pytest.mark.usefixtures("unchecked")
def test_one_graph_with_recomputed_blocks(method: str) -> None:
    tuned, inputs = tuned_on("timm-vit", method), TINY["timm-vit"].inputs(dtype=torch.float64)
    y, expected = gradients(tuned, inputs)
    tuned.gradient_checkpointing_enable()
    tuned.compile(fullgraph=True, backend=graphs([]))
    z, got = gradients(tuned, inputs)
    torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-9)
    assert got.keys() == expected.keys()
    for key, g in expected.items():
        torch.testing.assert_close(got[key], g, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


@compiles
@pytest.mark.usefixtures("unchecked")
def test_a_copy_is_its_own() -> None:
    tuned, inputs = tuned_on("timm-vit", "lora"), TINY["timm-vit"].inputs(dtype=torch.float64)
    tuned.compile(fullgraph=True, backend=graphs([]))
    tuned.gradient_checkpointing_enable()
    y, _ = gradients(tuned, inputs)
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        for p in tuned.backbone.parameters():
            p.zero_()
    torch.testing.assert_close(gradients(other, inputs)[0], y, rtol=1e-9, atol=1e-9)


AUTOCAST = [(n, m) for n in ("timm-vit", "hf-vit", "bert") for m in rt.METHODS if m not in REFUSED.get(n, {})]
AUTOCAST += [(n, m) for n in ("open-clip", "gemma3") for m in ("lora", "prefix", "bypass")]


@pytest.mark.parametrize(("name", "method"), AUTOCAST)
def test_autocast(name: str, method: str) -> None:
    """bfloat16 arithmetic on float32 parameters: near the float32 outputs, and float32 gradients near theirs."""
    tuned, inputs = tuned_on(name, method, torch.float32), TINY[name].inputs()
    y, expected = gradients(tuned, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        z, got = gradients(tuned, inputs)
    assert z.dtype == torch.bfloat16
    assert (z - y).norm() < 0.05 * y.norm()
    assert got.keys() == expected.keys()
    for key, g in got.items():
        assert g.dtype == torch.float32 and bool(g.isfinite().all()), key
    near = sum(float((got[key] - g).norm()) ** 2 for key, g in expected.items()) ** 0.5
    assert near < 0.25 * sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5


@pytest.mark.parametrize(("name", "method"), AUTOCAST)
def test_a_backward_pass_after_autocast(name: str, method: str) -> None:
    """As loops have it: the gradients of one that is under autocast too, up to its rounding."""
    tuned, inputs = tuned_on(name, method, torch.float32), TINY[name].inputs()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = tuned(**inputs)
    y.float().square().sum().backward()
    got = {key: p.grad for key, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    torch.manual_seed(0)
    tuned(**inputs).square().sum().backward()
    expected = {key: p.grad for key, p in tuned.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    near = sum(float((got[key] - g).norm()) ** 2 for key, g in expected.items()) ** 0.5
    assert near < 0.25 * sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5


def test_nothing_below_the_first_tuner_is_kept() -> None:
    """Of three blocks, tuners on the last one keep what that block keeps: no more for a deeper backbone below it."""

    def kept(depth: int, method: Any) -> int:
        backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=depth, num_heads=4, num_classes=0)
        tuned = rt.adapt(backbone, method, 5).train()
        return saved_bytes(lambda: tuned(torch.randn(3, 3, 16, 16)), tuned.parameters())

    last = {depth: kept(depth, rt.on_blocks(rt.METHODS["res-tuning"], (depth - 1,))) for depth in (1, 3, 6)}
    assert last[1] == last[3] == last[6] < kept(3, "res-tuning") < kept(3, "full")
