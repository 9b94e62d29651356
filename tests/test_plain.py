"""Plain data → settings: what was written is read, what does not fit is one line that says where."""

import json
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from restuning.errors import CheckpointError, Locked, RestuningError
from restuning.methods import FAMILIES, METHODS, from_dict, to_dict
from restuning.runs.search import SearchRun, SearchSettings
from restuning.runs.settings import Run, read_run
from restuning.training.config import TrainConfig
from restuning.utils.files import as_json, locked
from restuning.utils.plain import from_plain


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    sizes: tuple[int, ...] | None = None
    inner: Inner = field(default_factory=Inner)


def test_settings_come_back(tmp_path: Path) -> None:
    run = Run("digits", METHODS and to_dict(METHODS["bypass"]), blocks=(1, 2), lrs=(0.1, 1.0), training=TrainConfig(3))
    for kind, wanted in ((read_run, run), (SearchRun.read, SearchRun(run, SearchSettings(generations=2)))):
        (tmp_path / "run.json").write_bytes(as_json(wanted.to_dict()))
        assert json.loads(as_json(kind(tmp_path / "run.json").to_dict())) == json.loads(as_json(wanted.to_dict()))
    for method in (*METHODS.values(), *(m for family in FAMILIES.values() for m in family.values())):
        assert from_dict(json.loads(json.dumps(to_dict(method)))) == method


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "a", "size": 1}, "FILE has unknown settings: size"),
        ({"name": "a", "inner": {"rat": 1}}, "FILE has unknown settings: inner.rat"),
        ({}, "FILE is incomplete: it lacks name"),
        ({"name": 1}, "Expected `str`, got `int` - at `$.name`"),
        ({"name": "a", "sizes": [1, "2"]}, "Expected `int`, got `str` - at `$.sizes[1]`"),
        ({"name": "a", "inner": {"rate": True}}, "at `$.inner.rate`"),
        ([1], "FILE is damaged: Expected `object`, got `array`"),
        (None, "FILE is damaged: Expected `object`, got `null`"),
    ],
)
def test_what_does_not_fit_is_one_line(data: object, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_plain(Outer, data, "FILE", CheckpointError)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_text_is_read_where_it_may_be() -> None:
    assert from_plain(Inner, {"rate": "2"}, "x", strict=False) == Inner(2.0)
    with pytest.raises(RestuningError):
        from_plain(Inner, {"rate": "2"}, "x")


def take(out: Path) -> str:
    try:
        with locked(out):
            return "taken"
    except Locked:
        return "locked"


def test_a_folder_is_for_one_process(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with locked(tmp_path / "out"):
            assert pool.apply(take, (tmp_path / "out",)) == "locked" == take(tmp_path / "out")
        assert pool.apply(take, (tmp_path / "out",)) == "taken" == take(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(RestuningError, match="cannot write"), locked(tmp_path / "file"):
        pass
