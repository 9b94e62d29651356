"""Every example runs, on little data, and is short."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import restuning as rt

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "trainer": (["--items", "24", "--epochs", "1"], "evaluation loss"),
    "loop": (["--items", "24", "--epochs", "1"], "next: restuning predict"),
    "grid_search": (["--items", "60", "--epochs", "2"], "60 pictures, 13 trainings, 60 pictures through the backbone"),
    "texts": (["--epochs", "4"], "next: restuning predict"),
    "lightning_loop": (["--items", "24", "--epochs", "1"], "next: restuning predict"),
    "collator": (["--epochs", "4"], "of 10 are right"),
    "publish": (["--items", "24"], "next: restuning predict"),
    "from_datasets": (["--items", "24", "--epochs", "1"], "24 rows of 10 classes"),
    "several_tasks": (["--items", "30", "--epochs", "2"], "3 tasks, 1 pass of the backbone"),
}


OWN_TESTS = {"text_to_image", "trackers"}


def test_all_are_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL) | OWN_TESTS
    for name in (*SMALL, *OWN_TESTS):
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60, name
        assert f"examples/{name}.py" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, expected = SMALL[name]
    monkeypatch.setattr(sys, "argv", [name, *flags, "--out", str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))


def test_the_trainer_goes_on_from_a_checkpoint_of_the_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(EXAMPLES / "trainer.py"))
    monkeypatch.setattr(sys, "argv", ["trainer", "--items", "24", "--epochs", "1", "--out", str(tmp_path)])
    example["main"]()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("pytorch_model*"))
    backbone = rt.load_backbone("restuning-micro")
    saved, new = rt.Tuned.from_pretrained(backbone, checkpoint), rt.adapt(backbone, "lora", 10)
    trainer = example["AdapterTrainer"](new, TrainingArguments(str(tmp_path / "again"), report_to=[]))
    trainer._load_from_checkpoint(str(checkpoint))
    expected = saved.adapters.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in new.adapters.state_dict().items())


def test_lightning_goes_on_from_a_checkpoint_of_the_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lightning

    example = runpy.run_path(str(EXAMPLES / "lightning_loop.py"))
    monkeypatch.setattr(sys, "argv", ["lightning_loop", "--items", "24", "--epochs", "1", "--out", str(tmp_path)])
    example["main"]()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    backbone = rt.load_backbone("restuning-micro")
    expected = rt.Tuned.from_pretrained(backbone, tmp_path / "adapter").adapters.state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in saved.items())
    new = example["Tuning"](rt.adapt(rt.load_backbone("restuning-micro"), "res-tuning", 10))
    none = torch.utils.data.DataLoader([(torch.zeros(3, 64, 64), 0)])
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(new, none, ckpt_path=checkpoint)  # its one epoch is done already
    assert all(torch.equal(value, expected[name]) for name, value in new.tuned.adapters.state_dict().items())


def log_records(data: bytes) -> Iterator[bytes]:
    """Of a log in LevelDB's format after its header: checksum (4 bytes), length (2), kind (1), data; 32 KiB a block."""
    at, part = 7, b""  # in its block
    while data:
        room = 32768 - at
        if room < 7:
            data, at = data[room:], 0
            continue
        length, kind = int.from_bytes(data[4:6], "little"), data[6]
        part, data, at = part + data[7 : 7 + length], data[7 + length :], (at + 7 + length) % 32768
        if kind in (1, 4):  # whole, or its last part
            yield part
            part = b""


def test_what_trackers_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by the trackers' own readers, as far as they have any."""
    import mlflow
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # as it was, afterwards
        monkeypatch.delenv(name)
    trackers = ["tensorboard", "mlflow", "wandb"]
    argv = ["trackers", "--items", "24", "--epochs", "2", "--with", *trackers, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(EXAMPLES / "trackers.py"), run_name="__main__")
    wandb.teardown()
    assert "tensorboard, mlflow, wandb" in capsys.readouterr().out
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    events = EventAccumulator(str(tmp_path / "digits"))
    events.Reload()
    curve = [(point.step, pytest.approx(point.value, rel=1e-5)) for point in events.Scalars("loss")]
    assert [step for step, _ in curve] == [0, 1]

    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == curve

    found = []
    for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):  # older versions begin a second one
        for record in map(Record.FromString, log_records(file.read_bytes()[7:])):
            for item in record.history.item:
                if "loss" in (item.key, *item.nested_key):
                    found.append((record.history.step.num, json.loads(item.value_json)))
    assert found == curve


def test_a_pipeline_is_tuned_and_is_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image
    from test_diffusion import pipeline

    pipe, photos = pipeline(), tmp_path / "photos"
    pipe.save_pretrained(tmp_path / "base")
    photos.mkdir()
    for i, colour in enumerate(("red", "green")):
        Image.new("RGB", (20, 18), colour).save(photos / f"{i}.png")
    rows = (json.dumps({"file_name": f"{i}.png", "text": f"a {c} square"}) for i, c in enumerate(("red", "green")))
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    ask = ["--base", str(tmp_path / "base"), "--data", f"captions:{photos}", "--prompt", "a red square"]
    small = ["--epochs", "2", "--size", "16", "--steps", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["text_to_image", *ask, *small])
    runpy.run_path(str(EXAMPLES / "text_to_image.py"), run_name="__main__")
    assert "parameters trained" in capsys.readouterr().out
    generator = torch.Generator().manual_seed(0)
    plain = pipe("a red square", num_inference_steps=2, height=16, width=16, generator=generator).images[0]
    assert Image.open(tmp_path / "out/plain.png").tobytes() == plain.tobytes()


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells of code, in order, as a kernel would run them."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        exec(cell, names)
    said = capsys.readouterr().out
    assert len(cells) == 6 and "% of 100 test pictures" in said and "torch.Size([2, 10])" in said
    assert "examples/first_steps.ipynb" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
