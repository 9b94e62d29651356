"""A server for the tests: on loopback, in a thread of this process; and adapters to serve."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image

import restuning as rt
from restuning.backbones.load import reading_of
from restuning.serving import Client
from restuning.serving.adapters import Adapters
from restuning.serving.app import Server, make_app
from restuning.serving.server import make_config
from restuning.serving.settings import ServeSettings


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[str, Server]]:
    """Its address, and the server itself."""
    made = ServeSettings(**{"threads": 1, **settings})
    server = Server(made, Adapters(made, torch.device("cpu")))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        running = uvicorn.Server(make_config(make_app(server)))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with Client(url, settings.get("api_key")) as client:
                while not client.ready():
                    time.sleep(0.02)
            yield url, server
        finally:
            running.should_exit = True
            thread.join()


def save_adapters(root: Path, backbone: str, wanted: Mapping[str, tuple[Any, int, str]]) -> Path:
    """Adapters away from initialisation: name → method, classes, kind of task."""
    model = rt.load_backbone(backbone)
    tuned, how = rt.Tuned(model, backbone_name=backbone), reading_of(model).to_dict()
    torch.manual_seed(3)
    for name, (method, classes, kind) in wanted.items():
        names = [f"class {i}" for i in range(classes)]
        tuned.add_adapter(name, method, classes, classes=names, preprocessing=how, kind=kind)
        with torch.no_grad():
            for p in tuned.adapters[name].parameters():
                p.add_(0.05 * torch.randn_like(p))
        tuned.save_pretrained(root / name, name)
        tuned.delete_adapter(name)
    return root


def picture(seed: int, size: tuple[int, int] = (50, 40), kind: str = "PNG", **options: Any) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, kind, **options)
    return file.getvalue()


def same_answer(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float = 1e-5) -> bool:
    """Classes alike, numbers within the tolerance."""
    if "top" in a:
        pairs: Sequence[Any] = list(zip(a["top"], b["top"], strict=True))
        return all(x["class"] == y["class"] and abs(x["probability"] - y["probability"]) <= tolerance for x, y in pairs)
    if "values" in a:
        return a["values"].keys() == b["values"].keys() and all(
            abs(v - b["values"][k]) <= tolerance for k, v in a["values"].items()
        )
    return bool(a["words"] == b["words"])
