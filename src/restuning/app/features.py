"""Features of items by their content, computed once and kept on disk: what was computed is never computed again."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from restuning.app.given import read_text_of
from restuning.app.project import Item, quick_write
from restuning.app.recipes import KINDS, RECIPES, Recipe
from restuning.backbones.load import reading_of
from restuning.data import Preprocess, Texts, Tokenise, Tokenised
from restuning.data.decode import decode
from restuning.data.folder import TEXT, TEXT_BYTES
from restuning.errors import CheckpointError, DataError, MethodError, RestuningError, line
from restuning.model.predictor import Inputs
from restuning.model.tuned import Tuned
from restuning.runs.estimator import shared_backbone
from restuning.side.features import FeatureRequest, Features
from restuning.training.evaluate import padded
from restuning.utils.files import atomic_write
from restuning.utils.reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

SHARD = 32
"""Items of one pass, and of one file: what a killed process loses at most."""
MOST_KEPT = 2 * 2**20
"""Bytes that the features of an item may take for a method."""
THUMBNAIL = 160
FROZEN = "frozen"
"""The adapter without a head: the backbone's own pooled features."""


class Engine:
    """A frozen backbone and the recipes that train on it. Threads take `lock` for what changes its adapters.

    Args:
        backbone: a name that `restuning.load_backbone` knows.
        weights: a file of them; None: its own.
    """

    def __init__(self, backbone: str, weights: str | None = None) -> None:
        self.backbone, self.weights, self.lock = backbone, weights, threading.RLock()
        module = shared_backbone(backbone, weights, None)
        how = reading_of(module)
        self.tokenizer = how.load() if isinstance(how, Tokenise) else None
        self.how = how = replace(how, max_length=how.limit) if isinstance(how, Tokenise) else how  # longer ones are cut
        self.kind = "texts" if isinstance(how, Tokenise) else "pictures"
        self.tuned = Tuned(module, backbone_name=backbone)
        if torch.cuda.is_available():
            self.tuned.cuda()
        self.recipes: dict[str, Recipe] = {}
        self.refused: dict[str, str] = {}
        self.views: list[FeatureRequest] = []
        self._view_of: dict[str, int] = {}
        self._names = iter(range(10**9))
        names = KINDS[self.kind]
        self.probing = names[0]
        """Linear probing, which reads what the backbone itself pools."""
        pool = RECIPES[self.probing].pool
        self.tuned.add_adapter(FROZEN, "linear", pool=pool, preprocessing=how.to_dict())
        for name in reversed(names):  # those that read most come first
            self._accept(name, RECIPES[name])
        self.tuned.set_adapter(FROZEN)
        self.key = hashlib.sha256(
            repr((backbone, self.tuned.fingerprint, how.to_dict(), self.views)).encode()
        ).hexdigest()[:12]

    @property
    def device(self) -> torch.device:
        return next(self.tuned.parameters()).device

    def _accept(self, name: str, recipe: Recipe) -> None:
        """Keep a recipe whose method fits, and what has to be kept of an item for it."""
        try:
            self.tuned.add_adapter(name, recipe.method, 2, pool=recipe.pool)
        except RestuningError as error:
            self.refused[name] = line(error)
            return
        request = self.tuned.adapter(name).request
        self.tuned.delete_adapter(name)
        if request.pixels or request.mask:
            self.refused[name] = "it reads more than features"
            return
        for i, view in enumerate(self.views):
            if request.tokens.of(view.tokens) is not None and set(request.layers) <= set(view.layers):
                self._view_of[name] = i
                break
        else:
            side = 3 * self.how.size[0] * self.how.size[1] if isinstance(self.how, Preprocess) else MOST_KEPT
            if request.tokens.tokens == "all" and 4 * side * len(request.layers) > MOST_KEPT:
                self.refused[name] = "what it reads of an item is too much to keep"
                return
            self.views.append(request)
            self._view_of[name] = len(self.views) - 1
        self.recipes[name] = recipe

    def name(self, of: str) -> str:
        """One for an adapter that nobody else has."""
        return f"{of}-{next(self._names)}"

    def read(self, content: "Image | str") -> Tensor | str:
        """A picture as its pixels (3, h, w); a text as it is. Raises DataError for what this backbone does not read."""
        if isinstance(self.how, Tokenise) and isinstance(content, str):
            return content
        if isinstance(self.how, Tokenise) or isinstance(content, str):
            raise DataError(f"{self.backbone} reads {self.kind}: expected one of these")
        return self.how(content)

    def inputs(self, items: Sequence[Tensor | str]) -> Inputs:
        """What `read` gave, as a batch: pixels (b, 3, h, w), or named tensors (b, n), on the device."""
        pixels = [item for item in items if isinstance(item, Tensor)]
        if not isinstance(self.how, Tokenise):
            return torch.stack(pixels).to(self.device)
        texts = Texts([(str(item),) for item in items], [0] * len(items), [""] * len(items))
        found = Tokenised(texts, self.how, self.tokenizer)
        return {k: v.to(self.device) for k, v in found.collate([found[i] for i in range(len(items))])[0].items()}

    @torch.no_grad()
    def live(self, inputs: Inputs) -> list[Features]:
        """One pass of the backbone over what `inputs` gave: what every view holds, on the CPU."""
        from restuning.model.passes import features_of

        request = FeatureRequest.of_all(self.views)
        args, named = ((), inputs) if isinstance(inputs, Mapping) else ((inputs,), {})
        with self.lock:
            features = features_of(self.tuned, {}, request, True, args, named)
        views = [features.select(v.tokens, v.layers).map(lambda x: x.to("cpu", copy=True)) for v in self.views]
        return [replace(view, mask=None) for view in views]  # no padding is left in them

    def view(self, recipe: str) -> int:
        """Which of the views a recipe reads."""
        if recipe not in self._view_of:
            raise MethodError(f"{recipe} does not run on {self.backbone}: {self.refused.get(recipe, 'unknown')}")
        return self._view_of[recipe]


