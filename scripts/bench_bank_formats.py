"""Formats for a bank of features, side by side: random batches read from a memory-mapped file.

python scripts/bench_bank_formats.py [--rows 16384] [--rounds 5]

Rows are those of a CLS bank of ViT-B/16 in float16, 13 layers of 768. A format not installed is named as absent.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from restuning.utils.profiling import in_turn, spread

LAYERS, WIDTH, BATCH, BATCHES = 13, 768, 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    features = torch.randn(args.rows, LAYERS, WIDTH).half()
    batches = torch.randint(args.rows, (BATCHES, BATCH))
    with tempfile.TemporaryDirectory() as folder:
        readers = {name: make(features, Path(folder)) for name, make in FORMATS.items()}
        absent = [name for name, reader in readers.items() if reader is None]
        calls: dict[str, Callable[[], object]] = {
            name: lambda read=read: [read(rows) for rows in batches] for name, read in readers.items() if read
        }
        for name, read in readers.items():
            assert read is None or torch.equal(read(batches[0]), features[batches[0]]), name
        times = in_turn(calls, args.rounds)
    first = next(iter(times))
    report = {
        "rows": args.rows,
        "MiB": round(features.nbytes / 2**20, 1),
        "ms for a batch of 32": {name: round(1000 * sorted(t)[len(t) // 2] / BATCHES, 3) for name, t in times.items()},
        f"ratio to {first}": {name: spread(t, times[first]) for name, t in times.items()},
        "absent": absent,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))


def safetensors_by_layer(features: torch.Tensor, out: Path) -> Any:
    """One tensor a layer, as a bank has it."""
    save_file({str(i): features[:, i].contiguous() for i in range(LAYERS)}, out / "layers.safetensors")
    kept = load_file(out / "layers.safetensors")
    return lambda rows: torch.stack([kept[str(i)][rows] for i in range(LAYERS)], 1)


def safetensors_by_row(features: torch.Tensor, out: Path) -> Any:
    save_file({"x": features}, out / "rows.safetensors")
    kept = load_file(out / "rows.safetensors")["x"]
    return lambda rows: kept[rows]


def numpy_memmap(features: torch.Tensor, out: Path) -> Any:
    np.save(out / "x.npy", features.numpy())
    kept = np.load(out / "x.npy", mmap_mode="r")
    return lambda rows: torch.from_numpy(kept[rows.numpy()])


def tensordict_memmap(features: torch.Tensor, out: Path) -> Any:
    try:
        from tensordict import TensorDict
    except ImportError:
        return None
    kept = TensorDict({"x": features}, batch_size=[len(features)]).memmap(str(out / "tensordict"))
    return lambda rows: kept[rows]["x"]


FORMATS: dict[str, Callable[[torch.Tensor, Path], Any]] = {
    "safetensors, a tensor for each layer": safetensors_by_layer,
    "safetensors, one tensor": safetensors_by_row,
    "numpy memmap": numpy_memmap,
    "tensordict memmap": tensordict_memmap,
}

if __name__ == "__main__":
    main()
