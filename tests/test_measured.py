"""Experiments of our own: they are run by one command, do nothing twice, and their tables are those recorded."""

import json
import re
import shlex
from pathlib import Path

import pytest

from restuning.cli.main import main, parse
from restuning.errors import RestuningError
from restuning.paper.experiments.measured import find_own, mean, once, ratio, table
from restuning.paper.experiments.ours import OWN

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RECORDED = {
    "vit-tiny": "vit_tiny",
    "methods": "methods",
    "resnet18": "resnet",
    "text": "text",
    "unet": "unet",
    "tasks": "tasks",
    "emoji": "emoji",
}


def tables(text: str) -> list[tuple[list[str], dict[str, list[str]]]]:
    """Columns, and rows by their first cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append((head, {row[0]: row for row in rows}))
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_tables_are_those_of_the_recorded_figures(name: str) -> None:
    """Every cell that both have: made now from the JSON lines, and written when they were recorded."""
    lines = (RESULTS / f"{RECORDED[name]}.jsonl").read_text().splitlines()
    now = tables(find_own(name).text([json.loads(line) for line in lines]) + "\n")
    then = tables((RESULTS / f"{RECORDED[name]}.md").read_text())
    assert len(now) == len(then) > 0
    compared = 0
    for (head, rows), (older_head, older) in zip(now, then, strict=True):
        assert rows.keys() == older.keys()
        for at, column in enumerate(head):
            if head.count(column) == older_head.count(column) == 1:
                for row in rows:
                    cell, before = rows[row][at], older[row][older_head.index(column)]
                    if cell and before.removesuffix(" + head") != cell:
                        assert cell == before, (row, column)
                    compared += bool(cell)
    assert compared > 2 * sum(len(rows) for _, rows in now)


@pytest.mark.parametrize("name", OWN)
def test_the_recorded_command_is_the_new_one(name: str) -> None:
    file = RESULTS / f"{RECORDED.get(name, name.replace('-', '_'))}.md"
    (command,) = re.findall(rf"`(restuning reproduce {name} [^`]*)`", file.read_text())
    args = parse(shlex.split(command)[1:])
    find_own(name, vars(args).get("Reproduce.set", ()))


def test_one_command_writes_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["reproduce", "bank-formats", "--out", str(tmp_path), "--set", "rows=64", "rounds=1"]
    assert main(argv) == 0
    assert "bank-formats.jsonl" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "bank-formats.jsonl").read_text().splitlines()]
    assert len(records) >= 3 and all(r["rows"] == 64 and r["seconds"] > 0 for r in records)
    text = (tmp_path / "bank-formats.md").read_text()
    assert "--set rows=64 rounds=1`" in text and all(r["format"] in text for r in records)
    (head, rows), *_ = tables(text)
    assert head[0] == "format" and len(rows) == len(records)


def test_wrong_settings_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, expected in (
        (["--set", "rows"], "expected KEY=VALUE, of rows, rounds"),
        (["--set", "columns=3"], "unknown settings: columns"),
        (["--set", "rows=many"], "Expected `int`"),
        (["--out", ""], "--out is missing"),
    ):
        out = [] if "--out" in settings else ["--out", str(tmp_path / "out")]
        given = [] if "--out" in settings else settings
        assert main(["reproduce", "bank-formats", *out, *given]) == 2
        said = capsys.readouterr().err.strip()
        assert expected in said and "\n" not in said
    assert main(["reproduce", "unet", "tab4", "--out", str(tmp_path)]) == 2
    assert "is run alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        found = once(tmp_path / "a" / "done.json", lambda: made.append(1) or {"score": 0.5})
        assert found["score"] == 0.5 and "commit" in found
    assert len(made) == 1


def test_cells() -> None:
    assert mean([1.0]) == "1.00" and mean([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert ratio({"min": 1, "median": 2, "max": 3}, 1) == "2.0 (1.0 to 3.0)"
    assert table(["a", "b"], [["x", "1"]]).splitlines() == ["| a | b |", "| --- | --: |", "| x | 1 |"]
    with pytest.raises(RestuningError, match="unknown settings: rows"):
        find_own("unet", ("rows=3",))
