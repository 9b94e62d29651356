"""What tuners inside a backbone cost, and what they work with: gradient checkpointing, autocast, torch.compile."""

from typing import Any

import pytest
import torch
from tiny import REFUSED, TINY, small
from torch import Tensor

import restuning as rt
from restuning.errors import MethodError
from restuning.measure import saved_bytes

BACKBONES = ("timm-vit", "timm-deit", "timm-eva", "hf-vit", "hf-dinov2", "hf-clip", "bert")
INSIDE = {m for m, method in rt.methods.items() if isinstance(method, rt.Residual | rt.Mix)} - {"linear"}
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
    if method not in REFUSED.get(name, {}) and not (name == "bert" and "grid" in method)
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
        for key, g in expected.items():
            torch.testing.assert_close(got[key], g, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
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
