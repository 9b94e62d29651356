"""`hf:NAME[:CONFIG]`: a Hugging Face data set, by hub name or from a folder."""

import io
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restuning.data.decode import decode
from restuning.data.task import Images, Source
from restuning.errors import DataError, MissingExtra, line
from restuning.hub import hub

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}


class Rows(Images):
    """Rows of a `datasets.Dataset` whose image column is not decoded."""

    def __init__(self, rows: Any, column: str, labels: list[int], name: str) -> None:
        self.rows, self.column, self.labels = rows, column, labels
        self.names = [f"{name}[{i}]" for i in range(len(labels))]

    def image(self, i: int) -> "Image":
        value = self.rows[i][self.column]
        if value is None:
            raise DataError(f"{self.names[i]} has no image")
        if value["bytes"] is not None:
            return decode(io.BytesIO(value["bytes"]), self.names[i])
        with open(value["path"], "rb") as file:
            return decode(file, self.names[i])


def load_hub(rest: str) -> Source:
    """Raises DataError for a data set that cannot be had, lacks an image or a label column, or has other labels."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data") from error
    name, _, config = rest.partition(":")
    try:
        if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "state.json").exists():
            found = datasets.load_from_disk(name)
        else:
            with nullcontext() if Path(name).exists() else hub():
                found = datasets.load_dataset(name, config or None)
    except Exception as error:
        raise DataError(f"the data set {rest!r} cannot be had: {line(error)}") from error
    if not isinstance(found, dict):
        found = {"train": found}
    splits = {ours: found[s] for ours, theirs in SPLITS.items() for s in theirs if s in found}
    if "train" not in splits:
        raise DataError(f"{rest}: no training split among {', '.join(map(str, found)) or 'none'}")
    features = splits["train"].features
    image = _one(rest, "image", [n for n, f in features.items() if isinstance(f, datasets.Image)], features)
    named = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    plain = [n for n in ("label", "labels", "class", "target") if n in features]
    label = _one(rest, "label", named or plain, features)
    if label in named:
        classes = tuple(features[label].names)
        index = {i: i for i in range(len(classes))}
    else:
        values = sorted(set(splits["train"][label]), key=lambda v: (str(type(v)), v))
        classes = tuple(map(str, values))
        index = {v: i for i, v in enumerate(values)}
    made = {}
    for split, rows in splits.items():
        labels = rows[label]
        wrong = next((i for i, v in enumerate(labels) if v not in index), None)
        if wrong is not None and split == "test" and all(v == -1 for v in labels):
            continue  # a hub's hidden test labels
        if wrong is not None:
            raise DataError(
                f"{rest}, {split} row {wrong}: label {labels[wrong]!r} is outside the {len(classes)} classes"
            )
        raw = rows.cast_column(image, datasets.Image(decode=False))
        made[split] = Rows(raw, image, [index[v] for v in labels], f"{rest}/{split}")
    return Source(classes, made["train"], made.get("val"), made.get("test"))


def _one(rest: str, what: str, found: list[str], features: Any) -> str:
    if len(found) != 1:
        raise DataError(f"{rest}: {len(found)} {what} columns among {', '.join(features)}: expected one")
    return found[0]
