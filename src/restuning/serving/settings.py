"""The settings of a server, and what it refuses a client with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from restuning.errors import RestuningError
from restuning.utils.options import Device, ImageSize, Option

HEAD_BYTES = 65_536
"""Of a request's line and headers, at most."""

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
        engine: local, one process that owns the model; ray, replicas of it on a Ray cluster (RAY_ADDRESS, else a local
        one). replicas: how many, or at least. autoscale: NAME=VALUE of Ray Serve's `autoscaling_config`.
        replica_adapters: how many adapters a replica holds; the one that was used least recently goes.
        precision: no, bf16 or fp16 (autocast). compile: the pass that side paths and heads share.
        threads: of the computation; None: torch's own number.
    """

    adapters: Annotated[
        tuple[str, ...], Option("folders of saved adapters, or NAME=FOLDER", metavar="ADAPTER", positional=True)
    ] = ()
    root: Annotated[
        Path | None, Option("where adapters are looked for", flag="adapters", metavar="FOLDER", parse=Path)
    ] = None
    watch: Annotated[bool, Option("serve every adapter that appears in that folder")] = False
    allow_changes: Annotated[bool, Option("let clients add (from that folder) and remove adapters")] = False
    allow_hub: Annotated[bool, Option("let them add from the hub too, by full revision")] = False
    backbone: Annotated[str | None, Option("the backbone (default: that of the first adapter's files)")] = None
    weights: Annotated[str | None, Option("the backbone's weights, if not those of a run.json")] = None
    image_size: ImageSize = None
    host: Annotated[str, Option("the address to listen on")] = "127.0.0.1"
    port: Annotated[int, Option("0: any that is free")] = 8000
    max_batch: Annotated[int, Option("items of a forward at most", metavar="N")] = 32
    max_wait_ms: Annotated[float, Option("how long the first item of a batch waits for others", metavar="MS")] = 2.0
    max_queue: Annotated[int, Option("items that wait at most; then 429", metavar="N")] = 256
    max_body: Annotated[int, Option("bytes of a request; then 413", metavar="N")] = 32 * 2**20
    max_items: Annotated[int, Option("images or texts in a request", metavar="N")] = 64
    max_pixels: Annotated[float, Option("megapixels of an image", metavar="N")] = 50.0
    max_text: Annotated[int, Option("characters of a text", metavar="N")] = 100_000
    decode_seconds: Annotated[float, Option("how long an image may take to decode", metavar="S")] = 10.0
    read_seconds: Annotated[float, Option("how long a client may take to send its request", metavar="S")] = 30.0
    watch_seconds: float = 1.0
    decoders: Annotated[int, Option("processes that decode images", metavar="N")] = 1
    api_key: Annotated[
        str | None, Option("what clients must send (default: RESTUNING_API_KEY; where that is empty, nothing)")
    ] = None
    engine: Annotated[Literal["local", "ray"], Option("ray: the model on replicas, the routes here")] = "local"
    replicas: Annotated[int, Option("of the model on Ray, each with a backbone; with --autoscale, at least")] = 1
    autoscale: Annotated[
        tuple[str, ...], Option("Ray Serve's settings: max_replicas=8 target_ongoing_requests=4", metavar="NAME=VALUE")
    ] = ()
    replica_adapters: Annotated[int, Option("adapters that a replica holds at most", metavar="N")] = 256
    device: Device = None
    precision: Annotated[str, Option("autocast", choices=("no", "bf16", "fp16"))] = "no"
    compile: Annotated[bool, Option("have torch.compile make a graph of the pass to the features")] = False
    threads: Annotated[int | None, Option("of the computation (default: torch's own number)", metavar="N")] = None

    def __post_init__(self) -> None:
        counts = ("max_batch", "max_queue", "max_body", "max_items", "max_text", "decoders", "threads", "replicas")
        for name in (*counts, "replica_adapters", "max_pixels", "decode_seconds", "read_seconds", "watch_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise RestuningError(f"{name.replace('_', '-')} {value}: expected a positive number")
        if not 0 <= self.max_wait_ms <= 10_000:
            raise RestuningError(f"max-wait-ms {self.max_wait_ms}: expected 0 to 10000")
        if self.max_items > self.max_queue:
            raise RestuningError(f"max-items {self.max_items}: expected at most max-queue, {self.max_queue}")
        if not 0 <= self.port < 65536:
            raise RestuningError(f"port {self.port}: expected 0 to 65535")
        if self.precision not in ("no", "bf16", "fp16"):
            raise RestuningError(f"precision {self.precision!r}: expected no, bf16 or fp16")
        if self.engine != "ray" and (self.replicas != 1 or self.autoscale):
            raise RestuningError("replicas and autoscale are of --engine ray")
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
