"""The predictor: what each adapter gives alone, from any number of threads, while others come and go."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import COMPILES
from safetensors.torch import load_file, save_file
from tiny import REFUSED, TINY, small
from torch import Tensor

import restuning as rt
from restuning.errors import CheckpointError, MethodError

FAMILIES = ("timm-vit", "bert", "timm-convnext", "hf-dinov2-registers")
KINDS = ("bypass", "linear", "lora", "ssf")


def many(name: str, methods: Any, classes: tuple[int, ...] = (5, 7)) -> rt.Tuned:
    """Adapters away from initialisation, so that every tuner acts."""
    tiny = TINY[name]
    tuned = rt.Tuned(tiny.backbone(), anatomy=tiny.anatomy)
    for method in methods:
        for i, c in enumerate(classes):
            tuned.add_adapter(f"{method}-{i}", small(method, tuned.family), c)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned.eval()


def every(name: str) -> list[str]:
    return [method for method in rt.METHODS if method not in ("full", *REFUSED.get(name, {}))]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_predictor_gives_what_each_adapter_gives_alone(name: str) -> None:
    """Every method, all tasks of all items, and a task of its own for every item; one pass serves all that read
    features, and one more each kind that acts inside the backbone."""
    tuned, inputs = many(name, every(name)), TINY[name].inputs(4)
    predictor, names = rt.Predictor.of(tuned), list(tuned.adapters)
    together, embedded = predictor.predict(inputs), predictor.embed(inputs)
    rows = [names[(7 * i + 3) % len(names)] for i in range(4)]
    mixed = predictor.predict_rows(inputs, rows)
    assert list(together) == names
    inside = 0
    for task in names:
        tuned.set_adapter(task)
        inside += not tuned.reads_features and task.endswith("0")
        with torch.no_grad():
            expected = tuned(**inputs)
            torch.testing.assert_close(together[task], expected, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(embedded[task], tuned.embed(**inputs), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(predictor.classify(task, embedded[task]), expected, rtol=1e-4, atol=2e-5)
        for i in (i for i, row in enumerate(rows) if row == task):
            torch.testing.assert_close(mixed[i], expected[i], rtol=1e-4, atol=2e-5)
    assert predictor.answer(inputs, dict.fromkeys(names, range(4))).passes == 1 + inside


def test_a_snapshot_never_changes() -> None:
    tuned, inputs = many("timm-vit", KINDS), TINY["timm-vit"].inputs(3)
    predictor = rt.Predictor.of(tuned)
    before = predictor.predict(inputs)
    tuned.set_adapter("lora-1")
    tuned.delete_adapter("bypass-0")
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(1.0)
    with tuned.disable_adapter():
        after = predictor.predict(inputs)
    assert all(torch.equal(after[task], before[task]) for task in before)
    with pytest.raises(AttributeError):
        predictor.readers = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        predictor.readers["x"] = None  # type: ignore[index]


def test_others_that_come_and_go_change_no_bit(tmp_path: Path) -> None:
    tuned, inputs = many("timm-vit", every("timm-vit")), TINY["timm-vit"].inputs(3)
    for method in ("bypass", "lora", "linear"):
        tuned.add_adapter(f"late-{method}", small(method), 30)
        tuned.save_pretrained(tmp_path / method, f"late-{method}")
        tuned.delete_adapter(f"late-{method}")
    first = predictor = rt.Predictor.of(tuned)
    before = {task: predictor.predict(inputs, [task])[task] for task in predictor.tasks}
    for i in range(6):
        predictor = predictor.with_adapter(f"more{i}", tmp_path / ("bypass", "lora", "linear")[i % 3])
    predictor = predictor.without("more1").without("more2").without("bypass-0")
    assert "more0" in predictor.tasks and "more0" not in first.tasks and "bypass-0" in first.tasks
    for task in before.keys() - {"bypass-0"}:
        assert torch.equal(predictor.predict(inputs, [task])[task], before[task]), task
    tuned.load_adapter(tmp_path / "bypass", "again")
    with torch.no_grad():
        torch.testing.assert_close(predictor.predict(inputs, ["more0"])["more0"], tuned(**inputs), rtol=1e-4, atol=1e-5)


def test_few_of_many_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven adapters in groups of two, one of each group: as alone, in half as many calls, and to the bit the same
    when another of a group has gone."""
    tuned, inputs = many("timm-vit", ("bypass",), (5,) * 7), TINY["timm-vit"].inputs(3)
    alone = {
        task: predict[task] for task in tuned.adapters if (predict := rt.Predictor.of(tuned).predict(inputs, [task]))
    }
    monkeypatch.setattr("restuning.model.predictor.CHUNK", 2)
    monkeypatch.setattr("restuning.model.groups.CHUNK", 2)
    predictor, asked = rt.Predictor.of(tuned), ["bypass-0", "bypass-3", "bypass-4", "bypass-6"]
    together = predictor.predict(inputs, asked)
    assert len(predictor.answer(inputs, dict.fromkeys(asked, range(3))).outputs) == 2
    for task in asked:
        torch.testing.assert_close(together[task], alone[task], rtol=1e-4, atol=1e-5)
    for i, row in enumerate(predictor.predict_rows(inputs, asked[1:])):
        torch.testing.assert_close(row, alone[asked[1 + i]][i], rtol=1e-4, atol=1e-5)
    fewer = predictor.without("bypass-2").without("bypass-1").predict(inputs, asked)
    assert all(torch.equal(fewer[task], together[task]) for task in asked)


