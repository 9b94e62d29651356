"""Bad input, each named: one line, exit code 2, nothing run, nothing changed, nothing left behind."""

import json
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save, save_file
from tiny import HF, TEXT, TINY

import restuning as rt
from restuning.backbones.load import load_backbone
from restuning.cli.main import main
from restuning.data import Preprocess, check, load_images, load_task, reading
from restuning.data.task import readable
from restuning.data.tokens import Tokenise
from restuning.errors import CheckpointError, DataError, RestuningError, SiteError
from restuning.features.bank import Bank
from restuning.utils import hub
from restuning.utils.files import as_json, atomic_write, locked
from restuning.utils.notes import Note
from restuning.utils.reading import inside, open_regular, parse_json, printable, read_json

VIT = TINY["timm-vit"]
FIXTURES = Path(__file__).parent / "fixtures" / "files"


class Marker:
    """A pickle of it writes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "this ran"))


def refused(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 2) -> str:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == code
    err = capsys.readouterr().err
    assert err.startswith("restuning: ") and err.count("\n") == 1, err
    return err.strip()


# ---- 1, 2: nothing that is read is run


def test_inception_weights_are_no_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    for name, data in (
        ("plain.pth", pickle.dumps(Marker(marker))),
        ("zip.pth", None),
    ):
        if data is None:
            torch.save({"weights": Marker(marker)}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(data)
        said = refused(
            capsys, "score", tmp_path, "--real", f"captions:{tmp_path}", "--features", f"inception:{tmp_path / name}"
        )
        assert "cannot be read as weights" in said
    assert not marker.exists()


def test_inception_weights_that_are_tensors_are_read(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    from restuning.diffusion.quality import _net

    torch.save({"nothing": torch.zeros(1)}, tmp_path / "few.pth")
    with pytest.raises(RestuningError, match="holds no Inception weights"):
        _net(f"inception:{tmp_path / 'few.pth'}", None)


def custom_code(folder: Path, marker: Path) -> Path:
    """A model folder with code of its own, as the hub has them."""
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('this ran')\n"
    code += "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer\n"
    for name in ("Config", "Model", "Tokenizer"):
        base = {"Config": "PretrainedConfig", "Model": "PreTrainedModel", "Tokenizer": "PreTrainedTokenizer"}[name]
        code += f"class My{name}({base}):\n    model_type = 'mine'\n"
    (folder / "mine.py").write_text(code)
    autos = {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": autos}))
    tokenizer = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_folders_own_code_runs_neither_by_a_file_nor_by_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    folder = custom_code(tmp_path / "mine", marker)

    def asked(*_: object) -> str:
        raise AssertionError("standard input was read")

    monkeypatch.setattr("builtins.input", asked)
    for weights in (None, "random"):
        with pytest.raises(CheckpointError, match="--trust-remote-code"):
            load_backbone(f"hf:{folder}", weights)
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenise(str(folder), 8, 50).load()
    rt.adapt(VIT.backbone(), "linear", 3).save_pretrained(tmp_path / "adapter")
    card = tmp_path / "adapter" / "adapter_config.json"
    data = json.loads(card.read_text())
    data["backbone"]["name"], data["trust_remote_code"] = f"hf:{folder}", True
    data["preprocessing"] = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3).to_dict()
    card.write_text(json.dumps(data))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "--trust-remote-code" in refused(capsys, "predict", tmp_path / "adapter", tmp_path / "a.png")
    assert not marker.exists()


def test_a_folders_pickled_weights_are_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hf.ViTModel(hf.ViTConfig(**HF)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    for data in (pickle.dumps(Marker(marker)), None):
        if data is None:
            torch.save({"layernorm.weight": Marker(marker)}, tmp_path / "vit" / "pytorch_model.bin")
        else:
            (tmp_path / "vit" / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(CheckpointError):
            load_backbone(f"hf:{tmp_path / 'vit'}")
    assert not marker.exists()


def test_a_training_state_is_no_pickle(tmp_path: Path) -> None:
    from restuning.training.checkpoint import read_state

    marker = tmp_path / "marker"
    torch.save({"format": "restuning.train/1", "more": Marker(marker)}, tmp_path / "state.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("state.pt", "pipe.pt"):
        with pytest.raises(CheckpointError, match="damaged"):
            read_state(tmp_path / name)
    assert not marker.exists()


def test_a_folders_own_code_runs_where_it_is_trusted(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = custom_code(tmp_path / "mine", marker)
    with pytest.raises(CheckpointError):  # this code builds no model
        load_backbone(f"hf:{folder}", "random", trust_remote_code=True)
    assert marker.exists()


# ---- 3: the hub is asked where it is meant


def test_a_path_that_is_not_there_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="for the hub, write hub:runs/phtos"):
        rt.Tuned.from_pretrained(VIT.backbone(), "runs/phtos")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_backbone("hf:models/bert")
    with pytest.raises(DataError, match="written hf:hub:owner/name"):
        load_task("hf:pandas")  # a reader of datasets' own, which unpickles
    from restuning.diffusion.base import load_base

    with pytest.raises(RestuningError, match="no such folder: 'bases/sd'"):
        load_base("bases/sd")


def test_ids_of_the_hub(tmp_path: Path) -> None:
    assert hub.located("hub:a/b") == hub.HubId("a/b") and hub.located("hub:a/b@v1.0") == hub.HubId("a/b", "v1.0")
    assert hub.located("bert-base-uncased") == hub.HubId("bert-base-uncased")
    assert hub.located(str(tmp_path)) == tmp_path
    for bad in ("hub:", "hub:a/b/c", "hub:../x", "hub:a/b@", "a/b", "./a", "~a/b", "a\0b", ""):
        if bad != "hub:a/b@":
            with pytest.raises(CheckpointError):
                hub.located(bad)


def test_a_name_of_the_hub_is_recorded_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    local = tmp_path / "snapshots" / commit / "config.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(local))
    assert hub.pinned("hf:hub:a/b") == f"hf:hub:a/b@{commit}"
    assert hub.pinned("hf:hub:a/b@v1") == "hf:hub:a/b@v1" and hub.pinned(f"hf:{tmp_path}") == f"hf:{tmp_path}"
    assert hub.pinned("hf:no/such") == "hf:no/such"


# ---- 4: all is checked, then changed


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "extra"])
def test_a_refused_full_adapter_leaves_the_backbone_alone(tmp_path: Path, damage: str) -> None:
    backbone = VIT.backbone()
    rt.adapt(backbone, "full", 3).save_pretrained(tmp_path)
    model = tmp_path / "adapter_model.safetensors"
    state = {key: value + (0.5 if value.is_floating_point() else 0) for key, value in load_file(model).items()}
    last = [key for key in sorted(state) if key.startswith("backbone.") and state[key].ndim > 1][-1]
    if damage == "missing":
        del state[last]
    elif damage == "extra":
        state["backbone.more"] = torch.zeros(2)
    else:
        state[last] = torch.zeros(3) if damage == "shape" else torch.full_like(state[last], torch.nan)
    save_file(state, model)
    other = VIT.backbone()
    before = state_of(other)
    with pytest.raises(CheckpointError):
        rt.Tuned.from_pretrained(other, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_an_adapter_with_a_backbones_weights_that_is_not_full_is_refused(tmp_path: Path) -> None:
    rt.adapt(VIT.backbone(), "linear", 3).save_pretrained(tmp_path)
    model = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(model), "backbone.norm.weight": torch.zeros(32)}, model)
    with pytest.raises(CheckpointError, match="backbone weights are not expected"):
        rt.Tuned.from_pretrained(VIT.backbone(), tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved_nor_merged(tmp_path: Path, value: float) -> None:
    tuned = rt.adapt(VIT.backbone(), "lora", 3)
    tuned.save_pretrained(tmp_path / "good")
    model = tmp_path / "good" / "adapter_model.safetensors"
    state = load_file(model)
    key = next(key for key in state if "tuners" in key)
    save_file({**state, key: torch.full_like(state[key], value)}, model)
    with pytest.raises(CheckpointError, match="not finite"):
        rt.Tuned.from_pretrained(VIT.backbone(), tmp_path / "good")
    before = state_of(tuned.backbone)
    with torch.no_grad():
        next(tuned.adapters["default"].tuners.parameters()).fill_(value)
    with pytest.raises(CheckpointError, match="not finite"):
        tuned.save_pretrained(tmp_path / "bad")
    with pytest.raises(CheckpointError, match="not finite"):
        tuned.merge_and_unload()
    assert all(torch.equal(v, before[k]) for k, v in tuned.backbone.state_dict().items())
    assert not (tmp_path / "bad").exists() and list(tuned.adapters) == ["default"]
    weights = {**VIT.backbone().state_dict()}
    weights["norm.weight"] = torch.full((32,), value)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight has values that are not finite"):
        from restuning.backbones.load import _load

        _load(VIT.backbone(), tmp_path / "weights.safetensors")


def test_predictions_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    subprocess.run(["cp", "-r", FIXTURES / "bypass", folder], check=True)
    state = load_file(folder / "adapter_model.safetensors")
    state["head.weight"] = torch.full_like(state["head.weight"], 3e38)
    save_file(state, folder / "adapter_model.safetensors")
    Image.new("RGB", (8, 8), (9, 200, 30)).save(tmp_path / "a.png")
    assert "not finite numbers" in refused(capsys, "predict", folder, tmp_path / "a.png", "--json")


def test_json_holds_finite_numbers_alone() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            as_json({"a": value})


# ---- 6: files of two processes


def test_two_processes_that_write_one_file_leave_one_of_the_two(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def write(byte: bytes) -> None:
        for _ in range(50):
            atomic_write(path, byte * 100_000)

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write, args=(byte,)) for byte in (b"a", b"b")]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if path.exists():
            assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_adapters_two_files_are_one_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power goes before every single move: what is read then is the old adapter or the new one."""
    old, new = (rt.adapt(VIT.backbone(), "linear", n) for n in (3, 5))
    for stop in range(4):
        folder = tmp_path / str(stop)
        old.save_pretrained(folder)
        moves, real = [], Path.replace

        def replace(self: Path, target: Path, moves: list[int] = moves, stop: int = stop, real=real) -> Path:
            if len(moves) == stop:
                raise KeyboardInterrupt
            moves.append(1)
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            if stop < 3:
                with pytest.raises(KeyboardInterrupt):
                    new.save_pretrained(folder)
            else:
                new.save_pretrained(folder)
        classes = rt.Tuned.from_pretrained(VIT.backbone(), folder)(**VIT.inputs(1)).shape[1]
        assert classes == (3 if stop < 2 else 5), stop


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "state.pt.123-abcd.tmp").write_bytes(b"half")
    with locked(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]


