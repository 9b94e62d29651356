"""Build a bank: one pass of the backbone over a data set."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    RECORD,
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
from restuning.utils.distributed import barrier, is_main_process, rank, world_size
from restuning.utils.files import as_json, atomic_write, locked
from restuning.utils.reading import read_json


@dataclass(frozen=True)
class Piece:
    """Items of a bank that become one shard: rows start to stop of a split's view."""

    file: str
    split: str
    view: int
    start: int
    stop: int


class Builder:
    """What makes the shards of a bank, in this process or in another: a piece is done once its record lies beside it.

    Args: as those of `build`.
    """

    def __init__(
        self,
        tuned: Tuned,
        task: Task,
        preprocess: Reading,
        *,
        dtype: str = "float32",
        views: int = 1,
        seed: int = 0,
        batch_size: int = 32,
        components: Components | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise RestuningError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if views < 1:
            raise RestuningError(f"views {views}: expected at least 1")
        if task.kind == "per-token":
            raise RestuningError(f"{task.spec}: a bank keeps one label for each item, and these are by token")
        self.tuned, self.task, self.preprocess, self.dtype = tuned, task, preprocess, dtype
        self.views, self.seed, self.batch_size, self.components = views, seed, batch_size, components
        self.splits = {name: items for name in ("train", "val", "test") if (items := getattr(task, name)) is not None}
        self._examples: tuple[str, Examples] | None = None

    def pieces(self) -> list[Piece]:
        """All of it, in order."""
        return [
            Piece(f"{name}-{view}-{start // SHARD_ROWS:05d}.safetensors", name, view, start, stop)
            for name, items in self.splits.items()
            for view in range(self.views if name == "train" else 1)
            for start in range(0, len(items), SHARD_ROWS)
            for stop in [min(start + SHARD_ROWS, len(items))]
        ]

    def shard(self, out: Path, piece: Piece) -> Shard:
        """Made and recorded, or as another process has recorded it."""
        record = out / f"{piece.file}{RECORD}"
        if not record.exists():
            examples, rows = self._of(piece.split), range(piece.start, piece.stop)
            if isinstance(examples, HasEpoch):
                examples.set_epoch(piece.view)
            tensors = _tensors(self.tuned, examples, rows, self.dtype, self.batch_size, self.components)
            data = _write(out / piece.file, tensors)
            digest = hashlib.sha256(data).hexdigest()
            atomic_write(
                record, as_json(asdict(Shard(piece.file, piece.split, piece.view, len(rows), len(data), digest)))
            )
        return Shard(**read_json(record))

    def _of(self, split: str) -> Examples:
        if self._examples is None or self._examples[0] != split:
            augmented = self.views > 1 and split == "train"
            self._examples = split, prepared(self.splits[split], self.preprocess, augmented, self.seed, cache=False)
        return self._examples[1]


Run = Callable[[Sequence[Piece]], Iterable[Shard]]


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
    run: Run | None = None,
) -> dict[str, Any]:
    """Tap the backbone on every item of `task` once (training images `views` times, augmented, if more than 1).

    tuned: a backbone with one adapter active that reads features, whose layers and tokens are kept. Killed, it goes on
    with `resume` and ends in the same bytes. `seen(done, of)` counts items. Returns the manifest.
    components: of every token, these are kept, and of every layer the summary besides.
    run: makes the shards of pieces elsewhere, and gives each as it is done; None: here, or in all processes that
    `accelerate launch` has started, each its share.
    Where every token of texts is kept, the shorter ones of a shard are padded, and the attention mask is kept too.
    Raises RestuningError for labels by token, for an output folder that is in use or holds something else, or a disk
    that is full.
    """
    builder = Builder(
        tuned, task, preprocess, dtype=dtype, views=views, seed=seed, batch_size=batch_size, components=components
    )
    pieces = builder.pieces()
    if not is_main_process():
        barrier()
        for piece in pieces[rank() :: world_size()]:
            builder.shard(out, piece)
        barrier()
        return {}
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
            "splits": {name: _hash_of_data(items) for name, items in builder.splits.items()},
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
    shards: dict[str, Shard] = {}
    try:
        with locked(out):
            shards |= _begin(out, plan, resume)
            total = sum(piece.stop - piece.start for piece in pieces)
            _write(out / TAIL, _tail_state(tuned))
            if components is not None:
                _write(out / COMPONENTS, components.state())
            barrier()
            left = [piece for piece in pieces[:: world_size()] if piece.file not in shards]
            for shard in run(left) if run else (builder.shard(out, piece) for piece in left):
                shards[shard.file] = shard
                seen(sum(shard.rows for shard in shards.values()), total)
            barrier()
            made = [builder.shard(out, piece) for piece in pieces]
            tail = hashlib.sha256((out / TAIL).read_bytes()).hexdigest()
            manifest = {**plan, "tail_sha256": tail, "shards": [asdict(shard) for shard in made]}
            atomic_write(out / PARTIAL, as_json(manifest))
            for piece in pieces:
                (out / f"{piece.file}{RECORD}").unlink()
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
    shards: list[Shard] = []
    if (out / PARTIAL).exists():
        try:
            before = read_json(out / PARTIAL)
            shards = [Shard(**shard) for shard in before.pop("shards", [])]
            shards += [Shard(**read_json(record)) for record in sorted(out.glob(f"*{RECORD}"))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{out / PARTIAL} is damaged: {line(error)}") from error
        now = json.loads(json.dumps(plan))
        other = [key for key in now if before.get(key) != now[key]]
        if other:
            raise RestuningError(f"{out} holds an unfinished bank of another {', '.join(other)}: choose another folder")
    for record in out.glob(f"*{RECORD}"):
        record.unlink()
    atomic_write(out / PARTIAL, as_json(plan))
    found = {shard.file: shard for shard in shards if _intact(out, shard)}
    for shard in found.values():
        atomic_write(out / f"{shard.file}{RECORD}", as_json(asdict(shard)))
    return found


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


def seconds_each(
    tuned: Tuned, examples: Examples, dtype: str, batch_size: int, components: Components | None = None
) -> float:
    """Seconds that one example takes, of a batch of them."""
    rows, start = range(min(batch_size, len(examples))), time.perf_counter()
    _tensors(tuned, examples, rows, dtype, batch_size, components)
    return (time.perf_counter() - start) / len(rows)


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
