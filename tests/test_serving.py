"""The server as its clients meet it, over HTTP on loopback."""

import asyncio
import base64
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from served import picture, same_answer, save_adapters, serving
from test_text import WORDS, save_model

import restuning as rt
from restuning.cli.arguments import filled
from restuning.cli.main import main, parse
from restuning.runs.predict import predict
from restuning.serving import AsyncClient, Client
from restuning.serving.app import Server
from restuning.serving.client import ServerError
from restuning.serving.settings import ServeSettings

MICRO = "restuning-micro"
METHODS = {method: (method, 3 + i % 5, "single-label") for i, method in enumerate(rt.METHODS) if method != "full"}
KINDS = {
    "labels": ("linear", 6, "multi-label"),
    "numbers": ("bypass", 2, "regression"),
    "one": ("lora", 1, "regression"),
}
FEW = ("bypass", "linear", "lora", "ssf")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tmp_path_factory.mktemp("adapters"), MICRO, {**METHODS, **KINDS})


@pytest.fixture(scope="module")
def everything(root: Path) -> Iterator[tuple[str, Server]]:
    """A server of every method and kind of task."""
    with serving(adapters=tuple(str(root / name) for name in (*METHODS, *KINDS))) as found:
        yield found


@pytest.fixture(scope="module")
def few(root: Path) -> Iterator[tuple[str, Server]]:
    """A server that takes changes, and adapters of four kinds."""
    adapters = tuple(str(root / name) for name in FEW)
    with serving(adapters=adapters, root=root, allow_changes=True, max_batch=1, max_body=200_000) as found:
        yield found


def test_served_answers_are_those_of_predict(root: Path, everything: tuple[str, Server], tmp_path: Path) -> None:
    """Every method and kind of task, all at once, in mixtures, and from the command line."""
    url, _ = everything
    images = [picture(0), picture(1, (300, 20), "JPEG"), picture(2, kind="WEBP", lossless=True)]
    for i, image in enumerate(images):
        (tmp_path / f"{i}.png").write_bytes(image)
    expected = {name: predict([root / name], str(tmp_path), top=3) for name in (*METHODS, *KINDS)}
    with Client(url) as client:
        together = client.predict(images, top=3)
        for name, rows in expected.items():
            for got, row in zip(together, rows, strict=True):
                assert same_answer(got[name], row), name
        for names in (["lora"], ["bypass", "lora", "numbers"], ["linear", "bypass", "lst", "labels"]):
            for got, i in zip(client.predict(images[:2], tasks=names, top=3), range(2), strict=True):
                assert list(got) == names
                assert all(same_answer(got[name], expected[name][i]) for name in names)
        embedded = client.embed(images[:1], tasks=["bypass"])[0]["bypass"]
        assert len(embedded) == 128


def test_rows_of_different_tasks_share_a_forward(everything: tuple[str, Server]) -> None:
    """Requests of one task each, at the same time: fewer forwards than answers, and each its own answer."""
    url, server = everything
    names = ["linear", "bypass", "bypass-none", "bypass-vertical", "lst", "labels"] * 4

    def total(name: str) -> float:
        return float(getattr(server.metrics, name)._value.get())

    with Client(url) as client:
        expected = {name: client.predict([picture(5)], tasks=[name], top=2)[0][name] for name in set(names)}
        forwards, passes = total("forwards"), total("passes")
        hold = threading.Event()
        take, server.batcher._take = server.batcher._take, lambda: (hold.wait(10), take())[1]  # type: ignore[method-assign]
        client.predict([picture(5)], tasks=["linear"])  # the thread waits before it takes the next
        with ThreadPoolExecutor(len(names)) as pool:
            calls = [pool.submit(client.predict, [picture(5)], (), [name], 2) for name in names]
            while server.batcher._items < len(names):
                time.sleep(0.01)
            hold.set()
            for name, call in zip(names, calls, strict=True):
                assert same_answer(call.result()[0][name], expected[name])
        server.batcher._take = take  # type: ignore[method-assign]
        assert total("forwards") - forwards == len(names) + 1 and total("passes") - passes == 2
        client.predict([picture(5)], tasks=names[:6])
        assert total("saved") >= 5, "six tasks, one forward"