# ---- 7: what a match covers


def test_a_match_that_covers_a_small_part_is_not_taken() -> None:
    import timm

    with torch.device("meta"):
        hrnet = timm.create_model("hrnet_w18_small", num_classes=0)
    sites = rt.find_sites(hrnet)
    assert sites.anatomy.name == "found in HighResolutionNet"
    assert {site.writes.path.split(".")[0] for site in sites} >= {"layer1", "stage2", "stage3", "stage4"}


def test_of_several_towers_none_is_taken_in_silence() -> None:
    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = hf.SiglipVisionModel(hf.SiglipVisionConfig(**HF))
            self.language_model = hf.LlamaModel(
                hf.LlamaConfig(**HF, vocab_size=50, pad_token_id=0, num_key_value_heads=2)
            )

    towers = Towers()
    with pytest.raises(SiteError, match="no known anatomy fits Towers"):
        rt.find_sites(towers)
    assert rt.find_sites(towers.language_model).anatomy.family == "text"


def test_images_padded_by_a_mask_are_refused() -> None:
    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = hf.ViTModel(hf.ViTConfig(**HF))

        def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(pixel_values).last_hidden_state

    with pytest.raises(SiteError, match="padded"):
        rt.find_sites(Padded())


def test_ssf_merges_into_norms_of_weight_and_one() -> None:
    settings = {**HF, "vocab_size": 50, "pad_token_id": 0, "num_key_value_heads": 4}
    backbone = hf.NemotronModel(hf.NemotronConfig(**settings)).eval()
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.05 * torch.randn_like(p))
    tuned = rt.adapt(backbone, rt.Residual({op: rt.Ssf() for op in ("norm1", "norm2", "norm")}), pool="none")
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.2 * torch.randn_like(p))
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        before = tuned(input_ids=ids)
        after = tuned.merge_and_unload()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_compiling_a_tuned_model_by_torch_leaves_autograd_on() -> None:
    tuned = rt.adapt(VIT.backbone(), "bypass", 3)
    x = VIT.inputs()["x"]
    before = tuned(x)
    out = torch.compile(tuned, backend="eager")(x)
    torch.testing.assert_close(out, before)
    assert torch.is_grad_enabled()
    out.sum().backward()
    assert all(p.grad is not None for p in tuned.adapters.parameters() if p.requires_grad)


