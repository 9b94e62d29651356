"""A data set of the `datasets` library, in streaming or in memory, as what a tuned model is trained on.

python examples/from_datasets.py --out runs/datasets [--data imagefolder:photos]
"""

import argparse
from pathlib import Path

import datasets
import torch
from torch.utils.data import DataLoader

import restuning as rt
from restuning.backbones.load import preprocessing_of


def digits(items: int) -> datasets.Dataset:
    """A stand-in for `datasets.load_dataset("owner/name")`: a column of images and one of class labels."""
    task = rt.load_task("digits", train_size=items, test_size=items)
    columns = {"image": [task.train.item(i) for i in range(items)], "label": list(task.train.labels)}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.classes))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/datasets"))
    parser.add_argument("--data", help="imagefolder:FOLDER, with a folder for each class")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    if args.data:
        data = datasets.load_dataset("imagefolder", data_dir=args.data.removeprefix("imagefolder:"), split="train")
    else:
        data = digits(args.items)
    backbone = rt.load_backbone("restuning-micro")
    how = preprocessing_of(backbone)

    def read(batch: dict[str, list]) -> dict[str, list]:
        return {"x": [how(image.convert("RGB")) for image in batch["image"]], "labels": batch["label"]}

    batches = DataLoader(data.with_transform(read), batch_size=32, shuffle=True)
    classes = data.features["label"].names
    tuned = rt.adapt(backbone, "res-tuning", classes=classes, preprocessing=how.to_dict())
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    for epoch in range(args.epochs):
        for batch in batches:
            loss = tuned(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    tuned.save_pretrained(args.out)
    print(f"{len(data)} rows of {len(classes)} classes; next: restuning predict {args.out} picture.png")


if __name__ == "__main__":
    main()
