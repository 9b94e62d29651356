"""A few captioned pictures tune a pipeline of diffusers; one line plugs the tuned file in, another takes it out.

python examples/text_to_image.py --base sd-v1-5 --data captions:photos --prompt "a photo of my dog" --out runs/painter
"""

import argparse
from pathlib import Path

import diffusers
import torch

from restuning.diffusion.generation import plug
from restuning.diffusion.training import DiffusionRun, execute
from restuning.training.config import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a pipeline's folder, or its name on the hub")
    parser.add_argument("--data", required=True, help="captions:FOLDER, with pictures and metadata.jsonl")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/painter"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    training = TrainConfig(epochs=args.epochs, lr=1e-4, batch_size=2, warmup_epochs=0, schedule="constant")
    run = DiffusionRun(args.base, args.data, method="bypass", size=args.size, training=training)
    result = execute(run, args.out, progress=False)
    print(f"{result['parameters']['tuners']:,} parameters trained, {result['kept_bytes']:,} bytes kept for backward")

    pipe = diffusers.DiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": args.steps, "height": args.size, "width": args.size}

    def draw(name: str) -> None:
        image = pipe(args.prompt, generator=torch.Generator().manual_seed(0), **asked).images[0]
        image.save(args.out / f"{name}.png")

    handle = plug(pipe, args.out)
    draw("tuned")
    handle.remove()  # the pipeline is what it was
    draw("plain")
    print(f"next: compare {args.out / 'tuned.png'} and {args.out / 'plain.png'}")


if __name__ == "__main__":
    main()
