"""Data sets as tasks, by `kind:rest`; each kind is one file and one row of KINDS."""

import difflib
from collections.abc import Callable

from restuning.data.digits import load_digits
from restuning.data.folder import load_folder
from restuning.data.folder import load_images as load_images
from restuning.data.hub import load_hub
from restuning.data.sprites import load_sprites
from restuning.data.tar import load_tar
from restuning.data.task import Images as Images
from restuning.data.task import Source as Source
from restuning.data.task import Task as Task
from restuning.data.task import check as check
from restuning.data.task import split as split
from restuning.data.transforms import Prepared as Prepared
from restuning.data.transforms import Preprocess as Preprocess
from restuning.errors import DataError

KINDS: dict[str, Callable[[str], Source]] = {
    "folder": load_folder,
    "tar": load_tar,
    "digits": load_digits,
    "sprites": load_sprites,
    "hf": load_hub,
}


def load_task(
    spec: str, *, train_size: int | None = None, val_size: int = 0, test_size: int | None = None, seed: int = 0
) -> Task:
    """`folder:PATH`, `tar:PATH`, `digits`, `sprites:location`, `sprites:orientation` or `hf:NAME[:CONFIG]`.

    Where there is no test split, `test_size` images (a fifth) are drawn first, the same at every call. `train_size`
    images (all) are then drawn by `seed`, and `val_size` of these held out for validation; with 0, the source's own
    validation split stands. Every draw is by class. Raises DataError for an unknown kind, for data that cannot be
    used, and for sizes below 1 or beyond what there is.
    """
    kind, _, rest = spec.partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"unknown data {spec!r}{hint}: expected one of {', '.join(KINDS)}")
    return split(spec, KINDS[kind](rest), train_size, val_size, test_size, seed)
