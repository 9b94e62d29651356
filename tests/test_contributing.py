"""The worked examples of CONTRIBUTING run, one after the other."""

import re
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_worked_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 3, "a tuner, a backbone, a side network"
    names: dict[str, object] = {"__name__": "contributing"}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)


def test_the_files_to_read_exist() -> None:
    source = Path(__file__).parent.parent / "src" / "restuning"
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT):
        assert (source / name).exists() or (source.parent.parent / name).exists(), name
