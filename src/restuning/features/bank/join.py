"""Banks told about, and put together: of one backbone and one way of reading, items of several."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from restuning.errors import RestuningError
from restuning.features.bank.format import MANIFEST, Shard
from restuning.features.bank.read import Bank
from restuning.utils.files import as_json, atomic_write, contents, locked

SAME = ("weights_sha256", "preprocessing", "layers", "view", "pool", "dtype", "views", "components_sha256")
"""What banks have to agree in to be one, besides classes and the kind of task."""


def info(path: str | Path) -> dict[str, Any]:
    """What a bank holds: of which data and backbone, which layers and tokens, items by split, bytes on disk, of an item
    and in memory. Raises CheckpointError for one that is not there, or not finished."""
    bank = Bank(path, verify=False)
    m, size = bank.manifest, sum(shard.bytes for shard in bank.shards)
    rows = sum(shard.rows for shard in bank.shards)
    return {
        "data": m["data"]["spec"],
        "backbone": m["backbone"]["name"],
        "items": bank.splits,
        "views": bank.views,
        "classes": len(m["data"]["classes"]),
        "kind": m["data"].get("kind", "single-label"),
        "layers": bank.layers,
        "tokens": bank.tokens.tokens,
        "dtype": m["dtype"],
        "shards": len(bank.shards),
        "bytes": size,
        "bytes_of_an_item": size // max(1, rows),
        "bytes_in_memory": bank.bytes,
        "version": m["version"],
    }


def merge(paths: Sequence[str | Path], out: Path) -> dict[str, Any]:
    """A new bank of the items of several, split by split, in their order; files are linked where they can be. Returns
    its manifest.

    Raises RestuningError for fewer than two, for banks that do not go together, and for a folder that is not empty.
    """
    banks = [Bank(path) for path in paths]
    if len(banks) < 2:
        raise RestuningError("merging banks needs two at least")
    for other in banks[1:]:
        _agree(banks[0], other)
    with locked(out):
        if contents(out):
            raise RestuningError(f"{out} is not empty ({', '.join(contents(out)[:3])}): choose another folder")
        _files_besides(banks[0], out)
        return _joined(banks, out, [])


def append(path: Path, more: str | Path) -> dict[str, Any]:
    """Add the items of another bank to one, in place: until its manifest is replaced, in one move, it is as it was.
    Returns the manifest. Raises as `merge`."""
    with locked(path):
        bank, other = Bank(path), Bank(more)
        _agree(bank, other)
        return _joined([bank, other], path, bank.shards)


def _agree(a: Bank, b: Bank) -> None:
    """Raises RestuningError for the first thing in which they differ."""
    for key in SAME:
        if a.manifest.get(key) != b.manifest.get(key):
            raise RestuningError(f"{a.path} and {b.path} do not go together: they differ in {key}")
    for key in ("classes", "kind"):
        if a.manifest["data"].get(key) != b.manifest["data"].get(key):
            raise RestuningError(f"{a.path} and {b.path} do not go together: they differ in the data's {key}")
    for bank in (a, b):
        if bank.manifest["data"].get("held"):
            raise RestuningError(f"{bank.path} has training items that are held for validation: it stays alone")


def _joined(banks: Sequence[Bank], out: Path, there: Sequence[Shard]) -> dict[str, Any]:
    """there: shards that `out` has already."""
    taken, shards = {shard.file for shard in there}, list(there)
    for bank in banks[bool(there) :]:
        for shard in bank.shards:
            number = sum((s.split, s.view) == (shard.split, shard.view) for s in shards)
            file = f"{shard.split}-{shard.view}-{number:05d}.safetensors"
            if file in taken:
                raise RestuningError(f"{out} has a shard {file} out of its order")
            _link(bank.path / shard.file, out / file)
            shards.append(replace(shard, file=file))
    first = banks[0].manifest
    specs = [str(bank.manifest["data"]["spec"]) for bank in banks]
    splits = {}
    for name in dict.fromkeys(name for bank in banks for name in bank.splits):
        parts = [bank.manifest["data"]["splits"][name] for bank in banks if name in bank.splits]
        digest = hashlib.sha256("\n".join(part["sha256"] for part in parts).encode()).hexdigest()
        splits[name] = {"count": sum(int(part["count"]) for part in parts), "sha256": digest}
    data = {**first["data"], "spec": " + ".join(specs), "splits": splits}
    manifest = {**first, "data": data, "test_size": None, "shards": [asdict(shard) for shard in shards]}
    atomic_write(out / MANIFEST, as_json(manifest))
    return manifest


def _files_besides(bank: Bank, out: Path) -> None:
    """What a bank has besides shards and manifest: its tail."""
    own = {MANIFEST, *(shard.file for shard in bank.shards)}
    for name in contents(bank.path):
        if name not in own:
            shutil.copy(bank.path / name, out / name)


def _link(file: Path, to: Path) -> None:
    to.unlink(missing_ok=True)  # of a merge that was killed
    try:
        os.link(file, to)
    except OSError:
        shutil.copy(file, to)
