"""Other people's loops: a plain one, Accelerate, transformers.Trainer."""

from collections.abc import Iterator

import pytest
import torch
from tiny import TINY

import restuning as rt
from restuning.errors import RestuningError


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    """What Accelerate keeps for a whole process is of one test alone."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(True)


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


@pytest.mark.parametrize("name", ["hf-vit", "timm-vit"])
def test_trainers_accumulated_step_is_that_of_the_whole_batch(name: str, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    tiny, found = TINY[name], []
    ((key, pixels),) = tiny.inputs(8).items()
    key = "pixel_values" if name == "hf-vit" else "x"
    rows = [{key: p, "labels": i % 2} for i, p in enumerate(pixels)]
    for each, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        tuned = rt.adapt(tiny.backbone(), "linear", 2)
        settings = {"output_dir": str(tmp_path), "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "use_cpu": True}
        settings |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no"}
        settings |= {"per_device_train_batch_size": each, "gradient_accumulation_steps": steps, "disable_tqdm": True}
        arguments = TrainingArguments(**settings, remove_unused_columns=False, gradient_checkpointing=steps > 1)
        Trainer(tuned, arguments, train_dataset=rows).train()
        found.append(tuned.adapters["default"].head.state_dict())
    for key, weight in found[0].items():
        torch.testing.assert_close(found[1][key], weight)


def test_targets_as_collators_give_them() -> None:
    """(b,) for (b, 1): the same loss, not one of every pair."""
    tiny, y = TINY["timm-vit"], torch.arange(6.0)
    x = tiny.inputs(6)
    for kind in ("regression", "multi-label"):
        tuned, y = rt.adapt(tiny.backbone(), "linear", 1, kind=kind), y.clamp(max=1) if kind == "multi-label" else y
        flat, tall = (tuned(**x, labels=labels)["loss"] for labels in (y, y[:, None]))
        torch.testing.assert_close(flat, tall)
        with pytest.raises(RestuningError, match="expected as many"):
            tuned(**x, labels=y[:5])
