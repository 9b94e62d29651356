"""TAEF2, a real tiny VAE (32 latent channels, 1/8 of the side), as the `AutoencoderTiny` that diffusers loads.

python scripts/convert_taef2.py --out FOLDER [--data ../shared/data] [--steps 800]

TAEF2's blocks at 1/8 of the side hold a branch with a group norm, which `AutoencoderTiny` has not. Every weight at a
higher resolution is kept to the bit; those blocks, and two plain ones that are added, are distilled on photos
(Caltech-101) and the emoji that `pretrain_emoji.py` trains on, none of those it holds out. Latents are standardised,
channel by channel: after the scaling factor each has mean 0 and deviation 1.
"""

import argparse
import io
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from pretrain_emoji import HELD_OUT, emoji
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

SPREAD = 0.5  # of the stored latents, where the decoder's tanh(z / 3) is still straight
ENCODER, DECODER = (0, None, 1, None, 2), (None, 0, None, 1, 2)  # TAEF2's blocks, and new ones, at 1/8 of the side


class Block(nn.Module):
    """Three convolutions and a skip, as in `AutoencoderTiny`; before them, perhaps, the branch with a group norm."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) if i % 2 == 0 else nn.ReLU() for i in range(5)))
        maps = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
        self.pool = nn.Sequential(maps[0], nn.GroupNorm(4, 256), nn.ReLU(), maps[1]) if branch else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


def taef2(folder: Path) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder, of pictures in [0, 1]."""

    def down() -> nn.Module:
        return nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)

    def up() -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]

    def blocks(count: int, branch: bool = False) -> list[nn.Module]:
        return [Block(branch) for _ in range(count)]

    encoder = [nn.Conv2d(3, 64, 3, padding=1), *blocks(1), down(), *blocks(3), down(), *blocks(3), down()]
    encoder += [*blocks(3, True), nn.Conv2d(64, 32, 3, padding=1)]
    decoder = [Clamp(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), *blocks(3, True), *up(), *blocks(3), *up()]
    decoder += [*blocks(3), *up(), *blocks(1), nn.Conv2d(64, 3, 3, padding=1)]
    made = nn.Sequential(*encoder), nn.Sequential(*decoder)
    for model, name in zip(made, ("encoder", "decoder"), strict=True):
        model.load_state_dict(torch.load(folder / f"taef2_{name}.pth", weights_only=True))
        model.eval().requires_grad_(False)
    return made


def begin(encoder: nn.Sequential, decoder: nn.Sequential, mean: Tensor, std: Tensor) -> AutoencoderTiny:
    """TAEF2's weights where they have a place, new blocks that say nothing yet, standardised latents."""
    vae = AutoencoderTiny(
        latent_channels=32,
        num_encoder_blocks=(1, 3, 3, len(ENCODER)),
        num_decoder_blocks=(len(DECODER), 3, 3, 1),
        scaling_factor=1 / SPREAD,
    )
    ours, theirs = list(vae.encoder.layers), list(encoder)
    pairs = [*zip(ours[:11], theirs[:11], strict=True), (ours[-1], theirs[-1])]
    pairs += [(ours[11 + i], None if k is None else theirs[11 + k]) for i, k in enumerate(ENCODER)]
    ours, theirs = list(vae.decoder.layers), list(decoder)
    after = 2 + len(DECODER)
    pairs += [(ours[0], theirs[1]), *zip(ours[after:], theirs[6:], strict=True)]
    pairs += [(ours[2 + i], None if k is None else theirs[3 + k]) for i, k in enumerate(DECODER)]
    with torch.no_grad():
        for mine, given in pairs:
            if given is None:
                mine.conv[4].weight.zero_(), mine.conv[4].bias.zero_()
            else:
                kept = {name: t for name, t in given.state_dict().items() if not name.startswith("pool.")}
                mine.load_state_dict(kept)
        last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
        last.weight.mul_(SPREAD / std[:, None, None, None])
        last.bias.sub_(mean).mul_(SPREAD / std)
        first.bias.add_((first.weight * mean[None, :, None, None]).sum((1, 2, 3)))
        first.weight.mul_(std[None, :, None, None] / SPREAD)
    return vae


def views(data: Path) -> Iterator[Tensor]:
    """Pictures (3, 64, 64) in uint8: each emoji as it is and twice cropped with its colours exchanged; photos."""
    crop = v2.RandomResizedCrop(64, (0.3, 1.0), antialias=True)
    for one in emoji(data):
        if one.category not in HELD_OUT:
            picture = v2.functional.pil_to_tensor(one.picture)
            yield picture
            for _ in range(2):
                yield crop(picture)[torch.randperm(3)]
    with tarfile.open(data / "caltech101/caltech101_short128_max40.tar") as tar:
        for member in sorted((m for m in tar if m.name.endswith(".jpg")), key=lambda m: m.name):
            photo = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            yield v2.functional.pil_to_tensor(crop(photo))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    encoder, decoder = taef2(args.data / "taef2_vae")
    stems, plain = [], []
    with torch.no_grad():
        for i, batch in enumerate(torch.stack(list(views(args.data))).split(64)):
            stems.append(encoder[:11](batch.float() / 255))
            if i < 40:
                plain.append(encoder[11:](stems[-1]))
        stem, z = torch.cat(stems), torch.cat(plain)
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        vae = begin(encoder, decoder, mean, std)
        latents = torch.cat([(encoder[11:](h) - mean[:, None, None]) / std[:, None, None] for h in stem.split(64)])
    print(f"{len(stem)} views in {time.perf_counter() - start:.0f} s", flush=True)

    inner = nn.ModuleList([vae.encoder.layers[11:], vae.decoder.layers[: 2 + len(DECODER)]])
    vae.requires_grad_(False)
    inner.requires_grad_(True)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.05)
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(stem), (48,))
        h, wanted = stem[chosen], latents[chosen]
        seen = inner[0](h) / SPREAD
        noisy = wanted + torch.rand(48, 1, 1, 1) * 0.3 * torch.randn_like(wanted)  # what a denoiser may leave
        with torch.no_grad():
            target = decoder[:6](noisy * std[:, None, None] + mean[:, None, None])
        decoded = inner[1](torch.tanh(noisy * SPREAD / 3) * 3)
        losses = F.mse_loss(seen, wanted), F.mse_loss(decoded, target) / target.var()
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == 1:
            seconds = time.perf_counter() - start
            print(f"step {step}: encoder {losses[0]:.4f}, decoder {losses[1]:.4f}, {seconds:.0f} s", flush=True)
    vae.save_pretrained(args.out)
    measure(args.data, vae.eval(), encoder, decoder)


@torch.no_grad()
def measure(data: Path, vae: AutoencoderTiny, encoder: nn.Module, decoder: nn.Module) -> None:
    """Signal to noise of reconstructions, held-out emoji beside the others, ours beside TAEF2's own."""
    for held in (False, True):
        found = [v2.functional.pil_to_tensor(one.picture) for one in emoji(data) if (one.category in HELD_OUT) == held]
        x = torch.stack(found[:256]).float() / 255
        pairs = {"TAEF2": decoder(encoder(x)), "ours": (vae(x * 2 - 1).sample + 1) / 2}
        psnr = {n: -10 * (y.clamp(0, 1) - x).square().mean((1, 2, 3)).log10().mean().item() for n, y in pairs.items()}
        print("held out:" if held else "trained on:", ", ".join(f"{n} {v:.2f} dB" for n, v in psnr.items()))


if __name__ == "__main__":
    main()
