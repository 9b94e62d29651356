"""The command line as its user meets it: whole runs on a folder of pictures; bad input as one line and code 2."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import restuning as rt
from restuning.cli.main import main
from restuning.methods.named import CHOICE, TRIED
from restuning.runs.predict import predict_rows

FAST = ["--epochs", "2", "--batch-size", "8", "--quiet"]


def pictures(root: Path, classes: dict[str, tuple[int, int, int]], n: int = 8) -> Path:
    for name, colour in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            shade = tuple(max(0, c - 9 * i) for c in colour)
            Image.new("RGB", (40, 30 + i), shade).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return pictures(tmp_path / "my photos", {"blue": (30, 40, 230), "green": (20, 220, 40), "red": (240, 30, 20)})


def call(*argv: object) -> int:
    return main([str(a) for a in argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line of a refusal."""
    assert call(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("restuning: ") and "\n" not in err, err
    return err


def test_train_evaluate_predict(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("res-tuning", "bypass", "linear"):
        out = tmp_path / method
        settings = ["--method", method, "--epochs", "8", "--batch-size", "8", "--lr", ".01", "--json"]
        assert call("train", "--data", f"folder:{photos}", "--out", out, *settings) == 0
        result = json.loads(capsys.readouterr().out)
        assert result == json.loads((out / "result.json").read_text())
        assert result["test_accuracy"] == 100.0 and result["settings"]["method"] == method
        assert not list(out.glob("*.pt")), "the state is not kept once the run is done"
        assert (out / "adapter_model.safetensors").stat().st_size < 400_000
        assert call("evaluate", out, "--json") == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == result["test_accuracy"]
    assert (
        call("predict", tmp_path / "bypass", tmp_path / "res-tuning", photos / "red" / "0.png", "--top", "2", "--json")
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert [row["top"][0]["class"] for row in rows] == ["red", "red"]
    assert all(len(row["top"]) == 2 for row in rows)
    assert call("predict", tmp_path / "linear", photos / "green", "--json") == 0
    assert [r["top"][0]["class"] for r in json.loads(capsys.readouterr().out)] == ["green"] * 8


@pytest.mark.parametrize("method, rate", [("res-tuning", 0.005), ("full", 0.0001)])
def test_the_rate_where_none_is_asked_for_is_the_methods(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, rate: float
) -> None:
    argv = ["train", "--data", f"folder:{photos}", "--method", method, "--epochs", "1", "--out", tmp_path / "out"]
    assert call(*argv, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["lr"], result["validation_score"]) == (rate, {})
    table = (Path(__file__).parent.parent / "docs/results/methods.md").read_text(encoding="utf-8")
    (row,) = (line for line in table.splitlines() if line.startswith(f"| {method} |"))
    assert f"(lr {rate})" in row, "one that validation chose"


def test_where_features_are_kept_the_best_of_three_rates_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the three were given; with patience, passes in every epoch, or few items there is no choice."""

    def trained(name: str, *more: object) -> dict[str, Any]:
        argv = ["train", "--data", "digits", "--test-size", "20", "--method", "linear", "--epochs", "2", "--json"]
        assert call(*argv, "--out", tmp_path / name, *more) == 0
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    many = ["--train-size", CHOICE]
    none, given = trained("none", *many), trained("given", "--lr", *TRIED, *many)
    assert set(none["validation_score"]) == {str(rate) for rate in TRIED} and none["lr"] in TRIED
    assert none["validation_score"] == given["validation_score"] and none["lr"] == given["lr"]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("none", "given")]
    assert weights[0] == weights[1]
    one_rate = {"pass": [*many, "--no-keep-features"], "patience": [*many, "--patience", 1, "--val-size", 20]}
    for name, more in {**one_rate, "few": ["--train-size", CHOICE - 1]}.items():
        one = trained(name, *more)
        assert (one["lr"], one["validation_score"]) == (TRIED[0], {})


def test_inputs_are_several_and_deep_and_rows_are_streamed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [tmp_path / "linear", tmp_path / "bypass"]
    for out in adapters:
        assert call("train", "--data", f"folder:{photos}", "--method", out.name, "--out", out, *FAST) == 0
    capsys.readouterr()
    ask = ["predict", *adapters, photos, photos / "red" / "0.png", "--top", "2", "--batch-size", "5", "--device", "cpu"]
    assert call(*ask, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    files = [*(str(path) for path in sorted(photos.rglob("*.png"))), str(photos / "red" / "0.png")]
    assert [row["input"] for row in rows] == [file for file in files for _ in adapters]
    assert [row["adapter"] for row in rows] == [*map(str, adapters)] * len(files)
    assert call(*ask, "--format", "jsonl") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert call(*ask, "--format", "csv") == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["input"], r["adapter"], r["class"], float(r["probability"])) for r in table] == [
        (row["input"], row["adapter"], one["class"], one["probability"]) for row in rows for one in row["top"]
    ]
    first = next(predict_rows(adapters, [str(photos)], batch_size=1))
    assert first["input"] == files[0], "a row is there before the last item was read"
    assert call("evaluate", *adapters, "--device", "cpu", "--batch-size", "3", "--format", "jsonl") == 0
    measured = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["adapter"] for row in measured] == [*map(str, adapters)]
    recorded = [json.loads((out / "result.json").read_text())["test_accuracy"] for out in adapters]
    assert [row["accuracy"] for row in measured] == recorded
    assert call("evaluate", *adapters, "--per-class", "--format", "csv") == 0
    each = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [row["class"] for row in each] == ["blue", "green", "red"] * 2
    line = refused(capsys, "evaluate", *adapters, "--confusion", tmp_path / "c.png")
    assert "--confusion is of one adapter: 2 were given" in line
    assert "no input" in refused(capsys, "predict", *adapters)
    assert "no adapter" in refused(capsys, "predict", photos)


def test_a_run_says_what_it_does_and_goes_on_after_its_end(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["train", "--data", f"folder:{photos}", "--method", "linear", "--epochs", "3", "--lr", "0.1", "0.01"]
    assert call(*argv, "--out", out) == 0
    said, err = capsys.readouterr()
    first, *lines = err.splitlines()
    assert "backbone restuning-micro, 1.6M parameters (bundled and small" in first and "--backbone" in first
    assert "linear; 20 items of folder:" in first and "saved in" in said
    assert sum(line.startswith("epoch ") for line in lines) == 3 * 3, "two rates are compared, then one is trained"
    assert sum(line.startswith("lr ") for line in lines) == 3
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert call(*argv, "--out", out, "--resume") == 0
    again, err = capsys.readouterr()
    assert again == said and "finished: nothing was left to do" in err
    assert call("train", "--out", out, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "result.json").read_text())
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_many_adapters_and_their_embeddings(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = [tmp_path / f"{method}-{seed}" for method in ("bypass", "lora") for seed in range(2)]
    for out in adapters:
        method, seed = out.name.split("-")
        more = ["--method", method, "--seed", seed, "--out", out]
        assert call("train", "--data", f"folder:{photos}", *more, *FAST) == 0
    capsys.readouterr()
    file = tmp_path / "embeddings.safetensors"
    assert call("predict", *adapters, photos / "red", "--embeddings", file, "--top", "2", "--json") == 0
    together = json.loads(capsys.readouterr().out)
    for out in adapters:
        assert call("predict", out, photos / "red", "--top", "2", "--json") == 0
        for row in json.loads(capsys.readouterr().out):
            (same,) = (r for r in together if (r["input"], r["adapter"]) == (row["input"], row["adapter"]))
            assert [c["class"] for c in same["top"]] == [c["class"] for c in row["top"]]
            for a, b in zip(same["top"], row["top"], strict=True):
                assert a["probability"] == pytest.approx(b["probability"], abs=2e-6)
        tuned = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), out)
        head, embedded = tuned.adapters["default"].head, load_file(file)[str(out)]
        assert embedded.shape == (8, head.in_features)
        first = next(row for row in together if row["adapter"] == str(out))
        assert head(embedded[:1]).softmax(-1).max().item() == pytest.approx(first["top"][0]["probability"], abs=1e-5)
    assert "cannot write" in refused(capsys, "predict", adapters[0], photos / "red", "--embeddings", tmp_path)


def test_run_json_repeats_the_run(photos: Path, tmp_path: Path) -> None:
    assert call("train", "--data", f"folder:{photos}", "--out", tmp_path / "a", *FAST) == 0
    assert call("train", "--run", tmp_path / "a" / "run.json", "--out", tmp_path / "b", "--quiet") == 0
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert a == b
    more = ["--blocks", "0", "--epochs", "1", "--quiet", "--out", tmp_path / "c"]
    assert call("train", "--data", f"folder:{photos}", *more) == 0
    methods = [json.loads((tmp_path / name / "run.json").read_text())["method"] for name in "abc"]
    taken = "res-tuning" if torch.cuda.is_available() else "bypass-query"
    assert methods == [taken, taken, "res-tuning"], "without a GPU, what runs the backbone once; blocks are of tuners"


def test_kept_features_change_nothing(photos: Path, tmp_path: Path) -> None:
    for out, extra in (("kept", []), ("live", ["--no-keep-features"])):
        argv = ["--data", f"folder:{photos}", "--method", "bypass", *FAST, *extra]
        assert call("train", *argv, "--out", tmp_path / out) == 0
    from safetensors.torch import load_file

    kept, live = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("kept", "live"))
    for key in kept:
        torch.testing.assert_close(kept[key], live[key], rtol=1e-4, atol=1e-5)


def test_rate_is_chosen_on_validation(photos: Path, tmp_path: Path) -> None:
    argv = ["--data", f"folder:{photos}", "--method", "linear", "--lr", ".01", "1e-7", "--epochs", "20", "--quiet"]
    assert call("train", *argv, "--out", tmp_path / "out") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["lr"] == 0.01 and set(result["validation_score"]) == {"0.01", "1e-07"}
    assert result["examples"]["val"] == 0, "the last training is on training and validation images together"


def test_a_larger_test_than_the_runs_own_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was trained on is never tested on."""
    train = ["train", "--data", f"folder:{photos}", "--method", "linear", "--epochs", "1", "--quiet"]
    assert call(*train, "--test-size", "6", "--seed", "20231019", "--augment", "--out", tmp_path / "a") == 0
    capsys.readouterr()
    assert call("evaluate", tmp_path / "a", "--test-size", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 3
    assert "at most the 6" in refused(capsys, "evaluate", tmp_path / "a", "--test-size", "12")
    assert call(*train, "--out", tmp_path / "b") == 0
    capsys.readouterr()
    assert "at most the" in refused(capsys, "evaluate", tmp_path / "b", "--test-size", "12")


def test_patience_with_several_rates_says_so_first(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--data", f"folder:{photos}", "--method", "linear", "--lr", "0.01", "0.001", "--epochs", "2"]
    said = refused(capsys, *train, "--val-size", "6", "--patience", "1", "--quiet", "--out", tmp_path / "a")
    assert "give one rate" in said and not (tmp_path / "a").exists()


def test_killed_and_interrupted_runs_go_on_to_the_same_bits(photos: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "restuning.cli", "train", "--data", f"folder:{photos}", "--epochs", "32"]
    argv += ["--batch-size", "2", "--image-size", "32", "--quiet"]

    def start(*extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*argv, *extra], stderr=subprocess.PIPE, text=True)

    whole, cut = str(tmp_path / "whole"), tmp_path / "cut"
    assert start("--out", whole).wait() == 0
    for stop, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        state = cut / "state.pt"
        before = state.stat().st_mtime_ns if state.exists() else 0
        run = start("--out", str(cut), "--resume") if before else start("--out", str(cut))
        deadline = time.time() + 120
        while not (state.exists() and state.stat().st_mtime_ns > before) and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(run.pid, stop)
        assert run.wait() == code
        assert (cut / "state.pt").exists() and not (cut / "result.json").exists()
    assert start("--out", str(cut), "--resume").wait() == 0
    a, b = (Path(p, "adapter_model.safetensors").read_bytes() for p in (whole, cut))
    assert a == b


def test_refused_data(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def bad(spec: str) -> str:
        line = refused(capsys, "train", "--data", spec, "--out", out, *FAST)
        assert not out.exists(), "nothing half-written"
        return line

    assert "no such folder" in bad(f"folder:{tmp_path / 'nowhere'}").lower()
    assert "unknown" in bad("foldr:x").lower()
    (photos / "empty").mkdir()
    assert "empty" in bad(f"folder:{photos}")
    (photos / "empty").rmdir()
    good = photos / "red" / "3.png"
    data = good.read_bytes()
    good.write_bytes(data[: len(data) // 2])
    assert "3.png" in bad(f"folder:{photos}")
    good.write_bytes(data)
    Image.new("1", (30_000, 30_000)).save(photos / "red" / "huge.png")
    assert "huge.png" in bad(f"folder:{photos}")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--method", "res-tunning"], "did you mean 'res-tuning'"),
        (["--backbone", "vit_tinny"], "unknown backbone"),
        (["--epochs", "0"], "epochs"),
        (["--lr", "-1"], "lr"),
        (["--batch-size", "-3"], "batch_size"),
        (["--size", "0"], "at least 1"),
        (["--blocks", "99"], "blocks 0 to"),
        (["--image-size", "-8"], "image size"),
        (["--train-size", "0"], "0"),
        (["--weights", "nowhere.safetensors"], "no weights at"),
        (["--precision", "int3"], "precision"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_refused_settings(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    line = refused(capsys, "train", "--data", f"folder:{photos}", "--out", tmp_path / "out", "--quiet", *argv)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_refused_output_folders(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    out, argv = tmp_path / "out", ["train", "--data", f"folder:{photos}", *FAST]
    assert call(*argv, "--out", out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "holds a finished run" in refused(capsys, *argv, "--out", out)
    assert "other settings" in refused(capsys, *argv, "--out", out, "--resume", "--epochs", "3")
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use" in refused(capsys, *argv, "--out", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert "lies inside" in refused(capsys, *argv, "--out", photos)
    assert "not empty" in refused(capsys, "train", "--data", "digits", *FAST, "--out", photos)


def test_full_disk(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, "train", "--data", f"folder:{photos}", "--out", tmp_path / "out", *FAST)
    assert "No space left" in line
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_refused_adapters(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call("train", "--data", f"folder:{photos}", "--out", out, *FAST) == 0
    image = photos / "red" / "0.png"
    assert "no saved adapter" in refused(capsys, "predict", tmp_path / "nothing", image)
    other = pictures(tmp_path / "other", {"a": (1, 2, 3), "b": (200, 100, 0)})
    assert "classes" in refused(capsys, "evaluate", out, "--data", f"folder:{other}")
    assert "other weights" in refused(capsys, "predict", out, image, "--weights", "random")
    model = out / "adapter_model.safetensors"
    model.write_bytes(model.read_bytes()[:-40])
    assert "damaged" in refused(capsys, "predict", out, image)


def test_params_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["params", "--backbone", "vit_base_patch16_224", "--method", "res-tuning", "--classes", "100", "--json"]
    assert call(*argv) == 0
    expected = {"trainable": 482_644, "tuners": 405_744, "head": 76_900, "total": 86_281_300}
    assert json.loads(capsys.readouterr().out) == expected
    assert call("methods", "--json") == 0
    assert "bypass" in json.loads(capsys.readouterr().out)
    assert call("sites", "--json") == 0
    assert {s["op"] for s in json.loads(capsys.readouterr().out)["sites"]} >= {
        "mha",
        "ffn",
        "block",
        "attention",
        "qkv",
    }
    assert call("data", "digits", "--check", "--json") == 0
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert sum(map(sum, labels.values())) == 1797
    for command in ("train", "search", "evaluate", "predict", "methods", "sites", "params", "data", "bench"):
        with pytest.raises(SystemExit) as stop:
            call(command, "--help")
        assert stop.value.code == 0 and "example: restuning" in capsys.readouterr().out
