"""The settings of a server, and what it refuses a client with."""

from dataclasses import dataclass
from pathlib import Path

from restuning.errors import RestuningError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of images that are decoded, by Pillow's names."""


@dataclass(frozen=True)
class ServeSettings:
    """Settings of `restuning serve`.

    Args:
        adapters: folders of saved adapters, or NAME=FOLDER; a folder's own name is the task's.
        root: the folder inside which adapters are found (`watch`) and may be added by clients (`allow_changes`).
        watch: have every adapter that appears in `root` served, and one that goes no more.
        allow_changes: let clients add and remove adapters.
        allow_hub: let them add adapters from the hub too, by id and full revision.
        backbone: its name, if not that of the first adapter's files. weights: its weights.
        max_batch: items of a forward at most; max_wait_ms: how long the first one of a batch waits for others.
        max_queue: items that wait at most; beyond them a client is told 429.
        max_body: bytes of a request; max_items: images or texts in it; max_pixels: megapixels of an image;
        max_text: characters of a text.
        decode_seconds: how long an image may take to decode; decoders: processes that do it.
        read_seconds: how long a client may take to send its request.
        api_key: what clients must send, as `Authorization: Bearer KEY`; None: nothing.
        precision: no, bf16 or fp16 (autocast). threads: of the computation; None: torch's own number.
    """

    adapters: tuple[str, ...] = ()
    root: Path | None = None
    watch: bool = False
    allow_changes: bool = False
    allow_hub: bool = False
    backbone: str | None = None
    weights: str | None = None
    image_size: int | None = None
    host: str = "127.0.0.1"
    info: int = 8000
    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_queue: int = 256
    max_body: int = 32 * 2**20
    max_items: int = 64
    max_pixels: float = 50.0
    max_text: int = 100_000
    decode_seconds: float = 10.0
    read_seconds: float = 30.0
    watch_seconds: float = 1.0
    decoders: int = 1
    api_key: str | None = None
    device: str | None = None
    precision: str = "no"
    threads: int | None = None

    def __post_init__(self) -> None:
        numbers = ("max_batch", "max_queue", "max_body", "max_items", "max_text", "decoders", "threads")
        for name in (*numbers, "max_pixels", "decode_seconds", "read_seconds", "watch_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise RestuningError(f"{name.replace('_', '-')} {value}: expected a positive number")
        if not 0 <= self.max_wait_ms <= 10_000:
            raise RestuningError(f"max-wait-ms {self.max_wait_ms}: expected 0 to 10000")
        if self.max_items > self.max_queue:
            raise RestuningError(f"max-items {self.max_items}: expected at most max-queue, {self.max_queue}")
        if not 0 <= self.info < 65536:
            raise RestuningError(f"port {self.info}: expected 0 to 65535")
        if self.precision not in ("no", "bf16", "fp16"):
            raise RestuningError(f"precision {self.precision!r}: expected no, bf16 or fp16")
        if (self.watch or self.allow_changes) and self.root is None:
            raise RestuningError("watch and allow-changes need a folder of adapters: give --adapters FOLDER")
        if self.root is not None and not self.root.is_dir():
            raise RestuningError(f"no such folder of adapters: {self.root}")
        if self.api_key is not None and not (self.api_key.strip() and self.api_key.isascii()):
            raise RestuningError("api-key: expected ASCII characters, at least one")


class Refused(RestuningError):
    """What a client is told when its request is refused: a status and one line."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after
