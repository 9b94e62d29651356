"""What the documents name exists: paths, modules, names of the library, commands and their flags."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from restuning.cli.main import parse
from restuning.errors import RestuningError

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")})
HISTORY = {"CHANGELOG.md"}  # of what is no more
each_document = pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.name not in HISTORY], ids=lambda p: str(p.relative_to(ROOT))
)


def words(text: str) -> set[str]:
    """What stands in backquotes, and the lines of blocks of code."""
    blocks = re.findall(r"```[^\n]*\n(.*?)```", text, re.S)
    rest = re.sub(r"```[^\n]*\n.*?```", "", text, flags=re.S)
    return {*re.findall(r"`([^`\n]+)`", rest), *(line for block in blocks for line in block.splitlines())}


@each_document
def test_paths_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    linked = {name.split("#")[0] for name in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)", text)}
    missing = [name for name in linked if not (path.parent / name).exists()]
    named = set(re.findall(r"(?<![\w/.-])((?:src|docs|scripts|tests|examples|benchmarks)/[\w./-]*\w)", text))
    missing += [name for name in named if not (ROOT / name).exists() and "*" not in name]
    assert not missing


@each_document
def test_modules_and_names_exist(path: Path) -> None:
    for name in set(re.findall(r"(?<![\w./])restuning((?:\.[A-Za-z_]\w*)+)", path.read_text(encoding="utf-8"))):
        parts, found = name[1:].split("."), importlib.import_module("restuning")
        if parts[-1] in ("bench", "bank") and len(parts) == 1:  # formats: restuning.bank/1
            continue
        for i, part in enumerate(parts):
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(".".join(["restuning", *parts[: i + 1]]))


@each_document
def test_commands_parse(path: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    for line in (word.strip() for word in words(text)):
        for command in re.findall(r"^(?:\$ )?(restuning [a-z][^#`]*)", line):
            if "…" in command or "..." in command or re.search(r"\b[A-Z]{2,}\b", command):
                continue  # a shortened one, or one with placeholders
            for part in re.split(r"\s(?:&&|;|\|)\s", command):
                try:
                    argv = shlex.split(part.split(" > ")[0])
                except ValueError:
                    continue
                if len(argv) > 1 and argv[0] == "restuning":
                    try:
                        parse(argv[1:])
                    except RestuningError as error:  # a part of a command may be shown
                        if not re.search("are required|expected (one|at least one) argument", str(error)):
                            raise AssertionError(f"{part}: {error}") from error
