"""What tuning costs: parameters, bytes saved for backward, peak memory, seconds."""

import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from restuning.errors import MissingExtra


def saved_bytes(run: Callable[[], Any], leave_out: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `run()`: each storage once, `leave_out` (the parameters) not."""
    return sum(_saved(run, leave_out, lambda: "").values())


def saved_by_module(run: Callable[[], Any], model: nn.Module) -> dict[str, int]:
    """The same by the module that runs when autograd first keeps it, `path (class)` with every number in the path a *;
    the model's parameters not."""
    running, handles = ["elsewhere"], []
    for path, module in model.named_modules():
        name = f"{re.sub(r'[0-9]+', '*', path) or 'itself'} ({type(module).__name__})"
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: running.append(name)),
            module.register_forward_hook(lambda *_: void(running.pop())),
        ]
    try:
        return _saved(run, model.parameters(), lambda: running[-1])
    finally:
        for handle in handles:
            handle.remove()


def void(_: object) -> None:
    """What a hook returns that changes nothing."""


def _saved(run: Callable[[], Any], leave_out: Iterable[Tensor], name: Callable[[], str]) -> dict[str, int]:
    known = {part.untyped_storage().data_ptr() for t in leave_out for part in parts(t)}
    held: WeakSet[_Held] = WeakSet()  # of nodes that are still there at the end

    def pack(t: Tensor) -> "_Held":
        held.add(one := _Held(t.detach(), name()))  # an output kept by its own node would keep that too
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        result = run()
    found: dict[str, int] = {}
    for one in sorted(held, key=lambda one: one.number):
        for storage in (part.untyped_storage() for part in parts(one.tensor)):
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found[one.name] = found.get(one.name, 0) + storage.nbytes()
    del result
    return found


def parts(t: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those of a subclass that is quantised."""
    if hasattr(t, "__tensor_flatten__"):
        for name in t.__tensor_flatten__()[0]:
            yield from parts(getattr(t, name))
    elif isinstance(t, Tensor):
        yield t


class _Held:
    """A tensor that autograd keeps, and for whom; numbered in their order."""

    count = itertools.count()

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor, self.name, self.number = tensor, name, next(self.count)


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
