"""What a newcomer does, in a clone of its own, with seconds: set-up, the demo, a folder of pictures, the docs.

python scripts/fresh.py [--out runs/fresh] [--skip docs]

Commands and Python are those of README.md, as they stand there. The pictures: satellite photographs of five classes
where ../shared/data has them, digits otherwise. Writes log.md (a row for each command, its last line, seconds), and
goes on to the next where one fails. Exit code 1 where one did.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EACH, CLASSES = 40, ("Forest", "River", "Highway", "Residential", "SeaLake")


def photos(clone: Path) -> None:
    """photos/CLASS/…: 40 of each of five classes; picture.jpg and more-pictures, for `predict`."""
    tars = sorted((ROOT.parent / "shared/data/eurosat").glob("*.tar"))
    if tars:
        with tarfile.open(tars[0]) as tar:
            count = dict.fromkeys(CLASSES, 0)
            for member in tar:
                name = Path(member.name)
                if member.isfile() and count.get(name.parent.name, EACH) < EACH:
                    count[name.parent.name] += 1
                    target = clone / "photos" / name.parent.name / name.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    else:
        code = """
import restuning as rt, pathlib
task = rt.load_task("digits", train_size=200, test_size=10)
for i, label in enumerate(task.train.labels):
    folder = pathlib.Path("photos", task.classes[label])
    folder.mkdir(parents=True, exist_ok=True)
    task.train.item(i).resize((64, 64)).save(folder / f"{i}.jpg")
"""
        subprocess.run([clone / ".venv/bin/python", "-c", code], cwd=clone, check=True)
    first = sorted((clone / "photos").rglob("*.jpg"))
    shutil.copy(first[0], clone / "picture.jpg")
    (clone / "more-pictures").mkdir()
    for path in first[-3:]:
        shutil.copy(path, clone / "more-pictures")


def commands(readme: str) -> list[tuple[str, str]]:
    """Name → what is typed, of README.md."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.M | re.S)
    (code,) = (text for kind, text in blocks if kind == "python" and 'Path("photos")' in text)
    (lines,) = (text for kind, text in blocks if not kind and text.startswith("restuning train"))
    typed = [("make demo", "make demo"), ("python, the lines of README.md", f"python - <<'END'\n{code}END")]
    return typed + [(line, line) for line in lines.splitlines()] + [("make docs", "make docs")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/fresh")
    parser.add_argument("--skip", nargs="*", default=[], help="commands that begin so are left out")
    args = parser.parse_args()
    clone = args.out.absolute() / "clone"
    rows, failed = [], 0

    def typed(name: str, command: str, cwd: Path) -> None:
        nonlocal failed
        start = time.perf_counter()
        path = f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"PATH": path}
        done = subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True)
        failed += done.returncode != 0
        lines = [line for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
        last = lines[-1].strip().replace("|", "\\|") if lines else ""
        rows.append(f"| `{name}` | {done.returncode} | {last[:160]} | {time.perf_counter() - start:.0f} |")
        print(rows[-1], flush=True)
        head = "| typed | exit code | the last line | seconds |\n|---|--:|---|--:|\n"
        (args.out / "log.md").write_text(head + "\n".join(rows) + "\n", encoding="utf-8")

    args.out.mkdir(parents=True, exist_ok=True)
    typed("git clone", f"git clone --quiet {ROOT} {clone}", args.out)
    for name, command in commands((clone / "README.md").read_text(encoding="utf-8")):
        if not any(name.startswith(word) for word in args.skip):
            if "photos" in command and not (clone / "photos").exists():
                photos(clone)
            typed(name, command, clone)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
