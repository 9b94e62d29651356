"""`restuning train` in two processes is the run of one."""

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from two import in_two

from restuning.cli.main import main

DATA = ["--data", "digits", "--train-size", "45", "--test-size", "40", "--quiet", "--batch-size", "8", "--epochs", "2"]
RATES = ["--lr", "0.01", "0.001"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Of a method: (what a run of one process prints, its folder)."""

    @cache
    def run(method: str) -> tuple[dict[str, Any], Path]:
        out, stdout = tmp_path_factory.mktemp(method) / "one", StringIO()
        with redirect_stdout(stdout):
            assert main(["train", *DATA, "--method", method, *RATES, "--json", "--out", str(out)]) == 0
        return json.loads(stdout.getvalue()), out

    return run


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    ("method", "more"), [("bypass", ()), ("res-tuning", ()), ("bypass", ("--shard",)), ("res-tuning", ("--shard",))]
)
def test_two_processes_give_the_run_of_one(
    method: str, more: tuple[str, ...], tmp_path: Path, alone: Callable[[str], tuple[dict[str, Any], Path]]
) -> None:
    argv = ["train", *DATA, "--method", method, *RATES, "--json", "--out", str(tmp_path / "two"), *more]
    printed = in_two("-m", "restuning.cli", *argv)
    assert printed[1] == "", "the first process alone prints"
    (one, of_one), two = alone(method), json.loads(printed[0])
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["lr"] == one["lr"] and two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=2.6)  # one image
    assert [e["loss"] for e in two["epochs"]] == pytest.approx([e["loss"] for e in one["epochs"]], rel=1e-4)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (of_one, tmp_path / "two"))
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 1e-4 for k in a)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in of_one.iterdir())


def test_one_process_shares_with_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *DATA, "--shard", "--out", str(tmp_path / "run")]) == 2
    assert "one process alone has nobody to share with" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", *DATA, "--shard", "--method", "full", "--out", str(tmp_path / "run")]) == 2
    assert "only a frozen one is shared out" in capsys.readouterr().err


def test_a_rate_that_diverges_is_not_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *DATA, "--method", "res-tuning", "--lr", "1e30", "0.001", "--json", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lr"] == 0.001 and found["validation_score"]["1e+30"] is None
    assert not list((tmp_path / "run").glob("trial*.pt"))
