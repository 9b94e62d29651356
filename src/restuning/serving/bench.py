"""`restuning bench serve`: the server under load, beside a bare batched forward and a plain endpoint of one model a
task; `restuning bench threads`: a predictor asked by 8 threads while adapters come and go."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.backbones.load import load_backbone, reading_of
from restuning.bench.bench import records_of
from restuning.bench.settings import Bench, Measured
from restuning.data import Preprocess
from restuning.errors import RestuningError
from restuning.model.predictor import Predictor
from restuning.model.tuned import Tuned
from restuning.utils.figures import Record

SECONDS = 4.0
"""Of load, for each measurement of a round."""

THREADS, ANSWERS = 8, 10_000
SERVING = ("serve", "threads")
KINDS = ("bypass", "linear", "lora", "ssf")

WANTED = {
    ("1 task", "forward", "images_per_second"): ">= 0.9",
    ("100 tasks", "forward", "images_per_second"): ">= 0.8",
    ("19 tasks, one each", "1 task", "images_per_second"): ">= 0.9",
    ("19 tasks", "19 models, plain", "images_per_second"): ">= 10",
}


def bench_serving(what: str, **given: Any) -> list[Record]:
    """Run `serve` or `threads`; a record for every name. batch: items of a forward, and requests at once.

    Raises RestuningError for a setting that cannot be, and where a server does not start.
    """
    settings = Bench(**{"backbone": "restuning-micro", "batch": 32, "rounds": 3, "classes": 10, "tasks": 100, **given})
    if given.get("backbone", "restuning-micro") == "restuning-micro" and "weights" not in given:
        settings = Bench(**{**vars(settings), "weights": "pretrained"})
    facts = {**settings.facts(("tasks",)), **({"seconds": SECONDS} if what == "serve" else {"answers": ANSWERS})}
    return records_of(what, (_serve if what == "serve" else _threads)(settings), facts, WANTED)


def _backbone(settings: Bench) -> Any:
    weights = None if settings.weights == "pretrained" else settings.weights
    torch.manual_seed(0)
    return load_backbone(settings.backbone, weights, settings.image_size)


def _serve(settings: Bench) -> Measured:
    """All on loopback, the driver in this process; servers compute with as many threads as this one does."""
    backbone = _backbone(settings).to(settings.device)
    how = reading_of(backbone, settings.image_size)
    if not isinstance(how, Preprocess):
        raise RestuningError(f"{settings.backbone} reads texts: this benchmark is of images")
    x = torch.randn(settings.batch, 3, *how.size, device=settings.device)
    counts = sorted({t for t in (1, 19, 100) if t < settings.tasks} | {settings.tasks})
    picture, measured = _picture(), Measured()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        _save(backbone, weights)
        tuned = Tuned(backbone, backbone_name=settings.backbone)
        for i in range(settings.tasks):
            tuned.add_adapter(f"t{i}", "bypass", settings.classes, preprocessing=how.to_dict())
            tuned.save_pretrained(Path(folder) / "adapters" / f"t{i}", f"t{i}")
            tuned.delete_adapter(f"t{i}")
        size = () if settings.image_size is None else ("--image-size", str(settings.image_size))
        ours = _start(
            *("restuning.cli", "serve", "--adapters", f"{folder}/adapters", "--watch", "--backbone", settings.backbone),
            *("--weights", str(weights), *size, "--threads", str(torch.get_num_threads()), "--device", settings.device),
            *("--max-batch", str(settings.batch), "--port", "0", "--json"),
        )
        plain = _start("restuning.serving.plain", settings.backbone, str(weights), str(settings.classes), *size[1:])
        try:
            _until(ours, settings.tasks)
            loads: dict[str, tuple[Any, list[str], str]] = {}
            for t in counts:
                names = ",".join(f"t{i}" for i in range(t))
                loads[f"{t} tasks" if t > 1 else "1 task"] = ours, [f"/v1/predict?tasks={names}"], "tasks"
                loads[f"{t} models, plain" if t > 1 else "1 model, plain"] = plain, [f"/predict?models={t}"], "models"
            mixed = min(19, settings.tasks)
            each = [f"/v1/predict?tasks=t{i}" for i in range(mixed)]
            loads[f"{mixed} tasks, one each"] = ours, each, "tasks"
            for i in range(settings.rounds + 1):
                start, done = time.perf_counter(), 0
                with torch.inference_mode():
                    while (took := time.perf_counter() - start) < SECONDS / 2:
                        backbone(x)
                        done += settings.batch
                found = {"forward": {"images_per_second": done / took}}
                for name, (server, paths, _) in loads.items():
                    times, wall = asyncio.run(_load(server[1], paths, picture, settings.batch, SECONDS))
                    cut = statistics.quantiles(times, n=100) if len(times) > 1 else times * 99
                    found[name] = {"images_per_second": len(times) / wall}
                    found[name] |= {f"p{p}_seconds": cut[p - 1] for p in (50, 95, 99)}
                for name, units in found.items() if i else ():  # the first round is a warm-up
                    for unit, value in units.items():
                        measured.samples.setdefault(name, {}).setdefault(unit, []).append(value)
        finally:
            for process, _ in (ours, plain):
                process.terminate()
                process.wait(30)
    measured.against("forward", "images_per_second")
    for t in counts:
        pair = (f"{t} tasks", f"{t} models, plain") if t > 1 else ("1 task", "1 model, plain")
        measured.pairs.append((*pair, "images_per_second"))
    measured.pairs.append((f"{mixed} tasks, one each", "1 task", "images_per_second"))
    return measured


async def _load(
    port: int, paths: Sequence[str], picture: bytes, clients: int, seconds: float
) -> tuple[list[float], float]:
    """Seconds of every request, of so many clients each with one request at a time, and of all."""
    about = f"Host: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
    heads = [f"POST {path} HTTP/1.1\r\n{about}".encode() for path in paths]
    times: list[float] = []
    begin = time.perf_counter()

    async def client(n: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) - begin < seconds:
            writer.write(heads[n % len(heads)] + picture)
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


def _start(module: str, *argv: str) -> tuple[subprocess.Popen[str], int]:
    """A server in a process of its own, and its port, which it prints as JSON."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, "-m", module, *argv], env={**os.environ, **threads}, **options)
    assert process.stdout is not None
    first = process.stdout.readline()
    if not first.startswith("{"):
        process.kill()
        raise RestuningError(f"{module} does not start")
    return process, int(json.loads(first)["url"].rsplit(":", 1)[1])


def _until(server: tuple[Any, int], tasks: int) -> None:
    """Wait until it serves so many."""
    from restuning.serving import Client

    with Client(f"http://127.0.0.1:{server[1]}") as client:
        while not client.ready() or len(client.models()) <= tasks:
            if server[0].poll() is not None:
                raise RestuningError("the server has ended")
            time.sleep(0.1)


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
