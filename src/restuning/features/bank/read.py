"""A bank on disk: a frozen backbone's live features, tapped once, read at random ever after.

A folder of safetensors shards, memory-mapped when read: `train-0-00000.safetensors` holds rows 0 … of the first view of
the training items, one tensor a layer, (rows, tokens, width), and `labels`. `tail.safetensors` holds what follows the
features in the backbone; `manifest.json`, written last, records what all of it is made of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning.data import Items, Source
from restuning.errors import CheckpointError, DataError, RestuningError, line
from restuning.features.bank.format import (
    COMPONENTS,
    MANIFEST,
    MASK,
    PARTIAL,
    PIXELS,
    TAIL,
    Shard,
    _hash_of_file,
    _wide,
    check_manifest,
    unnumbered,
)
from restuning.features.memory import CachedFeatures
from restuning.methods.spec import Method, side_of, with_components
from restuning.model.files import check_finite
from restuning.model.tuned import Tuned
from restuning.side.features import ALL, Features, TokenSelection
from restuning.training.components import Components
from restuning.training.evaluate import padded
from restuning.utils.reading import check_regular, read_json

_NAMES = {MASK: "the attention mask", PIXELS: "the pixels"}


class Bank:
    """A bank that was built: `rows(split)` as a data set, `source()` as labels to draw splits from, `onto(tuned)`.

    Opening it reads every shard once and compares checksums (`verify=False`: sizes alone). Raises CheckpointError
    for a bank that is not there, not finished, damaged, or of another format.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path = Path(path)
        try:
            found = read_json(self.path / MANIFEST)
            check_manifest(self.path, found)
            self.shards = [Shard(**shard) for shard in found["shards"]]
            self.tokens = TokenSelection(**found["view"])
            self.numbers: list[int] = list(found["layers"])
            self.layers = [number for number in self.numbers if number >= 0]
            splits = found["data"]["splits"]
            self.preprocessing: dict[str, Any] = dict(found["preprocessing"])
        except RestuningError:
            raise
        except FileNotFoundError as error:
            unfinished = (self.path / PARTIAL).exists()
            why = "it is not finished, continue with --resume" if unfinished else f"it has no {MANIFEST}"
            raise CheckpointError(f"{path} is no bank: {why}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{self.path / MANIFEST} is damaged: {line(error)}") from error
        self.manifest: dict[str, Any] = found
        self.splits: dict[str, int] = {name: int(split["count"]) for name, split in splits.items()}
        for file, size, digest in [
            *((shard.file, shard.bytes, shard.sha256) for shard in self.shards),
            (TAIL, None, found.get("tail_sha256")),
            *([(COMPONENTS, None, found["components_sha256"])] if "components_sha256" in found else []),
        ]:
            self._check(file, size, digest if verify or size is None else None)
        self._open: dict[str, dict[str, Tensor]] = {}

    def _check(self, file: str, size: int | None, digest: str | None) -> None:
        try:
            there = (self.path / file).stat().st_size
            if size is not None and there != size:
                raise CheckpointError(f"{self.path / file} is damaged: {there} bytes, expected {size}")
            if digest is not None and _hash_of_file(self.path / file) != digest:
                raise CheckpointError(f"{self.path / file} is damaged: its checksum is not the manifest's")
        except OSError as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error.strerror or error}") from error

    @property
    def bytes(self) -> int:
        """Of all rows, as they are read: what is kept in half precision is read in single."""
        more = {"float16": 2, "bfloat16": 2, "int8": 4}.get(self.manifest["dtype"], 1)
        return more * sum(shard.bytes for shard in self.shards)

    @property
    def views(self) -> int:
        return int(self.manifest["views"])

    def rows(self, split: str, view: int = 0) -> "Rows":
        return Rows(self, split, view)

    def source(self) -> Source:
        """Labels and names of its items, from which `restuning.data` draws splits as it does from images and texts."""
        made = {name: Banked(self.rows(name), name) for name in self.splits}
        data = self.manifest["data"]
        kind = data.get("kind", Source.kind)  # older banks hold this one kind
        held = data.get("held", 0)
        return Source(tuple(data["classes"]), made["train"], made.get("val"), made.get("test"), kind, held)

    def accepts(self, tuned: Tuned) -> None:
        """Raises CheckpointError if the active adapters need more of the backbone than what is kept here."""
        if not tuned.reads_features:
            raise CheckpointError(f"{self.path} holds features: a method that acts inside the backbone cannot use them")
        for name in tuned.active_adapters:
            adapter = tuned.adapter(name)
            wanted, side = adapter.request.tokens, side_of(adapter.method)
            if side is not None and side.needs_weights:
                raise CheckpointError(
                    f"{self.path} holds features: {type(side).__name__} needs the backbone's weights; train without "
                    "a bank (a ladder: or use init='random')"
                )
            if adapter.accepts(self.tokens):
                continue
            if self.tokens.tokens == "components":
                raise CheckpointError(
                    f"{self.path} holds {self.tokens.components} components of each layer's tokens: the method reads "
                    f"{adapter.components or 'the tokens'}"
                )
            raise CheckpointError(
                f"{self.path} holds the tokens {self.tokens.tokens!r} of each layer: the method reads "
                f"{wanted.tokens!r}; build a bank with --tokens {wanted.tokens}"
            )
        request = tuned.request
        numbers = [*request.layers, *([PIXELS] if request.pixels else [])]
        numbers += [MASK] if request.mask or (request.mask_of_all and self.tokens == ALL) else []
        missing = [_NAMES.get(number, f"layer {number}") for number in numbers if number not in self.numbers]
        if missing:
            held = f"layers {self.layers[0]} to {self.layers[-1]}" if self.layers else "no layers"
            raise CheckpointError(f"{self.path} holds {held}: the method reads {', '.join(missing)} too")

    @property
    def components(self) -> Components | None:
        """Those that it holds of the tokens, if not the tokens."""
        return Components.load(self.path / COMPONENTS) if self.tokens.tokens == "components" else None

    def fitted(self, method: Method) -> Method:
        """The method as it reads this bank: a path that leaves its components open has those that are kept here."""
        count = self.tokens.components
        return method if count is None else with_components(method, count)

    def tuned(self, described: nn.Module) -> Tuned:
        """A described backbone (on the meta device), of which nothing is left but this bank's frozen tail: enough to
        adapt it, train, and go `from_features`; it cannot see an image."""
        from safetensors.torch import load_file

        made = self.manifest["backbone"]
        tuned = Tuned(described, backbone_name=made["name"], device="cpu", fingerprint=made["fingerprint"])
        sites, here = tuned.sites, tuned.backbone
        if (made["width"], made["depth"]) != (sites.info.out_features, len(sites.blocks)):
            raise CheckpointError(
                f"{self.path} holds features of {made['name']} (width {made['width']}, {made['depth']} blocks)"
            )
        try:
            tail = load_file(self.path / TAIL)
        except Exception as error:
            raise CheckpointError(f"{self.path / TAIL} is damaged: {line(error)}") from error
        check_finite(tail, str(self.path / TAIL))
        for module_path, module in here.named_modules():
            for store in (module._parameters, module._buffers):
                for name, old in list(store.items()):
                    path = f"{module_path}.{name}" if module_path else name
                    if old is not None and path in tail and old.shape == tail[path].shape:
                        value = tail.pop(path)
                        store[name] = nn.Parameter(value, requires_grad=False) if store is module._parameters else value
                    elif old is not None:
                        del store[name]
        if tail:
            raise CheckpointError(f"{self.path / TAIL} holds {', '.join(sorted(tail))}, which the backbone has not")
        return tuned

    def shard(self, file: str) -> dict[str, Tensor]:
        """A shard's tensors, memory-mapped."""
        if file not in self._open:
            self._open[file] = self._tensors(file)
        return self._open[file]

    def _tensors(self, file: str) -> dict[str, Tensor]:
        """Those of a shard, as many rows of each as the manifest says. Raises CheckpointError."""
        from safetensors.torch import load_file

        shard = next(s for s in self.shards if s.file == file)
        try:
            check_regular(self.path / file)
            tensors: dict[str, Tensor] = load_file(self.path / file)
        except Exception as error:
            raise CheckpointError(f"{self.path / file} is damaged: {line(error)}") from error
        for name in ("labels", *map(str, self.numbers)):
            x = tensors.get(name)
            if x is None or not x.ndim or len(x) != shard.rows or (name.isdecimal() and x.ndim != 3):
                there = "missing" if x is None else tuple(x.shape)
                raise CheckpointError(f"{self.path / file} is damaged: {name} is {there}, expected {shard.rows} rows")
        data, labels = self.manifest["data"], tensors["labels"]
        if data.get("kind", Source.kind) == "single-label" and (
            labels.is_floating_point()
            or labels.ndim != 1
            or not 0 <= int(labels.min()) <= int(labels.max()) < len(data["classes"])
        ):
            raise CheckpointError(f"{self.path / file} is damaged: labels beyond its {len(data['classes'])} classes")
        return tensors


