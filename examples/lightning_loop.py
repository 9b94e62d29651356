"""Lightning's Trainer on a tuned model, whose checkpoints hold the adapter alone.

python examples/lightning_loop.py --out runs/lightning
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

import restuning as rt
from restuning.backbones.load import preprocessing_of
from restuning.data import Prepared


class Tuning(lightning.LightningModule):
    def __init__(self, tuned: rt.Tuned, lr: float = 5e-3) -> None:
        super().__init__()
        self.tuned, self.lr = tuned, lr

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        return self.tuned(batch[0], labels=batch[1])["loss"]

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        self.log("val_accuracy", (self.tuned(batch[0]).argmax(-1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.tuned.adapters.state_dict()  # not the frozen backbone

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.strict_loading = False
        checkpoint["state_dict"] = {f"tuned.adapters.{k}": v for k, v in checkpoint["state_dict"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    backbone = rt.load_backbone("restuning-micro")
    how = preprocessing_of(backbone)
    task = rt.load_task("digits", train_size=args.items, test_size=args.items)
    tuned = rt.adapt(backbone, "res-tuning", classes=task.classes, preprocessing=how.to_dict())
    train, test = (DataLoader(Prepared(part, how), batch_size=32) for part in (task.train, task.test))
    trainer = lightning.Trainer(max_epochs=args.epochs, default_root_dir=args.out, logger=False)
    trainer.fit(Tuning(tuned), train, test)
    tuned.save_pretrained(args.out / "adapter")
    accuracy = 100 * trainer.callback_metrics["val_accuracy"]
    print(f"accuracy {accuracy:.1f} %; next: restuning predict {args.out / 'adapter'} picture.png")


if __name__ == "__main__":
    main()
