"""Saved adapters on the backbone that their files name."""

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from restuning._version import __version__
from restuning.model.tuned import Tuned, adapt
from restuning.backbones.load import MICRO, describe_backbone, load_backbone, preprocessing_of, reading_of
from restuning.features.bank import (
    LIMIT,
    Bank,
    FromBank,
    FromFeatures,
    CachedFeatures,
    build,
    bytes_per_item,
    cache_features,
)
from restuning.data import (
    Items,
    Prepared,
    Preprocess,
    Reading,
    Task,
    Tokenise,
    check,
    load_task,
    prepared,
    reading,
    split,
)
from restuning.errors import CheckpointError, Diverged, RestuningError
from restuning.training.evaluate import Examples, evaluate
from restuning.utils.files import as_json, contents, locked, atomic_write
from restuning.training.initialise import initialise, needs_data
from restuning.model.count import count
from restuning.methods.spec import Bypass, Full, Method, on_blocks, resize
from restuning.methods.named import find_method
from restuning.data.objective import Objective, balanced, objective, sort_key
from restuning.utils.distributed import is_main_process, barrier
from restuning.training.logging import bar
from restuning.training.config import TrainConfig
from restuning.training.loop import fit
from restuning.side.features import MEAN

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
