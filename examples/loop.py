"""A training loop of one's own with Accelerate, which ends in a folder that `restuning predict` reads.

python examples/loop.py --out runs/loop
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import restuning as rt
from restuning.backbones.load import preprocessing_of
from restuning.data import Prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/loop"))
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator()
    backbone = rt.load_backbone("restuning-micro")
    how = preprocessing_of(backbone)
    task = rt.load_task("digits", train_size=args.items, test_size=args.items)
    tuned = rt.adapt(backbone, "res-tuning", classes=task.classes, preprocessing=how.to_dict())
    tuned.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    batches = DataLoader(Prepared(task.train, how), batch_size=32, shuffle=True)
    model, optimizer, batches = accelerator.prepare(tuned, optimizer, batches)
    for epoch in range(args.epochs):
        model.train()
        for images, labels in batches:
            loss = model(images, labels=labels)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for images, labels in accelerator.prepare(DataLoader(Prepared(task.test, how), batch_size=32)):
            right += int((model(images).argmax(-1) == labels).sum())
            total += len(labels)
    accelerator.unwrap_model(model).save_pretrained(args.out)
    accelerator.print(f"accuracy {100 * right / total:.1f} %; next: restuning predict {args.out} picture.png --top 3")


if __name__ == "__main__":
    main()
