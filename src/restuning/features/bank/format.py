"""A bank's files: names, shards, checksums."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning.data import Items
from restuning.data.objective import KINDS
from restuning.errors import CheckpointError, MissingExtra
from restuning.side.features import Features, TokenSelection
from restuning.utils.files import atomic_write
from restuning.utils.reading import inside, number, open_regular

FORMAT = "restuning.bank/1"
MANIFEST, PARTIAL, TAIL = "manifest.json", "partial.json", "tail.safetensors"
COMPONENTS = "components.safetensors"
RECORD = ".done.json"  # of a shard, after its file's name, while a bank is built
SHARD_ROWS = 1024
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int8": torch.float32,  # as it is before each token is quantised by a scale of its own
}


MASK, PIXELS, FIRST_SUMMARY = -2, -1, -3
"""The numbers that files have in place of a layer's: the attention mask, the backbone's input, and the summary of
layer l at −3 − l."""


def numbered(features: Features) -> dict[int, Tensor]:
    """Features by the numbers that files have for them, in their order."""
    found = dict(features.layers)
    if features.mask is not None:
        found[MASK] = features.mask
    if features.pixels is not None:
        found[PIXELS] = features.pixels
    found |= {FIRST_SUMMARY - layer: x for layer, x in features.summaries.items()}
    return dict(sorted(found.items()))


def unnumbered(found: Mapping[int, Tensor], tokens: TokenSelection) -> Features:
    """The inverse of `numbered`."""
    return Features(
        {number: x for number, x in found.items() if number >= 0},
        tokens,
        found.get(MASK),
        found.get(PIXELS),
        {FIRST_SUMMARY - number: x for number, x in found.items() if number <= FIRST_SUMMARY},
    )


@dataclass(frozen=True)
class Shard:
    file: str
    split: str
    view: int
    rows: int
    bytes: int
    sha256: str


def check_manifest(path: Path, found: Any) -> None:
    """Raises CheckpointError for another format, ValueError, KeyError or TypeError for what no bank of ours says."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(f"{path} is of another format: {kind!r}, expected {FORMAT!r}")
    data, backbone, layers = found["data"], found["backbone"], found["layers"]
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"layers are {layers!r}: expected numbers of blocks")
    for layer in layers:
        number(layer, -100_000, 100_000, "a layer", whole=True)
    for shard in found["shards"]:
        inside(path, shard["file"])
        if shard["split"] not in data["splits"] or not isinstance(shard["sha256"], str):
            raise ValueError(f"a shard of the split {shard['split']!r}")
        number(shard["rows"], 1, SHARD_ROWS, "a shard's rows", whole=True)
        number(shard["bytes"], 1, 2**50, "a shard's bytes", whole=True)
        number(shard["view"], 0, 2**31, "a shard's view", whole=True)
    for name, split in data["splits"].items():
        rows = sum(s["rows"] for s in found["shards"] if s["split"] == name and s["view"] == 0)
        if name not in ("train", "val", "test") or number(split["count"], 1, 2**50, "count", whole=True) != rows:
            raise ValueError(f"the {name} split has {split['count']} items, its shards {rows} rows")
    if "train" not in data["splits"] or found["dtype"] not in DTYPES:
        raise ValueError(f"no training split, or dtype {found['dtype']!r}")
    if not isinstance(data["classes"], list) or not all(
        isinstance(name, str | int | float) for name in data["classes"]
    ):
        raise ValueError("classes: expected a list of names")
    if not isinstance(data["spec"], str) or data.get("kind", KINDS[0]) not in KINDS:
        raise ValueError("the data have no name, or no kind that is known")
    number(data.get("held", 0), 0, 2**50, "held", whole=True)
    number(found["views"], 1, 2**31, "views", whole=True)
    number(backbone["width"], 1, 2**31, "the backbone's width", whole=True)
    number(backbone["depth"], 1, 2**31, "the backbone's depth", whole=True)
    if not isinstance(backbone["name"], str) or not isinstance(found.get("source", {}), dict):
        raise ValueError("the backbone has no name")
    view = found["view"]
    if view.get("components") is not None:
        number(view["components"], 1, 100_000, "components", whole=True)
    if view["tokens"] not in ("all", "first", "last", "mean", "pooled", "components"):
        number(view["tokens"], 1, 4096, "the cells a side of a grid", whole=True)
    number(view["prefix"], 0, 4096, "prefix", whole=True)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _write(path: Path, tensors: Mapping[str, Tensor]) -> bytes:
    data = _bytes(tensors)
    atomic_write(path, data)
    return data


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    data: bytes = save(dict(tensors))
    return data


def _intact(out: Path, shard: Shard) -> bool:
    with suppress(OSError):
        return _hash_of_file(out / shard.file) == shard.sha256
    return False


def _hash_of_file(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(_bytes(tensors)).hexdigest()


def _hash_of_weights(backbone: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        data = value.detach().cpu().flatten().contiguous()
        digest.update(data.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def _hash_of_data(items: Items) -> dict[str, Any]:
    digest = hashlib.sha256()
    texts = len(items) > 0 and isinstance(items.item(0), tuple)
    for i, (name, label) in enumerate(zip(items.names, items.labels, strict=True)):
        digest.update(f"{name} {label} {items.item(i) if texts else ''}\n".encode())
    return {"count": len(items), "sha256": digest.hexdigest()}
