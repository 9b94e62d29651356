"""Records are appended once each, whole, by any number of writers."""

import json
import multiprocessing
from pathlib import Path

import pytest

from restuning.errors import RestuningError
from restuning.paper.results import RESULTS, append, read, where


def record(row: str, seed: int, **more: object) -> dict[str, object]:
    return {"experiment": "e", "row": row, "column": "c", "seed": seed, "score": 1.5, **more}


def _write(path: Path, writer: int) -> None:
    for i in range(40):
        append(path, [record(f"row {i}", 0, by=writer, text="x" * 5000)])


def test_parallel_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / RESULTS
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write, args=(path, w)) for w in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
        assert w.exitcode == 0
    found = read(path.parent)
    assert sorted(r["row"] for r in found) == sorted(f"row {i}" for i in range(40))


def test_what_a_killed_writer_left_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / RESULTS
    assert append(path, [record("a", 0), record("a", 1)]) == 2
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"experiment": "e", "row"')
    assert len(read(path)) == 2
    assert append(path, [record("a", 1), record("b", 0)]) == 1
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == ["a", "a", "b"]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / RESULTS
    assert read(tmp_path) == []
    path.write_text("[]\n")
    with pytest.raises(RestuningError, match="line 1: a record without experiment"):
        read(path)
    path.write_text("nothing\n")
    with pytest.raises(RestuningError, match="line 1: no record"):
        append(path, [record("a", 0)])
    with pytest.raises(RestuningError, match="cannot write"):
        append(path / "below" / RESULTS, [record("a", 0)])


def test_where_it_was_computed() -> None:
    found = where()
    assert {"restuning", "torch", "python"} <= set(found["versions"]) and "cores" in found["machine"]
