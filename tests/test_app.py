"""The page's logic, without a page: projects, features, training, what is looked at, what is taken away."""

import json
import re
import shutil
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import restuning as rt
from restuning.app import look
from restuning.app.features import Engine, FeatureStore, engine
from restuning.app.given import from_files, from_folder
from restuning.app.handlers import Handlers
from restuning.app.home import Home
from restuning.app.inside import Inside
from restuning.app.project import OWN, Project
from restuning.app.training import folds_of
from restuning.app.views import View
from restuning.app.workbench import Workbench
from restuning.cli.main import main
from restuning.errors import CheckpointError, DataError, RestuningError
from restuning.training.calibrate import calibration_error, reliability
from restuning.training.logging import Epoch

MARKUP = "<img src=x onerror=alert(1)>"
COLOURS = {"amber": (230, 150, 30), "blue": (40, 60, 210), "green": (30, 170, 60)}


def picture(colour: tuple[int, int, int], seed: int) -> bytes:
    """A noisy square of a colour as a PNG."""
    noise = np.random.default_rng(seed).integers(-40, 40, (32, 32, 3))
    buffer = BytesIO()
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count: int = 8) -> list[tuple[str, bytes, str | None]]:
    return [
        (f"{i}.png", picture(c, 100 * k + i), name) for k, (name, c) in enumerate(COLOURS.items()) for i in range(count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A small project that was trained; tests leave its labels as they were."""
    project = Project(tmp_path_factory.mktemp("projects") / "colours")
    project.add(pictures())
    bench = Workbench(project)
    list(bench.compute())
    bench.train()
    return bench


# ---- calibration and novelty, public


def test_calibration_finds_the_temperature_that_logits_were_made_with() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) < generator.random((len(p), 1))).sum(1)  # drawn from the probabilities themselves
    found = rt.calibrate(torch.tensor(3 * logits), torch.tensor(labels))
    assert abs(found.temperature - 3) < 0.1 and found.after < 0.02 < 0.1 < found.before
    torch.testing.assert_close(found.probabilities(torch.ones(2, 4)), torch.full((2, 4), 0.25))


def test_the_temperature_is_the_minimum_of_scipys_search() -> None:
    from scipy.optimize import minimize_scalar

    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(60, 5)) * 4, generator.integers(0, 5, 60)
    logits[np.arange(60), labels] += 3

    def entropy(log_t: float) -> float:
        z = logits / np.exp(log_t)
        return float(-(z - np.log(np.exp(z).sum(1, keepdims=True)))[np.arange(60), labels].mean())

    best = np.exp(minimize_scalar(entropy, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8}).x)
    assert rt.calibrate(torch.tensor(logits), torch.tensor(labels)).temperature == pytest.approx(best, rel=1e-4)


def test_the_calibration_error_is_numpys() -> None:
    generator = np.random.default_rng(2)
    p = generator.dirichlet(np.ones(6), 500)
    labels = generator.integers(0, 6, 500)
    sure, right = p.max(1), p.argmax(1) == labels
    bins = np.minimum(np.ceil(sure * 10).astype(int), 10) - 1
    expected = sum(abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert calibration_error(torch.tensor(p), torch.tensor(labels), 10) == pytest.approx(expected)
    assert sum(count for _, count, _, _ in reliability(torch.tensor(p), torch.tensor(labels))) == 500


@pytest.mark.parametrize(
    ("logits", "labels"),
    [(torch.zeros(0, 3), torch.zeros(0).long()), (torch.full((2, 2), torch.nan), torch.zeros(2).long()),
     (torch.zeros(2, 3), torch.tensor([0, 3])), (torch.zeros(2, 3), torch.zeros(3).long())],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_refused(logits: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        rt.calibrate(logits, labels)


def test_novelty_is_the_distance_to_the_nearest_neighbour() -> None:
    generator = np.random.default_rng(3)
    bank, x = generator.normal(size=(200, 8)), generator.normal(size=(50, 8))
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (bank, x)]
    found = rt.novelty(torch.tensor(bank), false_alarms=0.1)
    np.testing.assert_allclose(found.distance(torch.tensor(x)).numpy(), 1 - (unit[1] @ unit[0].T).max(1), atol=1e-5)
    similar = unit[0] @ unit[0].T
    np.fill_diagonal(similar, -9)
    nearest = np.sort(1 - similar.max(1))
    assert found.threshold == pytest.approx(nearest[int(np.ceil(201 * 0.9)) - 1], abs=1e-5)
    assert found.false_alarms == pytest.approx((nearest > nearest[180]).mean()) and found.false_alarms <= 0.1


def test_the_false_alarms_of_novelty_hold_for_new_items_of_the_same_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(40):
        x = torch.randn(300, 6, generator=generator)
        rates.append(rt.novelty(x[:200], 0.1).is_new(x[200:]).float().mean())
    assert 0.06 < torch.stack(rates).mean() < 0.14
    assert rt.novelty(torch.eye(3)[[0, 0, 0, 1, 1]]).is_new(torch.eye(3)).tolist() == [False, False, True]


@pytest.mark.parametrize("bank", [torch.zeros(1, 3), torch.zeros(3), torch.full((3, 3), torch.inf)])
def test_a_bank_without_neighbours_is_refused(bank: torch.Tensor) -> None:
    with pytest.raises(DataError):
        rt.novelty(bank)
    with pytest.raises(DataError):
        rt.novelty(torch.eye(3), false_alarms=1)


# ---- a project is a folder that `folder:` reads


def test_a_project_is_what_folder_reads(tmp_path: Path) -> None:
    project = Project(tmp_path / "p")
    project.add([*pictures(3), ("loose.png", picture((9, 9, 9), 1), None)])
    task = rt.load_task(f"folder:{project.path}")
    assert task.classes == project.classes() == tuple(sorted(COLOURS))
    assert len(task.train) + len(task.test) == 9 == len(project.items(labelled=True))
    assert [p.label for p in project.items()].count(None) == 1
    other = Project(tmp_path / "q")  # and back
    other.add(from_folder(project.path))
    assert other.counts() == project.counts()


def test_labels_are_moves_between_folders(tmp_path: Path) -> None:
    project = Project(tmp_path / "p")
    project.add(pictures(3))
    key = project.items()[0].key
    project.mark_right([key])
    assert project.label([key], "new class") == 1 and project.counts() == {
        "amber": 2,
        "blue": 3,
        "green": 3,
        "new class": 1,
    }
    assert project.state["right"] == [], "a label that was changed is no longer confirmed"
    assert project.remove([key]) == 1 and project.counts()["new class"] == 0
    assert Project(project.path).counts() == project.counts()


def test_what_is_wrong_with_the_data_is_told(tmp_path: Path) -> None:
    project = Project(tmp_path / "p")
    first = picture((1, 2, 3), 0)
    added = project.add([("a.png", first, "x"), ("b.png", first, "x"), ("c.png", b"no picture", "x")])
    assert (added.count, added.there, len(added.refused)) == (1, ["b.png"], 1)
    (project.path / "y").mkdir()
    for name in ("x/again.png", "y/other.png"):
        (project.path / name).write_bytes(first)
    told = [line for line, _ in project.problems({"k": "?"})]
    assert any(line.startswith("in 2 classes (x, y)") for line in told) and any("too few" in line for line in told)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "train", "Test", "x" * 200, "a\0b", "a\nb", "__MACOSX"])
def test_names_that_no_class_can_have_are_refused(tmp_path: Path, name: str) -> None:
    project = Project(tmp_path / "p")
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        project.add_class(name)
    assert project.classes() == ()


def test_a_zip_gives_classes_and_nothing_outside(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("photos/cats/1.png", picture((1, 1, 1), 0))
        archive.writestr("../../evil.png", picture((1, 1, 1), 1))
        archive.writestr("photos/dogs/run.sh", b"rm -rf /")
        archive.writestr("__MACOSX/cats/1.png", b"")
        archive.writestr("2.png", picture((1, 1, 1), 2))
    project = Project(tmp_path / "inside" / "p")
    added = project.add(from_files([tmp_path / "a.zip"]))
    assert added.count == 2 and project.counts() == {"cats": 1} and not added.refused
    assert {p.name for p in tmp_path.rglob("*.png")} == {"1.png", "2.png"}
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(DataError):
        project.add(from_files([tmp_path / "b.zip"]))


def test_names_of_files_stay_inside(tmp_path: Path) -> None:
    project = Project(tmp_path / "p")
    names = ["../../x.png", "<img src=x onerror=alert(1)>.png", ".hidden.png", "a\nb.png", "x.png"]
    assert project.add([(n, picture((5, 5, 5), i), "c") for i, n in enumerate(names)]).count == 5
    assert all(p.path.parent == project.path / "c" for p in project.items())


def test_split_folders_and_damaged_state_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s" / "train").mkdir(parents=True)
    with pytest.raises(RestuningError, match="split"):
        Project(tmp_path / "s")
    project = Project(tmp_path / "p")
    (project.path / OWN / "project.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Project(tmp_path / "p")


# ---- features once


class Counting:
    """How many pictures a backbone saw."""

    def __init__(self, made: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen, live = 0, made.live

        def counted(pixels: torch.Tensor) -> object:
            self.seen += len(pixels)
            return live(pixels)

        monkeypatch.setattr(made, "live", counted)


def test_a_pass_that_was_cancelled_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path / "p")
    project.add(pictures(15))
    counting = Counting(engine(project.backbone, None), monkeypatch)
    first = next(iter(Workbench(project).compute()))
    assert (first.done, first.total) == (32, 45) and counting.seen == 32
    again = Workbench(Project(project.path))
    assert [p.total for p in again.compute()] == [13] and counting.seen == 45
    assert not list(again.compute()) and counting.seen == 45


def test_another_task_on_the_same_pictures_takes_no_pass(
    made: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(made.engine, monkeypatch)
    other = Workbench(Project(tmp_path / "second"))
    assert made.project.copy_to(other.project) == 24
    keys = [p.key for p in other.project.items()]
    other.project.label(keys[::2], "even")
    other.project.label(keys[1::2], "odd")
    assert not list(other.compute())
    assert set(other.train(["linear"]).held) == {"linear"} and counting.seen == 0


def test_kept_features_are_the_live_ones(made: Workbench) -> None:
    picture = made.labelled()[0]
    pixels = made.engine.how(Image.open(picture.path).convert("RGB"))[None]
    tuned = rt.adapt(rt.load_backbone(made.project.backbone), made.engine.recipes["bypass-query"].method, 3)
    live, kept = tuned.features(pixels), made.store.features("bypass-query", [picture.key])
    for layer, x in live.layers.items():
        torch.testing.assert_close(kept.layers[layer], x, atol=1e-4, rtol=1e-3)


def test_damaged_features_are_named(made: Workbench, tmp_path: Path) -> None:
    project = Project(tmp_path / "p")
    folder = project.own / "features" / made.engine.key
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        FeatureStore(project.own, made.engine)


# ---- training


def test_folds_hold_every_item_out_once_and_spread_classes() -> None:
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] * 30)
    folds = folds_of(labels)
    for c in range(3):
        counts = torch.bincount(folds[labels == c], minlength=4)
        assert counts.max() - counts.min() <= 1
    with pytest.raises(DataError):
        folds_of(torch.tensor([0, 0, 0]))


def test_colours_are_learnt_and_held_out(made: Workbench) -> None:
    result = made.result
    assert result is not None and made.fresh() and set(result.held) == {"linear", "bypass", "bypass-query"}
    for held in result.held.values():
        right = (held.logits.argmax(1) == result.labels).float()
        assert held.mean == pytest.approx(100 * right.mean().item(), abs=3) and held.mean > 80
    assert Workbench(Project(made.project.path)).result.best == result.best  # type: ignore[union-attr]


def test_a_picture_is_evaluated_by_a_model_that_did_not_see_it(tmp_path: Path) -> None:
    """Labels by chance cannot be known: held-out accuracy stays at chance, though every model fits what it saw."""
    project = Project(tmp_path / "p")
    grey = [(f"{i}.png", picture((128, 128, 128), i), f"class {i % 2}") for i in range(80)]
    project.add(grey)
    bench = Workbench(project)
    list(bench.compute())
    assert 25 < bench.train(["linear"]).held["linear"].mean < 75


def test_a_wrong_label_is_seen_first_and_relabelling_trains_again(made: Workbench) -> None:
    key = next(p.key for p in made.labelled() if p.label == "blue")
    try:
        made.change([key], "green")
        assert made.change([key], "green") is not None
        result = made.result
        assert result is not None and [result.keys[i] for i in made.mistakes()[:1]] == [key]
        order, flagged = made.wrong_labels()
        assert result.keys[order[0]] == key and flagged >= 1
        made.project.mark_right([key])
        assert key not in [result.keys[i] for i in made.mistakes()] + [result.keys[i] for i in made.wrong_labels()[0]]
    finally:
        made.change([key], "blue")
    assert made.fresh() and key not in [made.result.keys[i] for i in made.mistakes()]  # type: ignore[union-attr]


# ---- looking


def test_worst_pairs_of_many_classes_are_named() -> None:
    matrix = torch.diag(torch.full((102,), 10))
    matrix[7, 90], matrix[3, 4] = 5, 2
    assert look.worst_pairs(matrix)[0] == look.Pair(7, 90, 5, 5 / 15)
    names = [f"c{i}" for i in range(102)]
    assert look.named(names, look.worst_pairs(matrix)[0]) == "5 of c7 (33 %) were taken for c90"


def test_the_map_is_sklearns_components() -> None:
    from sklearn.decomposition import PCA

    x = torch.randn(50, 7)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    expected = PCA(2).fit_transform(unit)
    found = look.places(x).numpy()
    for k in range(2):
        assert abs(np.corrcoef(found[:, k], expected[:, k])[0, 1]) > 0.9999
    assert found.min() == 0 and found.max() == pytest.approx(1)


def test_what_is_most_alike_is_a_nearest_neighbour(made: Workbench) -> None:
    from sklearn.neighbors import NearestNeighbors

    keys = [p.key for p in made.labelled()]
    x = made.embeddings(keys).numpy()
    expected = NearestNeighbors(n_neighbors=5, metric="cosine").fit(x).kneighbors(x[:1])[1][0]
    assert made.alike(keys[0], 5) == [keys[i] for i in expected]


# ---- taking away


def test_the_adapter_that_is_taken_away_answers_as_the_command_line_does(made: Workbench) -> None:
    from restuning.runs.predict import predict

    folder, file = made.finish(), made.labelled()[0]
    about = made.about()
    assert about is not None and about["pictures"] == 24 and json.loads((folder / "run.json").read_text())
    (row,) = predict([folder], str(file.path), top=3)
    assert row["top"][0]["class"] == file.label and sum(c["probability"] for c in row["top"]) == pytest.approx(
        1, abs=1e-4
    )


def test_a_home_is_a_folder_of_projects_or_one_of_them(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert home.names() == [] and home.new("b") == "b" and home.new("a") == "a" and home.names() == ["a", "b"]
    (tmp_path / "home" / "given" / "cats").mkdir(parents=True)
    (tmp_path / "home" / "given" / "cats" / "1.png").write_bytes(picture((1, 1, 1), 0))
    assert Home(tmp_path / "home" / "given").names() == ["given", "a", "b"]
    for refused in (
        lambda: home.new("a"),
        lambda: home.new("../x"),
        lambda: home.bench("none"),
        lambda: home.bench(".."),
    ):
        with pytest.raises(DataError):
            refused()


def test_what_the_page_is_asked_wrongly_is_a_line_on_it(tmp_path: Path) -> None:
    on = Handlers(Home(tmp_path), local=False)
    on.home.new("p")
    asked = {"act": "label", "keys": ["nothing"], "label": "", "page": 0, "what": ""}
    assert "no class is chosen" in on.act("p", View(), asked)[0]
    assert "nothing is picked" in on.act("p", View(), {**asked, "keys": []})[0]
    assert "has not been trained" in on.act("p", View("mistakes"), {**asked, "act": "use", "what": "linear"})[0]
    assert (
        "cannot be named here" in next(on.add("p", None, "", folder=str(tmp_path)))
        and on.home.bench("p").project.items() == []
    )
    assert (
        "no project" in next(on.add("../p", None, ""))
        and "no project" in on.opened("<b>")[0]
        and "<b>" not in on.opened("<b>")[0]
    )
    (tmp_path / "not.png").write_bytes(b"<script>")
    assert "Refused: not.png cannot be read" in on.ask("p", str(tmp_path / "not.png"))


def test_a_push_gives_the_hub_the_adapter_and_its_card(made: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    pushed: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            pushed["repo"] = repo, private

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            pushed["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    on = Handlers(Home(made.project.path.parent))
    assert "Pushed: https://hub/me/colours" in list(on.push("colours", " me/colours ", True))[-1]
    assert pushed["repo"] == ("me/colours", True)
    assert pushed["files"] == {p.name: p.read_bytes() for p in made.adapter.iterdir() if p.is_file()}
    card = huggingface_hub.ModelCard(pushed["files"]["README.md"].decode()).data  # the hub's own reader
    assert (card.library_name, card.pipeline_tag) == ("restuning", "image-classification")
    pushed.clear()
    for local, repo in ((True, "../x/y"), (True, ""), (False, "me/colours")):
        assert "Refused" in list(Handlers(on.home, local).push("colours", repo, True))[-1]
    assert not pushed


def test_a_map_by_umap_says_what_is_missing(made: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    on = Handlers(Home(made.project.path.parent))
    assert (
        "needs the package &#39;umap-learn&#39;: pip install &#39;restuning[app]&#39;"
        in on.look("colours", "map", "umap")[1]
    )


def test_what_tuning_inside_takes_and_how_far_it_is(tmp_path: Path) -> None:
    project = Project(tmp_path / "p")
    project.add(pictures(10))
    run = Inside(Workbench(project))
    assert run.cost(20) is None and run.tuning().state == "none"
    project.update(seconds=0.5)
    assert run.cost(20) == pytest.approx(20 * 3 * 24 * 0.5)  # 24 of 30 are trained on
    log = [Epoch(i, 2.0 / (i + 1), 50.0, None, 0.1, 3.0).text(20) for i in range(5)]
    run.out.parent.mkdir()
    run.log.write_text("\n".join(["an opening line", *log]))
    (run.out.parent / "p.json").write_text(json.dumps({"settings": {"epochs": 20}, "pid": 0}))
    tuning = run.tuning()
    assert (tuning.state, tuning.epochs, tuning.left) == ("stopped", 20, pytest.approx(45.0))
    assert tuning.losses == pytest.approx([2.0, 1.0, 0.6667, 0.5, 0.4])


# ---- pages and numbers from the command line


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `restuning train` on three colours."""
    folder = tmp_path_factory.mktemp("runs")
    Project(folder / "photos").add(pictures())
    words = ["train", "--data", f"folder:{folder / 'photos'}", "--method", "linear", "--epochs", "3", "--quiet"]
    assert main([*words, "--out", str(folder / "run")]) == 0
    return folder


def self_contained(path: Path) -> str:
    """A page's text, which names no other file and no host."""
    text = path.read_text(encoding="utf-8")
    assert (
        not re.findall(r"(?:src|href)=\"(?!data:)[^\"]+", text)
        and "<script" not in text
        and "http" not in text.replace("http-equiv", "")
    )
    return text


def test_evaluate_writes_a_page_of_a_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_folder / "page"
    assert main(["evaluate", str(run_folder / "run"), "--report", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    numbers, text = json.loads((out / "report.json").read_text()), self_contained(out / "report.html")
    assert numbers["items"] == printed["examples"] == text.count("<circle") and "Confusion" in text
    assert next(iter(numbers["metrics"].items())) == list(printed.items())[2]
    assert main(["evaluate", str(run_folder / "run"), "--report", str(out)]) == 2, "nothing is overwritten"


def test_runs_are_compared_the_best_first(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "worse"
    shutil.copytree(run_folder / "run", other)
    result = json.loads((other / "result.json").read_text())
    result[f"test_{result['metric']}"] = -1.0
    (other / "result.json").write_text(json.dumps(result))
    assert main(["report", str(other), str(run_folder / "run"), "--out", str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in rows] == [str(run_folder / "run"), str(other)] and rows[0][
        "parameters"
    ] == 3 * 128 + 3
    assert "2 runs, the best first" in self_contained(tmp_path / "out" / "report.html")
    assert main(["report", str(run_folder / "run"), str(tmp_path)]) == 2


def test_predict_writes_a_page_of_answers(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, page = run_folder / "photos" / "blue", tmp_path / "answers.html"
    shutil.copy(given / "0.png", tmp_path / f"{MARKUP}.png")
    assert main(["predict", str(run_folder / "run"), str(given), "--html", str(page)]) == 0
    assert self_contained(page).count("<img") == 8
    assert (
        main(["predict", str(run_folder / "run"), str(tmp_path / f"{MARKUP}.png"), "--html", str(tmp_path / "b.html")])
        == 0
    )
    assert MARKUP not in self_contained(tmp_path / "b.html")
    assert main(["predict", str(run_folder / "run"), str(given), "--html", str(page)]) == 2


def test_planted_label_errors_are_found_first(tmp_path: Path) -> None:
    from restuning.app.bench import bench_app

    Project(tmp_path / "p").add(pictures(20))
    records = bench_app("labels", data=(f"folder:{tmp_path / 'p'}",), batch=60)
    ours = next(r["values"] for r in records if r["name"].startswith("restuning app"))
    assert ours["planted"] == 2 and ours["found"] == 2


def test_the_page_costs_are_ratios_to_one_pass(tmp_path: Path) -> None:
    from restuning.app.bench import WANTED, bench_app

    Project(tmp_path / "p").add(pictures(8))
    records = bench_app("app", data=(f"folder:{tmp_path / 'p'}",), rounds=1, batch=24)
    found = {(r["name"], *key.split(" / ")[::-1]) for r in records for key in r["ratios"]}
    assert found == set(WANTED) and all(v["median"] > 0 for r in records for v in r["ratios"].values())
