"""A bank is what the backbone would have said: for every method that reads features, to the bit, whatever happens."""

import errno
import importlib
import json
import os
import random
import shutil
import sys
import time
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapt, as_features, plain_features, shake
from tiny import MORE, TINY, small
from torch import Tensor
from torch.nn import functional as F

import restuning as rt
from restuning.backbones.load import describe_backbone
from restuning.cli.main import main
from restuning.data import Preprocess, load_task
from restuning.errors import CheckpointError, RestuningError
from restuning.features.bank import Bank, FromBank, FromFeatures, build
from restuning.side.features import ALL, FIRST, TokenSelection

store = importlib.import_module("restuning.features.bank.build")
DATA = ["--data", "digits", "--train-size", "120", "--test-size", "40", "--quiet"]
READERS = [m for m in rt.METHODS if m != "full" and adapt(TINY["timm-vit"], small(m), 2).reads_features]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tokens of 120 + 40 digits, in several shards."""
    out = tmp_path_factory.mktemp("bank") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD_ROWS", 50)
        assert main(["bank", *DATA, "--tokens", "all", "--dtype", "float64", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("method", READERS)
def test_bank_is_live(method: str, bank: Path) -> None:
    """The same logits and gradients, with a backbone of which nothing but the tail is there."""
    if method == "side-tuning":
        with pytest.raises(CheckpointError, match=r"holds layers .*: the method reads the pixels too"):
            tuned = Bank(bank).tuned(describe_backbone("restuning-micro"))
            tuned.add_adapter("default", rt.SideTuning(rt.SmallCnn(4)), 10)
            Bank(bank).accepts(tuned)
        return
    if method == "vqt":
        with pytest.raises(CheckpointError, match="Vqt needs the backbone's weights"):
            tuned = Bank(bank).tuned(describe_backbone("restuning-micro"))
            tuned.add_adapter("default", method, 10)
            Bank(bank).accepts(tuned)
        return
    spec: Any = method
    if method in ("lst", "ladder-grid4"):
        spec = rt.Ladder(8, init="random", grid=2 if "grid" in method else None)
    opened = Bank(bank)
    torch.manual_seed(0)
    away = opened.tuned(describe_backbone("restuning-micro"))
    away.add_adapter("default", spec, 10)
    opened.accepts(away)
    backbone = rt.load_backbone("restuning-micro")
    live = rt.adapt(backbone, spec, 10)
    live.adapters.load_state_dict(shake(away).adapters.state_dict())
    model = FromFeatures(away)
    task = load_task("digits", train_size=120, test_size=40)
    preprocess = Preprocess.from_dict(opened.preprocessing)
    pixels = torch.stack([preprocess(task.train.item(i)) for i in (3, 60, 119)])
    features, labels = opened.rows("train").fetch([3, 60, 119])
    assert labels.tolist() == [task.train.labels[i] for i in (3, 60, 119)]
    a, b = model(features.map(torch.Tensor.float)), live(pixels)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    pairs = zip(away.adapters.named_parameters(), live.adapters.parameters(), strict=True)
    for (name, p), q in pairs:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert sum(p.numel() for p in away.backbone.parameters()) == 256, "a LayerNorm is all that is left"
    assert rt.count(away) == rt.count(live)


@pytest.mark.parametrize("name", ["timm-siglip", "hf-siglip"])
def test_a_bank_carries_the_pooler(name: str, tmp_path: Path) -> None:
    live = shake(adapt((TINY | MORE)[name], small("bypass"), 10)).eval()
    task = load_task("digits", train_size=20, test_size=10)
    preprocess = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3)
    build(live, task, preprocess, tmp_path, dtype="float64")
    with torch.device("meta"):
        described = (TINY | MORE)[name].build()
    away = Bank(tmp_path).tuned(described)
    away.add_adapter("default", small("bypass"), 10)
    away.adapters.load_state_dict(live.adapters.state_dict())
    pixels = torch.stack([preprocess(task.train.item(i)) for i in (0, 7)])
    features = Bank(tmp_path).rows("train").fetch([0, 7])[0]
    torch.testing.assert_close(away.from_features(features.map(torch.Tensor.float)), live(pixels), rtol=1e-4, atol=1e-5)


def test_fifty_steps_from_a_bank_are_fifty_live_ones(bank: Path) -> None:
    opened = Bank(bank)
    task = load_task("digits", train_size=120, test_size=40)
    preprocess = Preprocess.from_dict(opened.preprocessing)
    backbone = rt.load_backbone("restuning-micro").double()
    pixels = torch.stack([preprocess(task.train.item(i)) for i in range(8)]).double()
    labels = torch.tensor([task.train.labels[i] for i in range(8)])
    live = rt.adapt(backbone, "bypass", 10)
    away = opened.tuned(describe_backbone("restuning-micro").double())
    away.add_adapter("default", "bypass", 10)
    away.double().adapters.load_state_dict(live.adapters.state_dict())
    with torch.no_grad():  # the bank was made in single precision: bring both to the same features
        taps = plain_features_of(live, pixels)
    model = FromFeatures(away)
    for tuned, out in ((live, lambda: live(pixels)), (away, lambda: model(taps))):
        optimizer = torch.optim.AdamW([p for p in tuned.adapters.parameters() if p.requires_grad], lr=0.01)
        for _ in range(50):
            optimizer.zero_grad()
            F.cross_entropy(out(), labels).backward()
            optimizer.step()
    for p, q in zip(live.adapters.parameters(), away.adapters.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


def plain_features_of(tuned: rt.Tuned, pixels: Tensor) -> rt.Features:
    return as_features(plain_features(TINY["timm-vit"], tuned.backbone, {"x": pixels}))


def test_training_from_a_bank_is_training_from_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rates tried, the same accuracy within half a point, from single and from half precision."""
    run = ["--method", "bypass", "--lr", "0.01", "0.001", "--epochs", "8", "--quiet", "--json"]
    assert main(["train", *DATA, *run, "--out", str(tmp_path / "live")]) == 0
    live = json.loads(capsys.readouterr().out)
    for dtype in ("float32", "float16", "bfloat16"):
        assert main(["bank", *DATA, "--dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
        capsys.readouterr()
        folder = str(tmp_path / f"run-{dtype}")
        assert main(["train", "--bank", str(tmp_path / dtype), *run, "--out", folder]) == 0
        away = json.loads(capsys.readouterr().out)
        assert abs(away["test_loss"] - live["test_loss"]) < (1e-5 if dtype == "float32" else 0.02)
        assert away["examples"] == live["examples"] and away["parameters"] == live["parameters"]
        assert main(["evaluate", folder, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["examples"] == 40, "none of those that it was trained on"
        assert abs(said["accuracy"] - away["test_accuracy"]) <= 2.5
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).glob("*-*.safetensors")) for d in ("float32", "float16")]
    assert 1.9 < sizes[0] / sizes[1] < 2.1


def test_views_are_read_in_turn(tmp_path: Path) -> None:
    assert main(["bank", *DATA, "--views", "3", "--out", str(tmp_path / "views")]) == 0
    opened = Bank(tmp_path / "views")
    data = FromBank(opened, opened.source().train)
    seen = []
    for epoch in range(4):
        data.set_epoch(epoch)
        seen.append(torch.cat([f.flatten() for f in data[5][0].tensors()]))
    assert torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_rows_in_any_order(bank: Path) -> None:
    rows, order = Bank(bank).rows("train"), [119, 0, 50, 49, 3, 100, 0]
    features, labels = rows.fetch(order)
    for k, i in enumerate(order):
        one, label = rows[i]
        assert int(labels[k]) == label and all(
            torch.equal(a[k], b) for a, b in zip(features.tensors(), one.tensors(), strict=True)
        )
    data = FromBank(Bank(bank), Bank(bank).source().train)
    assert data.__getitems__([7, 2])[1].tolist() == [data[7][1], data[2][1]]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


def write_bank(out: Path) -> None:
    """In shards of 10, in a process of its own."""
    store.SHARD_ROWS = 10
    sys.exit(main(["bank", *DATA, "--batch-size", "2", "--out", str(out), "--resume", "--quiet"]))


def started(out: Path) -> BaseProcess:
    """Forked from a process that has imported it all, where there is fork: a process a kill, and torch read once."""
    processes = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    processes.set_forkserver_preload([__name__, "timm", "sklearn.datasets", "restuning.runs.banks"])
    process = processes.Process(target=write_bank, args=(out,))
    process.start()
    return process


def test_killed_at_ten_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, cut, rng = tmp_path / "whole", tmp_path / "cut", random.Random(0)
    first = started(whole)
    first.join()
    assert first.exitcode == 0
    kills = 0
    while kills < 10:
        process = started(cut)
        shards = len(list(cut.glob("*-*.safetensors"))) if cut.exists() else 0
        goal, deadline = shards + rng.randint(1, 2), time.monotonic() + 120
        while process.is_alive() and len(list(cut.glob("*-*.safetensors"))) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert kills >= 5
    if not (cut / "manifest.json").exists():
        with pytest.raises(CheckpointError, match="it is not finished, continue with --resume"):
            Bank(cut)
        last = started(cut)
        last.join()
        assert last.exitcode == 0
    assert files(cut) == files(whole)


def test_damage_is_named(bank: Path, tmp_path: Path) -> None:
    def copy() -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return shutil.copytree(bank, tmp_path / "bad")

    for name in sorted(p.name for p in bank.glob("*.safetensors")):
        bad = copy()
        data = bytearray((bad / name).read_bytes())
        data[random.Random(name).randrange(len(data))] ^= 1
        (bad / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name} is damaged: its checksum is not the manifest's"):
            Bank(bad)
        (bad / name).write_bytes(data[:-3])
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            Bank(bad, verify=False)
        (bad / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: No such file"):
            Bank(bad)
    bad = copy()
    text = (bad / "manifest.json").read_text()
    (bad / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        Bank(bad)
    (bad / "manifest.json").write_text(text.replace("restuning.bank/1", "other/7"))
    with pytest.raises(CheckpointError, match="of another format: 'other/7'"):
        Bank(bad)
    with pytest.raises(CheckpointError, match=r"is no bank: it has no manifest.json"):
        Bank(tmp_path)


def test_what_does_not_fit(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        assert main([*argv, "--quiet"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    first = tmp_path / "first"
    assert main(["bank", *DATA, "--out", str(first)]) == 0
    capsys.readouterr()
    train = ["train", "--out", str(tmp_path / "run"), "--bank"]
    assert "acts inside the backbone" in refused(*train, str(first), "--method", "lora")
    assert "the method reads 2; build a bank with --tokens 2" in refused(*train, str(first), "--method", "bypass-grid2")
    assert "the method reads 'all'" in refused(*train, str(first), "--method", "bypass", "--pool", "mean")
    assert "needs the backbone's weights" in refused(*train, str(bank), "--method", "lst")
    assert "is of data 'digits'" in refused(*train, str(first), "--method", "linear", "--data", "sprites:location")
    assert "is of test_size 40: leave out 30" in refused(*train, str(first), "--method", "linear", "--test-size", "30")
    assert "restuning bank --views" in refused(*train, str(first), "--method", "linear", "--augment")
    done = ["--bank", str(first), "--method", "linear", "--epochs", "1", "--out", str(tmp_path / "done")]
    assert main(["train", *done, "--quiet"]) == 0
    again = ["train", "--run", str(tmp_path / "done" / "run.json"), "--out", str(tmp_path / "run")]
    assert "is of data 'digits'" in refused(*again, "--data", "sprites:location")
    assert "no bank" in refused(*train, str(tmp_path / "nowhere"), "--method", "bypass")
    assert not (tmp_path / "run").exists()
    assert "holds a finished bank" in refused("bank", *DATA, "--out", str(first))
    assert "expected first, mean, all" in refused("bank", *DATA, "--tokens", "some", "--out", str(tmp_path / "x"))
    assert "views 0" in refused("bank", *DATA, "--views", "0", "--out", str(tmp_path / "x"))
    (first / "manifest.json").rename(first / "partial.json")
    partial = json.loads((first / "partial.json").read_text())
    partial.pop("tail_sha256")
    (first / "partial.json").write_text(json.dumps(partial))
    assert "not empty (partial.json" in refused("bank", *DATA, "--out", str(first))
    again = ["bank", *DATA, "--out", str(first), "--resume"]
    for words, more in {
        "preprocessing": ["--image-size", "96"],
        "data": ["--test-size", "41"],
        "dtype": ["--dtype", "float16"],
        "weights_sha256": ["--backbone", "vit_tiny_patch16_224", "--weights", "random", "--image-size", "64"],
    }.items():
        said = refused(*again, *more)
        assert "unfinished bank of another " in said and words in said
    assert main(again) == 0


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = rt.adapt(rt.load_backbone("restuning-micro"), "bypass-none")
    task = load_task("digits", train_size=40, test_size=20)
    from restuning.backbones.load import preprocessing_of

    preprocess = preprocessing_of(tuned.backbone)
    monkeypatch.setattr(store, "SHARD_ROWS", 10)
    build(tuned, task, preprocess, tmp_path / "whole")
    honest, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RestuningError, match=r"No space left on device; the \d shards before it are kept"
        ) as caught:
            build(tuned, task, preprocess, tmp_path / "cut")
    assert "\n" not in str(caught.value) and not list((tmp_path / "cut").glob("*.tmp"))
    build(tuned, task, preprocess, tmp_path / "cut", resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_values_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    backbone = rt.load_backbone("restuning-micro")
    with torch.no_grad():
        backbone.pos_embed.mul_(1e6)
    tuned = rt.adapt(backbone, "bypass-none")
    task = load_task("digits", train_size=20, test_size=10)
    from restuning.backbones.load import preprocessing_of

    with pytest.raises(RestuningError, match=r"layer 0 has values that float16 cannot hold"):
        build(tuned, task, preprocessing_of(backbone), tmp_path / "x", dtype="float16")


def test_views_of_views() -> None:
    grid, other = TokenSelection(2, 1), TokenSelection(4, 1)
    assert grid.of(ALL) == grid and grid.of(grid) == ALL and grid.of(other) is None
    assert FIRST.of(grid) == FIRST and FIRST.of(ALL) == FIRST and FIRST.of(TokenSelection(2, 0)) is None
    x = torch.randn(2, 17, 8)
    cells = grid(x)[:, 1:].reshape(2, 2, 2, 8)
    torch.testing.assert_close(cells[:, 0, 1], x[:, 1:].reshape(2, 4, 4, 8)[:, :2, 2:].mean((1, 2)))
    assert torch.equal(grid(x)[:, 0], x[:, 0]) and grid.count() == 5
