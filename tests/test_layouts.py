"""The community's layouts of the paper's data sets, in miniature: as they should be, and broken."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from restuning.cli.main import main
from restuning.data import load_source, load_task
from restuning.data.inspect import inspect
from restuning.errors import DataError
from restuning.utils.known import KNOWN, VTAB, Known

PARTS = {"train800": 8, "val200": 2, "train800val200": 10, "test": 6}
TINY = Known("vtab/tiny", "tiny", "vtab", 3, 10, 6, lossless=True)


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype="uint8")).save(path)
    return path


def listed(path: Path, rows: list[tuple[str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in rows))


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    root, seed = tmp_path / "vtab-1k" / "tiny", 0
    for part, count in PARTS.items():
        rows = []
        for i in range(count):
            seed += 1
            name = f"images/{part}/{i:06d}.jpg"
            save(root / name, seed if part != "train800val200" else i + 1)
            rows.append((name, i % 3))
        listed(root / f"{part}.txt", rows)
    return root


def refused(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        load_source(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_vtab_chooses_on_val200_and_trains_again_on_all(vtab: Path) -> None:
    whole, held = load_task(f"vtab:{vtab}"), load_task(f"vtab:{vtab}", val_size=2)
    assert (len(whole.train), whole.val, len(whole.test), len(whole.classes)) == (10, None, 6, 3)
    assert [Path(n).parent.name for n in held.val.names] == ["val200"] * 2
    assert {Path(n).parent.name for n in held.train.names} == {"train800"} and len(held.train) == 8
    assert not set(held.train.names) & set(held.val.names)
    drawn = load_task(f"vtab:{vtab}", train_size=9, val_size=2)
    assert drawn.held == 0 and len(drawn.train) == 7, "another training set has no draw of its own"


def test_a_bank_knows_val200(vtab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from restuning.data import split
    from restuning.features.bank import Bank

    assert main(["bank", "--data", f"vtab:{vtab}", "--out", str(tmp_path / "bank"), "--quiet"]) == 0
    held = split("bank", Bank(tmp_path / "bank").source(), None, 2, None, seed=5)
    assert list(held.val.names) == ["train[8]", "train[9]"]
    capsys.readouterr()


def test_broken_vtab(vtab: Path) -> None:
    assert "expected vtab:PATH/NAME" in refused(f"vtab:{vtab.parent / 'none'}")
    text = (vtab / "test.txt").read_text()
    (vtab / "test.txt").unlink()
    assert "no list" in refused(f"vtab:{vtab}") and "train800.txt" in refused(f"vtab:{vtab}")
    for bad, words in {
        "images/test/000000.jpg\n": "no path and a label",
        "images/test/000000.jpg -1\n": "no path and a label",
        "images/test/nowhere.jpg 1\n": "no image 'images/test/nowhere.jpg'",
        text + "images/test/000000.jpg 2\n": "line 7: 'images/test/000000.jpg' has two labels, 0 and 2",
        "": "is empty",
    }.items():
        (vtab / "test.txt").write_text(bad)
        assert words in refused(f"vtab:{vtab}")
    named = vtab.parent / "kitti"
    vtab.rename(named)
    (named / "test.txt").write_text("images/test/000000.jpg 4\n")
    assert "has label 4, and there are 4 classes" in refused(f"vtab:{named}")


def test_check_says_what_is_wrong(vtab: Path) -> None:
    good = inspect(load_source(f"vtab:{vtab}"), TINY)
    assert good.counts == {"train": 10, "test": 6} and good.pixels == "lossy" and not good.wrong
    assert "lossy (JPEG)" in good.notes[0]
    (vtab / "images/test/000003.jpg").write_bytes((vtab / "images/train800/000001.jpg").read_bytes())
    (vtab / "images/test/000004.jpg").write_bytes(b"no image")
    rows = [(f"images/train800/{i:06d}.jpg", (0, 1)[i % 2]) for i in range(8)]
    listed(vtab / "train800.txt", rows)
    listed(vtab / "val200.txt", [("images/val200/000000.jpg", 3), ("images/val200/000001.jpg", 0)])
    listed(vtab / "test.txt", [(f"images/test/{i:06d}.jpg", i % 2) for i in range(6)])
    found = inspect(load_source(f"vtab:{vtab}"), TINY)
    said = " ".join(found.wrong)
    assert "(no image has label 2)" in inspect(load_source(f"vtab:{vtab}"), Known("x", "", "vtab", 4, 10, 6)).wrong[0]
    assert "1 unreadable" in said and "000004.jpg" in said
    assert "1 test image also in training" in said and "000003.jpg is" in said


def test_check_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "oxford pets" / "oxford-pets"
    few(root, "images")
    assert main(["data", "fewshot/oxford-pets", str(root), "--check"]) == 2
    out, err = capsys.readouterr()
    assert "2 classes, expected 37" in out and err.count("\n") == 1 and "(and 1 more)" in err
    monkeypatch.setitem(KNOWN, "fewshot/oxford-pets", Known("fewshot/oxford-pets", "", "fewshot", 2, 0, 2))
    assert main(["data", "fewshot/oxford-pets", str(root), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pixels"] == "original"
    assert main(["data", "-", f"fewshot:{root}", "--check"]) == 0
    assert main(["data", "check", "-", f"fewshot:{root}"]) == 0, "the older spelling"
    capsys.readouterr()
    for argv, words in {
        ("vtab/dtdd", "x", "--check"): "did you mean 'vtab/dtd'?",
        ("vtab/dtd", "x", "y", "--check"): "expected a NAME",
        ("digits", "digits"): "expected one SPEC",
        ("sst2", "x", "--check"): "glue:sst2 --check",
    }.items():
        assert main(["data", *argv]) == 2
        assert words in capsys.readouterr().err
    assert main(["data", "list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert len(VTAB) == 19 and len(known) == 1 + 19 + 5 + 5 + 5 + 2
    assert main(["data", "list"]) == 0 and "vtab/dsprites_ori" in capsys.readouterr().out


def few(root: Path, below: str = "") -> None:
    """NOAH's layout: names with spaces, a 1-shot list that has each image twice."""
    for i in range(8):
        save(root / below / f"a cat {i}.png", i)
    one = [(f"a cat {i}.png", i) for i in (0, 1)]
    listed(root / "annotations/train_meta.list.num_shot_1.seed_0", [row for row in one for _ in (0, 1)])
    listed(root / "annotations/train_meta.list.num_shot_2.seed_1", [(f"a cat {i}.png", i % 2) for i in range(4)])
    listed(root / "annotations/val_meta.list", [(f"a cat {i}.png", i % 2) for i in (4, 5)])
    listed(root / "annotations/test_meta.list", [(f"a cat {i}.png", i % 2) for i in (6, 7)])


