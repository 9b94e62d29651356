"""A part of `make kill`; see tests/killing.py."""

import subprocess
import sys
from pathlib import Path


def test_killed_commands_end_in_the_same_files() -> None:
    """In a process of its own, for its forks begin without the tests' threads and hooks."""
    script = Path(__file__).with_name("killing.py")
    run = subprocess.run(
        [sys.executable, script, "--kills", "1", "--only", "bank", "sweep", "search", "train-diffusion"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and run.stdout.count(" 0 files differ") == 4, run.stdout + run.stderr[-2000:]
