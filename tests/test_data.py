"""Splits that are the same at every call, layouts, sprites as VTAB labels them, and every bad input as one line."""

import hashlib
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from restuning.data import Items, Prepared, Preprocess, check, load_images, load_task
from restuning.data.sprites import draw
from restuning.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
PLAIN = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3)


def save(path: Path, size: tuple[int, int] = (20, 12), mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype="uint8")
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "with a space"
    for c, count in (("ant", 30), ("bee", 15), ("cat", 5)):
        for i in range(count):
            save(root / c / f"{i:02}.png", seed=i)
    (root / ".hidden").mkdir()
    (root / "ant" / "notes.txt").write_text("no image")
    return root


def error(spec: str, **sizes: int) -> str:
    with pytest.raises(DataError) as caught:
        check(load_task(spec, **sizes).train)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_draws_are_by_class_and_the_test_set_is_always_the_same(photos: Path) -> None:
    spec = f"folder:{photos}"
    task = load_task(spec)
    assert task.classes == ("ant", "bee", "cat")
    assert Counter(task.test.labels) == {0: 6, 1: 3, 2: 1}
    for seed in (0, 1):
        drawn = load_task(spec, train_size=20, val_size=5, seed=seed)
        assert set(drawn.test.names) == set(task.test.names)
        assert Counter([*drawn.train.labels, *drawn.val.labels]) == {0: 12, 1: 6, 2: 2}
        assert (len(drawn.train), len(drawn.val)) == (15, 5)
        assert not {*drawn.train.names, *drawn.val.names} & set(drawn.test.names)
        assert load_task(spec, train_size=20, val_size=5, seed=seed).train.names == drawn.train.names
    assert load_task(spec, train_size=20, seed=0).train.names != load_task(spec, train_size=20, seed=1).train.names
    assert set(Counter(load_task(spec, train_size=3).train.labels)) == {0, 1, 2}, "one of each where that is possible"