class Rows:
    """Rows of one split and view: item i is (features of `layers`, label); `fetch` reads many at once."""

    def __init__(self, bank: Bank, split: str, view: int = 0) -> None:
        self.bank = bank
        self.shards = [s for s in bank.shards if (s.split, s.view) == (split, view)]
        if not self.shards:
            raise CheckpointError(f"{bank.path} has no view {view} of the {split} split")
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + shard.rows)

    def __len__(self) -> int:
        return self.starts[-1]

    def labels(self) -> list[Any]:
        return [y for shard in self.shards for y in self.bank.shard(shard.file)["labels"].tolist()]

    def __getitem__(self, i: int) -> tuple[Features, Tensor]:
        features, labels = self.fetch([i])
        return features.map(lambda x: x[0]), labels[0]

    def fetch(self, indices: Sequence[int]) -> tuple[Features, Tensor]:
        """Features of many rows, in float32, and labels (b,) or (b, c)."""
        where = torch.as_tensor(indices)
        at = torch.searchsorted(torch.tensor(self.starts[1:]), where, right=True)
        parts: dict[int, list[Tensor]] = {number: [] for number in self.bank.numbers}
        labels, order = [], []
        for k in sorted(set(at.tolist())):
            mine = (at == k).nonzero().flatten()
            tensors, rows = self.bank.shard(self.shards[k].file), where[mine] - self.starts[k]
            for number, kept in parts.items():
                value = tensors[str(number)][rows]
                scale = tensors.get(f"{number}.scale")
                kept.append(value if scale is None else value.float() * scale[rows].float())
            labels.append(tensors["labels"][rows])
            order.append(mine)
        back = torch.cat(order).argsort()
        # what is kept in half precision is read in single; double stays double
        found = {number: _wide(padded(kept)[back]) for number, kept in parts.items()}
        return unnumbered(found, self.bank.tokens), torch.cat(labels)[back]


