"""The model on two replicas of a local Ray: what they answer, what they hold, and that one may die."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from served import picture, same_answer, save_adapters, serving

from restuning.cli.main import main
from restuning.serving import AsyncClient, Client
from restuning.serving.client import ServerError

ADAPTERS = {name: (name, 3 + i, "single-label") for i, name in enumerate(("bypass", "linear", "lora", "ssf"))}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tmp_path_factory.mktemp("adapters"), "restuning-micro", ADAPTERS)


def test_a_replica_that_dies_loses_no_request(root: Path) -> None:
    """Two replicas that hold two adapters each, of four; one is killed under load, and another takes its place."""
    pytest.importorskip("ray.serve")
    folders = tuple(str(root / name) for name in ADAPTERS)
    images, names = [picture(i) for i in range(3)], list(ADAPTERS)
    with serving(adapters=folders) as (url, _), Client(url) as client:
        expected = [client.predict([image], top=2)[0] for image in images]
    ray = {"engine": "ray", "replicas": 2, "replica_adapters": 2}
    with serving(adapters=folders, root=root, allow_changes=True, **ray) as (url, server), Client(url) as client:
        found = client.predict(images, top=2)
        for got, want in zip(found, expected, strict=True):
            assert list(got) == names and all(same_answer(got[name], want[name]) for name in names)
        seen: dict[int, Any] = server.batcher.totals  # type: ignore[attr-defined]

        async def load() -> set[int]:
            killed, counts, over = set[int](), [0], asyncio.Event()

            async def ask(n: int) -> None:
                async with AsyncClient(url, retries=0, timeout=200) as client:
                    while not over.is_set():
                        i, some = n % 3, [names[n % 4], names[(n + 1 + n // 4) % 4]]
                        (got,) = await client.predict([images[i]], tasks=some, top=2)
                        assert all(same_answer(got[name], expected[i][name]) for name in dict.fromkeys(some))
                        counts[0], n = counts[0] + 1, n + 5

            async def kill() -> None:
                while len(seen) < 2 or counts[0] < 30:
                    await asyncio.sleep(0.02)
                while not server.metrics.retries._value.get():  # one that was idle just then loses nothing: another
                    there, before = set(seen), counts[0]
                    one = min(there - killed)
                    os.kill(one, signal.SIGKILL)
                    killed.add(one)
                    while set(seen) == there or counts[0] < before + 70:  # until one in its place has answered
                        await asyncio.sleep(0.02)
                over.set()

            await asyncio.wait_for(asyncio.gather(kill(), *(ask(n) for n in range(6))), 240)
            return killed

        killed = asyncio.run(load())
        assert killed and os.getpid() not in killed
        assert all(totals["adapters"] <= 2 for totals in seen.values()) and len(seen) == 2 + len(killed)
        # a change reaches all of them
        client.add("ssf", "bypass")
        client.remove("lora")
        for _ in range(8):
            (got,) = client.predict(images[:1], tasks=["ssf"], top=2)
            assert same_answer(got["ssf"], expected[0]["bypass"])
        with pytest.raises(ServerError, match="no task named 'lora'"):
            client.predict(images[:1], tasks=["lora"])
        with pytest.raises(ServerError, match="cannot be read as an image"):
            client.predict([b"no image"], tasks=["ssf"])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--replicas", "2"], "replicas and autoscale are of --engine ray"),
        (["--engine", "ray", "--replicas", "0"], "replicas 0"),
        (["--engine", "ray", "--autoscale", "most=3"], "autoscale 'most=3'"),
        (["--engine", "ray", "--replicas", "3", "--autoscale", "max_replicas=2"], "max_replicas"),
    ],
)
def test_settings_that_cannot_be(more: list[str], why: str, root: Path, capsys: Any) -> None:
    start = time.monotonic()
    assert main(["serve", str(root / "linear"), "--port", "0", *more]) == 2
    err = capsys.readouterr().err.strip()
    assert why in err and "\n" not in err and time.monotonic() - start < 60