# ---- 8: what is read is bounded


@pytest.mark.parametrize(
    "text",
    ["NaN", "[1, Infinity]", "1e999", "[" * 100 + "]" * 100, "[" * 100_000, '{"a": 1, "a": 2}', '"\\ud800"', "{", ""],
)
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "a\0b", "", 3, None])
def test_names_that_lead_out_of_their_folder(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        inside(tmp_path, name)
    assert inside(tmp_path, "a/b") == tmp_path / "a" / "b"


def changed(data: dict, path: str, value: object) -> dict:
    at = found = json.loads(json.dumps(data))
    *parents, last = path.split(".")
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[int(last) if isinstance(at, list) else last] = value
    return found


CARD = [
    ("num_classes", 10**6),
    ("num_classes", 10**12),
    ("num_classes", -1),
    ("num_classes", 2.5),
    ("num_classes", True),
    ("classes", "abc"),
    ("classes", [["a"], "b", "c"]),
    ("classes", ["a", "b"]),
    ("pool", 3),
    ("pool", "all of them"),
    ("kind", "magic"),
    ("kind", ["single-label"]),
    ("preprocessing", [1]),
    ("method", {"a": 1}),
    ("backbone.width", "32"),
    ("backbone.depth", None),
    ("backbone.name", None),
    ("backbone.fingerprint", "x"),
    ("backbone.fingerprint", [1e300] * 32),
    ("backbone.fingerprint", ["a"] * 32),
    ("spec", {"kind": "residual", "tuners": {"ffn": {"tuner": "prompt", "size": 10**9}}}),
    ("spec", {"kind": "residual", "tuners": {"mha": {"tuner": "adapter", "width": 900_000}}}),
    ("spec", {"kind": "residual", "tuners": 3}),
    ("spec", {"kind": "residual", "tuners": {"mha": 3}}),
    ("spec", {"kind": "residual", "blocks": [10**9]}),
    ("spec", {"kind": ["residual"]}),
    ("spec", {"kind": "ladder", "reduction": 0}),
    ("spec", {"kind": "bypass", "grid": 999_999}),
    ("spec", {"kind": "sidetuning", "net": 3}),
]


@pytest.mark.parametrize(("path", "value"), CARD, ids=[f"{p}={str(v)[:40]}" for p, v in CARD])
def test_adapter_configurations_that_are_refused(tmp_path: Path, path: str, value: object) -> None:
    rt.adapt(VIT.backbone(), "res-tuning", 3, classes=list("abc")).save_pretrained(tmp_path)
    card = tmp_path / "adapter_config.json"
    card.write_text(json.dumps(changed(json.loads(card.read_text()), path, value)))
    tuned = rt.adapt(VIT.backbone(), "linear", 2)
    with pytest.raises(CheckpointError) as caught:
        tuned.load_adapter(tmp_path, "second")
    assert "\n" not in str(caught.value) and list(tuned.adapters) == ["default"]


@pytest.mark.parametrize(
    "damage",
    [
        {"size": [16]},
        {"size": [10**6, 10**6]},
        {"size": 16},
        {"mean": [0.5]},
        {"mean": "abc"},
        {"std": [0, 0, 0]},
        {"std": [True] * 3},
        {"interpolation": "magic"},
        {"crop": 1e-9},
        {"crop": "x"},
    ],
)
def test_preprocessings_that_are_refused(damage: dict) -> None:
    good = json.loads(json.dumps(Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3).to_dict()))
    assert reading(good)
    with pytest.raises(DataError, match="cannot be read"):
        reading({**good, **damage})


