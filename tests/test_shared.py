"""A thousand tasks: what they share is worked on once, trained on some of them, and never changed by another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapt, plain_features, shake
from tiny import TINY
from torch import Tensor
from torch.nn import functional as F

import restuning as rt
from restuning.backbones.load import describe_backbone
from restuning.cli.main import main
from restuning.data.objective import objective
from restuning.errors import CheckpointError, MethodError
from restuning.features.bank import Bank, FromBank, FromFeatures
from restuning.features.together import train_together
from restuning.side.query import SharedQueryNet
from restuning.training.config import TrainConfig, data_order
from restuning.training.shared import give_shared, read_shared, write_shared

VIT = TINY["timm-vit"]
SHARED = rt.BypassQuery(width=8, stages=2, queries=3, heads=2, shared=True)


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov2-registers", "bert", "gemma3"])
def test_the_path_is_its_formula(name: str) -> None:
    """By torch's own attention, image by image; with prefix tokens and with padding."""
    tiny = TINY[name]
    tuned = shake(adapt(tiny, SHARED, dtype=torch.float64)).eval()
    inputs = tiny.inputs(dtype=torch.float64)
    features = [normed(x) for x in plain_features(tiny, tuned.backbone, inputs)]
    mask = inputs.get("attention_mask", torch.ones(features[0].shape[:2])).bool()
    adapter = tuned.adapters["default"]
    side, prefix, rows = adapter.side, tuned.sites.info.grid or 0, []
    for i in range(len(mask)):
        seen = mask[i]
        t = [x[i][seen] for x in features]
        q = side.queries
        for j, run in enumerate(([0, 1], [2]) if len(t) == 3 else ([0, 1], [2, 3])):
            g = normed(sum(t[k] @ side.stages.down[k] for k in run))
            k, v = (g @ side.keys_values[j]).chunk(2, -1)
            a, heads = side.attentions[j], []
            w = F.linear(normed(q), a.q.weight, a.q.bias)
            for h in range(2):
                cut = slice(4 * h, 4 * h + 4)
                heads.append(F.scaled_dot_product_attention(w[None, :, cut], k[None, :, cut], v[None, :, cut])[0])
            q = q + F.linear(torch.cat(heads, -1), a.proj.weight, a.proj.bias)
        first = [x[0] for x in t] if prefix else []
        means = [x[prefix:].mean(0) for x in t]
        rows.append(torch.cat([*(0.3 * x for x in (*first, *means)), normed(q).flatten()]))
    torch.testing.assert_close(tuned(**inputs), adapter.head(torch.stack(rows)), rtol=1e-8, atol=1e-8)


def many(count: int, method: Any = SHARED) -> rt.Tuned:
    tuned = rt.Tuned(VIT.backbone(torch.float64))
    for i in range(count):
        tuned.add_adapter(f"t{i}", method, 4 + i % 2)
    return shake(tuned).eval()


