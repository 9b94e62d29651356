"""Banks larger than memory, and banks put together: a window on them gives what loading them gives."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from restuning.cli.main import main
from restuning.errors import CheckpointError
from restuning.features.bank import Bank, append, merge
from restuning.features.bank.format import MANIFEST, Shard
from restuning.features.bank.window import AHEAD, Window
from restuning.runs import sweep as module


def build(out: Path, *more: str) -> Path:
    data = ["--data", "digits", "--train-size", "120", "--test-size", "60", "--quiet"]
    assert main(["bank", *data, *more, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module", params=["float32", "float16"])
def bank(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return build(tmp_path_factory.mktemp("window") / "bank", "--tokens", "2", "--dtype", request.param)


def resident() -> int:
    row = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS"))
    return 1024 * int(row.split()[1])


def test_its_rows_are_the_banks(bank: Path) -> None:
    whole, layers = Bank(bank), [0, 3, 8]
    window = Window(whole, layers)
    assert len(window) == 180 and window.offsets == {"train": 0, "test": 120}
    at = torch.tensor([[3, 119, 3], [179, 120, 0]])
    for split, rows, own in (("train", at[at < 120], at < 120), ("test", at[at >= 120] - 120, at >= 120)):
        features, labels = whole.rows(split).fetch(rows)
        assert torch.equal(window.labels[at][own], labels)
        found = window.batch(at)
        assert list(found.layers) == layers
        for layer, got in found.layers.items():
            assert got.dtype == torch.float32 and got.shape[:2] == at.shape
            assert torch.equal(got[own], features.layers[layer])
    asked = [torch.randint(180, (7,)) for _ in range(9)]
    for (rows, found), before in zip(window.batches(asked), asked, strict=True):
        assert rows is before and all(map(torch.equal, found.tensors(), window.batch(before).tensors()))


def test_it_reads_only_a_few_batches_ahead(bank: Path) -> None:
    asked: list[int] = []

    def rows():  # type: ignore[no-untyped-def]
        for i in range(20):
            asked.append(i)
            yield torch.tensor([i])

    for i, _ in enumerate(Window(Bank(bank), [8]).batches(rows())):
        assert len(asked) <= i + AHEAD + 1


@pytest.mark.parametrize("method", ["bypass", "linear"])
def test_a_sweep_through_a_window_is_one_from_memory(
    bank: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--method", method, "--lr", "0.02", "0.002", "--epochs", "2", "--seeds", "0", "3", "--json"]
    found = []
    for name, limit in (("memory", 2**40), ("window", 0)):
        monkeypatch.setattr(module, "LIMIT", limit)
        assert main(["sweep", "--bank", str(bank), *grid, "--out", str(tmp_path / name)]) == 0
        found.append(json.loads(capsys.readouterr().out)["methods"][method])
    for a, b in zip(found[0]["seeds"], found[1]["seeds"], strict=True):
        assert a == b


def test_a_shard_that_is_cut(bank: Path, tmp_path: Path) -> None:
    window = Window(Bank(bank), [8])
    shard = window._shard(0)
    shard.tensors["8"] = (*shard.tensors["8"][:2], 10**9)
    with pytest.raises(CheckpointError, match="is damaged: it ends within 8"):
        window.batch(torch.tensor([1]))


def sparse(like: Path, out: Path, rows: int, each: int) -> Path:
    """A bank of so many training items whose files are holes: all features and labels are 0."""
    from shutil import copy

    manifest = json.loads((like / MANIFEST).read_text())
    first = next(Shard(**s) for s in manifest["shards"] if s["split"] == "train")
    out.mkdir()
    copy(like / "tail.safetensors", out)
    shards = [s for s in manifest["shards"] if s["split"] != "train"]
    for shard in shards:
        copy(like / shard["file"], out)
    with safe_open(like / first.file, "pt") as file:
        kinds = {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()[1:]) for name in list(file.keys())
        }
    for k in range(rows // each):
        header, end = {}, 0
        for name, (dtype, shape) in kinds.items():
            size = each * {"F16": 2, "F32": 4, "I64": 8}[dtype] * int(torch.tensor(shape).prod() if shape else 1)
            header[name] = {"dtype": dtype, "shape": [each, *shape], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        file_name = f"train-0-{k:05d}.safetensors"
        with open(out / file_name, "wb") as hole:
            hole.write(len(text).to_bytes(8, "little") + text)
            os.truncate(hole.fileno(), 8 + len(text) + end)
        shards.insert(k, {**vars(first), "file": file_name, "rows": each, "bytes": 8 + len(text) + end, "sha256": ""})
    manifest["shards"], manifest["data"]["splits"]["train"]["count"] = shards, rows
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def test_a_bank_of_a_gigabyte_in_little_memory(tmp_path: Path) -> None:
    """Files that are holes: 20,480 items of 9 layers of 5 tokens of 128 numbers."""
    like = build(tmp_path / "like", "--tokens", "2", "--dtype", "float32")
    whole = Bank(sparse(like, tmp_path / "large", 20 * 1024, 1024), verify=False)
    assert whole.bytes > 4.5e8
    before = resident()
    window = Window(whole, whole.layers)
    for _, found in window.batches(torch.randint(len(window), (64,)) for _ in range(100)):
        assert len(found.layers) == 9 and len(found) == 64
    assert resident() - before < 100 * 2**20


def test_banks_put_together(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Split by split, in order; in place as in a folder of its own, and a sweep reads it."""
    one = Bank(bank)
    first = one.rows("train").fetch(range(120))
    assert main(["bank", "merge", str(bank), str(bank), str(bank), "--out", str(tmp_path / "all"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["items"] == {"train": 360, "test": 180} and told["bytes"] == 3 * sum(s.bytes for s in one.shards)
    merge([bank, bank], tmp_path / "two")
    append(tmp_path / "two", bank)
    for folder in ("all", "two"):
        made = Bank(tmp_path / folder)  # checksums and all
        features, labels = made.rows("train").fetch(range(360))
        assert torch.equal(labels, first[1].repeat(3))
        assert all(
            torch.equal(x, y.repeat(3, 1, 1)) for x, y in zip(features.tensors(), first[0].tensors(), strict=True)
        )
    assert Bank(bank).splits == {"train": 120, "test": 60}
    assert main(["bank", "info", str(tmp_path / "two")]) == 0
    assert "train 360, test 180" in capsys.readouterr().out
    grid = ["--method", "linear", "--lr", "0.01", "--epochs", "1", "--seeds", "0", "--out", str(tmp_path / "s")]
    assert main(["sweep", "--bank", str(tmp_path / "two"), *grid]) == 0


def test_banks_that_do_not_go_together(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = build(tmp_path / "other", "--tokens", "first")
    for argv, words in (
        (["merge", str(bank), str(other), "--out", str(tmp_path / "x")], "they differ in view"),
        (["append", str(bank), str(other)], "they differ in view"),
        (["merge", str(bank), "--out", str(tmp_path / "x")], "expected two folders or more"),
        (["merge", str(bank), str(bank)], "--out is missing"),
        (["merge", str(bank), str(bank), "--out", str(other)], "is not empty"),
        (["info", str(tmp_path / "none")], "is no bank"),
        (["shrink", str(bank)], "expected info, append, merge"),
        ([], "--out is missing"),
    ):
        assert main(["bank", *argv]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err and "\n" not in err
    assert Bank(bank).splits == {"train": 120, "test": 60} and not (tmp_path / "x" / MANIFEST).exists()
