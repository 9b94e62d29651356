"""Graphs that need no library: the model's own numbers, for any number of items."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
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
    _, call = module._torch_export(Graph(tuned, "default").eval(), inputs, ["logits"], None)
    for rows in (3, 1):
        (found,) = call({"x": inputs["x"][:rows]})
        torch.testing.assert_close(found, tuned(inputs["x"][:rows]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), [("timm-vit", "prefix"), ("bert", "bypass")])
def test_onnxruntime_gives_the_models_numbers(name: str, method: str) -> None:
    """Any number of items, and of tokens."""
    tuned, inputs = tuned_and_inputs(name, method)
    tokens = inputs["input_ids"].shape[1] if name == "bert" else None
    graph = Graph(tuned, "default", tuple(inputs) if name == "bert" else ()).eval()
    _, call = module._onnx(graph, inputs, ["logits"], tokens)
    for rows, tokens in ((3, None), (1, None), (2, -1)):
        some = {k: x[:rows, :tokens] if name == "bert" else x[:rows] for k, x in inputs.items()}
        torch.testing.assert_close(call(some)[0], tuned(**some), rtol=1e-4, atol=1e-5)


def test_an_exported_folder(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written, and that nothing is where the graph is not the model."""
    save_adapters(tmp_path, "restuning-micro", {"task": ("linear", 4, "multi-label")})
    command = ["export", str(tmp_path / "task"), "--format", "torch-export", "--out", str(tmp_path / "out")]
    traced = module._torch_export

    def other(*args: Any) -> Any:
        data, call = traced(*args)
        return data, lambda inputs: [x + 0.01 for x in call(inputs)]

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


def run_example(holds: str, *arguments: Any) -> list[str]:
    """The lines that a block of code of docs/serving.md prints."""
    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    (code,) = (block for block in re.findall(r"```\w*\n(.*?)```", text, re.S) if holds in block)
    run = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_example_of_the_docs(tmp_path: Path, capsys: Any) -> None:
    """onnxruntime, NumPy and Pillow alone give the classes that `predict` gives."""
    save_adapters(tmp_path, "restuning-micro", {"task": ("linear", 4, "single-label")})
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    assert main(["export", str(tmp_path / "task"), "--out", str(tmp_path / "out"), "--inputs", str(tmp_path)]) == 0
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    lines = run_example("exif_transpose", tmp_path / "out", *files)
    expected = [f"{row['input']} {row['top'][0]['class']}" for row in predict([tmp_path / "task"], str(tmp_path))]
    assert lines == expected


def test_a_graph_of_the_backbone_and_one_a_task(tmp_path: Path, capsys: Any) -> None:
    """Side paths and a head that read other layers and tokens than each other, of one run of the backbone."""
    tasks = {"query": "bypass-query", "path": "bypass", "all-layers": "linear-all", "head": "linear"}
    save_adapters(tmp_path, "restuning-micro", {name: (of, 4, "single-label") for name, of in tasks.items()})
    folders = [str(tmp_path / name) for name in tasks]
    assert main(["export", *folders, "--out", str(tmp_path / "out")]) == 0
    assert "backbone.onnx, " in capsys.readouterr().out
    x = torch.randn(5, 3, 64, 64)
    np.save(tmp_path / "x.npy", x.numpy())
    lines = run_example('about["features"]', tmp_path / "out", tmp_path / "x.npy")
    for name, found in zip(tasks, lines, strict=True):
        expected = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), tmp_path / name).eval()(x)
        assert found == f"{name} {[f'class {i}' for i in expected.argmax(1)]}"
    size = {path.name: path.stat().st_size for path in (tmp_path / "out").rglob("*.onnx")}
    assert size["head.onnx"] < 0.01 * size["backbone.onnx"]


def test_graphs_apart_of_texts(tmp_path: Path) -> None:
    """Masks are handed through; any number of tokens."""
    tuned, inputs = tuned_and_inputs("bert", "bypass-query")
    graph = module.FeatureGraph(tuned, tuple(inputs)).eval()
    features = graph.features(*inputs.values())
    names = module._names(features, inputs)
    assert "attention_mask" in names
    tokens = inputs["input_ids"].shape[1]
    outputs = [name for name in names if name not in inputs]
    _, first = module._onnx(graph, inputs, outputs, tokens)
    read = dict(zip(names, features.tensors(), strict=True))
    _, second = module._onnx(module.TaskGraph(tuned, "default", features).eval(), read, ["logits"], tokens)
    for rows, length in ((3, None), (1, None), (2, -1)):
        some = {k: x[:rows, :length] for k, x in inputs.items()}
        found = some | dict(zip(outputs, first(some), strict=True))
        logits = second({name: found[name] for name in names})[0]
        torch.testing.assert_close(logits, tuned(**some), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_apart(tmp_path: Path, capsys: Any) -> None:
    save_adapters(
        tmp_path, "restuning-micro", {"inside": ("lora", 4, "single-label"), "path": ("bypass", 4, "single-label")}
    )
    save_adapters(tmp_path / "other", "restuning-micro", {"path": ("bypass", 4, "single-label")})
    out = ["--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "path"), str(tmp_path / "inside"), *out]) == 2
    assert "inside tunes inside the backbone: export it alone" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "path"), str(tmp_path / "other" / "path"), *out]) == 2
    assert "two adapters in folders named path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
