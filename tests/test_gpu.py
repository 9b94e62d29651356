"""What only a GPU shows: there every method gives what it gives on a CPU, forwards, backwards, in every mode; and a run
that was trained on one serves on the other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapt, compiles, shake
from test_predictor import many
from test_stack import CONFIG, METHODS, born, features
from test_unbind import CASES, call_and_pieces, joint
from tiny import REFUSED, TINY, small
from torch import Tensor

import restuning as rt
from restuning.cli.main import main
from restuning.features.stacked import Point, scores, train
from restuning.hooks import attention
from restuning.model.stack import Stack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAMILIES = ("timm-vit", "hf-clip", "bert", "gemma3", "timm-convnext", "timm-resnet", "timm-swin")
MODES = ("shared", "compact", "recompute")
WIDER = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@pytest.fixture(autouse=True)
def _whole_mantissas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in TF32, torch's default, are rounded to ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def gradients(out: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out)
    grads = torch.autograd.grad(out, inputs, weight)
    return {"output": out.detach(), **{str(i): g for i, g in enumerate(grads)}}


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cuda() for name, t in inputs.items()}


def forward_and_gradients(tuned: rt.Tuned, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    tuned.zero_grad()
    logits = tuned(**inputs)
    logits.square().mean().backward()
    grads = {name: p.grad.clone().cpu() for name, p in tuned.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().clone().cpu(), **grads}


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-3) -> None:
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert (got[name] - t).norm() <= tolerance * t.norm() + 1e-6, name


@pytest.mark.parametrize(
    ("name", "method"), [(n, m) for n in FAMILIES for m in rt.METHODS if m not in REFUSED.get(n, {})]
)
def test_a_gpu_gives_what_a_cpu_gives(name: str, method: str) -> None:
    tiny = TINY[name]
    family = rt.find_sites(tiny.backbone(), tiny.anatomy).anatomy.family
    tuned, inputs = shake(adapt(tiny, small(method, family))).eval(), tiny.inputs()
    expected = forward_and_gradients(tuned, inputs)
    close(forward_and_gradients(tuned.cuda(), on_gpu(inputs)), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["res-tuning", "lora", "ssf", "prefix", "vpt-deep"])
def test_in_every_mode(method: str, mode: str) -> None:
    tiny = TINY["timm-vit"]
    plain = shake(adapt(tiny, small(method))).eval()
    tuned = adapt(tiny, small(method), memory=mode).eval()
    tuned.load_state_dict(plain.state_dict())
    inputs = tiny.inputs()
    rounded = 2e-2 if mode == "compact" else 1e-3
    close(forward_and_gradients(tuned.cuda(), on_gpu(inputs)), forward_and_gradients(plain, inputs), rounded)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("fast", [True, False], ids=["kernel", "reference"])
def test_the_merge_is_the_joint_attention(case: str, dtype: str, fast: bool) -> None:
    """The kernel's own log-sum-exp and its gradient, which have a path of their own there; beside double precision."""
    call, pieces, inputs = call_and_pieces(case, torch.float64)
    expected = gradients(joint(call, pieces), inputs)
    at: dict[int, Tensor] = {}

    def there(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if id(t) not in at:
            to = t.detach().cuda()
            at[id(t)] = to.to(getattr(torch, dtype)).requires_grad_() if t.is_floating_point() else to
        return at[id(t)]

    call = type(call)(*(there(part) for part in (call.q, call.k, call.v, call.mask)), call.causal, call.scale)
    found = gradients(
        attention.merged(call, [(there(k), there(v)) for k, v in pieces], fast), [there(t) for t in inputs]
    )
    for name, t in expected.items():
        assert (found[name].cpu().double() - t).norm() <= WIDER[dtype] * t.norm(), name


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_side_by_side(method: Any) -> None:
    x, y = features(), torch.arange(44) % 5
    points = [Point(replace(CONFIG, lr=lr, seed=seed), torch.arange(40)) for lr, seed in ((0.05, 0), (0.01, 1))]
    found = []
    for device in ("cpu", "cuda"):
        models = [born(method, seed=p.config.seed) for p in points]
        stack = Stack([m.to(device) for m in models])
        there = x.map(lambda t, device=device: t.to(device))
        assert train(stack, there, y.to(device), points) == [True] * 2
        stack.write_back()
        right = torch.tensor(scores(stack, there, y.to(device), [torch.arange(40, 44)] * 2))
        found.append([right, *(p.cpu() for m in models for p in m.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["timm-vit", "bert", "timm-convnext"])
def test_a_predictor(name: str) -> None:
    """All tasks of all items, and a task of its own for every item."""
    inputs = TINY[name].inputs(4)
    tuned = many(name, ("bypass", "linear", "lora", "ssf", "bypass-query"))
    names = list(tuned.adapters)
    expected = rt.Predictor.of(tuned).predict(inputs)
    predictor, rows = rt.Predictor.of(tuned.cuda()), [names[3 * i % len(names)] for i in range(4)]
    found, mixed = predictor.predict(on_gpu(inputs)), predictor.predict_rows(on_gpu(inputs), rows)
    for task, t in expected.items():
        torch.testing.assert_close(found[task].cpu(), t, rtol=1e-3, atol=1e-3)
    for i, row in enumerate(rows):
        torch.testing.assert_close(mixed[i].cpu(), expected[row][i], rtol=1e-3, atol=1e-3)


@compiles
@pytest.mark.parametrize("method", ["res-tuning", "bypass", "bypass-query"])
def test_compiled(method: str) -> None:
    tuned, inputs = shake(adapt(TINY["timm-vit"], small(method))).eval().cuda(), on_gpu(TINY["timm-vit"].inputs())
    with torch.no_grad():
        expected = tuned(**inputs)
        tuned.compile()
        torch.testing.assert_close(tuned(**inputs), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["res-tuning", "bypass", "bypass-query", "full"])
def test_trained_there_and_read_here(
    method: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "part:80,40:sprites:location", "--backbone", "restuning-micro"]
    out = tmp_path / "run"
    more = ["--method", method, "--epochs", "2", "--lr", "0.002", "--precision", precision]
    assert main(["train", *data, *more, "--out", str(out)]) in (None, 0)
    right = []
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        assert main(["evaluate", str(out), "--device", device, "--json"]) in (None, 0)
        right.append(json.loads(capsys.readouterr().out)["accuracy"])
    assert abs(right[0] - right[1]) <= 100 / 40  # one of them may lie between two classes
