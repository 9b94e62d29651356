"""Banks larger than memory: rows read when a step asks for them, in their own dtype, a few batches ahead."""

import json
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.errors import CheckpointError, line
from restuning.features.bank.format import _wide, unnumbered
from restuning.features.bank.read import Bank
from restuning.side.features import Features
from restuning.training.evaluate import padded

AHEAD = 2
"""Batches that are read while others are trained on."""

FILES = 256
"""Files that are open at a time, at most."""

_SAFETENSORS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool}


class Window:
    """The rows of all splits of a bank, one after the other, of which no more is in memory than what is asked for.

    Files are read, not mapped: what was read counts as the system's cache, and not as this process's memory.

    Args:
        bank: of which the first view is read.
        layers: those that are read, among the bank's; None: all of it.
        change: applied to what is read of a batch: fewer of its tokens.
    """

    def __init__(
        self,
        bank: Bank,
        layers: Sequence[int] | None = None,
        change: Callable[[Features], Features] | None = None,
    ) -> None:
        self.change, self.tokens = change, bank.tokens
        self.numbers = [n for n in bank.numbers if n < 0 or layers is None or n in layers]
        self.offsets: dict[str, int] = {}
        self._files: list[Path] = []
        starts, labels, start = [], [], 0
        for split in bank.splits:
            self.offsets[split] = start
            for shard in bank.rows(split).shards:
                self._files.append(bank.path / shard.file)
                starts.append(start)
                start += shard.rows
        self.starts, self.count = torch.tensor(starts), start
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        for i in range(len(self._files)):
            labels.append(self._shard(i).read("labels", range(self._shard(i).rows)))
        self.labels = torch.cat(labels)

    def __len__(self) -> int:
        return self.count

    def batch(self, at: Tensor) -> Features:
        """Features of rows `at` (…), (…, tokens, width) a layer, in single precision if they lie in half; equal rows
        are read once."""
        rows, back = at.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        which = torch.searchsorted(self.starts, rows, right=True) - 1
        parts: dict[int, list[Tensor]] = {number: [] for number in self.numbers}
        for k in sorted(set(which.tolist())):
            shard, mine = self._shard(k), (rows[which == k] - self.starts[k]).tolist()
            for number, part in parts.items():
                scale = f"{number}.scale"  # of tokens that are quantised, each by its own
                x = shard.read(str(number), mine)
                part.append(x.float() * shard.read(scale, mine).float() if scale in shard.tensors else x)
        read = unnumbered({number: _wide(padded(part)) for number, part in parts.items()}, self.tokens)
        read = read.trimmed()
        return (read if self.change is None else self.change(read)).rows(back)

    def batches(self, asked: Iterable[Tensor]) -> Iterator[tuple[Tensor, Features]]:
        """(rows, their features), in order, read ahead by a thread."""
        waiting: deque[tuple[Tensor, Future[Features]]] = deque()
        with ThreadPoolExecutor(1) as reader:
            try:
                for at in asked:
                    waiting.append((at, reader.submit(self.batch, at)))
                    if len(waiting) > AHEAD:
                        rows, found = waiting.popleft()
                        yield rows, found.result()
                while waiting:
                    rows, found = waiting.popleft()
                    yield rows, found.result()
            finally:
                for _, left in waiting:
                    left.cancel()

    def _shard(self, k: int) -> "_Shard":
        if k not in self._open:
            self._open[k] = _Shard(self._files[k])
            if len(self._open) > FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(k)
        return self._open[k]


class _Shard:
    """A safetensors file, of which rows are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.handle = os.open(path, os.O_RDONLY)
            size = int.from_bytes(os.pread(self.handle, 8, 0), "little")
            header: dict[str, Any] = json.loads(os.pread(self.handle, size, 8))
            self.base = 8 + size
            self.tensors = {
                name: (_SAFETENSORS[of["dtype"]], of["shape"], of["data_offsets"][0])
                for name, of in header.items()
                if name != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path} cannot be read: {line(error)}") from error
        self.rows = int(self.tensors["labels"][1][0])

    def read(self, name: str, rows: Sequence[int]) -> Tensor:
        """Rows in rising order, (rows, …); those that follow one another are read at once."""
        dtype, shape, offset = self.tensors[name]
        out = torch.empty(len(rows), *shape[1:], dtype=dtype)
        each = out[0].nbytes if len(rows) else 0
        into = memoryview(out.view(torch.uint8).numpy().data).cast("B") if each else memoryview(b"")
        done = 0
        for _, run in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
            together = [row for _, row in run]
            size = each * len(together)
            got = os.preadv(self.handle, [into[done : done + size]], self.base + offset + each * together[0])
            if got != size:
                raise CheckpointError(f"{self.path} is damaged: it ends within {name}")
            done += size
        return out

    def close(self) -> None:
        os.close(self.handle)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            try:
                os.close(self.handle)
            except OSError:  # it was closed
                return
