"""`restuning bench window`: a sweep's steps from a bank larger than memory, beside the same from memory."""

import hashlib
import resource
import struct
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from restuning._version import __version__
from restuning.backbones.load import describe_backbone, reading_of
from restuning.bench.settings import Bench, Measured
from restuning.features.bank import Bank, FromFeatures
from restuning.features.bank.build import numbers_kept, tokens_kept
from restuning.features.bank.format import FORMAT, MANIFEST, SHARD_ROWS, TAIL, Shard
from restuning.features.bank.window import Window
from restuning.features.stacked import Point, train
from restuning.model.stack import Stack
from restuning.model.tuned import Tuned, adapt
from restuning.side.features import Features
from restuning.training.config import TrainConfig
from restuning.utils.files import as_json, atomic_write
from restuning.utils.profiling import in_turn

STEPS = 16
"""Of each measurement, on rows drawn from all over the bank."""

IN_MEMORY = 4096
"""Rows, of which those steps are drawn that are from memory."""


def window(settings: Bench) -> Measured:
    """Steps of a stack of `points` from a bank of `items` in half precision, whose files are sparse: what they hold
    takes no room on the disk, and is read as any bytes are. Memory is that of the process, before anything is held."""
    with tempfile.TemporaryDirectory() as folder:
        made = sparse_bank(Path(folder), settings)
        bank, measured = Bank(folder, verify=False), Measured()
        read = Window(bank)
        draw = torch.Generator().manual_seed(0)

        def steps(features: Window | Features, labels: torch.Tensor, count: int) -> None:
            at = torch.randint(count, (STEPS * settings.batch,), generator=draw)
            configs = [TrainConfig(1, 0.001 * (i + 1), batch_size=settings.batch) for i in range(settings.points)]
            models = [FromFeatures(_tuned(bank, settings)).train() for _ in configs]
            train(Stack(models), features, labels, [Point(config, at) for config in configs])

        steps(read, read.labels, len(read))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        rows = min(IN_MEMORY, settings.items)
        held = read.batch(torch.arange(rows))
        calls = {
            "from memory": lambda: steps(held, read.labels[:rows], rows),
            "through a window": lambda: steps(read, read.labels, len(read)),
        }
        measured.seconds(in_turn(calls, settings.rounds), "steps", dict.fromkeys(calls, STEPS))
        measured.samples["through a window"] |= {"peak_bytes": [peak], "bank_bytes": [made]}
    measured.against("from memory")
    measured.against("from memory", "steps_per_second")
    return measured


def _tuned(bank: Bank, settings: Bench) -> Tuned:
    tuned = bank.tuned(describe_backbone(settings.backbone))
    tuned.add_adapter("default", "bypass", settings.classes)
    return tuned


def sparse_bank(out: Path, settings: Bench) -> int:
    """A bank of zeros in files that are mostly holes; its bytes.

    Args:
        out: an empty folder.
        settings: of which the backbone, described and not loaded, the items and the classes are read.
    """
    described = describe_backbone(settings.backbone)
    tuned, how = adapt(described, "bypass", settings.classes), reading_of(described, settings.image_size)
    sites, numbers = tuned.sites, numbers_kept(tuned, None)
    state = {
        f"{path}.{key}": torch.ones(value.shape)
        for path in (*sites.norm, *sites.post)
        for key, value in tuned.backbone.get_submodule(path).state_dict().items()
    }
    tail, shards, total = save(state), [], 0
    (out / TAIL).write_bytes(tail)
    for start in range(0, settings.items, SHARD_ROWS):
        rows = min(SHARD_ROWS, settings.items - start)
        shapes = {str(number): (rows, 1, sites.features[number].out_features) for number in numbers}
        file = f"train-0-{start // SHARD_ROWS:05d}.safetensors"
        size = _sparse(out / file, shapes, torch.arange(start, start + rows) % settings.classes)
        shards.append(Shard(file, "train", 0, rows, size, "0" * 64))
        total += size
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "backbone": {**tuned.adapter_config().backbone, "fingerprint": None},
        "weights_sha256": "0" * 64,
        "preprocessing": how.to_dict(),
        "data": {
            "spec": "zeros",
            "classes": [str(i) for i in range(settings.classes)],
            "kind": "single-label",
            "splits": {"train": {"count": settings.items, "sha256": "0" * 64}},
        },
        "layers": numbers,
        "view": asdict(tokens_kept(tuned, None)),
        "pool": tuned.adapter_config().pool,
        "dtype": "float16",
        "views": 1,
        "seed": 0,
        "tail_sha256": hashlib.sha256(tail).hexdigest(),
        "shards": [asdict(shard) for shard in shards],
    }
    atomic_write(out / MANIFEST, as_json(manifest))
    return total


def _sparse(file: Path, shapes: dict[str, tuple[int, int, int]], labels: torch.Tensor) -> int:
    """A safetensors file: its header and the labels, and a hole for the rest; its size."""
    header: dict[str, Any] = {
        "labels": {"dtype": "I64", "shape": [len(labels)], "data_offsets": [0, end := labels.nbytes]}
    }
    for name, (rows, tokens, width) in shapes.items():
        start, end = end, end + 2 * rows * tokens * width
        header[name] = {"dtype": "F16", "shape": [rows, tokens, width], "data_offsets": [start, end]}
    text = as_json(header)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text + labels.numpy().tobytes())
        opened.truncate(8 + len(text) + end)
    return 8 + len(text) + end
