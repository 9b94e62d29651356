"""What frozen operations keep for backward: outputs the same to the bit, gradients as exact as the table says."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import COMPILES
from test_denoise import inputs as unet_inputs
from test_denoise import unet
from tiny import HIERARCHIES, MORE, TINY, Q, V, small
from torch import Tensor, nn
from torch.nn import functional as F

import restuning as rt
from restuning.errors import MethodError
from restuning.hooks.memory import MEMORY, FrozenOpMemory
from restuning.methods.named import find_method
from restuning.methods.spec import resize
from restuning.utils.profiling import saved_bytes

BACKBONES = TINY | MORE
MODES = ("shared", "compact", "recompute")
SINGLE = ("gemma3", "llama")  # their norms are in single precision, whatever the weights are in
ROUNDED = ("timm-convnext-v2", "timm-swin-v2", "gemma3", "own")  # `recompute` finds no norm before some activations
OPENED = ("open-clip", "hf-clip", "torchvision")  # nn.MultiheadAttention in calls of its own, or QuickGELU
FEW = ("timm-vit", "timm-eva02", "hf-clip", "bert", "llama", "timm-swin", "timm-resnet")
CASES = [(name, "res-tuning") for name in BACKBONES] + [
    (name, method)
    for name in FEW
    for method in ("lora", "adapter", "ssf", "prefix", "bitfit", "dtl")
    if not (name == "timm-resnet" and method in ("prefix", "dtl")) and not (name == "timm-swin" and method == "dtl")
]


def tuned_on(name: str, method: Any = "res-tuning", memory: str = "plain", classes: int = 4) -> rt.Tuned:
    """Away from its initialisation, in training, without dropout."""
    tiny = BACKBONES[name]
    torch.manual_seed(0)
    backbone = tiny.backbone()
    family = rt.find_sites(backbone, tiny.anatomy).anatomy.family
    method = small(method, family) if isinstance(method, str) else method
    tuned = rt.adapt(backbone, method, classes, anatomy=tiny.anatomy, memory=memory)
    return shaken(tuned)


def shaken(tuned: rt.Tuned) -> rt.Tuned:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for module in tuned.adapters.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return tuned.train()


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in BACKBONES[name].inputs().items()}


def gradient(tuned: rt.Tuned, run: Callable[[], Tensor]) -> Tensor:
    """Of all tuners, as one vector in double precision."""
    parameters = [p for _, p in sorted(tuned.adapters.named_parameters())]
    grads = torch.autograd.grad(run().square().sum(), parameters, allow_unused=True)
    return torch.cat([g.flatten().double() for g in grads if g is not None])


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "method"), CASES)
def test_gradients_beside_double_precision(name: str, method: str) -> None:
    x, wide = inputs_of(name), inputs_of(name, torch.float64)
    plain, exact = tuned_on(name, method), tuned_on(name, method).double()
    y, expected = plain(**x), gradient(exact, lambda: exact(**wide))
    for mode in MODES:
        tuned = tuned_on(name, method, mode)
        if mode == "recompute" and name in OPENED:
            torch.testing.assert_close(tuned(**x), y)
        else:
            assert torch.equal(tuned(**x), y)
        rounded = mode == "compact" or (mode == "recompute" and name in ROUNDED)
        assert error(gradient(tuned, lambda t=tuned, x=x: t(**x)), expected) < (1e-2 if rounded else 1e-5)
        tuned = tuned.double()
        if not rounded:
            assert error(gradient(tuned, lambda t=tuned, wide=wide: t(**wide)), expected) < (
                1e-6 if name in SINGLE else 1e-11
            )


@pytest.mark.parametrize("method", ["res-tuning", "lora", "adapter"])
def test_in_a_unet(method: str) -> None:
    spec, given = resize(find_method(method, "unet"), 4), unet_inputs()
    found = {}
    for mode in MEMORY:
        torch.manual_seed(0)
        tuned = shaken(rt.adapt(unet(), spec, memory=mode))
        run = lambda t=tuned: t(**given).sample  # noqa: E731
        found[mode] = run().detach(), gradient(tuned, run), saved_bytes(run, tuned.parameters())
    y, expected, most = found["plain"]
    for mode in MODES:
        assert torch.equal(found[mode][0], y) and found[mode][2] < 0.9 * most
        assert error(found[mode][1], expected) < (1e-5 if mode == "shared" else 1e-2)
    assert found["recompute"][2] < found["compact"][2] <= found["shared"][2]


def vit(memory: str, method: Any = "res-tuning") -> rt.Tuned:
    """Eight blocks of width 32, of 17 tokens."""
    torch.manual_seed(0)
    backbone = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=8, num_heads=4, num_classes=0
    )
    return shaken(rt.adapt(backbone, method, 4, memory=memory))


def test_bytes_of_a_vision_transformer() -> None:
    """LoRA on the queries, keys and values, counted by hand in units of one (b, n, d) in single precision."""
    x, unit = torch.randn(4, 3, 32, 32), 4 * 17 * 32 * 4
    lora = rt.Residual({"qkv": rt.Lora(2, dropout=0.0)})
    kept = {}
    for mode in MEMORY:
        tuned = vit(mode, lora)
        kept[mode] = saved_bytes(lambda t=tuned: t(x), tuned.parameters()) / unit
    # a block: x̂, q, k, v, what the attention says, x of the second norm, 4 of GELU; the first one's norm keeps nothing
    small_ones = 8 * (2 + 2 + 4) / 32 + 0.5  # LoRA's inner units, σ and μ, log-sum-exp, and those of the tail
    assert 8 * 10 + 7 < kept["plain"] < 8 * 10 + 7 + 2 + small_ones
    assert kept["plain"] - kept["shared"] == pytest.approx(7, abs=0.5)  # the first norm's input
    assert kept["shared"] - kept["compact"] == pytest.approx(8 * 3, abs=0.5)
    assert kept["recompute"] < 7 * 2 + 10 + 2 + small_ones  # of all blocks but the last one two outputs of norms
    for method in ("res-tuning", "lora", "ssf", "adapter", "prefix", "bitfit"):
        models = [vit(mode, method) for mode in MEMORY]
        sizes = [saved_bytes(lambda m=model: m(x), model.parameters()) for model in models]
        assert 1.01 * sizes[0] >= sizes[1] > sizes[2] > sizes[3]  # one norm reads what is kept anyway


def test_trainings_of_fifty_steps_agree() -> None:
    """Res-Tuning on the bundled backbone, from 1.4 to 0.003."""
    torch.manual_seed(1)
    backbone, labels = rt.load_backbone("restuning-micro"), torch.arange(4)
    x = 0.3 * torch.randn(4, 3, 64, 64) + torch.randn(4, 3, 1, 1)
    losses = {}
    for mode in MEMORY:
        torch.manual_seed(2)
        tuned = rt.adapt(backbone, "res-tuning", 4, memory=mode).train()
        optimizer = torch.optim.AdamW(tuned.adapters.parameters(), lr=2e-3)
        losses[mode] = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = tuned(x, labels=labels)["loss"]
            loss.backward()
            optimizer.step()
            losses[mode].append(float(loss.detach()))
        tuned.unload()
    plain = np.array(losses["plain"])
    assert plain[-1] < 0.05 * plain[0]
    for mode, most in (("shared", 1e-5), ("recompute", 1e-5), ("compact", 2e-3)):
        assert np.abs(np.array(losses[mode]) - plain).max() < most * plain[0], mode


# ---- operations


def both(run: Callable[[Tensor], Tensor], x: Tensor, memory: str) -> tuple[Tensor, Tensor]:
    """Its gradient with respect to x under a mode, and without."""
    found = []
    for mode in (memory, "plain"):
        z = x.clone().requires_grad_()
        with FrozenOpMemory(mode):
            y = run(z)
        torch.manual_seed(9)
        found.append(torch.autograd.grad((y * torch.randn(y.shape, dtype=y.dtype)).sum(), z)[0])
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["layer", "group", "rms"])
def test_norms_whose_weights_cannot_be_divided_by(kind: str, dtype: torch.dtype) -> None:
    norm: Any = {"layer": nn.LayerNorm(12), "group": nn.GroupNorm(3, 12), "rms": nn.RMSNorm(12, eps=1e-6)}[kind]
    norm = norm.to(dtype).requires_grad_(False)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12))
        norm.weight[:3] = torch.tensor([0.0, 1e-7, -1e-30])
        if kind != "rms":
            norm.bias.copy_(torch.randn(12))
    x = 3 + 2 * torch.randn(4, 12, 5, 12, dtype=dtype)
    got, expected = both(norm, x if kind != "layer" else x[:, :, 0], "shared")
    assert error(got.flatten(), expected.flatten()) < (2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(
    "act",
    [
        F.gelu,
        lambda x: F.gelu(x, approximate="tanh"),
        F.silu,
        F.hardswish,
        F.relu,
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: F.silu(x * 1.0, inplace=True),
        lambda x: F.relu(x * 1.0, inplace=True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_derivatives_in_8_bits(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Off by half a step of the grid at most; 0 and 1 are on it."""
    x = torch.linspace(-12, 12, 4001, dtype=dtype)
    z = x.clone().requires_grad_()
    with FrozenOpMemory("compact"):
        y = act(z)
        assert torch.equal(y, act(x))
        assert saved_bytes(lambda: act(z), [z]) <= len(x)
    got = torch.autograd.grad(y.sum(), z)[0].double()
    wide = x.double().requires_grad_()
    expected = torch.autograd.grad(act(wide).sum(), wide)[0]
    half = 0.5 / 127 if act is F.hardswish else 0.5 / 202
    assert (got - expected).abs().max() <= half + (2e-2 if dtype == torch.bfloat16 else 1e-9)
    assert got[0] == 0 and got[-1] == 1


