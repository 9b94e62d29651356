"""Sentences through transformers' Trainer, as TRL's users have them: rows of tokens, a collator that pads each batch.

python examples/collator.py --out runs/collator
"""

import argparse
from pathlib import Path

from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import restuning as rt
from restuning.backbones.load import reading_of

SENTENCES = """a warm and funny film|good
what a joy from start to end|good
the cast is a delight|good
sharp, moving and well made|good
i laughed and i cried, and so did everybody around me in the cinema|good
a dull and lifeless story|bad
what a waste of an evening|bad
the plot makes no sense|bad
slow, loud and badly made|bad
i wanted my money back after the first half hour of it|bad"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/collator"))
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    backbone = rt.load_backbone("all-MiniLM-L6-v2")
    how = reading_of(backbone, max_length=64)
    tokenizer, classes = how.load(), ("bad", "good")
    pairs = [line.split("|") for line in SENTENCES.splitlines()]
    rows = [{**tokenizer(text, truncation=True, max_length=64), "labels": classes.index(y)} for text, y in pairs]
    tuned = rt.adapt(backbone, "res-tuning", classes=classes, pool="mean", preprocessing=how.to_dict())
    settings = TrainingArguments(
        str(args.out), num_train_epochs=args.epochs, learning_rate=1e-3, save_strategy="no", report_to=[],
        per_device_train_batch_size=4, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(tuned, settings, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    right = trainer.predict(rows).predictions.argmax(-1) == [row["labels"] for row in rows]
    tuned.save_pretrained(args.out)
    print(f'{right.sum()} of {len(rows)} are right; next: restuning predict {args.out} "a film to see twice"')


if __name__ == "__main__":
    main()