@lru_cache(4)
def engine(backbone: str, weights: str | None) -> Engine:
    """One for all projects on this backbone."""
    return Engine(backbone, weights)


@dataclass(frozen=True)
class Progress:
    """Of a pass over items: how many are done, of how many, and the seconds that are left."""

    done: int
    total: int
    left: float


class FeatureStore:
    """Features of items in a folder, files of `SHARD` items each, by backbone.

    Args:
        own: the folder that a project keeps what it computes in.
        engine: the backbone.

    Raises:
        CheckpointError: a file in it is damaged.
    """

    def __init__(self, own: Path, engine: Engine) -> None:
        self.engine, self.thumbnails = engine, own / "thumbnails"
        self.folder = own / "features" / engine.key
        self.rows: dict[str, int] = {}
        self.bad: dict[str, str] = {}
        self._parts: list[list[Features]] = []
        self._views: list[Features] | None = None
        self._files: set[str] = set()
        self._lock = threading.Lock()
        self.reload()

    def reload(self) -> None:
        """Read what others wrote since."""
        from safetensors import safe_open

        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._files:
                continue
            try:
                with safe_open(path, "pt") as file:
                    keys = [str(key) for key in json.loads(file.metadata()["keys"])]
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self._take(path.name, keys, self._unnamed(tensors, len(keys)))
            except Exception as error:  # safetensors has errors of its own
                raise CheckpointError(f"{path} is damaged: {line(error)}; remove it to compute it again") from error

    def missing(self, items: Sequence[Item]) -> list[Item]:
        """Those whose features are not there and that were not found to be unreadable."""
        return [p for p in items if p.key not in self.rows and p.key not in self.bad]

    def compute(self, items: Sequence[Item]) -> Iterator[Progress]:
        """One pass over those that are missing; leaving the loop early loses nothing of what was computed."""
        missing, start = self.missing(items), time.perf_counter()
        for at in range(0, len(missing), SHARD):
            keys, read = list[str](), list[Tensor | str]()
            for item in self.missing(missing[at : at + SHARD]):  # another thread may have been here
                try:
                    content = self.content(item)
                    read.append(self.engine.read(content))
                    if not isinstance(content, str):
                        self._thumbnail(item.key, content)
                    keys.append(item.key)
                except RestuningError as error:
                    self.bad[item.key] = line(error)
            if keys:
                self._write(keys, self.engine.live(self.engine.inputs(read)))
            done = min(at + SHARD, len(missing))
            yield Progress(done, len(missing), (time.perf_counter() - start) / done * (len(missing) - done))

    def features(self, recipe: str, keys: Sequence[str]) -> Features:
        """What a recipe's method reads, of these items."""
        with self._lock:
            if self._views is None:
                joined = [Features.joined([p[i] for p in self._parts], padded) for i in range(len(self.engine.views))]
                self._views, self._parts = joined, [joined]
            rows = torch.tensor([self.rows[key] for key in keys])
            return self._views[self.engine.view(recipe)].rows(rows)

    def thumbnail(self, item: Item) -> bytes:
        """A small JPEG of a picture, made anew by the decoder: no byte of the file itself. Raises DataError."""
        path = self.thumbnails / f"{item.key}.jpg"
        if not path.exists():
            image = self.content(item)
            assert not isinstance(image, str)
            self._thumbnail(item.key, image)
        return path.read_bytes()

    def content(self, item: Item) -> "Image | str":
        """A picture, RGB, or a text. Raises DataError where it cannot be decoded."""
        try:
            with open_regular(str(item.path)) as file:
                if item.path.suffix.lower() == TEXT:
                    return read_text_of(file.read(TEXT_BYTES + 1), item.path.name)
                return decode(file, item.path.name)
        except OSError as error:
            raise DataError(f"{item.path.name} cannot be read: {error.strerror}") from error

    # ---- inside

    def _thumbnail(self, key: str, image: "Image") -> None:
        path = self.thumbnails / f"{key}.jpg"
        if not path.exists():
            quick_write(path, small_jpeg(image))

    def _write(self, keys: list[str], views: list[Features]) -> None:
        from safetensors.torch import save

        tensors = {f"{i}.{layer}": x for i, view in enumerate(views) for layer, x in view.layers.items()}
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:20] + ".safetensors"
        data = save({k: x.contiguous() for k, x in tensors.items()}, {"keys": json.dumps(keys)})
        atomic_write(self.folder / name, data)
        self._take(name, keys, views)

    def _take(self, name: str, keys: list[str], views: list[Features]) -> None:
        with self._lock:
            start = sum(len(part[0]) for part in self._parts)
            self.rows |= {key: start + i for i, key in enumerate(keys)}
            self._files.add(name)
            self._parts.append(views)
            self._views = None

    def _unnamed(self, tensors: Mapping[str, Tensor], count: int) -> list[Features]:
        views = []
        for i, view in enumerate(self.engine.views):
            layers = {layer: tensors[f"{i}.{layer}"] for layer in view.layers}
            if any(len(x) != count or not bool(x.isfinite().all()) for x in layers.values()):
                raise CheckpointError("rows are missing, or are no numbers")
            views.append(Features(layers, view.tokens))
        return views


def small_jpeg(image: "Image") -> bytes:
    """At most THUMBNAIL pixels a side."""
    small, buffer = image.copy(), BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
