"""Does every extra do what it is for? The wheel alone with torch only, then each extra in an environment of its own.

python scripts/check_extras.py [EXTRA ...] [--out runs/extras]

The wheel is built, and an environment made with torch. Every extra gets one of its own that sees torch and no more,
so that torch is installed once. A line for each: whether it does what it is for, and seconds.
"""

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent

CHECKS: dict[str, str] = {
    "": """
import restuning as rt, torch, sys
assert not {"timm", "transformers", "PIL", "numpy.testing"} & set(sys.modules)
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
    def forward(self, x):
        return x + self.mlp(self.norm(x))
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.final_norm = torch.nn.ModuleList([Block(), Block()]), torch.nn.LayerNorm(8)
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)
ops = {"ffn": rt.Op(reads=rt.into("mlp"), writes=rt.out_of("mlp"))}
mine = rt.Anatomy(name="mine", blocks="layers", ops=ops, width="norm.weight", norm="final_norm")
tuned = rt.adapt(Net(), rt.Residual({"ffn": rt.Adapter(2)}), 3, anatomy=mine)
assert tuned(torch.randn(2, 5, 8)).shape == (2, 3)
try:
    rt.load_backbone("vit_tiny_patch16_224", weights="random")
except rt.RestuningError as error:
    assert "pip install" in str(error), error
""",
    "images": """
import restuning as rt
from restuning.cli.main import main
task = rt.load_task("digits", train_size=40, test_size=20)
X = [task.train.item(i) for i in range(40)]
rt.Classifier(epochs=2).fit(X, task.train.labels).save("task")
assert main("train --data digits --train-size 40 --test-size 20 --epochs 2 --quiet --out run".split()) == 0
X[0].save("a.png")
assert main("predict run a.png --top 2".split()) == 0
assert main("evaluate run --confusion c.png".split()) == 0
""",
    "text": """
import restuning as rt
X, y = ["a fine film", "a joy", "what a bore", "a waste"] * 3, [1, 1, 0, 0] * 3
rt.Classifier("all-MiniLM-L6-v2", "linear", epochs=5, max_length=16).fit(X, y).save("task")
from restuning.cli.main import main
assert main(["predict", "task", "a fine day"]) == 0
""",
    "diffusion": """
import diffusers, torch, restuning as rt
kind = dict(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=4,
            norm_num_groups=8, layers_per_block=1, sample_size=8)
tuned = rt.adapt(diffusers.UNet2DConditionModel(**kind), "bypass")
x = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": torch.randn(1, 5, 24)}
assert tuned(**x) is not None
from restuning.cli.main import main
assert main("train-diffusion --base nowhere --data captions:nowhere --out out".split()) == 2
""",
    "serve": """
import restuning as rt, sys, subprocess, time
task = rt.load_task("digits", train_size=40, test_size=20)
X = [task.train.item(i) for i in range(40)]
rt.Classifier(epochs=2).fit(X, task.train.labels).save("task")
X[0].save("a.png")
ask = [sys.executable, "-m", "restuning.cli", "serve", "task", "--port", "8765"]
server = subprocess.Popen(ask)
try:
    from restuning.cli.main import main
    for _ in range(120):
        if main("predict task a.png --server http://127.0.0.1:8765".split()) == 0:
            break
        time.sleep(0.5)
    else:
        raise SystemExit("no answer")
finally:
    server.terminate()
    server.wait(60)
""",
    "app": """
import cleanlab, gradio, restuning.app
from restuning.cli.main import parse
assert parse(["app"]).command == "app"
""",
    "ray": """
import ray
from restuning.paper.ray import on_ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
assert ray.get(ray.remote(lambda: 3).remote()) == 3
""",
    "export": """
from restuning.cli.main import main
assert main("train --data digits --train-size 40 --test-size 20 --epochs 2 --quiet --out run".split()) == 0
assert main("export run --format onnx --out exported".split()) == 0
""",
    "heic": """
import pillow_heif
from PIL import Image
pillow_heif.from_pillow(Image.new("RGB", (32, 32), "red")).save("a.heic")
from restuning.data.decode import decode
with open("a.heic", "rb") as file:
    assert decode(file, "a.heic").size == (32, 32)
""",
    "all": """
import restuning as rt
from restuning.cli.main import main
assert main("train --data digits --train-size 40 --test-size 20 --epochs 2 --quiet --out run".split()) == 0
assert main("export run --format onnx --out exported".split()) == 0
import subprocess, sys
bench = "bench memory --backbone restuning-micro --rounds 1 --method linear peft-lora --out bench"
subprocess.run([sys.executable, "-m", "restuning.cli", *bench.split()], check=True)  # it starts processes of its own
""",
}
NEEDS = {"export": "images,export", "ray": "images,ray", "heic": "images,heic"}
"""What an extra builds on: its own packages make sense beside these alone."""


def run(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(next((line for line in lines if line.startswith("restuning: ")), lines[-1]))


def environment(folder: Path, sees: Path | None = None) -> Path:
    """A new environment's Python; sees: another's folder, whose packages it sees."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if sees is not None:
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        here, there = (Path(subprocess.check_output([p, "-c", ask], text=True).strip()) for p in (python, sees))
        (here / "base.pth").write_text(f"{there}\n")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"of {', '.join(filter(None, CHECKS))} (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/extras"))
    args = parser.parse_args()
    out, constraints = args.out.absolute(), ROOT / "constraints.txt"
    out.mkdir(parents=True, exist_ok=True)
    base = environment(out / "base")
    run(base, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT)
    (wheel,) = out.glob("*.whl")
    run(base, "-m", "pip", "install", "--quiet", "--constraint", constraints, "torch")
    failed = 0
    for extra in args.extras or CHECKS:
        start, wrong = time.perf_counter(), ""
        folder = out / (extra or "alone")
        try:
            python = environment(folder, base)
            asked = f"{wheel}[{NEEDS.get(extra, extra)}]" if extra else str(wheel)
            run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, asked)
            (folder / "check.py").write_text(CHECKS[extra], encoding="utf-8")
            (folder / "work").mkdir()
            run(python, folder / "check.py", cwd=folder / "work")
        except RuntimeError as error:
            wrong, failed = str(error), failed + 1
        state = f"WRONG: {wrong}" if wrong else "does what it is for"
        print(f"{extra or 'the wheel alone':15} {state} ({time.perf_counter() - start:.0f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
