"""`reproduce --engine ray`: its jobs on the workers of a Ray cluster."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from restuning.errors import Locked, RestuningError
from restuning.paper.jobs import Done, Job, finish
from restuning.utils import cluster


def on_ray(jobs: Sequence[Job], out: Path, dtype: str, workers: int | None = None) -> Iterator[Done]:
    """As each is done; see `restuning.utils.cluster.on_ray`."""
    given = [(job, out.absolute(), dtype) for job in jobs]
    for i, done in cluster.on_ray(_finish, given, workers):
        yield done if isinstance(done, Done) else Done(jobs[i], [], 0.0, str(done))


def _finish(job: Job, out: Path, dtype: str) -> Done:
    """On a worker; what another one is at, a bank for instance, is waited for."""
    while True:
        start = time.perf_counter()
        try:
            return Done(job, finish(job, out, dtype), time.perf_counter() - start)
        except Locked:
            time.sleep(0.5)
        except RestuningError as error:
            return Done(job, [], 0.0, str(error))