def test_the_ways_to_send_an_image(everything: tuple[str, Server]) -> None:
    url, image = everything[0], picture(7)
    http = httpx.Client(base_url=url)
    answers = [
        http.post("/v1/predict", json={"images": [base64.b64encode(image).decode()], "tasks": ["linear"], "top": 2}),
        http.post("/v1/predict", files={"image": image}, data={"tasks": "linear", "top": "2"}),
        http.post("/v1/predict?tasks=linear&top=2", content=image, headers={"content-type": "image/png"}),
        http.post(
            "/v1/predict?tasks=linear&top=2", content=image, headers={"content-type": "application/octet-stream"}
        ),
    ]
    assert [a.status_code for a in answers] == [200] * 4 and len({a.text for a in answers}) == 1
    assert len(answers[0].json()["items"][0]["tasks"]["linear"]["top"]) == 2
    logits = http.post(
        "/v1/predict?tasks=linear&logits=true&top=9", content=image, headers={"content-type": "image/png"}
    )
    found = logits.json()["items"][0]["tasks"]["linear"]
    p = torch.tensor(found["logits"]).softmax(-1).sort(descending=True).values
    assert p.tolist() == pytest.approx([c["probability"] for c in found["top"]], abs=1e-5)
    turned, plain = BytesIO(), Image.open(BytesIO(picture(7)))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    plain.save(turned, "PNG", exif=exif)
    upright = BytesIO()
    plain.rotate(180).save(upright, "PNG")
    a, b = (
        http.post(
            "/v1/predict?tasks=linear&top=3", content=file.getvalue(), headers={"content-type": "image/png"}
        ).json()
        for file in (turned, upright)
    )
    assert a["items"] == b["items"], "turned as its EXIF says"


def test_models_metrics_and_documentation(everything: tuple[str, Server]) -> None:
    url, _ = everything
    http = httpx.Client(base_url=url)
    base, *models = http.get("/v1/models").json()["data"]
    assert base["id"] == MICRO and base["parent"] is None
    assert {m["id"] for m in models} == {*METHODS, *KINDS} and {m["parent"] for m in models} == {MICRO}
    numbers = next(m for m in models if m["id"] == "numbers")
    assert (numbers["kind"], numbers["classes"]) == ("regression", ["class 0", "class 1"])
    answer = http.get("/health", headers={"x-request-id": "mine-1"})
    assert answer.json()["status"] == "ok" and answer.headers["x-request-id"] == "mine-1"
    assert len(http.get("/health", headers={"x-request-id": "a\tb"}).headers["x-request-id"]) == 32
    text = http.get("/metrics").text
    for name in ("requests_total", "queue_seconds_bucket", "inference_seconds_count", "batch_items_sum", "adapters"):
        assert f"restuning_{name}" in text
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/predict", "/v1/embed", "/v1/embeddings", "/v1/models", "/v1/adapters/{name}"} <= paths.keys()
    assert http.get("/docs").status_code == 200
    assert http.get("/nowhere").json()["error"]["status"] == 404 and http.get("/v1/predict").status_code == 405


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("texts")
    backbone = f"hf:{save_model(folder / 'model')}"
    wanted: Any = {
        "mood": ("bypass", 2, "single-label"),
        "tags": ("lora", 3, "per-token"),
        "spans": ("linear", 4, "per-token"),
        "score": ("linear", 1, "regression"),
    }
    save_adapters(folder / "adapters", backbone, wanted)
    with serving(adapters=tuple(str(folder / "adapters" / name) for name in wanted)) as (url, _):
        yield url, folder / "adapters"