def test_what_paths_have_in_common_is_in_memory_once(tmp_path: Path) -> None:
    """Of adapters of one kind, whether they were there at first or came later; what differs stays apart."""
    tuned, inputs = many("timm-vit", ("bypass-query-shared",), (5, 7, 3)), TINY["timm-vit"].inputs(3)
    name = "bypass-query-shared-"
    with torch.no_grad():
        next(tuned.adapter(f"{name}1").buffers()).add_(0.5)
    expected = rt.Predictor.of(tuned).predict(inputs)
    tuned.save_pretrained(tmp_path, f"{name}2")
    predictor = rt.Predictor.of(tuned, [f"{name}0", f"{name}1"]).with_adapter("later", tmp_path)
    first, other, later = (
        {id(b) for b in predictor.readers[task].adapter.buffers()} for task in (f"{name}0", f"{name}1", "later")
    )
    assert first == later and len(first - other) == 1
    found = predictor.predict(inputs)
    for task, as_before in ((f"{name}0", f"{name}0"), (f"{name}1", f"{name}1"), ("later", f"{name}2")):
        torch.testing.assert_close(found[task], expected[as_before], rtol=1e-4, atol=2e-5)


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_any_number_of_threads(tmp_path: Path) -> None:
    """8 threads, 4 kinds of adapter, others added and removed meanwhile: every answer is that of one thread, to the
    bit."""
    tuned, tiny = many("timm-vit", KINDS), TINY["timm-vit"]
    names = list(tuned.adapters)
    for method in KINDS:
        tuned.save_pretrained(tmp_path / method, f"{method}-0")
    held = [rt.Predictor.of(tuned)]
    batches = [tiny.inputs(1 + i)["x"] for i in range(4)]

    def answers(predictor: rt.Predictor, i: int) -> list[Tensor]:
        x = batches[i % 4]
        if i % 3 == 0:
            return [predictor.predict(x, [names[i % 8]])[names[i % 8]]]
        if i % 3 == 1:
            return list(predictor.predict(x, names).values())
        return predictor.predict_rows(x, [names[(i + k) % 8] for k in range(len(x))])

    expected = [answers(held[0], i) for i in range(24)]

    def ask(thread: int) -> int:
        wrong = 0
        for i in range(24):
            got = answers(held[0], (i + 3 * thread) % 24)
            same = zip(got, expected[(i + 3 * thread) % 24], strict=True)
            wrong += not all(torch.equal(a, b) for a, b in same)
        return wrong

    def change() -> None:
        for i in range(12):
            held[0] = held[0].with_adapter("new", tmp_path / KINDS[i % 4])
            held[0] = held[0].without("new")

    with switching_often(), ThreadPoolExecutor(9) as pool:
        changes, wrong = pool.submit(change), list(pool.map(ask, range(8)))
        changes.result()
    assert wrong == [0] * 8


