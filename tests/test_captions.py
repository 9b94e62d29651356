"""Captioned pictures in the community's layouts, good and broken; every bad input as one line."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restuning.data import Captioned, Square, check, load_captions
from restuning.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def png(seed: int = 0, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype="uint8")
    held = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(held, "png")
    return held.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def pack(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def captions(data: Captioned) -> list[tuple[str, ...]]:
    return [data.captions(i) for i in range(len(data))]


def error(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        check(load_captions(spec).images)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def folder(root: Path, rows: list[dict[str, object]]) -> Path:
    for row in rows:
        write(root / str(row["file_name"]), png())
    write(root / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    rows = [{"file_name": "b.png", "text": " an ant "}, {"file_name": "sub dir/a.png", "text": ["a bee", "an insect"]}]
    data = load_captions(f"captions:{folder(tmp_path / 'with a space', rows)}")
    assert captions(data) == [("an ant",), ("a bee", "an insect")]
    assert [Path(name).name for name in data.names] == ["b.png", "a.png"] and len(data) == 2
    image, said = data[1]
    assert (image.mode, image.size, said) == ("RGB", (20, 12), ("a bee", "an insect"))


def test_its_columns_are_named_and_a_csv_will_do(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", [{"file_name": "a.png", "caption": "one", "long": "a long one"}])
    assert captions(load_captions(f"captions:{root}")) == [("one",)]
    assert captions(load_captions(f"captions:{root}?text=long")) == [("a long one",)]
    assert "no column 'lon' (did you mean 'long'?)" in error(f"captions:{root}?text=lon")
    write(tmp_path / "b" / "a.png", png())
    write(tmp_path / "b" / "metadata.csv", 'file_name,text\na.png,"one, two"\n')
    assert captions(load_captions(f"captions:{tmp_path / 'b'}")) == [("one, two",)]


def test_what_datasets_reads_is_what_we_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root = folder(tmp_path / "data", [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(3)])
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"))
    ours = load_captions(f"captions:{root}")
    assert sorted(row["text"] for row in theirs) == sorted(one for (one,) in captions(ours))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a.png", "text": "  "}, "a.png has an empty caption"),
        ({"file_name": "a.png", "text": None}, "a.png has an empty caption"),
        ({"file_name": "a.png", "text": []}, "a.png has no caption"),
        ({"file_name": "a.png", "text": ["one", ""]}, "a.png has an empty caption"),
        ({"file_name": "a.png", "text": 3}, "a.png: the caption is 3: expected a text"),
        ({"file_name": "gone.png", "text": "x"}, "line 2: no such picture: 'gone.png'"),
        ({"text": "x"}, "line 2: no such picture: None"),
        ({"file_name": "first.png", "text": "x"}, "first.png is there twice"),
        ({"file_name": "./first.png", "text": "x"}, "first.png is there twice"),
    ],
)
def test_broken_metadata(tmp_path: Path, row: dict[str, object], message: str) -> None:
    root = folder(tmp_path, [{"file_name": "first.png", "text": "the first"}])
    if row.get("file_name") == "a.png":
        write(root / "a.png", png())
    with open(root / "metadata.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    assert message in error(f"captions:{root}")


def test_broken_folders(tmp_path: Path) -> None:
    assert "no such folder" in error(f"captions:{tmp_path / 'gone'}")
    write(tmp_path / "a.png", png())
    assert "has no metadata.jsonl or metadata.csv" in error(f"captions:{tmp_path}")
    write(tmp_path / "metadata.jsonl", '{"text": "x"}\n')
    assert "no column 'file_name'" in error(f"captions:{tmp_path}")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": ')
    assert "line 2: no JSON" in error(f"captions:{tmp_path}")
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n')
    write(tmp_path / "b.png", png())
    assert f"{tmp_path / 'b.png'} has no caption: it is not in metadata.jsonl" in error(f"captions:{tmp_path}")
    (tmp_path / "b.png").unlink()
    write(tmp_path / "a.png", png()[:100])
    assert f"{tmp_path / 'a.png'} cannot be read as an image" in error(f"captions:{tmp_path}")


def coco(path: Path, files: dict[int, str], said: list[tuple[int, str]]) -> Path:
    images = [{"id": key, "file_name": name} for key, name in files.items()]
    annotations = [{"id": n, "image_id": key, "caption": caption} for n, (key, caption) in enumerate(said)]
    return write(path, json.dumps({"images": images, "annotations": annotations}))


def test_coco_in_its_usual_layout_and_in_a_tar(tmp_path: Path) -> None:
    files = {7: "000007.jpg", 3: "000003.jpg"}
    path = coco(tmp_path / "annotations" / "captions_val2017.json", files, [(3, "c"), (7, "a\n"), (7, "b")])
    assert "no such picture" in error(f"coco:{path}") and "val2017/000007.jpg" in error(f"coco:{path}")
    for i, name in enumerate(files.values()):
        write(tmp_path / "val2017" / name, png(i))
    usual = load_captions(f"coco:{path}")
    assert captions(usual) == [("a", "b"), ("c",)]
    assert captions(load_captions(f"coco:{path}?images={tmp_path / 'val2017'}")) == captions(usual)
    tar = pack(tmp_path / "v.tar", {f"./{name}": png(i) for i, name in enumerate(files.values())})
    packed = load_captions(f"coco:{path}?images={tar}")
    assert captions(packed) == captions(usual)
    assert packed.image(1).tobytes() == usual.image(1).tobytes() != usual.image(0).tobytes()
    inside = pack(tmp_path / "w.tar", {f"val2017/{name}": png(i) for i, name in enumerate(files.values())})
    assert captions(load_captions(f"coco:{path}?images={inside}")) == captions(usual)


def test_broken_coco(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", png())
    path = tmp_path / "captions.json"
    assert "cannot be read" in error(f"coco:{path}")
    assert "is no JSON" in error(f"coco:{write(path, '{')}")
    assert "is no captions json of COCO's" in error(f"coco:{write(path, '[1]')}")
    boxes = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    assert "is no captions json of COCO's" in error(f"coco:{write(path, json.dumps(boxes))}")
    assert "a.jpg has no caption" in error(f"coco:{coco(path, {1: 'a.jpg'}, [])}")
    assert "a.jpg has an empty caption" in error(f"coco:{coco(path, {1: 'a.jpg'}, [(1, ' ')])}")
    assert "a caption of image 2" in error(f"coco:{coco(path, {1: 'a.jpg'}, [(1, 'a'), (2, 'b')])}")
    assert "a.jpg is there twice" in error(f"coco:{coco(path, {1: 'a.jpg', 2: 'a.jpg'}, [(1, 'a'), (2, 'b')])}")
    assert "no image" in error(f"coco:{coco(path, {}, [])}")
    coco(path, {1: "b.jpg"}, [(1, "a")])
    tar = pack(tmp_path / "v.tar", {"a.jpg": png()})
    assert "v.tar holds no b.jpg" in error(f"coco:{path}?images={tar}")
    assert "unknown setting image" in error(f"coco:{path}?image={tar}")


def test_the_real_coco() -> None:
    root = SHARED / "captions_coco_mini"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    data = load_captions(f"coco:{root / 'captions.json'}?images={root / 'coco_mini_short128.tar'}")
    assert (len(data), sum(len(said) for said in captions(data))) == (101, 505)
    check(data.images)
    assert Square(64)(data.image(5)).shape == (3, 64, 64)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_tar_as_webdataset_has_it(tmp_path: Path, ending: str) -> None:
    files = {"b.png": png(1), "b.txt": b"a bee\n\nan insect\n", "x/a.jpg": png(), "x/a.txt": b"an ant", "x/a.json": b""}
    data = load_captions(f"captions-tar:{pack(tmp_path / f'a.{ending}', files, 'w:gz' if 'gz' in ending else 'w')}")
    assert captions(data) == [("a bee", "an insect"), ("an ant",)]
    assert [name.rpartition(":")[2] for name in data.names] == ["b.png", "x/a.jpg"]
    assert data.image(1).size == (20, 12)


def test_broken_tars(tmp_path: Path) -> None:
    def broken(files: dict[str, bytes]) -> str:
        return error(f"captions-tar:{pack(tmp_path / 'a.tar', files)}")

    assert "no such tar" in error(f"captions-tar:{tmp_path / 'a.tar'}")
    assert "holds no picture" in broken({"a.txt": b"a"})
    assert "a.tar:a.png has no caption: expected a.txt" in broken({"a.png": png(), "b.txt": b"b"})
    assert "a.tar:a.png has an empty caption" in broken({"a.png": png(), "a.txt": b" \n"})
    assert "a.txt is not UTF-8" in broken({"a.png": png(), "a.txt": b"\xff\xfe"})
    assert "a is there twice" in broken({"a.png": png(), "a.jpg": png(), "a.txt": b"a"})
    assert "a.tar:a.png cannot be read as an image" in broken({"a.png": png()[:60], "a.txt": b"a"})
    assert "cannot be read as a tar" in error(f"captions-tar:{write(tmp_path / 'b.tar', 'x')}")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for i, name in enumerate(("001.Laysan_Albatross", "n02085620-Chihuahua", "0817", "Boeing_707-320")):
        write(root / name / "0.png", png(i))
        write(root / name / "1.png", png(10 + i))
    return root


def test_classes_by_a_template(classes: Path) -> None:
    data = load_captions(f"classes:{classes}?template=a drawing of a {{}}")
    names = ["Laysan Albatross", "0817", "Boeing 707-320", "Chihuahua"]
    assert captions(data) == [(f"a drawing of a {name}",) for name in names for _ in range(2)]
    odd = load_captions(f"classes:{classes}?template=a {{}} + a hat, 100% wool %26 silk")
    assert captions(odd)[-1] == ("a Chihuahua + a hat, 100% wool & silk",)
    assert captions(load_captions(f"classes:{classes}"))[-1] == ("a photo of a Chihuahua",)
    assert captions(load_captions(f"classes:{classes}?template=dogs"))[-1] == (
        "a photo of a Chihuahua, a type of dog.",
    )
    write(classes.parent / "classes.txt", "0 Birds\n817 Oak Titmouse\n")
    assert captions(load_captions(f"classes:{classes}?template=nabirds"))[2] == (
        "a photo of a Oak Titmouse, a type of bird.",
    )


def test_one_class_alone_and_a_prompt(classes: Path, tmp_path: Path) -> None:
    one = load_captions(f"classes:{classes}?only=n02085620-Chihuahua&prompt=a photo of sks dog")
    assert captions(one) == [("a photo of sks dog",)] * 2
    assert all("n02085620-Chihuahua" in name for name in one.names)
    flat = load_captions(f"classes:{classes / '0817'}?prompt=a photo of sks bird")
    assert captions(flat) == [("a photo of sks bird",)] * 2
    assert len(load_captions(f"classes:{classes}?prompt=a photo")) == 8
    tar = pack(tmp_path / "a.tar", {"ant/0.png": png(), "bee/0.png": png(1)})
    assert captions(load_captions(f"classes:{tar}?only=bee")) == [("a photo of a bee",)]


def test_broken_classes(classes: Path) -> None:
    assert "the template 'a photo' has no {} for the class" in error(f"classes:{classes}?template=a photo")
    assert "has no class 'n02085620-chihuahua' (did you mean" in error(f"classes:{classes}?only=n02085620-chihuahua")
    assert "the prompt has an empty caption" in error(f"classes:{classes}?prompt= ")
    assert "expected one of them" in error(f"classes:{classes}?prompt=a&template=a {{}}")
    assert "no such folder" in error(f"classes:{classes / 'gone'}")
    assert "unknown setting" in error(f"classes:{classes}?prompts=a")
    (classes / "0817" / "1.png").write_bytes(b"")
    assert f"{classes / '0817' / '1.png'} cannot be read as an image" in error(f"classes:{classes}")


def test_unknown_kinds() -> None:
    assert "(did you mean 'captions'?)" in error("caption:x")
    assert "expected one of captions, coco, captions-tar, classes" in error("folder:x")


def test_a_square_is_the_centre_in_minus_one_to_one() -> None:
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste((255, 255, 255), (10, 0, 20, 20))  # the left half of the centre
    x = Square(20)(wide)
    assert (x.shape, x.dtype, x.min().item(), x.max().item()) == ((3, 20, 20), torch.float32, -1, 1)
    assert (x[:, :, :10] == 1).all() and (x[:, :, 10:] == -1).all()
    assert torch.equal(Square(20)(wide, flip=True), x.flip(-1))
    assert Square(8)(wide).shape == Square(8)(wide.rotate(90, expand=True)).shape == (3, 8, 8)
    with pytest.raises(DataError, match="size is 0"):
        Square(0)


def test_transparency_is_white(tmp_path: Path) -> None:
    held = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(held, "png")
    write(tmp_path / "a.png", held.getvalue())
    write(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "nothing"}\n')
    assert (Square(4)(load_captions(f"captions:{tmp_path}").image(0)) == 1).all()
