"""Many adapters at once: each says what it says alone, on shared features and in mixed batches."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import HIERARCHIES, NEIGHBOURS, REFUSED, TINY, small
from torch import Tensor, nn

import restuning as rt
from restuning.errors import MethodError
from restuning.model import mixed as many

ALIKE = HIERARCHIES.keys() - {"timm-convnext", "timm-resnet", "timm-swin"}
PAIRS = [
    (name, method)
    for name in TINY
    for method in rt.METHODS
    if name not in ALIKE and method not in ("full", *REFUSED.get(name, {}))
]

BESIDE = (
    "side-tuning",
    "lst",
    *NEIGHBOURS,
    *(name for name in rt.METHODS if name.startswith(("linear", "bypass", "ladder"))),
)


def shaken(tuned: rt.Tuned) -> rt.Tuned:
    """Away from birth, so that every tuner acts."""
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned


def several(name: str, method: Any, classes: tuple[int, ...] = (5, 5, 7), dtype: torch.dtype = torch.float64) -> Any:
    tiny = TINY[name]
    tuned = rt.Tuned(tiny.backbone(dtype), anatomy=tiny.anatomy)
    method = small(method, tuned.family) if isinstance(method, str) else method
    for i, c in enumerate(classes):
        tuned.add_adapter(f"task{i}", method, c)
    return shaken(tuned).eval()


def alone(tuned: rt.Tuned, name: str | None, inputs: dict[str, Tensor]) -> Any:
    if name is None:
        with tuned.disable_adapter():
            said = tuned(**inputs)
        if not isinstance(said, Tensor):
            if tuned.sites.pool == "last":
                ends = inputs["attention_mask"].sum(1) - 1
                return said[0][range(len(ends)), ends]
            pooled = ("CLIPVisionModel", "SiglipVisionModel", "SwinModel")
            plain = said[0].ndim == 3 and type(tuned.backbone).__name__ not in pooled
            said = said[0][:, 0] if plain else said.pooler_output.flatten(1)
        return said
    tuned.set_adapter(name)
    return tuned(**inputs)


def grads(tuned: rt.Tuned) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in tuned.adapters.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    return found


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_mixed_batch_is_its_rows_one_by_one(name: str, method: str) -> None:
    """Outputs and gradients, in float64; adapters that share no row of the batch, and rows without one."""
    tuned, inputs = several(name, method), TINY[name].inputs(6, torch.float64)
    rows = ["task2", "task0", None, "task1", "task0", "task2"]
    loose = {"rtol": 1e-6, "atol": 1e-7} if name.startswith("hf") else {"rtol": 1e-9, "atol": 1e-10}
    mixed = tuned(**inputs, adapter_names=rows)
    seed = torch.randn_like(mixed)
    (mixed.masked_fill(mixed.isinf(), 0) * seed).sum().backward()
    got = grads(tuned)
    for i, row in enumerate(rows):
        y = alone(tuned, row, inputs)[i]
        torch.testing.assert_close(mixed[i, : len(y)], y, **loose)
        assert (mixed[i, len(y) :] == -torch.inf).all()
        if row is not None:
            (y * seed[i, : len(y)]).sum().backward()
    expected = grads(tuned)
    assert got.keys() == expected.keys() and got
    for key, g in expected.items():
        torch.testing.assert_close(got[key], g, **loose, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("name", "method"), [pair for pair in PAIRS if pair[1] in BESIDE])
def test_tasks_on_one_pass_say_what_they_say_alone(name: str, method: str) -> None:
    tuned, inputs = several(name, method), TINY[name].inputs(2, torch.float64)
    names = list(tuned.adapters)
    tuned.set_adapter(names)
    with torch.no_grad():
        together, embedded = tuned(**inputs), tuned.embed(**inputs)
        for name_, y in together.items():
            torch.testing.assert_close(y, alone(tuned, name_, inputs), rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(tuned.embed(**inputs), embedded[name_], rtol=1e-9, atol=1e-10)
    assert [y.shape[1] for y in together.values()] == [5, 5, 7]
    assert (len(tuned.stacks) == 1) == (method != "side-tuning")


def test_tasks_come_and_go_and_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods, widths and class counts of their own, in stacks; an addition moves one stack, a change is seen."""
    monkeypatch.setattr(many, "CHUNK", 2)
    tuned, inputs = several("timm-vit", rt.resize(rt.METHODS["bypass"], 3)), TINY["timm-vit"].inputs(2, torch.float64)
    for i, (method, classes) in enumerate({"bypass-none": 3, "linear": 4, "lst": 5}.items()):
        tuned.add_adapter(f"more{i}", small(method), classes)
    shaken(tuned)

    def check() -> None:
        names = list(tuned.adapters)
        tuned.set_adapter(names)
        with torch.no_grad():
            together = tuned(**inputs)
            for name in names:
                torch.testing.assert_close(together[name], alone(tuned, name, inputs), rtol=1e-9, atol=1e-10)

    check()
    first, second = tuned.stacks[0], len(tuned.stacks)
    tuned.add_adapter("late", small("bypass"), 9)
    check()
    assert tuned.stacks[0] is first and list(first.readers) == ["task0", "task1"] and second == 1
    assert [list(s.readers) for s in tuned.stacks[1:]] == [["task2", "late"]]
    with torch.no_grad():
        tuned.get_parameter("adapters.task1.head.weight").mul_(2.0)
    check()
    assert all(s is not first for s in tuned.stacks)
    tuned.delete_adapter("task0")
    check()
    tuned.float().double()
    check()


