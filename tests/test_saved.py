"""Files that are damaged, foreign or another's: one line, and nothing changed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY

import restuning as rt
from restuning.errors import CheckpointError, MethodError
from restuning.model.files import fingerprint_of
from restuning.utils import files

VIT = TINY["timm-vit"]


@pytest.fixture
def folder(tmp_path):
    rt.adapt(VIT.backbone(), "res-tuning", 3).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refused(folder, backbone=None) -> str:
    tuned = rt.adapt(backbone or VIT.backbone(), "linear", 2, name="first")
    with pytest.raises(CheckpointError) as caught:
        tuned.load_adapter(folder, "second")
    assert "\n" not in str(caught.value)
    assert list(tuned.adapters) == ["first"] and tuned(**VIT.inputs()).shape == (3, 2)
    return str(caught.value)


def test_what_is_written(folder) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["format"] == "restuning/1" and config["restuning_version"] == rt.__version__
    assert config["method"] == "res-tuning" and config["num_classes"] == 3
    assert config["backbone"]["class"] == "VisionTransformer" and config["backbone"]["width"] == 32
    assert not any("backbone" in key for key in load_file(folder / "adapter_model.safetensors"))


def test_damaged_and_missing_files(folder, tmp_path) -> None:
    model, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = model.read_bytes(), config.read_text()
    for data in (whole[:-30], b"", b"\x00" * 50):
        model.write_bytes(data)
        assert "adapter_model.safetensors is damaged" in refused(folder)
    model.write_bytes(whole)
    config.write_text(text[:40])
    assert "adapter_config.json is damaged" in refused(folder)
    config.write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    assert "not of this library: its format is 'LORA'" in refused(folder)
    config.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "pool"}))
    assert "lacks pool" in refused(folder)
    config.write_text(json.dumps({**json.loads(text), "spec": {"kind": "magic"}}))
    assert "unknown kind of method 'magic'" in refused(folder)
    config.unlink()
    assert "has no adapter_config.json" in refused(folder)
    assert "no saved adapter at" in refused(tmp_path / "nowhere")


def test_other_tensors(folder) -> None:
    model = folder / "adapter_model.safetensors"
    state = load_file(model)
    save_file({**state, "head.bias": torch.zeros(9)}, model)
    assert "head.bias is (9,), expected (3,)" in refused(folder)
    save_file({k: v for k, v in state.items() if k != "head.bias"}, model)
    assert "head.bias is missing" in refused(folder)
    save_file({**state, "tuners.9_mha.up.bias": torch.zeros(1)}, model)
    assert "tuners.9_mha.up.bias is not expected" in refused(folder)


def test_another_backbone(folder) -> None:
    from timm.models.vision_transformer import VisionTransformer
    from tiny import VIT as SHAPE

    deeper = VisionTransformer(**{**SHAPE, "depth": 3})
    assert "this is VisionTransformer (width 32, 3 blocks)" in refused(folder, deeper)
    other = VisionTransformer(**SHAPE)
    assert "with other weights" in refused(folder, other)
    half = VIT.backbone().half().float()
    assert rt.Tuned.from_pretrained(half, folder).active_adapters == ("default",), "a cast is the same backbone"


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        rt.adapt(VIT.backbone(), "bypass", 3).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_hub(folder, monkeypatch) -> None:
    import huggingface_hub

    uploads = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            uploads["made"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path):
            from pathlib import Path

            uploads.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    tuned = rt.Tuned.from_pretrained(VIT.backbone(), folder)
    assert tuned.push_to_hub("me/task", private=True) == "commit"
    assert uploads.pop("made") == ("me/task", True)
    card = uploads.pop("README.md").decode()
    assert uploads == {p.name: p.read_bytes() for p in folder.iterdir()}
    described = huggingface_hub.ModelCard(card).data  # the hub's own reader
    assert described.library_name == "restuning" and described.pipeline_tag == "image-classification"
    assert tuned.adapter_config().method in card and f"{rt.count(tuned)['trainable']:,}" in card
    assert 'from_pretrained(backbone, "hub:me/task")' in card

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, revision: str(folder / file))
    below, x = rt.Tuned.from_pretrained(VIT.backbone(), folder.parent, subfolder=folder.name), VIT.inputs(1)
    assert torch.equal(below(**x), tuned(**x))
    for bad in ("../elsewhere", "/", "nothing"):
        with pytest.raises(CheckpointError, match=r"subfolder|no saved adapter"):
            rt.Tuned.from_pretrained(VIT.backbone(), folder.parent, subfolder=bad)
    assert torch.equal(rt.Tuned.from_pretrained(VIT.backbone(), "hub:me/task")(**VIT.inputs(1)) * 0, torch.zeros(1, 3))

    def offline(*_, **__):
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert "the hub gave no adapter of that name: no route to host" in refused("hub:me/task")
    assert "for the hub, write hub:me/task" in refused("me/task"), "a path that is not there asks no hub"


def test_what_no_file_can_hold_is_refused_before_it_is_trained(folder) -> None:
    tuned = rt.adapt(VIT.backbone(), "linear", np.int64(3), classes=np.array([4, 5, 6]))
    tuned.save_pretrained(folder)
    assert rt.Tuned.from_pretrained(VIT.backbone(), folder).adapter_config().classes == [4, 5, 6]
    with pytest.raises(MethodError, match="plain data"):
        rt.adapt(VIT.backbone(), "linear", 3, preprocessing={"mean": np.zeros(3)})


def test_heads_and_poolers_are_no_part_of_what_a_backbone_is_told_by(tmp_path) -> None:
    whole = TINY["timm-vit"].backbone()
    whole.reset_classifier(1000)
    rt.adapt(whole, "linear", 3).save_pretrained(tmp_path / "a")
    whole.reset_classifier(0)
    rt.Tuned.from_pretrained(whole, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["backbone"]["fingerprint"] = fingerprint_of(whole)  # as older files have it
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    rt.Tuned.from_pretrained(whole, tmp_path / "a")
    with torch.no_grad():
        whole.blocks[1].mlp.fc1.weight.mul_(2)
        whole.blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(CheckpointError, match="other weights"):
        rt.Tuned.from_pretrained(whole, tmp_path / "a")


def test_of_several_active_adapters_one_is_named(tmp_path) -> None:
    tuned = rt.adapt(VIT.backbone(), "lora", 3)
    tuned.add_adapter("second", "lora", 3)
    tuned.set_adapter(["default", "second"])
    for call in (
        tuned.merge_and_unload,
        lambda: tuned.save_pretrained(tmp_path),
        lambda: rt.save_peft(tuned, tmp_path),
    ):
        with pytest.raises(MethodError, match="several adapters are active"):
            call()
    tuned.save_pretrained(tmp_path, "second")
    with pytest.raises(MethodError, match="cannot be named 'training'"):
        tuned.add_adapter("training", "lora", 3)


def test_a_deleted_full_adapter_leaves_another_backbone_in_eval_mode(tmp_path) -> None:
    tuned = rt.adapt(VIT.backbone(), "full", 3).train()
    with torch.no_grad():
        for p in tuned.backbone.parameters():
            p.add_(0.3)
    tuned.delete_adapter("default")
    assert not tuned.backbone.training and not any(p.requires_grad for p in tuned.backbone.parameters())
    tuned.add_adapter("next", "linear", 3)
    tuned.save_pretrained(tmp_path / "next")
    with pytest.raises(CheckpointError, match="other weights"):
        rt.Tuned.from_pretrained(VIT.backbone(), tmp_path / "next")


def test_after_unload(tmp_path) -> None:
    backbone = VIT.backbone().train()
    backbone.blocks[0].eval()
    tuned = rt.adapt(backbone, "linear", 3)
    tuned.unload()
    assert backbone.training and not backbone.blocks[0].training and backbone.blocks[1].training
    tuned.add_adapter("again", "linear", 3)
    assert rt.count(tuned)["trainable"] == rt.count(tuned)["head"] and not backbone.training
