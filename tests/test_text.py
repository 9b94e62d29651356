"""Texts and kinds of task: columns by name, padding that changes nothing, live banks, one line for bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import sklearn.metrics
import sklearn.utils.class_weight
import torch
import transformers as hf
from tiny import TEXT
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

import restuning as rt
from restuning.backbones.load import MINILM, reading_of
from restuning.cli.main import main
from restuning.data import Tokenise, load_task, prepared
from restuning.data.objective import IGNORED, balanced, confusion, objective
from restuning.data.text import Texts
from restuning.data.tokens import Tokenised
from restuning.errors import DataError, RestuningError
from restuning.features.bank import Bank, FromBank, FromFeatures, build, cache_features
from restuning.training.config import TrainConfig, data_order
from restuning.training.evaluate import loader, predict_logits
from restuning.training.loop import fit

WORDS = [f"word{i}" for i in range(40)]
GOOD, BAD = WORDS[:10], WORDS[10:20]


def save_model(folder: Path, kind: str = "bert", positions: int = 40) -> Path:
    """A tiny random encoder with its tokenizer of whole words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = {**TEXT, "max_position_embeddings": positions}
    hf.BertModel(hf.BertConfig(**config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def sentence(i: int, generator: torch.Generator) -> tuple[str, int]:
    """Words of one mood, of 2 to 9, and the mood."""
    label = i % 2
    pick = torch.randint(10, (2 + i % 8,), generator=generator).tolist()
    return " ".join((GOOD if label else BAD)[p] for p in pick), label


def rows(count: int, seed: int = 0) -> list[tuple[str, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [sentence(i, generator) for i in range(count)]


def write_splits(folder: Path, lines: dict[str, list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in lines.items():
        (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def table(count: int, seed: int) -> list[str]:
        return ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows(count, seed))]

    return write_splits(
        tmp_path_factory.mktemp("moods"),
        {"train.tsv": table(64, 0), "dev.tsv": table(16, 1), "test_labeled.tsv": table(20, 2)},
    )


FAST = ["--epochs", "6", "--lr", "0.01", "--quiet"]


def call(*argv: Any) -> int:
    return main([str(a) for a in argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    assert call(*argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("restuning: ")
    return said


# ---- tables


def test_a_folder_of_tables(moods: Path) -> None:
    task = load_task(f"text:{moods}")
    assert (task.kind, task.classes) == ("single-label", ("0", "1"))
    assert [len(task.train), len(task.val or ()), len(task.test)] == [64, 16, 20]
    assert sorted(task.train.item(i) for i in range(64)) == sorted((text,) for text, _ in rows(64))


def test_without_a_test_file_the_dev_file_is_tested_on(tmp_path: Path) -> None:
    pairs = [json.dumps({"premise": "a", "hypothesis": "b", "label": name}) for name in ("x", "y", "z")]
    write_splits(tmp_path, {"train.jsonl": pairs * 5, "dev.jsonl": pairs})
    task = load_task(f"text:{tmp_path}")
    assert task.val is None and len(task.test) == 3 and task.classes == ("x", "y", "z")
    assert task.train.item(0) == ("a", "b")


def test_columns_by_name_and_quotes_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('review,stars,other\n"good, really",5,x\nbad,1,y\n"so ""so""",5,z\n', encoding="utf-8-sig")
    task = load_task(f"text:{file}?text=review&label=stars", test_size=1)
    texts = {task.train.item(i)[0] for i in range(2)} | {task.test.item(0)[0]}
    assert texts == {"good, really", "bad", 'so "so"'} and task.classes == ("1", "5")
    tsv = tmp_path / "a.tsv"
    tsv.write_text('text\tlabel\na "quote\t0\nb\t1\nc\t1\n')
    assert 'a "quote' in {load_task(f"text:{tsv}", test_size=1).train.item(i)[0] for i in range(2)}


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "t.tsv"
    file.write_text("text\tlabel\n" + "".join(f"a{i}\t{v}\n" for i, v in enumerate(("0.5", "1e-05", "2.25", "-1.5E2"))))
    assert load_task(f"text:{file}", test_size=2).kind == "regression"


def test_kinds_of_labels(tmp_path: Path) -> None:
    def of(*labels: Any, text: Any = "a b", more: str = "") -> Any:
        file = tmp_path / "t.jsonl"
        file.write_text("\n".join(json.dumps({"text": text, "label": label}) for label in labels))
        return load_task(f"text:{file}{more}", test_size=2)

    multi = of(["x", "y"], ["y"], [], ["z"])
    assert multi.kind == "multi-label" and multi.classes == ("x", "y", "z")
    assert sorted([*multi.train.labels, *multi.test.labels]) == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0]]
    number = of(3, 0.5, 2.0, 3.5)
    assert number.kind == "regression" and number.classes == ("label",)
    assert sorted([*number.train.labels, *number.test.labels]) == [[0.5], [2.0], [3.0], [3.5]]
    assert of(1, 2, 3).kind == "single-label" and of(1, 2, 3, more="?kind=regression").kind == "regression"
    token = of(["N", "V"], ["V", "V"], ["N", "N"], text=["a", "b"])
    assert token.kind == "per-token" and token.classes == ("N", "V")
    file = tmp_path / "m.tsv"
    file.write_text("text\tlabel\na\tx|y\nb\ty\nc\tx\n")
    assert load_task(f"text:{file}?kind=multi-label", test_size=1).classes == ("x", "y")
    file.write_text("text\tlabel\na\t1\nb\t2.5\nc\t-.5\nd\t3\n")
    assert load_task(f"text:{file}", test_size=2).kind == "regression"
    file.write_text("question\tsentence\tlabel\nwho\tme\t0\nwhat\tthat\t1\nwhy\tso\t1\n")
    assert len(load_task(f"text:{file}", test_size=1).train.item(0)) == 2, "a question has its sentence"


BROKEN: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "no folder": ({}, "/nowhere", "no such file or folder"),
    "no training file": ({"dev.tsv": "text\tlabel\na\t0\n"}, "", "has no training file"),
    "two training files": (
        {"train.tsv": "text\tlabel\na\t0\n", "train.csv": "text,label\na,0\n"},
        "",
        "2 train files: train.csv, train.tsv",
    ),
    "an empty text": ({"train.tsv": "text\tlabel\na\t0\n \t1\n"}, "", "train.tsv, line 3: 'text' is empty"),
    "a wrong column": (
        {"train.tsv": "sentence\tlabel\na\t0\nb\t1\n"},
        "?text=sentance",
        "no column 'sentance' (did you mean 'sentence'?); it has sentence, label",
    ),
    "no known column": ({"train.csv": "review,label\na,0\nb,1\n"}, "", "no text column is known; it has review, label"),
    "mixed encodings": (
        {"train.tsv": b"text\tlabel\na\t0\n" + b"\xe9\t1\n"},
        "",
        "train.tsv, line 3: byte 0xe9 is not UTF-8",
    ),
    "a label never seen": (
        {"train.tsv": "text\tlabel\na\t0\nb\t1\n", "test.tsv": "text\tlabel\na\t2\n"},
        "",
        "test.tsv, line 2: label '2' is never seen in training (0, 1)",
    ),
    "no label": ({"train.tsv": "text\tlabel\na\t0\nb\t\n"}, "", "line 3: no 'label'"),
    "one label": ({"train.tsv": "text\tlabel\na\t0\nb\t0\n"}, "", "one label ('0')"),
    "fields": ({"train.tsv": "text\tlabel\na\t0\nb\n"}, "", "line 3: 1 fields, expected 2 (text, label)"),
    "broken json": ({"train.jsonl": '{"text": "a", "label": 0}\n{"text": \n'}, "", "line 2: no JSON"),
    "no object": ({"train.jsonl": "[1]\n"}, "", "line 1: expected an object"),
    "no rows": ({"train.tsv": "text\tlabel\n"}, "", "has no rows"),
    "no number": (
        {"train.tsv": "text\tlabel\na\tone\nb\t2\n"},
        "?kind=regression",
        "'label' is 'one': expected a number",
    ),
    "a strange setting": ({"train.tsv": "text\tlabel\na\t0\n"}, "?colour=text", "unknown setting colour"),
    "a strange kind": ({"train.tsv": "text\tlabel\na\t0\n"}, "?kind=ordinal", "unknown kind 'ordinal'"),
    "words and labels": (
        {"train.jsonl": '{"tokens": ["a", "b"], "tags": ["N"]}\n{"tokens": ["a"], "tags": ["V"]}\n'},
        "?kind=per-token",
        "line 1: 1 labels for 2 words",
    ),
    "words and texts": (
        {"train.jsonl": '{"text": "a", "label": 0}\n{"text": ["b"], "label": 1}\n'},
        "",
        "line 2: 'text' is not of the kind of the first row's",
    ),
    "an open quote": ({"train.csv": 'text,label\n"a,0\nb,1\n'}, "", "unexpected end of data"),
    "no finite number": (
        {"train.jsonl": '{"text": "a", "label": 0.5}\n{"text": "b", "label": NaN}\n'},
        "",
        "line 2: no JSON (NaN is no number: expected a finite one)",
    ),
    "labels that are none": (
        {"train.jsonl": '{"text": "a", "label": [{"a": 1}]}\n'},
        "",
        "line 1: 'label' is [{'a': 1}]: expected a list of labels",
    ),
    "a name that only begins so": ({"trainer.csv": "text,label\na,0\nb,1\n"}, "", "has no training file"),
    "no words": ({"train.tsv": "text\ttags\na b\tN\nc\tV\n"}, "?kind=per-token", "need 'text' as a list of words"),
}


@pytest.mark.parametrize(("files", "rest", "words"), BROKEN.values(), ids=BROKEN)
def test_bad_tables_are_one_line(
    files: dict[str, Any], rest: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert words in refused(capsys, "data", f"text:{tmp_path}{rest}")


def test_glue_needs_a_hub_and_its_layout_is_read_from_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nyu-mll/glue" in refused(capsys, "data", "glue:sst2") and "names no task" in refused(
        capsys, "data", "glue:"
    )
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
            "idx": datasets.Value("int32"),
        }
    )

    def made(labels: list[int]) -> Any:
        rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": v, "idx": i} for i, v in enumerate(labels)]
        return datasets.Dataset.from_list(rows, features=features)

    splits = {"train": made([2, 1, 0, 0]), "validation_matched": made([1, 2]), "test_matched": made([-1])}
    datasets.DatasetDict({**splits, "test": made([-1, -1])}).save_to_disk(tmp_path / "mnli")
    task = load_task(f"hf:{tmp_path / 'mnli'}")
    assert task.classes == ("entailment", "neutral", "contradiction"), "in the data set's own order"
    assert sorted(task.train.labels) == [0, 0, 1, 2] and task.test.labels == [1, 2] and task.val is None
    assert task.test.item(0) == ("p0", "h0")


def test_tables_that_name_images(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    file = tmp_path / "metadata.jsonl"
    labels = [["red"], ["red", "dark"], ["dark"], []]
    file.write_text("\n".join(json.dumps({"file_name": f"{i}.png", "labels": v}) for i, v in enumerate(labels)))
    task = load_task(f"table:{file}", test_size=1)
    assert task.kind == "multi-label" and task.classes == ("dark", "red")
    backbone = rt.load_backbone("restuning-micro")
    x, y = prepared(task.train, reading_of(backbone))[0]
    assert x.shape == (3, 64, 64) and y.shape == (2,) and y.dtype == torch.float32


# ---- tokens


def reading(model: Path, **more: Any) -> Tokenise:
    how = reading_of(rt.load_backbone(f"hf:{model}"), **more)
    assert isinstance(how, Tokenise)
    return how


def test_batches_are_padded_to_their_own_longest(model: Path, moods: Path) -> None:
    task = load_task(f"text:{moods}")
    examples = prepared(task.train, reading(model))
    for inputs, labels in loader(examples, 8):
        longest = inputs["attention_mask"].sum(1).max()
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (8, longest) and labels.shape == (8,)
        assert torch.equal(inputs["input_ids"] == 0, inputs["attention_mask"] == 0)
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    expected = tokenizer(task.train.item(5)[0])
    assert examples[5][0]["input_ids"] == expected["input_ids"]


def test_words_have_their_labels_at_their_first_token(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    rows = [{"tokens": ["word1", "wordx", "word3"], "tags": ["A", "B", "A"]}, {"tokens": ["word2"], "tags": ["B"]}] * 2
    file.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(f"text:{file}", test_size=1)
    ((inputs, labels),) = loader(prepared(task.train, reading(model)), 3)
    for ids, row in zip(inputs["input_ids"], labels, strict=True):
        known = {(5, 1, 7): [0, 1, 0], (6,): [1]}
        inside = tuple(i for i in ids.tolist() if i not in (0, 2, 3))
        assert row[row != IGNORED].tolist() == known[inside] and row[0] == IGNORED


def test_words_of_a_byte_level_tokenizer_begin_with_a_blank(tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator([" good film plot"] * 50, trainers.BpeTrainer(vocab_size=320, special_tokens=special))
    bpe.model.save(str(tmp_path))
    hf.RobertaTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    how = Tokenise(str(tmp_path), 40, 400)
    texts = [(["good", "film", "plot"],), (["film"],)]
    words = Tokenised(Texts(texts, [[0, 1, 0], [1]], ["a", "b"]), how)
    whole = Tokenised(Texts([("so good film plot",)], [0], ["a"]), how)
    said = [how.load().convert_ids_to_tokens(words[0][0]["input_ids"])[1:-1], words[0][1][1:-1]]
    assert said == [["Ġgood", "Ġfilm", "Ġplot"], [0, 1, 0]]
    assert whole[0][0]["input_ids"][-4:-1] == words[0][0]["input_ids"][1:-1]


def test_a_task_of_one_label(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.jsonl"
    lines = [json.dumps({"text": text, "label": ["good"] if label else []}) for text, label in rows(60)]
    file.write_text("\n".join(lines))
    train = ["train", "--data", f"text:{file}", "--backbone", f"hf:{model}", "--method", "linear", "--epochs", "1"]
    assert call(*train, "--test-size", "20", "--quiet", "--out", tmp_path / "a", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == "map" and 0 <= result["test_exact"] <= 100
    assert call("evaluate", tmp_path / "a", "--per-class", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["per_class"]["f1"]) == 1
    assert call("predict", tmp_path / "a", "word1 " * 30, "--json") == 0, "longer than the name of a file can be"
    assert "--batch-size 0" in refused(capsys, "evaluate", tmp_path / "a", "--batch-size", "0")
    assert "shots are so many of each class" in refused(capsys, "data", f"text:{file}", "--shots", "2")
    assert "only images with one class each" in refused(capsys, "data", "-", f"text:{file}", "--check")


def test_what_a_tokenizer_says_no_to(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = write_splits(tmp_path / "long", {"train.tsv": ["text\tlabel", "word1 " * 50 + "\t0", *["word2\t1"] * 5]})
    train = ["train", "--data", f"text:{long}", "--backbone", f"hf:{model}", "--out", tmp_path / "out", *FAST]
    said = refused(capsys, *train, "--test-size", "1", "--method", "linear")
    assert "line 2: 52 tokens, and the model reads at most 40 (--max-length 40, in training, has texts cut)" in said
    assert not (tmp_path / "out").exists(), "nothing half-written"
    assert call(*train, "--test-size", "1", "--max-length", "20", "--method", "linear") == 0
    capsys.readouterr()
    again = ["--data", f"text:{long}", "--out", tmp_path / "o2"]
    assert "at most the model's 40" in refused(capsys, *train, *again, "--max-length", "99")
    other = save_model(tmp_path / "other")
    capsys.readouterr()  # transformers' bars
    tokenizer = hf.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    tokenizer.save_pretrained(other)
    assert "it has 53 tokens, the model knows 50" in refused(capsys, *train, *again, "--tokenizer", other)
    assert "no tokenizer at" in refused(capsys, *train, *again, "--tokenizer", tmp_path / "none")
    padded = replace(reading(model), pad=1)
    with pytest.raises(DataError, match="it pads with 0, the model with 1"):
        padded.load()
    images = ["train", "--data", "digits", "--backbone", f"hf:{model}", "--out", tmp_path / "o3"]
    assert "is an image, which this backbone does not read" in refused(capsys, *images, *FAST)
    texts = ["train", "--data", f"text:{long}", "--test-size", "1", "--out", tmp_path / "o4", *FAST]
    assert "is a text, which this backbone does not read" in refused(capsys, *texts)
    assert "reads images: a tokenizer" in refused(capsys, *texts, "--max-length", "9")
    assert "an image size and a crop are for images" in refused(capsys, *train, *again, "--crop")
    short = ["--max-length", "20", "--test-size", "2"]
    assert "augmentation and views are for images" in refused(capsys, *train, *again, *short, "--augment")
    assert "there are no classes" in refused(
        capsys, *train, "--data", f"text:{long}?kind=regression", *again[2:], *short, "--class-weights", "balanced"
    )


def test_roberta_reads_two_tokens_less_than_it_has_positions() -> None:
    config = hf.RobertaConfig(**{**TEXT, "pad_token_id": 1})
    how = reading_of(hf.RobertaModel(config))
    assert isinstance(how, Tokenise) and (how.limit, how.pad, how.vocabulary) == (38, 1, 50)


def test_texts_of_a_length_go_together_and_each_once() -> None:
    lengths = torch.randint(1, 100, (1003,)).tolist()
    batches = data_order(1003, 8, 0, 3, lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(1003)) and batches != data_order(
        1003, 8, 0, 4, lengths
    )
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    plain = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in data_order(1003, 8, 0, 3)]
    assert sum(spread) < 0.2 * sum(plain)
    with pytest.raises(RestuningError, match="have no length"):
        fit(nn.Linear(2, 2), [(torch.zeros(2), 0)], None, TrainConfig(group_by_length=True))  # type: ignore[arg-type]


# ---- training, banks, prediction


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("method", ["linear", "bypass", "bypass-mean", "lora", "res-tuning"])
def test_a_batch_says_what_each_text_says_alone(model: Path, moods: Path, method: str, pool: str) -> None:
    backbone = rt.load_backbone(f"hf:{model}").double()
    tuned = rt.adapt(backbone, method, 2, pool=None if method == "bypass-mean" else pool).eval()
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    examples = prepared(load_task(f"text:{moods}").train, reading(model))
    together, labels = predict_logits(tuned, examples, 64)
    for i in range(0, 64, 9):
        inputs, label = examples.collate([examples[i]])
        torch.testing.assert_close(tuned(inputs)[0].float(), together[i], rtol=1e-5, atol=1e-6)
        assert label == labels[i]


@pytest.mark.parametrize("tokens", ["first", "mean", "all"])
@pytest.mark.parametrize(
    ("method", "pool"),
    [
        ("linear", "cls"),
        ("linear", "mean"),
        ("bypass-none", "mean"),
        ("bypass", "cls"),
        ("bypass", "mean"),
        ("bypass-mean", None),
    ],
)
def test_a_bank_of_texts_is_live(
    model: Path, moods: Path, tmp_path: Path, method: str, pool: str | None, tokens: str
) -> None:
    """Logits and gradients from what was kept are those of the texts themselves; or it is refused."""
    backbone, task, how = rt.load_backbone(f"hf:{model}"), load_task(f"text:{moods}"), reading(model)
    keeper = rt.adapt(
        backbone, rt.Bypass(grid=1 if tokens == "mean" else None), pool={"first": "cls", "all": "cls+mean"}.get(tokens)
    )
    build(keeper, task, how, tmp_path / "bank", batch_size=8)
    bank = Bank(tmp_path / "bank")
    live = rt.adapt(rt.load_backbone(f"hf:{model}"), method, 2, pool=pool)
    view = live.request.tokens.tokens
    assert view == {"cls": "first", "mean": "all" if method == "bypass" else "mean", None: "mean"}[pool]
    if view != tokens and tokens != "all":
        with pytest.raises(RestuningError, match="build a bank with --tokens"):
            bank.accepts(live)
        return
    bank.accepts(live)
    with torch.no_grad():
        for p in live.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model_ = FromFeatures(live)
    from_bank = predict_logits(model_, FromBank(bank, bank.source().train), 8)[0]
    examples = prepared(load_task(f"text:{moods}").train, how)
    places = [int(name.removesuffix("]").rpartition("[")[2]) for name in bank.source().train.names]
    assert places == list(range(64))
    torch.testing.assert_close(from_bank, predict_logits(live, examples, 16)[0], rtol=1e-4, atol=1e-5)
    kept = cache_features(live, examples, 8)
    torch.testing.assert_close(from_bank, predict_logits(FromFeatures(live), kept, 5)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "bypass", "lora", "res-tuning"])
def test_train_evaluate_and_predict(
    model: Path, moods: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--group-by-length", "--class-weights", "balanced"] if method in ("lora", "res-tuning") else []
    train = ["train", "--data", f"text:{moods}", "--backbone", f"hf:{model}", "--method", method, "--pool", "mean"]
    assert (
        call(*train, "--lr", "0.01", "0.001", "--epochs", "6", "--quiet", *more, "--out", tmp_path / "a", "--json") == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == "accuracy" and result["test_accuracy"] >= 80
    assert result["examples"] == {"train": 64, "val": 16, "test": 20}, "its own dev split chooses"
    picture = tmp_path / "confusion.png"
    assert call("evaluate", tmp_path / "a", "--json", "--per-class", "--confusion", picture) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-3) and picture.stat().st_size > 1000
    assert found["per_class"]["count"] == [10, 10] and len(found["per_class"]["recall"]) == 2
    lines = tmp_path / "lines.txt"
    lines.write_text(" ".join(GOOD) + "\n" + " ".join(BAD) + "\n")
    assert call("predict", tmp_path / "a", lines, "--json") == 0
    assert [row["top"][0]["class"] for row in json.loads(capsys.readouterr().out)] == ["1", "0"]
    assert call("predict", tmp_path / "a", " ".join(GOOD)) == 0
    assert "%" in capsys.readouterr().out
    assert "there is no text" in refused(capsys, "predict", tmp_path / "a", " ")
    assert "a pair parted by one tab" in refused(capsys, "predict", tmp_path / "a", "a\tb\tc")
    assert "is no .txt file" in refused(capsys, "predict", tmp_path / "a", picture)


def test_from_a_bank_as_from_texts(
    model: Path, moods: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", f"text:{moods}", "--backbone", f"hf:{model}"]
    assert call("bank", *data, "--tokens", "mean", "--out", tmp_path / "bank", "--quiet") == 0
    config = ["--method", "bypass-mean", *FAST, "--json"]
    capsys.readouterr()
    assert call("train", "--bank", tmp_path / "bank", *config, "--out", tmp_path / "a") == 0
    away = json.loads(capsys.readouterr().out)
    assert call("train", *data, *config, "--out", tmp_path / "b") == 0
    live = json.loads(capsys.readouterr().out)
    assert away["test_accuracy"] == live["test_accuracy"] and away["settings"]["backbone"] == f"hf:{model}"
    assert call("evaluate", tmp_path / "a", "--json") == 0, "a tuned file is of texts again"
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(away["test_accuracy"], abs=1e-3)
    grid = ["--lr", "0.01", "0.001", "--epochs", "3", "--seeds", "0", "1", "--method", "bypass-mean"]
    assert call("sweep", "--bank", tmp_path / "bank", *grid, "--out", tmp_path / "sweep", "--json") == 0
    assert json.loads(capsys.readouterr().out)["methods"]["bypass-mean"]["points"] == 4


KINDS = {
    "multi-label": lambda label, n: [name for name, there in (("good", label), ("long", n > 5)) if there],
    "regression": lambda label, n: 2.0 * label + 0.5,
    "per-token": lambda label, n: ["G" if label else "B"] * n,
}


@pytest.mark.parametrize("method", ["bypass", "res-tuning"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_task(
    model: Path, tmp_path: Path, kind: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for text, label in rows(240):
        words = text.split()
        row = {"tokens": words} if kind == "per-token" else {"text": text}
        lines.append(json.dumps({**row, "label": KINDS[kind](label, len(words))}))
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(lines))
    data = ["--data", f"text:{file}", "--backbone", f"hf:{model}", "--test-size", "20"]
    pool, rate = [] if kind == "per-token" else ["--pool", "mean"], "0.01"
    train = [
        "train",
        *data,
        *pool,
        "--method",
        method,
        "--epochs",
        "15",
        "--lr",
        rate,
        "--val-size",
        "16",
        "--batch-size",
        "8",
    ]
    more = [] if kind == "regression" else ["--class-weights", "balanced"]
    assert call(*train, *more, "--patience", "25", "--quiet", "--out", tmp_path / "a", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    metric = {"multi-label": "map", "regression": "r2", "per-token": "accuracy"}[kind]
    assert result["metric"] == metric
    assert result[f"test_{metric}"] > {"map": 85, "r2": 0.5, "accuracy": 85}[metric]
    assert call("evaluate", tmp_path / "a", "--json", "--per-class") == 0
    found = json.loads(capsys.readouterr().out)
    assert found[metric] == pytest.approx(result[f"test_{metric}"], abs=1e-3)
    assert call("predict", tmp_path / "a", " ".join(GOOD[:7]), "--json") == 0
    (said,) = json.loads(capsys.readouterr().out)
    if kind == "per-token":
        assert [w["word"] for w in said["words"]] == GOOD[:7] and said["words"][0]["class"] == "G"
        assert call("predict", tmp_path / "a", f"{GOOD[0]} \u200b {BAD[0]}", "--json") == 0
        (said,) = json.loads(capsys.readouterr().out)
        assert [w["word"] for w in said["words"]] == [GOOD[0], "\u200b", BAD[0]], "each keeps its own class"
    elif kind == "regression":
        assert said["values"]["label"] > 1.5
    else:
        assert said["top"][0]["class"] in ("good", "long")
    assert call("data", f"text:{file}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == kind
    if kind == "per-token":
        assert "one label for each item" in refused(capsys, "bank", *data, "--tokens", "all", "--out", tmp_path / "b")
        assert "need every token" in refused(
            capsys, *train[:5], "--test-size", "20", "--pool", "mean", "--out", tmp_path / "c"
        )
        return
    assert call("bank", *data, "--tokens", "mean", "--out", tmp_path / "b", "--quiet") == 0
    capsys.readouterr()
    grid = ["--method", "bypass-mean", "--lr", "0.02", "0.01", "--epochs", "15", "--seeds", "0"]
    assert call("sweep", "--bank", tmp_path / "b", *grid, "--out", tmp_path / "s", "--json") == 0
    found = json.loads(capsys.readouterr().out)["methods"]["bypass-mean"]
    assert found["test_score"] > {"map": 75, "r2": 0.3}[metric]


# ---- objectives


def sample(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 4, generator=generator)
    if kind == "regression":
        return logits, logits + torch.randn(60, 4, generator=generator)
    if kind == "multi-label":
        return logits, (torch.rand(60, 4, generator=generator) > 0.6).float()
    labels = torch.randint(4, (60,), generator=generator)
    if kind == "single-label":
        return logits, labels
    by_token = torch.randint(4, (60, 7), generator=generator)
    by_token[:, 5:] = IGNORED
    return torch.randn(60, 7, 4, generator=generator), by_token


def test_metrics_are_scikit_learns() -> None:
    logits, labels = sample("single-label")
    found, wanted, predicted = dict(objective().metrics(logits, labels)), labels.numpy(), logits.argmax(1).numpy()
    assert found["accuracy"] == pytest.approx(100 * sklearn.metrics.accuracy_score(wanted, predicted))
    assert found["f1"] == pytest.approx(100 * sklearn.metrics.f1_score(wanted, predicted, average="macro"))
    each = objective().each(logits, labels)
    for name, score in (("precision", sklearn.metrics.precision_score), ("recall", sklearn.metrics.recall_score)):
        assert each[name].tolist() == pytest.approx((100 * score(wanted, predicted, average=None)).tolist(), abs=1e-3)
    assert confusion(logits, labels).tolist() == sklearn.metrics.confusion_matrix(wanted, predicted).tolist()
    logits, labels = sample("multi-label")
    found, there, p = dict(objective("multi-label").metrics(logits, labels)), labels.numpy(), logits.sigmoid().numpy()
    assert found["map"] == pytest.approx(100 * sklearn.metrics.average_precision_score(there, p), abs=1e-3)
    assert found["f1"] == pytest.approx(100 * sklearn.metrics.f1_score(there, p > 0.5, average="micro"), abs=1e-3)
    assert found["exact"] == pytest.approx(100 * sklearn.metrics.accuracy_score(there, p > 0.5), abs=1e-3)
    predicted, values = sample("regression")
    found, pair = dict(objective("regression").metrics(predicted, values)), (values.numpy(), predicted.numpy())
    assert found["r2"] == pytest.approx(sklearn.metrics.r2_score(*pair), abs=1e-4)
    assert found["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(*pair), abs=1e-4)
    logits, tags = sample("per-token")
    found = dict(objective("per-token").metrics(logits, tags))
    assert found["accuracy"] == pytest.approx(100 * (logits.argmax(-1) == tags)[:, :5].double().mean().item())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["single-label", "multi-label", "regression", "per-token"])
def test_a_loss_is_the_mean_over_examples(kind: str, weighted: bool) -> None:
    """So batches, accumulation and processes change nothing; weights that are all one neither."""
    logits, labels = sample(kind)
    if weighted and kind == "regression":
        with pytest.raises(RestuningError, match="there are no classes"):
            objective(kind, torch.ones(4))
        return
    loss = objective(kind, torch.tensor([0.5, 1.0, 2.0, 1.5]) if weighted else None).loss
    one_by_one = torch.stack([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(60)]).mean()
    torch.testing.assert_close(loss(logits, labels), one_by_one)
    if weighted:
        plain = objective(kind).loss(logits, labels)
        torch.testing.assert_close(objective(kind, torch.ones(4)).loss(logits, labels), plain)
        assert not torch.allclose(loss(logits, labels), plain)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = [0] * 10 + [1] * 30 + [2] * 5
    expected = sklearn.utils.class_weight.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced("single-label", labels, 3).tolist() == pytest.approx(expected.tolist())
    assert balanced("per-token", [[0, 0], [1], [2]], 3).tolist() == pytest.approx([4 / 6, 4 / 3, 4 / 3])
    assert balanced("multi-label", [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], 2).tolist() == [1.0, 3.0]


def test_the_trainer_is_given_the_kinds_own_loss(model: Path) -> None:
    tuned = rt.adapt(rt.load_backbone(f"hf:{model}"), "lora", 3, kind="multi-label")
    labels = torch.tensor([[1.0, 0.0, 1.0]])
    out = tuned({"input_ids": torch.tensor([[2, 5, 3]])}, labels=labels)
    expected = nn.functional.binary_cross_entropy_with_logits(out["logits"], labels)
    torch.testing.assert_close(out["loss"], expected)
    with pytest.raises(RestuningError, match="unknown kind of task 'ranking'"):
        rt.adapt(rt.load_backbone(f"hf:{model}"), "lora", 3, kind="ranking")


def test_rows_of_a_batch_are_of_one_kind_of_task(model: Path) -> None:
    tuned = rt.adapt(rt.load_backbone(f"hf:{model}"), "bypass", 3, "a", kind="multi-label")
    tuned.add_adapter("b", "bypass", 3, kind="multi-label")
    tuned.add_adapter("c", "bypass", 3)
    inputs, labels = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]])}, torch.tensor([[1.0, 0.0, 1.0]] * 2)
    out = tuned(inputs, labels=labels, adapter_names=["a", "b"])
    torch.testing.assert_close(out["loss"], nn.functional.binary_cross_entropy_with_logits(out["logits"], labels))
    with pytest.raises(RestuningError, match="several kinds of task"):
        tuned(inputs, labels=labels, adapter_names=["a", "c"])


def test_a_kind_is_saved_with_its_adapter(model: Path, tmp_path: Path) -> None:
    tuned = rt.adapt(rt.load_backbone(f"hf:{model}"), "lora", 3, kind="per-token")
    tuned.save_pretrained(tmp_path)
    again = rt.Tuned.from_pretrained(rt.load_backbone(f"hf:{model}"), tmp_path)
    assert again.adapter_config().kind == "per-token" and again.adapter_config().pool == "none"


def test_the_packaged_encoder_is_real() -> None:
    """Of three sentences, the two that mean the same are nearer."""
    backbone = rt.load_backbone(MINILM)
    how = reading_of(backbone)
    assert isinstance(how, Tokenise) and how.limit == 512
    tuned = rt.adapt(backbone, "linear", pool="mean")
    tokenizer = how.load()
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    with torch.no_grad():
        x = nn.functional.normalize(tuned.embed(tokenizer(texts, padding=True, return_tensors="pt")), dim=-1)
    assert x[0] @ x[1] > 0.5 > 0.2 > x[0] @ x[2]
