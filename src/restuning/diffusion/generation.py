"""Pictures from prompts: diffusers' samplers over a base and its tuned forms, apart or from shared work."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from restuning._version import __version__
from restuning.diffusion.base import (
    check_prompts,
    check_size,
    denoiser_kwargs,
    denoiser_of,
    noise_of,
    pictures_of,
    scheduler_of,
    texts_of,
)
from restuning.errors import RestuningError
from restuning.model.denoiser import Plug
from restuning.model.files import changes_the_base, fetch
from restuning.model.tuned import Tuned
from restuning.utils.files import atomic_write
from restuning.utils.options import Option

Share = Literal["exact", "base-trajectory", "mean-trajectory"]
SHARES = ("exact", "base-trajectory", "mean-trajectory")


@dataclass(frozen=True)
class Asked:
    """What is to be painted: every prompt with every seed.

    size: pixels a side; None: the base's own. guidance: classifier-free, away from `negative`; 1: none. share: how
    several bypasses share the U-Net's work. `exact`: at the first step, where they have one latent, they share one
    evaluation; from then on each has its own. `base-trajectory`: one evaluation at every step, at the untuned base's
    latent; `mean-trajectory`: one, at the mean of their latents. Both are approximations. batch_size: pictures at once.
    """

    prompts: Annotated[tuple[str, ...], Option("what to generate")]
    seeds: Annotated[tuple[int, ...], Option("of each prompt")] = (0,)
    negative: Annotated[str, Option("what to lead away from (default: the empty prompt)")] = ""
    size: Annotated[
        int | None,
        Option("pixels a side (default: that of the first run, or the base's)", flag="image-size", aliases=("size",)),
    ] = None
    steps: Annotated[int, Option("of the sampler")] = 50
    guidance: Annotated[float, Option("classifier-free")] = 3.0
    sampler: Annotated[str, Option("plms, ddim or dpm")] = "plms"
    share: Annotated[
        Share, Option("how bypasses share the U-Net: exact, base-trajectory, mean-trajectory", parse=str)
    ] = "exact"
    batch_size: Annotated[int, Option("images at once")] = 8

    def __post_init__(self) -> None:
        if not self.prompts or not self.seeds:
            raise RestuningError("nothing to paint: expected a prompt and a seed at least")
        if self.steps < 1 or self.batch_size < 1 or not 1 <= self.guidance < math.inf:
            raise RestuningError("steps, batch size and guidance: expected 1 or more")
        if not all(0 <= seed < 1 << 63 for seed in self.seeds):
            raise RestuningError("seeds: expected numbers from 0 to 2⁶³ − 1")
        if self.share not in SHARES:
            raise RestuningError(f"share is {self.share!r}: expected one of {', '.join(SHARES)}")


@dataclass(frozen=True)
class Picture:
    """A PIL image, and what it was made from; `adapter` is empty for the base's own."""

    image: Any
    adapter: str
    prompt: str
    seed: int
    asked: Asked

    def save(self, path: Path) -> None:
        """A PNG with its settings as text. Raises RestuningError if it cannot be written."""
        import io

        from PIL.PngImagePlugin import PngInfo

        settings = {k: v for k, v in asdict(self.asked).items() if k not in ("prompts", "seeds", "batch_size")}
        info = PngInfo()
        info.add_text("prompt", self.prompt)
        mine = {"adapter": self.adapter, "prompt": self.prompt, "seed": self.seed, **settings, "version": __version__}
        info.add_text("restuning", json.dumps(mine))
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", pnginfo=info)
        _write(path, buffer)


def _write(path: Path, buffer: Any) -> None:
    try:
        atomic_write(path, buffer.getbuffer())
    except OSError as error:
        raise RestuningError(f"cannot write {path}: {error.strerror or error}") from error


