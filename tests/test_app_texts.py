"""The page's projects of texts: tables in, a folder class/file.txt, features without padding, an adapter out."""

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_text import WORDS, rows, save_model

import restuning as rt
from restuning.app import views
from restuning.app.answers import Answers
from restuning.app.given import from_files, from_folder
from restuning.app.handlers import Handlers
from restuning.app.home import Home
from restuning.app.project import Project
from restuning.app.take import lines
from restuning.app.views import View, gallery
from restuning.app.workbench import Workbench
from restuning.backbones.load import MINILM, describe_backbone
from restuning.cli.main import main
from restuning.errors import DataError
from restuning.runs.predict import predict

NAMES = ("gloomy", "merry")


def table(path: Path, count: int = 48, columns: tuple[str, str] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [columns, *((f"{text} word{20 + i % 20}", NAMES[y]) for i, (text, y) in told(count))]
        )
    return path


def told(count: int) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(rows(count)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A small project of texts that was trained."""
    home = Home(tmp_path_factory.mktemp("home"))
    bench = home.bench(home.new("moods"))
    bench.project.add(from_files([table(home.path / "moods.csv")]))
    bench.choose_backbone(f"hf:{model}")
    list(bench.compute())
    bench.train()
    return bench


def test_a_table_becomes_a_folder_that_the_command_line_reads(made: Workbench) -> None:
    task = rt.load_task(f"folder:{made.project.path}", test_size=1)
    items = [(task.train.item(i)[0], task.classes[task.train.labels[i]]) for i in range(len(task.train))]
    items.append((task.test.item(0)[0], task.classes[task.test.labels[0]]))
    with open(made.project.path.parent / "moods.csv", newline="", encoding="utf-8") as file:
        assert sorted(items) == sorted((row["text"], row["label"]) for row in csv.DictReader(file))


def test_kept_features_are_those_of_a_text_alone(made: Workbench) -> None:
    """In batches of texts of other lengths, padding changes nothing."""
    recipe = made.engine.recipes["bypass-mean"]
    tuned = rt.adapt(rt.load_backbone(made.project.backbone), recipe.method, 2)
    tokenizer = made.engine.how.load()
    for item in made.labelled()[:5]:
        with torch.no_grad():
            live = tuned.features(**tokenizer(item.path.read_text(), return_tensors="pt"))
        kept = made.store.features("bypass-mean", [item.key])
        for layer, x in live.layers.items():
            torch.testing.assert_close(kept.layers[layer], x, atol=1e-5, rtol=1e-4)


def test_moods_are_learnt_and_the_adapter_answers_as_the_command_line_does(made: Workbench) -> None:
    result = made.result
    assert result is not None and set(result.held) == {"linear-mean", "bypass-mean", "bypass-query-mean"}
    assert max(h.mean for h in result.held.values()) > 80
    text = "word3 word7 word1 word33"
    home = Home(made.project.path.parent)
    handlers = Handlers(home)
    assert "rt-best" in handlers.ask("moods", None, text)
    (answer,) = Answers(home).answer("moods", text)
    (row,) = predict([made.adapter], text, top=2)
    assert [c["class"] for c in row["top"]] == [name for name, _ in answer.top]
    assert row["top"][0]["probability"] == pytest.approx(answer.top[0][1], abs=1e-4)
    assert any(line.startswith("curl -F text=") for _, line in lines(made))


def test_a_text_that_is_relabelled_moves_and_is_shown_as_text(made: Workbench) -> None:
    item = next(p for p in made.labelled() if p.label == "merry")
    text = item.path.read_text()
    assert text in gallery(made, View("class:merry")) and "<img" not in gallery(made, View())
    made.change([item.key], "gloomy")
    try:
        assert any(p.read_text() == text for p in (made.project.path / "gloomy").iterdir())
    finally:
        made.change([item.key], "merry")


def test_longer_texts_than_the_backbone_reads_are_cut(made: Workbench, tmp_path: Path) -> None:
    project = Project(tmp_path / "p")
    long = [(f"{i}.txt", " ".join([WORDS[i], *WORDS * 5]).encode(), NAMES[i % 2]) for i in range(8)]
    assert project.add(long).count == 8
    bench = Workbench(project)
    bench.choose_backbone(made.project.backbone)
    assert [p.total for p in bench.compute()] == [8] and not bench.store.bad


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [("a.txt", b"\xff\xfe\xfa", "UTF-8"), ("a.txt", b" \n", "expected a text"),
     ("a.txt", b"x" * (2**20 + 1), "at most"), ("a.csv", b"text,label\n\"x", "line"),
     ("a.csv", b"one,two\n1,2\n", "columns one, two"),
     ("a.tsv", b"sentence1\tsentence2\tlabel\na\tb\t1\n", "pairs"), ("a.jsonl", b'{"text": 3', "JSON")],
)  # fmt: skip
def test_texts_that_cannot_be_used_are_one_line(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(data)
    on = Handlers(Home(tmp_path / "home"))
    on.home.new("p")
    told = list(on.add("p", [str(tmp_path / name)], ""))[-1]
    assert "efused: " in told and why in told and str(tmp_path) not in told
    assert on.home.bench("p").project.items() == []


def test_a_project_is_of_pictures_or_of_texts(made: Workbench, tmp_path: Path) -> None:
    for name in ("photos/a/1.png", "photos/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (len(name), 9, int(name[9]) * 90 if name[9].isdigit() else 3)).save(tmp_path / name)
    (tmp_path / "photos" / "a" / "README.txt").write_text("where they come from")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in (tmp_path / "photos").rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path))
    for i, given in enumerate((from_folder(tmp_path / "photos"), from_files([tmp_path / "photos.zip"]))):
        project = Project(tmp_path / f"p{i}")
        added = project.add(given)
        assert project.kind == "pictures" and not added.refused and added.count == len(project.items()) > 0
    refused = project.add([("a.txt", b"a text", "a")]).refused
    assert len(refused) == 1 and "of pictures" in refused[0]
    assert Project(made.project.path).kind == "texts"
    with pytest.raises(DataError, match="reads pictures, and this project is of texts"):
        made.choose_backbone("restuning-micro")


def test_the_text_encoder_of_the_list_costs_what_it_says() -> None:
    module = describe_backbone(MINILM)
    millions, limit = sum(p.numel() for p in module.parameters()) / 1e6, module.config.max_position_embeddings
    assert views.priced(MINILM) == f"{MINILM}: {millions:.1f} M parameters, texts of up to {limit} tokens"


def test_texts_in_files_are_trained_on_from_the_command_line(
    made: Workbench, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["train", "--data", f"folder:{made.project.path}", "--backbone", f"hf:{model}", "--epochs", 1]
    assert main([*map(str, words), "--method", "linear", "--out", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == 2
    (made.project.path / "gloomy" / "bad.txt").write_bytes(b"\xff")
    try:
        assert main([*map(str, words), "--method", "linear", "--out", str(tmp_path / "other")]) == 2
        assert "bad.txt is not UTF-8" in capsys.readouterr().err
    finally:
        (made.project.path / "gloomy" / "bad.txt").unlink()
