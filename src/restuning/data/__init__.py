"""Data sets as tasks, by `kind:rest`; each kind is one file and one row of KINDS."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from restuning.data.altered import altered
from restuning.data.captioned import Captioned as Captioned
from restuning.data.captioned import Square as Square
from restuning.data.captions import load_captions as load_captions
from restuning.data.cifar import load_cifar100
from restuning.data.digits import load_digits
from restuning.data.fgvc import load_fgvc
from restuning.data.folder import load_folder
from restuning.data.folder import load_images as load_images
from restuning.data.hub import load_glue, load_hub
from restuning.data.lists import load_domains, load_fewshot, load_vtab
from restuning.data.sprites import load_sprites
from restuning.data.table import load_table
from restuning.data.tar import load_tar
from restuning.data.task import Items as Items
from restuning.data.task import Source as Source
from restuning.data.task import Task as Task
from restuning.data.task import check as check
from restuning.data.task import part
from restuning.data.task import split as split
from restuning.data.task import without_bad as without_bad
from restuning.data.text import Texts as Texts
from restuning.data.text import load_text
from restuning.data.tokens import Tokenise as Tokenise
from restuning.data.tokens import Tokenised as Tokenised
from restuning.data.transforms import Prepared as Prepared
from restuning.data.transforms import Preprocess as Preprocess
from restuning.errors import DataError

KINDS: dict[str, Callable[[str], Source]] = {
    "folder": load_folder,
    "tar": load_tar,
    "digits": load_digits,
    "sprites": load_sprites,
    "hf": load_hub,
    "table": load_table,
    "text": load_text,
    "glue": load_glue,
    "vtab": load_vtab,
    "fgvc": load_fgvc,
    "fewshot": load_fewshot,
    "domains": load_domains,
    "cifar100": load_cifar100,
}

Reading: TypeAlias = Preprocess | Tokenise
"""How items become what a backbone reads."""


def reading(data: Mapping[str, Any]) -> Reading:
    """The inverse of `to_dict`, of either. Raises DataError if it cannot be read."""
    return Tokenise.from_dict(data) if "tokenizer" in data else Preprocess.from_dict(data)


def prepared(
    items: Items, how: Reading, augment: bool = False, seed: int = 0, cache: bool = True
) -> Prepared | Tokenised:
    """Items as examples, (inputs, label). augment, seed and cache are images'; see `Prepared`.

    Raises DataError for texts where images are read, and images where texts are.
    """
    texts = len(items) > 0 and isinstance(items.item(0), tuple)
    if texts != isinstance(how, Tokenise):
        raise DataError(f"{items.names[0]} is {'a text' if texts else 'an image'}, which this backbone does not read")
    if texts and augment:
        raise DataError(f"{items.names[0]} is a text: augmentation and views are for images")
    return Tokenised(items, how) if isinstance(how, Tokenise) else Prepared(items, how, augment, seed, cache)


def load_task(
    spec: str,
    *,
    train_size: int | None = None,
    val_size: int = 0,
    test_size: int | None = None,
    seed: int = 0,
    shots: int | None = None,
) -> Task:
    """`folder:PATH`, `tar:PATH`, `digits`, `sprites:location`, `sprites:orientation`, `sprites:scale`, `sprites:count`,
    `table:PATH`, `text:PATH`, `glue:NAME` or `hf:NAME[:CONFIG]`; `vtab:PATH/NAME`, `fgvc:PATH`, `fewshot:PATH`,
    `domains:PATH` and `cifar100:PATH`; `altered:HOW:SPEC` and `part:TRAIN,TEST:SPEC` of others.

    Where there is no test split, `test_size` items (a fifth) are drawn first, the same at every call. `train_size`
    items (all), or `shots` of each class, are then drawn by `seed`, and `val_size` of these held out for validation;
    with 0, the source's own validation split stands. Every draw is by class. Raises DataError for an unknown kind, for
    data that cannot be used, and for sizes below 1 or beyond what there is.
    """
    return split(spec, load_source(spec), train_size, val_size, test_size, seed, shots)


def load_source(spec: str) -> Source:
    """The data set with its own splits. Raises DataError as `load_task` does."""
    kind, _, rest = spec.partition(":")
    if kind not in KINDS:
        meant = _meant(spec)
        if meant is not None:
            raise DataError(
                f"unknown data {spec!r} (did you mean '{meant}:{spec}'?): expected one of {', '.join(KINDS)}"
            )
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"unknown data {spec!r}{hint}: expected one of {', '.join(KINDS)}")
    return KINDS[kind](rest)


def _meant(spec: str) -> str | None:
    """The kind of a path that was given without one."""
    path = Path(spec)
    if not spec or "\0" in spec or not path.exists():
        return None
    if path.is_dir():
        inside = {p.suffix for p in path.iterdir()}
        return (
            "table" if inside & {".csv", ".tsv", ".jsonl"} and not any(p.is_dir() for p in path.iterdir()) else "folder"
        )
    kinds = {".csv": "table", ".tsv": "text", ".jsonl": "table"}
    return kinds.get(path.suffix, "tar" if ".tar" in path.name or path.suffix in (".tgz", ".tbz2", ".txz") else None)


def _altered(rest: str) -> Source:
    how, _, spec = rest.partition(":")
    return altered(load_source(spec), how)


def _part(rest: str) -> Source:
    sizes, _, spec = rest.partition(":")
    train, _, test = sizes.partition(",")
    if not (train.isdecimal() and test.isdecimal()):
        raise DataError(f"part:{rest}: expected part:TRAIN,TEST:SPEC, as in part:1000,500:folder:photos")
    return part(spec, load_source(spec), int(train), int(test))


KINDS |= {"altered": _altered, "part": _part}
