"""`import restuning` needs torch alone; what is missing is named with its install line."""

import subprocess
import sys

SCRIPT = """
import sys

class Only:
    blocked = ("timm", "transformers", "torchvision", "safetensors", "PIL", "datasets", "accelerate", "rich", "sklearn",
               "jaxtyping", "beartype", "huggingface_hub", "tensorboard")
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Only())
import torch
import restuning as rt
from restuning.errors import MissingExtra

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)) for _ in range(2)]
        self.layers = torch.nn.ModuleList(blocks)
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

own = rt.Anatomy("own", "layers", {"ffn": rt.Op(rt.into("1"), rt.out_of("1"))}, width="0.weight")
assert rt.adapt(Net(), "bypass", 3, anatomy=own)(torch.randn(2, 5, 8)).shape == (2, 3)
calls = {
    "timm": lambda: rt.load_backbone("vit_tiny_patch16_224"),
    "transformers": lambda: rt.load_backbone("hf:somewhere"),
    "safetensors": lambda: rt.adapt(Net(), "linear", 3, anatomy=own).save_pretrained("nowhere"),
    "scikit-learn": lambda: rt.load_task("digits"),
}
for package, call in calls.items():
    try:
        call()
    except MissingExtra as error:
        assert f"'{package}'" in str(error) and "pip install 'restuning[" in str(error), error
    else:
        raise AssertionError(package)
print("fine")
"""


def test_import_needs_torch_alone(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "fine", done.stderr
    assert not list(tmp_path.iterdir())
