"""A base: a pipeline of diffusers, what its texts become, and what its pictures become."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning.errors import DataError, MissingExtra, RestuningError, line
from restuning.utils.hub import HubId, hub, located, remote_code
from restuning.utils.reading import check_regular

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # latents have no bounds
    "dpm": ("DPMSolverMultistepScheduler", {}),
}
"""Samplers, as diffusers names them. PLMS is the paper's."""


def load_base(path: str, device: torch.device | str = "cpu") -> Any:
    """A text-to-image pipeline in a folder, or on the hub, in float32: Stable Diffusion 1, 2 or XL, or PixArt.

    Raises RestuningError for what is no pipeline, or one of another kind.
    """
    try:
        from diffusers import DiffusionPipeline, logging
        from transformers.utils import logging as more_logging
    except ImportError as error:
        raise MissingExtra("diffusers", "diffusion") from error
    found = located(path)
    if isinstance(found, Path):
        if not (found / "model_index.json").is_file():
            raise RestuningError(f"{path} is no pipeline of diffusers: it has no model_index.json")
        _check_files(found)
    logging.disable_progress_bar()
    more_logging.disable_progress_bar()
    try:
        with hub(), _quiet():  # of parts that are other classes than usual
            if isinstance(found, HubId):
                pipe = DiffusionPipeline.from_pretrained(found.repo, revision=found.revision, **remote_code())
            else:
                pipe = DiffusionPipeline.from_pretrained(str(found), **remote_code())
    except Exception as error:
        raise RestuningError(f"{path} cannot be loaded as a pipeline of diffusers: {line(error)}") from error
    if not _kind(pipe):
        raise RestuningError(f"{path} holds a {type(pipe).__name__}: expected Stable Diffusion 1, 2, XL, or PixArt")
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.float()
    return pipe.to(device)


def _check_files(folder: Path) -> None:
    """Files that diffusers opens by itself are regular ones. Raises RestuningError."""
    for file in folder.rglob("*"):
        if not file.is_dir():
            try:
                check_regular(file)
            except OSError as error:
                raise RestuningError(f"{file} cannot be read: {error.strerror or error}") from error


def denoiser_of(pipe: Any) -> nn.Module:
    """The U-Net, or the transformer in its place."""
    found: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return found


KINDS = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "xl",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
}


def _kind(pipe: Any) -> str | None:
    return KINDS.get(type(pipe).__name__)


def scheduler_of(pipe: Any, name: str) -> Any:
    """A sampler over the noise that the base was trained with. Raises RestuningError for an unknown one, and for one
    that cannot begin where the base does."""
    import diffusers

    if name not in SCHEDULERS:
        raise RestuningError(f"unknown sampler {name!r}: expected one of {', '.join(SCHEDULERS)}")
    if name == "plms" and sampler_of(pipe) != name:
        raise RestuningError("plms cannot begin at noise alone, as this base was trained to: expected ddim or dpm")
    kind, more = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(pipe.scheduler.config, **more)


def sampler_of(pipe: Any) -> str:
    """The paper's, or DDIM for a base whose last step is noise alone (Lin et al. 2024)."""
    return "ddim" if pipe.scheduler.config.get("rescale_betas_zero_snr") else "plms"


def check_prompts(pipe: Any, prompts: Sequence[str], hint: str = "") -> None:
    """Raises DataError for a text that is longer than the encoder reads."""
    most = min(pipe.tokenizer.model_max_length, _longest(pipe))
    for prompt in prompts:
        count = len(pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > most:
            raise DataError(f"{prompt[:60]!r}… has {count} tokens: the text encoder reads {most}; shorten it{hint}")


def _longest(pipe: Any) -> int:
    """Tokens to which a pipeline pads by its own default."""
    default = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
    return 1 << 30 if default is None else int(default.default)


@torch.no_grad()
def texts_of(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What the text encoders make of the prompts, a row each, by the names of the denoiser's arguments; of no words,
    nothing, where the pipeline says so (SDXL's)."""
    given = {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with _quiet():  # of what it truncates
        encoded = pipe.encode_prompt(list(prompts), **given)
    if _kind(pipe) == "xl":
        found = {"encoder_hidden_states": encoded[0], "text_embeds": encoded[2]}
        empty = [i for i, prompt in enumerate(prompts) if not prompt and pipe.config.force_zeros_for_empty_prompt]
        return {name: x.index_fill(0, torch.tensor(empty, device=x.device).long(), 0) for name, x in found.items()}
    if _kind(pipe) == "pixart":
        return {"encoder_hidden_states": encoded[0], "encoder_attention_mask": encoded[1]}
    return {"encoder_hidden_states": encoded[0]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [(log, log.get_verbosity()) for log in (diffusers, transformers)]
    for log, _ in before:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in before:
            log.set_verbosity(level)


def denoiser_kwargs(pipe: Any, texts: Mapping[str, Tensor], size: int) -> dict[str, Any]:
    """The denoiser's keyword arguments for such rows, of pictures of `size` pixels."""
    given = dict(texts)
    if "text_embeds" in given:
        pooled = given.pop("text_embeds")
        ids = torch.tensor([size, size, 0, 0, size, size], dtype=pooled.dtype, device=pooled.device)
        return {**given, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}}
    if "encoder_attention_mask" in given:
        config: Any = denoiser_of(pipe).config
        extra: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if config.sample_size == 128 or getattr(config, "use_additional_conditions", None):
            n, mask = len(given["encoder_hidden_states"]), given["encoder_hidden_states"]
            extra = {"resolution": mask.new_full((n, 2), size), "aspect_ratio": mask.new_ones(n, 1)}
        return {**given, "added_cond_kwargs": extra}
    return given


def noise_of(output: Tensor, sample: Tensor) -> Tensor:
    """The prediction, without the variance that some denoisers say beside it."""
    return output[:, : sample.shape[1]]


def check_size(pipe: Any, size: int) -> int:
    """The size of the latents of pictures of so many pixels. Raises DataError for one that the VAE or the U-Net cannot
    divide."""
    config: Any = denoiser_of(pipe).config
    halves = len(config.block_out_channels) - 1 if "block_out_channels" in config else 0
    step = pipe.vae_scale_factor * (2**halves if halves else config.patch_size)
    if size < step or size % step:
        raise DataError(f"pictures of {size} pixels: expected a multiple of {step}, which VAE and denoiser divide")
    return int(size // pipe.vae_scale_factor)


@torch.no_grad()
def latents_of(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pictures (b, 3, s, s) in [−1, 1] → mean and deviation of their latents (b, c, h, w), scaled as the denoiser reads
    them; a VAE without a distribution has no deviation."""
    encoded = pipe.vae.encode(pixels.to(pipe._execution_device))
    scale, shift = pipe.vae.config.scaling_factor, getattr(pipe.vae.config, "shift_factor", None) or 0
    if hasattr(encoded, "latent_dist"):
        return (encoded.latent_dist.mean - shift) * scale, encoded.latent_dist.std * scale
    return (encoded.latents - shift) * scale, None


@torch.no_grad()
def pictures_of(pipe: Any, latents: Tensor) -> list[Any]:
    """Latents as the denoiser has them → PIL pictures."""
    scale, shift = pipe.vae.config.scaling_factor, getattr(pipe.vae.config, "shift_factor", None) or 0
    decoded = pipe.vae.decode(latents / scale + shift).sample
    return list(pipe.image_processor.postprocess(decoded, output_type="pil"))
