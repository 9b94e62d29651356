"""A sweep gives what its runs give one by one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import restuning as rt
from restuning.cli.main import main
from restuning.methods.files import to_dict
from restuning.methods.named import find_method
from restuning.runs import sweep as module

DATA = ["--data", "digits", "--train-size", "120", "--test-size", "60", "--quiet"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("sweep") / "bank"
    assert main(["bank", *DATA, "--tokens", "2", "--out", str(out)]) == 0
    return str(out)


def test_a_sweep_is_its_runs(bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    grid = ["--lr", "0.02", "0.002", "--epochs", "4", "--batch-size", "16"]
    methods = ["--method", "bypass", "bypass-grid2"]
    assert main(["sweep", "--bank", bank, *methods, *grid, "--seeds", "0", "3", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert found["bypass"]["points"] == 4 and found["bypass"]["parameters"]["tuners"] == 43_176
    for method in ("bypass", "bypass-grid2"):
        for k, seed in enumerate((0, 3)):
            folder = str(tmp_path / f"{method}-{seed}")
            run = ["train", "--bank", bank, "--method", method, *grid, "--seed", str(seed), "--out", folder, "--json"]
            assert main(run) == 0
            alone = json.loads(capsys.readouterr().out)
            row = found[method]["seeds"][k]
            assert row["lr"] == alone["lr"]
            both = zip(row["validation_score"].values(), alone["validation_score"].values(), strict=True)
            assert all(a == pytest.approx(b) for a, b in both)
            assert row["test_score"] == pytest.approx(alone["test_accuracy"], abs=1.7)  # one image of 60
            saved = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), out / f"{method}-seed{seed}")
            one = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), folder)
            for p, q in zip(saved.adapters.parameters(), one.adapters.parameters(), strict=True):
                assert ((p - q).norm() / q.norm()).item() < 1e-3
    assert main(["evaluate", str(out / "bypass-grid2-seed3"), "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert accuracy == pytest.approx(found["bypass-grid2"]["seeds"][1]["test_score"], abs=1.7)


def test_a_winner_is_trained_again_by_its_record(bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--method", "bypass", "--lr", "0.02", "0.002", "--epochs", "3", "--seeds", "0", "--val-size", "30"]
    assert main(["sweep", "--bank", bank, *grid, "--out", str(tmp_path / "s")]) == 0
    won = tmp_path / "s" / "bypass-seed0"
    assert main(["train", "--run", str(won / "run.json"), "--quiet", "--out", str(tmp_path / "again")]) == 0
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (won, tmp_path / "again"))
    assert all((a[name] - b[name]).norm() <= 1e-3 * b[name].norm() for name in a)


def test_a_sweep_goes_on_where_it_was(
    bank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["sweep", "--bank", bank, "--method", "bypass", "bypass-none", "--lr", "0.01", "--epochs", "1"]
    args += ["--seeds", "0", "--out", str(tmp_path / "s")]
    honest, calls = module._method, []

    def killed(settings: object, bank: object, method: str, out: Path) -> object:
        calls.append(method)
        if method == "bypass-none" and len(calls) == 2:
            raise KeyboardInterrupt
        return honest(settings, bank, method, out)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_method", killed)
    assert main(args) == 130
    assert main(args) == 2 and "holds a sweep: continue it with --resume" in capsys.readouterr().err
    assert main([*args, "--resume"]) == 0 and calls == ["bypass", "bypass-none", "bypass-none"]
    assert main([*args, "--resume", "--pool", "cls"]) == 2
    assert "holds a sweep of other settings" in capsys.readouterr().err


def test_bad_grids(bank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, words in {
        ("--lr", "0.1", "0.1"): "lrs [0.1, 0.1]: expected one or more, each once",
        ("--epochs", "0"): "epochs is 0",
        ("--method", "nothing"): "unknown method 'nothing'",
        ("--method", "lora"): "acts inside the backbone",
        ("--method", "bypass-grid4"): "build a bank with --tokens 4",
    }.items():
        assert main(["sweep", "--bank", bank, *more, "--out", str(tmp_path / "x")]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.json").write_text(json.dumps(to_dict(find_method("bypass"))))
    assert main(["bank", *DATA, "--views", "2", "--out", str(tmp_path / "views")]) == 0
    assert main(["sweep", "--bank", str(tmp_path / "views"), "--out", str(tmp_path / "x")]) == 2
    assert "2 views of each image" in capsys.readouterr().err
    two = [str(tmp_path / folder / "m.json") for folder in ("a", "b")]
    assert main(["sweep", "--bank", bank, "--method", *two, "--out", str(tmp_path / "x")]) == 2
    assert "two methods are called 'm'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_finer_bank_gives_what_a_bank_of_cls_gives(bank: str, tmp_path: Path) -> None:
    assert main(["bank", *DATA, "--out", str(tmp_path / "cls")]) == 0
    grid = ["--method", "bypass", "--lr", "0.01", "0.001", "--epochs", "3", "--seeds", "0", "1"]
    scores = []
    for path in (bank, str(tmp_path / "cls")):
        out = tmp_path / f"sweep-{len(scores)}"
        assert main(["sweep", "--bank", path, *grid, "--out", str(out)]) == 0
        scores.append(
            [s["validation_score"] for s in json.loads((out / "sweep.json").read_text())["methods"]["bypass"]["seeds"]]
        )
    assert scores[0] == scores[1]
