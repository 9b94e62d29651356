"""Other people's loops: a plain one, Accelerate, transformers.Trainer."""

import pytest
import torch
from tiny import TINY

import restuning as rt


@pytest.mark.parametrize("method", ["res-tuning", "bypass", "full"])
def test_plain_loop(method: str) -> None:
    tiny = TINY["timm-vit"]
    tuned, x, y = rt.adapt(tiny.backbone(), method, 2).train(), tiny.inputs(6), torch.tensor([0, 1] * 3)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = tuned(**x, labels=y)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_accelerate() -> None:
    from accelerate import Accelerator

    tiny = TINY["timm-vit"]
    accelerator = Accelerator()
    tuned = rt.adapt(tiny.backbone(), "res-tuning", 2)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    tuned, optimizer = accelerator.prepare(tuned, optimizer)
    x, y = tiny.inputs(6), torch.tensor([0, 1] * 3)
    before = tuned(**x, labels=y)["loss"].item()
    for _ in range(10):
        optimizer.zero_grad()
        accelerator.backward(tuned(**x, labels=y)["loss"])
        optimizer.step()
    assert tuned(**x, labels=y)["loss"].item() < before


@pytest.mark.parametrize("method", ["res-tuning", "bypass"])
def test_transformers_trainer(method: str, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    tiny = TINY["hf-vit"]
    pixels = tiny.inputs(8)["pixel_values"]
    rows = [{"pixel_values": p, "labels": i % 2} for i, p in enumerate(pixels)]
    tuned = rt.adapt(tiny.backbone(), method, 2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(tuned, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    assert trainer.predict(rows).predictions.shape == (8, 2)
    assert all(not p.requires_grad for p in tuned.backbone.parameters())
