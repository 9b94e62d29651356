"""Weights that the paths of many tasks share: a file of them, published beside a backbone's components."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from restuning.errors import CheckpointError, MissingExtra, line
from restuning.model.adapter import AdapterModule
from restuning.training.components import Components
from restuning.utils.files import atomic_write


def read_shared(path: str | Path) -> dict[str, Tensor]:
    """From a safetensors file. Raises CheckpointError if it cannot be read, or is not finite."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    try:
        found: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors has errors of its own
        raise CheckpointError(f"{path} holds no shared weights: {line(error)}") from error
    if not all(torch.isfinite(t).all() for t in found.values()):
        raise CheckpointError(f"{path} holds numbers that are not finite")
    return found


def components_in(path: str | Path) -> int | None:
    """How many components of each layer the paths of a file read; None: its tokens."""
    counts = [t.shape[-1] for name, t in read_shared(path).items() if "basis" in name]
    return max(counts, default=None)


def write_shared(path: Path, state: Mapping[str, Tensor]) -> None:
    """A safetensors file of them, whole or not at all."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    atomic_write(path, save({name: t.detach().cpu().contiguous() for name, t in state.items()}))


def give_shared(adapter: AdapterModule, path: str | Path, components: Components | None = None) -> None:
    """Give an adapter's path the shared weights of a file, and the components that they were trained on.

    Args:
        adapter: of bypass-query-shared, or of sizes of its own.
        path: of the file.
        components: of the bank that the adapter reads, if it reads one.

    Raises:
        CheckpointError: the file is none, of other sizes, or of other components than the bank's.
    """
    state = read_shared(path)
    adapter.set_shared(state)
    for layer, basis in (components.bases if components is not None else {}).items():
        held = state.get(f"stages.basis_{layer}")
        if held is not None and not torch.equal(held, basis.to(held)):
            raise CheckpointError(
                f"{path} was trained on other components than the bank's: build the bank with --tokens pca:K:FILE and "
                "the components.safetensors of the banks that it was trained on"
            )