def test_what_is_refused(tmp_path: Path) -> None:
    tuned, x = many("timm-vit", ("linear", "lora")), TINY["timm-vit"].inputs(2)["x"]
    predictor = rt.Predictor.of(tuned)
    before = predictor.predict(x)
    with pytest.raises(MethodError, match="no adapter named 'nobody': there is linear-0"):
        predictor.predict(x, ["nobody"])
    with pytest.raises(MethodError, match="1 tasks for a batch of 2"):
        predictor.predict_rows(x, ["linear-0"])
    with pytest.raises(MethodError, match="nothing to predict"):
        predictor.predict(x[:0])
    with pytest.raises(MethodError, match="no adapter named 'nobody'"):
        predictor.without("nobody")
    tuned.save_pretrained(tmp_path / "nan", "linear-0")
    file = tmp_path / "nan" / "adapter_model.safetensors"
    save_file({k: v.fill_(torch.nan) for k, v in load_file(file).items()}, file)
    full = rt.adapt(TINY["timm-vit"].backbone(), "full", 3)
    full.save_pretrained(tmp_path / "full")
    for folder, why in (("nan", "not finite"), ("full", "full fine-tuning changes the backbone")):
        with pytest.raises(CheckpointError, match=why):
            predictor.with_adapter("bad", tmp_path / folder)
    after = predictor.predict(x)
    assert all(torch.equal(after[task], y) for task, y in before.items())
    with torch.no_grad():
        assert torch.equal(rt.Predictor.of(full).predict(x)["default"], full.eval()(x)), "alone, it may be"
    full.train()
    with pytest.raises(MethodError, match="training mode"):
        rt.Predictor.of(full).predict(x)


def test_threads_that_share_a_choice_are_told() -> None:
    """Each chooses its own adapter and calls the model: the right answer, or an error, and never another's."""
    tuned, x = many("timm-vit", ("bypass", "lora")), TINY["timm-vit"].inputs(2)["x"]
    expected = rt.Predictor.of(tuned).predict(x)
    counts = {"right": 0, "wrong": 0, "told": 0}

    def work(name: str) -> None:
        for _ in range(60):
            try:
                tuned.set_adapter(name)
                with torch.no_grad():
                    right = torch.allclose(tuned(x), expected[name], rtol=1e-4, atol=1e-5)
                counts["right" if right else "wrong"] += 1
            except MethodError as error:
                assert "restuning.Predictor" in str(error)
                counts["told"] += 1

    with switching_often(), ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ("bypass-0", "lora-1")))
    assert counts["wrong"] == 0 and sum(counts.values()) == 120

    def other(run: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    tuned.set_adapter("bypass-0")
    other(lambda: tuned.set_adapter("lora-1"))
    with pytest.raises(MethodError, match="another thread has changed the active adapters"):
        tuned(x)
    tuned.set_adapter("bypass-0")
    with torch.no_grad():
        torch.testing.assert_close(other(lambda: tuned(x)), expected["bypass-0"], rtol=1e-4, atol=1e-5)

    hold = tuned.backbone.get_submodule("blocks.1").register_forward_hook(
        lambda *_: other(lambda: tuned.backbone(x)) and None
    )
    try:
        with pytest.raises(MethodError, match="another thread has hooks on it"):
            tuned(x)
    finally:
        hold.remove()


def test_a_compiled_predictor_gives_the_same(tmp_path: Path) -> None:
    """Of any batch and any tasks, from one graph and one for single items; adapters come and go."""
    from torch._dynamo.testing import CompileCounterWithBackend

    tuned = rt.Tuned(rt.load_backbone("restuning-micro"))
    for name in ("bypass", "linear", "lora"):
        tuned.add_adapter(name, name, 3)
        with torch.no_grad():
            for p in tuned.adapters[name].parameters():
                p.add_(0.05 * torch.randn_like(p))
    tuned.save_pretrained(tmp_path, "bypass")
    plain, counter = rt.Predictor.of(tuned.eval()), CompileCounterWithBackend("aot_eager")
    compiled = plain.compiled(backend=counter)
    for count, tasks in ((1, None), (2, None), (3, ["linear"]), (5, ["bypass", "lora"]), (4, None)):
        x = torch.randn(count, 3, 64, 64)
        expected, found = plain.predict(x, tasks), compiled.predict(x, tasks)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    later = compiled.with_adapter("other", tmp_path).without("bypass")
    torch.testing.assert_close(later.predict(x, ["other"])["other"], plain.predict(x)["bypass"], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2 or not COMPILES, "any number of items but one; older torch traces more often"