def test_tasks_together_are_tasks_alone_and_images_are_worked_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In stacks of any size, in one tuned model and in a predictor; another common part is another's."""
    from restuning.model import mixed, predictor

    monkeypatch.setattr(mixed, "CHUNK", 3)
    monkeypatch.setattr(predictor, "CHUNK", 3)
    tuned, x, calls = many(8), torch.randn(2, 3, 16, 16, dtype=torch.float64), []
    alone = {}
    for name in tuned.adapters:
        tuned.set_adapter(name)
        alone[name] = tuned(x).detach()
    prepare = SharedQueryNet.prepare
    monkeypatch.setattr(SharedQueryNet, "prepare", lambda self, f: calls.append(1) or prepare(self, f))
    tuned.set_adapter(list(alone))
    with torch.no_grad():
        together = tuned(x)
    assert len(tuned.stacks) == 3 and len(calls) == 1
    for name, y in alone.items():
        torch.testing.assert_close(together[name], y, rtol=1e-9, atol=1e-10)
    predicted = rt.Predictor.of(tuned).predict(x)
    assert len(calls) == 2
    for name, y in alone.items():
        torch.testing.assert_close(predicted[name], y, rtol=1e-9, atol=1e-10)
    side = tuned.adapter("t7").side
    assert isinstance(side, SharedQueryNet)
    side.set_shared({name: t + 1 for name, t in side.named_buffers()})
    tuned.set_adapter("t7")
    other = tuned(x).detach()
    tuned.set_adapter(list(alone))
    with torch.no_grad():
        together = tuned(x)
    torch.testing.assert_close(together["t7"], other, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(together["t0"], alone["t0"], rtol=1e-9, atol=1e-10)


def test_a_mixed_batch_is_its_rows() -> None:
    tuned, x = many(3), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    names = ["t2", "t0", "t1", "t2"]
    mixed = tuned(x, adapter_names=names)
    for row, image, name in zip(mixed, x, names, strict=True):
        tuned.set_adapter(name)
        torch.testing.assert_close(row[: tuned.adapter_config(name).num_classes], tuned(image[None])[0])


def test_a_task_is_its_queries_their_maps_and_its_head() -> None:
    adapter = adapt(VIT, SHARED, 10).adapter("default")
    own = sum(p.numel() for name, p in adapter.named_parameters() if not name.startswith("head"))
    assert own == 3 * 8 + 2 * 2 * (8 * 8 + 8)
    again = adapt(VIT, SHARED, 10).adapter("default")
    for a, b in zip(adapter.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b), "the same for all tasks"
    with pytest.raises(MethodError, match="a stem is not"):
        rt.BypassQuery(shared=True, stem=True)
    with pytest.raises(MethodError, match="gates are not"):
        rt.BypassQuery(shared=True, readout="gated")


# ---- trained on many tasks


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("banks")
    tokens = "pca:12"
    for name in ("count", "location"):
        data = ["--data", f"sprites:{name}", "--train-size", "40", "--test-size", "12", "--quiet"]
        assert main(["bank", *data, "--tokens", tokens, "--out", str(folder / name)]) == 0
        tokens = f"pca:12:{folder / 'count' / 'components.safetensors'}"
    return [folder / "count", folder / "location"]


@pytest.fixture(scope="module")
def shared(banks: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("shared") / "shared.safetensors"
    assert main(["share", "--bank", *map(str, banks), "--epochs", "2", "--lr", "0.003", "--out", str(file)]) == 0
    return file


def models(banks: list[Path]) -> tuple[list[FromFeatures], list[Any]]:
    found, data = [], []
    for i, path in enumerate(banks):
        bank = Bank(path)
        torch.manual_seed(i)
        tuned = bank.tuned(describe_backbone("restuning-micro"))
        source = bank.source()
        tuned.add_adapter("default", bank.fitted(rt.METHODS["bypass-query-shared"]), len(source.classes))
        assert bank.components is not None
        tuned.adapter("default").set_components(bank.components.bases)
        found.append(FromFeatures(tuned))
        data.append(FromBank(bank, source.train).kept())
    return found, data


def test_training_together_is_adamw_on_the_sum_of_the_losses(banks: list[Path]) -> None:
    """Two steps, written out: one optimizer of torch's over everything, the gradient that of the sum."""
    config = TrainConfig(epochs=1, lr=0.01, batch_size=20, schedule="constant", warmup_epochs=0)
    ours, data = models(banks)
    state = train_together(ours, data, [objective()] * 2, config)
    theirs, _ = models(banks)
    nets = [net for m in theirs for net in m.modules() if isinstance(net, SharedQueryNet)]
    common = [t.clone().requires_grad_() for t in nets[0].shared()]
    for net in nets:
        for store, tensors in ((net.stages.down, common), (net.keys_values, common[len(net.path) :])):
            for name, t in zip(list(store._buffers), tensors, strict=False):
                store._buffers[name] = t
    own = [p for m in theirs for p in m.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in (*own, *common) if (p.ndim > 1) is big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for step in range(2):
        loss: Any = 0
        for i, (model, rows) in enumerate(zip(theirs, data, strict=True)):
            features, labels = rows.__getitems__(data_order(40, 20, i, 0)[step])
            loss = loss + F.cross_entropy(model(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for t, (name, found) in zip(common, ((n, t) for n, t in state.items() if "basis" not in n), strict=True):
        torch.testing.assert_close(found, t.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_task_of_a_file_learns_its_own_part_alone(banks: list[Path], shared: Path, tmp_path: Path) -> None:
    """Trained alone, in a sweep and from images: what is shared is that of the file, to the bit."""
    method = ["--method", "bypass-query-shared", "--shared", str(shared), "--epochs", "1", "--lr", "0.002"]
    assert main(["train", "--bank", str(banks[1]), *method, "--quiet", "--out", str(tmp_path / "one")]) == 0
    assert main(["sweep", "--bank", str(banks[1]), *method, "--seeds", "0", "--out", str(tmp_path / "s")]) == 0
    data = ["--data", "sprites:location", "--train-size", "40", "--test-size", "12"]
    assert main(["train", *data, *method, "--quiet", "--out", str(tmp_path / "live")]) == 0
    state = read_shared(shared)
    begun, _ = models(banks[:1])
    for folder in ("one", "s/bypass-query-shared-seed0", "live"):
        tuned = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), tmp_path / folder)
        buffers = dict(tuned.adapters["default"].side.named_buffers())
        assert buffers.keys() == state.keys()
        assert all(torch.equal(buffers[name], t) for name, t in state.items())
    changed = [n for n, t in begun[0].tuned.adapters["default"].side.named_buffers() if not torch.equal(t, state[n])]
    assert {n.split(".")[-2] for n in changed} == {"down", "keys_values"}, "all of it was trained, but the components"
    one, live = (json.loads((tmp_path / f / "result.json").read_text()) for f in ("one", "live"))
    assert one["test_accuracy"] == pytest.approx(live["test_accuracy"], abs=9)


def test_what_does_not_fit_is_told(
    banks: list[Path], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = read_shared(shared)
    other = tmp_path / "other.safetensors"
    adapter = adapt(VIT, SHARED, 3).adapter("default")
    with pytest.raises(CheckpointError, match="shared weights of other sizes: given are"):
        give_shared(adapter, shared)
    with pytest.raises(CheckpointError, match="has none"):
        adapt(VIT, "res-tuning", 3).adapter("default").set_shared(state)
    write_shared(other, {**state, "stages.basis_0": -state["stages.basis_0"]})
    run = ["train", "--bank", str(banks[0]), "--method", "bypass-query-shared", "--epochs", "1", "--out"]
    assert main([*run, str(tmp_path / "a"), "--shared", str(other)]) == 2
    assert "was trained on other components than the bank's" in capsys.readouterr().err
    assert main([*run, str(tmp_path / "b"), "--shared", str(tmp_path / "none")]) == 2
    assert "holds no shared weights" in capsys.readouterr().err
    own = tmp_path / "own"
    data = ["--data", "digits", "--train-size", "20", "--test-size", "10", "--quiet", "--tokens", "pca:12"]
    assert main(["bank", *data, "--out", str(own)]) == 0
    assert main(["share", "--bank", str(banks[0]), str(own), "--out", str(tmp_path / "c")]) == 2
    assert f"{own} holds other components than {banks[0]}" in capsys.readouterr().err
    assert main(["share", "--bank", str(own), "--method", "linear-all", "--out", str(tmp_path / "c")]) == 2
    assert "shared by the paths of bypass-query-shared" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    write_shared(other, {**state, "keys_values.0": state["keys_values.0"] / 0})
    with pytest.raises(CheckpointError, match="not finite"):
        read_shared(other)