def plug(pipe: Any, *paths: str | Path) -> Plug:
    """Have a pipeline of diffusers paint with tuned files, together, until `remove()`.

    Of a fully tuned file, whose weights take the place of the base's, those are kept until then.
    """
    denoiser, folders = denoiser_of(pipe), [fetch(path) for path in paths]
    tuned = Tuned(denoiser)
    held = any(changes_the_base(folder) for folder in folders)
    before = {name: x.clone() for name, x in denoiser.state_dict().items()} if held else {}
    names = [f"adapter{i}" for i in range(len(paths))]
    for name, folder in zip(names, folders, strict=True):
        tuned.load_adapter(folder, name)
    tuned.to(pipe.device)
    tuned.set_adapter(names)
    return Plug(denoiser, tuned, before)


def pictures(pipe: Any, tuned: Tuned | None, asked: Asked, names: Sequence[str] = ("",)) -> Iterator[Picture]:
    """Every prompt with every seed by every adapter of `names`; "" is the base without any. Adapters that read features
    alone run side by side.

    Raises DataError for a prompt beyond the encoder's length and for a size that cannot be had.
    """
    check_prompts(pipe, (*asked.prompts, asked.negative))
    config: Any = denoiser_of(pipe).config
    size = config.sample_size * pipe.vae_scale_factor if asked.size is None else asked.size
    side = check_size(pipe, size)
    wanted = [(prompt, seed) for prompt in asked.prompts for seed in asked.seeds]
    most = max(1, asked.batch_size // max(1, len(_together(tuned, names))))
    for i in range(0, len(wanted), most):
        some = wanted[i : i + most]
        shape = (1, config.in_channels, side, side)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _, seed in some]
        texts = texts_of(pipe, [prompt for prompt, _ in some])
        if asked.guidance > 1:
            away = texts_of(pipe, [asked.negative] * len(some))
            texts = {name: torch.cat([away[name], texts[name]]) for name in texts}
        noise = torch.cat(drawn).to(pipe.device)
        for name, latents in painted(pipe, tuned, names, asked, noise, denoiser_kwargs(pipe, texts, size)).items():
            for (prompt, seed), image in zip(some, pictures_of(pipe, latents), strict=True):
                yield Picture(image, name, prompt, seed, asked)


def draw(pipe: Any, tuned: Tuned | None, asked: Asked, names: Sequence[str] | None = None) -> list[Any]:
    """PIL images alone, of the active adapter, or of those named, one after another."""
    names = names if names is not None else [""] if tuned is None else tuned.active_adapters
    return [picture.image for picture in pictures(pipe, tuned, asked, names)]


