"""`--engine ray`: jobs on the workers of a Ray cluster, which see the data and the output folder at the same paths."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from restuning.errors import Locked, MissingExtra, RestuningError
from restuning.paper.jobs import Done, Job, finish

RETRIES = 5  # of a job whose worker dies; it goes on where it was


def on_ray(jobs: Sequence[Job], out: Path, dtype: str, workers: int | None = None) -> Iterator[Done]:
    """As each is done. workers: of a local cluster of one core each; None: of the cluster at RAY_ADDRESS, else of this
    machine. Where there are GPUs, each job has one."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    try:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RestuningError(f"no Ray cluster: {error}") from error
    try:
        remote = ray.remote(num_cpus=1, num_gpus=min(1, ray.cluster_resources().get("GPU", 0)), max_retries=RETRIES)(
            _finish
        )
        waiting = {remote.remote(job, out.absolute(), dtype): job for job in jobs}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:
                yield Done(job, [], 0.0, f"its worker died {RETRIES + 1} times ({type(error).__name__})")
    finally:
        ray.shutdown()


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
