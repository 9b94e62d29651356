"""Pre-train a small text-to-image base, in Stable Diffusion's form, on emoji, with three categories held out.

python scripts/convert_taef2.py --out runs/emoji/vae
python scripts/pretrain_emoji.py --vae runs/emoji/vae --out runs/emoji [--data-out runs/emoji/data] [--steps 2400]

Pictures: EmojiOne (CC BY 4.0), 64 x 64, on white. Latents: TAEF2's, 32 x 8 x 8. Texts: the name and keywords of an
emoji, read by MiniLM. OUT/pipeline is what `StableDiffusionPipeline.from_pretrained` loads; OUT/samples.png shows what
it draws. A run that was killed goes on from OUT/state.pt.
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from transformers import AutoTokenizer, BertModel

from restuning.utils.hub import MINILM, packaged

HELD_OUT = ("flags", "nature", "travel")  # whole categories, to tune on: every fourth picture is for tests
TEMPLATES = ("{}", "an emoji of {}", "a picture of {}", "a small drawing of {}")
TONES = ("light", "medium light", "medium", "medium dark", "dark")
SHAPE = {
    "sample_size": 8,
    "in_channels": 32,
    "out_channels": 32,
    "block_out_channels": (64, 128, 192, 192),
    "attention_head_dim": 4,
    "cross_attention_dim": 384,
}
NOISE = {  # as SD 2.1 has it; a small U-Net does not learn to copy 32 channels of noise, so it predicts the velocity
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}
TOKENS = 32
SHOWN = (
    "smiling face with open mouth",
    "woman, dark skin",
    "father christmas",
    "clock face three-thirty",
    "an emoji of a red apple",
    "slice of pizza",
    "a small drawing of a guitar",
    "heavy black heart",
    "open book",
    "a picture of a police officer",
    "soccer ball",
    "thumbs up sign, light skin",
    "flag of japan",
    "a picture of a cat face",
    "ambulance",
    "a blue square with a white arrow",
)


@dataclass(frozen=True)
class Emoji:
    code: str
    category: str
    captions: tuple[str, ...]
    picture: Image.Image


def emoji(data: Path) -> Iterator[Emoji]:
    """In the order of their codes; RGB, on white."""
    known = {v["unicode"]: v for v in json.loads((data / "captions_emojione/emoji.json").read_text()).values()}
    with tarfile.open(data / "captions_emojione/emojione_png64.tar") as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            code = member.name.removesuffix(".png")
            if code in known:
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
                yield Emoji(code, known[code]["category"], captions(known[code]), picture)


def captions(entry: dict) -> tuple[str, ...]:
    """Its name by every template, and its name with its keywords."""
    name = re.sub(r" tone ?([1-5])\b", lambda found: f", {TONES[int(found[1]) - 1]} skin", entry["name"])
    if entry["category"] == "flags" and "flag" not in name:
        name = f"flag of {name}"
    words = [word for word in dict.fromkeys(entry["keywords"]) if word not in name]
    return (*(template.format(name) for template in TEMPLATES), *([", ".join([name, *words])] if words else []))


def splits(data: Path) -> dict[str, list[Emoji]]:
    """`pretrain`, and CATEGORY-train and CATEGORY-test of each that is held out."""
    found: dict[str, list[Emoji]] = {"pretrain": []}
    seen = dict.fromkeys(HELD_OUT, 0)
    for one in emoji(data):
        if one.category in HELD_OUT:
            seen[one.category] += 1
            part = "test" if seen[one.category] % 4 == 0 else "train"
            found.setdefault(f"{one.category}-{part}", []).append(one)
        else:
            found["pretrain"].append(one)
    return found


def write_folders(found: dict[str, list[Emoji]], out: Path) -> None:
    """Captioned folders, as the datasets library's imagefolder has them."""
    for name, members in found.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        rows = []
        for one in members:
            one.picture.save(out / name / f"{one.code}.png")
            rows.append(json.dumps({"file_name": f"{one.code}.png", "text": list(one.captions)}) + "\n")
        (out / name / "metadata.jsonl").write_text("".join(rows))


