"""Accelerate's trackers: one loop, whose curves go to TensorBoard, MLflow, Weights & Biases or any other that it knows.

python examples/trackers.py --out runs/trackers --with tensorboard mlflow wandb
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import restuning as rt
from restuning.backbones.load import preprocessing_of
from restuning.data import Prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trackers"))
    parser.add_argument("--with", dest="trackers", nargs="+", default=["tensorboard"])
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", (args.out / "mlruns").absolute().as_uri())
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions prefer a database
    os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later
    os.environ.setdefault("WANDB_DIR", str(args.out.absolute()))
    backbone = rt.load_backbone("restuning-micro")
    how = preprocessing_of(backbone)
    task = rt.load_task("digits", train_size=args.items, test_size=args.items)
    tuned = rt.adapt(backbone, "res-tuning", classes=task.classes, preprocessing=how.to_dict())
    accelerator = Accelerator(log_with=args.trackers, project_dir=args.out)
    accelerator.init_trackers("digits", {"method": "res-tuning", "lr": 5e-3, **rt.count(tuned)})
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    batches = DataLoader(Prepared(task.train, how), batch_size=32, shuffle=True)
    model, optimizer, batches = accelerator.prepare(tuned, optimizer, batches)
    for epoch in range(args.epochs):
        for images, labels in batches:
            loss = model(images, labels=labels)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=epoch)
    accelerator.end_training()
    accelerator.unwrap_model(model).save_pretrained(args.out / "adapter")
    accelerator.print(f"loss {loss.item():.3f}, logged with {', '.join(args.trackers)} in {args.out}")


if __name__ == "__main__":
    main()
