"""Backbones that read a part of their input: by a mask of which no pooling here knows, or at random."""

import inspect

from torch import nn

from restuning.backbones.anatomy import Anatomy
from restuning.errors import SiteError


def check_mask(backbone: nn.Module, root: str, row: Anatomy) -> None:
    """Raises SiteError for a backbone whose images are padded by a mask, of which no pooling here knows, or that leaves
    out patches at random."""
    if "noise" in inspect.signature(backbone.forward).parameters:
        raise SiteError(
            f"{type(backbone).__name__} leaves out patches that are drawn at random (noise): load its weights into the "
            "plain model of its encoder, such as transformers' ViTModel"
        )
    for module in (backbone, backbone.get_submodule(root)):
        asks = inspect.signature(module.forward).parameters
        named = next((name for name in asks if name in ("pixel_attention_mask", "patch_valid", "pixel_mask")), None)
        if named is not None:
            raise SiteError(
                f"{type(backbone).__name__} reads images that are padded ({named}): its features would be pooled with "
                "the padding; describe it with anatomy= if all images are of one size"
            )
