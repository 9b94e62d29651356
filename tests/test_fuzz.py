"""A tenth of `make fuzz`; see tests/fuzzing.py."""

import subprocess
import sys
from pathlib import Path


def test_no_input_breaks_the_promise() -> None:
    """In a process of its own, for its forks begin without the tests' threads and hooks."""
    script = Path(__file__).with_name("fuzzing.py")
    run = subprocess.run([sys.executable, script, "--count", "160"], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and " 0 violations" in run.stdout, run.stdout + run.stderr[-2000:]