def test_tokenisations_that_are_refused() -> None:
    good = Tokenise("somewhere", 8, 50).to_dict()
    for damage in ({"tokenizer": 3}, {"limit": 0}, {"vocabulary": "x"}, {"pad": 2.5}, {"max_length": "x"}):
        with pytest.raises(DataError, match="cannot be read"):
            reading({**good, **damage})


BANK = [
    ("shards.0.file", "../../outside.safetensors"),
    ("shards.0.file", "/etc/passwd"),
    ("shards.0.file", 3),
    ("shards.0.rows", 10**9),
    ("shards.0.rows", "8"),
    ("shards.0.split", "nowhere"),
    ("shards.0.bytes", -1),
    ("shards", 3),
    ("layers", "all"),
    ("layers", [-(10**9)]),
    ("layers", []),
    ("dtype", "float1"),
    ("views", 0),
    ("data.classes", 3),
    ("data.kind", "magic"),
    ("data.splits", []),
    ("data.splits.train.count", 10**9),
    ("view", {"tokens": "some"}),
    ("view.tokens", 10**6),
    ("backbone", "vit"),
    ("backbone.width", None),
    ("source", None),
    ("format", "other"),
    ("preprocessing", 3),
]


@pytest.mark.parametrize(("path", "value"), BANK, ids=[f"{p}={v}" for p, v in BANK])
def test_bank_manifests_that_are_refused(tmp_path: Path, path: str, value: object) -> None:
    bank = tmp_path / "bank"
    subprocess.run(["cp", "-r", FIXTURES / "bank", bank], check=True)
    manifest = bank / "manifest.json"
    manifest.write_text(json.dumps(changed(json.loads(manifest.read_text()), path, value)))
    with pytest.raises(CheckpointError) as caught:
        Bank(bank, verify=False)
    assert "\n" not in str(caught.value)


