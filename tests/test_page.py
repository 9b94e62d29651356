"""The page in a real Chromium: what a stranger does, and what the page shows after every step."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from packaging.version import Version
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import restuning as rt
from restuning.runs.predict import predict

DATA = Path(__file__).parents[2] / "shared" / "data"
SLOW = 180_000
"""Milliseconds that a step may take on a busy machine; nothing waits longer than it must."""
PERMISSIONS = ["camera", "clipboard-read", "clipboard-write"]
MARKUP = "<img src=x onerror=window.hacked=1> ${window.hacked=2} {{this}}"


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:  # one of playwright's own, if it is there
        with sync_playwright() as p:
            found = p.chromium.executable_path
    assert Path(found).exists(), "no Chromium for the page's tests: apt-get install chromium, or set CHROMIUM"
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        flags += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        made = p.chromium.launch(executable_path=path, args=flags)
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails its test where a script fails, or where anything is asked of another host."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, permissions=PERMISSIONS)
    context.set_default_timeout(SLOW)
    expect.set_options(timeout=SLOW)
    made, wrong = context.new_page(), list[str]()
    made.on("pageerror", lambda error: wrong.append(str(error)))
    hosts = re.compile(r"(https?|wss?)://127\.0\.0\.1:|data:|blob:|about:")
    made.on("request", lambda request: None if hosts.match(request.url) else wrong.append(request.url))
    yield made
    context.close()
    assert not wrong, wrong


class Served:
    """`restuning app`, or `restuning serve`, in a process of its own."""

    home: Path

    def __init__(self, *words: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "restuning.cli", *words, "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def served(*words: str) -> Iterator[Served]:
    made = Served(*words)
    try:
        yield made
    finally:
        with suppress(ProcessLookupError):
            made.kill()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page with no project; `home` is its folder."""
    home = tmp_path_factory.mktemp("page") / "home"
    with served("app", str(home), "--port", "0") as made:
        made.home = home
        yield made


def photos(file: Path) -> tuple[bytes, str]:
    """A zip of 150 pictures of ten classes, EuroSAT's where they are, else sprites; and a picture that is not in it."""
    found: dict[str, list[bytes]] = {}
    tar = DATA / "eurosat" / "eurosat_rgb64_every6th.tar"
    if tar.exists():
        for name, data in members(tar):
            if len(found.setdefault(name, [])) < 16:
                found[name].append(data)
    else:
        task = rt.load_task("sprites:orientation", train_size=2000, test_size=10)
        for i, label in enumerate(task.train.labels):
            if label < 10 and len(found.setdefault(task.classes[label], [])) < 16:
                buffer = BytesIO()
                task.train.item(i).save(buffer, "PNG")
                found[task.classes[label]].append(buffer.getvalue())
    suffix = "jpg" if tar.exists() else "png"
    with zipfile.ZipFile(file, "w") as archive:
        for name, pictures in found.items():
            for i, data in enumerate(pictures[:15]):
                archive.writestr(f"photos/{name}/{i}.{suffix}", data)
    return found["SeaLake" if tar.exists() else sorted(found)[0]][15], suffix


def colours(folder: Path, names: tuple[str, ...] = ("amber", "blue"), each: int = 8) -> Path:
    """A folder of two classes that anything can tell apart."""
    generator = np.random.default_rng(0)
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.array([(230, 150, 30), (40, 60, 210)][k]) + generator.integers(-30, 30, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / name / f"{i}.png")
    return folder


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def count(page: Page, gallery: str = "#look-gallery") -> int:
    return int(page.locator(f"{gallery} .rt-count").inner_text())


def shots(page: Page, name: str) -> None:
    """NAME-1400.png and NAME-400.png in the folder that PAGE_SCREENSHOTS names, where it names one."""
    for width in (1400, 400) if "PAGE_SCREENSHOTS" in os.environ else ():
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(800)
        page.screenshot(path=Path(os.environ["PAGE_SCREENSHOTS"]) / f"{name}-{width}.png")
    page.set_viewport_size({"width": 1400, "height": 1000})


