"""`restuning bank plan`: what a bank of many items would take, on paper."""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from restuning.backbones.load import describe_backbone, reading_of
from restuning.data import Preprocess
from restuning.errors import RestuningError
from restuning.features.bank.format import SHARD_ROWS
from restuning.model.tuned import adapt
from restuning.side import Bypass

FORMATS = {"first": 0, "4": 16, "all": -1, "int8": -1}
"""Tokens of a bank by name, and how many each layer has beside those that are no patches; −1: all."""


def plan_bank(backbone: str, items: Sequence[int], rate: float, price: float) -> list[dict[str, Any]]:
    """For every number of items and every format of tokens: bytes, hours, dollars, files, and what a sweep holds.

    Args:
        backbone: of images, with tokens; it is described, not loaded.
        items: how many images.
        rate: images a second of one device, and price: dollars an hour of it; both are assumptions.

    Raises:
        RestuningError: for a backbone of texts, and numbers that are not positive.
    """
    if not items or min(items) < 1 or not rate > 0 or not price >= 0:
        raise RestuningError("bank plan: expected --items of 1 or more, and a --rate above 0")
    described = describe_backbone(backbone)
    how, tuned = reading_of(described), adapt(described, Bypass(), 1, pool="none")
    if not isinstance(how, Preprocess):
        raise RestuningError(f"{backbone} reads texts: a plan is of images")
    with torch.no_grad():  # on the meta device: shapes alone
        last = tuned.features(torch.empty(1, 3, *how.size, device="meta")).last
    info, layers, prefix = tuned.sites.info, len(tuned.request.layers), tuned.sites.info.grid or 0
    rows = []
    for count in items:
        for tokens, patches in FORMATS.items():
            held = last.shape[1] if patches < 0 else max(1, prefix + patches)
            each = layers * held * (info.out_features + 2 if tokens == "int8" else 2 * info.out_features)
            hours = count / rate / 3600
            names = sys.getsizeof(f"train[{count}]") + 8  # each item's, in a list
            rows.append(
                {
                    "items": count,
                    "tokens": tokens,
                    "bytes_an_item": each,
                    "bytes": each * count,
                    "hours": hours,
                    "dollars": hours * price,
                    "shards": -(-count // SHARD_ROWS),
                    "bytes_of_names": names * count,
                }
            )
    return rows
