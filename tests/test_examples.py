"""Every example runs, on little data, and is short."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import restuning as rt

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "trainer": (["--items", "24", "--epochs", "1"], "evaluation loss"),
    "loop": (["--items", "24", "--epochs", "1"], "next: restuning predict"),
    "grid_search": (["--items", "60", "--epochs", "2"], "60 pictures, 13 trainings, 60 pictures through the backbone"),
    "texts": (["--epochs", "4"], "next: restuning predict"),
    "several_tasks": (["--items", "30", "--epochs", "2"], "3 tasks, 1 pass of the backbone"),
}


def test_all_are_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)
    for name in SMALL:
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60, name
        assert f"examples/{name}.py" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, expected = SMALL[name]
    monkeypatch.setattr(sys, "argv", [name, *flags, "--out", str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))


def test_the_trainer_goes_on_from_a_checkpoint_of_the_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(EXAMPLES / "trainer.py"))
    monkeypatch.setattr(sys, "argv", ["trainer", "--items", "24", "--epochs", "1", "--out", str(tmp_path)])
    example["main"]()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("pytorch_model*"))
    backbone = rt.load_backbone("restuning-micro")
    saved, new = rt.Tuned.from_pretrained(backbone, checkpoint), rt.adapt(backbone, "lora", 10)
    trainer = example["AdapterTrainer"](new, TrainingArguments(str(tmp_path / "again"), report_to=[]))
    trainer._load_from_checkpoint(str(checkpoint))
    expected = saved.adapters.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in new.adapters.state_dict().items())
