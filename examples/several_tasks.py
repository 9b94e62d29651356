"""Several tasks on one backbone: one pass of the backbone answers all of them.

python examples/several_tasks.py --out runs/several
"""

import argparse
from pathlib import Path

import restuning as rt
from restuning.backbones.load import preprocessing_of

TASKS = ("digits", "sprites:location", "sprites:orientation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/several"))
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    folders = {}
    for spec in TASKS:
        task = rt.load_task(spec, train_size=args.items, test_size=50)
        X = [task.train.item(i) for i in range(len(task.train))]
        y = [task.classes[label] for label in task.train.labels]
        name = spec.replace(":", "-")
        folders[name] = args.out / name
        rt.Classifier(method="bypass", epochs=args.epochs).fit(X, y).save(folders[name])
        print(f"{name}: trained on {len(X)} pictures, {len(task.classes)} classes")

    backbone = rt.load_backbone("restuning-micro")
    predictor = rt.Predictor.of(rt.Tuned(backbone, backbone_name="restuning-micro"))
    for name, folder in folders.items():
        predictor = predictor.with_adapter(name, folder)  # the next snapshot; any number of threads may call either
    picture = preprocessing_of(backbone)(task.test.item(0))[None]
    passes: list[int] = []
    backbone.register_forward_hook(lambda *_: passes.append(1))
    for name, logits in predictor.predict(picture).items():
        classes = predictor.adapter_config(name).classes
        print(f"{name}: {classes[int(logits.argmax())]}")
    print(f"{len(folders)} tasks, {len(passes)} pass of the backbone")


if __name__ == "__main__":
    main()
