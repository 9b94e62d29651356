"""Jobs on the workers of a Ray cluster, which see data and output folders at the same paths."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from restuning.errors import MissingExtra, RestuningError, line

T = TypeVar("T")

RETRIES = 5  # of a job whose worker dies; it goes on where it was


def check_engine(engine: str, workers: int | None) -> None:
    """Raises RestuningError for workers without a cluster, or fewer than one."""
    if workers is not None and (engine != "ray" or workers < 1):
        raise RestuningError(f"--workers {workers}: expected 1 or more, with --engine ray")


def on_ray(
    call: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int | None = None
) -> Iterator[tuple[int, T | RestuningError]]:
    """(job, what `call(*jobs[job])` gives or why it failed), as each is done. A job whose worker dies is given to
    another.

    Args:
        call: a function at the top of a module, whose RestuningErrors come back; and jobs, its arguments.
        workers: of a local cluster of one core each; None: of the cluster at RAY_ADDRESS, else of this machine. Where
            there are GPUs, each job has one.

    Raises:
        RestuningError: there is no cluster. MissingExtra.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    try:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RestuningError(f"no Ray cluster: {error}") from error
    try:
        gpus = min(1, ray.cluster_resources().get("GPU", 0))
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_at_work)
        waiting = {remote.remote(call, os.getcwd(), job): i for i, job in enumerate(jobs)}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            i = waiting.pop(ready)
            try:
                yield i, ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                yield i, RestuningError(f"{type(error.cause or error).__name__}: {line(error.cause or error)}")
            except ray.exceptions.RayError as error:
                yield i, RestuningError(f"its worker died {RETRIES + 1} times ({type(error).__name__})")
    finally:
        ray.shutdown()


def _at_work(call: Callable[..., T], folder: str, job: tuple[Any, ...]) -> T | RestuningError:
    """On a worker, in the folder that relative paths are meant from."""
    import torch._dynamo  # noqa: F401  torch 2.8 finds it half-made where it is imported in the middle of something

    with suppress(OSError):
        os.chdir(folder)
    try:
        return call(*job)
    except RestuningError as error:
        return RestuningError(str(error))  # of other kinds, some cannot travel
