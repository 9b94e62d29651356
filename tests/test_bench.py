"""Benchmarks on the bundled backbone: what is written holds together, and what is deterministic is as it must be."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from restuning.backbones.load import MICRO
from restuning.bench.bench import BENCHES, bench
from restuning.bench.limit import least_bytes
from restuning.bench.settings import Bench, Measured
from restuning.cli.main import main
from restuning.errors import RestuningError
from restuning.utils.profiling import in_turn, saved_by_module, spread

SMALL: dict[str, list[str]] = {
    "memory": ["--method", "full", "linear", "bypass", "peft-lora-equal", "swift-bypass"],
    "step": [],
    "multitask": ["--tasks", "20", "--classes", "3"],
    "mixed": ["--tasks", "3"],
    "grid": ["--points", "3"],
    "bank": [],
    "window": ["--items", "3000", "--points", "2"],
    "cluster": ["--items", "40", "--points", "2", "--method", "linear", "bypass"],
}
SETTINGS = {"backbone", "image_size", "batch", "rounds", "dtype", "threads", "torch", "device", "device_name"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def records(out: Path) -> dict[str, dict[str, Any]]:
    """Of every benchmark, by name."""
    found = {}
    for what, more in SMALL.items():
        argv = ["bench", what, "--backbone", MICRO, "--batch", "4", "--rounds", "1", "--out", str(out), *more]
        assert main(argv) == 0
        found[what] = {r["name"]: r for r in map(json.loads, (out / f"{what}.jsonl").read_text().splitlines())}
    return found


def test_every_benchmark_has_a_small_one() -> None:
    assert set(SMALL) == set(BENCHES)


@pytest.mark.parametrize("what", SMALL)
def test_what_is_written(what: str, records: dict[str, dict[str, Any]], out: Path) -> None:
    assert (out / f"{what}.png").read_bytes().startswith(b"\x89PNG") and not list(out.glob("*.tmp"))
    table = (out / f"{what}.md").read_text()
    for name, record in records[what].items():
        assert record["what"] == what and set(record["settings"]) >= SETTINGS and name in table
        assert record["settings"]["backbone"] == MICRO and record["settings"]["rounds"] == 1
        assert bool(record["values"]) != ("absent" in record)
        for key, ratio in record["ratios"].items():
            unit, _, to = key.partition(" / ")
            quotient = record["values"][unit] / records[what][to]["values"][unit]
            assert ratio["min"] == ratio["median"] == ratio["max"] == pytest.approx(quotient, rel=1e-4)
            assert f"{ratio['median']:.4g}" in table


def test_bytes_saved(records: dict[str, dict[str, Any]]) -> None:
    """Of a bypass: three orders less than of full fine-tuning, and no more than the taps are in linear probing."""
    memory = {name: r["values"] for name, r in records["memory"].items() if r["values"]}
    saved = {name: v["saved_bytes"] for name, v in memory.items()}
    assert saved["linear"] < saved["bypass"] < 0.005 * saved["full"]
    assert saved["bypass"] < saved["peft-lora-equal"] < saved["full"]
    limit = {name: v["limit_bytes"] for name, v in memory.items() if "limit_bytes" in v}
    assert {"full", "linear", "bypass"} == set(limit)
    assert all(0 < least <= saved[name] for name, least in limit.items())
    assert all(v["peak_bytes"] > 0 and v["loaded_bytes"] > v["peak_bytes"] for v in memory.values())
    # a rank of PEFT's LoRA on this backbone's qkv is 4,096 parameters, over its 8 blocks
    import restuning as rt

    ours = rt.count(rt.adapt(rt.load_backbone(MICRO), "res-tuning", 100))
    assert abs(memory["peft-lora-equal"]["parameters"] - ours["trainable"]) < 0.1 * ours["trainable"]


def test_the_limit_of_what_is_exact() -> None:
    """By hand: a trained map's input, a norm's output and deviations in place of its input, an activation's input;
    nothing of frozen maps."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.act = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU()
            self.frozen, self.trained = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
            for module in (self.norm, self.frozen):
                module.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.first(x))
            return self.act(self.frozen(y) + self.trained(y)).sum()

    net, x = Net(), torch.randn(5, 8)
    assert least_bytes(lambda: net(x), net) == 4 * (5 * 8 + 5 * 8 + 5 + 5 * 16)


