"""The side paths of others, against their formulas in numpy, and VQT against the frozen blocks themselves."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import adapt, plain_features, shake
from tiny import TINY, small
from torch import Tensor

import restuning as rt
from restuning.errors import MethodError
from restuning.methods import from_dict, to_dict
from restuning.side.features import ALL, FIRST, Features

VIT = TINY["timm-vit"]


def array(x: Tensor) -> Any:
    return x.detach().numpy()


def ln(x: Any, norm: Any = None, eps: float = 1e-5) -> Any:
    t = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return t if norm is None else t * array(norm.weight) + array(norm.bias)


def linear(x: Any, m: Any) -> Any:
    return x @ array(m.weight).T + (0 if m.bias is None else array(m.bias))


def softmax(x: Any, axis: int = -1) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def gelu(x: Any) -> Any:
    return array(torch.nn.functional.gelu(torch.from_numpy(x)))


def attention(a: Any, x: Any, causal: bool) -> Any:
    q, k, v = np.split(linear(ln(x, a.norm), a.qkv), 3, -1)
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    return linear(softmax(scores) @ v, a.up)


def last(side: Any, xs: list[Any], causal: bool) -> Any:
    change = 0.0
    for i, a in enumerate(side.attentions):
        change = change + attention(a, sum(xs[: i + 1]) + change, causal)
    return xs[-1] + change


def mist(side: Any, xs: list[Any], causal: bool) -> Any:
    change = 0.0
    for a in side.attentions:
        change = change + attention(a, sum(map(ln, xs)) + change, causal)
    return xs[-1] + change


def losa(side: Any, xs: list[Any], causal: bool) -> Any:
    change = 0.0
    for m, x in zip(side.mixers, xs, strict=True):
        t = ln(x + change, m.norm)
        slots = gelu(softmax(linear(t, m.gather), 1).swapaxes(1, 2) @ t)
        change = change + linear(gelu(linear(t, m.down)), m.up) + array(m.scale) * (softmax(linear(t, m.give)) @ slots)
    return xs[-1] + change


def unipt(side: Any, xs: list[Any], causal: bool) -> Any:
    q = linear(np.maximum(xs[-1], 0), side.query)
    merged, gates = [], []
    for down, x in zip(side.down, xs, strict=True):
        h = linear(np.maximum(x, 0), down)
        weights = np.maximum(q @ h.swapaxes(1, 2), 0)
        merged.append(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-8) @ h + h.mean(1, keepdims=True))
        gates.append(linear(q.mean(1) * h.mean(1), side.gate)[:, 0])
    weights = softmax(np.stack(gates), 0)[..., None, None]
    return xs[-1] + linear(np.maximum((weights * np.stack(merged)).sum(0), 0), side.up)


def sherl(side: Any, xs: list[Any], causal: bool) -> Any:
    hs = [linear(x, down) for down, x in zip(side.down, xs, strict=True)]
    means = np.stack([h.mean(1) / np.linalg.norm(h.mean(1), axis=-1, keepdims=True) for h in hs])
    cosines = np.einsum("lbw,mbw->blm", means, means)
    redundancy = (cosines.sum(-1) - 1) / (len(hs) - 1)
    weights = softmax(-array(side.sharpness) * redundancy)
    s = sum(weights[:, i, None, None] * h for i, h in enumerate(hs))
    q = linear(xs[-1], side.query)
    u = s + softmax(q @ s.swapaxes(1, 2) / q.shape[-1] ** 0.5) @ s
    return xs[-1] + linear(np.maximum(ln(u, side.norm), 0), side.up)


WRITTEN_OUT = {"last": last, "mist": mist, "losa": losa, "unipt": unipt, "sherl": sherl}


@pytest.mark.parametrize("method", WRITTEN_OUT)
@pytest.mark.parametrize("name", ["timm-vit", "gemma3"])
def test_paths_are_their_formulas(name: str, method: str) -> None:
    tiny = TINY[name]
    tuned = shake(adapt(tiny, small(method), None, torch.float64))
    inputs = {k: v for k, v in tiny.inputs(dtype=torch.float64).items() if k != "attention_mask"}
    xs = [array(x) for x in plain_features(tiny, tuned.backbone, inputs)]
    side = tuned.adapters["default"].side
    expected = WRITTEN_OUT[method](side, xs, name == "gemma3")
    np.testing.assert_allclose(array(side(tuned.features(**inputs))), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["last", "mist", "losa"])
def test_at_initialisation_they_are_the_last_layer(method: str) -> None:
    tuned = adapt(VIT, small(method), None)
    features = tuned.features(**VIT.inputs())
    assert torch.equal(tuned.adapters["default"].side(features), features.last)


def test_queries_of_vqt_pass_the_frozen_blocks() -> None:
    """A query that is equal to a token comes out as that token does: it attends to the same keys and values."""
    tuned = adapt(VIT, "vqt", dtype=torch.float64)
    features = tuned.features(**VIT.inputs(1, torch.float64))
    side = tuned.adapters["default"].side
    with torch.no_grad():
        for layer in range(len(side.prompts)):
            side.prompts[layer, 0] = features.layers[layer][0, 2]
    width = features.last.shape[-1]
    out = side(features)[0].split(width)
    for layer, read in enumerate(out[1:], 1):
        np.testing.assert_allclose(array(read), 0.3 * ln(array(features.layers[layer][0, 2])), rtol=1e-6, atol=1e-6)
    assert not any("fc1" in name for name in tuned.adapters.state_dict()), "the frozen blocks are not saved with it"


def test_settings_that_make_no_sense() -> None:
    for data, words in (
        ({"kind": "last", "rank": 6, "heads": 4}, r"Last\(rank=6\): expected a multiple of its 4 heads"),
        ({"kind": "mist", "depth": 0}, r"Mist\(depth=0\)"),
        ({"kind": "losa", "slots": 0}, r"Losa\(slots=0\)"),
        ({"kind": "unipt", "width": 0}, r"UniPt\(width=0\)"),
        ({"kind": "vqt", "queries": 0}, r"Vqt\(queries=0\)"),
        ({"kind": "linearall", "last": 0}, r"LinearAll\(last=0\)"),
        ({"kind": "bypassquery", "readout_last": 0}, r"readout_last=0\)"),
    ):
        with pytest.raises(MethodError, match=words):
            from_dict(data)
    for method in WRITTEN_OUT:
        assert from_dict(to_dict(rt.METHODS[method])) == rt.METHODS[method]


@pytest.mark.parametrize("last", [1, 2])
def test_a_read_out_of_fewer_layers(last: int) -> None:
    """What the head reads is that part of what a read-out of all layers gives it."""
    inputs = VIT.inputs(dtype=torch.float64)
    every = adapt(VIT, rt.LinearAll(), None, torch.float64)
    few = adapt(VIT, rt.LinearAll(last=last), None, torch.float64)
    first, mean = every(**inputs).unflatten(-1, (2, -1, 32)).unbind(1)
    expected = torch.cat([first[:, -last:].flatten(1), mean[:, -last:].flatten(1)], -1)
    torch.testing.assert_close(few(**inputs), expected)
    assert len(few.request.layers) == last
    path = rt.BypassQuery(width=8, stages=2, queries=3, heads=2, readout_last=last)
    out = adapt(VIT, path, None, torch.float64)(**inputs)
    torch.testing.assert_close(out[:, : -3 * 8], expected)


def test_padding_that_a_batch_shares_is_left_out() -> None:
    """At the end alone, and nothing where a mask is of more tokens than are there."""
    x, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]])
    features = Features({0: x, 1: -x}, ALL, mask)
    short = features.trimmed()
    assert torch.equal(short.layers[1], -x[:, :3]) and torch.equal(short.mask, mask[:, :3])
    assert torch.equal(features.rows([0]).trimmed().layers[0], x[:1, :2])
    for whole in (Features({0: x}, ALL), Features({0: x[:, :1]}, FIRST, mask)):
        assert whole.trimmed() is whole
