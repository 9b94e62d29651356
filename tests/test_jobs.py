"""Banks built by several processes and on a local Ray, and sweeps there: what one process gives."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from two import in_two

from restuning.cli.main import main
from restuning.features.bank import Bank

DATA = ["--data", "digits", "--views", "2", "--batch-size", "64"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("banks") / "one"
    assert main(["bank", *DATA, "--quiet", "--out", str(out)]) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def workers(name: str) -> list[int]:
    """Processes of a local Ray that are at a job."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_bank_on_ray_of_which_a_worker_is_killed(bank: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("ray")
    out, before = tmp_path / "two", dict[str, int]()

    def kill() -> None:
        while not before:
            done, at = sorted(out.glob("*.done.json")), workers("_at_work")
            if done and len(at) == 2:
                names = [p.name.removesuffix(".done.json") for p in done]
                before.update({name: (out / name).stat().st_ino for name in names})
                os.kill(at[0], signal.SIGKILL)
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert main(["bank", *DATA, "--engine", "ray", "--workers", "2", "--quiet", "--out", str(out)]) == 0
    killer.join(1)
    assert before and files(out) == files(bank)
    assert {name: (out / name).stat().st_ino for name in before} == before, "what was done is not done again"
    assert Bank(out).splits == Bank(bank).splits


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_bank_of_two_processes(bank: Path, tmp_path: Path) -> None:
    said = in_two("-m", "restuning.cli", "bank", *DATA, "--json", "--out", str(tmp_path / "two"))
    assert said[1] == "" and json.loads(said[0])["shards"] == len(Bank(bank).shards), "the first one speaks"
    assert files(tmp_path / "two") == files(bank)


def test_what_a_bank_costs_is_said_first(tmp_path: Path, capsys: Any) -> None:
    data = ["--data", "digits", "--train-size", "30", "--test-size", "20"]
    assert main(["bank", *data, "--out", str(tmp_path / "bank")]) == 0
    first = capsys.readouterr().err.strip().splitlines()[0]
    each = 9 * 128 * 4  # layers, width, float32
    assert first.startswith(f"{each:,} bytes an item, {50 * each / 2**20:,.1f} MiB for 50, about ")
    assert first.endswith(" seconds")


def test_a_sweep_on_ray(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("ray")
    data = ["--data", "digits", "--train-size", "60", "--test-size", "40", "--quiet"]
    assert main(["bank", *data, "--out", str(tmp_path / "bank")]) == 0
    grid = ["sweep", "--bank", str(tmp_path / "bank"), "--method", "bypass", "linear", "--lr", "0.02", "0.002"]
    grid += ["--epochs", "2", "--seeds", "0", "1", "--json", "--out"]
    found: list[dict[str, Any]] = []
    for name, more in (("local", []), ("ray", ["--engine", "ray", "--workers", "2"])):
        capsys.readouterr()
        assert main([*grid, str(tmp_path / name), *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["methods"])
    assert list(found[0]) == list(found[1])
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    for folder in (p.name for p in (tmp_path / "local").glob("*-seed*")):
        a, b = (files(tmp_path / name / folder)["adapter_model.safetensors"] for name in ("local", "ray"))
        assert a == b
    assert main([*grid, str(tmp_path / "ray"), "--resume", "--engine", "ray"]) == 0, "there is nothing left to do"
    assert main([*grid, str(tmp_path / "x"), "--workers", "2"]) == 2
    assert "with --engine ray" in capsys.readouterr().err


def test_a_plan_on_paper(capsys: Any) -> None:
    """By hand: 13 layers of CLS, 768 wide, in half precision; 197 tokens; a byte a value and two a token in int8."""
    argv = ["bank", "plan", "--backbone", "vit_base_patch16_224", "--items", "3600", "--rate", "2", "--price", "4"]
    assert main([*argv, "--json"]) == 0
    rows = {row["tokens"]: row for row in json.loads(capsys.readouterr().out)}
    assert [rows[name]["bytes_an_item"] for name in ("first", "4", "all", "int8")] == [
        13 * 768 * 2,
        13 * 17 * 768 * 2,
        13 * 197 * 768 * 2,
        13 * 197 * 770,
    ]
    assert (rows["first"]["hours"], rows["first"]["dollars"], rows["first"]["shards"]) == (0.5, 2.0, 4)
    assert main([*argv, "--rate", "0"]) == 2
