"""Build a bank: one pass of the backbone over a data set."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning._version import __version__
from restuning.data import Reading, Task, prepared
from restuning.errors import CheckpointError, RestuningError, line
from restuning.features.bank.format import (
    DTYPES,
    FORMAT,
    MANIFEST,
    PARTIAL,
    SHARD_ROWS,
    TAIL,
    Shard,
    _hash_of_data,
    _hash_of_weights,
    _intact,
    _write,
)
from restuning.features.memory import tapped
from restuning.model.tuned import Tuned
from restuning.training.evaluate import Examples, HasEpoch
from restuning.utils.files import as_json, atomic_write, locked


def build(
    tuned: Tuned,
    task: Task,
    preprocess: Reading,
    out: Path,
    *,
    dtype: str = "float32",
    views: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    seen: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Tap the backbone on every item of `task` once (training images `views` times, augmented, if more than 1).

    tuned: a backbone with one adapter active that reads features, whose layers and tokens are kept. Killed, it goes on
    with `resume` and ends in the same bytes. `seen(done, of)` counts items. Returns the manifest.
    Where every token of texts is kept, the shorter ones of a shard are padded, and the attention mask is kept too.
    Raises RestuningError for labels by token, for an output folder that is in use or holds something else, or a disk
    that is full.
    """
    if dtype not in DTYPES:
        raise RestuningError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if views < 1:
        raise RestuningError(f"views {views}: expected at least 1")
    if task.kind == "per-token":
        raise RestuningError(f"{task.spec}: a bank keeps one label for each item, and these are by token")
    splits = {name: items for name in ("train", "val", "test") if (items := getattr(task, name)) is not None}
    plan = {
        "format": FORMAT,
        "version": __version__,
        "backbone": dict(tuned.adapter_config().backbone),
        "weights_sha256": _hash_of_weights(tuned.backbone),
        "preprocessing": preprocess.to_dict(),
        "data": {
            "spec": task.spec,
            "classes": list(task.classes),
            "kind": task.kind,
            "splits": {name: _hash_of_data(items) for name, items in splits.items()},
            **({"held": task.held} if task.held else {}),
        },
        "layers": [int(layer) for layer in tuned._layers()],
        "view": asdict(tuned._live()),
        "pool": tuned.adapter_config().pool,
        "dtype": dtype,
        "views": views,
        "seed": seed,
        **(about or {}),
    }
    shards: list[Shard] = []
    try:
        with locked(out):
            done = _begin(out, plan, resume)
            total = sum(len(items) * (views if name == "train" else 1) for name, items in splits.items())
            count = 0
            _write(out / TAIL, _tail_state(tuned))
            for name, items in splits.items():
                for view in range(views if name == "train" else 1):
                    examples = prepared(items, preprocess, views > 1 and name == "train", seed, cache=False)
                    if isinstance(examples, HasEpoch):
                        examples.set_epoch(view)
                    for start in range(0, len(items), SHARD_ROWS):
                        rows = range(start, min(start + SHARD_ROWS, len(items)))
                        file = f"{name}-{view}-{start // SHARD_ROWS:05d}.safetensors"
                        shard = done.get(file)
                        if shard is None or not _intact(out, shard):
                            tensors = _tapped(tuned, examples, rows, DTYPES[dtype], batch_size)
                            data = _write(out / file, tensors)
                            shard = Shard(file, name, view, len(rows), len(data), hashlib.sha256(data).hexdigest())
                        shards.append(shard)
                        atomic_write(out / PARTIAL, as_json({**plan, "shards": [asdict(s) for s in shards]}))
                        count += len(rows)
                        seen(count, total)
            tail = hashlib.sha256((out / TAIL).read_bytes()).hexdigest()
            manifest = {**plan, "tail_sha256": tail, "shards": [asdict(shard) for shard in shards]}
            atomic_write(out / PARTIAL, as_json(manifest))
            (out / PARTIAL).replace(out / MANIFEST)  # one move: a bank is either finished or not
            return manifest
    except OSError as error:
        raise RestuningError(
            f"cannot write to {out}: {error.strerror or error}; the {len(shards)} shards before it are kept, "
            "continue with --resume"
        ) from error


def _begin(out: Path, plan: Mapping[str, Any], resume: bool) -> dict[str, Shard]:
    """The shards that an earlier, unfinished build left. Raises RestuningError where it was another, or finished."""
    if (out / MANIFEST).exists():
        raise RestuningError(f"{out} holds a finished bank: choose another folder")
    held = sorted(p.name for p in out.iterdir() if p.name not in (".lock", TAIL) and not p.name.endswith(".tmp"))
    if held and not resume:
        raise RestuningError(f"{out} is not empty ({', '.join(held[:3])}): continue with --resume, or choose another")
    if not (out / PARTIAL).exists():
        return {}
    try:
        before = json.loads((out / PARTIAL).read_text(encoding="utf-8"))
        shards = {shard["file"]: Shard(**shard) for shard in before.pop("shards")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{out / PARTIAL} is damaged: {line(error)}") from error
    now = json.loads(json.dumps(plan))
    other = [key for key in now if before.get(key) != now[key]]
    if other:
        raise RestuningError(f"{out} holds an unfinished bank of another {', '.join(other)}: choose another folder")
    return shards


def _tapped(tuned: Tuned, examples: Examples, rows: range, dtype: torch.dtype, batch_size: int) -> dict[str, Tensor]:
    features, labels = tapped(tuned, examples, rows, batch_size, dtype)
    kept = {str(layer): x for layer, x in zip(tuned._layers(), features, strict=True)}
    for layer, x in kept.items():
        if not x.isfinite().all():
            raise RestuningError(f"layer {layer} has values that {dtype} cannot hold: choose another dtype")
    return {**kept, "labels": labels}


def _tail_state(tuned: Tuned) -> dict[str, Tensor]:
    """Parameters and buffers of the modules after the features, by their paths in the backbone."""
    sites = tuned._sites
    return {
        f"{path}.{key}": value.detach().cpu().contiguous()
        for path in (*sites.norm, *sites.post, *filter(None, [sites.pooler]))
        for key, value in tuned.backbone.get_submodule(path).state_dict().items()
    }
