"""A text → the token ids that a backbone reads."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from restuning.data.objective import IGNORED
from restuning.data.task import Items
from restuning.errors import DataError, MissingExtra, line
from restuning.utils.hub import hub, packaged


@dataclass(frozen=True)
class Tokenise:
    """tokenizer: a folder or a hub id. limit: tokens that the model reads at most; vocabulary: ids that it knows;
    pad: its own padding id, if it says. max_length: texts are cut to so many tokens; None: longer ones are refused."""

    tokenizer: str
    limit: int
    vocabulary: int
    pad: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and not 2 < self.max_length <= self.limit:
            raise DataError(
                f"max length {self.max_length}: expected more than 2 tokens, and at most the model's {self.limit}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Tokenise":
        """The inverse of `to_dict`. Raises DataError if it is incomplete."""
        try:
            return cls(**{f.name: data[f.name] for f in fields(cls)})
        except (KeyError, TypeError) as error:
            raise DataError(f"a tokenisation that cannot be read: {error}") from error

    def load(self, words: bool = False) -> Any:
        """The tokenizer; of texts by words, one that sees where a word begins (byte-level ones see it by the blank
        before it). Raises DataError if it cannot be had, or is another model's."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingExtra("transformers", "transformers") from error
        path = packaged(self.tokenizer)
        try:
            with nullcontext() if Path(path).is_dir() else hub():
                tokenizer = AutoTokenizer.from_pretrained(path, **({"add_prefix_space": True} if words else {}))
        except Exception as error:
            raise DataError(f"no tokenizer at {self.tokenizer!r}: {line(error)}; name one with --tokenizer") from error
        if len(tokenizer) > self.vocabulary:
            raise DataError(
                f"the tokenizer {self.tokenizer!r} does not fit the model: it has {len(tokenizer):,} tokens, the model "
                f"knows {self.vocabulary:,}"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # a decoder's; the mask tells padding from the end
        elif self.pad is not None and tokenizer.pad_token_id != self.pad:
            raise DataError(
                f"the tokenizer {self.tokenizer!r} does not fit the model: it pads with {tokenizer.pad_token_id}, "
                f"the model with {self.pad}"
            )
        return tokenizer


class Tokenised(Dataset[tuple[dict[str, list[int]], Any]]):
    """Texts as ({input_ids, attention_mask, …}, label); `collate` pads a batch to its own longest text.

    The label of a text by words is one for each token: its word's at the first token of a word, −100 elsewhere.
    Raises DataError for a text beyond the model's length.
    """

    def __init__(self, items: Items, how: Tokenise) -> None:
        texts = [items.item(i) for i in range(len(items))]
        words = bool(texts) and isinstance(texts[0][0], list)
        tokenizer = how.load(words)
        self.fields = tokenizer(
            *(list(column) for column in zip(*texts, strict=True)),
            truncation=how.max_length is not None,
            max_length=how.max_length,
            is_split_into_words=words,
            verbose=False,
        )
        self.lengths = [len(ids) for ids in self.fields["input_ids"]]
        for name, count in zip(items.names, self.lengths, strict=True):
            if count > how.limit:
                raise DataError(
                    f"{name}: {count} tokens, and the model reads at most {how.limit} "
                    f"(--max-length {how.limit}, in training, has texts cut)"
                )
        self.labels: Sequence[Any] = items.labels
        if _by_token(items.labels):
            self.labels = [_aligned(self.fields.word_ids(i), labels) for i, labels in enumerate(items.labels)]
        self.pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[dict[str, list[int]], Any]:
        return {name: values[i] for name, values in self.fields.items()}, self.labels[i]

    def collate(self, examples: Sequence[tuple[dict[str, list[int]], Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Tensors (b, n) for the longest text of the batch; labels (b,), (b, c) or (b, n)."""
        inputs = {
            name: self._padded([fields[name] for fields, _ in examples], self.pads.get(name, 0)) for name in self.fields
        }
        labels = [label for _, label in examples]
        return inputs, self._padded(labels, IGNORED) if _by_token(labels) else torch.tensor(labels)

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        """At the end, whatever side a decoder's tokenizer pads for generation: the first token stays the first."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _by_token(labels: Sequence[Any]) -> bool:
    """Whether a label is a class for each word, and not a target for each class."""
    return len(labels) > 0 and isinstance(labels[0], list) and isinstance(labels[0][0], int)


def _aligned(words: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """The label of each token: its word's, at the first token of a word."""
    begins = [word is not None and (i == 0 or words[i - 1] != word) for i, word in enumerate(words)]
    return [labels[word or 0] if first else IGNORED for word, first in zip(words, begins, strict=True)]
