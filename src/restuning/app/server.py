"""`restuning app`: the page on a server of this machine."""

import os
import socket
from collections.abc import Callable
from typing import Any

from restuning.app.home import Home
from restuning.app.page import build, style
from restuning.app.settings import AppSettings
from restuning.errors import RestuningError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-ancestors 'self'; form-action 'self'"
)
"""What a browser may load and where it may send: this server alone."""


def make_app(home: Home, local: bool = True) -> Any:
    """The page on a FastAPI application, with headers that keep a browser to this server.

    Args:
        home: the projects.
        local: whether folders of this machine may be named on the page.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def headers(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    if local:  # a page of another host cannot have itself taken for this one
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    return gr.mount_gradio_app(app, build(home, local), path="/", show_error=True, **style())


def serve(settings: AppSettings, listening: Callable[[str], None] = lambda url: None) -> None:
    """Serve the page until it is interrupted. listening: told the address.

    Raises RestuningError for an address that cannot be had, MissingExtra.
    """
    import uvicorn

    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise RestuningError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from error
    host, port = listener.getsockname()[:2]

    class Listening(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listening(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    app = make_app(Home(settings.home), settings.host in LOOPBACK)
    try:
        Listening(uvicorn.Config(app, log_level="warning", server_header=False)).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
