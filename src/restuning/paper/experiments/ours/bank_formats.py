"""Formats for a bank of features, side by side: random batches read from a memory-mapped file.

Rows are those of a CLS bank of ViT-B/16 in float16, 13 layers of 768. A format that is not installed is left out.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from restuning.paper.experiments.measured import Place, ratio, table
from restuning.paper.results import Record, where
from restuning.utils.profiling import in_turn, spread

LAYERS, WIDTH, BATCH, BATCHES = 13, 768, 32, 64
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BankFormats:
    """Batches of 32 rows."""

    rows: int = 16384
    rounds: int = 5

    def run(self, place: Place) -> Iterator[Record]:
        features = torch.randn(self.rows, LAYERS, WIDTH).half()
        batches = torch.randint(self.rows, (BATCHES, BATCH))
        with tempfile.TemporaryDirectory() as folder:
            readers = {name: read for name, make in FORMATS.items() if (read := make(features, Path(folder)))}
            for name, read in readers.items():
                assert torch.equal(read(batches[0]), features[batches[0]]), name
            times = in_turn(
                {name: partial(_all, read, batches) for name, read in readers.items()},
                self.rounds,
            )
        first = next(iter(times))
        for name, found in times.items():
            seconds = statistics.median(found) / BATCHES
            yield {"format": name, "seconds": seconds, "ratio": spread(found, times[first]), **asdict(self), **where()}

    def text(self, records: Sequence[Record]) -> str:
        rows = [[r["format"], f"{1000 * r['seconds']:.3f}", ratio(r["ratio"])] for r in records]
        mebibytes = records[0]["rows"] * LAYERS * WIDTH * 2 / 2**20
        return f"""# The format of a bank

Random batches of {BATCH} rows of {LAYERS} × {WIDTH} in float16 from a memory-mapped file of {records[0]["rows"]:,} rows
({mebibytes:.0f} MiB, in the page cache).

{table(["format", "ms a batch", "ratio to the first"], rows)}"""


def _all(read: Read, batches: Tensor) -> None:
    for rows in batches:
        read(rows)


def _by_layer(features: Tensor, out: Path) -> Read:
    """One tensor a layer, as a bank has it."""
    from safetensors.torch import load_file, save_file

    save_file({str(i): features[:, i].contiguous() for i in range(LAYERS)}, out / "layers.safetensors")
    kept = load_file(out / "layers.safetensors")
    return lambda rows: torch.stack([kept[str(i)][rows] for i in range(LAYERS)], 1)


def _by_row(features: Tensor, out: Path) -> Read:
    from safetensors.torch import load_file, save_file

    save_file({"x": features}, out / "rows.safetensors")
    kept = load_file(out / "rows.safetensors")["x"]
    return lambda rows: kept[rows]


def _numpy(features: Tensor, out: Path) -> Read:
    import numpy as np

    np.save(out / "x.npy", features.numpy())
    kept = np.load(out / "x.npy", mmap_mode="r")
    return lambda rows: torch.from_numpy(kept[rows.numpy()])


def _tensordict(features: Tensor, out: Path) -> Read | None:
    try:
        from tensordict import TensorDict
    except ImportError:
        return None
    kept = TensorDict({"x": features}, batch_size=[len(features)]).memmap(str(out / "tensordict"))
    return lambda rows: kept[rows]["x"]


FORMATS: dict[str, Callable[[Tensor, Path], Read | None]] = {
    "safetensors, a tensor for each layer (a bank's)": _by_layer,
    "safetensors, one tensor": _by_row,
    "numpy memmap": _numpy,
    "tensordict memmap": _tensordict,
}
