"""`restuning bench serve`: the server under load, beside a bare batched forward, a plain endpoint of one model a task,
and LitServe with PEFT's adapters. `restuning bench threads`: a predictor asked by 8 threads while adapters come and go.
"""

import asyncio
import base64
import ctypes
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.backbones.load import load_backbone, reading_of
from restuning.bench.bench import records_of
from restuning.bench.settings import Bench, Measured
from restuning.data import Preprocess
from restuning.errors import RestuningError, line
from restuning.model.predictor import Predictor
from restuning.model.tuned import Tuned
from restuning.serving.client import Client
from restuning.serving.soak import soak
from restuning.utils.figures import Record

_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None

SECONDS = 4.0
"""Of load, for each measurement of a round."""

THREADS, ANSWERS = 8, 10_000
SERVING = ("serve", "threads", "soak")
KINDS = ("bypass", "linear", "lora", "ssf")

WANTED = {
    ("1 task", "forward", "images_per_second"): ">= 0.9",
    ("100 tasks", "forward", "images_per_second"): ">= 0.8",
    ("19 tasks, one each", "1 task", "images_per_second"): ">= 0.9",
    ("19 tasks", "19 tasks, LitServe and PEFT", "images_per_second"): ">= 10",
}


def bench_serving(what: str, **given: Any) -> list[Record]:
    """Run `serve`, `threads` or `soak`; a record for every name. batch: items of a forward, and requests at once.

    Raises RestuningError for a setting that cannot be, and where a server does not start.
    """
    settings = Bench(**{"backbone": "restuning-micro", "batch": 32, "rounds": 3, "classes": 10, "tasks": 1000, **given})
    if given.get("backbone", "restuning-micro") == "restuning-micro" and "weights" not in given:
        settings = Bench(**{**vars(settings), "weights": "pretrained"})
    kinds: dict[str, tuple[Callable[[Bench], Measured], tuple[str, ...], dict[str, Any]]] = {
        "serve": (_serve, ("tasks",), {"seconds": SECONDS}),
        "threads": (_threads, (), {"answers": ANSWERS}),
        "soak": (lambda settings: soak(settings, _picture()), ("minutes",), {}),
    }
    run, own, more = kinds[what]
    return records_of(what, run(settings), {**settings.facts(own), **more}, WANTED)


def _backbone(settings: Bench) -> Any:
    weights = None if settings.weights == "pretrained" else settings.weights
    torch.manual_seed(0)
    return load_backbone(settings.backbone, weights, settings.image_size)


def _serve(settings: Bench) -> Measured:
    """All on loopback, the driver in this process; servers compute with as many threads as this one does. There are
    twice as many clients as a batch has items: one batch is read while another is answered."""
    backbone = _backbone(settings).to(settings.device)
    how = reading_of(backbone, settings.image_size)
    if not isinstance(how, Preprocess):
        raise RestuningError(f"{settings.backbone} reads texts: this benchmark is of images")
    x = torch.randn(settings.batch, 3, *how.size, device=settings.device)
    counts = sorted({t for t in (1, 19, 100) if t < settings.tasks} | {settings.tasks})
    mixed, picture, measured = min(19, settings.tasks), _picture(), Measured()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        weights = Path(folder) / "weights.safetensors"
        _save(backbone, weights)
        tuned = Tuned(backbone, backbone_name=settings.backbone)
        for i in range(settings.tasks):
            tuned.add_adapter(f"t{i}", "bypass", settings.classes, preprocessing=how.to_dict())
            tuned.save_pretrained(Path(folder) / "adapters" / f"t{i}", f"t{i}")
            tuned.delete_adapter(f"t{i}")
        size = () if settings.image_size is None else (str(settings.image_size),)
        of_backbone = (settings.backbone, str(weights), str(settings.classes))

        def start(ready: str, module: str, *argv: str) -> int:
            return stack.enter_context(_server(free_port(), ready, module, *argv))

        ours = start(
            *("/ready", "restuning.cli", "serve", "--port", "PORT", "--adapters", f"{folder}/adapters", "--watch"),
            *("--backbone", settings.backbone, "--weights", str(weights), *(("--image-size", *size) if size else ())),
            *("--threads", str(torch.get_num_threads()), "--device", settings.device),
            *("--max-batch", str(settings.batch)),
        )
        plain = start("/openapi.json", "restuning.serving.plain", "PORT", *of_backbone, *size)
        loads: dict[str, tuple[int, list[bytes]]] = {}
        for t in counts:
            names = ",".join(f"t{i}" for i in range(t))
            loads[_tasks(t)] = ours, [_image(f"/v1/predict?tasks={names}", picture)]
        each = [_image(f"/v1/predict?tasks=t{i}", picture) for i in range(mixed)]
        loads[f"{mixed} tasks, one each"] = ours, each
        for t in sorted({1, mixed}):
            loads[_plain(t)] = plain, [_image(f"/predict?models={t}", picture)]
        peer = f"{_tasks(mixed)}, LitServe and PEFT"
        try:
            import litserve  # noqa: F401
            import peft  # noqa: F401

            lit = start("/health", "restuning.serving.lit", "PORT", *of_backbone, str(mixed), *size)
            loads[peer] = lit, [_json("/predict", picture, [f"t{i}" for i in range(mixed)])]
        except ImportError as error:
            measured.absent[peer] = line(error)
        with Client(f"http://127.0.0.1:{ours}") as client:
            while len(client.models()) <= settings.tasks:
                time.sleep(0.1)
        for i in range(settings.rounds + 1):
            start_, done = time.perf_counter(), 0
            with torch.inference_mode():
                while (took := time.perf_counter() - start_) < SECONDS / 2:
                    backbone(x)
                    done += settings.batch
            found = {"forward": {"images_per_second": done / took}}
            for name, (port, requests) in loads.items():
                times, wall = asyncio.run(_load(port, requests, 2 * settings.batch, SECONDS))
                cut = statistics.quantiles(times, n=100) if len(times) > 1 else times * 99
                found[name] = {"images_per_second": len(times) / wall}
                found[name] |= {f"p{p}_seconds": cut[p - 1] for p in (50, 95, 99)}
            for name, units in found.items() if i else ():  # the first round is a warm-up
                for unit, value in units.items():
                    measured.samples.setdefault(name, {}).setdefault(unit, []).append(value)
    measured.against("forward", "images_per_second", [_tasks(t) for t in counts])
    pairs = [(_tasks(t), _plain(t)) for t in sorted({1, mixed})]
    pairs += [(_tasks(mixed), peer), (f"{mixed} tasks, one each", _tasks(1))]
    measured.pairs += [(a, b, "images_per_second") for a, b in pairs if b in measured.samples]
    return measured


