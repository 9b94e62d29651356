"""Saved adapters on the backbone that their files name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from restuning.backbones.load import load_backbone, preprocessing_of
from restuning.data import (
    Preprocess,
    Reading,
    reading,
)
from restuning.errors import CheckpointError
from restuning.model.tuned import Tuned
from restuning.runs.settings import RUN, read_run


def load_tuned(folder: Path, weights: str | None = None, onto: nn.Module | None = None) -> Tuned:
    """A saved adapter on the backbone that its files name (or on the one given).

    Weights come from `weights`, else from the run.json beside the adapter, else by the backbone's name.
    """
    from restuning.model.files import read

    config, _ = read(folder)
    if weights is None and (folder / RUN).exists():
        weights = read_run(folder / RUN).weights
    how = transform_of(folder, config.preprocessing)
    if onto is None:
        onto = load_backbone(str(config.backbone["name"]), weights)
        if isinstance(how, Preprocess) and preprocessing_of(onto).size != how.size:
            onto = load_backbone(str(config.backbone["name"]), weights, how.size[0])
    return Tuned.from_pretrained(onto, folder)


def transform_of(folder: Path, data: Mapping[str, Any] | None) -> Reading:
    """How items were read that an adapter was trained with."""
    if data is None:
        raise CheckpointError(f"{folder} names no preprocessing: it was not trained by the command line")
    return reading(data)
