"""SIGKILL at random moments of every long command, resumed until it is done: `make kill`; a part of it in the tests.

Each attempt runs in a fork of one warm process, so that a kill falls on the command's own work and not on imports. In
the end every file is that of an undisturbed run, byte for byte; of JSON, which holds times, all that is no time.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

DATA = ("--data", "folder:photos", "--batch-size", "2", "--quiet")
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", *DATA, "--method", "res-tuning", "--epochs", "30", "--val-size", "4", "--augment"),
    "bank": ("bank", *DATA, "--views", "4"),
    "sweep": ("sweep", "--bank", "given", "--method", "linear", "bypass", "--lr", "0.01", "0.001", "--epochs", "60"),
    "search": ("search", *DATA, "--limit", "360000", "--epochs", "6", "--val-size", "6"),
    "reproduce": ("reproduce", "tiny", "--data-root", "x"),
    "train-diffusion": (
        *("train-diffusion", "--base", "base", "--data", "captions:squares", "--method", "res-tuning", "--width", "3"),
        *("--size", "16", "--lr", "0.01", "--epochs", "12", "--batch-size", "2", "--quiet"),
    ),
}  # fmt: skip
TIMES = ("seconds", "time", "memory", "peak", "epochs_per_second", "images_per_second", "commit", "finished")


def prepare(root: Path) -> None:
    """Pictures of two classes, a bank of them, a tiny pipeline and captions, in the working folder `root`."""
    from PIL import Image
    from test_diffusion import pipeline
    from test_reproduce import TINY

    from restuning.cli.main import main
    from restuning.paper.experiments import EXPERIMENTS

    EXPERIMENTS["tiny"] = TINY
    for c, colour in (("ant", (200, 30, 20)), ("bee", (20, 30, 200))):
        (root / "photos" / c).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (12, 10 + i), tuple(v + i for v in colour)).save(root / "photos" / c / f"{i}.png")
    (root / "squares").mkdir()
    rows = []
    for i, name in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 18), name).save(root / "squares" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"a {name} square"}))
    (root / "squares" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    pipeline().save_pretrained(root / "base")
    os.chdir(root)
    assert main(["bank", *DATA, "--out", "given"]) == 0


def attempt(argv: Iterable[str]) -> int:
    """The command in a fork; its process."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        from restuning.cli.main import main

        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            code = main(list(argv))
    finally:
        sys.stderr.flush()
        os._exit(code)


def finished(argv: Iterable[str]) -> float:
    """Seconds of the whole command."""
    start = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(attempt(argv), 0)[1])
    assert code == 0, f"{argv}: code {code}"
    return time.monotonic() - start


def killed(argv: tuple[str, ...], out: Path, kills: int, seconds: float, chance: random.Random) -> int:
    """Kill the command so often, somewhere within `seconds` of each of its starts, and have it end; how many kills
    found it running. What it finishes in spite of them is begun again in a folder of its own."""
    done = 0
    while done < kills:
        resumed = ("--resume",) if argv[0] != "reproduce" and out.exists() else ()
        child = attempt((*argv, "--out", str(out), *resumed))
        # early in most cases: a run that is never let on would never end
        time.sleep(seconds * chance.random() ** 2)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f"{argv[0]}: code {code} after {done} kills"
        if code == 0:
            return done
        done += 1
    finished((*argv, "--out", str(out), *(("--resume",) if argv[0] != "reproduce" and out.exists() else ())))
    return done


def timeless(value: Any) -> Any:
    """JSON without its times."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(word in str(k) for word in TIMES)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """Bytes, or what JSON holds but times; results.jsonl in any order, by the order in which jobs ended."""
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".pt":
        return str(timeless(torch.load(path, weights_only=True)))  # tensors at full length, see `main`
    if path.suffix == ".jsonl":
        return sorted(json.dumps(timeless(json.loads(line)), sort_keys=True) for line in path.read_text().splitlines())
    return path.read_bytes()


def differing(a: Path, b: Path, skip: Callable[[Path], bool]) -> list[str]:
    """Files that are not the same in both folders."""
    names = sorted({p.relative_to(f) for f in (a, b) for p in f.rglob("*") if p.is_file() and not skip(p)})
    return [
        str(name)
        for name in names
        if not (a / name).exists() or not (b / name).exists() or content(a / name) != content(b / name)
    ]


def aside(path: Path) -> bool:
    """Locks, and TensorBoard's events, whose names hold the time."""
    return path.name.endswith(".lock") or path.name.startswith("events.")


def main(kills: int, seed: int, only: list[str]) -> int:
    torch.set_num_threads(1)
    torch.set_printoptions(threshold=sys.maxsize, precision=9)
    chance, different = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(root := Path(folder))
        for name in only or COMMANDS:
            argv = COMMANDS[name]
            out, whole = root / name, root / f"{name}-whole"  # files hold the name of their folder: moved afterwards
            seconds, done, runs, wrong = finished((*argv, "--out", str(out))), 0, 0, set()
            out.rename(whole)
            while done < kills:
                done += killed(argv, out, kills - done, seconds, chance)
                wrong |= set(differing(whole, out, aside))
                runs += 1
                shutil.rmtree(out)
            different += len(wrong)
            print(f"{name}: {done} kills in {runs} runs, {len(wrong)} files differ {sorted(wrong)[:5]}", flush=True)
    return int(different > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=[*COMMANDS, []], help="commands")
    args = parser.parse_args()
    sys.exit(main(args.kills, args.seed, args.only))
