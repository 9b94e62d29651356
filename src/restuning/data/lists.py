"""Images named in text files, a path and a label a line, VTAB-1k's way and NOAH's: `vtab:`, `fewshot:`, `domains:`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from restuning.data.folder import Files
from restuning.data.known import VTAB
from restuning.data.table import settings_of
from restuning.data.task import Source
from restuning.errors import DataError

Listed = list[tuple[Path, int]]

SHOTS = (1, 2, 4, 8, 16)
TARGETS = {
    "v2": "imagenetv2",
    "sketch": "imagenet-sketch",
    "a": "imagenet-adversarial",
    "r": "imagenet-rendition",
}
"""The targets of domain generalisation, and NOAH's folders of them."""


def load_vtab(rest: str) -> Source:
    """`PATH/NAME`: `NAME/images/{train800,val200,test}/%06d.jpg` and `NAME/{train800,val200,test}.txt`.

    Training items are train800val200, of which val200 come last: they are what is held out where so many are. A class
    may lack training items there; of the 19 names the number of classes is known.
    """
    root = _folder(rest, "vtab:PATH/NAME, NAME one of " + ", ".join(VTAB))
    parts = {name: read_list(root / f"{name}.txt", [root]) for name in ("train800", "val200", "test")}
    known = VTAB[root.name].classes if root.name in VTAB else None
    train, held = [*parts["train800"], *parts["val200"]], len(parts["val200"])
    return _source(root, train, None, parts["test"], known, held)


def load_fewshot(rest: str) -> Source:
    """`PATH[?shots=4&seed=1]`: NOAH's `annotations/train_meta.list.num_shot_{k}.seed_{s}`, `val_meta.list` and
    `test_meta.list`; images beside the annotations or in `images`. What a list has twice counts once."""
    path, settings = settings_of(rest, ("shots", "seed"))
    root = _folder(path, "fewshot:PATH, with annotations in it")
    lists, images = root / "annotations", [root, root / "images"]
    train = read_list(lists / _few(rest, settings), images)
    val, test = (read_list(lists / f"{split}_meta.list", images) for split in ("val", "test"))
    return _source(root, train, val, test)


def load_domains(rest: str) -> Source:
    """`PATH[?target=v2|sketch|a|r&shots=16&seed=0]`: few shots of ImageNet, tested on a target (by default on its own
    validation images), in NOAH's layout: `imagenet/{annotations,train,val}`, `imagenetv2`, `imagenet-sketch`,
    `imagenet-adversarial` and `imagenet-rendition`, each with `annotations/val_meta.list`; in PATH itself, or in its
    `few-shot` and `domain-generalization`. Labels are ImageNet's; A and R have 200 of them."""
    path, settings = settings_of(rest, ("target", "shots", "seed"))
    root, target = _folder(path, "domains:PATH, with imagenet and its targets in it"), settings.get("target", "")
    if target not in ("", *TARGETS):
        raise DataError(f"domains:{rest}: unknown target {target!r}: expected one of {', '.join(TARGETS)}")
    source = _one(root, "imagenet", "few-shot")
    train = read_list(source / "annotations" / _few(rest, {"shots": "16", **settings}), [source / "train", source])
    at = _one(root, TARGETS[target], "domain-generalization") if target else source
    test = read_list(at / "annotations" / "val_meta.list", [at] if target else [at / "val", at])
    return _source(at, train, None, test)


def read_list(path: Path, roots: Sequence[Path]) -> Listed:
    """(image, label) of each line, split from the right, for names may have spaces; each image once.

    roots: where the images may be; the first that has the first line's stands. Raises DataError, with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        there = ", ".join(sorted(p.name for p in path.parent.glob("*") if p.is_file())[:8]) or "nothing"
        raise DataError(f"no list {path} (there is {there})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found: dict[str, int] = {}
    for n, text in enumerate(lines, 1):
        name, _, label = text.strip().rpartition(" ")
        if not text.strip():
            continue
        if not name or not label.isdecimal():
            raise DataError(f"{path}, line {n}: {text.strip()[:60]!r} is no path and a label from 0 on")
        if found.setdefault(name, int(label)) != int(label):
            raise DataError(f"{path}, line {n}: {name!r} has two labels, {found[name]} and {label}")
    if not found:
        raise DataError(f"{path} is empty")
    first = next(iter(found))
    root = next((r for r in roots if (r / first).exists()), None)
    if root is None:
        raise DataError(f"{path}: no image {first!r} in {' or '.join(map(str, roots))}")
    return [(root / name, label) for name, label in found.items()]


def files(listed: Iterable[tuple[Path, int]]) -> Files:
    paths, labels = zip(*listed, strict=True)
    return Files(paths, labels)


def _source(
    where: Path, train: Listed, val: Listed | None, test: Listed, known: int | None = None, held: int = 0
) -> Source:
    classes = known or 1 + max(label for part in (train, val or [], test) for _, label in part)
    for part in filter(None, (train, val, test)):
        for image, label in part:
            if label >= classes:
                raise DataError(f"{where}: {image} has label {label}, and there are {classes} classes")
    if classes < 2:
        raise DataError(f"{where} has one class: expected two or more")
    names = tuple(map(str, range(classes)))
    return Source(names, files(train), files(val) if val else None, files(test), held=held)


def _few(rest: str, settings: dict[str, str]) -> str:
    shots, seed = settings.get("shots", "1"), settings.get("seed", "0")
    if shots not in map(str, SHOTS):
        raise DataError(f"{rest}: shots is {shots!r}, expected one of {', '.join(map(str, SHOTS))}")
    return f"train_meta.list.num_shot_{shots}.seed_{seed}"


def _one(root: Path, name: str, beside: str) -> Path:
    for at in (root / name, root / beside / name):
        if at.is_dir():
            return at
    raise DataError(f"no folder {name} in {root}, nor in its {beside}")


def _folder(path: str, expected: str) -> Path:
    root = Path(path)
    if not path or not root.is_dir():
        raise DataError(f"no such folder: {root.absolute()} (expected {expected})")
    return root
