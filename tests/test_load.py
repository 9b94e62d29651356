"""The benchmarks of serving: short, and ended early."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from restuning.cli.main import main


def test_a_short_soak(capsys: Any) -> None:
    """Nonsense, slow and leaving clients, adapters that come and go: nothing is lost, no answer changes by a bit."""
    assert main(["bench", "soak", "--minutes", "0.08", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert values["changed_answers"] == values["lost"] == 0
    assert min(values[name] for name in ("requests", "malformed", "left", "changes")) > 0


def children(pid: int) -> set[int]:
    """Processes that it has started, and those that these have."""
    found = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            for one in map(int, file.read_text().split()):
                found |= {one, *children(one)}
    return found


def runs(pid: int) -> bool:
    """Whether it is there, and no zombie that nobody has asked for."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_benchmark_that_is_ended_leaves_no_server() -> None:
    command = [sys.executable, "-m", "restuning.cli", "bench", "serve", "--tasks", "1", "--rounds", "9"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        started: set[int] = set()
        while len(started) < 2 and process.poll() is None:
            time.sleep(0.05)
            started = children(process.pid)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert started and process.returncode == 143 and "terminated" in err
        end = time.monotonic() + 20
        while any(map(runs, started)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(runs, started))
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
