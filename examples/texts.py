"""Sentences by a frozen MiniLM: linear probing and a bypass, from features that are computed once.

python examples/texts.py --out runs/texts [--data reviews.tsv]      columns: sentence, label
"""

import argparse
import csv
from pathlib import Path

from sklearn.model_selection import cross_val_score

import restuning as rt

SENTENCES = """a warm and funny film|good
what a joy from start to end|good
the cast is a delight|good
one of the best of the year|good
sharp, moving and well made|good
i laughed and i cried|good
a dull and lifeless story|bad
what a waste of an evening|bad
the plot makes no sense|bad
one of the worst of the year|bad
slow, loud and badly made|bad
i wanted my money back|bad"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/texts"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    if args.data is None:
        pairs = [tuple(line.split("|")) for line in SENTENCES.splitlines()]
    else:
        with args.data.open(encoding="utf-8", newline="") as file:
            pairs = [(row["sentence"], row["label"]) for row in csv.DictReader(file, delimiter="\t")]
    X, y = [text for text, _ in pairs], [label for _, label in pairs]
    for method in ("linear", "bypass-mean"):
        classifier = rt.Classifier("all-MiniLM-L6-v2", method, epochs=args.epochs, max_length=64)
        print(f"{method}: {100 * cross_val_score(classifier, X, y, cv=3).mean():.1f} % by cross-validation")
    classifier.fit(X, y).save(args.out)
    print(classifier.predict(["a film to see twice"])[0])
    print(f'next: restuning predict {args.out} "a film to see twice"')


if __name__ == "__main__":
    main()
