"""`fgvc:PATH`: VPT's splits of the five fine-grained sets, {train,val,test}.json = {path: class}."""

from pathlib import Path

from restuning.data.lists import Listed, files
from restuning.data.task import Source
from restuning.errors import DataError, line
from restuning.utils.reading import read_json

IMAGES = ("", "images", "Images")
"""Where paths begin: CUB and NABirds in `images`, Dogs in `Images`, Cars and Flowers in the folder itself."""


def load_fgvc(path: str) -> Source:
    """Classes are the training file's, in order. Raises DataError for files that are missing or broken, and for a class
    that training lacks."""
    root = Path(path)
    if not path or not root.is_dir():
        raise DataError(f"no such folder: {root.absolute()} (expected fgvc:PATH, with train.json, val.json, test.json)")
    splits = {name: _read(root / f"{name}.json") for name in ("train", "val", "test")}
    ids = sorted(set(splits["train"].values()), key=lambda c: (not c.isdecimal(), int(c) if c.isdecimal() else 0, c))
    at = {c: i for i, c in enumerate(ids)}
    made: dict[str, Listed] = {}
    for name, rows in splits.items():
        first = next(iter(rows))
        below = next((b for b in IMAGES if (root / b / first).exists()), None)
        if below is None:
            raise DataError(f"{root / name}.json: no image {first!r} in {root}, nor in its images")
        strange = next((c for c in rows.values() if c not in at), None)
        if strange is not None:
            raise DataError(f"{root / name}.json: class {strange!r} is not among the training classes")
        made[name] = [(root / below / image, at[c]) for image, c in rows.items()]
    if len(ids) < 2:
        raise DataError(f"{root} has one class: expected two or more")
    return Source(tuple(ids), files(made["train"]), files(made["val"]), files(made["test"]))


def _read(path: Path) -> dict[str, str]:
    try:
        rows = read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path.name} in {path.parent} (expected train.json, val.json and test.json)") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {line(error)}") from error
    if not isinstance(rows, dict) or not rows or not all(isinstance(c, int | str) for c in rows.values()):
        raise DataError(f"{path}: expected an object, path to class, with one image or more")
    return {name: str(c) for name, c in rows.items()}