def _tasks(count: int) -> str:
    return f"{count} tasks" if count > 1 else "1 task"


def _plain(count: int) -> str:
    return f"{count} models, plain" if count > 1 else "1 model, plain"


def _image(path: str, picture: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
    return head.encode() + picture


def _json(path: str, picture: bytes, tasks: Sequence[str]) -> bytes:
    body = json.dumps({"image": base64.b64encode(picture).decode(), "tasks": tasks})
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def _load(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of every request, of so many clients each with one request at a time, and of all."""
    times: list[float] = []
    begin = time.perf_counter()

    async def client(n: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) - begin < seconds:
            writer.write(requests[n % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(one[15:]) for one in head.lower().split(b"\r\n") if one.startswith(b"content-length:"))
            body = await reader.readexactly(length)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RestuningError(f"a server under load answered {head[9:12].decode()}: {body[:200].decode()}")
            times.append(time.perf_counter() - start)
            n += 1
        writer.close()

    await asyncio.gather(*(client(n) for n in range(clients)))
    return times, time.perf_counter() - begin


@contextmanager
def _server(port: int, ready: str, module: str, *argv: str) -> Iterator[int]:
    """A server in a session of its own, from when it is ready until the end of this process, however that comes."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *(str(port) if word == "PORT" else word for word in argv)],
        env={**os.environ, **threads},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_dies_with_its_parent,
    )
    try:
        while not _answers(port, ready):
            if process.poll() is not None:
                raise RestuningError(f"{module} does not start")
            time.sleep(0.1)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _dies_with_its_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _picture() -> bytes:
    """A JPEG of 160 × 120 pixels."""
    from PIL import Image

    pixels = torch.randint(256, (12, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).resize((160, 120)).save(file, "JPEG")
    return file.getvalue()


def _save(backbone: Any, file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous().clone() for name, t in backbone.state_dict().items()}, file)


def _threads(settings: Bench) -> Measured:
    """Answers of four kinds of adapter, of one thread and of eight, adapters added and removed meanwhile; `wrong` are
    those that are not what one thread got, to the bit."""
    backbone = _backbone(settings)
    tuned, names = Tuned(backbone, backbone_name=settings.backbone), []
    side, measured = settings.side(), Measured()
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for i in range(2):
                names.append(f"{kind}{i}")
                tuned.add_adapter(names[-1], kind, settings.classes)
                with torch.no_grad():
                    for p in tuned.adapters[names[-1]].parameters():
                        p.add_(0.05 * torch.randn_like(p))
            tuned.save_pretrained(Path(folder) / kind, names[-1])
        held = [Predictor.of(tuned.eval())]
        batches = [torch.randn(1 + i % 3, 3, side, side) for i in range(6)]

        def answer(predictor: Predictor, i: int) -> list[Tensor]:
            x, task = batches[i % 6], names[i % 8]
            if i % 2:
                return predictor.predict_rows(x, [names[(i + k) % 8] for k in range(len(x))])
            return [predictor.predict(x, [task])[task]]

        expected = [answer(held[0], i) for i in range(48)]

        def ask(n: int, count: int) -> int:
            found = [(i % 48, answer(held[0], i % 48)) for i in range(n, n + count)]
            return sum(not all(map(torch.equal, got, expected[i])) for i, got in found)

        def timed(name: str, run: Callable[[], int]) -> None:
            start = time.perf_counter()
            wrong = run()
            per_second = ANSWERS / (time.perf_counter() - start)
            measured.samples[name] = {"answers_per_second": [per_second], "wrong": [wrong]}

        def many() -> int:
            with ThreadPoolExecutor(THREADS) as pool:
                return sum(pool.map(lambda n: ask(n, ANSWERS // THREADS), range(THREADS)))

        timed("1 thread", lambda: ask(0, ANSWERS))
        timed(f"{THREADS} threads", many)
        over, changes = threading.Event(), [0]

        def change() -> None:
            while not over.is_set():
                held[0] = held[0].with_adapter("new", Path(folder) / KINDS[changes[0] % 4]).without("new")
                changes[0] += 1

        changer = threading.Thread(target=change)
        changer.start()
        timed(f"{THREADS} threads, adapters coming and going", many)
        over.set()
        changer.join()
        measured.samples[f"{THREADS} threads, adapters coming and going"]["changes"] = [changes[0]]
    measured.against("1 thread", "answers_per_second")
    return measured
