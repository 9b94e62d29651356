"""Flags are made from settings: defaults stand there alone, older names are read, an error is one line."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import pytest

from restuning.bench.settings import Bench
from restuning.cli.arguments import Parser, filled, given
from restuning.cli.main import COMMANDS, main, parse
from restuning.diffusion.training import RECIPE, DiffusionRun
from restuning.errors import RestuningError
from restuning.runs.banks import BankSettings
from restuning.runs.settings import Run
from restuning.runs.sweep import Sweep
from restuning.utils.options import Option


@dataclass(frozen=True)
class Inner:
    depth: Annotated[int, Option("of it")] = 3
    rate: Annotated[float, Option()] = 0.5


@dataclass(frozen=True)
class Outer:
    files: Annotated[tuple[Path, ...], Option("several", positional=True)]
    last: Annotated[str, Option("one", positional=True)]
    sizes: Annotated[tuple[int, ...], Option("some", flag="size", aliases=("width",))] = (1, 2)
    kind: Annotated[Literal["a", "b"] | None, Option()] = None
    keep: Annotated[bool, Option("not kept")] = True
    loud: Annotated[bool, Option("loud")] = False
    hidden: int = 7
    inner: Inner = field(default_factory=Inner)


def read(*argv: str, of: object = Outer) -> Outer:
    parser = Parser(prog="test")
    parser.settings(of)
    return filled(Outer, parser.parse_args(argv))


def test_fields_are_flags() -> None:
    plain = Outer((Path("x"),), "y")
    assert read("x", "y") == plain
    assert read("x", "z", "y").files == (Path("x"), Path("z"))
    assert read("x", "y", "--size", "4", "5", "--no-keep", "--loud", "--kind", "b", "--depth", "8") == replace(
        plain, sizes=(4, 5), keep=False, loud=True, kind="b", inner=Inner(8)
    )
    assert read("x", "y", "--width", "4").sizes == (4,)
    for wrong in (("x",), ("x", "y", "--hidden", "1"), ("x", "y", "--kind", "c"), ("x", "y", "--depth", "q")):
        with pytest.raises(RestuningError, match=r"^[^\n]+ \(see test --help\)$"):
            read(*wrong)


def test_help_shows_each_default_once_and_no_older_name() -> None:
    parser = Parser(prog="test")
    parser.settings(Outer)
    text = parser.format_help()
    assert "(default 1 2)" in text and "(default 3)" in text and "--width" not in text and "--no-keep" in text
    shown = Parser(prog="test")
    shown.settings(Inner(rate=0.25))
    assert "(default 0.25)" in shown.format_help()


def test_what_was_not_given_is_left_to_a_base() -> None:
    parser = Parser(prog="test")
    parser.settings(Outer, partial=True)
    args = parser.parse_args(["x", "y", "--rate", "2"])
    base = Outer((Path("a"),), "b", (9,), inner=Inner(4, 1.0))
    assert filled(Outer, args, base) == replace(base, files=(Path("x"),), last="y", inner=Inner(4, 2.0))
    assert given(Outer, args) == {"files": (Path("x"),), "last": "y"} and given(Inner, args) == {"rate": 2.0}


def test_a_command_line_of_nothing_is_the_settings_themselves() -> None:
    assert filled(Run, parse(["train", "--data", "digits", "--out", "o"])) == Run("digits")
    assert filled(Sweep, parse(["sweep", "--bank", "b", "--out", "o"])) == Sweep("b")
    assert filled(BankSettings, parse(["bank", "--data", "digits", "--out", "o"])) == BankSettings("digits")
    assert filled(Bench, parse(["bench", "step"])) == Bench()
    args = parse(["train-diffusion", "--base", "b", "--data", "d", "--out", "o"])
    assert filled(DiffusionRun, args, DiffusionRun("x", "x")) == DiffusionRun("b", "d", training=RECIPE)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("train --out o --size 4", "train --out o --tuner-size 4"),
        ("params --size 4", "params --tuner-size 4"),
        ("bench step --batch 4", "bench step --batch-size 4"),
        ("train-diffusion --out o --size 64 --width 3", "train-diffusion --out o --image-size 64 --tuner-size 3"),
        ("generate --out o --prompts x --size 64", "generate --out o --prompts x --image-size 64"),
    ],
)
def test_older_names_are_read(older: str, newer: str) -> None:
    assert vars(parse(older.split())) == vars(parse(newer.split()))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = import_module(f"restuning.cli.{COMMANDS[name][0]}").EXAMPLE
    found = [shlex.split(line)[1:] for line in re.split(r" && |; ", example)]
    assert found[0][0] == name
    for argv in found:
        assert parse(argv).command == argv[0]
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and example in said and "--json" in said
    assert not re.search(r"--(size|width|batch)\b(?!-)", said)


def test_errors_are_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        ([], "COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["train"], "--out"),
        (["train", "--out", "o", "--epochs", "many"], "invalid int value: 'many'"),
        (["train", "--out", "o", "--blocks", "x"], "expected blocks such as 0-5"),
        (["train", "--out", "o", "--what"], "--what"),
        (["bench", "speed"], "invalid choice: 'speed'"),
        (["predict", "adapter"], "expected folders of saved adapters, then images, folders or texts"),
    ):
        assert main(argv) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("restuning: ") and words in said and "\n" not in said


def test_help_needs_no_torch() -> None:
    code = "import sys; from restuning.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
    assert all(re.search(rf"^ +{name}( |$)", done.stdout, re.M) for name in COMMANDS)
