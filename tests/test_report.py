"""The report is self-contained, sets ours beside the paper's, and needs no torch."""

import re
import subprocess
import sys
from pathlib import Path
from xml.dom import minidom

import pytest

import restuning
from restuning.cli.main import main
from restuning.paper.experiments import EXPERIMENTS
from restuning.paper.report.tables import table
from restuning.paper.results import RESULTS, append

WITHOUT_TORCH = """
import sys, types
package = types.ModuleType("restuning")
package.__path__ = [sys.argv[1]]
sys.modules["restuning"] = package
from pathlib import Path
from restuning.paper.report import write
print(write(Path(sys.argv[2]), Path(sys.argv[3])), "torch" in sys.modules)
"""


def record(experiment: str, row: str, column: str, seed: int, score: float | None, **more: object) -> dict[str, object]:
    own = {
        "parameters": {"trainable": 480_000},
        "peak_bytes": 2 * 10**9,
        "kept_bytes": 2**20,
        "seconds": 1.0,
        "device": "cpu",
    }
    about = {"commit": "abc", "machine": "m", "pixels": "lossy", "backbone": "b", "lrs": [0.01], "epochs": [100]}
    key = {"experiment": experiment, "row": row, "column": column, "seed": seed, "score": score}
    return {**key, **own, **about, **more}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path, tab4 = tmp_path / "runs" / RESULTS, EXPERIMENTS["tab4"]
    rows = []
    for seed in (0, 1):
        for task in tab4.tasks:
            paper = tab4.rows[7].paper[task.name]
            gates = [0.1 * layer for layer in range(1, 5)]
            rows.append(record("tab4", "Res-Tuning", task.name, seed, paper + seed, gates=gates))
    rows.append(record("tab4", "LoRA", "DTD", 0, 10.0, parameters={"trainable": 300_000}))
    rows.append(record("tab4", "SSF", "DTD", 0, None))
    rows += [record("tab3a", name, "CIFAR-100", 0, 90.0) for name in ("Full", "Linear")]
    for shots in (1, 2, 4):
        rows += [record("small-fewshot", "bypass", f"Caltech-101, {shots}", s, 60.0 + shots + s) for s in (0, 1)]
    rows.append(record("own <b>", "mine | yours", "x", 0, 1.0))
    append(path, rows)
    bench = Path(__file__).parent.parent / "docs/results/bench/multitask.jsonl"
    (path.parent / bench.name).write_bytes(bench.read_bytes())
    return path.parent


def test_ours_beside_the_papers_with_both_means(results: Path, tmp_path: Path) -> None:
    from restuning.paper.results import read

    found = table(EXPERIMENTS["tab4"], [r for r in read(results) if r["experiment"] == "tab4"])
    cells = dict(zip(EXPERIMENTS["tab4"].columns, dict(found.lines)["Res-Tuning"], strict=True))
    assert cells["DTD"].difference == pytest.approx(0.5) and cells["DTD"].fits is True
    assert cells["DTD"].ours.spread == pytest.approx(0.5**0.5) and cells["DTD"].ours.count == 2
    assert cells["All"].ours.mean == pytest.approx(74.1 + 0.5, abs=0.1)
    assert cells["Group"].ours.mean == pytest.approx(76.32 + 0.5, abs=0.1)
    assert cells["parameters_M"].ours.mean == 0.48 and cells["memory_GB"].ours.mean == 2.0
    lora = dict(zip(EXPERIMENTS["tab4"].columns, dict(found.lines)["LoRA"], strict=True))
    assert lora["All"].ours is None and lora["DTD"].fits is False, "no mean of a part"


def test_a_mean_of_domains_is_of_the_targets() -> None:
    paper = EXPERIMENTS["tab5"].rows[4].paper
    rows = [record("tab5", "Res-Tuning", name, 0, paper[name]) for name in ("ImageNet", "V2", "Sketch", "A", "R")]
    cells = dict(table(EXPERIMENTS["tab5"], rows).lines)["Res-Tuning"]
    assert cells[-1].ours.mean == pytest.approx(paper["All"], abs=0.01) and cells[-1].fits


def test_the_pages(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "report"
    assert main(["report", str(results), "--out", str(out)]) == 0
    assert "report.html" in capsys.readouterr().out
    html, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html) and "http" not in re.sub(r"base64,[^\"]*", "", html)
    assert "own &lt;b&gt;" in html and "mine \\| yours" in text
    for words in ("+0.50 ✓", "✗", "Diverged: SSF on DTD", "restuning reproduce tab4 --data-root", "Commit abc"):
        assert words in html and words in text
    pictures = re.findall(r"\]\((\S+\.svg)\)", text)
    assert pictures == ["tab3a-costs.svg", "tab4-lambda.svg", "small-fewshot-shots.svg", "multitask.svg"]
    for name in pictures:
        drawn = (out / name).read_text()
        minidom.parseString(drawn)
        colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn))
        assert all(c[1:3] == c[3:5] == c[5:7] for c in colours), "grey alone"
    before = (out / "report.html").read_bytes()
    assert main(["report", str(results), "--out", str(out)]) == 0
    assert (out / "report.html").read_bytes() == before


def test_nothing_of_it_needs_torch(results: Path, tmp_path: Path) -> None:
    source = Path(restuning.__file__).parent
    argv = [sys.executable, "-c", WITHOUT_TORCH, str(source), str(results), str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout.strip() == "['tab3a', 'tab4', 'small-fewshot', 'own <b>', 'multitask'] False", done.stderr


def test_on_the_terminal_and_refused(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(results)]) == 0
    assert re.search(r"tab4 +Res-Tuning +DTD +72.40 ± 0.71", capsys.readouterr().out)
    for argv in (("report", str(tmp_path / "none")), ("report", str(tmp_path / "none"), "--out", str(tmp_path / "o"))):
        assert main(list(argv)) == 2 and "no results" in capsys.readouterr().err
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "multitask.jsonl").write_text("{}")
    assert main(["report", str(tmp_path / "bench"), "--out", str(tmp_path / "o")]) == 2
    assert "damaged" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(results), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write" in capsys.readouterr().err
