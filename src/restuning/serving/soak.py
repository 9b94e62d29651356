"""`restuning bench soak`: a server under what clients do to it, for as long as one likes: nothing is lost, no answer
changes, its memory stays."""

import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from restuning.backbones.load import load_backbone, reading_of
from restuning.bench.settings import Bench, Measured
from restuning.errors import MissingExtra, RestuningError
from restuning.model.tuned import Tuned
from restuning.serving.client import AsyncClient, ServerError

STAY = ("bypass", "linear", "lora", "ssf")
COME = ("bypass", "linear", "lora")
CHANGES = 220
"""Over the whole time."""

DRAIN = 8
"""Requests that are under way when the server is told to end."""


def soak(settings: Bench, picture: bytes) -> Measured:
    """Clients that ask, that send nonsense, that are slow, that leave, and one by which adapters come and go; then
    SIGTERM. Batches of one, so that answers can be compared to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        torch.manual_seed(0)
        weights = None if settings.weights == "pretrained" else settings.weights
        backbone = load_backbone(settings.backbone, weights, settings.image_size)
        tuned, how = Tuned(backbone, backbone_name=settings.backbone), reading_of(backbone, settings.image_size)
        for name, method in [*zip(STAY, STAY, strict=True), *((f"new-{one}", one) for one in COME)]:
            tuned.add_adapter(name, method, settings.classes, preprocessing=how.to_dict())
            with torch.no_grad():  # away from initialisation
                for p in tuned.adapters[name].parameters():
                    p.add_(0.05 * torch.randn_like(p))
            tuned.save_pretrained(root / name, name)
        command = [sys.executable, "-m", "restuning.cli", "serve", *(str(root / name) for name in STAY), "--json"]
        command += ["--adapters", folder, "--allow-changes", "--max-batch", "1", "--threads", "1", "--port", "0"]
        command += [] if weights is None else ["--weights", weights]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            if not first.startswith("{"):
                raise RestuningError("the server does not start")
            found = asyncio.run(_Soak(process, json.loads(first)["url"], picture, settings.minutes * 60).run())
        finally:
            process.kill()
            process.wait()
    return Measured({"soak": {name: [value] for name, value in found.items()}})


class _Soak:
    def __init__(self, process: "subprocess.Popen[str]", url: str, picture: bytes, seconds: float) -> None:
        self.process, self.url, self.picture, self.seconds = process, url, picture, seconds
        self.port = int(url.rsplit(":", 1)[1])
        self.counts = dict.fromkeys(("requests", "changed_answers", "lost", "malformed", "slow", "left", "changes"), 0)
        self.rng = random.Random(0)
        self.memory: list[tuple[float, float]] = []

    async def run(self) -> dict[str, float]:
        async with AsyncClient(self.url, timeout=60, retries=3) as client:
            while True:
                with suppress(ServerError):
                    self.expected = await client.predict([self.picture], tasks=STAY, logits=True)
                    break
                await asyncio.sleep(0.1)
            clients: Sequence[tuple[Callable[[AsyncClient], Awaitable[None]], float]] = (
                (self._ask, 0.3),
                (self._malformed, 0.3),
                (self._slow, 2.0),
                (self._leave, 1.0),
                (self._change, self.seconds / CHANGES),
                (self._weigh, max(1.0, self.seconds / 200)),
            )
            self.end = time.monotonic() + self.seconds
            await asyncio.gather(*(self._again(call, client, every) for call, every in clients))
            drained = await self._drain(client)
        half = self.memory[len(self.memory) // 2 :]
        slope = statistics.linear_regression(*zip(*half, strict=True)).slope if len(half) > 1 else 0.0
        weights = [size for _, size in self.memory]
        return {
            **{name: float(count) for name, count in self.counts.items()},
            "first_bytes": weights[0],
            "last_bytes": weights[-1],
            "slope_an_hour_bytes": 3600 * slope,
            "drain_seconds": drained,
        }

    async def _again(self, call: Callable[[AsyncClient], Awaitable[None]], client: AsyncClient, every: float) -> None:
        while (now := time.monotonic()) < self.end:
            try:
                await call(client)
            except (ServerError, OSError, asyncio.IncompleteReadError) as error:
                self.counts["lost"] += 1
                print(f"{call.__name__}: {error}", file=sys.stderr)
            await asyncio.sleep(max(0.0, min(now + every, self.end) - time.monotonic()))

    async def _ask(self, client: AsyncClient) -> None:
        found = await client.predict([self.picture], tasks=STAY, logits=True)
        self.counts["requests"] += 1
        self.counts["changed_answers"] += found != self.expected

    async def _malformed(self, client: AsyncClient) -> None:
        """Refused with a 4xx, or lost."""
        self.counts["malformed"] += 1
        cut, noise = self.picture[: self.rng.randrange(len(self.picture) // 2)], self.rng.randbytes(300)
        try:
            if self.rng.random() < 0.5:
                await client.predict([self.rng.choice([cut, noise, b""])])
            else:
                await client.predict([self.picture], tasks=[self.rng.choice(["nobody", "", "../etc", "x" * 5000])])
        except ServerError as error:
            if not 400 <= error.status < 500:
                raise
        else:
            raise ServerError(200, "a malformed request was answered")

    async def _slow(self, client: AsyncClient) -> None:
        """The head, then half of the picture, then the rest."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        half = len(self.picture) // 2
        for part in (self._head(), self.picture[:half], self.picture[half:]):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(min(1.0, self.seconds / 10))
        answer = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        self.counts["slow"] += 1
        if b" 200 " not in answer[:20]:
            raise ServerError(0, f"a slow client was told {answer[:20]!r}")

    async def _leave(self, client: AsyncClient) -> None:
        """With half of a request sent, or all of it."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(self._head() + self.picture[: self.rng.choice([len(self.picture) // 2, len(self.picture)])])
        await writer.drain()
        writer.close()
        self.counts["left"] += 1

    async def _change(self, client: AsyncClient) -> None:
        n = self.counts["changes"]
        name = f"new-{COME[n // 2 % len(COME)]}"
        if n % 2 == 0:
            await client.add(name, name)
        else:
            await client.remove(name)
        self.counts["changes"] += 1

    async def _weigh(self, client: AsyncClient) -> None:
        self.memory.append((time.monotonic(), _resident(self.process.pid)))

    def _head(self) -> bytes:
        about = f"Host: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(self.picture)}\r\n\r\n"
        return f"POST /v1/predict?tasks=linear HTTP/1.1\r\n{about}".encode()

    async def _drain(self, client: AsyncClient) -> float:
        """Seconds from the last answer to the end of the server."""
        calls = [asyncio.create_task(client.predict([self.picture], tasks=STAY, logits=True)) for _ in range(DRAIN)]
        await asyncio.sleep(0.2)
        self.process.send_signal(signal.SIGTERM)
        for found in await asyncio.gather(*calls, return_exceptions=True):
            self.counts["lost"] += isinstance(found, BaseException)
        start = time.monotonic()
        await asyncio.get_running_loop().run_in_executor(None, self.process.wait, 60)
        return time.monotonic() - start


def _resident(pid: int) -> float:
    """Bytes of a process and of those that it has started."""
    try:
        import psutil
    except ImportError as error:
        raise MissingExtra("psutil", "bench") from error
    total, top = 0.0, psutil.Process(pid)
    for one in (top, *top.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total
