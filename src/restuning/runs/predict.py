"""Several saved adapters on one image or text, or on many of them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.data import Items, Preprocess, Texts, load_images, prepared
from restuning.data.objective import IGNORED
from restuning.errors import CheckpointError, DataError, RestuningError, line
from restuning.model.files import AdapterConfig
from restuning.model.tuned import Tuned
from restuning.runs.load import load_tuned, transform_of
from restuning.training.evaluate import loader, padded, to_device
from restuning.utils.files import atomic_write


def predict(
    adapters: Sequence[Path],
    given: str,
    top: int = 1,
    weights: str | None = None,
    embeddings: Path | None = None,
    device: str | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """One row for each item and adapter: the `top` classes with their probabilities; `values` under regression, `words`
    with their classes under per-token.

    given: an image or a folder of images; for a backbone that reads texts, a text, or a .txt file of one a line (a pair
    parted by a tab). Adapters that leave the backbone's features alone share one pass of the backbone, those of one
    shape run as one; others take a pass each. embeddings: a .safetensors file for what the heads read, (items, d) for
    each adapter. device: as `device_of` has it.
    Raises CheckpointError if the adapters are not of one backbone, RestuningError for `top` below 1.
    """
    if top < 1:
        raise RestuningError(f"top {top}: expected at least 1")
    place = device_of(device)
    tuned, names = _load(adapters, weights)
    tuned.to(place)
    configs = {name: tuned.adapter_config(name) for name in names}
    shared: list[str] = []
    alone: list[str] = []
    for name in names:
        tuned.set_adapter(name)
        (shared if tuned.reads_features else alone).append(name)
    groups = [*([shared] if shared else []), *([name] for name in alone)]
    how = transform_of(adapters[0], configs["default"].preprocessing)
    words = configs["default"].kind == "per-token"
    items = load_images(Path(given)) if isinstance(how, Preprocess) else _texts(given, words)
    examples = prepared(items, how, cache=False)
    said: dict[str, list[Tensor]] = {name: [] for name in names}
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    begins: list[Tensor] = []
    tuned.eval()
    with torch.inference_mode():
        for inputs, labels in loader(examples, batch_size):
            begins.append(labels)
            for group in groups:
                tuned.set_adapter(group)
                features = tuned.features(to_device(inputs, place))
                for found, head in ((said, True), (read, False)):
                    if head or embeddings is not None:
                        out = tuned.from_features(features, head=head)
                        for name in group:
                            found[name].append((out[name] if len(group) > 1 else out).cpu())
    if embeddings is not None:
        from safetensors.torch import save

        tensors = {str(folder): padded(read[name]) for name, folder in names.items()}
        try:
            atomic_write(embeddings, save(tensors, {"items": json.dumps(list(items.names))}))
        except OSError as error:
            raise RestuningError(f"cannot write {embeddings}: {error.strerror}") from error
    rows = {
        name: _said(padded(said[name]), configs[name], top, items, padded(begins, IGNORED) if words else None)
        for name in names
    }
    return [
        {"input": path, "adapter": str(folder), **rows[name][i]}
        for i, path in enumerate(items.names)
        for name, folder in names.items()
    ]


def device_of(name: str | None = None) -> torch.device:
    """cpu, cuda, cuda:N or mps; None: a GPU where there is one. Raises RestuningError for one that cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RestuningError(f"device {name!r} cannot be used here: {line(error)}") from error
    return device


def _texts(given: str, words: bool) -> Texts:
    """One text, or those of a .txt file; split into words where labels are by token."""
    if given.endswith(".txt"):
        try:
            lines = [one for one in Path(given).read_text(encoding="utf-8").splitlines() if one.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{given} cannot be read as UTF-8 text: {line(error)}") from error
    elif os.path.exists(given):
        raise DataError(f"{given} is no .txt file, and this adapter reads texts")
    else:
        lines = [given] if given.strip() else []
    if not lines:
        raise DataError(f"{given!r}: there is no text")
    texts: list[tuple[Any, ...]] = [(one.split(),) if words else tuple(one.split("\t")) for one in lines]
    if len(sizes := {len(text) for text in texts}) > 1 or max(sizes) > 2:
        raise DataError(f"{given}: expected a text in every line, or a pair parted by one tab in every line")
    return Texts(texts, [list(range(len(text[0]))) if words else 0 for text in texts], lines)


def _said(logits: Tensor, config: AdapterConfig, top: int, items: Items, begins: Tensor | None) -> list[dict[str, Any]]:
    """Rows of one adapter. begins: the word that a token begins, or IGNORED; a word that the
    tokenizer drops has no class."""
    classes = config.classes or [str(c) for c in range(logits.shape[-1])]
    if config.kind == "regression":
        return [{"values": dict(zip(classes, row, strict=True))} for row in logits.tolist()]
    if begins is not None:
        rows: list[dict[str, Any]] = []
        for i, (own, which) in enumerate(zip(logits.argmax(-1).tolist(), begins.tolist(), strict=True)):
            said = {word: classes[c] for c, word in zip(own, which, strict=True) if word != IGNORED}
            rows.append({"words": [{"word": w, "class": said.get(k)} for k, w in enumerate(items.item(i)[0])]})
        return rows
    p = logits.sigmoid() if config.kind == "multi-label" else logits.softmax(-1)
    best = p.topk(min(top, len(classes)))
    return [
        {"top": [{"class": classes[c], "probability": round(v, 6)} for c, v in zip(indices, values, strict=True)]}
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _load(adapters: Sequence[Path], weights: str | None) -> tuple[Tuned, dict[str, Path]]:
    """All adapters on the backbone of the first one, and their names there."""
    tuned = load_tuned(adapters[0], weights)
    tuned.eval()
    names = {"default": adapters[0]}
    wanted = tuned.adapter_config().preprocessing
    for i, folder in enumerate(adapters[1:], 2):
        tuned.load_adapter(folder, f"adapter_{i}")
        names[f"adapter_{i}"] = folder
        if tuned.adapter_config().preprocessing != wanted:
            raise CheckpointError(
                f"{folder} reads its items otherwise than {adapters[0]}: predict with them one by one"
            )
        if "per-token" in (kinds := {tuned.adapter_config(name).kind for name in names}) and len(kinds) > 1:
            raise CheckpointError(f"{folder}: labels by token and others: predict with them one by one")
    return tuned, names