def make(page: Page, url: str, name: str, folder: Path | None = None) -> None:
    """A project by its name, of the pictures of a folder."""
    page.goto(f"{url}/?project=none")
    expect(page.locator("#summary")).to_contain_text("Make a project")
    page.locator("#new-name input, #new-name textarea").fill(name)
    page.locator("#make").click()
    expect(page.locator("#summary")).to_contain_text("0 pictures in 0 classes")
    if folder is not None:
        page.locator("#folder input, #folder textarea").fill(str(folder))
        page.locator("#read").click()
        expect(page.locator("#told")).to_contain_text("added")


def train(page: Page) -> None:
    tab(page, "Train")
    page.locator("#go").click()
    expect(page.locator("#progress")).to_contain_text("Trained")
    expect(page.locator("#summary")).to_contain_text("held out")


def test_a_strangers_path_from_an_empty_page_to_a_served_prediction(page: Page, app: Served, tmp_path: Path) -> None:
    unseen, suffix = photos(tmp_path / "photos.zip")
    (tmp_path / f"unseen.{suffix}").write_bytes(unseen)
    make(page, app.url, "land")
    expect(page).to_have_url(re.compile("project=land"))
    page.locator("#files input[type=file]").set_input_files(tmp_path / "photos.zip")
    expect(page.locator("#summary")).to_contain_text("150 pictures in 10 classes")
    expect(page.locator("#told")).to_contain_text("150 added")
    expect(page.locator("#checks .rt-chips li")).to_have_count(11)
    expect(page.locator("#pictures-gallery .rt-card")).to_have_count(24)
    assert rt.load_task(f"folder:{app.home / 'land'}").test.labels, "the command line reads the project"

    shots(page, "pictures")
    train(page)
    expect(page.locator("#scores tbody tr")).to_have_count(3)
    expect(page.locator("#scores")).to_contain_text("temperature")
    shots(page, "train")

    tab(page, "Look")
    expect(page.locator("#look-gallery h3")).to_contain_text("Mistakes")
    shots(page, "mistakes")
    before, first = count(page), page.locator("#look-gallery .rt-card").first
    key = first.locator("input.pick").get_attribute("value")
    first.locator("button[data-act=right]").click()
    expect(page.locator("#changed")).to_contain_text("1 marked as right")
    expect(page.locator(f"#look-gallery input[value='{key}']")).to_have_count(0)
    assert count(page) == before - 1
    first = page.locator("#look-gallery .rt-card").first
    key, to = first.locator("input.pick").get_attribute("value"), first.locator("button[data-act=label]").first
    name = to.get_attribute("data-label")
    to.click()
    expect(page.locator("#changed")).to_contain_text(f"1 labelled {name}; ")
    expect(page.locator("#changed")).to_contain_text("trained again")
    expect(page.locator("#look-gallery h3")).to_contain_text("Mistakes")
    assert len(list((app.home / "land" / str(name)).iterdir())) == 16

    page.get_by_label("Labels that may be wrong").check()
    expect(page.locator("#look-gallery h3")).to_contain_text("Labels that may be wrong")
    page.get_by_label("Confusion").check()
    cell = page.locator("#matrix .rt-matrix button").first
    number = int(cell.inner_text())
    shots(page, "confusion")
    cell.click()
    expect(page.locator("#look-gallery h3")).to_contain_text("taken for")
    assert count(page) == number, "a cell opens its pictures"
    page.get_by_label("Map").check()
    expect(page.locator("#map canvas")).to_have_attribute("aria-label", re.compile("a map of 150 pictures"))
    shots(page, "map")
    page.locator("#map canvas").scroll_into_view_if_needed()
    box = page.locator("#map canvas").bounding_box()
    assert box is not None
    x, y, side = box["x"], box["y"], box["width"]
    page.mouse.move(x + 12, y + 12)
    page.mouse.down()
    for to_x, to_y in ((side - 12, 12), (side - 12, side / 2), (12, side / 2), (12, 12)):
        page.mouse.move(x + to_x, y + to_y, steps=3)
    page.mouse.up()
    expect(page.locator("#look-gallery h3")).to_contain_text("What was drawn around")
    assert 0 < count(page) < 150

    tab(page, "Try")
    page.locator("#image input[type=file]").first.set_input_files(tmp_path / f"unseen.{suffix}")
    expect(page.locator("#answers h3").first).to_have_text("land")
    best = page.locator("#answers .rt-best b").first.inner_text()
    share = float(page.locator("#answers .rt-best").first.inner_text().removeprefix(best).strip(" %"))
    expect(page.locator("#answers")).to_contain_text("false alarms")
    shots(page, "try")

    tab(page, "Take away")
    line = page.locator("#taken pre").first.inner_text()
    shots(page, "take")
    assert line.startswith("restuning serve ")
    card = (app.home / "land" / ".restuning" / "adapter" / "README.md").read_text()
    assert "150 pictures in 10 classes" in card and card.startswith("---\n")
    words = shlex.split(line)[1:]
    words[words.index("--port") + 1] = "0"
    with served(*words) as server:
        request = urllib.request.Request(f"{server.url}/v1/predict?tasks=land&top=1", unseen)
        request.add_header("Content-Type", f"image/{suffix.replace('jpg', 'jpeg')}")
        answer = urllib.request.urlopen(request, timeout=60).read().decode()
    assert best in answer, "the served prediction is the page's"
    assert float(re.findall(r'"probability": ?([\d.]+)', answer)[0]) == pytest.approx(share / 100, abs=6e-4)


