"""Tuning a text-to-image base: the noise-prediction loss over kept latents; a run from its settings to its files."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.data.captioned import Captioned
from restuning.data.captions import load_captions
from restuning.data.folder import Files
from restuning.data.objective import Objective
from restuning.diffusion.base import (
    check_prompts,
    denoiser_kwargs,
    denoiser_of,
    load_base,
    noise_of,
    sampler_of,
    scheduler_of,
)
from restuning.diffusion.generation import Asked, draw, grid, pictures
from restuning.diffusion.latents import Latents, keep_latents
from restuning.errors import RestuningError
from restuning.hooks.memory import check_memory
from restuning.methods.named import find_method
from restuning.methods.spec import Method, on_blocks, resize
from restuning.model.count import count
from restuning.model.tuned import Tuned
from restuning.runs.folder import finished, run_directory
from restuning.runs.settings import RESULT, versions
from restuning.training.config import TrainConfig, parameter_groups, seed_of
from restuning.training.evaluate import Examples, loader, to_device
from restuning.training.logging import History, bar
from restuning.training.loop import accelerated, fit
from restuning.utils.distributed import barrier, is_main_process
from restuning.utils.files import as_json, atomic_write
from restuning.utils.hub import pinned
from restuning.utils.options import CAPTIONS, MEMORY, TUNER_SIZE, Blocks, Option
from restuning.utils.plain import read_plain
from restuning.utils.profiling import peak_bytes, saved_bytes

OF_HEADS = ("patience", "group_by_length", "label_smoothing", "head_lr_factor")
"""Settings of training that mean nothing without classes."""
RECIPE = TrainConfig(epochs=10, lr=1e-4, batch_size=8, warmup_epochs=0, schedule="constant")
"""The paper's: AdamW, lr 1e-4, constant, batch 8, 10 epochs."""


