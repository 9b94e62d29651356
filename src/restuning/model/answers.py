"""Outputs → what people read: classes with their probabilities, values, words with their classes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from restuning.data.objective import IGNORED
from restuning.errors import RestuningError
from restuning.model.files import AdapterConfig
from restuning.model.predictor import Outputs

Words = Mapping[int, tuple[Sequence[str], Sequence[int]]]
"""Row → its words, and for every token the word that it begins, or IGNORED."""


def answers(
    outputs: Outputs, config: Callable[[str], AdapterConfig], top: int = 1, words: Words | None = None
) -> Iterator[tuple[str, Sequence[int], list[dict[str, Any]]]]:
    """(task, rows, their answers) of all outputs: `top`, the likeliest classes with their probabilities (each class's
    own under multi-label); `values` by target under regression; `words` with their classes under per-token.

    Args:
        outputs: of adapters of one predictor.
        config: an adapter's configuration by its name.
        top: how many classes at most, at least 1.
        words: needed by tasks per token; a word that the tokenizer drops has the class None.

    Raises:
        RestuningError: for an output that is no number.
    """
    ranked: dict[str, tuple[list[Any], list[Any]]] = {}  # by what turns outputs into probabilities
    start, finite = 0, bool(outputs.values.isfinite().all())
    for task, rows in outputs.tasks:
        made, stop = config(task), start + len(rows)
        values = outputs.values[start:stop, ..., : made.num_classes]
        if not (finite or values.isfinite().all()):
            raise RestuningError(f"adapter {task!r} gives no number: are its weights those that were trained?")
        if made.kind in ("single-label", "multi-label"):
            if made.kind not in ranked:
                ranked[made.kind] = _ranked(outputs.values, made.kind, top)
            indices, shares = (part[start:stop] for part in ranked[made.kind])
            yield task, rows, _top(_classes(made, values), indices, shares)
        else:
            yield task, rows, list(_other(values, rows, made, words or {}))
        start = stop


def _top(classes: Sequence[Any], indices: list[list[int]], shares: list[list[float]]) -> list[dict[str, Any]]:
    most = len(classes)  # of a stack, the tasks may have fewer classes than others
    return [
        {"top": [{"class": classes[c], "probability": v} for c, v in zip(best[:most], p[:most], strict=True)]}
        for best, p in zip(indices, shares, strict=True)
    ]


def _ranked(values: Tensor, kind: str, top: int) -> tuple[list[Any], list[Any]]:
    """Indices and probabilities of the best of every row, those of whole stacks of tasks at once."""
    values = values.float()
    best = values.topk(min(top, values.shape[-1])).indices  # of logits: of probabilities, small ones are all zero
    p = values.sigmoid() if kind == "multi-label" else values.softmax(-1)
    return best.tolist(), p.gather(-1, best).cpu().double().round(decimals=6).tolist()


def _other(values: Tensor, rows: Sequence[int], config: AdapterConfig, words: Words) -> Iterator[dict[str, Any]]:
    classes = _classes(config, values)
    if config.kind == "regression":
        for row in values.float().tolist():
            yield {"values": dict(zip(classes, row, strict=True))}
        return
    for row, own in zip(rows, values.argmax(-1).tolist(), strict=True):
        text, begins = words[row]
        found = {word: classes[c] for c, word in zip(own, begins, strict=False) if word != IGNORED}
        yield {"words": [{"word": word, "class": found.get(k)} for k, word in enumerate(text)]}


def _classes(config: AdapterConfig, values: Tensor) -> Sequence[Any]:
    return config.classes or [str(c) for c in range(values.shape[-1])]
