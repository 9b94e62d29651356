"""Requests in a bounded queue, and the one thread that owns the model and answers them in batches."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from restuning.data import Reading, Tokenise
from restuning.errors import RestuningError, line
from restuning.model.answers import answers
from restuning.model.predictor import Answer, Predictor
from restuning.serving.adapters import Adapters, Snapshot
from restuning.serving.metrics import Metrics
from restuning.serving.settings import Refused, ServeSettings

Answered = list[dict[str, Any]]
"""For each item, {task: answer}."""

Made = Callable[[], list[Answered]]
"""Makes the answers of jobs, once the model has run."""


@dataclass(eq=False)
class Job:
    """Items that are read alike, all of which ask for the same tasks.

    Args:
        items: what the model reads of each: a tensor, or token ids by name.
        tasks: names of adapters.
        how: their reading; jobs of another one are in other batches.
        snapshot: the adapters that were there when the request was accepted.
        top: classes of an answer at most. logits: whether answers have these too.
        head: whether the heads are run; else the answers are what these read.
        words: under tasks per token, each item's words and the word that each of its tokens begins.
        collate: items → a batch.
    """

    items: Sequence[Any]
    tasks: tuple[str, ...]
    how: Reading
    snapshot: Snapshot
    collate: Callable[[Sequence[Any]], Any]
    top: int = 1
    logits: bool = False
    head: bool = True
    words: Sequence[tuple[Sequence[str], Sequence[int]]] | None = None
    future: "asyncio.Future[Answered] | None" = None
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def key(self) -> Any:
        """What jobs of one batch have in common."""
        how = (self.how.tokenizer, self.how.max_length) if isinstance(self.how, Tokenise) else self.how
        return how, self.head, self.words is None


class Batches(Protocol):
    """What answers jobs: a thread of this process, or replicas elsewhere."""

    @property
    def alive(self) -> bool: ...

    async def submit(self, job: Job) -> Answered: ...

    def close(self) -> None: ...


class Batcher:
    """A queue of at most `max_queue` items, and a thread that answers them, up to `max_batch` at a time; the first of a
    batch waits for others for `max_wait_ms` at most."""

    def __init__(self, adapters: Adapters, settings: ServeSettings, metrics: Metrics) -> None:
        self.adapters, self.settings, self.metrics = adapters, settings, metrics
        self._queue: deque[Job] = deque()
        self._items, self._rate = 0, 0.0  # that wait; answered a second, lately
        self._changed, self._closed = threading.Condition(), False
        self._maker, self._making = ThreadPoolExecutor(1, "restuning-answers"), cast("Future[None] | None", None)
        self.thread = threading.Thread(target=self._run, name="restuning-model", daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread that owns the model lives."""
        return self.thread.is_alive()

    async def submit(self, job: Job) -> Answered:
        """A job's answers. Raises Refused if the queue is full (429) or the job cannot be answered; when the caller is
        cancelled, the job frees its place."""
        loop = asyncio.get_running_loop()
        job.future = loop.create_future()
        with self._changed:
            if self._closed:
                raise Refused(503, "the server is shutting down", 1)
            if self._items + len(job.items) > self.settings.max_queue:
                self.metrics.refused.inc()
                wait = max(1, round(self._items / self._rate)) if self._rate else 1
                raise Refused(429, f"the queue is full: {self._items} items wait", min(wait, 60))
            self._queue.append(job)
            self._count(len(job.items))
            self._changed.notify()
        try:
            return await job.future
        finally:
            with self._changed:
                if job in self._queue:
                    self._queue.remove(job)
                    self._count(-len(job.items))

    def close(self) -> None:
        """Answer what was accepted, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.thread.join()
        self._maker.shutdown()

    def _count(self, items: int) -> None:
        self._items += items
        self.metrics.queued.set(self._items)

    # ---- the thread that owns the model

    def _run(self) -> None:
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        while jobs := self._take():
            start = time.perf_counter()
            for job in jobs:
                self.metrics.queue_seconds.observe(start - job.arrived)
            self._answer(jobs)
            took, items = time.perf_counter() - start, sum(len(job.items) for job in jobs)
            self.metrics.inference_seconds.observe(took)
            self.metrics.batch_items.observe(items)
            self._rate = 0.9 * self._rate + 0.1 * items / took if self._rate else items / took

    def _take(self) -> list[Job]:
        """The oldest job and those that can share its batch, once there are enough or it has waited; none at the
        end."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if not self._queue:
                return []
            key, until = self._queue[0].key, self._queue[0].arrived + self.settings.max_wait_ms / 1000
            while not self._closed and self._queue and self._ready(key) < self.settings.max_batch:
                if (left := until - time.perf_counter()) <= 0:
                    break
                self._changed.wait(left)
            taken: list[Job] = []
            size = 0
            for job in list(self._queue):
                if not taken or (job.key == taken[0].key and size + len(job.items) <= self.settings.max_batch):
                    taken.append(job)
                    size += len(job.items)
                    self._queue.remove(job)
            self._count(-size)
        return taken or self._take()  # its client may have left while it waited

    def _ready(self, key: Any) -> int:
        return sum(len(job.items) for job in self._queue if job.key == key)

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Together; where that fails, one by one, so that what one of them asks for is no other's concern. What people
        read is made by another thread, while the next batch is computed."""
        try:
            made = self._batch(jobs)
        except Exception as error:
            self._failed(jobs, error)
            return
        if self._making is not None:
            self._making.result()  # no more than one batch waits to be told
        self._making = self._maker.submit(self._tell, jobs, made)

    def _tell(self, jobs: Sequence[Job], made: Made) -> None:
        try:
            found = made()
        except Exception as error:
            self._failed(jobs, error)
            return
        for job, one in zip(jobs, found, strict=True):
            _send(job, one)

    def _failed(self, jobs: Sequence[Job], error: Exception) -> None:
        if len(jobs) > 1:
            for job in jobs:
                try:
                    _send(job, self._batch([job])()[0])
                except Exception as its_own:
                    self._failed([job], its_own)
            return
        for task in jobs[0].tasks:
            self.metrics.answers.labels(task, "error").inc(len(jobs[0].items))
        _send(jobs[0], error)

    def _batch(self, jobs: Sequence[Job]) -> Made:
        """Answers of each job, from the newest adapters; what has gone since is answered from what was there."""
        now = self.adapters.current
        kinds = {(job.tasks, id(job.how)): job for job in jobs}  # most ask for the same
        left = {key for key, job in kinds.items() if any(now.readings.get(task) is not job.how for task in job.tasks)}
        gone = [job for job in jobs if (job.tasks, id(job.how)) in left]
        if not gone or (len(jobs) == 1 and jobs[0].snapshot is now):
            return self._from(now, jobs)
        rest = [job for job in jobs if job not in gone]
        parts = [(rest, self._from(now, rest))] if rest else []
        parts += [([job], self._from(job.snapshot, [job])) for job in gone]

        def made() -> list[Answered]:
            found = {job: one for some, make in parts for job, one in zip(some, make(), strict=True)}
            return [found[job] for job in jobs]

        return made

    def _from(self, snapshot: Snapshot, jobs: Sequence[Job]) -> Made:
        predictor, rows_of, wanted = snapshot.predictor, dict[tuple[str, ...], list[int]](), dict[str, list[int]]()
        owners: list[tuple[Job, Answered, int]] = []
        for job in jobs:
            rows = range(len(owners), len(owners) + len(job.items))
            made: Answered = [{} for _ in rows]
            owners += [(job, made, i) for i in range(len(made))]
            rows_of.setdefault(job.tasks, []).extend(rows)
        for tasks, own_rows in rows_of.items():
            for task in tasks:
                wanted.setdefault(task, []).extend(own_rows)
        inputs, head = jobs[0].collate([item for job in jobs for item in job.items]), jobs[0].head
        with self._precision():
            answer = predictor.answer(inputs, wanted, head)
        return partial(self._made, predictor, answer, wanted, owners, jobs)

    def _made(
        self,
        predictor: Predictor,
        answer: Answer,
        wanted: dict[str, list[int]],
        owners: Sequence[tuple[Job, Answered, int]],
        jobs: Sequence[Job],
    ) -> list[Answered]:
        """owners: of each row of the batch, its job, and which of that job's answers is its own."""
        words, head = None, jobs[0].head
        if jobs[0].words is not None:
            words = {row: job.words[i] for row, (job, _, i) in enumerate(owners) if job.words is not None}
        top, of_row = max(job.top for job in jobs), [found[i] for _, found, i in owners]
        if head:
            for outputs in answer.outputs:
                for task, rows, made in answers(outputs, predictor.adapter_config, top, words):
                    for row, one in zip(rows, made, strict=True):
                        of_row[row][task] = one
            for job, found, i in owners:
                for one in found[i].values() if job.top < top else ():
                    del one.get("top", [])[job.top :]
        if not head or any(job.logits for job in jobs):
            for task, own, values in predictor.unpacked(answer, head):
                for row, one in zip(own, _plain(values), strict=True):
                    job, found, i = owners[row]
                    if not head:
                        found[i][task] = one
                    elif job.logits:
                        found[i][task]["logits"] = one
        self._counted(answer, wanted)
        return [found for job, found, i in owners if i == 0]

    def _counted(self, answer: Answer, wanted: dict[str, list[int]]) -> None:
        for task, rows in wanted.items():
            self.metrics.answers.labels(task, "ok").inc(len(rows))
        self.metrics.forwards.inc(answer.passed)
        self.metrics.passes.inc(answer.passes)
        self.metrics.saved.inc(sum(map(len, wanted.values())) - answer.passed)

    def _precision(self) -> Any:
        if self.settings.precision == "no":
            return nullcontext()
        kind = next(self.adapters.current.predictor.backbone.parameters()).device.type
        return torch.autocast(kind, {"bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.precision])


def _plain(values: Tensor) -> list[Any]:
    values = values.float()
    if not torch.isfinite(values).all():
        raise RestuningError("an output is no number")
    return values.tolist()


def _send(job: Job, found: "Answered | Exception") -> None:
    assert job.future is not None
    job.future.get_loop().call_soon_threadsafe(_resolve, job.future, found)


def _resolve(future: "asyncio.Future[Answered]", found: "Answered | Exception") -> None:
    if future.done():  # its client has left
        return
    if not isinstance(found, Exception):
        future.set_result(found)
    elif isinstance(found, RestuningError):
        future.set_exception(found if isinstance(found, Refused) else Refused(422, str(found)))
    else:
        future.set_exception(Refused(500, f"the model failed: {line(found)}"))
