"""Backbones by name: bundled, timm, transformers; weights that do not fit; how they want their images."""

import hashlib
import json
import socket
from pathlib import Path

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny import HF, TEXT

import restuning as rt
from restuning.backbones import load as backbones
from restuning.backbones.load import describe_backbone, preprocessing_of
from restuning.errors import CheckpointError, RestuningError, SiteError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_the_bundled_backbone_is_the_one_described() -> None:
    assets = Path(backbones.__file__).parent / "assets"
    weights = (assets / "restuning-micro.safetensors").read_bytes()
    card = json.loads((assets / "restuning-micro.json").read_text())
    assert hashlib.sha256(weights).hexdigest() == card["sha256"] and len(weights) < 8 * 2**20
    micro = rt.load_backbone("restuning-micro")
    assert not micro.training and next(micro.parameters()).dtype == torch.float32
    assert len(rt.find_sites(micro).at("block")) == 8
    assert preprocessing_of(micro).size == (64, 64) and preprocessing_of(micro).mean == (0.5, 0.5, 0.5)
    assert rt.load_backbone("restuning-micro", image_size=96)(torch.zeros(1, 3, 96, 96)).shape == (1, 128)


def test_describing_loads_nothing() -> None:
    for name, parameters in {"vit_base_patch16_224": 85_798_656, "vit_large_patch14_clip_224": 303_179_776}.items():
        model = describe_backbone(name)
        assert all(p.is_meta for p in model.parameters())
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert rt.count(rt.adapt(model, "linear", 10))["head"] > 0


def test_unknown_names() -> None:
    with pytest.raises(SiteError, match=r"unknown backbone 'vit_tiny_patch16_22': .* nearest: vit_tiny_patch16_224"):
        rt.load_backbone("vit_tiny_patch16_22")
    with pytest.raises(CheckpointError, match="no such folder: '/nowhere'"):
        rt.load_backbone("hf:/nowhere")


def test_pretrained_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"could not be had from the hub \(no route\): give a file") as caught:
        rt.load_backbone("vit_tiny_patch16_224")
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_name_their_keys(tmp_path: Path) -> None:
    state = rt.load_backbone("restuning-micro").state_dict()
    file = tmp_path / "w.safetensors"

    def refused(state: dict[str, torch.Tensor]) -> str:
        save_file({k: v.contiguous() for k, v in state.items()}, file)
        with pytest.raises(CheckpointError) as caught:
            rt.load_backbone("restuning-micro", file)
        return str(caught.value)

    assert "1 missing (norm.bias)" in refused({k: v for k, v in state.items() if k != "norm.bias"})
    assert "1 unexpected (norm.gain)" in refused({**state, "norm.gain": state["norm.bias"].clone()})
    assert "1 of another shape (norm.bias)" in refused({**state, "norm.bias": torch.zeros(3)})
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    rt.load_backbone("restuning-micro", tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for bad, words in ((tmp_path / "list.pt", "holds no state dict"), (tmp_path / "no.pt", "no weights at")):
        with pytest.raises(CheckpointError, match=words):
            rt.load_backbone("restuning-micro", bad)
    file.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        rt.load_backbone("restuning-micro", file)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        rt.load_backbone("restuning-micro", tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, -5, 65])
def test_image_sizes_that_do_not_fit(size: int) -> None:
    with pytest.raises(RestuningError, match="image size"):
        rt.load_backbone("restuning-micro", image_size=size)


def test_transformers_folders(tmp_path: Path) -> None:
    vit = hf.ViTModel(hf.ViTConfig(**HF)).eval()
    vit.save_pretrained(tmp_path / "vit")
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(statistics))
    loaded = rt.load_backbone(f"hf:{tmp_path / 'vit'}")
    assert torch.equal(loaded.layernorm.weight, vit.layernorm.weight)
    assert preprocessing_of(loaded).size == (16, 16) and preprocessing_of(loaded).mean == (0.1, 0.2, 0.3)
    with pytest.raises(RestuningError, match="fixed input size"):
        rt.load_backbone(f"hf:{tmp_path / 'vit'}", image_size=32)
    text = {k: v for k, v in TEXT.items() if k not in ("image_size", "patch_size")} | {"eos_token_id": 2}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=HF, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    hf.CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    with pytest.raises(SiteError, match="CLIPModel has 2 towers: name the one that is meant, tower='vision_model' or"):
        rt.load_backbone(f"hf:{tmp_path / 'clip'}")
    vision = rt.load_backbone(f"hf:{tmp_path / 'clip'}", tower="vision_model")
    again = rt.load_backbone(f"hf:{tmp_path / 'clip'}#vision_model")
    assert torch.equal(again.post_layernorm.weight, vision.post_layernorm.weight)
    assert preprocessing_of(vision).mean == tuple(hf.CLIPImageProcessor().image_mean) != (0.5, 0.5, 0.5)
    hf.ViTImageProcessor().save_pretrained(tmp_path / "vit")
    assert preprocessing_of(loaded).interpolation == "bilinear" and preprocessing_of(vision).interpolation == "bicubic"
    (tmp_path / "vit" / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="image processor cannot be read"):
        preprocessing_of(loaded)
    vit.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {p.dtype for p in rt.load_backbone(f"hf:{tmp_path / 'half'}").parameters()} == {torch.float32}
    with pytest.raises(RestuningError, match="image size 8 does not fit"):
        rt.load_backbone("convnext_atto", "random", 8)
    tuned = rt.adapt(vision, "res-tuning", 3)
    assert tuned(pixel_values=torch.zeros(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.skipif(not SHARED.exists(), reason="the folder of shared data is not beside this checkout")
def test_the_real_vit_tiny() -> None:
    file = SHARED / "vit_tiny_patch16_224_in1k/model.safetensors"
    backbone = rt.load_backbone("vit_tiny_patch16_224", file)
    whole = timm.create_model("vit_tiny_patch16_224")
    whole.load_state_dict(load_file(file))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            rt.adapt(backbone, "linear")(x), whole.eval().forward_head(whole.forward_features(x), True)
        )
    assert preprocessing_of(backbone).interpolation == "bicubic"
    assert rt.load_backbone("vit_tiny_patch16_224", file, 96)(torch.zeros(1, 3, 96, 96)).shape == (1, 192)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "hf:hub:no/model"])
def test_a_hub_without_an_answer_is_asked_once(name, monkeypatch, capfd, caplog) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(CheckpointError) as caught:
        rt.load_backbone(name)
    assert "\n" not in str(caught.value) and not constants.HF_HUB_OFFLINE
    assert "Retry" not in caplog.text + "".join(capfd.readouterr())
