"""`restuning serve --engine ray`: the routes stay here; what they ask is answered by replicas on a Ray cluster.

A replica holds one backbone and the adapters that it was asked for last. An adapter travels as its two files, in Ray's
object store, under a key of its own: whichever replica answers, it does so from the adapters that were there when the
request was accepted.
"""

import asyncio
import os
import tempfile
import uuid
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from restuning.errors import MissingExtra, RestuningError, line
from restuning.hooks.points import backbone_lock
from restuning.model.adapter import AdapterModule
from restuning.model.files import CONFIG, MODEL, write
from restuning.runs.predict import device_of
from restuning.serving.adapters import Adapters
from restuning.serving.batches import Answered, Batcher, Job
from restuning.serving.metrics import Metrics
from restuning.serving.settings import Refused, ServeSettings

RETRY_SECONDS = 120.0
"""For how long a request is sent again, to a replica that lives, before its client is told 503."""

Files = tuple[bytes, bytes]


@dataclass(frozen=True)
class Asked:
    """A job as it travels. adapters: task → its key, and a reference to its files."""

    adapters: Mapping[str, tuple[str, Any]]
    items: Sequence[Any]
    top: int
    logits: bool
    head: bool
    words: Sequence[tuple[Sequence[str], Sequence[int]]] | None


@dataclass(frozen=True)
class Replied:
    """Answers, or why there are none; and what the replica that gave them has done since it began."""

    replica: int
    answers: Answered
    refused: tuple[int, str, int | None] | None
    totals: Mapping[str, float]


class Replicas:
    """In the place of a `Batcher`: sends jobs to the replicas, and again to another one if a replica dies.

    Raises RestuningError where there is no cluster, and for autoscaling settings that Ray does not take.
    """

    alive = True

    def __init__(self, adapters: Adapters, settings: ServeSettings, metrics: Metrics) -> None:
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise MissingExtra(str(error.name or "ray"), "ray") from error
        if adapters.alone:
            raise RestuningError("full fine-tuning changes the backbone, which replicas share: leave out --engine ray")
        self.settings, self.metrics, self._ray = settings, metrics, ray
        self._items, self._closed = 0, False
        self._files: weakref.WeakKeyDictionary[AdapterModule, tuple[str, Any]] = weakref.WeakKeyDictionary()
        self.totals: dict[int, Mapping[str, float]] = {}  # by replica, its process
        self._own = not ray.is_initialized()
        name, weights = adapters.source
        size = None if adapters.size is None else adapters.size[0]
        there = replace(
            settings, adapters=(), root=None, watch=False, allow_changes=False, api_key=None,
            backbone=name, weights=weights, image_size=size,
        )  # fmt: skip
        options = deployment_options(settings)
        try:
            if self._own:
                most = options.get("autoscaling_config", {}).get("max_replicas", settings.replicas)
                cores = None if os.environ.get("RAY_ADDRESS") else max(os.cpu_count() or 1, most * _cores(settings))
                ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            quiet = {"log_level": "ERROR"}
            serve.start(proxy_location="Disabled", logging_config=quiet)
            self._name = f"restuning-{uuid.uuid4().hex[:12]}"
            app = serve.deployment(**options)(Replica).bind(there)
            self._handle: Any = serve.run(app, name=self._name, route_prefix=None, logging_config=quiet)
        except Exception as error:  # of Ray, of grpc, of pydantic
            self._shut_down()
            raise RestuningError(f"no replicas on Ray: {line(error)}") from error

    async def submit(self, job: Job) -> Answered:
        """A job's answers, from any replica. Raises Refused as `Batcher.submit` does, and where none answers (503)."""
        if self._closed:
            raise Refused(503, "the server is shutting down", 1)
        if self._items + len(job.items) > self.settings.max_queue:
            self.metrics.refused.inc()
            raise Refused(429, f"the queue is full: {self._items} items wait", 1)
        self._count(len(job.items))
        try:
            found: Answered = [{} for _ in job.items]
            for i in range(0, len(job.tasks), self.settings.replica_adapters):
                part = await self._ask(job, job.tasks[i : i + self.settings.replica_adapters])
                found = [a | b for a, b in zip(found, part, strict=True)]
            return found
        finally:
            self._count(-len(job.items))

    def close(self) -> None:
        """End the replicas."""
        self._closed = True
        self._shut_down()

    async def _ask(self, job: Job, tasks: Sequence[str]) -> Answered:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        readers = job.snapshot.predictor.readers
        adapters = {task: self._sent(readers[task].adapter, job) for task in tasks}
        asked = Asked(adapters, job.items, job.top, job.logits, job.head, job.words)
        handle = self._handle.options(multiplexed_model_id=next(iter(adapters.values()))[0])
        loop = asyncio.get_running_loop()
        until = loop.time() + RETRY_SECONDS
        while True:
            call = handle.answer.remote(asked)
            try:
                replied: Replied = await call
                break
            except asyncio.CancelledError:
                call.cancel()
                raise
            except RayTaskError as error:  # it lives, and failed
                self._counted(tasks, "error", len(job.items))
                raise Refused(500, f"a replica failed: {line(error.cause or error)}") from error
            except (RayError, RayServeException) as error:  # it died
                if self._closed or loop.time() > until:
                    raise Refused(503, f"no replica answers: {type(error).__name__}", 1) from error
                self.metrics.retries.inc()
                await asyncio.sleep(0.05)
        before = self.totals.get(replied.replica, {})
        for name in ("forwards", "passes", "saved"):
            getattr(self.metrics, name).inc(max(0.0, replied.totals[name] - before.get(name, 0.0)))
        self.totals[replied.replica] = {k: max(v, before.get(k, 0.0)) for k, v in replied.totals.items()}
        self._counted(tasks, "error" if replied.refused else "ok", len(job.items))
        if replied.refused:
            raise Refused(*replied.refused)
        return replied.answers

    def _sent(self, adapter: AdapterModule, job: Job) -> tuple[str, Any]:
        """An adapter's key, and its files in the object store, where they are put once."""
        if adapter not in self._files:
            with tempfile.TemporaryDirectory() as folder:
                with backbone_lock(job.snapshot.predictor.backbone):  # no trial is under way
                    write(Path(folder), adapter.config, adapter.state_dict())
                files = tuple((Path(folder) / name).read_bytes() for name in (CONFIG, MODEL))
            self._files[adapter] = uuid.uuid4().hex, self._ray.put(files)
        return self._files[adapter]

    def _count(self, items: int) -> None:
        self._items += items
        self.metrics.queued.set(self._items)

    def _counted(self, tasks: Sequence[str], status: str, items: int) -> None:
        for task in tasks:
            self.metrics.answers.labels(task, status).inc(items)

    def _shut_down(self) -> None:
        from ray import serve

        with suppress(Exception):  # a cluster that has gone is one without replicas
            if hasattr(self, "_name"):
                serve.delete(self._name)
            if self._own and not os.environ.get("RAY_ADDRESS"):
                serve.shutdown()
        if self._own:
            self._ray.shutdown()


