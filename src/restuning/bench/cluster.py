"""`restuning bench cluster`: what a point, a stack, this machine and a cluster of Ray workers cost, of a sweep; and a
bank built by one process and by Ray workers."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from restuning.bench.settings import Bench, Measured
from restuning.runs.banks import BankSettings, build_bank
from restuning.runs.sweep import Sweep, sweep

WORKERS = (1, 2)
EPOCHS = 20

Call = Callable[..., None]
"""Of a folder for what it writes, and where its jobs are done."""


def cluster(settings: Bench) -> Measured:
    """Seconds from nothing to the result, the start of a cluster and of its workers included. This process computes on
    one core, as a worker does.

    Raises RestuningError for data that cannot be read; MissingExtra without Ray.
    """
    methods, measured, threads = settings.methods, Measured(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = root / "weights.safetensors"
        save_file({name: x.contiguous() for name, x in settings.load().state_dict().items()}, weights)
        made = BankSettings(
            settings.data[0] if settings.data else "sprites:orientation",
            *(settings.backbone, str(weights), settings.image_size),
            train_size=settings.items,
            test_size=max(1, settings.items // 5),
        )
        rates = tuple(0.02 * 0.7**i for i in range(settings.points))

        def bank(out: Path, **where: Any) -> None:
            build_bank(made, out, progress=False, **where)

        def swept(names: tuple[str, ...], points: int) -> Call:
            grid = Sweep(str(root / "bank"), names, rates[:points], (EPOCHS,), (0,))

            def call(out: Path, **where: Any) -> None:
                sweep(grid, out, **where)

            return call

        n, m = settings.points, len(methods)
        stack, grid = f"{n} points, a stack", f"{m} methods of {n} points"
        of_ray = {f"{w} Ray worker{'s' * (w > 1)}": {"engine": "ray", "workers": w} for w in WORKERS}
        calls: dict[str, tuple[Call, dict[str, Any]]] = {"bank, this process": (bank, {})}
        calls |= {f"bank, {name}": (bank, where) for name, where in of_ray.items()}
        calls |= {"1 point": (swept(methods[-1:], 1), {}), stack: (swept(methods[-1:], n), {})}
        calls[f"{grid}, this process"] = swept(methods, n), {}
        calls |= {f"{grid}, {name}": (swept(methods, n), where) for name, where in of_ray.items()}
        points = {"1 point": 1, stack: n} | {name: n * m for name in calls if name.startswith(grid)}
        try:
            torch.set_num_threads(1)
            bank(root / "bank")
            for i in range(settings.rounds):
                for j, (name, (call, where)) in enumerate(calls.items()):
                    start = time.perf_counter()
                    call(root / f"{i}-{j}", **where)
                    took = time.perf_counter() - start
                    units = {"seconds": took}
                    units |= {"points": points[name], "seconds_a_point": took / points[name]} if name in points else {}
                    for unit, value in units.items():
                        measured.samples.setdefault(name, {}).setdefault(unit, []).append(value)
        finally:
            torch.set_num_threads(threads)
    first, second = of_ray
    measured.pairs = [(f"bank, {name}", "bank, this process", "seconds") for name in of_ray]
    measured.pairs += [(f"{of}, {second}", f"{of}, {first}", "seconds") for of in ("bank", grid)]
    measured.pairs += [(f"{grid}, {name}", f"{grid}, this process", "seconds") for name in of_ray]
    measured.pairs += [(name, "1 point", "seconds_a_point") for name in points if name != "1 point"]
    return measured
