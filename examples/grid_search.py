"""scikit-learn's GridSearchCV over methods and learning rates: the backbone sees each picture once.

python examples/grid_search.py --out runs/grid-search
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.model_selection import GridSearchCV

import restuning as rt
from restuning.runs import estimator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grid-search"))
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    task = rt.load_task("digits", train_size=args.items, test_size=args.items)
    X, y = ([task.train.item(i) for i in range(args.items)], np.array(task.train.labels))
    grid = {"method": ["linear", "bypass"], "lr": [0.03, 0.01]}
    passed: list[int] = []
    backbone = estimator.shared_backbone("restuning-micro", None, None)
    backbone.register_forward_hook(lambda module, inputs, output: passed.append(len(output)))
    search = GridSearchCV(rt.Classifier(epochs=args.epochs), grid, cv=3).fit(X, y)
    for settings, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        print(f"{settings['method']:8} lr {settings['lr']:<5} {100 * score:.1f} %")
    print(f"{len(X)} pictures, {3 * 4 + 1} trainings, {sum(passed)} pictures through the backbone")
    test = [task.test.item(i) for i in range(len(task.test))]
    print(f"test accuracy {100 * search.score(test, task.test.labels):.1f} %")
    search.best_estimator_.save(args.out)
    print(f"next: restuning predict {args.out} picture.png --top 3")


if __name__ == "__main__":
    main()
