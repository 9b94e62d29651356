"""Around all routes of the server: the request's id, the key, a line of JSON in the log, the count of requests."""

import hmac
import json
import logging
import re
import time
import uuid
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

if TYPE_CHECKING:
    from restuning.serving.app import Server

LOG = logging.getLogger("restuning.serving")
OPEN = ("/health", "/ready")
"""Routes that ask for no key."""


class Guard:
    """Around all routes: the request's id, the key, a line of JSON in the log, and the count of requests."""

    def __init__(self, app: FastAPI, server: "Server") -> None:
        self.app, self.server = app, server
        key = server.settings.api_key
        self.key = None if key is None else sha256(key.encode()).digest()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        scope["restuning_id"] = name = given if re.fullmatch(r"[\w-]{1,64}", given, re.ASCII) else uuid.uuid4().hex

        async def tell(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        failure: Exception | None = None
        try:
            if self._may(scope["path"], headers):
                await self.app(scope, receive, tell)
            else:
                request = Request(scope, receive)
                await error_response(request, 401, "expected the server's key: Authorization: Bearer KEY")(
                    scope, receive, tell
                )
        except Exception as error:  # a client has been told 500 by then
            failure = error
        took = time.perf_counter() - start
        route = getattr(scope.get("route"), "path", "other")
        self.server.metrics.requests.labels(route, str(status)).inc()
        entry = {"time": now_text(), "level": "error" if failure else "info", "id": name, "method": scope["method"]}
        entry |= {"path": scope["path"][:200], "status": status, "seconds": round(took, 6)}
        if failure is not None:
            entry["error"] = f"{type(failure).__name__}: {failure}"[:500]
        LOG.log(logging.ERROR if failure else logging.INFO, json.dumps(entry))

    def _may(self, path: str, headers: dict[bytes, str]) -> bool:
        if self.key is None or path in OPEN:
            return True
        scheme, _, bearer = headers.get(b"authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")
        return hmac.compare_digest(sha256(given.encode("latin-1")).digest(), self.key)


def error_response(request: Request, status: int, reason: str, retry_after: int | None = None) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    about = {"status": status, "reason": reason, "request_id": request.scope.get("restuning_id")}
    return JSONResponse({"error": about}, status, headers)


def now_text() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z"
