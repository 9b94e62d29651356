"""A client of the server, synchronous and asynchronous."""

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restuning.errors import MissingExtra, RestuningError, line

Image = str | Path | bytes
"""A file, or the bytes of one."""


class ServerError(RestuningError):
    """What the server refused. status: HTTP's; 0 where it cannot be reached."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Calls:
    """What both clients send and read. retries: how often a request is sent again where the server is full (429), not
    ready (503) or not reached; all of its requests may be."""

    def __init__(
        self, url: str, api_key: str | None = None, *, timeout: float = 60.0, retries: int = 3, **options: Any
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtra("httpx", "serve") from error
        self._httpx, self.retries = httpx, retries
        self._errors = httpx.HTTPError
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": timeout, **options}

    @staticmethod
    def _items(
        images: Sequence[Image], texts: Sequence[str | Sequence[str]], tasks: Sequence[str] | None, **more: Any
    ) -> dict[str, Any]:
        data: dict[str, Any] = {"tasks": "all" if tasks is None else list(tasks), **more}
        if images:
            data["images"] = [base64.b64encode(_bytes(image)).decode() for image in images]
        if texts:
            data["texts"] = [text if isinstance(text, str) else list(text) for text in texts]
        return data

    def _wait(self, attempt: int, response: Any) -> float | None:
        """Seconds until the next attempt; None: there is none."""
        if attempt >= self.retries or (response is not None and response.status_code not in (429, 503)):
            return None
        after = "" if response is None else response.headers.get("retry-after", "")
        return float(after) if after.isdecimal() else 0.1 * 2**attempt

    @staticmethod
    def _read(response: Any) -> Any:
        if response.status_code < 400:
            return response.json()
        try:
            reason = str(response.json()["error"]["reason"])
        except (ValueError, KeyError, TypeError):
            reason = f"the server answered {response.status_code}"
        raise ServerError(response.status_code, reason)


class Client(_Calls):
    """A client of `restuning serve`, to be used in a `with` block or closed.

    Args:
        url: of the server. api_key: its key. timeout: seconds. retries: see `ServerError`. options: httpx's.
    """

    def __init__(self, url: str, api_key: str | None = None, **options: Any) -> None:
        super().__init__(url, api_key, **options)
        self._http = self._httpx.Client(**self._options)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def predict(
        self,
        images: Sequence[Image] = (),
        texts: Sequence[str | Sequence[str]] = (),
        tasks: Sequence[str] | None = None,
        top: int = 1,
        logits: bool = False,
    ) -> list[dict[str, Any]]:
        """{task: answer} for each item, as `restuning.model.answers` has it. tasks: None: all. Raises ServerError."""
        data = self._items(images, texts, tasks, top=top, logits=logits)
        return [item["tasks"] for item in self._send("POST", "/v1/predict", data)["items"]]

    def embed(
        self,
        images: Sequence[Image] = (),
        texts: Sequence[str | Sequence[str]] = (),
        tasks: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """{task: what its head reads} for every item. Raises ServerError."""
        return [item["tasks"] for item in self._send("POST", "/v1/embed", self._items(images, texts, tasks))["items"]]

    def models(self) -> list[dict[str, Any]]:
        """The backbone and its adapters."""
        found: list[dict[str, Any]] = self._send("GET", "/v1/models")["data"]
        return found

    def reads_texts(self) -> bool:
        """Whether the server's backbone reads texts, and not images."""
        return bool(self.models()[0]["reads"] == "texts")

    def ready(self) -> bool:
        """Whether it takes requests."""
        try:
            return bool(self._http.get("/ready").status_code == 200)
        except self._errors:
            return False

    def add(self, name: str, path: str | None = None, **hub: str) -> dict[str, Any]:
        """Have an adapter served, from inside the server's folder, or by `hub=` and `revision=`."""
        about: dict[str, Any] = self._send("POST", f"/v1/adapters/{name}", {"path": path, **hub} if path else hub)
        return about

    def remove(self, name: str) -> None:
        """Have an adapter served no more."""
        self._send("DELETE", f"/v1/adapters/{name}")

    def _send(self, method: str, path: str, data: Mapping[str, Any] | None = None) -> Any:
        for attempt in range(self.retries + 1):
            try:
                response = self._http.request(method, path, json=data)
            except self._errors as error:
                response, why = None, error
            wait = self._wait(attempt, response)
            if wait is None:
                break
            time.sleep(wait)
        if response is None:
            raise ServerError(0, f"no answer from {self._options['base_url']}: {line(why)}")
        return self._read(response)


class AsyncClient(_Calls):
    """The same, asynchronous: `async with AsyncClient(url) as client: await client.predict(…)`."""

    def __init__(self, url: str, api_key: str | None = None, **options: Any) -> None:
        super().__init__(url, api_key, **options)
        self._http = self._httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def predict(
        self,
        images: Sequence[Image] = (),
        texts: Sequence[str | Sequence[str]] = (),
        tasks: Sequence[str] | None = None,
        top: int = 1,
        logits: bool = False,
    ) -> list[dict[str, Any]]:
        """As `Client.predict`."""
        data = self._items(images, texts, tasks, top=top, logits=logits)
        return [item["tasks"] for item in (await self._send("POST", "/v1/predict", data))["items"]]

    async def embed(
        self,
        images: Sequence[Image] = (),
        texts: Sequence[str | Sequence[str]] = (),
        tasks: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """As `Client.embed`."""
        answer = await self._send("POST", "/v1/embed", self._items(images, texts, tasks))
        return [item["tasks"] for item in answer["items"]]

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        found: list[dict[str, Any]] = (await self._send("GET", "/v1/models"))["data"]
        return found

    async def add(self, name: str, path: str | None = None, **hub: str) -> dict[str, Any]:
        """As `Client.add`."""
        data = {"path": path, **hub} if path else hub
        about: dict[str, Any] = await self._send("POST", f"/v1/adapters/{name}", data)
        return about

    async def remove(self, name: str) -> None:
        """As `Client.remove`."""
        await self._send("DELETE", f"/v1/adapters/{name}")

    async def _send(self, method: str, path: str, data: Mapping[str, Any] | None = None) -> Any:
        import asyncio

        for attempt in range(self.retries + 1):
            try:
                response = await self._http.request(method, path, json=data)
            except self._errors as error:
                response, why = None, error
            wait = self._wait(attempt, response)
            if wait is None:
                break
            await asyncio.sleep(wait)
        if response is None:
            raise ServerError(0, f"no answer from {self._options['base_url']}: {line(why)}")
        return self._read(response)


def _bytes(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise RestuningError(f"{image} cannot be read: {error.strerror or error}") from error
