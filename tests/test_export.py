"""Graphs that need no library: the model's own numbers, for any number of items."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from served import picture, save_adapters
from tiny import TINY, small

import restuning as rt
from restuning.cli.main import main
from restuning.runs import export as module
from restuning.runs.export import Graph
from restuning.runs.predict import predict

VIT = ("bypass", "prefix", "vpt-shallow", "convpass")


def tuned_and_inputs(name: str, method: str, **options: Any) -> tuple[rt.Tuned, dict[str, torch.Tensor]]:
    tuned = rt.adapt(TINY[name].backbone(), small(method), 3, **options)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned.eval().requires_grad_(False), TINY[name].inputs(3)


@pytest.mark.parametrize("method", VIT)
def test_a_traced_model_gives_the_models_numbers(method: str) -> None:
    tuned, inputs = tuned_and_inputs("timm-vit", method)
    _, call = module._torch_export(Graph(tuned, "default").eval(), inputs)
    for rows in (3, 1):
        torch.testing.assert_close(call({"x": inputs["x"][:rows]}), tuned(inputs["x"][:rows]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), [("timm-vit", "prefix"), ("bert", "bypass")])
def test_onnxruntime_gives_the_models_numbers(name: str, method: str) -> None:
    """Any number of items, and of tokens."""
    tuned, inputs = tuned_and_inputs(name, method)
    _, call = module._onnx(Graph(tuned, "default", tuple(inputs) if name == "bert" else ()).eval(), inputs)
    for rows, tokens in ((3, None), (1, None), (2, -1)):
        some = {k: x[:rows, :tokens] if name == "bert" else x[:rows] for k, x in inputs.items()}
        torch.testing.assert_close(call(some), tuned(**some), rtol=1e-4, atol=1e-5)


def test_an_exported_folder(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written, and that nothing is where the graph is not the model."""
    save_adapters(tmp_path, "restuning-micro", {"task": ("linear", 4, "multi-label")})
    command = ["export", str(tmp_path / "task"), "--format", "torch-export", "--out", str(tmp_path / "out")]
    traced = module._torch_export

    def other(*args: Any) -> Any:
        data, call = traced(*args)
        return data, lambda inputs: call(inputs) + 0.01

    monkeypatch.setattr(module, "_torch_export", other)
    assert main(command) == 2 and "the graph is not the model: they differ by" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["task"]
    monkeypatch.setattr(module, "_torch_export", traced)
    assert main([*command, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about == json.loads((tmp_path / "out" / "export.json").read_text())
    assert (about["kind"], about["classes"][1]) == ("multi-label", "class 1") and about["preprocessing"]["size"]
    assert about["inputs"]["pixels"]["shape"] == ["batch", 3, 64, 64]
    x = torch.randn(5, 3, 64, 64)
    expected = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), tmp_path / "task").eval()(x)
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert main(command) == 2 and "is there already" in capsys.readouterr().err


def test_the_example_of_the_docs(tmp_path: Path, capsys: Any) -> None:
    """onnxruntime, NumPy and Pillow alone give the classes that `predict` gives."""
    save_adapters(tmp_path, "restuning-micro", {"task": ("linear", 4, "single-label")})
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    assert main(["export", str(tmp_path / "task"), "--out", str(tmp_path / "out"), "--inputs", str(tmp_path)]) == 0
    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    (code,) = (
        block for block in re.findall(r"```\w*\n(.*?)```", text, re.S) if "onnxruntime" in block and "argv" in block
    )
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    run = [sys.executable, "-c", code, str(tmp_path / "out"), *files]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [f"{row['input']} {row['top'][0]['class']}" for row in predict([tmp_path / "task"], str(tmp_path))]
    assert lines == expected
