"""Saved adapters on the backbone that their files name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from restuning.backbones.load import load_backbone, preprocessing_of
from restuning.data import Preprocess, Reading, reading
from restuning.errors import CheckpointError
from restuning.model.files import read
from restuning.model.tuned import Tuned
from restuning.runs.settings import RUN, read_run


def load_tuned(folder: Path, weights: str | None = None, onto: nn.Module | None = None) -> Tuned:
    """A saved adapter on the backbone that its files name (or on the one given).

    Weights come from `weights`, else from the run.json beside the adapter, else by the backbone's name.
    """
    return Tuned.from_pretrained(backbone_of(folder, weights) if onto is None else onto, folder)


def load_several(adapters: Sequence[Path], weights: str | None) -> tuple[Tuned, dict[str, Path]]:
    """All adapters on the backbone of the first one, and their names there.

    Raises CheckpointError for those that do not read one kind of items in one way.
    """
    tuned = load_tuned(adapters[0], weights)
    tuned.eval()
    names = {"default": adapters[0]}
    wanted = tuned.adapter_config().preprocessing
    for i, folder in enumerate(adapters[1:], 2):
        tuned.load_adapter(folder, f"adapter_{i}")
        names[f"adapter_{i}"] = folder
        if tuned.adapter_config().preprocessing != wanted:
            raise CheckpointError(f"{folder} reads its items otherwise than {adapters[0]}: take them one by one")
        if "per-token" in (kinds := {tuned.adapter_config(name).kind for name in names}) and len(kinds) > 1:
            raise CheckpointError(f"{folder}: labels by token and others: take them one by one")
    return tuned, names


def backbone_of(folder: Path, weights: str | None = None) -> nn.Module:
    """The backbone that a saved adapter's files name, of the image size that it was trained at."""
    config, _ = read(folder)
    weights = weights_of(folder) if weights is None else weights
    how = transform_of(folder, config.preprocessing)
    backbone = load_backbone(str(config.backbone["name"]), weights)
    if isinstance(how, Preprocess) and preprocessing_of(backbone).size != how.size:
        backbone = load_backbone(str(config.backbone["name"]), weights, how.size[0])
    return backbone


def weights_of(folder: Path) -> str | None:
    """The backbone's weights by the run.json beside a saved adapter, if there is one and it names them."""
    return read_run(folder / RUN).weights if (folder / RUN).exists() else None


def transform_of(folder: Path, data: Mapping[str, Any] | None) -> Reading:
    """How items were read that an adapter was trained with."""
    if data is None:
        raise CheckpointError(f"{folder} names no preprocessing: it was not trained by the command line")
    return reading(data)