def test_what_is_written_over() -> None:
    """In-place operations on a norm's output, which is kept."""
    norm, group = nn.LayerNorm(8).requires_grad_(False), nn.GroupNorm(2, 8).requires_grad_(False)

    def added(x: Tensor) -> Tensor:
        y = norm(x)
        y += 1
        y.mul_(2)
        return y.square()

    x = torch.randn(2, 8, 3, 8)
    for mode in MODES:
        for run in (added, lambda x: F.relu(group(x), inplace=True), lambda x: F.silu(group(x), inplace=True)):
            near = {} if mode == "shared" else {"rtol": 0, "atol": 2e-2}  # its derivative may be in 8 bits now
            torch.testing.assert_close(*both(run, x, mode), **near)


def test_what_is_written_to_after_the_pass() -> None:
    norm, x = nn.LayerNorm(8).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    with FrozenOpMemory("shared"):
        y = norm(x)
        z = y.sum()
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="was written to after the pass"):
        z.backward()


def test_only_what_is_frozen() -> None:
    norm = nn.LayerNorm(8)
    x = torch.randn(3, 8, requires_grad=True)
    with FrozenOpMemory("recompute"):
        y = norm(x)
    assert type(y.grad_fn).__name__ == "NativeLayerNormBackward0"
    y.sum().backward()
    assert norm.weight.grad is not None
    with FrozenOpMemory("shared"), torch.no_grad():
        assert norm(x).grad_fn is None


