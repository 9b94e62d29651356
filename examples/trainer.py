"""transformers' Trainer on a tuned model: checkpoints of some kilobytes, which hold the adapter alone.

python examples/trainer.py --out runs/trainer
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import restuning as rt
from restuning.backbones.load import preprocessing_of
from restuning.data import Prepared


class AdapterTrainer(Trainer):
    """Saves and loads what was trained; the backbone is where it was."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tuned = model or self.model
        saved = rt.Tuned.from_pretrained(tuned.backbone, resume_from_checkpoint)
        tuned.adapters.load_state_dict(saved.adapters.state_dict())


def collate(examples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    return {"x": torch.stack([x for x, _ in examples]), "labels": torch.tensor([label for _, label in examples])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    backbone = rt.load_backbone("restuning-micro")
    how = preprocessing_of(backbone)
    task = rt.load_task("digits", train_size=args.items, test_size=args.items)
    tuned = rt.adapt(backbone, "lora", classes=task.classes, preprocessing=how.to_dict())
    settings = TrainingArguments(
        str(args.out), num_train_epochs=args.epochs, learning_rate=5e-3, save_strategy="epoch", eval_strategy="epoch",
        per_device_train_batch_size=32, remove_unused_columns=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = {"train_dataset": Prepared(task.train, how), "eval_dataset": Prepared(task.test, how)}
    trainer = AdapterTrainer(tuned, settings, data_collator=collate, **data)
    trainer.train()
    size = sum(file.stat().st_size for file in args.out.glob("checkpoint-*/adapter_model.safetensors"))
    print(f"evaluation loss {trainer.evaluate()['eval_loss']:.3f}; all checkpoints' adapters: {size:,} bytes")


if __name__ == "__main__":
    main()