@dataclass(frozen=True)
class DiffusionRun:
    """Everything that decides a run's outcome.

    base: a pipeline's folder, or hub id. data: captioned pictures (`restuning.data.captions`). size: pixels a side.
    width: of every adapter, rank of every LoRA, tokens of every prefix and prompt. flip: mirrored pictures too. drop:
    the share of captions that are left out, for classifier-free guidance. prior_prompt: the class of DreamBooth's prior
    preservation, of which the base paints `prior_images`, that weigh `prior_weight`. latents: a folder that keeps
    latents and embeddings (None: in the run's own). memory: what frozen operations keep for the backward pass, a mode
    of `restuning.hooks.memory.MEMORY`. prompts: painted every `sample_every` epochs.
    """

    base: Annotated[str, Option("a pipeline of diffusers: a folder, or a hub id")]
    data: Annotated[str, Option(CAPTIONS)]
    method: Annotated[
        str | Mapping[str, Any],
        Option("full, lora, adapter, prefix, prompt, res-tuning, bypass, scedit, a .json file", parse=str),
    ] = "res-tuning"
    size: Annotated[int, Option("pixels a side", flag="image-size", aliases=("size",))] = 512
    width: Annotated[int | None, replace(TUNER_SIZE, aliases=("width",))] = None
    blocks: Blocks = None
    flip: Annotated[bool, Option("no mirrored images")] = True
    drop: Annotated[float, Option("share of captions left out, for guidance")] = 0.1
    truncate: Annotated[bool, Option("cut captions that are too long")] = False
    prior_prompt: Annotated[str | None, Option("DreamBooth's prior preservation: the class, as the base knows it")] = (
        None
    )
    prior_images: Annotated[int, Option("that the base generates of it")] = 100
    prior_weight: Annotated[float, Option("of their loss")] = 1.0
    latents: Annotated[
        str | None, Option("folder that keeps latents and embeddings for other runs (default: OUT/latents)")
    ] = None
    gradient_checkpointing: Annotated[bool, Option("the U-Net's own")] = False
    memory: Annotated[str, MEMORY] = "shared"
    prompts: Annotated[tuple[str, ...], Option("generated at intervals, into OUT/samples-EPOCH.png")] = ()
    sample_every: Annotated[int, Option("epochs", metavar="EPOCHS")] = 1
    training: TrainConfig = RECIPE

    def __post_init__(self) -> None:
        find_method(self.method, "unet")
        check_memory(self.memory)
        if not 0 <= self.drop < 1:
            raise RestuningError(f"drop is {self.drop!r}: expected a share of 0 or more, below 1")
        for name in ("size", "prior_images", "prior_weight", "sample_every"):
            if getattr(self, name) <= 0:
                raise RestuningError(f"{name} is {getattr(self, name)!r}: expected a number above 0")
        plain = TrainConfig()
        if wrong := next((n for n in OF_HEADS if getattr(self.training, n) != getattr(plain, n)), None):
            raise RestuningError(f"{wrong} is for tasks with a head, and a denoiser has none")

    def spec(self, family: str) -> str | Method:
        if isinstance(self.method, str) and self.width is None and self.blocks is None:
            return self.method
        method = find_method(self.method, family)
        method = method if self.width is None else resize(method, self.width)
        return method if self.blocks is None else on_blocks(method, self.blocks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_run(path: Path) -> DiffusionRun:
    """A run.json. Raises RestuningError if it is not there, cannot be read, or is of another kind."""
    return read_plain(path, DiffusionRun, lambda data: {**data, "training": asdict(RECIPE) | data.get("training", {})})


class Noised:
    """Examples: latents with noise of a drawn amount, and what the denoiser should say of them.

    All that is drawn is a function of (seed, epoch, place): the view, the caption, whether it is left out, the
    timestep, the noise. weight: of the squared error.
    """

    def __init__(
        self, latents: Latents, scheduler: Any, *, seed: int = 0, drop: float = 0.0, weight: float = 1.0
    ) -> None:
        self.latents, self.scheduler, self.seed, self.drop, self.weight = latents, scheduler, seed, drop, weight
        self.epoch = 0
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise RestuningError(f"the base predicts {kind!r}: expected epsilon or v_prediction")
        self.velocity = kind == "v_prediction"

    def __len__(self) -> int:
        return len(self.latents)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], Tensor]:
        return self.at(i, i)

    def at(self, i: int, place: int) -> tuple[dict[str, Tensor], Tensor]:
        """Picture i, as it is drawn at this place of the epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch, place))

        def drawn(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        picture = self.latents.picture(i)
        view = drawn(len(picture["mean"]))
        z = picture["mean"][view]
        if "std" in picture:
            z = z + picture["std"][view] * torch.randn(z.shape, generator=generator)
        captions = self.latents.captions[i]
        caption = captions[drawn(len(captions))]
        caption = 0 if torch.rand((), generator=generator) < self.drop else caption
        timestep = torch.tensor([drawn(self.scheduler.config.num_train_timesteps)])
        noise = torch.randn(z.shape, generator=generator)
        noisy = self.scheduler.add_noise(z[None], noise[None], timestep)[0]
        target = self.scheduler.get_velocity(z[None], noise[None], timestep)[0] if self.velocity else noise
        root = self.weight**0.5
        inputs = {"sample": noisy, "timestep": timestep[0], "weight": torch.tensor(root), **self.latents.text(caption)}
        return inputs, target * root


class Both:
    """Two sets of examples, the second drawn as often as the first: DreamBooth's own pictures and the prior's."""

    def __init__(self, own: Noised, prior: Noised) -> None:
        self.own, self.prior = own, prior

    def __len__(self) -> int:
        return 2 * len(self.own)

    def set_epoch(self, epoch: int) -> None:
        self.own.set_epoch(epoch)
        self.prior.set_epoch(epoch)

    def __getitem__(self, i: int) -> Any:
        n = len(self.own)
        return self.own[i] if i < n else self.prior.at((i - n + self.own.epoch * n) % len(self.prior), i)


class Denoiser(nn.Module):
    """A tuned denoiser as a module of one batch: {sample (b, c, h, w), timestep (b,), weight (b,), texts} → what it
    says, times the weight."""

    def __init__(self, pipe: Any, tuned: Tuned, size: int) -> None:
        super().__init__()
        self.tuned, self._pipe, self.size = tuned, (pipe,), size

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        texts = {name: x for name, x in batch.items() if name not in ("sample", "timestep", "weight")}
        given = denoiser_kwargs(self._pipe[0], texts, self.size)
        predicted = self.tuned(batch["sample"], timestep=batch["timestep"], **given, return_dict=False)[0]
        return noise_of(predicted, batch["sample"]) * batch["weight"].view(-1, 1, 1, 1)


def denoising() -> Objective:
    """The squared error of the noise, or of the velocity (Ho et al. 2020; Salimans and Ho 2022)."""

    def loss(predicted: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(predicted.float(), target.float())

    def metrics(predicted: Tensor, target: Tensor) -> Iterator[tuple[str, float]]:
        yield "score", -float(loss(predicted, target))

    return Objective("denoising", loss, None, metrics, _none)


def _none(predicted: Tensor, target: Tensor) -> Mapping[str, Tensor]:
    return {}


@torch.no_grad()
def held_out_loss(model: Denoiser, latents: Latents, scheduler: Any, *, draws: int = 8, batch_size: int = 32) -> float:
    """The mean loss over pictures that were not trained on: of each, as many draws of noise and timestep, the same at
    every call, for every model."""
    device = next(model.parameters()).device
    examples, total, seen = Noised(latents, scheduler, seed=1 << 20), 0.0, 0
    training = model.training
    model.eval()
    for epoch in range(draws):
        examples.set_epoch(epoch)
        for inputs, target in loader(examples, batch_size):
            predicted = model(to_device(inputs, device)).cpu()
            total += float(F.mse_loss(predicted.float(), target)) * len(target)
            seen += len(target)
    model.train(training)
    return total / seen


def execute(run: DiffusionRun, out: Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train, save: run.json, the adapter, sample grids and result.json in `out`. Returns what result.json holds. Of
    several processes (`accelerate launch`), all train and the first one writes.

    Of these, kept_bytes is what autograd keeps of one batch for backward, peak_bytes the most that training held.
    Raises RestuningError if `out` is in use, holds another run, or (without `resume`) any run.
    """
    run = replace(run, base=pinned(run.base, "model_index.json"))
    if resume and (before := finished(out, run, read_run)) is not None:
        return before
    barrier()
    with run_directory(out, run, resume, read_run) if is_main_process() else contextlib.nullcontext():
        processes = barrier()
        start = time.perf_counter()
        pipe = load_base(run.base, "cuda" if torch.cuda.is_available() else "cpu")
        # all that can be refused, before hours of latents
        data = load_captions(run.data)
        check_prompts(pipe, [*run.prompts, *([] if run.prior_prompt is None else [run.prior_prompt])])
        scheduler = scheduler_of(pipe, "ddim")
        torch.manual_seed(run.training.seed)
        tuned = Tuned(denoiser_of(pipe), backbone_name=run.base, memory=run.memory)
        tuned.add_adapter("default", run.spec(tuned.family), preprocessing={"size": run.size})
        tuned.to(pipe.device)
        model = Denoiser(pipe, tuned, run.size)
        with accelerated(run.training.precision):
            parameter_groups(model, run.training.weight_decay)
        shared = Path(run.latents) if run.latents else out / "latents"
        with bar(1, progress and is_main_process()) as show:
            latents = _latents(run, pipe, data, shared, run.flip, lambda _, text: show(0, text))
        own = Noised(latents, scheduler, seed=run.training.seed, drop=run.drop)
        examples: Examples = own
        if run.prior_prompt is not None:
            prior = _prior(run, pipe, out)
            weight = run.prior_weight
            examples = Both(own, Noised(prior, scheduler, seed=run.training.seed, drop=run.drop, weight=weight))
        if run.gradient_checkpointing:
            tuned.gradient_checkpointing_enable()

        def after(epoch: int) -> None:
            if run.prompts and (epoch % run.sample_every == 0 or epoch == run.training.epochs):
                painted = draw(pipe, tuned, Asked(run.prompts, size=run.size, steps=20, sampler=sampler_of(pipe)))
                grid(out / f"samples-{epoch:04}.png", {f"epoch {epoch}": painted}, run.prompts)

        batch, _ = next(iter(loader(examples, run.training.batch_size)))
        with accelerated(run.training.precision) as accelerator, accelerator.autocast():
            kept = saved_bytes(lambda: model.train()(to_device(batch, pipe.device)), model.parameters())
        histories: list[History] = []

        def train() -> None:
            state, how = out / "state.pt", denoising()
            histories.append(
                fit(
                    model,
                    examples,
                    None,
                    run.training,
                    state=state,
                    resume=resume,
                    objective=how,
                    after=after,
                    progress=progress,
                )
            )

        peak = sum(peak_bytes(train, pipe.device))
        (history,) = histories
        if run.gradient_checkpointing:
            tuned.gradient_checkpointing_disable()
        result = {
            "epochs": [asdict(epoch) for epoch in history.epochs],
            "loss": history.epochs[-1].loss,
            "pictures": len(latents),
            "captions": sum(map(len, latents.captions)),
            "parameters": count(tuned),
            "processes": processes,
            "kept_bytes": kept,
            "peak_bytes": peak,
            "seconds": round(time.perf_counter() - start, 1),
            "versions": versions(),
            "settings": run.to_dict(),
        }
        if is_main_process():
            tuned.save_pretrained(out)
            atomic_write(out / RESULT, as_json(result))
            (out / "state.pt").unlink(missing_ok=True)
        barrier()
        return result


def _prior(run: DiffusionRun, pipe: Any, out: Path) -> Latents:
    """What the base paints of the class, and its latents; a run that goes on takes what is there."""
    assert run.prior_prompt is not None
    folder = out / "prior"
    files = [folder / f"{seed:05}.png" for seed in range(run.prior_images)]
    missing = tuple(seed for seed, file in enumerate(files) if not file.exists())
    if missing and is_main_process():
        asked = Asked((run.prior_prompt,), missing, size=run.size, sampler=sampler_of(pipe))
        for picture in pictures(pipe, None, asked):
            picture.save(files[picture.seed])
    barrier()
    data = Captioned(Files(files, [0] * len(files)), [(run.prior_prompt,)] * len(files))
    return _latents(run, pipe, data, out / "prior-latents")


def _latents(
    run: DiffusionRun,
    pipe: Any,
    data: Captioned,
    out: Path,
    flip: bool = False,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> Latents:
    if is_main_process():
        keep_latents(pipe, data, out, size=run.size, flip=flip, truncate=run.truncate, show=show)
    barrier()
    return Latents(out)