@pytest.mark.parametrize("method", ["lora", "res-tuning"])
def test_shared_keeps_what_it_must(method: str) -> None:
    settings = Bench(backbone="vit_tiny_patch16_224", batch=2, image_size=64)
    (x, labels), plain, shared = settings.inputs(), settings.subject(f"{method}:plain"), settings.subject(method)
    least = least_bytes(lambda: plain(x, labels=labels)["loss"], plain)
    kept = sum(saved_by_module(lambda: shared(x, labels=labels)["loss"], shared).values())
    assert least <= kept < 1.01 * least


def test_names(records: dict[str, dict[str, Any]]) -> None:
    assert {"forward", "full", "linear", "bypass", "res-tuning", "prefix, bound", "peft-lora"} <= set(records["step"])
    tasks = records["multitask"]
    assert [r["values"]["tasks"] for name, r in tasks.items() if "task" in name and name != "one more task"] == [
        1, 2, 5, 10, 19, 20,
    ]  # fmt: skip
    assert tasks["20 full models, counted"]["values"]["seconds"] == pytest.approx(
        20 * tasks["1 full model"]["values"]["seconds"], rel=1e-4
    )
    assert "seconds / 19 full models" in tasks["19 tasks"]["ratios"]
    assert {f"{m}, 3 mixed" for m in ("adapter", "lora", "prefix", "bypass")} <= set(records["mixed"])
    assert {"1 point", "3 points, a stack", "3 points, one by one"} <= set(records["grid"])
    window = records["window"]["through a window"]
    each = 9 * 128 * 2 + 8  # layers, width, float16; and a label
    assert 3000 * each < window["values"]["bank_bytes"] < 3000 * each + 3 * 2000 and window["values"]["peak_bytes"]
    cluster = records["cluster"]
    assert {"bank, this process", "bank, 2 Ray workers", "1 point", "2 points, a stack"} <= set(cluster)
    assert cluster["2 methods of 2 points, 2 Ray workers"]["values"]["points"] == 4
    assert {"full step", "read a batch", "step from memory", "step from disk"} <= set(records["bank"])


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = ["bench", "step", "--backbone", MICRO, "--batch", "2", "--rounds", "1", "--method", "linear", "peft-lora"]
    assert main(argv) == 0
    assert "peft-lora is absent: " in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["name"] for r in lines] == ["forward", "linear", "peft-lora"] and "absent" in lines[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["speed"], "invalid choice: 'speed'"),
        (["step", "--rounds", "0"], "rounds 0: expected at least 1"),
        (["step", "--batch", "0"], "batch 0"),
        (["grid", "--points", "-1"], "points -1"),
        (["multitask", "--tasks", "0"], "tasks 0"),
        (["bank", "--classes", "0"], "classes 0"),
        (["step", "--device", "tpu"], "expected cpu or cuda"),
        (["memory", "--method", "bypas"], "did you mean 'bypass'"),
        (["memory", "--backbone", "vit_tinny"], "unknown backbone"),
        (["grid", "--weights", "nowhere.pt"], "no weights at nowhere.pt"),
        (["step", "--image-size", "33"], "image size 33"),
        (["step", "--backbone", "all-MiniLM-L6-v2"], "reads texts"),
    ],
)
def test_refused(argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = [] if "--backbone" in argv else ["--backbone", MICRO]
    assert main(["bench", *argv, *backbone, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and err.startswith("restuning: ") and "\n" not in err
    assert not (tmp_path / "out").exists()


def test_refused_without_a_gpu_or_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RestuningError, match="no GPU can be used here"):
        Bench(device="cuda")
    with pytest.raises(RestuningError, match="unknown benchmark 'speed'"):
        bench("speed")
    (tmp_path / "file").touch()
    assert main(["bench", "step", "--out", str(tmp_path / "file")]) == 2
    assert "it is no folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "step", "--out", str(tmp_path)]) == 2
    assert "pip install 'restuning[bench]'" in capsys.readouterr().err


def test_ratios_are_taken_round_by_round() -> None:
    assert spread([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"min": 2.0, "median": 3.0, "max": 4.0}
    said: list[str] = []
    calls = {name: lambda name=name: said.append(name) for name in "ab"}
    times = in_turn(calls, 2, before=lambda name: said.append(f"before {name}"))
    assert said == ["before a", "a", "before b", "b"] * 3 and [len(t) for t in times.values()] == [2, 2]
    measured = Measured()
    measured.seconds({"a": [0.5, 0.25]}, "images", {"a": 2})
    assert measured.samples == {"a": {"seconds": [0.5, 0.25], "images_per_second": [4.0, 8.0]}}