def test_stacks_see_every_change() -> None:
    tuned, inputs = several("timm-vit", small("bypass"), (5, 5)), TINY["timm-vit"].inputs(2, torch.float64)
    task: Any = tuned.adapters["task0"]

    def replace_head() -> None:
        task.head = nn.Linear(32, 5).double()

    def assign() -> None:
        task.load_state_dict({k: v + 0.1 for k, v in task.state_dict().items()}, assign=True)

    def data() -> None:
        task.head.weight.data = torch.randn_like(task.head.weight)

    for change in (lambda: None, replace_head, assign, data, lambda: nn.init.normal_(task.side.gate)):
        change()
        tuned.set_adapter(["task0", "task1"])
        with torch.no_grad():
            together = tuned(**inputs)["task0"]
            torch.testing.assert_close(together, alone(tuned, "task0", inputs), rtol=1e-9, atol=1e-10)
    with torch.inference_mode():
        tuned.add_adapter("task2", small("bypass"), 5)
        tuned.set_adapter(["task0", "task1", "task2"])
        assert set(tuned(**inputs)) == {"task0", "task1", "task2"}


def test_adapters_without_parameters() -> None:
    tuned, inputs = rt.Tuned(TINY["timm-vit"].backbone()).eval(), TINY["timm-vit"].inputs(2)
    for name in "ab":
        tuned.add_adapter(name, "linear")
    pooled = tuned(**inputs)
    assert torch.equal(tuned(**inputs, adapter_names=["a", "b"]), pooled)
    tuned.set_adapter(["a", "b", "a"])
    with torch.no_grad():
        assert list(tuned(**inputs)) == ["a", "b"] and torch.equal(tuned(**inputs)["b"], pooled)
    with pytest.raises(MethodError, match="0 names for a batch of 0"):
        tuned(inputs["x"][:0], adapter_names=[])


@pytest.mark.parametrize("method", [m for m in rt.METHODS if m != "full"])
def test_autocast_of_many(method: str) -> None:
    tuned, inputs = several("timm-vit", small(method), (5, 5), torch.float32), TINY["timm-vit"].inputs(4)
    rows = ["task0", "task1", "task1", "task0"]
    y = tuned(**inputs, adapter_names=rows)
    with torch.autocast("cpu", torch.bfloat16):
        z = tuned(**inputs, adapter_names=rows)
        z.square().sum().backward()
        if tuned.reads_features:
            tuned.set_adapter(["task0", "task1"])
            with torch.no_grad():
                assert torch.equal(tuned(**inputs)["task0"][0].argmax(), tuned(**inputs)["task0"][0].argmax())
    assert (z - y).norm() < 0.05 * y.norm()


