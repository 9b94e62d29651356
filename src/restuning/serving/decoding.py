"""Images decoded and resized in processes of their own, which end when one takes too long."""

import json
import queue
import signal
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from restuning.data.decode import decode
from restuning.data.transforms import Preprocess
from restuning.errors import DataError, line

MEMORY = 4 * 2**30
"""Bytes that decoding may take on top of what a process holds when it starts."""


class Decoders:
    """Processes that decode images. `pixels` may be called from as many threads as there are processes.

    Args:
        count: processes.
        seconds: how long one image may take; its process is killed then, and another started.
        formats: those that are tried, by Pillow's names.
        megapixels: of an image at most, counted before it is decoded.
    """

    def __init__(self, count: int, seconds: float, formats: Sequence[str], megapixels: float) -> None:
        self.seconds, self._limits = seconds, (tuple(formats), megapixels)
        server = "forkserver" in get_all_start_methods()
        self._context: Any = get_context("forkserver" if server else "spawn")
        if server:  # a process that takes the place of a killed one is there at once
            self._context.set_forkserver_preload(
                ["restuning.data.transforms", "torchvision.transforms.v2", "PIL.Image"]
            )
        self._idle: queue.Queue[tuple[Any, Connection]] = queue.Queue()
        for _ in range(count):
            self._idle.put(self._start())

    def pixels(self, image: bytes, how: Preprocess) -> Tensor:
        """uint8 (3, h, w), before normalisation. Raises DataError for an image that is refused."""
        process, pipe = self._idle.get()
        try:
            pipe.send_bytes(_written(how) + b"\0" + image)
            if not pipe.poll(self.seconds):
                raise DataError(f"the image takes more than {self.seconds:g} s to decode")
            answer = pipe.recv_bytes(1 + 3 * how.size[0] * how.size[1] + 10_000)
        except (EOFError, OSError, DataError) as error:
            process.kill()
            pipe.close()
            process, pipe = self._start()
            raise error if isinstance(error, DataError) else DataError("the image ends its decoder") from error
        finally:
            self._idle.put((process, pipe))
        if answer[:1] == b"!":
            raise DataError(answer[1:].decode(errors="replace"))
        return torch.frombuffer(bytearray(answer[1:]), dtype=torch.uint8).view(3, *how.size)

    def close(self) -> None:
        """End all processes."""
        while True:
            try:
                process, pipe = self._idle.get_nowait()
            except queue.Empty:
                return
            pipe.close()
            process.kill()
            process.join(1)

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, *self._limits), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _work(pipe: Connection, formats: Sequence[str], megapixels: float) -> None:
    """How, in JSON, a zero, and the bytes of an image → its pixels, or ! and why not."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the server ends it, once all that was accepted is answered
    torch.set_num_threads(1)
    _limit_memory()
    with suppress(EOFError, OSError):
        while True:
            written, _, data = pipe.recv_bytes().partition(b"\0")
            try:
                pixels = _read(written).pixels(decode(BytesIO(data), "the image", formats, megapixels))
                answer = b"=" + pixels.contiguous().numpy().tobytes()
            except (Exception, MemoryError) as error:
                answer = b"!" + line(error).encode()[:9_000]
            pipe.send_bytes(answer)


@lru_cache
def _written(how: Preprocess) -> bytes:
    return json.dumps(how.to_dict()).encode()


@lru_cache
def _read(how: bytes) -> Preprocess:
    return Preprocess.from_dict(json.loads(how))


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource
        from pathlib import Path

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
