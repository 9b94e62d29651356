"""`cifar100:PATH[?fetch=yes]`: the original pixels, by torchvision."""

from pathlib import Path

from restuning.data.digits import Arrays
from restuning.data.table import settings_of
from restuning.data.task import Source
from restuning.errors import DataError, MissingExtra, line


def load_cifar100(rest: str) -> Source:
    """PATH holds `cifar-100-python`; with `fetch=yes` torchvision downloads it there. Raises DataError where it is not
    there, or is damaged (torchvision compares checksums), or cannot be fetched."""
    path, settings = settings_of(rest, ("fetch",))
    try:
        from torchvision.datasets import CIFAR100
    except ImportError as error:
        raise MissingExtra("torchvision", "data") from error
    fetch = settings.get("fetch") == "yes"
    try:
        train, test = (CIFAR100(path, train=split, download=fetch) for split in (True, False))
    except Exception as error:
        if fetch:
            raise DataError(f"CIFAR-100 cannot be fetched to {path}: {line(error)}; is there a network?") from error
        where = Path(path).absolute()
        raise DataError(
            f"no intact cifar-100-python in {where}: put it there, or have it fetched: cifar100:{path}?fetch=yes"
        ) from error
    named = (("train", train), ("test", test))
    made = {name: Arrays(part.data, list(part.targets), f"cifar100/{name}") for name, part in named}
    return Source(tuple(train.classes), made["train"], test=made["test"])
