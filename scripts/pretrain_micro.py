"""Pre-train the bundled backbone `restuning-micro` by distillation from an ImageNet ViT-Ti/16, and measure it.

python scripts/pretrain_micro.py [--data ../shared/data] [--epochs 6]     writes src/restuning/backbones/assets
python scripts/pretrain_micro.py --evaluate                                linear probes on data it never saw

Pictures: Caltech-101 and EmojiOne (both CC BY 4.0), and pictures drawn by formulas here. None of EuroSAT, of the
digits, or of the sprites. The teacher sees each view at 128 x 128, so that its 8 x 8 patches are the student's.
"""

import argparse
import hashlib
import io
import json
import math
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

ASSETS = Path(__file__).parent.parent / "src/restuning/backbones/assets"
SHAPE = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 4, "num_classes": 0}
TEACHER, MIDDLE, STUDENT_MIDDLE = "vit_tiny_patch16_224", 6, 4  # the outputs of these blocks are matched too
FORMULA_PICTURES, VIEWS = 4000, {"caltech": 3, "emoji": 2, "formula": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args.data)
    else:
        pretrain(args)


def pictures(data: Path) -> Iterator[tuple[str, Image.Image]]:
    """(kind, RGB picture), one after the other."""
    for kind, path in (
        ("caltech", "caltech101/caltech101_short128_max40.tar"),
        ("emoji", "captions_emojione/emojione_png64.tar"),
    ):
        with tarfile.open(data / path) as tar:
            for member in sorted((m for m in tar if m.name.endswith((".jpg", ".png"))), key=lambda m: m.name):
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
                yield kind, Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    for _ in range(FORMULA_PICTURES):
        yield "formula", formula_picture()


def formula_picture() -> Image.Image:
    """Waves, clouds of noise or a plain colour, with strokes, rings and blobs of random colours, sizes and places."""
    n = 128
    y, x = torch.meshgrid(torch.linspace(-1, 1, n), torch.linspace(-1, 1, n), indexing="ij")
    kind = int(torch.randint(3, ()))
    if kind == 0:
        angle, pitch = torch.rand(2) * torch.tensor([math.pi, 20.0])
        ground = torch.sin((x * angle.cos() + y * angle.sin()) * pitch + x * y * torch.randn(()))
    elif kind == 1:
        clouds = [F.interpolate(torch.randn(1, 1, 2**k, 2**k), (n, n), mode="bicubic")[0, 0] for k in range(1, 6)]
        ground = sum(cloud / 2 ** (k / 2) for k, cloud in enumerate(clouds, 1))
        ground = ground / ground.abs().max()
    else:
        ground = torch.zeros(n, n)
    low, high = torch.rand(2, 3, 1, 1)
    image = v2.functional.to_pil_image(low + (high - low) * (ground + 1) / 2)
    draw = ImageDraw.Draw(image)
    for _ in range(int(torch.randint(0, 7, ()))):
        cx, cy, radius, turn = (torch.rand(4) * torch.tensor([n, n, n / 3, 2 * math.pi])).tolist()
        colour = tuple(torch.randint(256, (3,)).tolist())
        width = int(torch.randint(1, 9, ()))
        corners = int(torch.randint(3, 9, ()))
        form = int(torch.randint(4, ()))
        lengths = (0.4 + 0.6 * torch.rand(corners)).tolist()
        turns = [turn + 2 * math.pi * k / corners for k in range(corners)]
        points = [
            (cx + s * radius * math.cos(t), cy + s * radius * math.sin(t)) for s, t in zip(lengths, turns, strict=True)
        ]
        flat = radius * lengths[0]
        if form == 0:
            draw.line(points, fill=colour, width=width, joint="curve")
        elif form == 1:
            draw.polygon(points, fill=colour)
        elif form == 2:
            box = (cx - radius, cy - radius, cx + radius, cy + radius)
            draw.arc(box, 0, 360 * lengths[0], fill=colour, width=width)
        else:
            draw.ellipse((cx - radius, cy - flat, cx + radius, cy + flat), outline=colour, width=width)
    return image.filter(ImageFilter.GaussianBlur(float(torch.rand(()) * 1.5)))


def teacher(data: Path) -> nn.Module:
    model = timm.create_model(TEACHER, pretrained=False)
    model.load_state_dict(load_file(data / "vit_tiny_patch16_224_in1k/model.safetensors"))
    model.set_input_size(img_size=(128, 128))
    return model.eval()


def normal(views: Tensor) -> Tensor:
    return views.float() / 127.5 - 1


