"""What breaks in other libraries, one test each; the names say what their users meet."""

import copy
import functools
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny import TINY
from torch import nn

import restuning as rt
from restuning.errors import CheckpointError, MethodError

VIT = TINY["timm-vit"]


def tuned_vit(method="res-tuning", **more) -> rt.Tuned:
    tuned = rt.adapt(VIT.backbone(), method, 3, **more).eval()
    shake(tuned)
    return tuned


def shake(tuned: rt.Tuned) -> None:
    with torch.no_grad():
        for p in tuned.adapters[tuned.active_adapters[0]].parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_1_a_second_adapter_leaves_the_first_alone() -> None:
    tuned, x = tuned_vit(name="task1"), VIT.inputs()
    alone = tuned(**x)
    tuned.add_adapter("task10", "res-tuning-tri", 5)
    shake(tuned)
    assert tuned(**x).shape == (3, 5)
    tuned.set_adapter("task1")
    assert torch.equal(tuned(**x), alone)


def test_1_saving_task1_does_not_save_task10(tmp_path) -> None:
    from safetensors.torch import load_file

    tuned = tuned_vit("linear", name="task1")
    tuned.add_adapter("task10", "res-tuning", 5)
    tuned.save_pretrained(tmp_path, "task1")
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"head.weight", "head.bias"}


def test_1_two_tuned_models_on_one_backbone_do_not_see_each_other() -> None:
    backbone, x = VIT.backbone(), VIT.inputs()
    a = rt.adapt(backbone, "res-tuning", 3)
    shake(a)
    before = a(**x)
    b = rt.adapt(backbone, "res-tuning-tri", 3)
    shake(b)
    b(**x)
    assert torch.equal(a(**x), before)


def test_2_disable_adapter_gives_back_those_that_were_active() -> None:
    tuned, x = tuned_vit(name="a"), VIT.inputs()
    tuned.add_adapter("b", "bypass", 3)
    tuned.set_adapter("a")
    before = tuned(**x)
    flags = {n: p.requires_grad for n, p in tuned.named_parameters()}
    with tuned.disable_adapter():
        assert torch.equal(tuned(**x), tuned.backbone(**x))
        with tuned.disable_adapter():
            pass
        assert torch.equal(tuned(**x), tuned.backbone(**x)), "nested"
    assert tuned.active_adapters == ("a",) and torch.equal(tuned(**x), before)
    assert flags == {n: p.requires_grad for n, p in tuned.named_parameters()}


def test_2_loading_and_switching_flip_no_requires_grad(tmp_path) -> None:
    tuned = tuned_vit(name="a")
    tuned.save_pretrained(tmp_path)
    tuned.load_adapter(tmp_path, "b")
    tuned.set_adapter("a")
    assert all(p.requires_grad == name.startswith("adapters.") for name, p in tuned.named_parameters())


def test_3_a_copy_uses_its_own_tuners() -> None:
    tuned, x = tuned_vit(), VIT.inputs()
    before = tuned(**x)
    ema = copy.deepcopy(tuned)
    shake(ema)
    assert torch.equal(tuned(**x), before) and not torch.allclose(ema(**x), before)
    tuned.unload()
    assert ema(**x).shape == (3, 3)
    ema.backbone.norm.weight.data.zero_()
    assert not torch.equal(tuned.backbone.norm.weight, ema.backbone.norm.weight), "its own tail too"


@pytest.mark.parametrize("name", ["own", "hf-clip", "bert"])
def test_4_keyword_calls_tuples_and_model_outputs(name: str) -> None:
    tiny = TINY[name]
    tuned, x = rt.adapt(tiny.backbone(), "res-tuning-tri", 3, anatomy=tiny.anatomy), tiny.inputs()
    born = tuned(**x)
    shake(tuned)
    assert not torch.allclose(tuned(**x), born)


def test_4_mappings_are_not_written_into() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    from restuning.hooks.points import replace_first_tensor

    said = BaseModelOutput(last_hidden_state=torch.zeros(1), attentions=(torch.ones(1),))
    new = replace_first_tensor(said, torch.ones(1))
    assert type(new) is BaseModelOutput and said.last_hidden_state.item() == 0
    assert new.last_hidden_state.item() == 1 and new.attentions is said.attentions


def test_5_an_unknown_name_is_an_error() -> None:
    with pytest.raises(MethodError, match=r"did you mean 'bypass'"):
        tuned_vit("bypas")
    for wrong in ("adapter", 3, nn.Linear(2, 2)):
        with pytest.raises(MethodError, match=r"expected|already built"):
            rt.Residual({"mha": wrong})
    with pytest.raises(MethodError, match=r"expected an nn\.Module"):
        tuned_vit(rt.Residual({"mha": lambda info: None}))