def test_nothing_outlives_the_pass() -> None:
    tuned, x = vit("recompute"), torch.randn(2, 3, 32, 32)
    tuned(x).sum().backward()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is FrozenOpMemory]


# ---- with everything else


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast(mode: str) -> None:
    for name in ("timm-vit", "llama", "timm-resnet"):
        x, plain, tuned = inputs_of(name), tuned_on(name), tuned_on(name, memory=mode)
        with torch.autocast("cpu", torch.bfloat16):
            y, z = plain(**x), tuned(**x)
            assert torch.equal(y, z)
            expected, got = gradient(plain, lambda p=plain, x=x: p(**x)), gradient(tuned, lambda t=tuned, x=x: t(**x))
        assert error(got, expected) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_in_mixed_batches(mode: str) -> None:
    x, names = inputs_of("timm-vit"), ["default", None, "other"]
    for method in ("lora", "adapter", "res-tuning"):
        found = []
        for memory in ("plain", mode):
            tuned = tuned_on("timm-vit", method, memory)
            tuned.add_adapter("other", small(method), 4)
            shaken(tuned)
            found.append(gradient(tuned, lambda t=tuned: t(**x, adapter_names=names)[[0, 2]]))
        assert error(found[1], found[0]) < (1e-2 if mode == "compact" else 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_with_recomputed_blocks_and_in_one_graph(mode: str) -> None:
    """Checkpointed blocks keep their inputs alone, a compiled pass what the compiler chooses: the mode is without
    effect there, and the gradients are the same."""
    x, plain = inputs_of("timm-vit"), tuned_on("timm-vit")
    expected = gradient(plain, lambda: plain(**x))
    tuned = tuned_on("timm-vit", memory=mode)
    tuned.gradient_checkpointing_enable()
    assert error(gradient(tuned, lambda: tuned(**x)), expected) < 1e-6
    tuned.gradient_checkpointing_disable()
    if COMPILES:
        tuned.compile(backend="eager")
        assert error(gradient(tuned, lambda: tuned(**x)), expected) < 1e-6


def test_lora_of_peft(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    tiny = TINY["hf-vit"]
    model = peft.get_peft_model(tiny.backbone(), peft.LoraConfig(r=2, target_modules=[Q, V]))
    for name, p in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path)
    found = []
    for mode in MEMORY:
        tuned = rt.Tuned(tiny.backbone(), memory=mode)
        torch.manual_seed(0)
        rt.load_peft(tuned, tmp_path, num_classes=4)
        tuned.train()
        found.append(gradient(tuned, lambda t=tuned: t(**inputs_of("hf-vit"))))
    assert error(found[1], found[0]) < 1e-5 and error(found[3], found[0]) < 1e-5 and error(found[2], found[0]) < 1e-2


def test_modes_that_are_not_there() -> None:
    with pytest.raises(MethodError, match="memory 'tiny': expected one of plain, shared, compact, recompute"):
        rt.adapt(TINY["timm-vit"].backbone(), "lora", memory="tiny")
    assert all(HIERARCHIES) and set(MODES) | {"plain"} == set(MEMORY)
