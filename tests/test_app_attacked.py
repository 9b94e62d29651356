"""What the page does with hostile pictures, zips, names and hosts, a disk that fails, and people who act at once."""

import resource
import shutil
import struct
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from test_app import picture, pictures

import restuning as rt
from restuning.app import given
from restuning.app.given import from_files, from_folder
from restuning.app.handlers import Handlers
from restuning.app.home import Home
from restuning.app.project import Project
from restuning.app.server import make_app
from restuning.app.views import View
from restuning.app.workbench import Workbench
from restuning.errors import DataError

RED = (200, 30, 30)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A PNG whose header says 60,000 × 60,000 pixels."""
    data = bytearray(saved(Image.new("RGB", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    return bytes(data)


def test_hostile_pictures_are_refused_and_strange_ones_are_taken(tmp_path: Path) -> None:
    good = picture(RED, 0)
    frames = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(40)]
    strange = {
        "jpeg.png": saved(Image.new("RGB", (9, 9), RED), "JPEG"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "narrow.png": saved(Image.new("L", (1, 5000)), "PNG"),
        "cmyk.jpg": saved(Image.new("CMYK", (20, 20)), "JPEG"),
        "clear.png": saved(Image.new("LA", (20, 20)), "PNG"),
    }
    bad = {
        "huge.png": huge_png(),
        "bomb.png": saved(Image.new("1", (20_000, 20_000)), "PNG"),
        "cut.png": good[: len(good) // 2],
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        "script.jpg": b"%!PS\n(/etc/passwd) (r) file",
        "nothing.png": b"",
        "header.gif": b"GIF89a",
    }
    project = Project(tmp_path / "p")
    added = project.add([(name, data, "c") for name, data in {**strange, **bad}.items()])
    assert added.count == len(strange) and len(added.refused) == len(bad)
    assert all("\n" not in line for line in added.refused)
    bench = Workbench(project)
    list(bench.compute())
    assert len(bench.store.rows) == len(strange) and not bench.store.bad
    for name, data in bad.items():  # beside the page, in the folder
        (project.path / "c" / name).write_bytes(data)
    on = Handlers(Home(tmp_path))
    list(on.home.bench("p").compute())
    assert len(on.home.bench("p").store.bad) == len(bad)
    assert all(name in on.opened("p", "checks")[0] for name in bad)


def test_of_a_damaged_zip_the_rest_is_read(tmp_path: Path) -> None:
    file, names = tmp_path / "a.zip", ("x/0.png", "x/1.png", "y/2.png")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, name in enumerate(names):
            archive.writestr(name, picture(RED, i))
        archive.writestr("y/\N{RIGHT-TO-LEFT OVERRIDE}gnp.png", picture(RED, 9))
        archive.writestr("\N{RIGHT-TO-LEFT OVERRIDE}z/3.png", picture(RED, 3))
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        at = archive.getinfo("x/1.png").header_offset + 200
    data[at : at + 60] = b"\xff" * 60
    file.write_bytes(data)
    project = Project(tmp_path / "p")
    added = project.add(from_files([file]))
    assert added.count == 3 and project.counts() == {"x": 1, "y": 2}
    assert [line.split()[0] for line in added.refused] == ["1.png", "no"]
    assert all(p.path.name.isprintable() for p in project.items())


def test_a_zip_bomb_is_refused_by_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(40):
            archive.writestr(f"x/{i}.bmp", bytes(2**20))
        archive.writestr("x/large.png", bytes(2**20 + 1))
    monkeypatch.setattr(given, "MOST_ZIPPED", 8 * 2**20)
    monkeypatch.setattr(given, "MOST_BYTES", 2**20)
    project = Project(tmp_path / "p")
    with pytest.raises(DataError, match=r"^bomb\.zip unpacks to more than"):
        project.add(from_files([tmp_path / "bomb.zip"]))
    monkeypatch.setattr(given, "MOST_ZIPPED", 2**30)
    added = project.add(from_files([tmp_path / "bomb.zip"]))
    assert added.count == 0 and len(added.refused) == 41


def test_names_that_are_no_text_do_not_take_the_page_down(tmp_path: Path) -> None:
    home = tmp_path / "home"
    Project(home / "p").add(pictures(2))
    for folder in (bytes(home) + b"/\xff\xfe", bytes(home / "p") + b"/\xff"):
        Path(folder.decode(errors="surrogateescape")).mkdir()
        Path((folder + b"/\xff.png").decode(errors="surrogateescape")).write_bytes(picture(RED, 7))
    on = Handlers(Home(home))
    assert on.home.names() == ["p"] and on.home.bench("p").project.classes() == ("amber", "blue", "green")
    "".join(on.opened("p")).encode()
    other = Project(tmp_path / "q")
    assert other.add(from_folder(home / "p")).count == 6
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        other.add_class(b"\xff".decode(errors="surrogateescape"))


# ---- the disk


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may have more than no bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def asked(act: str, keys: list[str], label: str = "", what: str = "") -> dict[str, object]:
    return {"act": act, "keys": keys, "label": label, "page": 0, "what": what}


def test_a_full_disk_and_a_folder_that_goes_are_told_in_a_line(tmp_path: Path) -> None:
    on = Handlers(Home(tmp_path / "home"))
    bench = on.home.bench(on.home.new("p"))
    bench.project.add(pictures(6))
    list(bench.compute())
    bench.train(["linear"])
    before, keys = bench.result, [p.key for p in bench.project.items()]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "0.png").write_bytes(picture(RED, 1))
    with full_disk():
        told = [*on.add("p", None, "", str(tmp_path / "more")), on.act("p", View(), asked("right", keys[:1]))[0],
                on.act("p", View(), asked("label", keys[:1], "blue"))[0], on.packed("p")[1]]  # fmt: skip
    assert all("Refused: " in line for line in told), told
    assert bench.project.state["right"] == [] and bench.result is not None and len(bench.project.items()) == 18
    again = Workbench(Project(bench.project.path))
    assert again.result is not None and before is not None and again.result.keys == before.keys
    assert not list(bench.project.path.rglob("*.tmp")), "nothing is half written"
    assert "0 were there already" not in list(on.add("p", None, "", str(tmp_path / "more")))[-1]

    shutil.rmtree(bench.project.path / "green")
    assert "trained again" in on.act("p", View(), asked("label", keys[:1], "blue"))[0]
    assert bench.result.classes == ("amber", "blue")
    for stale in (View("cell:0:2"), View(f"alike:{keys[-1]}")):
        assert "Refused" in on.gallery("p", stale)
    shutil.rmtree(bench.project.path)
    told = [on.opened("p")[0], on.look("p", "mistakes")[1], on.ask("p", None, "a"), on.inside("p", "start", 2)[0]]
    told += [on.act("p", View(), asked("remove", keys[:2]))[0]]
    assert all("Refused: " in line for line in told), told


# ---- people


def test_what_many_do_at_once_is_done(tmp_path: Path) -> None:
    on = Handlers(Home(tmp_path / "home"))
    bench = on.home.bench(on.home.new("p"))
    bench.project.add(pictures(20))
    list(bench.compute())
    bench.train(["linear"])
    keys = [p.key for p in bench.project.items()]
    lines = list[str]()

    def act(part: list[str], i: int) -> None:
        for key in part:
            lines.append(on.act("p", View(), asked("right", [key]))[0])
        lines.append(on.act("p", View(), asked("label", part[:2], f"class {i}"))[0])

    workers = [threading.Thread(target=act, args=(keys[i::6], i)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not any("Refused" in line for line in lines), lines
    relabelled = {key for i in range(6) for key in keys[i::6][:2]}
    assert set(bench.project.state["right"]) == set(keys) - relabelled
    labels = {p.key: p.label for p in bench.project.items()}
    assert all(labels[key] == f"class {i}" for i in range(6) for key in keys[i::6][:2]) and len(labels) == 60
    assert bench.fresh()


def test_what_is_cancelled_goes_on_where_it_was(tmp_path: Path) -> None:
    on = Handlers(Home(tmp_path / "home"))
    bench = on.home.bench(on.home.new("p"))
    bench.project.add(pictures(15))
    words = ("p", bench.project.backbone, "", 0, 0)
    run = on.train(*words)
    assert "Features: 32 of 45" in [next(run) for _ in range(2)][1][0]
    on.cancel("p")
    assert "Cancelled" in next(run)[0] and next(run, None) is None
    for line, _ in on.train(*words[:3], 100, 0):
        if "Training" in line:
            on.cancel("p")
    assert "Cancelled" in line and bench.result is None and len(bench.store.rows) == 45
    assert "Trained" in list(on.train(*words))[-1][0] and bench.about() is not None


def test_a_class_of_one_is_left_out_of_training(tmp_path: Path) -> None:
    on = Handlers(Home(tmp_path / "home"))
    bench = on.home.bench(on.home.new("p"))
    bench.project.add([*pictures(6), ("alone.png", picture(RED, 0), "red")])
    list(bench.compute())
    result = bench.train(["linear"])
    assert "red" not in result.classes and len(result.keys) == 18 and bench.fresh()
    assert "left out of training" in on.opened("p", "checks")[0]
    line = on.act("p", View(), asked("label", [result.keys[0]], "new"))[0]
    assert "1 labelled new, left out of training until new has two; linear trained again" in line
    assert "new has two" not in on.act("p", View(), asked("label", [result.keys[1]], "new"))[0]
    assert bench.result is not None and "new" in bench.result.classes
    assert set(rt.Classifier.load(bench.finish()).classes_.tolist()) == set(bench.result.classes)


def test_a_page_for_others_names_nothing_of_the_server(tmp_path: Path) -> None:
    on = Handlers(Home(tmp_path), local=False)
    on.home.new("p")
    for backbone, weights in (("hf:/etc", ""), ("restuning-micro", "/etc/passwd"), ("file:x.py", "")):
        ((line, _),) = on.train("p", backbone, weights, 0, 0)
        assert "cannot be named here" in line


def test_a_page_answers_its_own_host_alone(tmp_path: Path) -> None:
    app = make_app(Home(tmp_path))
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        answer = client.get("/")
        assert answer.status_code == 200 and "frame-ancestors 'self'" in answer.headers["content-security-policy"]
        assert client.get("/", headers={"Host": "localhost:7860"}).status_code == 200
        assert client.get("/", headers={"Host": "elsewhere.example:7860"}).status_code == 400


def test_the_page_is_mounted_on_the_server(tmp_path: Path) -> None:
    import gradio

    from restuning.app.page import build, style
    from restuning.serving.adapters import Adapters
    from restuning.serving.app import Server
    from restuning.serving.app import make_app as make_server
    from restuning.serving.settings import ServeSettings

    project = Project(tmp_path / "home" / "p")
    project.add(pictures(6))
    bench = Workbench(project)
    list(bench.compute())
    bench.train(["linear"])
    settings = ServeSettings(adapters=(f"p={bench.finish()}",), threads=1)
    server = make_server(Server(settings, Adapters(settings, torch.device("cpu"))))
    gradio.mount_gradio_app(server.app, build(Home(tmp_path / "home"), local=False), "/page", **style())
    with TestClient(server) as client:
        assert "rt-head" in client.get("/page/").text
        while client.get("/ready").status_code != 200:
            pass
        files = {"image": ("x.png", picture(RED, 3), "image/png")}
        assert client.post("/v1/predict", files=files, data={"tasks": "p"}).status_code == 200
