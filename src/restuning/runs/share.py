"""Shared weights for a thousand tasks, trained on the banks of some."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from restuning.data import split
from restuning.data.objective import objective
from restuning.errors import CheckpointError, Diverged, MethodError, RestuningError
from restuning.features.bank import Bank, CachedFeatures, FromBank, FromFeatures
from restuning.features.together import train_together
from restuning.runs.banks import from_bank
from restuning.runs.settings import Run
from restuning.runs.sources import on_bank
from restuning.training.config import TrainConfig
from restuning.training.logging import bar
from restuning.training.shared import write_shared
from restuning.utils.options import Option


@dataclass(frozen=True)
class Share:
    """Tasks whose paths share weights, each with its own queries and head, which are left behind."""

    banks: Annotated[
        tuple[str, ...], Option("folders of banks, of the same components of one backbone", flag="bank", metavar="DIR")
    ]
    method: Annotated[str, Option("bypass-query-shared, or a .json file of its kind")] = "bypass-query-shared"
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.banks:
            raise RestuningError("banks (none): expected at least one")


def share(settings: Share, out: Path, progress: bool = True) -> dict[str, Any]:
    """Train on all of them at once and write the file of what they share. Returns what was done.

    Raises:
        RestuningError: no two banks of one backbone and the same components, or another method.
        Diverged: what is shared is no longer finite.
    """
    opened = [Bank(path) for path in settings.banks]
    _alike(settings.banks, opened)
    torch.manual_seed(settings.training.seed)
    models, data, objectives = list[FromFeatures](), list[CachedFeatures](), []
    for path, bank in zip(settings.banks, opened, strict=True):
        run = Run(**from_bank(path), method=settings.method, training=settings.training)
        whole = split(run.data, bank.source(), None, 0, run.test_size, settings.training.seed)
        # tasks begin apart: a seed of its own each
        seed = settings.training.seed * len(opened) + len(models)
        made = on_bank(replace(run, training=replace(run.training, seed=seed)), whole, bank)
        models.append(made())
        data.append(FromBank(bank, whole.train).kept())
        objectives.append(objective(whole.kind, smoothing=settings.training.label_smoothing))
    with bar(
        settings.training.epochs * max(-(-len(d) // settings.training.batch_size) for d in data), progress
    ) as show:
        state = train_together(
            models, data, objectives, settings.training, lambda step, _, loss: show(step, f"loss {loss:.3f}")
        )
    if not all(torch.isfinite(t).all() for t in state.values()):
        raise Diverged(f"what is shared is not finite at lr {settings.training.lr:g}: lower lr")
    write_shared(out, state)
    numbers = sum(t.numel() for name, t in state.items() if "basis" not in name)
    return {"tasks": len(models), "items": sum(map(len, data)), "parameters": numbers, "file": str(out)}


def _alike(paths: Sequence[str], banks: Sequence[Bank]) -> None:
    first = banks[0].components
    if first is None:
        raise CheckpointError(f"{paths[0]} holds no components: build it with --tokens pca:64")
    for path, bank in zip(paths[1:], banks[1:], strict=True):
        other = bank.components
        same = other is not None and other.bases.keys() == first.bases.keys()
        if not same or any(not torch.equal(other.bases[layer], basis) for layer, basis in first.bases.items()):  # type: ignore[union-attr]
            raise CheckpointError(
                f"{path} holds other components than {paths[0]}: build it with --tokens "
                f"pca:{first.count}:{paths[0]}/components.safetensors"
            )
        if bank.manifest["backbone"]["fingerprint"] != banks[0].manifest["backbone"]["fingerprint"]:
            raise MethodError(f"{path} is of another backbone than {paths[0]}")