class FromBank:
    """Items of a bank's splits as a data set of features; each epoch reads the next of the views."""

    def __init__(self, bank: Bank, items: Items) -> None:
        places = [name.removesuffix("]").rpartition("[") for name in items.names]
        self.splits = {split for split, _, _ in places}
        self.bank, self.epoch = bank, 0
        self.places = [(split, int(i)) for split, _, i in places]
        self.labels = list(items.labels)
        self.rows: dict[tuple[str, int], Rows] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[Features, Tensor]:
        features, labels = self.__getitems__([i])
        return features.map(lambda x: x[0]), labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Features, Tensor]:
        """Many rows at once, as torch's loader asks for them."""
        parts, order = [], []
        for split in sorted(self.splits):
            mine = [k for k, i in enumerate(indices) if self.places[i][0] == split]
            if mine:
                parts.append(self._rows(split).fetch([self.places[indices[k]][1] for k in mine]))
                order += mine
        again = torch.tensor(order).argsort()
        features = Features.joined([part for part, _ in parts], padded).map(lambda x: x[again])
        return features, torch.cat([labels for _, labels in parts])[again]

    def collate(self, batch: tuple[Features, Tensor]) -> tuple[Features, Tensor]:
        """What `__getitems__` gives is a batch already; padding that all of it shares is left out."""
        return batch[0].trimmed(), batch[1]

    def kept(self) -> CachedFeatures:
        """All of its rows, in memory; of the first view."""
        return CachedFeatures(*self.__getitems__(range(len(self))))

    def _rows(self, split: str) -> Rows:
        key = split, self.epoch % self.bank.views if split == "train" else 0
        if key not in self.rows:
            self.rows[key] = self.bank.rows(*key)
        return self.rows[key]


class Banked(Items):
    """The items of a bank's split, of which labels and places are known, and pixels or words are not."""

    def __init__(self, rows: Rows, split: str) -> None:
        self.labels = rows.labels()
        self.names = [f"{split}[{i}]" for i in range(len(self.labels))]

    def item(self, i: int) -> Any:
        raise DataError(f"{self.names[i]}: a bank holds features, not what they were made of")
