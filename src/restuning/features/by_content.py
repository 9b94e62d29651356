"""Features by content: an item that was seen before, under whatever name and by whatever model, takes no pass."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from threading import RLock

import torch

from restuning.model.passes import features_of
from restuning.model.tuned import Tuned, arguments
from restuning.side.features import FIRST, LAST, FeatureRequest, Features
from restuning.training.evaluate import Examples, by_length, loader, padded, to_device


class ContentCache:
    """Features of single items in memory, the oldest forgotten beyond a limit. Any number of threads may ask: one
    computes, and the others wait.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.lock = limit, 0, RLock()
        self.rows: dict[Hashable, Features] = {}

    def features(
        self,
        tuned: Tuned,
        backbone: Hashable,
        digests: Sequence[bytes],
        examples: Callable[[Sequence[int]], Examples],
        batch_size: int,
    ) -> Features:
        """What the active adapter reads of each item, from the cache or by one pass over those that are not there.

        Args:
            tuned: with adapters that read features and change none.
            backbone: what tells the backbone and how it reads its items from others.
            digests: of the items.
            examples: the examples of these items, by index.
            batch_size: of a pass.
        """
        request = widened(tuned)
        keys = [(backbone, request, digest) for digest in digests]
        with self.lock:
            missing = list({key: i for i, key in reversed(list(enumerate(keys))) if key not in self.rows}.values())
            if missing:
                self._compute(tuned, request, [keys[i] for i in missing], examples(missing), batch_size)
            found = Features.joined([self.rows[key] for key in keys], padded)
            while self.bytes > self.limit:
                oldest = self.rows.pop(next(iter(self.rows)))
                self.bytes -= sum(x.nbytes for x in oldest.tensors())
        return found

    @torch.no_grad()
    def _compute(
        self, tuned: Tuned, request: FeatureRequest, keys: Sequence[Hashable], examples: Examples, batch_size: int
    ) -> None:
        device = next(tuned.parameters()).device
        order = by_length(examples, range(len(examples)))
        rows = iter(order)
        for inputs, _ in loader(examples, batch_size, sampler=order):
            args, kwargs = arguments((to_device(inputs, device),), {})
            features = features_of(tuned, {}, request, True, args, kwargs)
            for k in range(len(features)):
                row = features.map(lambda x, k=k: x[k : k + 1].to("cpu", copy=True))  # type: ignore[misc]
                self.rows[keys[next(rows)]] = row
                self.bytes += sum(x.nbytes for x in row.tensors())

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self.rows.clear()
            self.bytes = 0


def widened(tuned: Tuned) -> FeatureRequest:
    """What the active adapters read; where that is one token of a layer, of all layers that a bypass would read too:
    they come from the same pass, and then methods share it."""
    request = tuned.request
    if request.tokens not in (FIRST, LAST) or not tuned.sites.uniform:
        return request
    return replace(request, layers=tuple(range(len(tuned.sites.features))))
