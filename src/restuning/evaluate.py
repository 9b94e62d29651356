"""How good a module is on a data set: yields (metric, value)."""

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from restuning.errors import RestuningError


class Examples(Protocol):
    """A data set of known length; an example is (inputs, label), inputs a tensor or a tuple of tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def to_device(inputs: Any, device: torch.device) -> Any:
    """Collated inputs, a tensor or a list of tensors, on the device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return [x.to(device, non_blocking=True) for x in inputs]


@torch.no_grad()
def predict_logits(model: nn.Module, dataset: Examples, batch_size: int, workers: int = 0) -> tuple[Tensor, Tensor]:
    """(logits [n, c] in float32, labels [n]), both on the CPU, in the data set's order; modes are restored."""
    if len(dataset) == 0:
        raise RestuningError("there is nothing to evaluate: the data set has 0 examples")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # its own generator: a loader without one draws a seed from the global one
    loader = DataLoader(
        cast(Dataset[Any], dataset), batch_size, num_workers=workers, generator=torch.Generator().manual_seed(0)
    )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        pairs = [(model(to_device(inputs, device)).float().cpu(), labels) for inputs, labels in loader]
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def evaluate(model: nn.Module, dataset: Examples, batch_size: int, workers: int = 0) -> Iterator[tuple[str, float]]:
    """Accuracy in percent, top5 where there are more than 5 classes, and the mean cross-entropy."""
    logits, labels = predict_logits(model, dataset, batch_size, workers)
    yield "accuracy", 100 * (logits.argmax(1) == labels).double().mean().item()
    if logits.shape[1] > 5:
        yield "top5", 100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    yield "loss", F.cross_entropy(logits, labels).item()