@pytest.mark.parametrize("below", ["", "images"])
def test_fewshot(tmp_path: Path, below: str) -> None:
    few(tmp_path, below)
    one, two = load_task(f"fewshot:{tmp_path}"), load_task(f"fewshot:{tmp_path}?shots=2&seed=1")
    assert (len(one.train), len(two.train), len(two.val), len(two.test)) == (2, 4, 2, 2)
    assert one.train.item(1).size == (10, 8) and two.train.names[0].endswith("a cat 0.png")
    assert "num_shot_4.seed_0" in refused(f"fewshot:{tmp_path}?shots=4")
    assert "shots is '3'" in refused(f"fewshot:{tmp_path}?shots=3")
    assert "unknown setting shot" in refused(f"fewshot:{tmp_path}?shot=1")


def test_domains(tmp_path: Path) -> None:
    def images(root: Path, rows: list[tuple[str, int]], annotation: str, at: Path) -> None:
        for k, (name, label) in enumerate(rows):
            save(root / name, len(str(root)) * 100 + 10 * label + k)
        listed(at / "annotations" / annotation, rows)

    source, rows = tmp_path / "few-shot/imagenet", [(f"n{c}/soap _ soap {c}.JPEG", c) for c in range(4)]
    images(source / "train", rows, "train_meta.list.num_shot_16.seed_0", source)
    images(source / "val", rows, "val_meta.list", source)
    target = tmp_path / "domain-generalization/imagenet-adversarial"
    images(target, [("imagenet-a/n3/0.1_a b.jpg", 3), ("imagenet-a/n1/2.jpg", 1)], "val_meta.list", target)
    own, a = load_task(f"domains:{tmp_path}"), load_task(f"domains:{tmp_path}?target=a")
    assert own.classes == a.classes and list(a.test.labels) == [3, 1] and a.test.item(0).size == (10, 8)
    assert (len(own.train), len(own.test)) == (4, 4)
    report = inspect(load_source(f"domains:{tmp_path}?target=a"), Known("domains/a", "", "domains", 2, 4, 2))
    assert report.seen == {"train": 4, "test": 2} and not report.wrong
    assert "no folder imagenet-rendition" in refused(f"domains:{tmp_path}?target=r")
    assert "unknown target 'c'" in refused(f"domains:{tmp_path}?target=c")


