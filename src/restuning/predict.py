"""Several saved adapters on one image, or on a folder of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from restuning.adapt import Tuned
from restuning.data import Prepared, load_images
from restuning.errors import CheckpointError, RestuningError
from restuning.files import write_whole
from restuning.run import card_preprocess, load_tuned
from restuning.saved import Card


def predict(
    adapters: Sequence[Path],
    image: Path,
    top: int = 1,
    weights: str | None = None,
    embeddings: Path | None = None,
) -> list[dict[str, Any]]:
    """One row for each image and adapter: the `top` classes with their probabilities.

    Adapters that leave the backbone's features alone share one pass of the backbone, those of one shape run as one;
    others take a pass each. embeddings: a .safetensors file for what the heads read, (images, d) for each adapter.
    Raises CheckpointError if the adapters are not of one backbone, RestuningError for `top` below 1.
    """
    if top < 1:
        raise RestuningError(f"top {top}: expected at least 1")
    tuned, names = _load(adapters, weights)
    cards = {name: tuned.card(name) for name in names}
    shared: list[str] = []
    alone: list[str] = []
    for name in names:
        tuned.set_adapter(name)
        (shared if tuned.reads_features else alone).append(name)
    groups = [*([shared] if shared else []), *([name] for name in alone)]
    images = load_images(image)
    preprocess = card_preprocess(adapters[0], cards["default"].preprocessing)
    said: dict[str, list[Tensor]] = {name: [] for name in names}
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    tuned.eval()
    with torch.inference_mode():
        for pixels, _ in DataLoader(Prepared(images, preprocess, cache=False), batch_size=32):
            for group in groups:
                tuned.set_adapter(group)
                features = tuned.features(pixels)
                for found, head in ((said, True), (read, False)):
                    if head or embeddings is not None:
                        out = tuned.from_features(features, head=head)
                        for name in group:
                            found[name].append(out[name] if len(group) > 1 else out)
    if embeddings is not None:
        from safetensors.torch import save

        tensors = {str(folder): torch.cat(read[name]) for name, folder in names.items()}
        try:
            write_whole(embeddings, save(tensors, {"images": json.dumps(list(images.names))}))
        except OSError as error:
            raise RestuningError(f"cannot write {embeddings}: {error.strerror}") from error
    best = {name: _ranked(torch.cat(said[name]).softmax(-1), cards[name], top) for name in names}
    return [
        {"image": path, "adapter": str(folder), "top": best[name][i]}
        for i, path in enumerate(images.names)
        for name, folder in names.items()
    ]


def _ranked(probabilities: Tensor, card: Card, top: int) -> list[list[dict[str, Any]]]:
    classes = card.classes or [str(c) for c in range(probabilities.shape[1])]
    best = probabilities.topk(min(top, len(classes)))
    return [
        [{"class": classes[c], "probability": round(p, 6)} for c, p in zip(indices, values, strict=True)]
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _load(adapters: Sequence[Path], weights: str | None) -> tuple[Tuned, dict[str, Path]]:
    """All adapters on the backbone of the first one, and their names there."""
    tuned = load_tuned(adapters[0], weights)
    tuned.eval()
    names = {"default": adapters[0]}
    wanted = tuned.card().preprocessing
    for i, folder in enumerate(adapters[1:], 2):
        tuned.load_adapter(folder, f"adapter_{i}")
        names[f"adapter_{i}"] = folder
        if tuned.card().preprocessing != wanted:
            raise CheckpointError(
                f"{folder} wants its images otherwise than {adapters[0]}: predict with them one by one"
            )
    return tuned, names
