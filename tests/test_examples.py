"""Every example runs, on little data, and is short."""

import runpy
import sys
from pathlib import Path

import pytest

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
