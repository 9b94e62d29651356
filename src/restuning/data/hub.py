"""`hf:NAME[:CONFIG][?text=COLUMN&…]`, a Hugging Face data set, from the hub or a folder; `glue:…`."""

import io
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restuning.data.decode import decode
from restuning.data.table import LABELS, Table, settings_of
from restuning.data.task import Items, Source
from restuning.data.text import SETTINGS, TEXTS, source_of
from restuning.errors import DataError, MissingExtra, line
from restuning.utils.hub import hub

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "validation_matched"), "test": ("test",)}


class Rows(Items):
    """Rows of a `datasets.Dataset` whose image column is not decoded."""

    def __init__(self, rows: Any, column: str, labels: list[int], name: str) -> None:
        self.rows, self.column, self.labels = rows, column, labels
        self.names = [f"{name}[{i}]" for i in range(len(labels))]

    def item(self, i: int) -> "Image":
        value = self.rows[i][self.column]
        if value is None:
            raise DataError(f"{self.names[i]} has no image")
        if value["bytes"] is not None:
            return decode(io.BytesIO(value["bytes"]), self.names[i])
        with open(value["path"], "rb") as file:
            return decode(file, self.names[i])


def load_hub(rest: str) -> Source:
    """Labels of text data sets are of any kind; see `restuning.data.table.labels_of`. Where the test labels are hidden,
    texts are tested on the validation split, as GLUE is reported.

    Raises DataError for a data set that cannot be had, lacks an image (or text) or a label column, or has other labels.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data") from error
    rest, settings = settings_of(rest, SETTINGS)
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
    splits: dict[str, Any] = {}
    for ours, theirs in SPLITS.items():
        for s in theirs:
            if s in found and ours not in splits:
                splits[ours] = found[s]
    if "train" not in splits:
        raise DataError(f"{rest}: no training split among {', '.join(map(str, found)) or 'none'}")
    features = splits["train"].features
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    texts = settings.get("text") in features or any(n in features for n in TEXTS)
    if texts and not images:
        return _texts(rest, splits, settings)
    strange = sorted(settings.keys() - {"label"})
    if strange:
        raise DataError(f"{rest}: {strange[0]!r} is a setting of texts, and these are images")
    return _images(rest, splits, images, settings.get("label"))


def load_glue(name: str) -> Source:
    """A task of GLUE by its name there (`sst2`, `mnli`, `rte`, …), tested on its validation split (mnli: matched)."""
    if not name:
        raise DataError("glue: names no task: expected glue:sst2, glue:mnli, …")
    return load_hub(f"nyu-mll/glue:{name}")


def _texts(rest: str, splits: dict[str, Any], settings: dict[str, str]) -> Source:
    import datasets

    features = splits["train"].features
    column = settings.get("label") or next((n for n in LABELS if n in features), "")
    feature = features.get(column)
    inner = getattr(feature, "feature", feature)  # of a list of labels
    names = inner.names if isinstance(inner, datasets.ClassLabel) else None
    tables = {}
    for split, rows in splits.items():
        hidden = column not in rows.features or (feature is inner and set(rows.unique(column)) == {-1})
        if split == "test" and hidden:
            continue  # as a hub has them
        kept = rows.to_list()
        if names is not None:
            for row in kept:
                value = row.get(column)
                listed = value if isinstance(value, list) else [value]
                many = [names[v] if v is not None and 0 <= v < len(names) else v for v in listed]
                row[column] = many if isinstance(value, list) else many[0]
        where = f"{rest}/{split}"
        tables[split] = Table(where, tuple(rows.features), kept, [f"{where}[{i}]" for i in range(len(kept))])
    if "test" not in tables and "val" in tables:
        tables["test"] = tables.pop("val")
    return source_of(tables, settings, names)


def _images(rest: str, splits: dict[str, Any], images: list[str], given: str | None) -> Source:
    import datasets

    features = splits["train"].features
    image = _one(rest, "image", images, features)
    named = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    plain = [n for n in ("label", "labels", "class", "target") if n in features]
    if given is not None and given not in features:
        raise DataError(f"{rest}: no column {given!r} among {', '.join(features)}")
    label = given or _one(rest, "label", named or plain, features)
    if label in named:
        classes = tuple(features[label].names)
        index = {i: i for i in range(len(classes))}
    else:
        held = splits["train"][label]
        odd = next((i for i, v in enumerate(held) if not isinstance(v, int | str)), None)
        if odd is not None:
            raise DataError(
                f"{rest}, train row {odd}: {label} is {held[odd]!r}: expected the name or number of a class"
            )
        values = sorted(set(held), key=lambda v: (str(type(v)), v))
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
