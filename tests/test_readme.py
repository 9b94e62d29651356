"""What the README and the page of all of it say works, and its figures stand in the recorded results."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from restuning.backbones.load import describe_backbone
from restuning.cli.main import main, parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL = (ROOT / "docs/all-of-it.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the README trains on, two pictures to predict beside it."""
    monkeypatch.chdir(tmp_path)
    for name, colour in {"cat": (230, 60, 40), "dog": (40, 60, 230)}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            shade = tuple(max(0, c - 9 * i) for c in colour)
            Image.new("RGB", (48, 40), shade).save(tmp_path / "photos" / name / f"{i}.jpg")
    (tmp_path / "more-pictures").mkdir()
    for file in ("picture.jpg", "more-pictures/one.jpg"):
        Image.new("RGB", (48, 40), (200, 50, 40)).save(tmp_path / file)
    return tmp_path


def test_the_python_of_the_readme_learns_a_folder_of_pictures(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = blocks(README)
    assert len(list(filter(None, first.splitlines()))) <= 12
    names: dict[str, object] = {}
    exec(first, names)
    score, *predicted = capsys.readouterr().out.split()
    assert float(score) == 1.0 and "cat" in predicted[0]
    exec(second, names)
    for folder in ("my-task", "my-other-task"):
        assert sum(f.stat().st_size for f in (photos / folder).iterdir()) < 400_000


def test_the_commands_of_the_readme_do_the_same(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in README.splitlines() if line.startswith("restuning ")]
    assert len(lines) == 3
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    rows = capsys.readouterr().out.splitlines()
    assert rows[-5] == "input,adapter,class,probability"
    assert rows[-4].startswith("picture.jpg,runs/photos,cat,") and "more-pictures/one.jpg,runs/photos,cat," in rows[-2]


def _tables(page: str) -> dict[str, list[list[str]]]:
    """Of a page of results: its tables' rows by their first cell, which may be bold."""
    found: dict[str, list[list[str]]] = {}
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0]:
            found.setdefault(cells[0], []).append(cells[1:])
    return found


def test_the_figures_of_the_readme_are_recorded() -> None:
    """Each row's cells beside those of the tables that the README names below its own."""
    memory, step = _tables("docs/results/side-by-side/memory.md"), _tables("docs/results/bench/step.md")
    small, side = _tables("docs/results/small/report.md"), _tables("docs/results/small-side/report.md")
    rows = re.findall(r"^\| [^|`]*`([\w-]+)`[^|]*\|(.*)\|$", README.split("## Install")[0], re.M)
    assert [name for name, _ in rows] == ["full", "peft-lora", "res-tuning", "bypass", "bypass-query", "linear"]
    for name, cells in rows:
        trained, kept, time, *accuracy = (cell.strip(" *") for cell in cells.split("|"))
        assert [trained, kept] == memory[name][0][:2]
        ratio = step.get(f"{name} / full")
        assert time == ("1" if name == "full" else f"{float(ratio[0][2]):.2f}" if ratio else "–")
        source = side if name == "bypass-query" else small
        recorded = [row for row in source["lora" if name == "peft-lora" else name] if len(row) == 4][-1]
        assert accuracy == [f"{float(cell.split()[0]):.1f}" for cell in recorded[:3]]


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"torch": torch}
    assert len(blocks(ALL)) == 2
    for block in blocks(ALL):
        exec(block, names)
    assert "'trainable'" in capsys.readouterr().out


def test_the_commands_of_the_page_parse() -> None:
    lines = [line for line in ALL.splitlines() if line.startswith("restuning ")]
    assert len(lines) == 16
    for line in lines:
        parse(shlex.split(line)[1:])


def test_the_table_of_methods_is_what_params_prints() -> None:
    import restuning as rt

    vit = describe_backbone("vit_base_patch16_224")
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+) \|$", ALL, re.M))
    assert set(rows) == set(rt.METHODS)
    for method, printed in rows.items():
        tuned = rt.adapt(vit, method, 100)
        assert f"{rt.count(tuned)['trainable']:,}" == printed
        tuned.unload()


def test_the_tree_is_the_tree() -> None:
    tree = ALL.split("## The tree")[1].split("```")[1]
    for path in (ROOT / "src/restuning").iterdir():
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"):
            assert path.name in tree, path.name
