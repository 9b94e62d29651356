"""A backbone shared out over two processes trains as one that is whole in one, and comes back whole."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, small
from torch import Tensor, nn
from two import in_two

import restuning as rt
from restuning.errors import MethodError, RestuningError
from restuning.hooks.fsdp import sharded_parameters
from restuning.model.files import DIGEST
from restuning.training.config import TrainConfig
from restuning.training.loop import fit
from restuning.utils.distributed import barrier, is_main_process, together

CASES = [
    ("timm-vit", "res-tuning"),
    ("timm-vit", "prefix"),
    ("timm-vit", "vpt-deep"),
    ("timm-vit", "bypass"),
    ("open-clip", "lora-still"),  # on a weight that is used without calling a module
]


class Noise:
    """13 examples; the first time that epoch `stop` begins, Ctrl-C is pressed."""

    def __init__(self, x: Tensor, stop: int | None) -> None:
        self.x, self.stop = x, stop

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], i % 3

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.stop:
            self.stop = None
            raise KeyboardInterrupt


def outside(backbone: nn.Module) -> dict[str, object]:
    """Whatever a guest could find changed."""
    found: dict[str, object] = {"parameters": [id(p) for p in backbone.parameters()]}
    for name, m in backbone.named_modules():
        sizes = {key: len(table) for key, table in vars(m).items() if isinstance(table, dict)}
        found[name] = (type(m), sorted(vars(m)), sizes)
    return found


def train(out: Path) -> None:
    """Each case, in one process or as a share of two; the adapters are written."""
    many = barrier() > 1
    for anatomy, method in CASES:
        tiny = TINY[anatomy]
        backbone = tiny.backbone()
        came = {name: t.clone() for name, t in backbone.state_dict().items()}, outside(backbone)
        still = rt.Residual({"qkv": rt.Lora(3, dropout=0.0)})  # dropout is of a process
        tuned = rt.adapt(backbone, still if method == "lora-still" else small(method), 3)
        torch.manual_seed(2)
        for p in tuned.adapters.parameters():
            p.data += 0.05 * torch.randn_like(p)
        x = next(iter(tiny.inputs(13).values()))
        if many:
            tuned.fully_shard()
            for block in tuned.sites.blocks:
                whole = sum(p.numel() for p in backbone.get_submodule(block).parameters())
                held = sum(p.to_local().numel() for p in backbone.get_submodule(block).parameters())  # type: ignore
                assert held == pytest.approx(whole / 2, rel=0.01), (held, whole)
            with pytest.raises(MethodError, match="sharded already"):
                tuned.fully_shard()
            with pytest.raises(MethodError, match=r"full fine-tuning needs the whole of them: call unshard\(\) first"):
                tuned.add_adapter("full", "full", 3)
        config = TrainConfig(epochs=3, batch_size=4, lr=1e-3, accumulate=2, clip=1.0, ema=0.9)
        state = out / f"{anatomy}-{method}.pt"
        data, val = Noise(x, 1 if many else None), Noise(x[:5], None)
        try:
            fit(tuned, data, val, config, state=state, progress=False)
            assert not many
        except KeyboardInterrupt:  # and what is in memory is forgotten
            for p in tuned.adapters.parameters():
                p.data.zero_()
            fit(tuned, data, val, config, state=state, resume=True, progress=False)
        tuned.eval()
        with torch.no_grad():
            logits = tuned(x)
            if many:  # no pass leaves a note behind
                order = backbone._get_fsdp_state()._comm_ctx.post_forward_order
                assert not order
        if is_main_process():
            tuned.save_pretrained(out / f"{anatomy}-{method}")
        assert bool(sharded_parameters(tuned)) == many
        for p in tuned.adapters.parameters():
            p.grad = None
        tuned.unshard()
        with torch.no_grad():
            assert torch.equal(tuned(x), logits), "whole again, it says the same"
        if many:
            tuned.fully_shard()  # and once more
        assert tuned.unload() is backbone
        state_dict = backbone.state_dict()
        assert state_dict.keys() == came[0].keys() and all(torch.equal(state_dict[k], came[0][k]) for k in state_dict)
        assert outside(backbone) == came[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_shared_backbone_trains_as_a_whole_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    in_two(__file__, str(tmp_path / "two"))
    train(tmp_path / "one")
    for anatomy, method in CASES:
        at = f"{anatomy}-{method}"
        a, b = (load_file(tmp_path / name / at / "adapter_model.safetensors") for name in ("one", "two"))
        assert a.keys() == b.keys()
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5, at
        one, two = (json.loads((tmp_path / name / at / "adapter_config.json").read_text()) for name in ("one", "two"))
        assert one.pop(DIGEST) and two.pop(DIGEST)  # of tensors that are equal up to rounding
        assert one == two


def test_one_process_has_nobody_to_share_with() -> None:
    tuned = rt.adapt(TINY["timm-vit"].backbone(), "res-tuning", 3)
    with pytest.raises(RestuningError, match="one process alone has nobody to share with"):
        tuned.fully_shard()
    tuned.unshard()


if __name__ == "__main__":
    assert together()
    train(Path(sys.argv[1]))
