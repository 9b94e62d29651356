"""Build a bank: one pass of the backbone over a data set."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning._version import __version__
from restuning.data import Reading, Task, prepared
from restuning.errors import CheckpointError, RestuningError, line
from restuning.features.bank.format import (
    COMPONENTS,
    DTYPES,
    FIRST_SUMMARY,
    FORMAT,
    MANIFEST,
    MASK,
    PARTIAL,
    PIXELS,
    SHARD_ROWS,
    TAIL,
    Shard,
    _hash_of_data,
    _hash_of_tensors,
    _hash_of_weights,
    _intact,
    _write,
    numbered,
)
from restuning.features.memory import compute_features
from restuning.model.tuned import Tuned
from restuning.side.features import Features, TokenSelection
from restuning.training.components import Components
from restuning.training.evaluate import Examples, HasEpoch, by_length
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
    components: Components | None = None,
    resume: bool = False,
    seen: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Tap the backbone on every item of `task` once (training images `views` times, augmented, if more than 1).

    tuned: a backbone with one adapter active that reads features, whose layers and tokens are kept. Killed, it goes on
    with `resume` and ends in the same bytes. `seen(done, of)` counts items. Returns the manifest.
    components: of every token, these are kept, and of every layer the summary besides.
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
        "layers": numbers_kept(tuned, components),
        "view": asdict(tokens_kept(tuned, components)),
        "pool": tuned.adapter_config().pool,
        "dtype": dtype,
        "views": views,
        "seed": seed,
        **({"components_sha256": _hash_of_tensors(components.state())} if components else {}),
        **(about or {}),
    }
    shards: list[Shard] = []
    try:
        with locked(out):
            done = _begin(out, plan, resume)
            total = sum(len(items) * (views if name == "train" else 1) for name, items in splits.items())
            count = 0
            _write(out / TAIL, _tail_state(tuned))
            if components is not None:
                _write(out / COMPONENTS, components.state())
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
                            tensors = _tensors(tuned, examples, rows, dtype, batch_size, components)
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
    own = (".lock", TAIL, COMPONENTS)
    held = sorted(p.name for p in out.iterdir() if p.name not in own and not p.name.endswith(".tmp"))
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


def tokens_kept(tuned: Tuned, components: Components | None) -> TokenSelection:
    """The tokens that a bank has of each layer."""
    if components is None:
        return tuned.request.tokens
    return TokenSelection("components", tuned.sites.info.grid or 0, components.count)


def numbers_kept(tuned: Tuned, components: Components | None) -> list[int]:
    """What a bank has of each item, by the numbers of `numbered`."""
    request = tuned.request
    found = [*request.layers, *([MASK] if request.mask else []), *([PIXELS] if request.pixels else [])]
    if components is not None:
        found += [FIRST_SUMMARY - layer for layer in components.bases]
    return sorted(int(number) for number in found)


def bytes_kept(tuned: Tuned, examples: Examples, dtype: str, components: Components | None = None) -> int:
    """Bytes that one example takes in a bank, of the longest if they differ in length."""
    longest = by_length(examples, range(len(examples)))[-1:]
    kept = _tensors(tuned, examples, longest, dtype, 1, components)
    return sum(x.nbytes for name, x in kept.items() if name != "labels")


def _tensors(
    tuned: Tuned,
    examples: Examples,
    rows: Sequence[int],
    dtype: str,
    batch_size: int,
    components: Components | None = None,
) -> dict[str, Tensor]:
    """A shard's tensors, by name."""

    def change(features: Features) -> Features:
        return features if components is None else components.of(features, tuned.sites.info.grid or 0)

    features, labels = compute_features(tuned, examples, rows, batch_size, DTYPES[dtype], change)
    kept = {str(number): x for number, x in numbered(features).items()}
    for number, x in kept.items():
        if not x.isfinite().all():
            raise RestuningError(f"layer {number} has values that {dtype} cannot hold: choose another dtype")
    if dtype == "int8":
        kept = {key: value for name, x in kept.items() for key, value in _quantised(name, x).items()}
    return {**kept, "labels": labels}


def _quantised(name: str, x: Tensor) -> dict[str, Tensor]:
    """Every token by a scale of its own, its largest entry being 127 of it."""
    if not x.is_floating_point():
        return {name: x}
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-7).half()
    return {name: (x / scale.float()).round().clamp(-127, 127).to(torch.int8), f"{name}.scale": scale}


def _tail_state(tuned: Tuned) -> dict[str, Tensor]:
    """Parameters and buffers of the modules after the features, by their paths in the backbone."""
    sites = tuned.sites
    return {
        f"{path}.{key}": value.detach().cpu().contiguous()
        for path in (*sites.norm, *sites.post, *filter(None, [sites.pooler]))
        for key, value in tuned.backbone.get_submodule(path).state_dict().items()
    }
