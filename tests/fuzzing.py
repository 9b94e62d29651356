# ruff: noqa: E501
"""Bad inputs by the hundred, over every command, flag and file format: `make fuzz`, and a tenth of it in the tests.

Each case runs in a fork of one warm process, in a folder of its own, with "y" on standard input, and has to end with code 0 or
2. What refuses prints one line, leaves no file and changes none; what is plainly bad is refused; what prints JSON prints strict
JSON; and no pickle and no foreign code, all of which would write a marker, has run.
"""

import argparse
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures" / "files"
ADAPTERS = ("bypass", "bypass-grid2", "dtl", "lora", "lst", "prefix", "res-tuning", "ssf", "vpt-deep")
SECONDS = 120


@dataclass(frozen=True)
class Case:
    """argv, of paths in the case's folder; change: what is done to that folder first; plain: whether it is bad beyond doubt;
    call: what is done in place of a command."""

    name: str
    argv: tuple[str, ...]
    change: Callable[[Path], None] = lambda folder: None
    plain: bool = False
    call: Callable[[Path], Any] | None = None
    copy: tuple[str, ...] = ()


class Marker:
    """Its pickle writes a file where it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


MARKER = "MARKER"


def prepare(root: Path) -> None:
    """What cases copy: adapters, a bank, pictures, tars, tables, weights, PEFT's files, a model folder."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTModel

    import restuning as rt

    root.mkdir(parents=True, exist_ok=True)
    for name in (*ADAPTERS, "bank"):
        shutil.copytree(FIXTURES / name, root / name)
    for c, colour in (("ant", (200, 30, 20)), ("bee", (20, 30, 200))):
        (root / "photos" / c).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (12, 10 + i), colour).save(root / "photos" / c / f"{i}.png")
    Image.new("RGB", (12, 12), (9, 8, 7)).save(root / "a.png")
    Image.new("RGB", (12, 12), (9, 8, 7)).save(root / "a.jpg")
    Image.new("RGB", (12, 12), (9, 8, 7)).save(root / "a.tif")
    Image.new("RGB", (12, 12), (9, 8, 7)).save(root / "a.webp")
    with tarfile.open(root / "photos.tar", "w") as tar:
        tar.add(root / "photos", arcname="photos")
    with tarfile.open(root / "photos.tar.gz", "w:gz") as tar:
        tar.add(root / "photos", arcname="photos")
    rows = [(f"photos/{c}/{i}.png", c) for c in ("ant", "bee") for i in range(6)]
    (root / "t.csv").write_text("file_name,label\n" + "".join(f"{a},{b}\n" for a, b in rows))
    (root / "t.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"some words {i}\t{b}\n" for i, (_, b) in enumerate(rows))
    )
    (root / "t.jsonl").write_text("".join(json.dumps({"file_name": a, "label": b}) + "\n" for a, b in rows))
    captions = root / "captions"
    captions.mkdir()
    for i in range(3):
        Image.new("RGB", (12, 12), (i, 80, 7)).save(captions / f"{i}.png")
    lines = "".join(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) + "\n" for i in range(3))
    (captions / "metadata.jsonl").write_text(lines)
    backbone = rt.load_backbone("restuning-micro")
    save_file(backbone.state_dict(), root / "weights.safetensors")
    torch.save(backbone.state_dict(), root / "weights.pt")
    rt.save_peft(rt.adapt(backbone, "lora", 3), root / "peft")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(root / "hf")
    (root / "hf" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    (root / "method.json").write_text(
        json.dumps(json.loads((root / "bypass" / "adapter_config.json").read_text())["spec"])
    )
    (root / "results.jsonl").write_text("")


# ---- what is done to files

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2.5, -0.0, 1e308, 10**6, 10**12, 10**30, -(10**18), "", "x", "../x", "/etc/passwd", "\x1b[31mred",
    "a\nb", "☃" * 50, "x" * 5000, [], [[]], ["x"], [-1], [10**9], [None], {}, {"x": 1}, {"kind": "magic"}, {"own": "os.system"},
    "NaN", "hf:nowhere/at/all", "hub:a/b/c", "bert\u202e", [0.5] * 1000, [[[[[[]]]]]], {"a": {"b": {"c": []}}},
)  # fmt: skip


