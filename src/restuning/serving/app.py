"""The routes of the server."""

import asyncio
import base64
import json
import struct
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from restuning._version import __version__
from restuning.data import Preprocess, Tokenise
from restuning.errors import DataError, RestuningError
from restuning.serving.adapters import Adapters, repeated
from restuning.serving.batches import Answered, Batcher, Batches, Job
from restuning.serving.decoding import Decoders
from restuning.serving.guard import LOG, Guard, error_response, now_text
from restuning.serving.metrics import Metrics
from restuning.serving.requests import (
    AdapterRequest,
    EmbeddingsRequest,
    PredictRequest,
    Wanted,
    body_of,
    parsed,
    wanted_of,
)
from restuning.serving.settings import FORMATS, Refused, ServeSettings

T = TypeVar("T")
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Server:
    """What the routes share. Made before the server listens: whatever is wrong with the adapters is said then."""

    def __init__(self, settings: ServeSettings, adapters: Adapters) -> None:
        self.settings, self.adapters, self.metrics = settings, adapters, Metrics()
        self.decoders: Decoders | None = None
        if not adapters.reads_texts:
            self.decoders = Decoders(settings.decoders, settings.decode_seconds, FORMATS, settings.max_pixels)
        self.batcher = _batcher(adapters, settings, self.metrics)
        self.threads = ThreadPoolExecutor(settings.decoders if self.decoders else 1, "restuning-items")
        self.changes = ThreadPoolExecutor(1, "restuning-adapters")
        self.warm = self.draining = False

    @property
    def ready(self) -> bool:
        """Whether it takes requests: the weights are there, a first batch has been answered."""
        return self.warm and not self.draining and self.batcher.alive

    async def warm_up(self) -> None:
        """Answer a first batch with every adapter, and decode a first image, before requests come."""
        await asyncio.get_running_loop().run_in_executor(self.threads, self._warm_up)
        self.metrics.adapters.set(len(self.adapters.current.readings))
        self.warm = True

    def _warm_up(self) -> None:
        now = self.adapters.current
        alike: dict[Any, list[str]] = {}
        for name, how in now.readings.items():
            alike.setdefault((how, now.predictor.adapter_config(name).kind == "per-token"), []).append(name)
        for (how, by_word), names in alike.items():
            example = self.adapters.example(how, by_word)
            for count in (1, 2, 3) if self.settings.compile else (1,):  # a graph of any number follows the first two
                now.predictor.predict(repeated(example, count), names)
            if self.decoders is not None:
                self.decoders.pixels(_PIXEL, how)

    async def watch(self) -> None:
        """Have what comes and goes in the folder of adapters served, as long as the server runs."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                events = await loop.run_in_executor(self.changes, self.adapters.scan)
            except RestuningError as error:
                events = [("", f"refused: {error}")]
            for name, event in events:
                LOG.info(
                    json.dumps({"time": now_text(), "level": "info", "event": "adapter", "name": name, "what": event})
                )
                if event == "removed":
                    self.metrics.forget(name)
            self.metrics.adapters.set(len(self.adapters.current.readings))
            await asyncio.sleep(self.settings.watch_seconds)

    def close(self) -> None:
        """Answer what was accepted, then end threads and processes."""
        self.batcher.close()
        self.threads.shutdown(cancel_futures=True)
        self.changes.shutdown(cancel_futures=True)
        if self.decoders is not None:
            self.decoders.close()

    # ---- from a request to answers

    async def answer(self, request: Request, wanted: Wanted, head: bool = True) -> tuple[Answered, int]:
        """{task: answer} for each item, and how many tokens were read. Raises Refused."""
        now = self.adapters.current
        tasks = list(now.readings) if wanted.tasks is None else list(dict.fromkeys(wanted.tasks))
        for task in tasks:
            if task not in now.readings:
                raise Refused(404, f"no task named {task[:80]!r}: see /v1/models")
        if not tasks:
            raise Refused(404, "no adapter is served")
        if bool(wanted.texts) != self.adapters.reads_texts:
            given, read = ("texts", "images") if wanted.texts else ("images", "texts")
            raise Refused(422, f"{given} were sent, and {self.adapters.backbone} reads {read}")
        jobs, parts = await _unless_gone(request, self._parts(wanted, now, tasks, head), self.metrics)
        found: Answered = [{} for _ in range(len(wanted.images) + len(wanted.texts))]
        at: dict[tuple[str, ...], int] = {}
        for job, part in zip(jobs, parts, strict=True):
            start = at.get(job.tasks, 0)
            for i, one in enumerate(part, start):
                found[i] |= one
            at[job.tasks] = start + len(part)
        tokens = sum(len(item["input_ids"]) for job in jobs for item in job.items if isinstance(item, dict))
        return [{task: one[task] for task in tasks} for one in found], tokens

    async def _parts(
        self, wanted: Wanted, now: Any, tasks: Sequence[str], head: bool
    ) -> tuple[list[Job], list[Answered]]:
        jobs = await self._jobs(wanted, now, tasks, head)
        return jobs, await _all([self.batcher.submit(job) for job in jobs])

    async def _jobs(self, wanted: Wanted, now: Any, tasks: Sequence[str], head: bool) -> list[Job]:
        """Tasks that read their items alike share jobs, of at most a batch each."""
        alike: dict[Any, list[str]] = {}
        for task in tasks:  # of images there may be a thousand
            by_word = self.adapters.reads_texts and now.predictor.adapter_config(task).kind == "per-token"
            alike.setdefault((id(now.readings[task]), by_word), []).append(task)
        loop = asyncio.get_running_loop()
        jobs: list[Job] = []
        for (_, by_word), names in alike.items():
            how = now.readings[names[0]]
            words: list[Any] | None = None
            try:
                if isinstance(how, Preprocess):
                    calls = [loop.run_in_executor(self.threads, self._pixels, image, how) for image in wanted.images]
                    items = list(await asyncio.gather(*calls))
                else:
                    reading = loop.run_in_executor(self.threads, self._tokens, wanted.texts, how, by_word)
                    items, words = await reading
            except DataError as error:
                raise Refused(422, str(error)) from error
            size, collate = self.settings.max_batch, self.adapters.collate_of(how, by_word)
            for i in range(0, len(items), size):
                part = None if words is None else words[i : i + size]
                job = Job(items[i : i + size], tuple(names), how, now, collate, wanted.top, wanted.logits, head, part)
                jobs.append(job)
        return jobs

    def _pixels(self, image: bytes, how: Preprocess) -> Any:
        assert self.decoders is not None
        if not image:
            raise DataError("the image is empty")
        return how.normalise(self.decoders.pixels(image, how))

    def _tokens(self, texts: Sequence[str | list[str]], how: Tokenise, by_word: bool) -> tuple[list[Any], Any]:
        if by_word:
            if any(isinstance(text, list) for text in texts):
                raise DataError("a task by token reads one text, no pair")
            rows: list[tuple[Any, ...]] = [(str(text).split(),) for text in texts]
        else:
            rows = [tuple(text) if isinstance(text, list) else (text,) for text in texts]
            if len({len(row) for row in rows}) > 1:
                raise DataError("expected single texts or pairs, not both in one request")
        made = self.adapters.tokenised(rows, how, by_word)
        items = [made[i][0] for i in range(len(rows))]
        words = [(row[0], made[i][1]) for i, row in enumerate(rows)] if by_word else None
        return items, words


def _batcher(adapters: Adapters, settings: ServeSettings, metrics: Metrics) -> Batches:
    if settings.engine == "local":
        return Batcher(adapters, settings, metrics)
    from restuning.serving.replicas import Replicas

    return Replicas(adapters, settings, metrics)


def make_app(server: Server) -> Any:
    """The application, ASGI."""
    settings, adapters = server.settings, server.adapters

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        tasks = [asyncio.create_task(server.warm_up())]
        if settings.watch:
            tasks.append(asyncio.create_task(server.watch()))
        yield
        server.draining = True
        for task in tasks:
            task.cancel()
        await asyncio.get_running_loop().run_in_executor(None, server.close)

    more: dict[str, Any] = {}
    if "telemetry" in signature(FastAPI).parameters:  # of newer ones, which look for it at every request
        more["telemetry"] = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(title="restuning", version=__version__, lifespan=lifespan, description=__doc__ or "", **more)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error_response(request, error.status, str(error), error.retry_after)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return error_response(request, error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(request, 500, "the server failed; its log says how, by the request's id")

    @app.get("/health", tags=["operations"])
    async def health() -> Any:
        """The process lives, and so does the thread that owns the model."""
        if not server.batcher.alive:
            raise Refused(503, "the thread that owns the model has ended")
        return {"status": "ok", "version": __version__}

    @app.get("/ready", tags=["operations"])
    async def ready() -> Any:
        """The weights are there, a first batch has been answered, and the server is not shutting down."""
        if not server.ready:
            raise Refused(503, "shutting down" if server.draining else "not warm yet", 1)
        return {"status": "ready", "adapters": len(adapters.current.readings)}

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """For Prometheus."""
        text, kind = server.metrics.text()
        return Response(text, media_type=kind)

    @app.get("/v1/models", tags=["models"])
    async def models() -> Any:
        """The backbone and its adapters, whose parent it is."""
        base = {"id": adapters.backbone, "object": "model", "owned_by": "restuning", "parent": None}
        base["reads"] = "texts" if adapters.reads_texts else "images"
        return {"object": "list", "data": [base, *(adapters.about(name) for name in adapters.current.readings)]}

    @app.post("/v1/predict", tags=["answers"], openapi_extra=_takes(PredictRequest, True))
    async def predict(request: Request) -> Any:
        """Every task for every item, from one forward: `top`, classes with probabilities; `values` under regression;
        `words` with their classes under per-token."""
        wanted = await wanted_of(request, await body_of(request, settings), settings)
        found, _ = await server.answer(request, wanted)
        return _json({"model": adapters.backbone, "items": [{"tasks": one} for one in found]})

    @app.post("/v1/embed", tags=["answers"], openapi_extra=_takes(PredictRequest, True))
    async def embed(request: Request) -> Any:
        """What the heads of the tasks read, for every item."""
        wanted = await wanted_of(request, await body_of(request, settings), settings)
        found, _ = await server.answer(request, wanted, head=False)
        return _json({"model": adapters.backbone, "items": [{"tasks": one} for one in found]})

    @app.post("/v1/embeddings", tags=["answers"], openapi_extra=_takes(EmbeddingsRequest))
    async def embeddings(request: Request) -> Any:
        """As OpenAI's: what the head of the task `model` reads of texts."""
        made = parsed(EmbeddingsRequest, await body_of(request, settings))
        texts: list[str | list[str]] = [made.input] if isinstance(made.input, str) else [*made.input]
        if not texts or len(texts) > settings.max_items or not all(str(text).strip() for text in texts):
            raise Refused(422, f"input: expected 1 to {settings.max_items} texts, none of them empty")
        if any(len(text) > settings.max_text for text in texts):
            raise Refused(413, f"input: more than {settings.max_text} characters")
        found, tokens = await server.answer(request, Wanted(texts=texts, tasks=[made.model]), head=False)
        data = []
        for i, one in enumerate(found):
            values = one[made.model]
            if values and isinstance(values[0], list):
                raise Refused(422, f"{made.model!r} reads every token: it gives no one embedding a text")
            packed: Any = values
            if made.encoding_format == "base64":
                packed = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
            data.append({"object": "embedding", "index": i, "embedding": packed})
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": made.model, "usage": usage})

    @app.post("/v1/adapters/{name}", tags=["models"], openapi_extra=_takes(AdapterRequest))
    async def add(name: str, request: Request) -> Any:
        """Serve an adapter from inside the folder of adapters (or the hub); only with --allow-changes."""
        made = parsed(AdapterRequest, await body_of(request, settings)) if settings.allow_changes else None
        if made is None:
            raise Refused(403, "adapters cannot be changed here (--allow-changes)")
        call = partial(adapters.add, name, made.path, made.hub, made.revision)
        await asyncio.get_running_loop().run_in_executor(server.changes, call)
        server.metrics.adapters.set(len(adapters.current.readings))
        return JSONResponse(adapters.about(name), 201)

    @app.delete("/v1/adapters/{name}", tags=["models"])
    async def remove(name: str) -> Any:
        """Serve an adapter no more; only with --allow-changes."""
        if not settings.allow_changes:
            raise Refused(403, "adapters cannot be changed here (--allow-changes)")
        await asyncio.get_running_loop().run_in_executor(server.changes, adapters.remove, name)
        server.metrics.adapters.set(len(adapters.current.readings))
        server.metrics.forget(name)
        return {"removed": name}

    return Guard(app, server)