@torch.no_grad()
def targets(data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Student views (n, 3, 64, 64) in uint8; the teacher's last tokens (n, 65, 192) and middle patches (n, 64, 192)."""
    crop = v2.RandomResizedCrop(128, (0.35, 1.0), antialias=True)
    view = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    small, last, middle, batch = [], [], [], []
    model, kept = teacher(data), {}
    model.blocks[MIDDLE - 1].register_forward_hook(lambda m, a, out: kept.update(middle=out))

    def flush() -> None:
        views = torch.stack(batch)
        last.append(model.forward_features(normal(views)).half())
        middle.append(kept["middle"][:, 1:].half())
        small.append(v2.functional.resize(views, [64, 64], antialias=True))
        batch.clear()

    for kind, picture in pictures(data):
        for _ in range(VIEWS[kind]):
            batch.append(view(picture))
            if len(batch) == 64:
                flush()
    flush()
    return torch.cat(small), torch.cat(last), torch.cat(middle)


def mirrored(x: Tensor) -> Tensor:
    """Patches (b, 64, d) of the mirrored picture."""
    return x.unflatten(1, (8, 8)).flip(2).flatten(1, 2)


def pretrain(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    start = time.perf_counter()
    views, last, middle = targets(args.data)
    print(f"{len(views)} views and their targets in {time.perf_counter() - start:.0f} s", flush=True)
    scale = {  # targets are standardised: mean and deviation of each channel
        name: (t.float().mean((0, 1)), t.float().std((0, 1)) + 1e-6)
        for name, t in {"cls": last[:2000, :1], "last": last[:2000, 1:], "middle": middle[:2000]}.items()
    }
    student, kept = VisionTransformer(**SHAPE), {}
    student.blocks[STUDENT_MIDDLE - 1].register_forward_hook(lambda m, a, out: kept.update(middle=out))
    heads = nn.ModuleDict({name: nn.Linear(128, 192) for name in scale})
    decayed = [p for m in (student, heads) for p in m.parameters() if p.ndim > 1]
    others = [p for m in (student, heads) for p in m.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps = args.epochs * (len(views) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.05)
    for epoch in range(args.epochs):
        total = 0.0
        order = torch.randperm(len(views))[: len(views) // args.batch_size * args.batch_size]
        for chosen in order.split(args.batch_size):
            x = normal(views[chosen])
            wanted = {"cls": last[chosen, :1], "last": last[chosen, 1:], "middle": middle[chosen]}
            if torch.rand(()) < 0.5:
                x = x.flip(-1)
                wanted |= {name: mirrored(wanted[name]) for name in ("last", "middle")}
            tokens = student.forward_features(x)
            read = {"cls": tokens[:, :1], "last": tokens[:, 1:], "middle": kept["middle"][:, 1:]}
            loss = sum(
                F.smooth_l1_loss(heads[name](read[name]), (wanted[name].float() - mean) / std)
                for name, (mean, std) in scale.items()
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*student.parameters(), *heads.parameters()], 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        mean = total * args.batch_size / len(order)
        print(f"epoch {epoch + 1}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
        write(student)


def write(student: nn.Module) -> None:
    ASSETS.mkdir(parents=True, exist_ok=True)
    path = ASSETS / "restuning-micro.safetensors"
    save_file({name: t.half().contiguous() for name, t in student.state_dict().items()}, path)
    config = {
        "architecture": SHAPE,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "license": "Apache-2.0",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (ASSETS / "restuning-micro.json").write_text(json.dumps(config, indent=2) + "\n")


def evaluate(data: Path) -> None:
    """Logistic regression on frozen features: 1,000 training images, test accuracy in percent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    import restuning as rt
    from restuning.backbones.load import preprocessing_of
    from restuning.data import Prepared, load_task

    torch.manual_seed(0)
    big = teacher(data)
    big.reset_classifier(0)
    backbones = {
        "restuning-micro": rt.load_backbone("restuning-micro"),
        "random weights": rt.load_backbone("restuning-micro", "random"),
        "teacher, 128 x 128": big,
    }
    tasks = {"digits": ("digits", 500), "EuroSAT": (f"tar:{data}/eurosat/eurosat_rgb64_every6th.tar", 1500)}
    tasks |= {f"sprite {kind}": (f"sprites:{kind}", 1500) for kind in ("location", "orientation")}
    print("| features | pooling |", " | ".join(tasks), "|\n|---|---|", "--:|" * len(tasks))
    for name, model in backbones.items():
        side = 128 if model is big else 64
        rows: dict[str, list[str]] = {"CLS": [], "mean of patches": []}
        for spec, test_size in tasks.values():
            task = load_task(spec, train_size=1000, test_size=test_size)
            sets = {}
            for split, images in (("train", task.train), ("test", task.test)):
                pixels = Prepared(images, preprocessing_of(model, side))
                with torch.no_grad():
                    loader = torch.utils.data.DataLoader(pixels, 64)
                    sets[split] = torch.cat([model.forward_features(x) for x, _ in loader]), images.labels
            for pooling, pool in (("CLS", lambda t: t[:, 0]), ("mean of patches", lambda t: t[:, 1:].mean(1))):
                probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
                probe.fit(pool(sets["train"][0]), sets["train"][1])
                rows[pooling].append(f"{100 * probe.score(pool(sets['test'][0]), sets['test'][1]):.1f}")
        for pooling, row in rows.items():
            print(f"| {name} | {pooling} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