def test_own_splits_stand(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for c in "ab":
            for i in range(count):
                save(tmp_path / split / c / f"{i}.jpg")
    task = load_task(f"folder:{tmp_path}")
    assert [len(s) for s in (task.train, task.val, task.test)] == [8, 4, 6]
    assert len(load_task(f"folder:{tmp_path}", test_size=2).test) == 2
    save(tmp_path / "test" / "zebra" / "0.jpg")
    assert "'zebra' is not among the training classes" in error(f"folder:{tmp_path}")


@pytest.mark.parametrize("sizes", [{"train_size": 0}, {"train_size": -1}, {"val_size": -2}, {"test_size": 0}])
def test_sizes_below_one(photos: Path, sizes: dict[str, int]) -> None:
    assert "expected at least 1" in error(f"folder:{photos}", **sizes)


def test_sizes_beyond_what_there_is(photos: Path) -> None:
    assert "at most the 40 that" in error(f"folder:{photos}", train_size=41)
    assert "at most the 49 that" in error(f"folder:{photos}", test_size=50)
    assert "fewer than the 10 to train on" in error(f"folder:{photos}", train_size=10, val_size=10)


def test_bad_folders(tmp_path: Path, photos: Path) -> None:
    assert str(tmp_path / "no") in error(f"folder:{tmp_path / 'no'}")
    assert "1 class folder" in error(f"folder:{tmp_path}")
    (photos / "dog").mkdir()
    assert "class 'dog' is empty" in error(f"folder:{photos}")
    assert "did you mean 'folder'" in error("foldr:x")
    assert "sprites:location" in error("sprites:colour")
    assert "no further part" in error("digits:mnist")


@pytest.mark.parametrize("damage", ["truncated", "text", "huge", "empty"])
def test_bad_images(photos: Path, damage: str) -> None:
    file = photos / "bee" / "bad.png"
    data = save(photos / "bee" / "tmp.png", (200, 200)).read_bytes()
    (photos / "bee" / "tmp.png").unlink()
    if damage == "huge":
        Image.new("1", (30_000, 30_000)).save(file)
    else:
        file.write_bytes({"truncated": data[: len(data) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(DataError, match=r"bad\.png.*(megapixels|cannot be read)") as caught:
        check(load_images(photos / "bee"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "LA"])
def test_modes(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    image = load_images(save(tmp_path / f"a.{suffix}", mode=mode)).item(0)
    assert image.mode == "RGB" and image.size == (20, 12)


def test_heic(tmp_path: Path) -> None:
    """Pictures of iPhones, written by pillow-heif itself."""
    import pillow_heif

    image = Image.new("RGB", (64, 48), (200, 40, 60))
    image.paste((30, 90, 220), (0, 0, 32, 48))
    pillow_heif.from_pillow(image).save(tmp_path / "a.heic", quality=-1)
    read = load_images(tmp_path).item(0)
    assert read.size == (64, 48) and read.mode == "RGB"
    for at in ((8, 24), (56, 24)):
        assert max(abs(a - b) for a, b in zip(read.getpixel(at), image.getpixel(at), strict=True)) <= 3


def test_transparency_is_white_sixteen_bits_scale_and_exif_turns(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_images(tmp_path / "clear.png").item(0).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 32_896, dtype="uint16")).save(tmp_path / "deep.png")
    assert load_images(tmp_path / "deep.png").item(0).getpixel((0, 0)) == (128, 128, 128)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_images(tmp_path / "turned.jpg").item(0).size == (4, 8)


@pytest.mark.parametrize(
    ("packed", "how"), [("tar", ""), ("tar.gz", "gz"), ("tar.xz", "xz"), ("tbz2", "bz2"), ("tar", "xz")]
)
def test_tar_is_the_folder(photos: Path, tmp_path: Path, packed: str, how: str) -> None:
    path = tmp_path / f"photos.{packed}"
    with tarfile.open(path, f"w:{how}") as tar:
        tar.add(photos, arcname="top")
    a, b = load_task(f"folder:{photos}", train_size=20), load_task(f"tar:{path}", train_size=20)
    assert a.classes == b.classes and list(a.train.labels) == list(b.train.labels)
    for i in range(len(a.train)):
        assert a.train.item(i).tobytes() == b.train.item(i).tobytes()


def test_bad_tars(tmp_path: Path, photos: Path) -> None:
    assert "no such tar" in error(f"tar:{tmp_path / 'no.tar'}")
    (tmp_path / "text.tar").write_text("hello")
    assert "cannot be read as a tar" in error(f"tar:{tmp_path / 'text.tar'}")
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        tar.add(photos, arcname=".")
    data = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    assert "cut.tar" in error(f"tar:{tmp_path / 'cut.tar'}")


def test_digits() -> None:
    task = load_task("digits")
    assert (len(task.train), len(task.test), len(task.classes)) == (1438, 359, 10)
    assert task.train.item(0).size == (8, 8)


@pytest.mark.parametrize(("kind", "values"), [("location", 32), ("orientation", 40)])
def test_sprite_labels_are_vtabs_bins(kind: str, values: int) -> None:
    task = load_task(f"sprites:{kind}", train_size=1000, test_size=500)
    assert len(task.classes) == 16
    counts = Counter(task.train.labels)
    assert set(counts) == set(range(16)) and max(counts.values()) <= 2 * min(counts.values())
    covered = [
        range(*(int(n) + d for n, d in zip(c.split(" ")[0].split("-"), (0, 1), strict=True))) for c in task.classes
    ]
    assert [v for bin in covered for v in bin] == list(range(values))
    assert all(v * 16 // values == b for b, bin in enumerate(covered) for v in bin)
    assert not set(task.train.names) & set(task.test.names)


def test_a_sprite_of_a_larger_scale_is_larger() -> None:
    task = load_task("sprites:scale", train_size=300, test_size=10)
    assert list(task.classes) == [f"{i} of 6" for i in range(6)]
    white = [np.asarray(task.train.item(i)).sum() for i in range(300)]
    by_class = [np.mean([w for w, label in zip(white, task.train.labels, strict=True) if label == c]) for c in range(6)]
    assert (np.diff(by_class) > 0).all()


def test_sprites_are_where_and_how_the_label_says() -> None:
    def middle(image: Image.Image) -> tuple[float, float]:
        mass = np.asarray(image)[..., 0].astype(float)
        return (mass.sum(0) @ np.arange(64)) / mass.sum(), (mass.sum(1) @ np.arange(64)) / mass.sum()

    for shape in range(3):
        xs = [middle(draw(shape, 1.0, 0.7, x, 0.5)) for x in np.linspace(0, 1, 32)]
        steps = np.diff([x for x, _ in xs])
        assert (steps > 0.9).all() and (steps < 1.8).all() and np.ptp([y for _, y in xs]) < 0.5
        masses = [np.asarray(draw(shape, 1.0, 0.7, x, y)).sum() for x, y in ((0, 0), (1, 1), (0.5, 0.5), (0, 1))]
        assert np.ptp(masses) < 0.04 * masses[0], "wholly inside the frame, wherever it is"
        areas = [np.asarray(draw(shape, s, 0.0, 0.5, 0.5))[..., 0].sum() for s in np.linspace(0.5, 1, 6)]
        assert (np.diff(areas) > 0).all()
    upright, turned = (np.asarray(draw(2, 1.0, a, 0.5, 0.5))[..., 0].astype(int) for a in (0.0, np.pi / 2))
    assert np.abs(np.rot90(upright, -1) - turned).mean() < 4 < np.abs(upright - turned).mean()


def test_sprites_are_the_same_everywhere() -> None:
    task = load_task("sprites:location", train_size=50)
    digest = hashlib.sha256(b"".join(task.train.item(i).tobytes() for i in range(50))).hexdigest()
    again = load_task("sprites:location", train_size=50)
    assert digest == hashlib.sha256(b"".join(again.train.item(i).tobytes() for i in range(50))).hexdigest()
    assert [task.train.names[i] for i in range(3)] == [again.train.names[i] for i in range(3)]


def test_hub_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((6, 6, 3), 20 * i, dtype="uint8")) for i in range(10)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "light"])})
    rows = datasets.Dataset.from_dict({"picture": images, "kind": [int(i > 4) for i in range(10)]}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "good"))
    task = load_task(f"hf:{tmp_path / 'good'}")
    assert task.classes == ("dark", "light") and len(task.test) == 10
    assert task.test.item(3).getpixel((0, 0)) == (60, 60, 60)
    bad = rows.cast_column("kind", datasets.Value("int64")).map(
        lambda r, i: {"kind": 7 if i == 3 else 0}, with_indices=True
    )
    plain = rows.cast_column("kind", datasets.Value("int64")).rename_column("kind", "label")
    datasets.DatasetDict({"train": plain, "test": bad.rename_column("kind", "label")}).save_to_disk(
        str(tmp_path / "outside")
    )
    assert "test row 3: label 7 is outside the 2 classes" in error(f"hf:{tmp_path / 'outside'}")
    for i, odd in enumerate(([0.5] * 10, [[0]] * 10, [None, *[1] * 9])):
        strange = rows.remove_columns("kind").add_column("label", odd)
        strange.save_to_disk(str(tmp_path / f"odd{i}"))
        assert f"label is {odd[0]!r}: expected the name or number" in error(f"hf:{tmp_path / f'odd{i}'}")
    rows.remove_columns("picture").save_to_disk(str(tmp_path / "blind"))
    assert "0 image columns among kind" in error(f"hf:{tmp_path / 'blind'}")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "cannot be had: no route" in error("hf:hub:someone/pictures")