def test_a_mixed_batch_trains_and_says_what_is_wrong() -> None:
    tuned, inputs = several("timm-vit", small("lora")), TINY["timm-vit"].inputs(4, torch.float64)
    tuned.add_adapter("side", small("bypass"), 2)
    out = tuned(**inputs, adapter_names=["task0", "side", "task2", None], labels=torch.tensor([1, 0, 6, 2]))
    out["loss"].backward()
    assert out["logits"].shape == (4, 32), "the bare backbone says 32 numbers"
    moved = {name.split(".")[0] for name, p in tuned.adapters.named_parameters() if p.grad is not None}
    assert moved == {"task0", "side", "task2"}
    with pytest.raises(MethodError, match="adapter_names has 3 names for a batch of 4: expected one for every row"):
        tuned(**inputs, adapter_names=["task0"] * 3)
    with pytest.raises(MethodError, match="no adapter named 'task9'"):
        tuned(**inputs, adapter_names=["task9"] * 4)
    with tuned.disable_adapter():
        assert torch.equal(tuned(**inputs, adapter_names=["task0"] * 4), tuned.backbone(**inputs))
    tuned.add_adapter("tokens", small("lora"), 9, pool="none")
    mixed = tuned(**inputs, adapter_names=["tokens"] * 4)
    tuned.set_adapter("tokens")
    assert mixed.shape == (4, 5, 9) and torch.allclose(mixed, tuned(**inputs), rtol=1e-9)
    with pytest.raises(MethodError, match="mixes pooled outputs with outputs of every token"):
        tuned(**inputs, adapter_names=["tokens", "task0", "side", None])


def test_own_tuners_mix_too() -> None:
    """They may do what cannot be stacked: each takes a pass of its own."""

    class Own(nn.Module):
        def __init__(self, info: rt.SiteInfo) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(info.out_features))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y * self.w if self.w.sum().item() > 0 else y + self.w

    tuned, inputs = several("timm-vit", rt.Residual({"ffn": Own})), TINY["timm-vit"].inputs(4, torch.float64)
    rows = ["task1", "task0", "task2", "task1"]
    mixed = tuned(**inputs, adapter_names=rows)
    for i, row in enumerate(rows):
        y = alone(tuned, row, inputs)[i]
        torch.testing.assert_close(mixed[i, : len(y)], y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["bypass", "res-tuning"])
def test_threads_do_not_see_one_another(method: str) -> None:
    """Hooks are on a backbone for all of its callers: two tuned models on it, each in a thread, take turns."""
    tiny, backbone = TINY["timm-vit"], TINY["timm-vit"].backbone()
    tuned = [shaken(rt.adapt(backbone, method, 3)).eval() for _ in range(2)]
    inputs = [tiny.inputs(2 + i) for i in range(2)]
    with torch.no_grad():
        expected = [t(**x) for t, x in zip(tuned, inputs, strict=True)]

    def work(i: int) -> int:
        with torch.no_grad():
            return sum(not torch.equal(tuned[i](**inputs[i]), expected[i]) for _ in range(100))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(work, range(2))) == [0, 0]
    finally:
        sys.setswitchinterval(before)


def test_targets_of_several_widths_in_one_batch() -> None:
    tiny = TINY["timm-vit"]
    tuned = rt.Tuned(tiny.backbone())
    for name, width in (("a", 2), ("b", 3)):
        tuned.add_adapter(name, "linear", width, kind="regression")
    with pytest.raises(MethodError, match="several widths"):
        tuned(**tiny.inputs(2), labels=torch.zeros(2, 3), adapter_names=["a", "b"])
