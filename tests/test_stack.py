"""A stack is its members one by one: outputs, training, accuracy; grid points, tasks, heads of other sizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import as_features
from tiny import TINY
from torch import Tensor, nn

import restuning as rt
from restuning.errors import MethodError
from restuning.features.bank import FromFeatures
from restuning.features.stacked import Point, scores, train
from restuning.model.stack import Stack
from restuning.training.config import TrainConfig
from restuning.training.loop import fit

TINY_VIT = TINY["timm-vit"]
CONFIG = TrainConfig(epochs=4, batch_size=8, weight_decay=0.1)


class Rows:
    """Some rows of features, as a data set."""

    def __init__(self, features: rt.Features, labels: Tensor, rows: Tensor) -> None:
        self.features, self.labels, self.rows = features, labels, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])

    def __getitems__(self, indices: list[int]) -> tuple[rt.Features, Tensor]:
        at = self.rows[indices]
        return self.features.rows(at), self.labels[at]

    def collate(self, batch: Any) -> Any:
        return batch


def born(method: Any, classes: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> FromFeatures:
    backbone = TINY_VIT.backbone(dtype)
    torch.manual_seed(seed)
    return FromFeatures(rt.adapt(backbone, method, classes))


def features(count: int = 44, dtype: torch.dtype = torch.float64) -> rt.Features:
    return as_features([torch.randn(count, 1, 32, dtype=dtype) for _ in range(3)])


METHODS = {
    "bypass": rt.Bypass(rt.Adapter(4), rt.Adapter(4)),
    "bypass-none": rt.Bypass(),
    "bypass by channel": rt.Bypass(rt.Adapter(4), gates="channel", normed=True),
    "prefix and prompt": rt.Bypass(rt.Prefix(3), rt.Prompt(3), blocks=(1,)),
    "lst": rt.Ladder(4, init="random"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_side_by_side_is_training_one_by_one(method: Any) -> None:
    """Rates, lengths, seeds and rows of their own; float64, to 1e-8."""
    x, y = features(), torch.arange(44) % 5
    points = [
        Point(replace(CONFIG, lr=lr, epochs=epochs, seed=seed), torch.randperm(44)[:30])
        for lr, epochs, seed in ((0.05, 4, 0), (0.01, 2, 1), (0.01, 4, 1), (0.005, 4, 2))
    ]
    points[3] = replace(points[3], config=replace(points[3].config, schedule="constant", head_lr_factor=0.3))
    alone = [born(method, seed=p.config.seed) for p in points]
    for model, p in zip(alone, points, strict=True):
        fit(model, Rows(x, y, p.rows), None, p.config, progress=False)
    side_by_side = [born(method, seed=p.config.seed) for p in points]
    stack = Stack(side_by_side)
    assert train(stack, x, y, points) == [True] * 4
    stack.write_back()
    for a, b in zip(alone, side_by_side, strict=True):
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    rows = [torch.randperm(44)[:20] for _ in points]
    right = [m(x.rows(r)).argmax(1) == y[r] for m, r in zip(alone, rows, strict=True)]
    expected = [100 * float(r.double().mean()) for r in right]
    assert scores(stack, x, y, rows, batch_size=7) == pytest.approx(expected)


def test_other_tasks_and_other_numbers_of_classes() -> None:
    x = features()
    labels = torch.stack([torch.arange(44) % c for c in (3, 7, 5)])
    points = [Point(replace(CONFIG, lr=0.02, seed=s), torch.arange(40)) for s in range(3)]
    models = [born(METHODS["bypass"], c, s) for s, c in enumerate((3, 7, 5))]
    alone = [born(METHODS["bypass"], c, s) for s, c in enumerate((3, 7, 5))]
    for model, y, p in zip(alone, labels, points, strict=True):
        fit(model, Rows(x, y, p.rows), None, p.config, progress=False)
    stack = Stack(models)
    assert train(stack, x, labels, points) == [True] * 3
    out = stack(x)
    for i, (model, c) in enumerate(zip(alone, (3, 7, 5), strict=True)):
        torch.testing.assert_close(out[i, :, :c], model(x), rtol=1e-8, atol=1e-8)
        assert (out[i, :, c:] == -torch.inf).all()
    stack.write_back()
    for model, other in zip(models, alone, strict=True):
        torch.testing.assert_close(model(x), other(x), rtol=1e-8, atol=1e-8)


def test_a_point_that_diverges_does_not_disturb_the_others() -> None:
    x, y = features(), torch.arange(44) % 5
    rows = torch.arange(40)
    good = Point(replace(CONFIG, lr=0.01), rows)
    wild = Point(replace(CONFIG, lr=1e200), rows)
    models, alone = [born(METHODS["bypass"]) for _ in range(3)], born(METHODS["bypass"])
    stack = Stack(models)
    assert train(stack, x, y, [good, wild, good]) == [True, False, True]
    fit(alone, Rows(x, y, rows), None, good.config, progress=False)
    torch.testing.assert_close(stack(x)[2], alone(x), rtol=1e-8, atol=1e-8)


def test_what_does_not_stack() -> None:
    with pytest.raises(MethodError, match=r"adapter 1 has another shape than the first"):
        Stack([born(rt.Bypass(rt.Adapter(4))), born(rt.Bypass(rt.Adapter(5)))])
    with pytest.raises(MethodError, match="each method needs a stack of its own"):
        Stack([born(rt.Bypass()), born(rt.Bypass(rt.Adapter(5)))])
    with pytest.raises(MethodError, match="no clipping"):
        Point(replace(CONFIG, clip=1.0), torch.arange(3))
    with pytest.raises(MethodError, match="no mean of the weights"):
        Point(replace(CONFIG, ema=0.9), torch.arange(3))
    stack = Stack([born(rt.Bypass()) for _ in range(2)])
    with pytest.raises(MethodError, match="share the number of examples"):
        train(stack, features(), torch.zeros(44), [Point(CONFIG, torch.arange(n)) for n in (8, 16)])
    assert isinstance(stack.model, nn.Module)
