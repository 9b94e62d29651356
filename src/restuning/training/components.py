"""Components: of every layer's normalised tokens, the few directions that hold most of them.

A file of them belongs to a backbone: fitted once, on the images of any task, it can be published and shared by all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from restuning.errors import CheckpointError, MissingExtra, line
from restuning.model.tuned import Tuned
from restuning.side.features import Features, TokenSelection, normalised, summary
from restuning.training.evaluate import Examples, by_length, loader, to_device

FIT_ITEMS = 256
"""Items that components are fitted on at most, evenly spaced."""


@dataclass(frozen=True)
class Components:
    """bases: V_l (d_l, k) by layer, with orthonormal columns: the top eigenvectors of Σ t tᵀ over normalised tokens."""

    bases: Mapping[int, Tensor]

    @property
    def count(self) -> int:
        """k, of the layer that has most."""
        return max(basis.shape[1] for basis in self.bases.values())

    def of(self, features: Features, prefix: int) -> Features:
        """The components τ_l = LN(x_l) V_l (b, n, k) of every layer, the summaries of LN(x_l) (b, 1 or 2, d_l), and the
        mask.

        Args:
            features: of all tokens, x_l (b, n, d_l).
            prefix: how many tokens come before the patches.
        """
        layers, summaries = {}, {}
        for layer, basis in self.bases.items():
            t = normalised(features.layers[layer])
            layers[layer] = t @ basis.to(t)
            summaries[layer] = summary(t, prefix, features.mask)
        tokens = TokenSelection("components", prefix, self.count)
        return Features(layers, tokens, features.mask, summaries=summaries)

    def state(self) -> dict[str, Tensor]:
        return {str(layer): basis.contiguous() for layer, basis in self.bases.items()}

    @classmethod
    def load(cls, path: str | Path) -> "Components":
        """From a safetensors file of (d_l, k) by layer. Raises CheckpointError if it holds something else."""
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise MissingExtra("safetensors", "cli") from error
        try:
            found = {int(name): basis for name, basis in load_file(path).items()}
        except Exception as error:  # safetensors has errors of its own
            raise CheckpointError(f"{path} holds no components: {line(error)}") from error
        if not found or any(basis.ndim != 2 for basis in found.values()):
            raise CheckpointError(f"{path} holds no components: expected a matrix for every layer")
        return cls(dict(sorted(found.items())))

    def check(self, widths: Mapping[int, int], where: str) -> None:
        """Raises CheckpointError where they are of another backbone, by its layers and their widths."""
        found = {layer: basis.shape[0] for layer, basis in self.bases.items()}
        if found != dict(widths):
            raise CheckpointError(
                f"{where} holds components of {len(found)} layers of widths {sorted(set(found.values()))}: here "
                f"are {len(widths)} of widths {sorted(set(widths.values()))}"
            )


@torch.no_grad()
def fit_components(tuned: Tuned, examples: Examples, count: int, batch_size: int = 32) -> Components:
    """The components of the layers that the active adapter reads, from at most 256 of the examples.

    Args:
        tuned: with an adapter that reads every token of its layers.
        examples: (inputs, label) as the backbone takes them.
        count: k; a layer that is narrower has as many as its width.
        batch_size: of the pass.
    """
    device = next(tuned.parameters()).device
    step = max(len(examples) / FIT_ITEMS, 1)
    rows = [int(i * step) for i in range(min(len(examples), FIT_ITEMS))]
    sums: dict[int, Tensor] = {}
    for inputs, _ in loader(examples, batch_size, sampler=by_length(examples, rows)):
        features = tuned.features(to_device(inputs, device))
        mask = features.mask
        for layer, x in features.layers.items():
            t = normalised(x).flatten(0, 1) if mask is None else normalised(x)[mask.bool()]
            product = (t.mT @ t).to("cpu", torch.float64)
            sums[layer] = sums[layer] + product if layer in sums else product
    return Components({layer: top(gram, count) for layer, gram in sums.items()})


def top(gram: Tensor, count: int) -> Tensor:
    """The eigenvectors (d, k) of the largest eigenvalues of a symmetric matrix (d, d), each with its largest entry
    positive."""
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    top_vectors: Tensor = (vectors * largest.sign()).float().contiguous()
    return top_vectors


def widths_of(tuned: Tuned, layers: Sequence[int]) -> dict[int, int]:
    """By layer, those of the backbone."""
    return {layer: tuned.sites.features[layer].out_features for layer in layers}