def test_bank_shards_that_are_not_what_the_manifest_says(tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    subprocess.run(["cp", "-r", FIXTURES / "bank", bank], check=True)
    manifest = json.loads((bank / "manifest.json").read_text())
    shard = bank / manifest["shards"][0]["file"]
    whole = load_file(shard)
    for state in (
        {**whole, "labels": whole["labels"] + 1000},
        {"labels": whole["labels"]},
        {"labels": whole["labels"][:1]},
    ):
        data = save(state)
        shard.write_bytes(data)
        manifest["shards"][0]["bytes"] = len(data)
        (bank / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="is damaged"):
            Bank(bank, verify=False).source()
            Bank(bank, verify=False).rows("train").fetch([0])


PEFT = {
    "nan": {"lora_alpha": "nan"},
    "none": {"lora_alpha": None},
    "list": {"lora_alpha": [1]},
    "dropout": {"lora_dropout": 5},
    "hostile": {"alpha_pattern": {"(([a-z]+)+)+x": 1}},
    "open": {"alpha_pattern": {"[": 1}},
    "words": {"alpha_pattern": {"qkv": "x"}},
    "patterns": {"rank_pattern": [1]},
    "huge": {"r": 10**12},
    "kind": {"peft_type": ["LORA"]},
    "no object": None,
}


@pytest.mark.parametrize("damage", PEFT)
def test_peft_files_that_are_refused(tmp_path: Path, damage: str) -> None:
    rt.save_peft(rt.adapt(VIT.backbone(), "lora", 3), tmp_path)
    config = tmp_path / "adapter_config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps([] if PEFT[damage] is None else {**data, **PEFT[damage]}))
    tuned = rt.adapt(VIT.backbone(), "linear", 2)
    with pytest.raises(CheckpointError) as caught:
        rt.load_peft(tuned, tmp_path, "second")
    assert "\n" not in str(caught.value) and list(tuned.adapters) == ["default"]


def test_peft_tensors_that_are_refused(tmp_path: Path) -> None:
    rt.save_peft(rt.adapt(VIT.backbone(), "lora", 3), tmp_path)
    model = tmp_path / "adapter_model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(model).items()}  # not mapped to what is written over
    key = next(iter(whole))
    for value in (torch.zeros(3), torch.zeros(0, 32), torch.zeros(3, 32), torch.full_like(whole[key], torch.nan)):
        save_file({**whole, key: value}, model)
        tuned = rt.adapt(VIT.backbone(), "linear", 2)
        with pytest.raises(CheckpointError):
            rt.load_peft(tuned, tmp_path, "second")
        assert list(tuned.adapters) == ["default"]


# ---- 9: one door


def test_an_error_of_our_own_is_one_line_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from restuning.cli import door

    def broken(argv: object) -> int:
        raise TypeError("two\nlines")

    assert door.door(broken, ["methods"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "TypeError: two" in err and "--debug" in err
    assert door.door(broken, ["methods", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 2, "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "memory"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (PermissionError(13, "Permission denied", "x\ny"), 2, "x\\ny: Permission denied"),
        (RecursionError(), 1, "RecursionError"),
        (KeyboardInterrupt(), 130, "nothing was kept"),
        (RestuningError("a \x1b[31mred\x07 name\u202e"), 2, "a \\x1b[31mred\\x07 name\\u202e"),
        (UnicodeError("odd"), 1, "UnicodeError"),
    ],
)
def test_whatever_comes_out_is_one_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from restuning.cli import door

    def fails(argv: object) -> int:
        raise error

    assert door.door(fails, ["predict"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err, err


def cli(*argv: object, **more: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "restuning.cli", *map(str, argv)], text=True, **more)


def test_full_and_closed_outputs_and_early_signals() -> None:
    with open("/dev/full", "w") as full:
        run = cli("methods", "--json", stdout=full, stderr=subprocess.PIPE)
        err = run.communicate(timeout=120)[1]
    assert run.returncode == 2 and err.count("\n") == 1 and "No space left" in err, err
    reads, writes = os.pipe()
    os.close(reads)
    run = cli("methods", "--json", stdout=writes, stderr=subprocess.PIPE)
    err = run.communicate(timeout=120)[1]
    os.close(writes)
    assert run.returncode == 0 and err == "", err
    run = cli("evaluate", FIXTURES / "bypass", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(1.5)  # it imports
    run.send_signal(signal.SIGTERM)
    err = run.communicate(timeout=120)[1]
    assert run.returncode == 143 and err.count("\n") == 1 and "terminated" in err, err


def test_empty_and_impossible_paths(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv in (["--out", ""], ["--out="], ["--out", " "], ["--out", "a\0b"]):
        said = refused(capsys, "train", "--data", "digits", *argv)
        assert "expected the name of a file or a folder" in said or "null" in said
    assert "no such image" in refused(capsys, "predict", FIXTURES / "bypass", tmp_path / "no.png")


# ---- 10: files


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        assert "no regular file" in refused(capsys, "predict", FIXTURES / "bypass", tmp_path / name)
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
    for name in ("config.json", "manifest.json", "adapter_config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OSError):
        read_json(tmp_path / "config.json")
    for call in (
        lambda: rt.Tuned.from_pretrained(VIT.backbone(), tmp_path),
        lambda: Bank(tmp_path),
        lambda: load_backbone(f"hf:{tmp_path}"),
        lambda: load_backbone("restuning-micro", tmp_path / "zero.png"),
        lambda: load_task(f"tar:{tmp_path / 'pipe.png'}"),
        lambda: load_task(f"table:{tmp_path / 'zero.png'}"),
    ):
        with pytest.raises(RestuningError):
            call()


def test_outputs_that_would_overwrite_or_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    subprocess.run(["cp", "-r", FIXTURES / "bypass", folder], check=True)
    model = folder / "adapter_model.safetensors"
    before = model.read_bytes()
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    said = refused(capsys, "predict", folder, tmp_path / "in", "--embeddings", model)
    assert "--overwrite" in said and model.read_bytes() == before
    inner = tmp_path / "in" / "e.safetensors"
    assert "lies inside" in refused(capsys, "predict", folder, tmp_path / "in", "--embeddings", inner)
    assert not inner.exists()
    argv = ["predict", folder, tmp_path / "in", "--embeddings", tmp_path / "e.safetensors"]
    assert main([str(a) for a in argv]) == 0
    assert "is there" in refused(capsys, *argv)
    assert main([*(str(a) for a in argv), "--overwrite"]) == 0
    classes(tmp_path / "data")
    said = refused(capsys, "train", "--data", f"folder:{tmp_path / 'data'}", "--out", tmp_path / "data" / "a" / "run")
    assert "lies inside" in said and not (tmp_path / "data" / "a" / "run").exists()


def test_names_are_printed_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes(tmp_path / "p", ("a\x1b[31m", "[red]b"))
    for argv in (
        ["data", f"folder:{tmp_path / 'p'}"],
        ["predict", str(FIXTURES / "bypass"), str(tmp_path / "p" / "a\x1b[31m")],
    ):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out and "a\\x1b[31m" in out
    assert main(["data", f"folder:{tmp_path / 'p'}"]) == 0 and "[red]b" in capsys.readouterr().out


def test_what_is_printed_holds_no_control_characters() -> None:
    assert printable("a\x1b[2Jb\nc\r\x9b\u202e\ud800é") == "a\\x1b[2Jb\\nc\\r\\x9b\\u202e\\ud800é"


# ---- 11: pictures, as people have them


def classes(root: Path, names: tuple[str, ...] = ("a", "b"), count: int = 3) -> Path:
    for n, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 9 + i), (90 * n, 40 * i, 10)).save(root / name / f"{i}.png")
    return root


def test_deep_pixels_are_scaled_or_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)

    def written(name: str, array: np.ndarray, **more: object) -> Path:
        Image.fromarray(array).save(tmp_path / name, **more)
        return tmp_path / name

    def read(path: Path) -> np.ndarray:
        return np.asarray(load_images(path).item(0))[..., 0]

    eight = (ramp * 255).round()
    assert np.abs(read(written("f.tif", ramp.astype("float32"))) - eight).max() <= 1
    assert np.abs(read(written("s.tif", (ramp * 65_535).astype("uint16"))) - eight).max() <= 1
    assert np.abs(read(written("s.png", (ramp * 65_535).astype("uint16"))) - eight).max() <= 1
    stated = written("t.tif", (ramp * 4095).astype("uint16"), tiffinfo={281: 4095})
    assert np.abs(read(stated).astype(int) - eight).max() <= 1
    assert read(written("black.png", np.zeros((4, 4), "uint16"))).max() == 0
    for name, array in (
        ("twelve.tif", (ramp * 4095).astype("uint16")),
        ("twelve.png", (ramp * 4095).astype("uint16")),
        ("big.tif", (ramp * 255).astype("float32")),
        ("nan.tif", np.full((4, 4), np.nan, "float32")),
        ("minus.tif", (-ramp).astype("float32")),
        ("deep.tif", (ramp * 2**30).astype("int32")),
    ):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            load_images(written(name, array)).item(0)


@pytest.mark.parametrize("suffix", ["jfif", "ppm", "pgm", "jp2", "avif", "jpe", "webp", "bmp", "gif"])
def test_formats_that_are_read(tmp_path: Path, suffix: str) -> None:
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "pgm": "PPM"}
    Image.new("RGB", (8, 8), (200, 30, 40)).convert("L" if suffix == "pgm" else "RGB").save(
        tmp_path / f"a.{suffix}", kinds.get(suffix)
    )
    image = load_images(tmp_path).item(0)
    assert image.size == (8, 8) and (suffix == "pgm" or abs(image.getpixel((4, 4))[0] - 200) < 16)


def test_heic_says_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(40))
    with pytest.raises(RestuningError, match="pillow-heif"):
        load_images(tmp_path).item(0)


def test_postscript_is_no_picture_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x) (w) file\n")
    with pytest.raises(DataError, match="of none of JPEG"):
        load_images(tmp_path / "a.png").item(0)


def test_files_that_no_reader_knows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes(tmp_path)
    for name in ("x.svg", "y.svg", "z.pdf", ".hidden", "Thumbs.db"):
        (tmp_path / "a" / name).write_text("?")
    with pytest.warns(Note, match=r"3 files are no images that can be read \(2 \.svg, 1 \.pdf\)"):
        load_task(f"folder:{tmp_path}")
    assert main(["data", f"folder:{tmp_path}"]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("restuning: note: ") and "x.svg" in err


def test_all_bad_files_are_named_at_once_and_can_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes(tmp_path / "p", count=6)
    for name in ("1.png", "4.png"):
        (tmp_path / "p" / "b" / name).write_bytes(b"nothing")
    both = load_images(tmp_path / "p" / "b")
    with pytest.raises(DataError, match=r"2 of 6 cannot be used: .*1\.png.*4\.png"):
        check(both)
    good, bad = readable(both)
    assert len(good) == 4 and len(bad) == 2
    said = refused(capsys, "predict", FIXTURES / "bypass", tmp_path / "p" / "b")
    assert "1.png" in said and "4.png" in said
    assert main(["predict", str(FIXTURES / "bypass"), str(tmp_path / "p" / "b"), "--skip-bad"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 4 and "left out 2 of 6" in printed.err
    from restuning.runs.predict import predict

    with pytest.warns(Note, match="left out 2 of 6"):
        assert len(predict([FIXTURES / "bypass"], str(tmp_path / "p" / "b"), skip_bad=True)) == 4
    from restuning.runs.run import execute
    from restuning.runs.settings import Run
    from restuning.training.config import TrainConfig

    run = Run(f"folder:{tmp_path / 'p'}", "linear", training=TrainConfig(epochs=1), skip_bad=True)
    with pytest.warns(Note, match="left out"):
        result = execute(run, tmp_path / "run", progress=False)
    assert sum(result["examples"].values()) == 10


def test_folders_as_people_have_them(tmp_path: Path) -> None:
    capital = tmp_path / "capital"
    classes(capital / "Train")
    classes(capital / "Test")
    task = load_task(f"folder:{capital}")
    assert task.classes == ("a", "b") and len(task.train) == len(task.test) == 6
    beside = classes(tmp_path / "beside")
    classes(beside / "Test")
    task = load_task(f"folder:{beside}")
    assert task.classes == ("a", "b") and len(task.test) == 6
    (beside / "__MACOSX" / "a").mkdir(parents=True)
    assert load_task(f"folder:{beside}").classes == ("a", "b")
    nested = tmp_path / "nested"
    classes(nested / "animals", ("cat", "dog"))
    classes(nested, ("plants",))
    with pytest.warns(Note, match="all of class 'animals'"):
        task = load_task(f"folder:{nested}")
    assert task.classes == ("animals", "plants") and len(task.train) + len(task.test) == 9
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (4, 4)).save(flat / "a.png")
    with pytest.raises(DataError, match="in no class folder"):
        load_task(f"folder:{flat}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_task(f"folder:{tmp_path / 'empty'}")
    classes(capital / "Test", ("c",))
    with pytest.raises(DataError, match="'c' is not among the training classes"):
        load_task(f"folder:{capital}")
    classes(tmp_path / "two" / "train")
    classes(tmp_path / "two" / "Training")
    with pytest.raises(DataError, match="two folders for train"):
        load_task(f"folder:{tmp_path / 'two'}")


def test_a_picture_in_two_classes_is_told(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "b" / "twin.png").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    task = load_task(f"folder:{tmp_path}", test_size=1)
    with pytest.warns(Note, match="stand in two classes"):
        check(task.train)


def test_a_path_without_its_kind_is_told_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes(tmp_path / "photos")
    (tmp_path / "t.csv").write_text("a,b\n")
    for path, kind in (("photos", "folder"), ("t.csv", "table")):
        said = refused(capsys, "train", "--data", tmp_path / path, "--out", tmp_path / "out")
        assert f"did you mean '{kind}:{tmp_path / path}'" in said


# ---- 12: raw errors


def test_text_models_positions_are_counted(tmp_path: Path) -> None:
    tuned = rt.adapt(hf.BertModel(hf.BertConfig(**TEXT)), "linear", 2)
    ids = torch.randint(3, 50, (1, 60))
    with pytest.raises(RestuningError, match="40"):
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_batch_of_nothing_and_a_row_of_padding_alone() -> None:
    tuned = rt.adapt(TINY["timm-convnext"].backbone(), "bypass", 3)
    with pytest.raises(RestuningError, match="batch of no rows"):
        tuned(torch.zeros(0, 3, 32, 32))
    text = rt.adapt(hf.BertModel(hf.BertConfig(**TEXT)), "linear", 2, pool="mean")
    ids = torch.randint(3, 50, (2, 6))
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(RestuningError, match="padding"):
        text(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("roformer", "vpt-deep"),
        ("deberta", "vpt-shallow"),
        ("convbert", "prefix"),
        ("convbert", "lst"),
    ],
)
def test_what_a_text_encoder_cannot_be_tuned_by(family: str, method: str) -> None:
    kinds = {
        "roformer": (hf.RoFormerModel, hf.RoFormerConfig, {}),
        "deberta": (hf.DebertaModel, hf.DebertaConfig, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        "convbert": (hf.ConvBertModel, hf.ConvBertConfig, {"embedding_size": 32}),
    }
    model, config, more = kinds[family]
    backbone = model(config(**TEXT, **more)).eval()
    ids = torch.randint(3, 50, (2, 6))
    with pytest.raises(RestuningError) as caught:
        rt.adapt(backbone, rt.Ladder(4) if method == "lst" else method, 2)(input_ids=ids)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
def test_latent_attention_is_found_not_taken_for_another(version: int) -> None:
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    settings = {**TEXT, **sizes, "n_routed_experts": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    model = getattr(hf, f"DeepseekV{version}Model")(
        getattr(hf, f"DeepseekV{version}Config")(**settings, num_experts_per_tok=1)
    )
    sites = rt.find_sites(model)
    assert sites.anatomy.name == f"found in DeepseekV{version}Model"
    assert {site.op for site in sites} >= {"mha", "ffn", "block"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_a_limit_on_memory_is_one_line(tmp_path: Path) -> None:
    """Under a limit of the operating system that the batch's own tensors pass, not the process."""
    for i in range(2):
        for j in range(4):
            (tmp_path / "photos" / str(i)).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, j, 0)).save(tmp_path / "photos" / str(i) / f"{j}.png")
    code = f"""
import resource, sys
from restuning.cli.main import main
small = ["train", "--data", "folder:{tmp_path}/photos", "--method", "linear", "--epochs", "1", "--quiet", "--out"]
assert main([*small, "{tmp_path}/a"]) == 0  # all is imported
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
large = ["--image-size", "2048", "--method", "full", "--batch-size", "8", "--out", "{tmp_path}/b"]
sys.exit(main(["train", "--data", "folder:{tmp_path}/photos", "--epochs", "1", "--quiet", *large]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "not enough memory" in run.stderr and not (tmp_path / "b").exists()
