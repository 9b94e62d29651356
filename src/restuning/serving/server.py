"""`restuning serve`: load, listen, and end once all that was accepted is answered."""

import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from restuning.errors import MissingExtra, RestuningError, line
from restuning.serving.settings import HEAD_BYTES, ServeSettings


def serve(settings: ServeSettings, listening: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGTERM or SIGINT. listening: told the address, once requests are taken.

    Raises RestuningError for adapters that cannot be served, and an address that cannot be had; MissingExtra.
    """
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingExtra(str(error.name or "fastapi"), "serve") from error
    import socket

    from restuning.runs.predict import device_of
    from restuning.serving.adapters import Adapters
    from restuning.serving.app import Server, make_app
    from restuning.serving.guard import LOG

    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))  # before the weights are read: this fails at once
    except OSError as error:
        listener.close()
        raise RestuningError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from error
    try:
        server = Server(settings, Adapters(settings, device_of(settings.device), freeze))
        freeze()
    except Exception:
        listener.close()
        raise
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:], LOG.propagate = [handler], False
    LOG.setLevel(logging.INFO)
    host, port = listener.getsockname()[:2]

    class Listening(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listening(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

        def handle_exit(self, sig: int, frame: object) -> None:
            server.draining = True
            super().handle_exit(sig, frame)  # type: ignore[arg-type]

    config = make_config(make_app(server))
    # the model's thread makes many short calls, each of which would wait for 5 ms while another thread parses
    sys.setswitchinterval(0.0001)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again once it has shut down
    try:
        Listening(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise RestuningError(f"the server ended: {line(error)}") from error
    finally:
        server.close()
        listener.close()


def freeze() -> None:
    """For a process that is a server and nothing else: take the garbage of what is new, then never look through what is
    left again, which stays. With a thousand adapters that would halt all answers for a second."""
    gc.collect()
    gc.freeze()


def make_config(app: Any) -> Any:
    """How uvicorn runs the application: by uvloop and httptools where they are installed."""
    import uvicorn

    protocol: Any = "h11"
    with suppress(ImportError):
        from restuning.serving.protocol import Bounded

        protocol = Bounded
    return uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
