"""Consistency between two draws of noise: off without a weight, none without noise, of the shape and size stated."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import adapt, shake
from tiny import HIERARCHIES, TINY
from torch import Tensor, nn
from torch.nn import functional as F

import restuning as rt
from restuning.errors import MethodError, RestuningError
from restuning.features.bank import FromFeatures
from restuning.features.stacked import Point
from restuning.training.config import TrainConfig, data_order, seed_of
from restuning.training.consistency import TwoDraws, branches_of, penalty
from restuning.training.loop import fit

VIT = TINY["timm-vit"]
KINDS = {
    "adapter": "res-tuning",
    "stateful": "dtl",
    "weights": "ssf",
    "keys and values": "prefix",
    "tokens": "vpt-deep",
    "bypass": "bypass",
    "queries": rt.BypassQuery(width=8, stages=2, queries=3, heads=2),
    "attention": rt.BypassAttention(width=8, stages=2, heads=2),
    "read-out": "linear-all",
    "ladder": rt.Ladder(4),
}


class Images:
    """Sixteen random images of three classes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)), i % 3


def trained(method: Any, kept: bool = False, **settings: Any) -> list[Tensor]:
    """The parameters after two epochs, the losses last."""
    torch.manual_seed(0)
    tuned = shake(adapt(VIT, method, 3))
    config = TrainConfig(epochs=2, lr=0.01, batch_size=16, **settings)
    data: Any = Images()
    if kept:
        from restuning.features.bank import cache_features

        data = cache_features(tuned, data)
    history = fit(FromFeatures(tuned) if kept else tuned, data, None, config, progress=False)
    return [*(p.detach() for p in tuned.adapters.parameters()), torch.tensor([e.loss for e in history.epochs])]