def test_fgvc(tmp_path: Path) -> None:
    rows = {f"00{c}.bird/b {i}.jpg": c for c in (3, 10, 200) for i in range(3)}
    for k, name in enumerate(rows):
        save(tmp_path / "images" / name, k)
    for split, i in (("train", 0), ("val", 1), ("test", 2)):
        (tmp_path / f"{split}.json").write_text(json.dumps({n: c for n, c in rows.items() if f"b {i}" in n}))
    task = load_task(f"fgvc:{tmp_path}")
    assert task.classes == ("3", "10", "200") and [len(p) for p in (task.train, task.val, task.test)] == [3, 3, 3]
    assert not inspect(load_source(f"fgvc:{tmp_path}"), Known("fgvc/x", "", "fgvc", 3, 6, 3)).wrong
    (tmp_path / "val.json").write_text(json.dumps({"003.bird/b 0.jpg": 4}))
    assert "class '4' is not among the training classes" in refused(f"fgvc:{tmp_path}")
    (tmp_path / "val.json").write_text('{"nowhere.jpg": 3}')
    assert "no image 'nowhere.jpg'" in refused(f"fgvc:{tmp_path}")
    (tmp_path / "val.json").write_text("[")
    assert "val.json cannot be read" in refused(f"fgvc:{tmp_path}")
    (tmp_path / "val.json").unlink()
    assert "no val.json" in refused(f"fgvc:{tmp_path}")


def test_cifar_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    assert "?fetch=yes" in refused(f"cifar100:{tmp_path}")

    class Fake:
        classes, targets, data = ["a", "b"], [0, 1], np.zeros((2, 32, 32, 3), dtype="uint8")

        def __init__(self, path: str, train: bool, download: bool) -> None:
            if download:
                raise OSError("no route\nto it")

    monkeypatch.setattr(datasets, "CIFAR100", Fake)
    task = load_task(f"cifar100:{tmp_path}")
    assert task.classes == ("a", "b") and task.test.item(0).size == (32, 32) and task.test.head(0) == b""
    assert "cannot be fetched" in refused(f"cifar100:{tmp_path}?fetch=yes")


def test_shots_are_of_each_class_and_nested_in_nothing_of_the_test() -> None:
    task = load_task("digits", shots=4, seed=1)
    assert [list(task.train.labels).count(c) for c in range(10)] == [4] * 10
    assert not set(task.train.names) & set(task.test.names)
    assert set(task.test.names) == set(load_task("digits").test.names)
    assert task.train.names != load_task("digits", shots=4, seed=2).train.names
    with pytest.raises(DataError, match="shots is 999, expected at most the"):
        load_task("digits", shots=999)
    with pytest.raises(DataError, match="expected one of them"):
        load_task("digits", shots=1, train_size=10)


@pytest.mark.parametrize("how", ["corrupted", "sketched", "rotated"])
def test_altered_copies_are_the_same_images_at_every_call(how: str) -> None:
    plain, a, b = (load_task(s).test for s in ("digits", f"altered:{how}:digits", f"altered:{how}:digits"))
    assert list(plain.labels) == list(a.labels) and a.names[0].endswith(f"({how})")
    assert all(a.item(i).tobytes() == b.item(i).tobytes() != plain.item(i).tobytes() for i in range(5))
    assert a.item(0).size == plain.item(0).size and a.item(0).mode == "RGB"


def test_altered_refuses() -> None:
    assert "expected one of corrupted" in refused("altered:bent:digits")
    assert "unknown data" in refused("altered:rotated:nothing")


def test_counted_scenes() -> None:
    task = load_task("sprites:count", train_size=80, test_size=16)
    assert task.classes == tuple("12345678") and sorted(set(task.train.labels)) == list(range(8))
    assert not set(task.train.names) & set(task.test.names)
    near = np.ones((3, 3))
    ndimage = pytest.importorskip("scipy.ndimage")
    for i in range(16):
        found = ndimage.label(np.asarray(task.test.item(i))[..., 0] > 0, near)[1]
        assert found == task.test.labels[i] + 1, "shapes do not touch"
