"""`restuning train` in two processes is the run of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from restuning.cli import main

DATA = ["--data", "digits", "--train-size", "45", "--test-size", "40", "--quiet", "--batch-size", "8", "--epochs", "2"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("method", ["bypass", "res-tuning"])
def test_two_processes_give_the_run_of_one(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *DATA, "--method", method, "--lr", "0.01", "0.001", "--json", "--out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    shared |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "restuning.cli", *argv, str(tmp_path / "two")],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    assert said[1][0] == "", "the first one speaks"
    assert main([*argv, str(tmp_path / "one")]) == 0
    one, two = json.loads(capsys.readouterr().out), json.loads(said[0][0])
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["lr"] == one["lr"] and two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=2.6)  # one image
    assert [e["loss"] for e in two["epochs"]] == pytest.approx([e["loss"] for e in one["epochs"]], rel=1e-4)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 1e-4 for k in a)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_a_rate_that_diverges_is_not_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *DATA, "--method", "res-tuning", "--lr", "1e30", "0.001", "--json", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lr"] == 0.001 and found["validation_score"]["1e+30"] is None
    assert not list((tmp_path / "run").glob("trial*.pt"))
