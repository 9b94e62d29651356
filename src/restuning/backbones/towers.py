"""Of a model of several towers, or of one of which a row of the table describes a small part: which is meant."""

import inspect
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import nn

from restuning.backbones.anatomy import Anatomy
from restuning.errors import SiteError

Found: TypeAlias = tuple[Anatomy, str, list[str]]
"""A row that fits, the path of what holds the blocks, the paths of the lists of blocks."""


def _under_path(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def same_tower(lists: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two finds share blocks."""
    return any(_under_path(a, b) or _under_path(b, a) for a in lists for b in other)


def outermost(found: Sequence[Found]) -> list[Found]:
    """Without those inside the holder of another, such as the convolutional stem of a hybrid."""
    return [one for one in found if not any(other[1] != one[1] and _under_path(one[1], other[1]) for other in found)]


def check_covered(backbone: nn.Module, row: Anatomy, lists: Sequence[str]) -> None:
    """Raises SiteError where most of what a model has in lists of blocks is not in those that a row describes: a
    probe of HRNet's first stage, or of one tower of many, would pass for one of the model."""
    mine = {id(p) for path in lists for p in backbone.get_submodule(path).parameters()}
    every = {id(p): p.numel() for holder in _block_lists(backbone) for p in holder.parameters()}
    covered, total = sum(n for key, n in every.items() if key in mine), sum(every.values())
    if total and 2 * covered < total:
        raise SiteError(
            f"{row.name} fits {', '.join(lists)}, which hold {100 * covered / total:.0f} % of the parameters in this "
            f"{type(backbone).__name__}'s lists of blocks: pass the part that is meant, or describe it with anatomy="
        )


def _block_lists(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of modules of one kind, each with parts of its own."""
    children = list(module.children())
    kinds = {type(child) for child in children}
    listed = isinstance(module, nn.ModuleList | nn.Sequential) and len(kinds) == 1
    if listed and any(True for _ in children[0].children()):
        yield module
    else:
        for child in children:
            yield from _block_lists(child)


def check_mask(backbone: nn.Module, root: str, row: Anatomy) -> None:
    """Raises SiteError for a backbone whose images are padded by a mask, of which no pooling here knows."""
    for module in (backbone, backbone.get_submodule(root)):
        asks = inspect.signature(module.forward).parameters
        named = next((name for name in asks if name in ("pixel_attention_mask", "patch_valid", "pixel_mask")), None)
        if named is not None:
            raise SiteError(
                f"{type(backbone).__name__} reads images that are padded ({named}): its features would be pooled with "
                "the padding; describe it with anatomy= if all images are of one size"
            )