def test_two_projects_in_two_tabs_outlive_a_reload_and_a_killed_server(page: Page, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with served("app", str(home), "--port", "0") as app:
        for i, name in enumerate(("one", "two")):
            own = page if i == 0 else page.context.new_page()
            make(own, app.url, name, colours(tmp_path / name, (f"a{i}", f"b{i}")))
            expect(own.locator("#summary")).to_contain_text("16 pictures in 2 classes")
        train(page)
        second = page.context.pages[1]
        expect(second.locator("#checks")).to_contain_text("a1")
        expect(second.locator("#summary")).not_to_contain_text("held out")
        text = page.locator("#summary").inner_text()
        page.reload()
        expect(page.locator("#summary")).to_have_text(text)
        tab(second, "Train")
        second.get_by_role("button", name="Settings").click()
        slide(second, "#epochs", 100)
        second.locator("#go").click()
        expect(second.locator("#progress")).to_contain_text("Training ")
        app.kill()
        port = app.url.rsplit(":", 1)[1]
        with served("app", str(home), "--port", port):
            page.reload()
            expect(page.locator("#summary")).to_have_text(text)
            second.reload()
            expect(second.locator("#checks")).to_contain_text("a1")
            train(second)
            expect(second.locator("#scores caption")).to_contain_text("16 pictures in 2 classes")
            tab(page, "Try")
            page.locator("#image input[type=file]").first.set_input_files(tmp_path / "one" / "b0" / "3.png")
            expect(page.locator("#answers .rt-best b").first).to_have_text("b0")


def test_names_with_markup_and_hostile_pictures_execute_nothing(page: Page, app: Served, tmp_path: Path) -> None:
    folder = colours(tmp_path / "given", (MARKUP, "b"))
    (folder / "b" / f"{MARKUP}.png").write_bytes((folder / "b" / "0.png").read_bytes() + b"\0")
    (folder / "b" / "not.png").write_bytes(b"<svg onload=window.hacked=3>")
    Image.new("1", (20_000, 20_000)).save(folder / "b" / "large.png")
    make(page, app.url, MARKUP, folder)
    expect(page.locator("#told")).to_contain_text("17 added, 2 refused")
    expect(page.locator("#told")).to_contain_text("megapixels")
    expect(page.locator("#checks")).to_contain_text(MARKUP)
    train(page)
    tab(page, "Look")
    for what in ("Confusion", "Map", "Labels that may be wrong"):
        page.get_by_label(what).check()
        expect(page.locator("#map canvas" if what == "Map" else "#look-gallery h3").first).to_be_visible()
    tab(page, "Try")
    page.locator("#image input[type=file]").first.set_input_files(folder / MARKUP / "1.png")
    expect(page.locator("#answers .rt-best b").first).to_have_text(MARKUP)
    tab(page, "Take away")
    expect(page.locator("#taken pre").first).to_contain_text("restuning serve")
    assert page.evaluate("window.hacked") is None


def test_texts_of_a_table_take_the_same_path(page: Page, app: Served, tmp_path: Path) -> None:
    with open(tmp_path / "reviews.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *reviews(96), (MARKUP, "negative")])
    make(page, app.url, "reviews")
    page.locator("#files input[type=file]").set_input_files(tmp_path / "reviews.csv")
    expect(page.locator("#summary")).to_contain_text("97 texts in 2 classes")
    expect(page.locator("#pictures-gallery .rt-text").first).to_be_visible()
    task = rt.load_task(f"folder:{app.home / 'reviews'}")
    assert task.classes == ("negative", "positive") and isinstance(task.test.item(0), tuple), (
        "the command line reads it"
    )
    train(page)
    expect(page.locator("#backbone input")).to_have_value(re.compile("all-MiniLM-L6-v2"))
    expect(page.locator("#scores tbody tr")).to_have_count(3)
    shots(page, "texts-train")

    tab(page, "Look")
    page.get_by_label("Confusion").check()
    cell = page.locator("#matrix .rt-matrix button").first
    number = int(cell.inner_text())
    cell.click()
    expect(page.locator("#look-gallery h3")).to_contain_text("taken for")
    assert count(page) == number
    page.get_by_label("Map").check()
    expect(page.locator("#map canvas")).to_have_attribute("aria-label", re.compile("a map of 97 texts"))
    page.get_by_label("Mistakes").check()
    expect(page.locator("#look-gallery h3")).to_contain_text("Mistakes")
    shots(page, "texts-mistakes")
    first = page.locator("#look-gallery .rt-card").first
    key, to = first.locator("input.pick").get_attribute("value"), first.locator("button[data-act=label]").first
    label = app.home / "reviews" / str(to.get_attribute("data-label"))  # a locator finds another one later
    to.click()
    expect(page.locator("#changed")).to_contain_text("trained again")
    assert key in {blake2b(p.read_bytes(), digest_size=16).hexdigest() for p in label.iterdir()}

    tab(page, "Try")
    page.locator("#text textarea").fill("a wonderful, warm and funny film")
    page.locator("#text button").click()
    best = page.locator("#answers .rt-best b").first
    expect(best).to_have_text(re.compile("negative|positive"))
    tab(page, "Take away")
    expect(page.locator("#taken")).to_contain_text("curl -F text=")
    adapter = app.home / "reviews" / ".restuning" / "adapter"
    assert "pipeline_tag: text-classification" in (adapter / "README.md").read_text()
    (row,) = predict([adapter], "a wonderful, warm and funny film")
    assert row["top"][0]["class"] == best.inner_text(), "the command line answers as the page does"
    assert page.evaluate("window.hacked") is None


def reviews(count: int) -> list[tuple[str, str]]:
    """Sentences of SST-2 where they are, else made ones."""
    file = DATA / "text" / "SST-2" / "dev.tsv"
    if file.exists():
        rows = [line.split("\t") for line in file.read_text().splitlines()[1 : count + 1]]
        return [(text, ("negative", "positive")[int(label)]) for text, label in rows]
    good, bad = ("warm", "funny", "wonderful", "bright"), ("dull", "slow", "tedious", "bleak")
    words = [(word, name) for pair in zip(good, bad, strict=True) for word, name in zip(pair, NAMES, strict=True)]
    return [(f"{words[i % 8][0]} film, number {i}", words[i % 8][1]) for i in range(count)]


NAMES = ("positive", "negative")


def test_pictures_are_dragged_to_a_class(page: Page, app: Served, tmp_path: Path) -> None:
    make(page, app.url, "dragged", colours(tmp_path / "given"))
    cards, chip = page.locator("#pictures-gallery .rt-card"), page.locator("#checks button[data-what='class:blue']")
    for i in (0, 1):
        cards.nth(i).locator("input.pick").check()
    cards.first.drag_to(chip)
    expect(page.locator("#told")).to_contain_text("2 labelled blue")
    expect(chip).to_contain_text("10")
    assert len(list((app.home / "dragged" / "blue").iterdir())) == 10


def test_the_same_lines_are_a_space(page: Page, tmp_path: Path) -> None:
    """Those of docs/page.md, as an app.py of Hugging Face has them."""
    lines = (Path(__file__).parents[1] / "docs" / "page.md").read_text().rsplit("```python\n", 1)[1].split("```")[0]
    (tmp_path / "app.py").write_text(f"{lines}\npage.launch(**style())\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert str(port) in next(line for line in process.stdout if "http" in line)
        make(page, f"http://127.0.0.1:{port}", "space")
        expect(page.locator(".rt-head svg")).to_have_css("width", "42px")
        expect(page.locator("#folder")).to_have_count(0)
        assert (tmp_path / "projects" / "space").is_dir()
    finally:
        process.kill()
        process.wait()


def test_the_camera_and_the_clipboard_are_answered(page: Page, app: Served, tmp_path: Path) -> None:
    make(page, app.url, "seen", colours(tmp_path / "given"))
    train(page)
    tab(page, "Try")
    page.locator("#image").get_by_label("Capture from camera").click()
    page.locator("#image").get_by_text("Click to Access Webcam").click()
    expect(page.locator("#image video")).to_be_visible()
    page.wait_for_function("document.querySelector('#image video').videoWidth > 0")
    page.locator("#image").get_by_label("capture photo").click()
    answer = page.locator("#answers .rt-answer").filter(has_text="seen")
    expect(answer).to_contain_text("Unlike anything in training")  # Chromium's green test picture

    page.locator("#image").get_by_label("Remove Image").click()
    expect(answer).to_have_count(0)
    copied = """async colour => {
        const canvas = new OffscreenCanvas(32, 32), pen = canvas.getContext('2d')
        pen.fillStyle = colour
        pen.fillRect(0, 0, 32, 32)
        await navigator.clipboard.write([new ClipboardItem({'image/png': canvas.convertToBlob()})])
    }"""
    page.evaluate(copied, "rgb(40 60 210)")
    page.locator("#image").get_by_label("Paste from clipboard").click()
    expect(answer.locator(".rt-best b")).to_have_text("blue")


def test_a_curve_is_live_and_sliders_are_obeyed(page: Page, app: Served, tmp_path: Path) -> None:
    make(page, app.url, "curve", colours(tmp_path / "given", each=48))  # a training long enough to be stopped
    tab(page, "Train")
    page.get_by_role("button", name="Settings").click()
    slide(page, "#epochs", 100)
    seen = """() => { window.seen = []; new MutationObserver(() => {
        const text = document.querySelector('#progress').innerText
        if (document.querySelector('#progress .rt-curve polyline')) window.seen.push(text)
    }).observe(document.querySelector('#progress'), {subtree: true, childList: true}) }"""
    page.evaluate(seen)
    page.locator("#go").click()
    expect(page.locator("#progress")).to_contain_text("Trained")
    told = page.evaluate("window.seen")
    assert told and all(re.search(r"Training [\w-]+: step \d+ of [1-9]00", text) for text in told), told[:3]
    page.evaluate("window.seen = []")
    page.locator("#go").click()
    page.wait_for_function("window.seen.length")
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Cancelled")
    page.locator("#go").click()
    expect(page.locator("#progress")).to_contain_text("Trained")


def slide(page: Page, name: str, value: int) -> None:
    """A slider's number, typed."""
    box = page.locator(f"{name} input[type=number]")
    expect(box).to_be_visible()
    page.wait_for_timeout(1500)  # where a part is unfolded, Gradio shows a slider a moment before it listens to it
    box.fill(str(value))
    box.press("Enter")


def test_tuning_inside_runs_in_the_background_and_shows_how_far_it_is(page: Page, app: Served, tmp_path: Path) -> None:
    make(page, app.url, "inside", colours(tmp_path / "given"))
    train(page)
    page.get_by_role("button", name="Tune inside the backbone").click()
    told = page.locator("#inside-told")
    expect(told).to_contain_text(re.compile(r"20 epochs of about 3 passes each: some \d+ s on this machine"))
    slide(page, "#inside-epochs", 30)
    expect(told).to_contain_text("30 epochs of about")
    page.locator("#inside-go").click()
    expect(told).to_contain_text(re.compile(r"\d+ of 30 epochs, \d+ s left"))
    expect(told.locator("progress")).to_be_visible()
    page.locator("#inside-stop").click()
    expect(told).to_contain_text("Stopped after")
    done = int(told.inner_text().split()[2])
    page.reload()
    tab(page, "Train")
    page.get_by_role("button", name="Tune inside the backbone").click()
    expect(told).to_contain_text("of 30 epochs; it goes on from there")
    page.locator("#inside-go").click()
    expect(told).to_contain_text(re.compile(r"res-tuning inside: [\d.]+ % on \d pictures"))
    log = (app.home / ".inside" / "inside.log").read_text()
    assert log.count("epoch 1/30 ") == 1 and f"epoch {done + 1}/30 " in log, f"it went on, after {done}:\n{log}"
    adapter = app.home / ".inside" / "inside"
    (row,) = predict([adapter], str(tmp_path / "given" / "blue" / "0.png"))
    assert row["top"][0]["class"] in ("amber", "blue")


def test_a_zip_a_graph_and_a_push_from_the_page(page: Page, app: Served, tmp_path: Path) -> None:
    make(page, app.url, "away", colours(tmp_path / "given"))
    train(page)
    tab(page, "Take away")
    page.locator("#pack").click()
    with page.expect_download() as download:
        page.locator("#zipped").click()
    names = zipfile.ZipFile(download.value.path()).namelist()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "run.json"} <= set(names)
    page.locator("#graph").click()
    expect(page.locator("#took")).to_contain_text("Exported to")
    assert (app.home / "away" / ".restuning" / "exported-torch-export" / "model.pt2").exists()
    page.get_by_role("button", name="Push to the hub").click()
    for repo, why in (("nowhere", "expected owner/name"), ("me/away", "the hub did not take me/away: ")):
        page.locator("#repo input, #repo textarea").fill(repo)
        page.locator("#push").click()
        expect(page.locator("#took")).to_contain_text(why)


def test_a_screen_reader_and_a_narrow_screen_can_use_every_tab(page: Page, app: Served, tmp_path: Path) -> None:
    make(page, app.url, "narrow", colours(tmp_path / "given"))
    train(page)
    wrong: dict[tuple[str, int, str], object] = {}
    # of Gradio before 6.21: its own button for the tabs that find no room
    known = r"overflow-(menu|item)" if Version(version("gradio")) < Version("6.21") else "(?!)"
    for scheme, width in (("light", 1400), ("light", 400), ("dark", 1400)):
        page.set_viewport_size({"width": width, "height": 900})
        if scheme == "dark":
            page.emulate_media(color_scheme="dark")
            page.reload()
            expect(page.locator("#summary")).to_contain_text("held out")
        for name in ("Data", "Train", "Look", "Try", "Take away"):
            _reach(page, name)
            page.wait_for_timeout(500)  # animations end
            for found in Axe().run(page).response["violations"]:
                nodes = [node["html"][:160] for node in found["nodes"] if not re.search(known, str(node["target"]))]
                if found["impact"] in ("serious", "critical") and nodes:
                    wrong[scheme, width, name] = found["id"], nodes[:4]
            if (wide := page.evaluate("document.scrollingElement.scrollWidth")) > width:
                wrong[scheme, width, f"{name}, too wide"] = wide
    assert not wrong, wrong


def _reach(page: Page, name: str) -> None:
    """A tab; on a narrow screen it may be behind the button for more."""
    found = page.get_by_role("tab", name=name)
    if not found.first.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
        return
    found.first.click()


@pytest.mark.large
def test_five_thousand_pictures_of_150_classes_stay_usable(page: Page, tmp_path: Path) -> None:
    """Every step is answered, nothing named is executed, no view holds more than a page of pictures, and none is wider
    than a narrow screen. PAGE_TIMES names a file for what was measured."""
    alone = many(tmp_path / "given")
    rows = list[dict[str, float | str]]()

    def timed(name: str, click: Callable[[], object], then: Callable[[], object] = lambda: None) -> None:
        start = time.perf_counter()
        click()
        then()
        row: dict[str, float | str] = {"what": name, "seconds": round(time.perf_counter() - start, 2)}
        for key, script in SIZES.items():
            row[key] = page.evaluate(script)
        page.set_viewport_size({"width": 400, "height": 900})
        page.wait_for_timeout(300)
        row["width of 400"] = page.evaluate("document.scrollingElement.scrollWidth")
        page.set_viewport_size({"width": 1400, "height": 1000})
        rows.append(row)

    page.context.set_default_timeout(20 * SLOW)
    expect.set_options(timeout=20 * SLOW)
    with served("app", str(tmp_path / "home"), "--port", "0") as app:
        look, cards = page.locator("#look-gallery h3"), page.locator("#look-gallery .rt-card")
        timed("add", lambda: make(page, app.url, "many", tmp_path / "given"),
              lambda: expect(page.locator("#summary")).to_contain_text("5000 pictures in 150 classes"))  # fmt: skip
        chips = page.locator("#checks .rt-chips li")
        expect(chips).to_have_count(151)
        expect(page.locator("#checks")).to_contain_text(f"class {alone} has 1")
        tab(page, "Train")
        page.locator("#go").click()
        expect(page.locator("#progress")).to_contain_text(re.compile(r"Features: \d+ of 5000 pictures, \d+ s left"))
        page.locator("#stop").click()
        expect(page.locator("#progress")).to_contain_text("Cancelled; what was computed is kept")
        files = set((tmp_path / "home" / "many" / ".restuning" / "features").rglob("*.safetensors"))
        timed("features and training", lambda: train(page))
        assert files and all(file.exists() for file in files) and len(files) < 157
        expect(page.locator("#scores caption")).to_contain_text("4999 pictures in 149 classes")
        timed("reload", page.reload, lambda: expect(chips).to_have_count(151))
        timed("a class", page.locator("#checks button[data-act=show]").nth(77).click,
              lambda: expect(page.locator("#pictures-gallery h3")).to_contain_text("<b onclick"))  # fmt: skip
        tab(page, "Look")
        timed("confusion", page.get_by_label("Confusion").check,
              lambda: expect(page.locator("#matrix svg.rt-heat")).to_be_visible())  # fmt: skip
        timed("a pair", page.locator("#matrix .rt-pairs button").first.click,
              lambda: expect(look).to_contain_text("taken for"))  # fmt: skip
        assert count(page) == int(page.locator("#matrix .rt-pairs button").first.inner_text().split()[0])
        canvas = page.locator("#map canvas")
        timed("map", page.get_by_label("Map").check,
              lambda: expect(canvas).to_have_attribute("aria-label", re.compile("of 4999 ")))  # fmt: skip
        timed("labels that may be wrong", page.get_by_label("Labels that may be wrong").check,
              lambda: expect(look).to_contain_text("Labels that may be wrong"))  # fmt: skip
        timed("mistakes", page.get_by_label("Mistakes").check, lambda: expect(look).to_contain_text("Mistakes"))
        expect(cards).to_have_count(24)
        timed("the next page", page.locator("#look-gallery button[data-act=page]").last.click,
              lambda: expect(page.locator("#look-gallery .rt-pages")).to_contain_text("page 2"))  # fmt: skip
        timed("most alike", page.locator("#look-gallery button[data-act=alike]").first.click,
              lambda: expect(look).to_contain_text("Most alike"))  # fmt: skip
        page.get_by_label("Confusion").check()
        expect(page.locator("#matrix svg.rt-heat")).to_be_visible()
        page.get_by_role("radio", name="Mistakes").check()
        expect(page.locator("#matrix svg.rt-heat")).to_have_count(0)
        timed("relabel", page.locator("#look-gallery button[data-act=label][data-key]").first.click,
              lambda: expect(page.locator("#changed")).to_contain_text("trained again"))  # fmt: skip
        tab(page, "Try")
        given = next((tmp_path / "given").rglob("0.*"))
        timed("try", lambda: page.locator("#image input[type=file]").first.set_input_files(given),
              lambda: expect(page.locator("#answers .rt-best b").first).to_contain_text("<b onclick"))  # fmt: skip
        tab(page, "Take away")
        timed("take away", lambda: None,
              lambda: expect(page.locator("#taken pre").first).to_contain_text("restuning serve"))  # fmt: skip
        assert page.evaluate("window.hacked") is None
    if "PAGE_TIMES" in os.environ:
        Path(os.environ["PAGE_TIMES"]).write_text(json.dumps(rows, indent=1))
    for row in rows:
        assert float(row["elements"]) < 4000 and float(row["pictures"]) <= 2 * 24 + 6, row
        assert float(row["characters"]) < 2e6 and row["width of 400"] == 400, row


SIZES = {
    "elements": "document.querySelectorAll('*').length",
    "pictures": "document.images.length",
    "characters": "document.documentElement.outerHTML.length",
}


def many(folder: Path) -> str:
    """5,000 pictures of 150 classes whose names are markup: Caltech-101's 102, and quarters and middles of EuroSAT's
    tiles, or noise where these sets are not. Returns the last class, which has one picture alone."""
    rest = "<b onclick=window.hacked=1>"
    seen = set[bytes]()

    def save(label: str, name: str, data: bytes) -> None:
        if data not in seen:
            seen.add(data)
            (folder / f"{label} {rest}").mkdir(parents=True, exist_ok=True)
            (folder / f"{label} {rest}" / name).write_bytes(data)

    def crop(label: str, name: str, data: bytes, k: int) -> None:
        buffer, at = BytesIO(), ((0, 0), (32, 0), (0, 32), (32, 32), (16, 16))[k]
        Image.open(BytesIO(data)).convert("RGB").crop((*at, at[0] + 32, at[1] + 32)).save(buffer, "PNG")
        save(f"{label} {k}", name, buffer.getvalue())

    photos, tiles = (sorted((DATA / name).glob("*.tar")) for name in ("caltech101", "eurosat"))
    for file in photos:
        for i, (label, data) in enumerate(members(file)):
            save(label, f"{i}.jpg", data)
    if tiles:
        found = dict[str, list[bytes]]()
        for label, data in members(tiles[0]):
            found.setdefault(label, []).append(data)
        names = [(label, k) for k in range(5) for label in found][: 150 - len(list(folder.iterdir()))]
        last, *others = names
        crop(last[0], "0.png", found[last[0]][0], last[1])
        for i in range(334):
            for label, k in others:
                if len(seen) < 5000:
                    crop(label, f"{i}.png", found[label][i], k)
        return f"{last[0]} {last[1]} {rest}"
    generator = np.random.default_rng(0)
    for i in range(5000):
        buffer = BytesIO()
        Image.fromarray(generator.integers(0, 255, (32, 32, 3)).astype("uint8")).save(buffer, "PNG")
        save(f"class {i % 149 if i else 149:03}", f"{i}.png", buffer.getvalue())
    return f"class 149 {rest}"


def members(tar: Path) -> Iterator[tuple[str, bytes]]:
    """(class, bytes) of a tar class/file."""
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile():
                yield member.name.split("/")[-2], archive.extractfile(member).read()  # type: ignore[union-attr]


@pytest.mark.large
def test_a_map_by_umap_keeps_what_is_alike_together(page: Page, app: Served, tmp_path: Path) -> None:
    make(page, app.url, "umap", colours(tmp_path / "given"))
    train(page)
    tab(page, "Look")
    page.get_by_label("Map").check()
    page.locator("#map").get_by_role("button", name="UMAP").click()
    expect(page.locator("#map button[aria-pressed=true]").nth(1)).to_have_text("UMAP")
    dots = json.loads(str(page.locator("#map canvas").get_attribute("data-dots")))
    at = {k: np.array([dot[:2] for dot in dots if dot[3] == k]) for k in (0, 1)}
    apart = np.linalg.norm(at[0].mean(0) - at[1].mean(0))
    assert apart > np.linalg.norm(at[0] - at[0].mean(0), axis=1).mean(), "two colours are two groups"