def _written(path: Path, text: str) -> None:
    path.write_text(text)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in list(items)[:12] for place in places(one, (*at, key)))]


def json_changes(draw: random.Random, file: str, data: Any) -> tuple[str, Callable[[Path], None], bool]:
    """A change of a JSON file; whether it is plainly bad."""
    kind = draw.choice(("value", "value", "value", "value", "gone", "more", "text"))
    there = [place for place in places(data) if place]
    if kind == "text":
        whole = json.dumps(data)
        name, text = draw.choice(
            [
                ("empty", ""),
                ("cut", whole[: draw.randrange(1, len(whole) - 1)]),
                ("nan", whole.replace("null", "NaN", 1) if "null" in whole else "NaN"),
                ("inf", '{"a": 1e999}'),
                ("deep", "[" * 5000 + "]" * 5000),
                ("deeper", '{"a":' * 200_000),
                ("list", "[1, 2]"),
                ("word", '"word"'),
                ("number", "7"),
                ("null", "null"),
                ("twice", '{"data": 1, "data": 2}'),
                ("trailing", whole + "}"),
                ("digits", '{"a": ' + "9" * 5000 + "}"),
                ("binary", "\x00\x01\x02"),
            ]
        )
        return f"{file}: {name}", lambda folder: _written(folder / file, text), True
    if kind == "value" or not there:
        place, junk = draw.choice(there or [()]), draw.choice(JUNK)

        def change(value: Any) -> Any:
            return _set(value, place, lambda _: junk)

        name = f"{'.'.join(map(str, place))} = {str(junk)[:30]!r}"
    elif kind == "gone":
        place = draw.choice(there)
        name = f"no {'.'.join(map(str, place))}"

        def change(value: Any) -> Any:
            return _drop(value, place)

    else:
        name, key = "a key more", draw.choice(("__class__", "auto_map", "trust_remote_code", "x\x07", "own"))

        def change(value: Any) -> Any:
            return (
                {**value, key: {"AutoModel": "mine.Mine", "AutoConfig": "mine.Mine"}}
                if isinstance(value, dict)
                else value
            )

    def apply(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return f"{file}: {name}", apply, False


def _set(value: Any, place: tuple[Any, ...], to: Callable[[Any], Any]) -> Any:
    if not place:
        return to(value)
    if isinstance(value, dict):
        return {k: _set(v, place[1:], to) if k == place[0] else v for k, v in value.items()}
    return [_set(v, place[1:], to) if i == place[0] else v for i, v in enumerate(value)]


def _drop(value: Any, place: tuple[Any, ...]) -> Any:
    if len(place) > 1:
        return _set(value, place[:-1], lambda inner: _drop(inner, place[-1:]))
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k != place[0]}
    return [v for i, v in enumerate(value) if i != place[0]]


