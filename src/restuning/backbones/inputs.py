"""What to feed a backbone to see what it does: one small batch, as its own configuration has it."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from restuning.backbones.trace import BATCH, WORDS
from restuning.errors import SiteError


def inputs_of(backbone: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs of one small forward, as the backbone's own configuration has them; several, where it does not say.

    Raises SiteError where nothing says of what kind they are.
    """
    frames: tuple[int, ...] = ()
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    timm, config = getattr(backbone, "pretrained_cfg", None), getattr(backbone, "config", None)

    def pixels(channels: int, sizes: Sequence[tuple[int, int]], name: str) -> Iterator[dict[str, Any]]:
        draw = torch.Generator().manual_seed(0)
        for size in dict.fromkeys(sizes):
            image = torch.randn(BATCH, *frames, channels, *size, generator=draw)
            yield {name: image.to(like.device, like.dtype)}

    if isinstance(timm, Mapping) and "input_size" in timm:
        channels, *size = timm["input_size"]
        low = () if timm.get("fixed_input_size") or min(size) <= 128 else ((64, 64), (128, 128))
        own = _size(getattr(getattr(backbone, "patch_embed", None), "img_size", None))  # where it was built for another
        yield from pixels(channels, (*((own,) if own else low), (size[0], size[1])), _first_name(backbone))
        return
    if config is not None:
        main = getattr(backbone, "main_input_name", "") or _first_name(backbone)  # parts of models name none
        if main in ("pixel_values", "pixel_values_videos"):
            count = getattr(config, "num_frames", None)
            frames = () if count is None else (int(count),)
            sizes = [_size(getattr(c, "image_size", None)) for c in (config, getattr(config, "backbone_config", None))]
            some = [size for size in sizes if size is not None] or [(64, 64), (224, 224)]
            channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
            yield from pixels(int(channels), some, main)
            return
        words = getattr(config, "vocab_size", None) or getattr(getattr(config, "text_config", None), "vocab_size", None)
        if main == "input_ids" and "vocab_size" not in dir(config) and "input_ids" in _names(backbone):
            words = words or WITHOUT_TABLE
        if main == "input_ids" and words:
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(min(3, int(words) - 1), int(words), (BATCH, WORDS), generator=draw).to(like.device)
            takes = inspect.signature(backbone.forward).parameters
            more = {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
            if "pixel_values" in takes and hasattr(config, "vision_config"):
                size = _size(getattr(getattr(config, "vision_config", None), "image_size", None)) or (224, 224)
                image = next(pixels(3, [size], "pixel_values"))
                yield {"input_ids": ids, **image}
            yield {"input_ids": ids, **more}
            return
    if type(backbone).__module__.startswith("torchvision."):
        side = int(getattr(backbone, "image_size", 224))
        yield from pixels(3, [(side, side), (299, 299)], _first_name(backbone))
        return
    raise SiteError(
        f"no known anatomy fits {type(backbone).__name__}, and it does not say what it reads, to be traced: expected a "
        "configuration of timm, transformers or torchvision; describe it with restuning.Anatomy, or give "
        f"find_sites(backbone, inputs={{...}}) the arguments of a forward, {BATCH} rows; pass the result as anatomy="
    )


WITHOUT_TABLE = 99
"""Words that a text model is given that names no vocabulary, such as CANINE, which hashes characters."""


def _first_name(backbone: nn.Module) -> str:
    return _names(backbone)[0]


def _names(backbone: nn.Module) -> list[str]:
    return list(inspect.signature(backbone.forward).parameters)


def _size(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple) and len(size) in (2, 3):
        return int(size[-2]), int(size[-1])
    return None