@torch.no_grad()
def painted(
    pipe: Any, tuned: Tuned | None, names: Sequence[str], asked: Asked, noise: Tensor, given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The latents (b, c, h, w) that each adapter makes of the same noise."""
    if tuned is not None:
        modes = [(m, m.training) for m in tuned.modules()]
        tuned.eval()
    try:
        together = _together(tuned, names)
        found = _side_by_side(pipe, tuned, together, asked, noise, given) if together and tuned else {}
        for name in names:
            if name not in found:
                found[name] = _alone(pipe, tuned, name, asked, noise, given)
        return {name: found[name] for name in names}
    finally:
        if tuned is not None:
            for module, mode in modes:
                module.training = mode


def _together(tuned: Tuned | None, names: Sequence[str]) -> list[str]:
    """Those that run side by side."""
    found = [name for name in names if name and tuned is not None and tuned.shares(name)]
    return found if len(found) > 1 else []


def _alone(pipe: Any, tuned: Tuned | None, name: str, asked: Asked, noise: Tensor, given: Mapping[str, Any]) -> Tensor:
    def predict(sample: Tensor, t: Tensor) -> Tensor:
        if name and tuned is not None:
            tuned.set_adapter(name)
            return noise_of(tuned(sample, timestep=t.expand(len(sample)), **given, return_dict=False)[0], sample)
        return noise_of(
            denoiser_of(pipe)(sample, timestep=t.expand(len(sample)), **given, return_dict=False)[0], sample
        )

    return _loop(pipe, asked, noise, lambda z, t, scheduler: _guided(asked, z, t, scheduler, predict))


def _side_by_side(
    pipe: Any, tuned: Tuned, names: list[str], asked: Asked, noise: Tensor, given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Latents of all adapters as one batch, (n · b, c, h, w); the base's own before them on its trajectory."""
    before, n = tuned.active_adapters, len(names)
    tuned.set_adapter(names)
    plain = asked.share == "base-trajectory"
    count, first = n + plain, [True]

    def each(sample: Tensor, t: Tensor, rows: bool = False) -> Tensor:
        more = _repeated(given, n) if rows else given
        predicted = tuned.each(sample, timestep=t.expand(len(sample)), **more, rows=rows, plain=plain)
        return torch.stack([noise_of(one, sample) for one in predicted.values()])

    def step(z: Tensor, t: Tensor, scheduler: Any) -> Tensor:
        own = z.view(count, -1, *z.shape[1:])
        if asked.share != "exact" or first[0]:
            first[0] = False
            at = own.mean(0) if asked.share == "mean-trajectory" else own[0]
            return _guided(asked, at, t, scheduler, each).flatten(0, 1)
        halves = 2 if asked.guidance > 1 else 1
        sample = scheduler.scale_model_input(own, t).repeat(1, halves, 1, 1, 1).flatten(0, 1)
        predicted = each(sample, t, rows=True)  # (n, halves · b, c, h, w)
        return _towards(asked, predicted).flatten(0, 1)

    try:
        z = _loop(pipe, asked, noise.repeat(count, 1, 1, 1), step)
    finally:
        tuned.set_adapter(before or names[:1])
    return dict(zip(names, z.view(count, -1, *z.shape[1:])[plain:], strict=True))


def _loop(pipe: Any, asked: Asked, noise: Tensor, step: Callable[[Tensor, Tensor, Any], Tensor]) -> Tensor:
    scheduler = scheduler_of(pipe, asked.sampler)
    if asked.steps > scheduler.config.num_train_timesteps:
        most = scheduler.config.num_train_timesteps
        raise RestuningError(f"{asked.steps} steps: expected at most {most}, with which the base was trained")
    scheduler.set_timesteps(asked.steps, device=noise.device)
    z: Tensor = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        z = scheduler.step(step(z, t, scheduler), t, z, return_dict=False)[0]
    return z


def _guided(asked: Asked, z: Tensor, t: Tensor, scheduler: Any, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    sample = scheduler.scale_model_input(torch.cat([z, z]) if asked.guidance > 1 else z, t)
    predicted = predict(sample, t)
    return _towards(asked, predicted)


def _towards(asked: Asked, predicted: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022) over (…, 2 b, c, h, w), the rows without a prompt first."""
    if asked.guidance <= 1:
        return predicted
    half = predicted.shape[-4] // 2
    away, to = predicted.narrow(-4, 0, half), predicted.narrow(-4, half, half)
    guided: Tensor = away + asked.guidance * (to - away)
    return guided


def _repeated(value: Any, times: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1))
    return {k: _repeated(v, times) for k, v in value.items()} if isinstance(value, Mapping) else value


def grid(path: Path, rows: Mapping[str, Sequence[Any]], columns: Sequence[str] = ()) -> None:
    """A picture of pictures: a row for each name, of one size; under the columns what they are of."""
    import io

    from PIL import Image, ImageDraw

    wide, high = next(iter(rows.values()))[0].size
    left, gap = 8 + max(6 * len(name) for name in rows), 2
    most = max(len(images) for images in rows.values())
    sheet = Image.new("RGB", (left + most * (wide + gap), len(rows) * (high + gap) + (14 if columns else 0)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows.items()):
        pen.text((4, y * (high + gap) + high // 2 - 6), name, fill="black")
        for x, image in enumerate(images):
            sheet.paste(image, (left + x * (wide + gap), y * (high + gap)))
    for x, column in enumerate(columns):
        pen.text((left + x * (wide + gap), len(rows) * (high + gap)), column[: max(1, wide // 6)], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    _write(path, buffer)