def test_without_a_weight_nothing_changes() -> None:
    for a, b in zip(trained("res-tuning"), trained("res-tuning", consistency=0, consistency_noise=3.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_there_is_no_penalty(kind: str) -> None:
    """Both draws are what the model itself gives, and its gradient is that of the loss alone."""
    tuned = shake(adapt(VIT, KINDS[kind], 3, torch.float64)).train()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    draws = TwoDraws(tuned, 0.0)
    torch.manual_seed(1)
    with draws.on():
        first, second = draws(x).chunk(2)
    torch.testing.assert_close(first, tuned(x))
    torch.testing.assert_close(second, tuned(x))
    assert penalty(first, second) < 1e-20
    labels, parameters = torch.arange(4) % 3, list(tuned.adapters.parameters())
    torch.manual_seed(1)
    with draws.on():
        first, second = draws(x).chunk(2)
    noisy, plain = F.cross_entropy(first, labels) + 7 * penalty(first, second), F.cross_entropy(tuned(x), labels)
    grads = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (noisy, plain)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_by_image_and_channel_and_falls_with_depth(kind: str) -> None:
    """What a branch adds is multiplied by one number for each image and channel, of the spread stated."""
    tuned = shake(adapt(VIT, KINDS[kind], 3, torch.float64)).train()
    x = torch.randn(40, 3, 16, 16, dtype=torch.float64)
    found: dict[nn.Module, Any] = {}
    plain: dict[nn.Module, Any] = {}
    draws, sigma = TwoDraws(tuned, 0.3), 0.3

    def keep(where: dict[nn.Module, Any]) -> list[Any]:
        return [b.register_forward_hook(lambda m, _, y: where.update({m: y})) for b, _ in draws.branches]

    before = keep(plain)
    with draws.on():
        after = keep(found)
        first, second = draws(x).chunk(2)
    assert not torch.allclose(first, second)
    assert len(first) == 40
    for handle in (*before, *after):
        handle.remove()
    assert {depth for _, depth in draws.branches} <= {0.0, 0.5}, "two blocks, two stages"
    assert 0.0 in {depth for _, depth in draws.branches}
    for branch, depth in draws.branches:
        pairs = zip(*((y if isinstance(y, tuple) else (y,)) for y in (plain[branch], found[branch])), strict=True)
        for a, b in pairs:
            if a is None:
                continue
            z = b / a
            assert len(z) == 80, "two draws of each image"
            steady = 1 if z.ndim == 3 else 2 if z.ndim == 4 else None  # the tokens
            if steady is not None:
                torch.testing.assert_close(z, z.narrow(steady, 0, 1).expand_as(z), rtol=1e-6, atol=1e-6)
            assert not torch.allclose(z[0], z[1]) and not torch.allclose(z[0], z[40])
            one = z.select(steady, 0) if steady is not None else z
            assert one.mean().sub(1).abs() < 0.1
            assert 0.8 < one.std() / (sigma * (1 - depth)) < 1.2


@pytest.mark.parametrize("kind", ["bypass", "queries", "attention", "read-out"])
def test_from_features_as_live(kind: str) -> None:
    """The backbone runs once on each image; the steps are those from its features."""
    calls: list[int] = []
    tuned = adapt(VIT, KINDS[kind], 3).train()
    handle = tuned.backbone.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    draws = TwoDraws(tuned, 0.5)
    with draws.on():
        draws(torch.randn(5, 3, 16, 16))
    handle.remove()
    assert calls == [5]
    settings = {"consistency": 0.5, "consistency_noise": 0.4}
    for a, b in zip(trained(KINDS[kind], **settings), trained(KINDS[kind], True, **settings), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", [1e-9, 0.7, 3.0])
def test_the_loss_is_the_first_draws_and_the_penalty(weight: float) -> None:
    """Of a first step, by the draws of its seed."""
    found = trained("res-tuning", consistency=weight, consistency_noise=0.4)[-1][0]
    torch.manual_seed(0)
    tuned, data = shake(adapt(VIT, "res-tuning", 3)).train(), Images()
    (order,) = data_order(16, 16, 0, 0)
    draws = TwoDraws(tuned, 0.4)
    torch.manual_seed(seed_of(0, 0, 0))
    with draws.on():
        first, second = draws(torch.stack([data[i][0] for i in order])).chunk(2)
    losses = [-first[k].log_softmax(0)[data[i][1]] for k, i in enumerate(order)]
    apart = [(first[k, c] - second[k, c]) ** 2 for k in range(16) for c in range(3)]
    expected = (sum(losses) + weight * sum(apart)) / 16
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=0)


def test_blocks_that_are_recomputed_have_the_noise_that_they_had() -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        tuned = shake(adapt(TINY["hf-vit"], "res-tuning", 3)).train()
        if checkpointed:
            tuned.gradient_checkpointing_enable()
        draws = TwoDraws(tuned, 0.5)
        torch.manual_seed(1)
        with draws.on():
            penalty(*draws(TINY["hf-vit"].inputs()).chunk(2)).backward()
        grads.append([p.grad for p in tuned.adapters.parameters() if p.grad is not None])
        tuned.unload()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["timm-swin", "timm-convnext", "timm-resnet"])
def test_windows_and_maps(name: str) -> None:
    """One draw for each image, however its positions lie: an image beside itself differs, the mode off it does not."""
    tiny = HIERARCHIES[name]
    tuned = shake(adapt(tiny, "res-tuning", 3))
    draws = TwoDraws(tuned, 0.5)
    x = tiny.inputs()
    with draws.on(), torch.no_grad():
        tuned.train()
        first, second = draws(x).chunk(2)
        assert not torch.allclose(first, second)
        tuned.eval()
        first, second = draws(x).chunk(2)
        torch.testing.assert_close(first, second)


def test_what_cannot_be() -> None:
    with pytest.raises(MethodError, match="here is none"):
        TwoDraws(adapt(VIT, "linear", 3), 0.5)
    with pytest.raises(MethodError, match="here is none"):
        fit(nn.Linear(2, 2), Images(), None, TrainConfig(epochs=1, consistency=1.0), progress=False)
    with pytest.raises(MethodError, match="plain recipe"):
        Point(TrainConfig(consistency=1.0), torch.arange(3))
    with pytest.raises(RestuningError, match="consistency is -1: expected a number of 0 or more"):
        TrainConfig(consistency=-1)
    assert replace(TrainConfig(), consistency_noise=0).consistency_noise == 0
    assert len(branches_of(adapt(VIT, "res-tuning", 3))) == 4