def binary_changes(draw: random.Random, file: str) -> tuple[str, Callable[[Path], None], bool]:
    """A change of any other file; whether it is plainly bad."""
    kind = draw.choice(
        ("cut", "flip", "empty", "zeros", "pickle", "zip", "fifo", "device", "folder", "gone", "header", "loop")
    )
    seed = draw.random()

    def apply(folder: Path) -> None:
        path, own = folder / file, random.Random(seed)
        data = bytearray(path.read_bytes())
        path.unlink()
        marker = str(folder / MARKER)
        if kind == "cut":
            path.write_bytes(data[: own.randrange(1, max(2, len(data) * 9 // 10))])
        elif kind == "flip":
            for _ in range(own.randrange(1, 20)):
                data[own.randrange(min(len(data), 4000))] ^= 1 << own.randrange(8)
            path.write_bytes(data)
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "zeros":
            path.write_bytes(bytes(len(data)))
        elif kind == "pickle":
            path.write_bytes(pickle.dumps(Marker(marker)))
        elif kind == "zip":
            import torch

            buffer = io.BytesIO()
            torch.save({"state_dict": Marker(marker)}, buffer)
            path.write_bytes(buffer.getvalue())
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "folder":
            path.mkdir()
        elif kind == "header":
            path.write_bytes(struct.pack("<Q", own.choice((2**63, 2**31, 10**9, 7))) + data[8:])

    return f"{file}: {kind}", apply, kind not in ("flip", "cut", "header")


# ---- the cases

FLAGS: tuple[str, ...] = (
    "", " ", "-1", "0", "1.5", "nan", "inf", "1e999", "99999999999999999999999", "x", "\x1b[31mx", "☃", "a\x00b", "../../x",
    "/dev/null", "/dev/full", "/proc/self/mem", "x" * 5000, "--help-me", "folder:", "folder:photos", "None", "[]", "0x10", "٣",
    "a\nb", ".", "/", "~", "hub:a/b/c",
)  # fmt: skip
TRAIN = ("train", "--data", "folder:photos", "--method", "linear", "--epochs", "1", "--quiet")
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # a line that is good but for a flag; its flags; what it reads
    "train": (
        (*TRAIN, "--out", "out"),
        ("--data", "--method", "--backbone", "--weights", "--image-size", "--size", "--tuner-size", "--blocks", "--pool", "--lr",
         "--epochs", "--batch-size", "--weight-decay", "--warmup-epochs", "--precision", "--accumulate", "--clip", "--seed",
         "--train-size", "--val-size", "--test-size", "--shots", "--tokenizer", "--max-length", "--class-weights", "--out", "--run",
         "--bank", "--patience", "--ema"),
        ("photos",),
    ),
    "bank": (
        ("bank", "--data", "folder:photos", "--quiet", "--out", "out"),
        ("--data", "--backbone", "--weights", "--image-size", "--tokens", "--dtype", "--views", "--batch-size", "--seed", "--out",
         "--train-size", "--test-size", "--val-size"),
        ("photos",),
    ),
    "sweep": (
        ("sweep", "--bank", "bank", "--method", "linear", "--lr", "0.01", "--epochs", "1", "--seeds", "0", "--out", "out"),
        ("--bank", "--method", "--lr", "--epochs", "--seeds", "--pool", "--train-size", "--val-size", "--shots", "--batch-size",
         "--weight-decay", "--warmup-epochs", "--out"),
        ("bank",),
    ),
    "search": (
        ("search", "--data", "nothing", "--quiet", "--out", "out"),
        ("--data", "--limit", "--population", "--generations", "--lr", "--epochs", "--batch-size", "--seed", "--out", "--backbone"),
        (),
    ),
    "evaluate": (
        ("evaluate", "bypass", "--data", "folder:photos"),
        ("--data", "--test-size", "--weights", "--batch-size", "--confusion"),
        ("bypass", "photos"),
    ),
    "predict": (("predict", "bypass", "a.png"), ("--top", "--embeddings", "--weights"), ("bypass", "a.png")),
    "methods": (("methods",), ("--nothing",), ()),
    "sites": (("sites",), ("--backbone",), ()),
    "params": (
        ("params", "--backbone", "restuning-micro", "--method", "linear"),
        ("--backbone", "--method", "--size", "--tuner-size", "--blocks", "--classes"),
        (),
    ),
    "data": (("data", "folder:photos"), ("--train-size", "--val-size", "--test-size", "--shots", "--seed"), ("photos",)),
    "train-diffusion": (
        ("train-diffusion", "--base", "nothing", "--data", "captions:captions", "--out", "out", "--quiet"),
        ("--base", "--data", "--method", "--size", "--image-size", "--epochs", "--lr", "--batch-size", "--out", "--drop",
         "--prior-images"),
        ("captions",),
    ),
    "generate": (
        ("generate", "--base", "nothing", "--prompts", "a", "--out", "out"),
        ("--base", "--prompts", "--seeds", "--steps", "--guidance", "--size", "--image-size", "--share", "--batch-size", "--grid",
         "--out"),
        (),
    ),
    "score": (
        ("score", "captions", "--real", "captions:captions", "--features", "restuning-micro"),
        ("--real", "--features", "--weights", "--clip"),
        ("captions",),
    ),
    "reproduce": (
        ("reproduce", "small", "--data-root", "nothing", "--out", "out", "--dry-run"),
        ("--data-root", "--row", "--column", "--seeds", "--lr", "--epochs", "--backbone", "--weights", "--image-size", "--dtype",
         "--engine"),
        (),
    ),
    "report": (("report", "results.jsonl"), ("--out", "--nothing"), ("results.jsonl",)),
    "bench": (
        ("bench", "memory", "--weights", "nothing", "--rounds", "1"),
        ("--backbone", "--weights", "--image-size", "--method", "--classes", "--out", "--device"),
        (),
    ),
}  # fmt: skip
BAD = ("", " ", "nan", "1e999", "\x1b[31mx", "a\x00b", "--help-me", "x" * 5000, "/proc/self/mem")


def flags(draw: random.Random) -> Case:
    command = draw.choice(list(COMMANDS))
    argv, names, copy = COMMANDS[command]
    flag, value = draw.choice(names), draw.choice(FLAGS)
    plain = value in ("--help-me", "a\x00b") and flag not in ("--prompts",)
    if draw.random() < 0.1:  # the other words
        i = draw.randrange(len(argv))
        return Case(f"{command}: word {i} = {value[:20]!r}", (*argv[:i], value, *argv[i + 1 :]), copy=copy)
    if flag in argv:
        i = argv.index(flag)
        argv = (*argv[: i + 1], value, *argv[i + 2 :])
    else:
        argv = (*argv, flag, value)
    return Case(f"{command} {flag} {value[:20]!r}", argv, plain=plain, copy=copy)


def _json_case(
    file: str, argv: tuple[str, ...], copy: tuple[str, ...], call: Any = None
) -> Callable[[random.Random], Case]:
    def make(draw: random.Random) -> Case:
        folder = draw.choice(ADAPTERS) if file.startswith("ADAPTER") else ""
        path = file.replace("ADAPTER", folder)
        data = json.loads((_ROOT[0] / path).read_text())
        name, change, plain = json_changes(draw, path, data)
        own = tuple(word.replace("ADAPTER", folder) for word in argv)
        return Case(name, own, change, plain, call, tuple(one.replace("ADAPTER", folder) for one in copy))

    return make


def _file_case(
    file: str, argv: tuple[str, ...], copy: tuple[str, ...], call: Any = None
) -> Callable[[random.Random], Case]:
    def make(draw: random.Random) -> Case:
        folder = draw.choice(ADAPTERS) if file.startswith("ADAPTER") else ""
        path = file.replace("ADAPTER", folder)
        name, change, plain = binary_changes(draw, path)
        own = tuple(word.replace("ADAPTER", folder) for word in argv)
        return Case(name, own, change, plain, call, tuple(one.replace("ADAPTER", folder) for one in copy))

    return make


def _peft(folder: Path) -> None:
    import restuning as rt

    tuned = rt.adapt(rt.load_backbone("restuning-micro"), "linear", 2)
    rt.load_peft(tuned, folder / "peft", "second")


def _folder_case(draw: random.Random) -> Case:
    kind = draw.choice(
        ("empty class", "one class", "no class", "flat", "bad names", "two splits", "files beside", "loop", "fifo", "bad suffix",
         "unreadable", "deep", "empty", "test only", "huge", "float", "eps", "svg")
    )  # fmt: skip
    sure = {
        "one class",
        "no class",
        "flat",
        "empty",
        "two splits",
        "fifo",
        "unreadable",
        "huge",
        "eps",
        "empty class",
        "float",
    }

    def apply(folder: Path) -> None:
        import numpy as np
        from PIL import Image

        photos = folder / "photos"
        if kind == "empty class":
            (photos / "cow").mkdir()
        elif kind in ("one class", "no class", "flat", "empty"):
            shutil.rmtree(photos / "bee")
            if kind != "one class":
                shutil.rmtree(photos / "ant")
            if kind == "flat":
                shutil.copy(folder / "a.png", photos / "a.png")
            if kind == "empty":
                photos.rmdir()
                photos.mkdir()
        elif kind == "bad names":
            (photos / "ant").rename(photos / "a\x1b[31m\nb ☃")
        elif kind == "two splits":
            shutil.copytree(photos, folder / "p")
            for name in ("train", "Training"):
                shutil.copytree(folder / "p", photos / name)
            shutil.rmtree(folder / "p")
        elif kind == "files beside":
            (photos / "notes.txt").write_text("x")
        elif kind == "loop":
            (photos / "bee" / "loop").symlink_to(photos)
        elif kind == "fifo":
            os.mkfifo(photos / "ant" / "pipe.png")
        elif kind == "bad suffix":
            (photos / "ant" / "0.png").rename(photos / "ant" / "0.jpg")
        elif kind == "unreadable":
            (photos / "ant" / "9.png").write_bytes(b"hello")
        elif kind == "deep":
            (photos / "ant" / "a" / "b" / "c").mkdir(parents=True)
        elif kind == "test only":
            (photos / "ant").rename(photos / "test")
        elif kind == "huge":
            Image.new("1", (30_000, 30_000)).save(photos / "ant" / "huge.png")
        elif kind == "float":
            Image.fromarray(np.full((4, 4), 300, "float32")).save(photos / "ant" / "f.tif")
        elif kind == "eps":
            (photos / "ant" / "e.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        elif kind == "svg":
            (photos / "ant" / "e.svg").write_text("<svg/>")

    command = draw.choice(
        (("data", "folder:photos", "--check"), (*TRAIN, "--out", "out"), ("data", "check", "-", "folder:photos"))
    )
    return Case(f"photos: {kind}: {' '.join(command[:2])}", command, apply, kind in sure, copy=("photos", "a.png"))


def _table_case(draw: random.Random) -> Case:
    file = draw.choice(("t.csv", "t.tsv", "t.jsonl"))
    kind = draw.choice(
        ("cut", "latin", "quotes", "null", "empty", "header", "twice", "missing", "outside", "pipe", "lists", "long")
    )

    def apply(folder: Path) -> None:
        path = folder / file
        text = path.read_text()
        changed = {
            "cut": text[: len(text) // 2 + 3],
            "latin": None,
            "quotes": text.replace("ant", '"ant', 1),
            "null": text.replace("ant", "a\x00nt", 1),
            "empty": "",
            "header": text.split("\n")[0] + "\n",
            "twice": text.replace("label", "file_name", 1).replace("sentence\t", "file_name\t", 1),
            "missing": text.replace("0.png", "nothing.png").replace("words 0", ""),
            "outside": text.replace("photos/ant/0.png", "/dev/zero"),
            "lists": text.replace('"ant"', '["ant", 3, null]', 1),
            "long": text.replace("ant", "a" * 200_000, 1),
        }.get(kind)
        if kind == "pipe":
            path.unlink()
            os.mkfifo(path)
        elif changed is None:
            path.write_bytes(text.encode().replace(b"ant", b"\xff\xfe", 1))
        else:
            path.write_text(changed)

    spec = f"{'text' if file == 't.tsv' else 'table'}:{file}"
    return Case(
        f"{file}: {kind}",
        ("data", spec, "--check"),
        apply,
        kind in ("latin", "empty", "header", "pipe"),
        copy=(file, "photos"),
    )


def _output_case(draw: random.Random) -> Case:
    out = draw.choice(
        (
            "a.png",
            "/dev/full",
            "/dev/null",
            "photos",
            "photos/ant/out",
            "bypass",
            "/proc/x",
            "a.png/b",
            "\x1b[2J",
            "link",
        )
    )

    def apply(folder: Path) -> None:
        (folder / "link").symlink_to("nowhere/at/all")

    argv = draw.choice(
        (
            (*TRAIN, "--out", out),
            ("bank", "--data", "folder:photos", "--quiet", "--out", out),
            ("predict", "bypass", "photos/ant", "--embeddings", out),
            ("report", "results.jsonl", "--out", out),
        )
    )
    return Case(f"{argv[0]} to {out!r}", argv, apply, copy=("photos", "a.png", "bypass", "results.jsonl"))


PREDICT = ("predict", "ADAPTER", "a.png", "--json")
RUN = ("train", "--run", "run.json", "--out", "out", "--quiet")
ON_BANK = ("train", "--bank", "bank", "--method", "bypass-none", "--epochs", "1", "--quiet", "--out", "out")
HF = ("params", "--backbone", "hf:hf", "--method", "linear")
HF_BANK = ("bank", "--data", "folder:photos", "--backbone", "hf:hf", "--quiet", "--out", "out")
KINDS: tuple[tuple[int, Callable[[random.Random], Case]], ...] = (
    (30, flags),
    (14, _json_case("ADAPTER/adapter_config.json", PREDICT, ("ADAPTER", "a.png"))),
    (6, _json_case("ADAPTER/run.json", PREDICT, ("ADAPTER", "a.png"))),
    (8, _json_case("bypass/run.json", ("train", "--run", "bypass/run.json", "--out", "out", "--quiet"), ("bypass",))),
    (8, _json_case("bank/manifest.json", ON_BANK, ("bank",))),
    (8, _json_case("peft/adapter_config.json", (), ("peft",), _peft)),
    (6, _json_case("method.json", ("params", "--backbone", "restuning-micro", "--method", "method.json"), ("method.json",))),
    (4, _json_case("hf/config.json", HF, ("hf",))),
    (3, _json_case("hf/preprocessor_config.json", HF_BANK, ("hf", "photos"))),
    (10, _file_case("ADAPTER/adapter_model.safetensors", PREDICT, ("ADAPTER", "a.png"))),
    (4, _file_case("ADAPTER/adapter_config.json", PREDICT, ("ADAPTER", "a.png"))),
    (4, _file_case("peft/adapter_model.safetensors", (), ("peft",), _peft)),
    (4, _file_case("bank/train-0-00000.safetensors", ON_BANK, ("bank",))),
    (3, _file_case("bank/tail.safetensors", ON_BANK, ("bank",))),
    (3, _file_case("hf/model.safetensors", HF_BANK, ("hf", "photos"))),
    (4, _file_case("weights.pt", ("bank", "--data", "folder:photos", "--weights", "weights.pt", "--out", "out"), ("weights.pt", "photos"))),
    (3, _file_case("weights.safetensors", ("evaluate", "bypass", "--weights", "weights.safetensors"), ("weights.safetensors", "bypass"))),
    (2, _file_case("weights.pt", ("score", "captions", "--real", "captions:captions", "--features", "inception:weights.pt"), ("weights.pt", "captions"))),
    *((3, _file_case(file, ("predict", "bypass", file), ("bypass", file))) for file in ("a.png", "a.jpg", "a.tif", "a.webp")),
    *((3, _file_case(file, ("data", f"tar:{file}", "--check"), (file,))) for file in ("photos.tar", "photos.tar.gz")),
    (2, _file_case("captions/metadata.jsonl", ("train-diffusion", "--base", "captions", "--data", "captions:captions", "--out", "out"), ("captions",))),
    (12, _folder_case),
    (10, _table_case),
    (8, _output_case),
)  # fmt: skip
_ROOT: list[Path] = []


def cases(count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(seed)
    weights = [weight for weight, _ in KINDS]
    for _ in range(count):
        yield draw.choices([make for _, make in KINDS], weights)[0](draw)


# ---- the driver


@dataclass
class Totals:
    codes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


def snapshot(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        stamp = (path.lstat().st_size, path.lstat().st_mtime_ns) if path.is_file() and not path.is_symlink() else kind
        found[str(path.relative_to(folder))] = stamp
    return found


def run(case: Case, root: Path, folder: Path) -> tuple[str, list[str]]:
    """The exit code, and what breaks the promise."""
    folder.mkdir()
    for name in case.copy:
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, folder / name)
    try:
        case.change(folder)
    except (OSError, ValueError):
        return "not made", []
    before = snapshot(folder)
    out, err = folder.parent / f"{folder.name}.out", folder.parent / f"{folder.name}.err"
    child = os.fork()
    if child == 0:
        _child(case, folder, out, err)
    code, late = _wait(child)
    printed, said = out.read_bytes().decode("utf-8", "replace"), err.read_bytes().decode("utf-8", "replace")
    wrong = []
    if late or code not in (0, 2):
        wrong.append(f"code {'late' if late else code}: {said[-400:]}")
    elif code == 2:
        if said.count("\n") != 1 or not said.startswith("restuning: ") or not said.strip().isprintable():
            wrong.append(f"{said.count(chr(10))} lines: {said[:600]!r}")
        if printed and case.argv[:2] != ("data", "check"):  # whose report is what it prints
            wrong.append(f"printed {printed[:200]!r}")
        if snapshot(folder) != before:
            changed = set(snapshot(folder).items()) ^ set(before.items())
            wrong.append(f"left or changed {sorted(name for name, _ in changed)[:5]}")
    else:
        if case.plain:
            wrong.append("accepted")
        if "--json" in case.argv:
            try:
                json.loads(printed, parse_constant=lambda name: math.prod([name, None]))
            except (ValueError, TypeError) as error:
                wrong.append(f"no JSON: {error}")
        if any(not line.startswith("restuning: note: ") for line in said.splitlines()):
            wrong.append(f"printed beside its output: {said[:300]!r}")
    if (folder / MARKER).exists():
        wrong.append("FOREIGN CODE RAN")
    shutil.rmtree(folder, ignore_errors=True)
    out.unlink(missing_ok=True)
    err.unlink(missing_ok=True)
    return str(code), wrong


def _child(case: Case, folder: Path, out: Path, err: Path) -> None:
    """Never returns."""
    code = 99
    try:
        os.chdir(folder)
        reads, writes = os.pipe()
        os.write(writes, b"y\n" * 50)
        os.close(writes)
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.dup2(reads, 0)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
        from restuning.cli.door import door
        from restuning.cli.main import main

        if case.call is not None:
            call = case.call
            code = door(lambda words: call(folder), [])
        else:
            code = main(list(case.argv))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    except BaseException as error:
        print(f"escaped: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> tuple[int, bool]:
    deadline = time.monotonic() + SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), False
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -9, True
        time.sleep(0.005)


def fuzz(
    count: int, seed: int, show: bool = False, only: str = "", first: int = 0, seconds: float = math.inf
) -> Totals:
    """Run so many cases in forks of this process, from the `first` on, for so many seconds at most."""
    import torch

    torch.set_num_threads(1)
    totals, start = Totals(), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        prepare(root)
        _ROOT[:] = [root]
        _warm(root)
        for i, case in enumerate(cases(count, seed)):
            if i < first or (only and only not in f"{i} {case.name}"):
                continue
            if time.monotonic() - start > seconds:
                print(f"stopped before {i}")
                break
            code, wrong = run(case, root, Path(temporary) / f"case{i}")
            totals.codes[code] += 1
            for one in wrong:
                totals.violations.append(f"{i} {case.name}: {' '.join(case.argv)[:150]!r}: {one}")
                if show:
                    print(f"VIOLATION {totals.violations[-1]}", flush=True)
    totals.seconds = time.monotonic() - start
    return totals


def _warm(root: Path) -> None:
    """Import what commands import, once: cases are forks of this."""
    import contextlib

    from restuning.cli.main import main

    here = os.getcwd()
    os.chdir(root)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for argv in (("predict", "bypass", "a.png"), (*TRAIN, "--out", "../warm"), HF, ("sites", "--json")):
                assert main(list(argv)) == 0, argv
            for module in ("datasets", "diffusers", "torchmetrics.image.fid", "sklearn.datasets", "matplotlib.pyplot"):
                with contextlib.suppress(ImportError):
                    __import__(module)
    finally:
        os.chdir(here)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--only", default="", help="cases whose number and name hold this")
    args = parser.parse_args()
    found = fuzz(args.count, args.seed, True, args.only, args.first, args.seconds)
    counts = ", ".join(f"code {code}: {n}" for code, n in sorted(found.codes.items()))
    print(f"{sum(found.codes.values())} inputs in {found.seconds:.0f} s; {counts}; {len(found.violations)} violations")
    sys.exit(bool(found.violations))