def test_texts(texts: tuple[str, Path], tmp_path: Path) -> None:
    """Every kind of task at once, from one text; embeddings as OpenAI's clients ask for them."""
    url, root = texts
    lines = [" ".join(WORDS[i : i + 3 + i % 4]) for i in range(9)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    with Client(url) as client:
        found = client.predict(texts=lines, top=2)
        for name in ("mood", "tags", "spans", "score"):
            for got, row in zip(found, predict([root / name], str(tmp_path / "lines.txt"), top=2), strict=True):
                assert same_answer(got[name], row), name
        assert len(found[3]["tags"]["words"]) == len(lines[3].split())
        embedded = client.embed(texts=lines[:2], tasks=["mood"])
        with pytest.raises(ServerError, match=r"images were sent, and hf:.* reads texts"):
            client.predict([picture(0)])
        with pytest.raises(ServerError, match=r"text 1: 4\d tokens"):
            client.predict(texts=[" ".join(WORDS)])
        with pytest.raises(ServerError, match="not both in one request"):
            client.predict(texts=["word1", ["word1", "word2"]], tasks=["mood"])
        assert list(client.predict(texts=[["word1", "word2"]], tasks=["mood"])[0]) == ["mood"]
    http = httpx.Client(base_url=url)
    answer = http.post("/v1/embeddings", json={"model": "mood", "input": lines[:2], "user": "x"}).json()
    assert [d["index"] for d in answer["data"]] == [0, 1] and answer["usage"]["prompt_tokens"] == 5 + 6
    assert answer["data"][1]["embedding"] == pytest.approx(embedded[1]["mood"], abs=1e-6)
    packed = http.post("/v1/embeddings", json={"model": "mood", "input": lines[0], "encoding_format": "base64"}).json()
    numbers = torch.frombuffer(bytearray(base64.b64decode(packed["data"][0]["embedding"])), dtype=torch.float32)
    assert numbers.tolist() == pytest.approx(embedded[0]["mood"], abs=1e-6)
    assert http.post("/v1/embeddings", json={"model": "tags", "input": "word1"}).status_code == 422
    assert http.post("/v1/embeddings", json={"model": "nobody", "input": "word1"}).status_code == 404


def test_the_clients(everything: tuple[str, Server], root: Path, tmp_path: Path, capsys: Any) -> None:
    url, _ = everything
    images = [picture(i) for i in range(4)]

    async def ask() -> list[Any]:
        async with AsyncClient(url) as client:
            assert (await client.models())[0]["id"] == MICRO
            assert len((await client.embed(images[:1], tasks=["linear"]))[0]["linear"]) == 128
            return await asyncio.gather(*(client.predict([image], tasks=["linear"]) for image in images))

    with Client(url) as client:
        assert [a[0]["linear"]["top"][0]["class"] for a in asyncio.run(ask())] == [
            a["linear"]["top"][0]["class"] for a in client.predict(images, tasks=["linear"])
        ]
        with pytest.raises(ServerError, match="no task named 'nobody'"):
            client.predict(images, tasks=["nobody"])
    with pytest.raises(ServerError, match="no answer from"), Client("http://127.0.0.1:9", retries=0) as client:
        client.models()
    (tmp_path / "one.png").write_bytes(images[0])
    capsys.readouterr()
    assert main(["predict", "linear", "lora", str(tmp_path / "one.png"), "--server", url, "--top", "2", "--json"]) == 0
    served = json.loads(capsys.readouterr().out)
    here = predict([root / "linear", root / "lora"], str(tmp_path / "one.png"), top=2)
    assert [row["adapter"] for row in served] == ["linear", "lora"]
    assert all(same_answer(a, b) for a, b in zip(served, here, strict=True))
    assert main(["predict", str(tmp_path / "one.png"), "--server", url, "--device", "cpu"]) == 2


# ---- changes


def test_changes_under_load_change_no_other_answer(few: tuple[str, Server], root: Path) -> None:
    """Adapters come and go 40 times while four clients ask: no bit of another task's logits changes."""
    url, server = few
    stop, wrong, asked = threading.Event(), [0] * 4, [0] * 4
    with Client(url) as client:
        expected = {n: client.predict([picture(n)], logits=True, tasks=FEW) for n in range(4)}

        def ask(n: int) -> None:
            with Client(url) as own:
                while not stop.is_set():
                    wrong[n] += own.predict([picture(n)], logits=True, tasks=FEW) != expected[n]
                    asked[n] += 1

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for i in range(40):
            client.add(f"new{i % 3}", ("bypass", "lora", "linear", "lst")[i % 4])
            assert f"new{i % 3}" in {m["id"] for m in client.models()}
            client.remove(f"new{i % 3}")
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == [0] * 4 and min(asked) > 0
        assert set(server.adapters.current.readings) == set(FEW)


def test_what_a_change_may_not_be(few: tuple[str, Server], root: Path, tmp_path: Path) -> None:
    url, server = few
    (tmp_path / "outside").mkdir()
    shutil.copytree(root / "linear", tmp_path / "outside" / "linear")
    link = root / "link"
    link.symlink_to(tmp_path / "outside" / "linear")
    damaged = shutil.copytree(root / "linear", root / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"not tensors")
    pipe = shutil.copytree(root / "linear", root / "pipe")
    (pipe / "adapter_model.safetensors").unlink()
    os.mkfifo(pipe / "adapter_model.safetensors")
    full = rt.adapt(
        rt.load_backbone(MICRO),
        "full",
        3,
        preprocessing=json.loads((root / "linear" / "adapter_config.json").read_text())["preprocessing"],
        backbone_name=MICRO,
    )
    full.save_pretrained(root / "whole")
    tricks = [
        "..",
        "../outside/linear",
        str(tmp_path / "outside" / "linear"),
        "link",
        "damaged",
        "pipe",
        "whole",
        "",
        ".",
        "nowhere",
        "linear/..",
        "linear\0",
        "x" * 999,
        "/etc",
        "linear/adapter_config.json",
    ]
    http = httpx.Client(base_url=url)
    try:
        for path in tricks:
            answer = http.post("/v1/adapters/new", json={"path": path})
            assert answer.status_code == 422 and answer.json()["error"]["reason"], path
            assert str(tmp_path) not in answer.text.replace(path, "")
        for name in ("a.b", "%2e%2e", "x" * 65, "é", "a%00b", "a b", "-x"):
            assert http.post(f"/v1/adapters/{name}", json={"path": "linear"}).status_code in (404, 422), name
        for body in ({}, {"path": "linear", "hub": "a/b"}, {"path": 3}, {"path": "linear", "more": 1}):
            assert http.post("/v1/adapters/new", json=body).status_code == 422
        assert http.post("/v1/adapters/new", json={"hub": "a/b", "revision": "main"}).status_code == 403
        assert http.delete("/v1/adapters/nobody").status_code == 404
        assert set(server.adapters.current.readings) == set(FEW)
    finally:
        link.unlink()
        for folder in (damaged, pipe, root / "whole"):
            shutil.rmtree(folder)


def test_changes_are_off_unless_allowed_and_a_key_is_asked_for(root: Path) -> None:
    with serving(adapters=(str(root / "linear"),), api_key="secret key") as (url, _):
        http = httpx.Client(base_url=url)
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer " + "x" * 20_000},
            {"authorization": "secret key"},
            {"x-api-key": "SECRET KEY"},
            {"authorization": "Bearer \u00e9"},
        ):
            for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
                raw = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
                assert http.get(path, headers=raw).status_code == 401
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        for headers in ({"authorization": "Bearer secret key"}, {"x-api-key": "secret key"}):
            assert http.get("/v1/models", headers=headers).status_code == 200
            assert http.post("/v1/adapters/new", json={"path": "lora"}, headers=headers).status_code == 403
            assert http.delete("/v1/adapters/linear", headers=headers).status_code == 403
        with Client(url, "secret key") as client:
            assert client.predict([picture(0)])[0]["linear"]["top"]


