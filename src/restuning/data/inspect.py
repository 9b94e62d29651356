"""What is wrong with a data set: counts, unreadable files, test images in training, lost pixels."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from restuning.data.known import Known
from restuning.data.task import Items, Source
from restuning.errors import DataError

JPEG = b"\xff\xd8\xff"


@dataclass
class Report:
    """counts: images by split; seen: classes that each split has; pixels: `original`, `lossy` or `mixed`; wrong: what
    forbids its use; notes: what should be known with a number measured on it."""

    counts: dict[str, int]
    classes: int
    seen: dict[str, int]
    pixels: str
    unreadable: list[str] = field(default_factory=list)
    overlap: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pixels_of(items: Items, sample: int = 16) -> str:
    """`original`, or `lossy` where the files are JPEGs, told by their first bytes; `mixed`."""
    step = max(1, len(items) // sample)
    lossy = Counter(items.head(i).startswith(JPEG) for i in range(0, len(items), step))
    return "mixed" if len(lossy) > 1 else "lossy" if lossy[True] else "original"


def inspect(source: Source, known: Known | None = None) -> Report:
    """Read every image once. Raises DataError for what is no images with one class each."""
    if source.kind != "single-label" or isinstance(source.train.item(0), tuple):
        raise DataError("only images with one class each can be checked")
    splits = {name: items for name in ("train", "val", "test") if (items := getattr(source, name)) is not None}
    counts = {name: len(items) for name, items in splits.items()}
    seen = {name: len(set(items.labels)) for name, items in splits.items()}
    # as the paper's tables count, the labels that there are
    classes = len({label for items in splits.values() for label in items.labels})
    found = Report(counts, classes, seen, "original")
    where: dict[str, tuple[str, str]] = {}
    twice, heads = 0, set()
    for split, items in sorted(splits.items(), key=lambda pair: pair[0] == "test"):
        for i in range(len(items)):
            try:
                image = items.item(i)
                heads.add(items.head(i).startswith(JPEG))
            except (DataError, OSError) as error:
                found.unreadable.append(str(error))
                continue
            key = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
            before = where.setdefault(key, (split, items.names[i]))
            if before[1] == items.names[i] and before[0] == split:
                continue
            if split == "test" and before[0] != "test":
                found.overlap.append((before[1], items.names[i]))
            twice += before[0] == split
    found.pixels = "mixed" if len(heads) > 1 else "lossy" if True in heads else "original"
    found.wrong += _against(source, known, found) if known else []
    if found.unreadable:
        found.wrong.append(f"{len(found.unreadable)} unreadable: {found.unreadable[0]}")
    if found.overlap:
        trained, tested = found.overlap[0]
        found.wrong.append(
            f"{len(found.overlap)} test image{'s' * (len(found.overlap) > 1)} also in training: {tested} is {trained}"
        )
    if twice:
        found.notes.append(f"{twice} images are there twice in one split")
    lacking = sorted(set(range(len(source.classes))) - set(source.train.labels))
    if lacking and classes == len(source.classes):
        found.notes.append(f"{len(lacking)} classes without a training image: {', '.join(map(str, lacking[:8]))}")
    if known and known.lossless and found.pixels != "original":
        found.notes.append(
            "lossy (JPEG) copies of what has a lossless original: scores differ (CIFAR-100's by about 10 points)"
        )
    return found


def _against(source: Source, known: Known, found: Report) -> list[str]:
    """What differs from Tables 8 and 9."""
    wrong, counts = [], found.counts
    # a target of other classes than the source's is counted by itself
    own = found.seen["test"] if known.kind == "domains" else found.classes
    if own != known.classes:
        gap = sorted(
            set(range(known.classes)) - {y for s in (source.train, source.val, source.test) if s for y in s.labels}
        )
        missing = f" (no image has label {', '.join(map(str, gap[:5]))})" if gap and known.kind != "domains" else ""
        wrong.append(f"{own} classes, expected {known.classes}{missing}")
    train = counts["train"] + (counts.get("val", 0) if known.kind == "fgvc" else 0)
    if known.train and train != known.train:
        wrong.append(f"{train} images to train on, expected {known.train}")
    if known.kind == "fewshot" and len(set(Counter(source.train.labels).values())) > 1:
        wrong.append("classes with other numbers of shots than one another")
    if counts["test"] != known.test:
        wrong.append(f"{counts['test']} images to test on, expected {known.test}")
    return wrong