async def _all(calls: Sequence[Awaitable[Answered]]) -> list[Answered]:
    """All of them; where one fails, the others are cancelled."""
    if len(calls) == 1:
        return [await calls[0]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_awaited(call)) for call in calls]
    return [task.result() for task in tasks]


async def _awaited(call: Awaitable[Answered]) -> Answered:
    return await call


async def _unless_gone(request: Request, call: Awaitable[T], metrics: Metrics) -> T:
    """What is awaited, unless the client leaves first: then it is cancelled, and its place is free."""
    work: asyncio.Future[T] = asyncio.ensure_future(call)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
        if not work.done():
            metrics.left.inc()
            raise Refused(499, "the client left")
        return work.result()
    except* Refused as group:
        raise next(_leaves(group)) from None
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()


def _leaves(group: BaseExceptionGroup[Refused]) -> Any:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")


def _takes(model: type[Any], items: bool = False) -> dict[str, Any]:
    """What OpenAPI says of a body that a route reads itself."""
    content: dict[str, Any] = {"application/json": {"schema": model.model_json_schema()}}
    if items:
        image = {"type": "string", "format": "binary"}
        many = {"type": "array", "items": {"type": "string"}}
        fields = {"image": {"type": "array", "items": image}, "text": many, "tasks": many, "top": {"type": "integer"}}
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": fields}}
        content["image/*"] = {"schema": image}
    return {"requestBody": {"content": content, "required": True}}
