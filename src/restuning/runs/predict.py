"""Several saved adapters on one image or text, or on many of them."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.data import Preprocess, Texts, check, load_images, prepared, without_bad
from restuning.errors import CheckpointError, DataError, RestuningError, line
from restuning.model.answers import answers
from restuning.model.predictor import Outputs, Predictor
from restuning.runs.load import load_several, transform_of
from restuning.training.evaluate import loader, padded
from restuning.utils.files import atomic_write, check_output
from restuning.utils.reading import read_text


def predict(
    adapters: Sequence[Path],
    given: str | Sequence[str],
    top: int = 1,
    weights: str | None = None,
    embeddings: Path | None = None,
    device: str | None = None,
    batch_size: int = 32,
    skip_bad: bool = False,
) -> list[dict[str, Any]]:
    """The rows of `predict_rows`, all at once."""
    given = [given] if isinstance(given, str) else given
    return list(predict_rows(adapters, given, top, weights, embeddings, device, batch_size, skip_bad))


def predict_rows(
    adapters: Sequence[Path],
    given: Sequence[str],
    top: int = 1,
    weights: str | None = None,
    embeddings: Path | None = None,
    device: str | None = None,
    batch_size: int = 32,
    skip_bad: bool = False,
) -> Iterator[dict[str, Any]]:
    """One row for each item and adapter, batch by batch: the `top` classes with their probabilities; `values` under
    regression, `words` with their classes under per-token.

    given: images and folders of images, in depth; for a backbone that reads texts, texts and .txt files of one a line
    (a pair parted by a tab). Adapters that leave the backbone's features alone share one pass of the backbone, those of
    one shape run as one; others take a pass for each of their kinds. embeddings: a .safetensors file for what the heads
    read, (items, d) for each adapter, written at the end. device: as `device_of` has it. skip_bad: images that cannot
    be decoded are left out, and named.
    Raises CheckpointError if the adapters are not of one backbone, RestuningError for `top` below 1.
    """
    if top < 1:
        raise RestuningError(f"top {top}: expected at least 1")
    if embeddings is not None:
        check_output(embeddings, "--embeddings", *(Path(one) for one in given if os.path.isdir(one)))
    place = device_of(device)
    tuned, names = load_several(adapters, weights)
    configs = {name: tuned.adapter_config(name) for name in names}
    how = transform_of(adapters[0], configs["default"].preprocessing)
    by_word = configs["default"].kind == "per-token"
    items = load_images(*map(Path, given)) if isinstance(how, Preprocess) else texts_of(given, by_word)
    if isinstance(how, Preprocess):
        items = without_bad(items) if skip_bad else items
        if len(items) > 1:
            check(items)
    examples = prepared(items, how, cache=False)
    predictor = Predictor.of(tuned.to(place))
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    done = 0
    for inputs, labels in loader(examples, batch_size):
        if embeddings is None:
            outputs = predictor.answer(inputs, dict.fromkeys(names, range(len(labels)))).outputs
        else:
            embedded = predictor.embed(inputs, list(names))
            outputs = [
                Outputs([(name, range(len(labels)))], predictor.classify(name, x)) for name, x in embedded.items()
            ]
            for name, x in embedded.items():
                read[name].append(x.cpu())
        found: dict[tuple[str, int], dict[str, Any]] = {}
        words = {i: (items.item(done + i)[0], labels[i].tolist()) for i in range(len(labels))} if by_word else None
        for part in outputs:
            check_finite(part, names)
            for name, rows, made in answers(part, configs.__getitem__, top, words):
                found |= {(name, i): row for i, row in zip(rows, made, strict=True)}
        for i in range(len(labels)):
            for name, folder in names.items():
                yield {"input": items.names[done + i], "adapter": str(folder), **found[name, i]}
        done += len(labels)
    if embeddings is not None:
        from safetensors.torch import save

        tensors = {str(folder): padded(read[name]) for name, folder in names.items()}
        try:
            atomic_write(embeddings, save(tensors, {"items": json.dumps(list(items.names))}))
        except OSError as error:
            raise RestuningError(f"cannot write {embeddings}: {error.strerror}") from error


def check_finite(outputs: Outputs, names: Mapping[str, Path]) -> None:
    """Raises CheckpointError for outputs that are not numbers; −inf is beyond an adapter's own classes."""
    if outputs.values.isnan().any() or outputs.values.isposinf().any():
        folders = ", ".join(str(names[name]) for name, _ in outputs.tasks)
        raise CheckpointError(f"{folders}: its outputs are not finite numbers")


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


def texts_of(given: str | Sequence[str], words: bool) -> Texts:
    """Texts, and those of .txt files; split into words where labels are by token."""
    given = [given] if isinstance(given, str) else given
    lines = [line for one in given for line in _lines(one)]
    texts: list[tuple[Any, ...]] = [(one.split(),) if words else tuple(one.split("\t")) for one in lines]
    if len(sizes := {len(text) for text in texts}) > 1 or max(sizes) > 2:
        raise DataError(f"{given[0]}: expected a text in every line, or a pair parted by one tab in every line")
    return Texts(texts, [list(range(len(text[0]))) if words else 0 for text in texts], lines)


def _lines(given: str) -> list[str]:
    if given.endswith(".txt"):
        try:
            lines = [one for one in read_text(given).splitlines() if one.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{given} cannot be read as UTF-8 text: {line(error)}") from error
    elif os.path.exists(given):
        raise DataError(f"{given} is no .txt file, and this adapter reads texts")
    else:
        lines = [given] if given.strip() else []
    if not lines:
        raise DataError(f"{given!r}: there is no text")
    return lines
