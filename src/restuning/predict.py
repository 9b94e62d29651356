"""Several saved adapters on one image, or on a folder of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from restuning.adapt import Tuned
from restuning.data import Prepared, load_images
from restuning.errors import CheckpointError, RestuningError
from restuning.run import card_preprocess, load_tuned


def predict(adapters: Sequence[Path], image: Path, top: int = 1, weights: str | None = None) -> list[dict[str, Any]]:
    """One row for each image and adapter: the `top` classes with their probabilities.

    Adapters that leave the backbone's features alone share one pass of the backbone; others take one each.
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
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    tuned.eval()
    with torch.inference_mode():
        for pixels, _ in DataLoader(Prepared(images, preprocess, cache=False), batch_size=32):
            for group in groups:
                tuned.set_adapter(group)
                out = tuned(pixels)
                for name in group:
                    found[name].append((out[name] if len(group) > 1 else out).softmax(-1))
    rows = []
    for i, path in enumerate(images.names):
        for name, folder in names.items():
            classes = cards[name].classes or [str(c) for c in range(cards[name].num_classes or 0)]
            best = torch.cat(found[name])[i].topk(min(top, len(classes)))
            ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            rows.append(
                {
                    "image": path,
                    "adapter": str(folder),
                    "top": [{"class": classes[c], "probability": round(p, 6)} for c, p in ranked],
                }
            )
    return rows


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
