"""What tuning costs: parameters, bytes saved for backward, peak memory, seconds."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.errors import MissingExtra


def saved_bytes(run: Callable[[], Any], leave_out: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `run()`: each storage once, `leave_out` (the parameters) not."""
    known = {t.untyped_storage().data_ptr() for t in leave_out}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until counted, so that no address is met twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(found.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(before, above): what was held when `run()` began, and how far it rose; allocated on a GPU, else resident.

    Linux alone can forget an earlier peak: elsewhere each call wants a fresh process, and macOS tells no peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return before, torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _resident("VmRSS")
    run()
    return before, max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """`VmRSS`, what is resident, or `VmHWM`, its peak: where a system keeps none, what is resident too."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(row.split()[1]) for row in status if row.startswith(field))
    try:
        import psutil
    except ImportError as error:
        raise MissingExtra("psutil", "bench") from error
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss) if field == "VmHWM" else memory.rss)


def in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[str], object] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in every round, after one round of warm-up.

    before: called with the name ahead of each call, and not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            before(name)
            _finish()
            start = time.perf_counter()
            call()
            _finish()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def _finish() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def spread(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The ratio a / b round by round: minimum, median, maximum."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
