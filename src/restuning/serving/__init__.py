"""A server: one frozen backbone, any number of tasks, one forward; and its client."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restuning.serving.client import AsyncClient as AsyncClient
    from restuning.serving.client import Client as Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'restuning.serving' has no attribute {name!r}")
    from restuning.serving import client

    return getattr(client, name)
