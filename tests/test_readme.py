"""What the README says works."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from restuning.backbones.load import describe_backbone
from restuning.cli.main import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"torch": torch}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2 and len(list(filter(None, blocks[0].splitlines()))) == 8
    for block in blocks:
        exec(block, names)
    assert "'trainable'" in capsys.readouterr().out
    assert sum(f.stat().st_size for f in (tmp_path / "my-task").iterdir()) < 400_000


def test_the_commands_parse() -> None:
    lines = [line for line in README.splitlines() if line.startswith("restuning ")]
    assert len(lines) == 13
    for line in lines:
        parse(shlex.split(line)[1:])


def test_the_table_of_methods_is_what_params_prints() -> None:
    import restuning as rt

    vit = describe_backbone("vit_base_patch16_224")
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+) \|$", README, re.M))
    assert set(rows) == set(rt.METHODS)
    for method, printed in rows.items():
        tuned = rt.adapt(vit, method, 100)
        assert f"{rt.count(tuned)['trainable']:,}" == printed
        tuned.unload()


def test_the_tree_is_the_tree() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for path in (ROOT / "src/restuning").glob("*.py"):
        assert path.name in tree, path.name
    for path in re.findall(r"\]\((docs/[\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
