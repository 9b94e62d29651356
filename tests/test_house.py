"""The structure of the source is as CONTRIBUTING describes it."""

import ast
import re
from pathlib import Path

import pytest

import restuning

SOURCE = Path(restuning.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TOP = {"__init__.py", "_types.py", "_version.py", "errors.py", "py.typed"}
FOLDERS = {
    "app", "backbones", "bench", "cli", "data", "diffusion", "features", "hooks", "methods", "model", "paper", "runs",
    "serving", "side", "training", "tuners", "utils",
}  # fmt: skip


def test_the_top_holds_four_files_and_the_folders() -> None:
    found = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert found - TOP == FOLDERS
    assert found >= TOP


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_longer_than_400_lines_and_no_class_than_300(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree, table = ast.parse(text), path.parent.name == "families"
    assert table or len(text.splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 300, node.name


def test_every_file_says_what_it_is_for() -> None:
    assert not [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


def test_a_tuner_declares_its_contract_in_one_place() -> None:
    """Attributes of tuners are probed in `tuners/base.py` alone."""
    probe = re.compile(r"(get|has)attr\((self\.)?(tuner|t|whole|module|like), \"")
    names = re.compile(r"\"(form|input|layout|mixes_tokens|only_on|span|unbound)\"")
    for path in FILES:
        if path.relative_to(SOURCE) == Path("tuners/base.py"):
            continue
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if probe.search(line)]
        assert not [line for line in found if names.search(line)], path


def test_nobody_reaches_into_a_tuned_models_private_parts() -> None:
    for path in FILES:
        if path.relative_to(SOURCE) in (Path("model/tuned.py"), Path("model/collection.py")):
            continue
        reach = re.findall(r"(?:tuned|first|live|model\.tuned)\._(?!_)\w+", path.read_text(encoding="utf-8"))
        assert not reach, (path, reach)