def test_preprocessing(photos: Path) -> None:
    image = load_task(f"folder:{photos}").train.item(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    whole = v2.Compose([v2.Resize((16, 16), bicubic, antialias=True), *steps])
    crop = v2.Compose([v2.Resize(17, bicubic, antialias=True), v2.CenterCrop(16), *steps])
    torch.testing.assert_close(Preprocess((16, 16), mean, std)(image), whole(image))
    torch.testing.assert_close(Preprocess((16, 16), mean, std, crop=0.9)(image), crop(image))
    kept = Preprocess((16, 16), mean, std, crop=0.9)
    assert Preprocess.from_dict(kept.to_dict()) == kept
    with pytest.raises(DataError, match="cannot be read"):
        Preprocess.from_dict({"size": [1, 1]})


def test_augmentation_is_a_function_of_epoch_and_index(photos: Path) -> None:
    images: Items = load_task(f"folder:{photos}").train
    a, b = Prepared(images, PLAIN, augment=True, seed=3), Prepared(images, PLAIN, augment=True, seed=3)
    state = torch.random.get_rng_state()
    first = [a[i][0] for i in range(4)]
    assert all(torch.equal(b[i][0], first[i]) for i in (3, 1, 0, 2)), "whatever the order of access"
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"
    a.set_epoch(1)
    assert not torch.equal(a[0][0], first[0])
    plain = Prepared(images, PLAIN)
    assert torch.equal(plain[0][0], plain[0][0]) and torch.equal(plain[0][0], PLAIN(images.item(0)))


@pytest.mark.skipif(not SHARED.exists(), reason="the folder of shared data is not beside this checkout")
@pytest.mark.parametrize(
    ("tar", "classes", "images"),
    [("caltech101/caltech101_short128_max40.tar", 102, 4009), ("eurosat/eurosat_rgb64_every6th.tar", 10, 4502)],
)
def test_real_tars(tar: str, classes: int, images: int) -> None:
    task = load_task(f"tar:{SHARED / tar}")
    assert len(task.classes) == classes and len(task.train) + len(task.test) == images
    assert task.train.item(0).mode == "RGB"
