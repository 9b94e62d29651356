"""An experiment in miniature: chosen on validation, resumed without repeating, the same table after a kill."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
import torch

import restuning as rt
from restuning.cli.main import main
from restuning.errors import Locked, RestuningError
from restuning.methods.files import to_dict
from restuning.paper import jobs as module
from restuning.paper.experiments import EXPERIMENTS, Data, Experiment, Row
from restuning.paper.ray import on_ray
from restuning.paper.reproduce import EVERYTHING, Only, Settings, claim, cost, plan, reproduce
from restuning.paper.results import RESULTS, key_of, read
from restuning.utils.files import locked

DIGITS = "part:60,40:digits"
TINY = Experiment(
    "tiny",
    "a table of two columns",
    ("digits", "rotated", "counting", "Group", "All"),
    (
        Row("linear", "linear", {"digits": 50.0, "All": 40.0}),
        Row("bypass", "bypass", {"digits": 60.0}),
        Row("mean", "bypass-mean", {}),
        Row("lora", "lora", {"digits": 99.0}, lrs=(0.005,), epochs=(1,)),
        Row("nobody", None, {"digits": 1.0}),
    ),
    (
        Data("digits", DIGITS, "natural", 60, 40, targets={"rotated": f"altered:rotated:{DIGITS}"}),
        Data("counting", "part:60,40:sprites:count", "structured", 60, 40),
    ),
    backbone="restuning-micro",
    lrs=(0.01, 0.001),
    epochs=(1, 2),
    seeds=(0, 1),
)
SETTINGS = Settings("nowhere")


def run(out: Path, only: Only = EVERYTHING) -> tuple[list[str], list[str]]:
    said: list[str] = []
    return reproduce(plan(TINY, SETTINGS, only), out, SETTINGS, said.append), said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    failed, said = run(out)
    assert not failed and len(said) == 8 and "[8/8]" in said[-1] and "left)" in said[-1]
    return out


def test_the_plan_shares_a_bank_among_what_reads_the_same() -> None:
    found = plan(TINY, SETTINGS)
    assert [(tuple(j.methods), j.seeds, j.beside) for j in found if j.column == "digits"] == [
        (("linear", "bypass"), (0, 1), True),
        (("mean",), (0, 1), True),
        (("lora",), (0,), False),
        (("lora",), (1,), False),
    ]
    assert len({job.name for job in found}) == len(found) == 8
    grids = replace(TINY, rows=tuple(Row(name, name, {}) for name in ("bypass-grid4", "bypass-grid2", "linear")))
    assert [tuple(j.methods) for j in plan(grids, SETTINGS)[:2]] == [("bypass-grid4",), ("linear", "bypass-grid2")]
    maps = plan(TINY, replace(SETTINGS, backbone="resnet18-stages"), Only(("bypass",), ("digits",)))
    assert [(j.beside, j.seeds) for j in maps] == [(False, (0,)), (False, (1,))], "maps are no bank"
    mixes = rt.Bypass(rt.Convpass(3))
    alone = (Row("mean", "linear", {}, pool="mean", seeds=(0,), lrs=(0.1,)), Row("mixes", to_dict(mixes), {}))
    own = [j for j in plan(replace(TINY, rows=alone), SETTINGS) if j.column == "digits"]
    assert [(*j.methods, j.beside, j.pool, j.seeds, j.lrs) for j in own] == [
        ("mean", False, "mean", (0,), (0.1,)),
        ("mixes", False, None, (0,), (0.01, 0.001)),
        ("mixes", False, None, (1,), (0.01, 0.001)),
    ]
    (row, _) = cost(found, lambda backbone, size: 3.6)
    assert row["scores"] == 16 and row["hours"] == pytest.approx(row["passes"] / 1000) and row["passes"] > 640
    assert len(plan(TINY, SETTINGS, Only(("lora",), ("counting",)))) == 2
    with pytest.raises(RestuningError, match="'lara' is not there"):
        Only(("lara",)).check([TINY])


def test_every_cell_is_there_once_with_what_made_it(whole: Path) -> None:
    found = read(whole)
    assert len(found) == len({key_of(r) for r in found}) == 4 * 3 * 2
    for record in found:
        assert record["commit"] is not None and record["versions"]["torch"] and record["pixels"] == "original"
        assert 0 <= record["score"] <= 100 and record["device"] == "cpu"
    bypass = next(r for r in found if r["row"] == "bypass" and r["column"] == "digits")
    assert len(bypass["gates"]) == 8 and len(bypass["validation"]) == 4 and bypass["parameters"]["tuners"] > 0
    assert bypass["from"] == "bank" and bypass["chosen"]["epochs"] in (1, 2)
    lora, linear = (next(r for r in found if r["row"] == row) for row in ("lora", "linear"))
    assert 10 * linear["kept_bytes"] < bypass["kept_bytes"] < lora["kept_bytes"] / 5
    assert lora["from"] == "backbone" and lora["gates"] is None and lora["validation"] == {}


def test_a_gate_for_each_channel_is_told_by_its_mean(tmp_path: Path) -> None:
    tuned = rt.adapt(rt.load_backbone("restuning-micro"), rt.Bypass(gate=0.9, gates="channel"), 3)
    with torch.no_grad():
        tuned.adapters["default"].side.gate[7].zero_()
    tuned.save_pretrained(tmp_path)
    assert module._gates(tmp_path) == [0.9] * 7 + [0.5]


def test_its_report(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)
    assert main(["report", str(whole), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| **linear, ours** |" in text and "16 of 12" not in text and "12 of 12 cells" in text


def test_done_work_is_not_done_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (whole / RESULTS).read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("sweep", "execute", "build_bank"):
        monkeypatch.setattr(module, name, never)
    failed, said = run(whole)
    assert not failed and not said and (whole / RESULTS).read_bytes() == before


def test_killed_anywhere_it_ends_in_the_same_table(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = Only(columns=("digits",))
    calls: list[str] = []
    for name in ("sweep", "execute", "build_bank", "append"):
        honest = getattr(module, name)

        def killed(*args: object, name: str = name, honest: object = honest, **settings: object) -> object:
            calls.append(name)
            if calls.count(name) == 1:
                raise KeyboardInterrupt
            return honest(*args, **settings)  # type: ignore[operator]

        monkeypatch.setattr(module, name, killed)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, only)
    assert not run(tmp_path, only)[0]
    assert calls.count("build_bank") == 3 and calls.count("execute") == 3

    def table(path: Path) -> dict[object, float]:
        return {key_of(r): r["score"] for r in read(path) if r["column"] != "counting"}

    assert table(tmp_path) == table(whole)


def test_a_job_in_use_is_left_to_its_owner(whole: Path) -> None:
    job = plan(TINY, SETTINGS)[0]
    with locked(whole / "jobs" / job.name), pytest.raises(Locked):
        module.finish(job, whole)


def test_what_is_absent_is_one_line_and_the_rest_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = replace(TINY, tasks=(Data("digits", "folder:{root}/no"), TINY.tasks[1]), rows=TINY.rows[:1])
    failed = reproduce(plan(broken, SETTINGS), tmp_path, SETTINGS)
    assert len(failed) == 1 and "no such folder" in failed[0] and "absent:" in capsys.readouterr().err
    assert {r["column"] for r in read(tmp_path)} == {"counting"}
    with pytest.raises(RestuningError, match="results of other settings"):
        reproduce([], tmp_path, replace(SETTINGS, lrs=(0.1,)))


def test_two_that_begin_together(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for i in range(10):
            start = Barrier(2)

            def both(_: int, at: Path = tmp_path / str(i), start: Barrier = start) -> None:
                start.wait()
                claim(at, SETTINGS)

            list(pool.map(both, range(2)))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)
    argv = ["reproduce", "tiny", "--data-root", "x", "--row", "linear", "--column", "digits", "--seeds", "0"]
    assert main([*argv, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["scores"] == 2
    assert main([*argv, "--dry-run"]) == 0 and "hours on this machine" in capsys.readouterr().out
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert "[1/1] tiny, digits: linear" in capsys.readouterr().err and len(read(tmp_path)) == 2
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert all(any(line.startswith(f"{name} ") for line in listed.splitlines()) for name in ("tab4", "tiny", "small"))
    assert main(["reproduce", "--json"]) == 0 and "tab4" in [e["name"] for e in json.loads(capsys.readouterr().out)]
    for bad, words in {
        ("tab6", "--data-root", "x"): "another command: restuning train-diffusion",
        ("tiny",): "--data-root is missing",
        ("tiny", "--data-root", "x"): "--out is missing",
        ("tinny", "--data-root", "x"): "did you mean 'tiny'",
    }.items():
        assert main(["reproduce", *bad]) == 2
        assert words in capsys.readouterr().err


def test_a_ray_cluster_loses_nothing_with_a_worker(whole: Path, tmp_path: Path) -> None:
    """Two workers, of which the first that works is killed; every cell once, with the scores of a single process."""
    pytest.importorskip("ray")
    jobs, killed = plan(TINY, SETTINGS), []

    def kill() -> None:
        while not killed:
            for job in jobs:
                pid = _holder(tmp_path / "jobs" / job.name / ".lock")
                if pid is not None and (tmp_path / "jobs" / job.name / "sweep").exists():
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    said: list[str] = []
    assert not reproduce(jobs, tmp_path, SETTINGS, said.append, partial(on_ray, workers=2))
    killer.join(1)
    assert len(killed) == 1 and killed[0] != os.getpid() and len(said) == len(jobs)
    found = read(tmp_path)
    assert len(found) == len({key_of(r) for r in found}) == 24
    assert {key_of(r): r["score"] for r in found} == {key_of(r): r["score"] for r in read(whole)}


def _holder(lock: Path) -> int | None:
    """The process that has locked the file."""
    if not lock.exists():
        return None
    rows = [row.split() for row in Path("/proc/locks").read_text().splitlines()]
    return next((int(row[4]) for row in rows if row[1] == "FLOCK" and row[5].endswith(f":{lock.stat().st_ino}")), None)
