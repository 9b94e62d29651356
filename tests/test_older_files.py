"""What earlier versions saved can be read: `fixtures/files` was written by commit b1fa617; its README has the commands.

Scores are compared with those that the earlier version printed for the same files.
"""

import json
import shutil
from pathlib import Path

import pytest
from helpers import COMPILES

from restuning.cli.main import main
from restuning.features.bank import Bank
from restuning.runs.settings import read_run

FILES = Path(__file__).parent / "fixtures" / "files"
ADAPTERS = sorted(path.parent.name for path in FILES.glob("*/evaluate.json"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy whose records name the copied bank."""
    copy = tmp_path / "files"
    shutil.copytree(FILES, copy)
    for record in copy.rglob("*.json"):
        record.write_text(record.read_text().replace('"BANK"', json.dumps(str(copy / "bank"))))
    return copy


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_score_what_they_scored(files: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(files / name), "--json"]) == 0
    found, before = json.loads(capsys.readouterr().out), json.loads((files / name / "evaluate.json").read_text())
    assert found == {**before, "loss": pytest.approx(before["loss"], abs=2e-4)}


@pytest.mark.parametrize("name", [*ADAPTERS, "sweep/linear-seed0"])
def test_recorded_runs_are_read_and_written_alike(files: Path, name: str) -> None:
    record = json.loads((files / name / "run.json").read_text())
    now = read_run(files / name / "run.json").to_dict()
    assert {key: now[key] for key in record if key != "training"} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in record.items() if key != "training"
    }
    assert {key: now["training"][key] for key in record["training"]} == record["training"]


def test_banks_and_sweeps_are_read(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = Bank(files / "bank")
    features, labels = bank.rows("train").fetch(range(24))
    assert len(features.layers) == len(bank.layers) and len(labels) == 24
    out = tmp_path / "run"
    argv = [
        "train",
        "--bank",
        str(files / "bank"),
        "--method",
        "bypass",
        "--size",
        "2",
        "--epochs",
        "1",
        "--lr",
        "0.001",
        "--json",
    ]
    assert main([*argv, "--warmup-epochs", "0", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    before = json.loads((files / "from-bank" / "result.json").read_text())
    near = 1e-4 if COMPILES else 0.1  # older torch draws other initial values
    assert found["test_loss"] == pytest.approx(before["test_loss"], abs=near)
    assert main(["sweep", "--bank", str(files / "bank"), "--out", str(files / "sweep"), "--resume", *SWEEP]) == 0


SWEEP = ["--method", "linear", "--lr", "0.01", "--epochs", "1", "--seeds", "0"]
