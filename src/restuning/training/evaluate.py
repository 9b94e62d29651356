"""How good a module is on a data set: yields (metric, value)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from restuning.data.objective import IGNORED, objective
from restuning.errors import RestuningError
from restuning.side.features import Features


class Examples(Protocol):
    """A data set of known length; an example is (inputs, label), inputs a tensor, or a tuple or a dict of tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Collates(Protocol):
    """A data set that makes batches of its own, as texts are padded."""

    def collate(self, examples: Any, /) -> Any: ...


def loader(dataset: Examples, batch_size: int = 1, **options: Any) -> DataLoader[Any]:
    """torch's loader, with the data set's own way to make batches."""
    collate = dataset.collate if isinstance(dataset, Collates) else None
    return DataLoader(cast(Dataset[Any], dataset), batch_size, collate_fn=collate, **options)


@runtime_checkable
class HasEpoch(Protocol):
    """A data set whose augmentation is a function of the epoch."""

    def set_epoch(self, epoch: int) -> None: ...


@runtime_checkable
class HasLengths(Protocol):
    """A data set whose examples differ in their length."""

    lengths: Sequence[int]


def by_length(dataset: Examples, rows: Sequence[int]) -> list[int]:
    """The rows, those of a length together, so that batches hold little padding; in their order where there is none."""
    return sorted(rows, key=dataset.lengths.__getitem__) if isinstance(dataset, HasLengths) else list(rows)


def back(order: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Where each of `rows` is in `order`."""
    at = {row: i for i, row in enumerate(order)}
    return torch.tensor([at[row] for row in rows])


def to_device(inputs: Any, device: torch.device) -> Any:
    """Collated inputs, a tensor, features, a dict or a list of tensors, on the device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Features):
        return inputs.map(lambda x: x.to(device, non_blocking=True))
    if isinstance(inputs, Mapping):
        return {name: x.to(device, non_blocking=True) for name, x in inputs.items()}
    return [x.to(device, non_blocking=True) for x in inputs]


@torch.no_grad()
def predict_logits(
    model: nn.Module, dataset: Examples, batch_size: int, workers: int = 0, rows: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """(logits [n, c] in float32, labels [n]), both on the CPU, in the data set's order; modes are restored.

    rows: only these, in their order. Of outputs by token, logits [n, t, c] and labels [n, t], shorter texts are padded.
    """
    rows = range(len(dataset)) if rows is None else rows
    if len(rows) == 0:
        raise RestuningError("there is nothing to evaluate: the data set has 0 examples")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # its own generator: a loader without one draws a seed from the global one
    order = by_length(dataset, rows)
    options = {"num_workers": workers, "generator": torch.Generator().manual_seed(0), "sampler": order}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        pairs = [
            (model(to_device(inputs, device)).float().cpu(), labels)
            for inputs, labels in loader(dataset, batch_size, **options)
        ]
    finally:
        for module, mode in modes:
            module.training = mode
    again = back(order, rows)
    return padded([a for a, _ in pairs])[again], padded([b for _, b in pairs], IGNORED)[again]


def padded(parts: Sequence[Tensor], value: float = 0) -> Tensor:
    """Batches as one tensor; where they differ in their second size, (b, t, …), the shorter are padded at the end."""
    if len({part.shape[1:] for part in parts}) > 1:
        longest = max(part.shape[1] for part in parts)
        pads = [[0, 0] * (part.ndim - 2) + [0, longest - part.shape[1]] for part in parts]
        parts = [F.pad(part, pad, value=value) for part, pad in zip(parts, pads, strict=True)]
    return torch.cat(list(parts))


def evaluate(
    model: nn.Module, dataset: Examples, batch_size: int, workers: int = 0, kind: str = "single-label"
) -> Iterator[tuple[str, float]]:
    """The metrics of a kind of task; see `restuning.objective`. Shares are in percent."""
    yield from objective(kind).metrics(*predict_logits(model, dataset, batch_size, workers))