def test_a_folder_is_watched(root: Path, tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    shutil.copytree(root / "linear", watched / "first")
    with serving(root=watched, watch=True, watch_seconds=0.05) as (url, _), Client(url) as client:

        def until(names: set[str]) -> None:
            end = time.monotonic() + 20
            while {m["id"] for m in client.models()[1:]} != names:
                assert time.monotonic() < end, client.models()
                time.sleep(0.05)

        until({"first"})
        shutil.copytree(root / "bypass", tmp_path / "bypass")
        (tmp_path / "bypass").rename(watched / "second")
        shutil.copytree(root / "linear", watched / "broken")
        (watched / "broken" / "adapter_model.safetensors").write_bytes(b"half a fi")
        until({"first", "second"})
        before = client.predict([picture(0)], tasks=["first"], logits=True)
        shutil.copytree(root / "lora", tmp_path / "lora")
        shutil.rmtree(watched / "first")
        until({"second"})
        (tmp_path / "lora").rename(watched / "first")
        until({"first", "second"})
        assert client.predict([picture(0)], tasks=["first"], logits=True) != before


# ---- operations


def test_a_full_queue_and_clients_that_leave(root: Path) -> None:
    with serving(adapters=(str(root / "linear"),), max_queue=3, max_items=3, max_batch=1) as (url, server):
        hold = threading.Event()
        answer, server.batcher._answer = server.batcher._answer, lambda jobs: (hold.wait(20), answer(jobs))[1]  # type: ignore[method-assign]
        with ThreadPoolExecutor(8) as pool, Client(url, retries=0) as client, Client(url, retries=9) as patient:
            calls = [pool.submit(client.predict, [picture(0)])]
            while server.batcher._items or not server.metrics.queue_seconds._sum.get():
                time.sleep(0.01)  # the first is with the model
            calls += [pool.submit(client.predict, [picture(0)]) for _ in range(3)]
            while server.batcher._items < 3:
                time.sleep(0.01)
            http = httpx.Client(base_url=url)
            refused = http.post("/v1/predict", content=picture(0), headers={"content-type": "image/png"})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["reason"] == "the queue is full: 3 items wait"
            late = pool.submit(patient.predict, [picture(0)])
            hold.set()
            assert all(call.result()[0]["linear"] == calls[0].result()[0]["linear"] for call in (*calls, late))
            hold.clear()
            calls = [pool.submit(client.predict, [picture(0)])]
            while not server.batcher._items and server.metrics.queue_seconds._sum.get() is None:
                time.sleep(0.01)
            body = json.dumps({"images": [base64.b64encode(picture(0)).decode()] * 2}).encode()
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as leaving:
                head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                leaving.sendall(b"POST /v1/predict HTTP/1.1\r\n" + head.encode() + body)
                while server.batcher._items < 2:
                    time.sleep(0.01)
            while server.batcher._items >= 2:  # its place is free
                time.sleep(0.01)
            hold.set()
            assert calls[0].result() and server.metrics.left._value.get() == 1


def start(*argv: str | Path) -> tuple[subprocess.Popen[str], str]:
    """`restuning serve` in a process of its own, and its address."""
    command = [
        sys.executable,
        "-m",
        "restuning.cli",
        "serve",
        *map(str, argv),
        "--port",
        "0",
        "--threads",
        "1",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    with Client(url) as client:
        while not client.ready():
            time.sleep(0.05)
    return process, url


def test_what_was_accepted_is_answered_before_the_end(root: Path) -> None:
    """SIGTERM under load: the answers of all requests in flight, one line of JSON in the log for each, exit code 0."""
    process, url = start(root / "bypass", root / "lora")
    images = [picture(i) for i in range(16)]

    async def ask() -> list[Any]:
        async with AsyncClient(url, retries=0, timeout=60) as client:
            await client.predict(images[:1])
            calls = [asyncio.create_task(client.predict(images)) for _ in range(6)]
            async with httpx.AsyncClient(base_url=url) as http:
                while "restuning_queue_seconds_count 1.0" in (await http.get("/metrics")).text:
                    await asyncio.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*calls)

    answers = asyncio.run(ask())
    end = time.monotonic()
    _, log = process.communicate(timeout=20)
    assert len(answers) == 6 and all(len(a) == 16 for a in answers) and process.returncode == 0
    assert time.monotonic() - end < 15
    lines = [json.loads(line) for line in log.splitlines()]
    posts = [line for line in lines if line.get("path") == "/v1/predict"]
    assert len(posts) == 7 and {line["status"] for line in posts} == {200} and len({line["id"] for line in posts}) == 7


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ([], "nothing to serve"),
        (["nowhere"], "no saved adapter"),
        (["linear", "linear"], "two adapters are named 'linear'"),
        (["a.b=linear"], "an adapter cannot be named 'a.b'"),
        (["linear", "--max-batch", "0"], "max-batch 0"),
        (["linear", "--watch"], "give --adapters FOLDER"),
        (["linear", "--adapters", "nowhere"], "no such folder"),
        (["linear", "--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["linear", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    ],
)
def test_settings_that_cannot_be(argv: list[str], why: str, root: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(root)
    assert main(["serve", *argv, "--port", "0"]) == 2
    err = capsys.readouterr().err.strip()
    assert why in err and "\n" not in err


# ---- malformed requests


def malformed(count: int, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests that each are wrong in one way or several: (path, what httpx sends)."""
    rng, image = random.Random(0), picture(0)
    good = base64.b64encode(image).decode()
    bomb = BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    wrong: list[Any] = [
        None,
        True,
        3,
        -1,
        0,
        1e99,
        "",
        "x",
        [],
        {},
        [[]],
        [None],
        [3],
        ["\ud800"],
        "http://x/y.png",
        [""],
    ]
    images = [
        b"",
        b"\x89PNG\r\n\x1a\n",
        image[: len(image) // 2],
        bomb.getvalue(),
        svg,
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"GIF89a" + bytes(20),
        b"BM" + bytes(60),
        b"II*\0" + bytes(60),
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        bytes(999),
    ]
    for i in range(count):
        path = ("/v1/predict", "/v1/embed")[i % 2]
        kind = i % 10
        if kind == 0:
            yield path, {"json": {"images": rng.choice(wrong)}}
        elif kind == 1:
            yield (
                path,
                {
                    "json": {
                        "images": [good],
                        rng.choice(["tasks", "top", "logits", "url", "x" * 500]): rng.choice(wrong[4:]),
                    }
                },
            )
        elif kind == 2:
            yield path, {"content": rng.randbytes(rng.randrange(400)), "headers": {"content-type": "application/json"}}
        elif kind == 3:
            text = ("[" * 5000, '{"a":' * 3000, '{"images": NaN}', '{"top": 1' + "0" * 6000 + "}", '"\\ud800"', "nul")[
                i // 10 % 6
            ]
            yield path, {"content": text.encode(), "headers": {"content-type": "application/json"}}
        elif kind == 4:
            yield path, {"content": images[i // 10 % len(images)], "headers": {"content-type": "image/png"}}
        elif kind == 5:
            cut = bytearray(image)
            for _ in range(1 + i % 9):
                cut[rng.randrange(30)] ^= 1 << rng.randrange(8)
            yield path, {"content": bytes(cut), "headers": {"content-type": "image/png"}}
        elif kind == 6:
            body = rng.choice(
                [b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="image"', rng.randbytes(300), b""]
            )
            boundary = rng.choice(["; boundary=x", "", "; boundary=", "; boundary=" + "y" * 300])
            yield path, {"content": body, "headers": {"content-type": f"multipart/form-data{boundary}"}}
        elif kind == 7:
            yield path, {"files": {rng.choice(["file", "text", "tasks"]): image}}
        elif kind == 8:
            query = rng.choice(
                ["tasks=nobody", "top=0", "top=x", "logits=3", "url=http://x", "tasks=", "top=" + "9" * 5000]
            )
            yield f"{path}?{query}", {"content": image, "headers": {"content-type": "image/png"}}
        else:
            yield (
                path,
                rng.choice(
                    [
                        {"content": bytes(limit + 1), "headers": {"content-type": "image/png"}},
                        {"content": image, "headers": {"content-type": "text/html"}},
                        {"json": {"texts": ["words"]}},
                        {"json": {"images": [good] * 65}},
                        {"json": {"texts": ["a"], "images": [good]}},
                    ]
                ),
            )


def test_malformed_requests_are_refused(few: tuple[str, Server]) -> None:
    """Each with a 4xx and one line of JSON; the server goes on as before."""
    url, server = few
    with Client(url) as client:
        before = client.predict([picture(3)], logits=True)
        http, counts = httpx.Client(base_url=url, timeout=30), dict[int, int]()
        for path, request in malformed(500, server.settings.max_body):
            if "json" in request:  # httpx would refuse half of a surrogate pair itself
                body, kind = json.dumps(request["json"]).encode(), {"content-type": "application/json"}
                request = {"content": body, "headers": kind}
            answer = http.post(path, **request)
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            if answer.status_code == 200:  # a flipped bit may leave an image
                assert request.get("headers", {}).get("content-type") == "image/png"
                continue
            assert 400 <= answer.status_code < 500, (path, str(request)[:200], answer.text)
            error = answer.json()["error"]
            assert error["reason"] and "\n" not in error["reason"] and error["request_id"]
        assert counts.keys() >= {400, 404, 413, 415, 422} and counts.get(200, 0) < 30, counts
        assert client.predict([picture(3)], logits=True) == before


def test_a_body_is_refused_before_it_is_read_on(few: tuple[str, Server]) -> None:
    url, server = few
    port = int(url.rsplit(":", 1)[1])
    for head in (f"Content-Length: {10**12}", "Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
            link.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n{head}\r\n\r\n".encode())
            if "chunked" in head:
                chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
                for _ in range(server.settings.max_body // 0x8000 + 1):
                    link.sendall(chunk)
            assert b" 413 " in link.recv(100)


def test_a_head_without_end_is_refused(few: tuple[str, Server]) -> None:
    """In headers, in one header, in the line."""
    port = int(few[0].rsplit(":", 1)[1])
    for start, part in (
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"x-a: b\r\n" * 1000),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nx-a: ", b"b" * 8000),
        (b"GET /", b"b" * 8000),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
            try:
                link.sendall(start)
                for _ in range(40):
                    link.sendall(part)
                assert b" 400 " in link.recv(100)
            except (ConnectionResetError, BrokenPipeError):  # it had been answered before all was sent
                continue
    assert httpx.get(f"{few[0]}/health").status_code == 200


def test_a_decoder_that_takes_too_long_is_replaced() -> None:
    from restuning.data import Preprocess
    from restuning.errors import DataError
    from restuning.serving.decoding import Decoders

    how = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3)
    decoders = Decoders(1, 0.15, ("JPEG", "PNG", "BMP"), 50.0)
    try:
        while True:  # the first process starts slowly
            try:
                assert decoders.pixels(picture(0), how).shape == (3, 8, 8)
                break
            except DataError:
                continue
        slow = picture(0, (5000, 5000), "BMP")
        with pytest.raises(DataError, match="to decode"):
            decoders.seconds = 0.001
            decoders.pixels(slow, how)
        decoders.seconds = 20
        assert decoders.pixels(picture(0), how).shape == (3, 8, 8)
        process, pipe = decoders._idle.get()
        process.kill()
        process.join()
        decoders._idle.put((process, pipe))
        with pytest.raises(DataError, match="ends its decoder"):
            decoders.pixels(picture(0), how)
        assert decoders.pixels(picture(0), how).shape == (3, 8, 8)
        with pytest.raises(DataError, match="cannot be read as an image"):
            decoders.pixels(picture(0, kind="ICO", sizes=[(16, 16)]), how)
    finally:
        decoders.close()


def test_what_is_deployed_is_what_there_is(tmp_path: Path) -> None:
    """The image's command is one that the command line takes; compose and Prometheus are read as what they are."""
    import yaml

    root = Path(__file__).parent.parent / "docker"
    lines = dict(
        line.split(" ", 1) for line in (root / "Dockerfile").read_text().splitlines() if line[:3] in ("ENT", "CMD")
    )
    command = [*json.loads(lines["ENTRYPOINT"]), *json.loads(lines["CMD"])]
    given = [str(tmp_path) if word == "/adapters" else word for word in command[1:]]
    settings = filled(ServeSettings, parse(given))
    assert settings.watch and settings.host == "0.0.0.0" and settings.backbone == MICRO
    compose, prometheus = (yaml.safe_load((root / name).read_text()) for name in ("compose.yaml", "prometheus.yaml"))
    assert (root.parent / compose["services"]["restuning"]["build"]["dockerfile"]).is_file()
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["restuning:8000"]
    assert compose["services"]["restuning"]["ports"] == ["127.0.0.1:8000:8000"], "loopback, unless one says so"
