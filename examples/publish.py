"""Two tasks in one repository: a folder each, a card with each, and back by `from_pretrained` of a subfolder.

python examples/publish.py --out runs/published [--repo me/tasks]      with --repo: to the hub, a repository for each
"""

import argparse
from pathlib import Path

import torch

import restuning as rt
from restuning.backbones.load import preprocessing_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/published"))
    parser.add_argument("--repo", help="on the hub; you are logged in there")
    parser.add_argument("--items", type=int, default=300)
    args = parser.parse_args()
    backbone = rt.load_backbone("restuning-micro")
    how = preprocessing_of(backbone)
    for spec in ("digits", "sprites:count"):
        task = rt.load_task(spec, train_size=args.items, test_size=50)
        X, y = [task.train.item(i) for i in range(args.items)], [task.classes[label] for label in task.train.labels]
        tuned = rt.Classifier(epochs=5).fit(X, y).model_
        name = spec.replace(":", "-")
        tuned.save_pretrained(args.out / name)
        tuned.write_card(args.out / name)  # README.md; push_to_hub writes one too
        if args.repo:
            print(tuned.push_to_hub(f"{args.repo}-{name}", private=True))

    both = rt.Tuned.from_pretrained(backbone, args.out, "numbers", subfolder="digits")
    both.load_adapter(args.out, "shapes", subfolder="sprites-count")
    picture = how(task.test.item(0))[None]
    for name in ("numbers", "shapes"):
        both.set_adapter(name)
        with torch.inference_mode():
            best = int(both(picture).argmax())
        print(f"{name}: {both.adapter_config(name).classes[best]}")
    print(f"next: restuning predict {args.out / 'digits'} {args.out / 'sprites-count'} picture.png")


if __name__ == "__main__":
    main()