def test_6_unload_leaves_no_hook_and_no_feature_in_memory() -> None:
    tuned = tuned_vit("bypass")
    out = tuned(**VIT.inputs())
    seen = [weakref.ref(f) for f in tuned.features(**VIT.inputs()).tensors()]
    gc.collect()
    assert all(ref() is None for ref in seen), "features of the last batch"
    adapter = weakref.ref(tuned.adapters["default"])
    backbone = tuned.unload()
    del tuned, out
    gc.collect()
    assert adapter() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_7_the_head_and_its_classes_are_there_after_a_reload(tmp_path) -> None:
    tuned = rt.adapt(VIT.backbone(), "linear", classes=["ant", "bee"]).eval()
    tuned.save_pretrained(tmp_path)
    again = rt.Tuned.from_pretrained(VIT.backbone(), tmp_path)
    assert torch.equal(again.adapters["default"].head.weight, tuned.adapters["default"].head.weight)
    assert list(again.adapter_config().classes) == ["ant", "bee"]


COMPILED = """
import sys
import torch
from tiny import TINY
import restuning as rt

x = TINY["timm-vit"].inputs()
for method in ("res-tuning-tri", "bypass"):
    tuned = rt.adapt(TINY["timm-vit"].backbone(), method, 3, name="a").eval()
    tuned.add_adapter("b", method, 3)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    compiled = torch.compile(tuned, backend="aot_eager")
    for name in ("a", "b", "a"):
        tuned.set_adapter(name)
        torch.testing.assert_close(compiled(**x), tuned(**x))
"""


def test_10_compile_gives_the_same_and_switching_is_right() -> None:
    # in a process of its own, where shape annotations are not checked: the compiler cannot trace the checks
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_11_frozen_dropout_and_batch_statistics_stay_in_train_mode() -> None:
    tiny = TINY["own"]
    tuned, x = rt.adapt(tiny.backbone(), "res-tuning", 3, anatomy=tiny.anatomy).train(), tiny.inputs()
    before = copy.deepcopy(tuned.backbone.batch_norm.state_dict())
    assert torch.equal(tuned(**x), tuned(**x)), "no dropout"
    assert all(torch.equal(before[k], v) for k, v in tuned.backbone.batch_norm.state_dict().items())
    asked = rt.adapt(tiny.backbone(), "res-tuning", 3, anatomy=tiny.anatomy, train_mode=True).train()
    assert not torch.equal(asked(**x), asked(**x))


def test_12_prefix_and_adapter_train_and_save_together(tmp_path) -> None:
    tuned, x = tuned_vit(rt.Residual({"mha": rt.Prefix(3), "ffn": rt.Adapter(4), "block": rt.Prompt(2)})), VIT.inputs()
    tuned(**x, labels=torch.tensor([0, 1, 2]))["loss"].backward()
    assert all(p.grad is not None for p in tuned.adapters.parameters())
    tuned.save_pretrained(tmp_path)
    assert torch.equal(rt.Tuned.from_pretrained(VIT.backbone(), tmp_path).eval()(**x), tuned(**x))


class Gain(nn.Module):
    def __init__(self, info: rt.SiteInfo, power: int = 1) -> None:
        super().__init__()
        self.gain, self.power = nn.Parameter(torch.zeros(info.out_features)), power

    def forward(self, x, y):
        return self.gain * y**self.power


@pytest.mark.parametrize("own", [Gain, functools.partial(Gain, power=2), lambda info: Gain(info, 3)])
def test_13_an_own_tuner_needs_no_edit_and_no_registration(own, tmp_path) -> None:
    for method in (rt.Residual({"mha": own, "ffn": rt.Adapter(4)}), rt.Bypass(own, rt.Adapter(4))):
        tuned, x = tuned_vit(method), VIT.inputs()
        tuned.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"own tuner.*pass method="):
            rt.Tuned.from_pretrained(VIT.backbone(), tmp_path)
        again = rt.Tuned.from_pretrained(VIT.backbone(), tmp_path, method=method).eval()
        assert torch.equal(again(**x), tuned(**x))


def test_several_active_side_paths_read_one_backbone_pass() -> None:
    tuned, x = tuned_vit("bypass", name="a"), VIT.inputs()
    tuned.add_adapter("b", "linear", 7)
    tuned.add_adapter("c", "bypass-vertical", 2, pool="mean")
    alone = {}
    for name in "abc":
        tuned.set_adapter(name)
        alone[name] = tuned(**x)
    passes = []
    handle = tuned.backbone.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    tuned.set_adapter(["a", "b", "c"])
    together = tuned(**x)
    handle.remove()
    assert len(passes) == 1
    for name in "abc":
        torch.testing.assert_close(together[name], alone[name])


def test_names_and_deletion() -> None:
    tuned = tuned_vit()
    for name in ("default", "", "a.b", "keys", "../x"):
        with pytest.raises(MethodError):
            tuned.add_adapter(name, "linear", 3)
    with pytest.raises(MethodError, match="no adapter named 'other': there is default"):
        tuned.set_adapter("other")
    with pytest.raises(MethodError, match="full fine-tuning"):
        tuned.add_adapter("all", "full", 3)
    tuned.delete_adapter("default")
    with pytest.raises(MethodError, match="no adapter is active"):
        tuned(**VIT.inputs())
