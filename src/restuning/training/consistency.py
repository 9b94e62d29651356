"""Consistency between two draws of noise on what an adapter adds, in the manner of PACE (Ni et al., NeurIPS 2024)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from restuning.errors import MethodError
from restuning.model.tuned import Tuned, arguments
from restuning.tuners.base import as_tuner


class TwoDraws(nn.Module):
    """A tuned model on every example twice, each time with noise of its own: logits (2 b, c), the first draw's first.

    What a tuner of block l of L adds is multiplied by N(1, σ_l²), one draw for each image and channel, with
    σ_l = σ (1 − l / L); what a side path adds, by the same along its own steps (`SideNetwork.branches`). Where the
    backbone's features are all that is read, it runs once on each example.
    """

    def __init__(self, model: nn.Module, sigma: float) -> None:
        """
        Args:
            model: holds a `Tuned`, whose active adapters have tuners or a side network.
            sigma: σ.

        Raises:
            MethodError: nothing is there that noise could be put on.
        """
        super().__init__()
        self.model, self.sigma = model, sigma
        tuned = next((module for module in model.modules() if isinstance(module, Tuned)), None)
        self.branches = [] if tuned is None else branches_of(tuned)
        inside = [] if tuned is None else [t for name in tuned.active() for _, t in tuned.adapter(name).inside]
        self._on_maps = {as_tuner(tuner) for tuner in inside if as_tuner(tuner).layout == "map"}
        if not self.branches:
            raise MethodError(
                "consistency is between two draws of noise on what tuners or a side path add: here is none"
            )
        self._batch, self._draws = 0, dict[nn.Module, Tensor]()

    @contextmanager
    def on(self) -> Iterator[None]:
        """While it lasts, branches that are in training mode are noisy. A block that is recomputed for its gradient is
        given the noise that it had."""
        handles = [branch.register_forward_hook(partial(self._shake, depth)) for branch, depth in self.branches]
        try:
            yield
        finally:
            self._draws.clear()
            for handle in handles:
                handle.remove()

    def forward(self, inputs: Any) -> Tensor:
        self._draws.clear()
        tuned = self.model
        if isinstance(tuned, Tuned) and tuned.reads_features:
            args, kwargs = arguments((inputs,), {})
            features = _twice(tuned.features(*args, **kwargs))
            self._batch = len(features)
            return tuned.from_features(features)  # type: ignore[no-any-return]
        inputs = _twice(inputs)
        self._batch = len(next(x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor)))
        return self.model(inputs)  # type: ignore[no-any-return]

    def _shake(self, depth: float, branch: nn.Module, _: object, out: Any) -> Any:
        if not branch.training or out is None:
            return None
        if isinstance(out, tuple):  # keys and values, the same for every image until now
            return tuple(
                self._noisy(branch, t.expand(self._batch, *t.shape[-3:]), depth, (1, -1), i) for i, t in enumerate(out)
            )
        return self._noisy(branch, out, depth, (1,) if branch in self._on_maps else (-1,))

    def _noisy(self, branch: nn.Module, out: Tensor, depth: float, channels: Sequence[int], part: int = 0) -> Tensor:
        key: Any = (branch, part)
        if key not in self._draws:
            shape = [1] * out.ndim
            shape[0] = self._batch
            for axis in channels:
                shape[axis] = out.shape[axis]
            self._draws[key] = 1 + self.sigma * (1 - depth) * torch.randn(shape, device=out.device, dtype=out.dtype)
        noise = self._draws[key]
        if len(out) != len(noise):  # every image is several windows
            noise = noise.repeat_interleave(len(out) // len(noise), 0)
        return out * noise


def penalty(first: Tensor, second: Tensor) -> Tensor:
    """The squared difference of two draws' logits, (b, …, c) each, summed over the classes, as a mean over the rest."""
    return (first - second).square().sum(-1).mean()


def branches_of(tuned: Tuned) -> list[tuple[nn.Module, float]]:
    """What the active adapters add, and how deep each of it is, from 0 (first) to 1: tuners inside the backbone, and
    the branches of side networks."""
    found: list[tuple[nn.Module, float]] = []
    for name in tuned.active():
        adapter = tuned.adapter(name)
        for site, tuner in (*adapter.inside, *adapter.in_tail):
            if as_tuner(tuner).form != "copy":
                first = 0 if site.op == "embed" else adapter.depth - 1
                found.append((tuner, (first if site.block is None else site.block) / adapter.depth))
        if adapter.side is not None:
            found += adapter.side.branches()
    return found


def _twice(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda x: torch.cat([x, x]), inputs)