class Replica:
    """On a worker: a backbone, the adapters that were asked for last, and a thread that answers in batches."""

    def __init__(self, settings: ServeSettings) -> None:
        from ray import serve

        self.adapters = Adapters(settings, device_of(settings.device))
        self.metrics = Metrics()
        self.batcher = Batcher(self.adapters, settings, self.metrics)
        self._loading = asyncio.Lock()
        self._refs: dict[str, Any] = {}

        async def load(key: str) -> Held:
            config, tensors = await self._refs[key]
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / CONFIG).write_bytes(config)
                (Path(folder) / MODEL).write_bytes(tensors)
                await asyncio.get_running_loop().run_in_executor(None, self.adapters.load, key, Path(folder))
            return Held(self.adapters, key)

        # it has the replica told to the router by the keys that it holds
        self._load: Any = serve.multiplexed(max_num_models_per_replica=settings.replica_adapters)(load)

    async def answer(self, asked: Asked) -> Replied:
        """Never raises what a client has caused: it would have to travel as an exception."""
        try:
            return self._replied(await self._answers(asked))
        except Refused as error:
            return self._replied([], (error.status, str(error), error.retry_after))
        except RestuningError as error:
            return self._replied([], (422, str(error), None))

    async def _answers(self, asked: Asked) -> Answered:
        async with self._loading:  # of all that are asked for, none goes before they are all there
            for key, files in asked.adapters.values():
                self._refs[key] = files
                try:
                    await self._load(key)
                finally:
                    del self._refs[key]
            snapshot = self.adapters.current
        names = {key: task for task, (key, _) in asked.adapters.items()}
        first = next(iter(names))
        how, by_word = snapshot.readings[first], snapshot.predictor.adapter_config(first).kind == "per-token"
        collate = self.adapters.collate_of(how, by_word)
        job = Job(asked.items, tuple(names), how, snapshot, collate, asked.top, asked.logits, asked.head, asked.words)
        return [{names[key]: one for key, one in item.items()} for item in await self.batcher.submit(job)]

    def _replied(self, answers: Answered, refused: tuple[int, str, int | None] | None = None) -> Replied:
        totals = {name: getattr(self.metrics, name)._value.get() for name in ("forwards", "passes", "saved")}
        totals["adapters"] = len(self.adapters.current.readings)
        return Replied(os.getpid(), answers, refused, totals)

    def check_health(self) -> None:
        """Ray replaces a replica whose thread has ended."""
        if not self.batcher.alive:
            raise RuntimeError("the thread that owns the model has ended")


class Held:
    """An adapter that a replica has loaded, until Ray drops the one that was used least recently."""

    def __init__(self, adapters: Adapters, key: str) -> None:
        self.adapters, self.key = adapters, key

    def __del__(self) -> None:
        with suppress(Refused):  # it has gone before
            self.adapters.remove(self.key)


def deployment_options(settings: ServeSettings) -> dict[str, Any]:
    """What Ray Serve is told of the replicas. Raises RestuningError for autoscaling settings that it does not take."""
    from ray.serve.config import AutoscalingConfig

    options: dict[str, Any] = {
        "max_ongoing_requests": 2 * settings.max_batch,
        "health_check_period_s": 2,
        "ray_actor_options": {
            "num_cpus": _cores(settings),
            "num_gpus": int((settings.device or "").startswith("cuda")),
        },
    }
    if not settings.autoscale:
        return {**options, "num_replicas": settings.replicas}
    given: dict[str, Any] = {"min_replicas": settings.replicas}
    known = getattr(AutoscalingConfig, "model_fields", None) or AutoscalingConfig.__fields__  # of older Rays
    for one in settings.autoscale:
        name, equals, value = one.partition("=")
        if not equals or name not in known:
            raise RestuningError(f"autoscale {one!r}: expected NAME=VALUE, of Ray Serve's autoscaling_config")
        given[name] = value
    try:
        made = AutoscalingConfig(**given)
    except ValueError as error:
        raise RestuningError(f"autoscale {' '.join(settings.autoscale)}: {line(error)}") from error
    return {**options, "autoscaling_config": {name: getattr(made, name) for name in given}}


def _cores(settings: ServeSettings) -> int:
    return settings.threads or 1