def pipeline_of(vae: Path) -> StableDiffusionPipeline:
    """The VAE and MiniLM as they are, a U-Net at its birth."""
    tokenizer = AutoTokenizer.from_pretrained(packaged(MINILM))
    tokenizer.model_max_length = TOKENS
    reader = BertModel.from_pretrained(packaged(MINILM))
    reader.config.use_attention_mask = True  # what the pipeline asks before it hands the mask on
    made = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(vae),
        text_encoder=reader.eval().requires_grad_(False),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**SHAPE),
        scheduler=PNDMScheduler.from_config(NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def latents(pipeline: StableDiffusionPipeline, members: list[Emoji]) -> Tensor:
    pixels = torch.stack([pil_to_tensor(one.picture) for one in members])
    seen = [pipeline.vae.encode(x.float() / 127.5 - 1).latents for x in pixels.split(64)]
    return torch.cat(seen) * pipeline.vae.config.scaling_factor


@torch.no_grad()
def read(pipeline: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    """(texts, tokens, 384) in half precision."""
    read = []
    for i in range(0, len(texts), 64):
        ids = pipeline.tokenizer(
            texts[i : i + 64], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        read.append(pipeline.text_encoder(ids.input_ids, attention_mask=ids.attention_mask)[0].half())
    return torch.cat(read)


def rate(step: int, steps: int) -> float:
    """Up in 200 steps, level, and down to nothing in the last fifth."""
    return min(step / 200, 1.0, (steps - step) / (0.2 * steps))


class Training:
    """A U-Net, its running mean, and what a run needs to go on."""

    def __init__(self, pipeline: StableDiffusionPipeline, lr: float) -> None:
        self.unet, self.lr, self.step = pipeline.unet, lr, 0
        self.mean = EMAModel(self.unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr, weight_decay=0.01, fused=True)
        schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.kept = schedule.alphas_cumprod  # of the latents' variance, at each time
        snr = compute_snr(schedule, torch.arange(len(self.kept)))
        self.weight = snr.clamp(max=5) / (snr + 1)  # Min-SNR (Hang et al. 2023)

    def loss(self, x: Tensor, text: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """(b,): the mean squared error of the predicted velocity."""
        kept = self.kept[time][:, None, None, None]
        predicted = self.unet(kept.sqrt() * x + (1 - kept).sqrt() * noise, time, text.float()).sample
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * x
        return F.mse_loss(predicted, velocity, reduction="none").mean((1, 2, 3))

    def take(self, x: Tensor, text: Tensor, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        time = torch.randint(len(self.kept), (len(x),))
        loss = self.loss(x, text, time, torch.randn_like(x))
        (loss * self.weight[time]).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.mean.step(self.unet.parameters())
        self.step += 1
        return loss.mean().item()

    @torch.no_grad()
    def judge(self, x: Tensor, text: Tensor) -> float:
        """The loss at ten times for each picture, with the same noise at every call."""
        generator = torch.Generator().manual_seed(0)
        losses = []
        for moment in range(50, 1000, 100):
            noise = torch.randn(x.shape, generator=generator)
            losses.append(self.loss(x, text, torch.full((len(x),), moment), noise).mean())
        return torch.stack(losses).mean().item()

    def save(self, path: Path) -> None:
        state = {
            "unet": self.unet.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "random": torch.get_rng_state(),
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.mean.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["random"])


def show(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """SHOWN by DDIM in 20 steps, guidance 3."""
    usual, pipeline.scheduler = pipeline.scheduler, DDIMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    found = pipeline(list(SHOWN), num_inference_steps=20, guidance_scale=3.0, generator=generator).images
    pipeline.scheduler = usual
    to_pil_image(make_grid([pil_to_tensor(picture) for picture in found], 8)).resize((1056, 264), 0).save(path)


def save_whole(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """A reader finds the old folder, or the new one."""
    new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    pipeline.save_pretrained(new)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    found = splits(args.data)
    print({name: len(members) for name, members in found.items()}, flush=True)
    if args.data_out:
        write_folders(found, args.data_out)
    pipeline = pipeline_of(args.vae)
    x = latents(pipeline, found["pretrain"])
    print(f"latents: mean {x.mean():.3f}, deviation {x.std():.3f}, largest {x.abs().max():.1f}", flush=True)
    texts = read(pipeline, [text for one in found["pretrain"] for text in one.captions])
    counts = torch.tensor([len(one.captions) for one in found["pretrain"]])
    first, empty = counts.cumsum(0) - counts, read(pipeline, [""])
    tests = {"pretrain": (x[::20], texts[first[::20]])}
    for name, members in found.items():
        if name.endswith("-test"):
            tests[name] = latents(pipeline, members), read(pipeline, [one.captions[0] for one in members])
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(pipeline, args.lr)
    if (args.out / "state.pt").exists():
        training.load(args.out / "state.pt")
    start, losses = time.perf_counter(), []
    while training.step < args.steps:
        chosen = torch.randint(len(x), (args.batch_size,))
        caption = first[chosen] + (torch.rand(args.batch_size) * counts[chosen]).long()
        dropped = (torch.rand(args.batch_size) < 0.1)[:, None, None]  # classifier-free guidance
        text = torch.where(dropped, empty, texts[caption])
        losses.append(training.take(x[chosen], text, rate(training.step + 1, args.steps)))
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is {losses[-1]} at step {training.step}")
        if training.step % 50 == 0:
            mean, seconds = sum(losses) / len(losses), time.perf_counter() - start
            print(f"step {training.step}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
            losses.clear()
        if training.step % args.save_every == 0 or training.step == args.steps:
            training.mean.store(pipeline.unet.parameters())
            training.mean.copy_to(pipeline.unet.parameters())
            judged = {name: round(training.judge(*test), 4) for name, test in tests.items()}
            save_whole(pipeline, args.out / "pipeline")
            show(pipeline, args.out / "samples.png")
            training.mean.restore(pipeline.unet.parameters())
            training.save(args.out / "state.pt")  # last: a run that goes on from it has its pictures
            print(f"step {training.step}: {judged}", flush=True)


if __name__ == "__main__":
    main()
