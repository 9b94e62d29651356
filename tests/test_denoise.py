"""Backbones that denoise: the laws over a small U-Net, Stable Diffusion's kind, and a small PixArt."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import restuning as rt
from restuning.backbones.sites import find_sites
from restuning.errors import CheckpointError, MethodError
from restuning.methods.named import find_method
from restuning.methods.spec import resize
from restuning.utils.profiling import saved_bytes

diffusers = pytest.importorskip("diffusers")

METHODS = ("lora", "adapter", "prefix", "prompt", "res-tuning", "bypass", "scedit")
ZERO = ("lora", "adapter", "res-tuning", "bypass", "scedit")


def unet(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    kind = {
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "block_out_channels": (32, 64, 64),
        **more,
    }
    return diffusers.UNet2DConditionModel(  # type: ignore[no-any-return]
        sample_size=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **kind,
    ).eval()


def pixart() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(  # type: ignore[no-any-return]
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        norm_num_groups=8,
        use_additional_conditions=False,
    ).eval()


MAKES: dict[str, Callable[..., nn.Module]] = {"unet": unet, "pixart": pixart}
CASES = [(make, method) for make in MAKES for method in METHODS if (make, method) != ("pixart", "scedit")]


def inputs(make: str = "unet") -> dict[str, Any]:
    torch.manual_seed(1)
    given = {
        "sample": torch.randn(2, 4, 8, 12),
        "timestep": torch.tensor([5, 700]),
        "encoder_hidden_states": torch.randn(2, 7, 24),
    }
    if make == "pixart":
        sample = given.pop("sample")[..., :8]
        given |= {"hidden_states": sample, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return given


def small(method: str) -> Any:
    return resize(find_method(method, "unet"), 4)


def moved(tuned: rt.Tuned) -> rt.Tuned:
    torch.manual_seed(2)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return tuned


@pytest.mark.parametrize(("make", "method"), CASES)
def test_laws(make: str, method: str, tmp_path: Any) -> None:
    backbone, given = MAKES[make](), inputs(make)
    before = copy.deepcopy(backbone.state_dict())
    with torch.no_grad():
        plain = backbone(**given).sample
    tuned = rt.adapt(backbone, small(method))
    said = tuned(**given).sample
    assert torch.equal(said, plain) == (method in ZERO)
    moved(tuned)(**given).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.adapters.parameters())
    assert all(p.grad is None for p in backbone.parameters())
    said = tuned(**given).sample
    assert not torch.equal(said, plain)
    assert torch.equal(tuned(**given, return_dict=False)[0], said)
    with tuned.plug():
        assert torch.equal(backbone(**given).sample, said)
    with tuned.disable_adapter():
        assert torch.equal(tuned(**given).sample, plain)
    tuned.save_pretrained(tmp_path / "saved")
    assert tuned.unload() is backbone
    assert torch.equal(backbone(**given).sample, plain)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert torch.equal(rt.Tuned.from_pretrained(backbone, tmp_path / "saved")(**given).sample, said)


def test_full_fine_tuning(tmp_path: Any) -> None:
    tuned, given = rt.adapt(unet(), "full"), inputs()
    tuned(**given).sample.square().mean().backward()
    assert all(p.grad is not None for p in tuned.backbone.parameters())
    with torch.no_grad():
        tuned.backbone.conv_out.bias.add_(1.0)  # type: ignore[union-attr, operator]
    tuned.save_pretrained(tmp_path)
    again = rt.Tuned.from_pretrained(unet(), tmp_path)
    assert torch.equal(again(**given).sample, tuned(**given).sample)


def test_sites_of_a_unet() -> None:
    sites = find_sites(unet())
    for op in ("mha", "cross", "ffn", "block", "attention", "resnet", "mid", "decoder", "skip"):
        assert sites.at(op)
    assert [site.info.out_features for site in sites.at("skip")] == [64, 64, 64, 32, 32, 32]
    backbone, given = unet(), inputs()
    plain = backbone(**given).sample
    for op in ("resnet", "mid", "decoder", "skip"):
        for source in ("normed", "out"):
            tuned = rt.adapt(backbone, rt.Residual({op: rt.Adapter(3, source=source)}))  # type: ignore[arg-type]
            assert torch.equal(tuned(**given).sample, plain)
            assert not torch.equal(moved(tuned)(**given).sample, plain)
            tuned.unload()


def test_an_edited_skip_is_an_edited_argument() -> None:
    """SCEdit's own form: what is added to the features that an up block is given to put together."""
    backbone, given = unet(), inputs()
    tuned = moved(rt.adapt(backbone, small("scedit")))
    said = tuned(**given).sample
    tuners = list(tuned.adapters["default"].tuners.values())  # type: ignore[union-attr, operator]
    edited = iter(tuners)

    def edit(module: nn.Module, args: Any, kwargs: Any) -> Any:
        skips = list(kwargs["res_hidden_states_tuple"])
        for i in reversed(range(len(skips))):
            tokens = skips[i].flatten(2).transpose(1, 2)
            skips[i] = skips[i] + next(edited)(tokens, tokens).transpose(1, 2).reshape(skips[i].shape)
        return args, {**kwargs, "res_hidden_states_tuple": tuple(skips)}

    for block in backbone.up_blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(edit, with_kwargs=True)
    torch.testing.assert_close(backbone(**given).sample, said)


def test_a_prefix_equals_bound_keys_and_values() -> None:
    """[K_pre; K] and [V_pre; V] put together by an attention processor, in both attentions."""
    backbone, given = unet(), inputs()
    tuned = moved(rt.adapt(backbone, small("prefix")))
    said = tuned(**given).sample
    named = {
        site.reads.path: tuned.adapters["default"].tuners[name]
        for name, site in tuned.adapters["default"].sites.items()
    }  # type: ignore[union-attr, index, operator]

    def bound(prefix: nn.Module) -> Any:
        def process(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
            k, v = (torch.cat([p.expand(len(t), -1, -1), t], 1) for p, t in ((prefix.keys, k), (prefix.values, v)))
            q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
            out = torch.softmax(q @ k.transpose(-1, -2) * attn.scale, -1) @ v
            return attn.to_out[0](out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

        return process

    tuned.unload()
    for path, prefix in named.items():
        backbone.get_submodule(path).processor = bound(prefix)  # type: ignore[assignment]
    torch.testing.assert_close(backbone(**given).sample, said)


def test_the_bypass_keeps_nothing_of_the_backbone() -> None:
    given = inputs()
    counts = {}
    for method in ("full", "res-tuning", "bypass"):
        tuned = rt.adapt(unet(), method if method == "full" else small(method)).train()
        counts[method] = saved_bytes(lambda tuned=tuned: tuned(**given).sample, tuned.parameters())  # type: ignore[misc]
    assert counts["bypass"] < 0.07 * counts["full"] and counts["res-tuning"] < 0.8 * counts["full"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("half", [False, True])
def test_steps_that_are_run_again(half: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are those of steps that keep what they compute."""
    method = rt.Bypass(horizontal=rt.Adapter(3, dropout=dropout), vertical=rt.Adapter(4, dropout=dropout))
    tuned, given = moved(rt.adapt(unet(), method)).train(), inputs()

    def found() -> list[Tensor]:
        tuned.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            said = tuned(**given).sample
        torch.manual_seed(4)
        said.float().square().mean().backward()
        return [said.detach(), *(p.grad.clone() for p in tuned.adapters.parameters() if p.grad is not None)]

    ours = found()
    monkeypatch.setattr("restuning.side.bypass.checkpoint", lambda step, *inputs, **_: step(*inputs))
    torch.testing.assert_close(ours, found())


def test_one_call_serves_several_bypasses() -> None:
    backbone, given = unet(), inputs()
    tuned = rt.adapt(backbone, small("bypass"), name="a")
    tuned.add_adapter("b", small("bypass"))
    moved(tuned).set_adapter(["a", "b"])
    calls = []
    handle = backbone.mid_block.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    each = tuned.each(**given)
    handle.remove()
    assert len(calls) == 1
    together = tuned(**given).sample
    for name, said in each.items():
        tuned.set_adapter(name)
        torch.testing.assert_close(said, tuned(**given).sample)
        assert not torch.equal(said, together)
    tuned.add_adapter("c", small("lora"))
    tuned.set_adapter(["a", "c"])
    with pytest.raises(MethodError, match="'c' acts inside it"):
        tuned.each(**given)


@pytest.mark.parametrize("method", ["res-tuning", "prefix", "prompt", "scedit"])
def test_gradients_through_recomputed_blocks(method: str) -> None:
    tuned, given = moved(rt.adapt(unet().train(), small(method))), inputs()

    def gradients() -> list[Tensor]:
        tuned.zero_grad()
        tuned(**given).sample.square().mean().backward()
        return [p.grad.clone() for p in tuned.adapters.parameters() if p.grad is not None]

    plain = gradients()
    tuned.backbone.enable_gradient_checkpointing()  # type: ignore[operator]
    again = gradients()
    torch.testing.assert_close(again, plain)
    with tuned.plug():
        tuned.zero_grad()
        tuned.backbone(**given).sample.square().mean().backward()
    torch.testing.assert_close([p.grad for p in tuned.adapters.parameters()], plain)


def test_processors_and_slices_of_attention_still_work() -> None:
    backbone, given = unet(), inputs()
    tuned = moved(rt.adapt(backbone, small("res-tuning")))
    said = tuned(**given).sample
    backbone.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())  # type: ignore[operator]
    torch.testing.assert_close(tuned(**given).sample, said)
    backbone.set_attention_slice("max")  # type: ignore[operator]
    torch.testing.assert_close(tuned(**given).sample, said)


def test_a_copy_of_what_is_plugged_in() -> None:
    backbone, given = unet(), inputs()
    tuned = moved(rt.adapt(backbone, small("bypass")))
    plain = unet()(**given).sample
    plug = tuned.plug()
    said = backbone(**given).sample
    other = copy.deepcopy(backbone)
    assert torch.equal(other(**given).sample, said)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.zero_()
    assert torch.equal(other(**given).sample, said) and torch.equal(backbone(**given).sample, plain)
    plug.remove()
    assert torch.equal(other(**given).sample, said) and torch.equal(backbone(**given).sample, plain)


def test_a_call_that_fails_leaves_nothing() -> None:
    backbone, given = unet(), inputs()
    tuned = moved(rt.adapt(backbone, small("bypass")))
    with tuned.plug():
        said = backbone(**given).sample
        with pytest.raises(RuntimeError):
            backbone(**{**given, "sample": torch.randn(2, 3, 8, 8)})
        assert torch.equal(backbone(**given).sample, said)
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_offloaded_weights() -> None:
    """Weights that come for a call and go again, as a pipeline that offloads has them."""
    from accelerate import cpu_offload

    backbone, given = unet(), inputs()
    tuned = moved(rt.adapt(backbone, small("bypass")))
    tuned.add_adapter("b", small("res-tuning"))
    moved(tuned).set_adapter(["default", "b"])
    said = tuned(**given).sample
    cpu_offload(backbone, execution_device=torch.device("cpu"))
    assert backbone.conv_in.weight.is_meta  # type: ignore[union-attr]
    with tuned.plug(), torch.no_grad():
        torch.testing.assert_close(backbone(**given).sample, said)


def test_refusals(tmp_path: Any) -> None:
    with pytest.raises(MethodError, match="denoises"):
        rt.adapt(unet(), "bypass", num_classes=3)
    with pytest.raises(MethodError, match="denoises"):
        rt.adapt(unet(), "bypass-grid2")
    with pytest.raises(MethodError, match="Ladder needs a head"):
        rt.adapt(unet(), "lst")
    with pytest.raises(MethodError, match="neither labels="):
        rt.adapt(unet(), "bypass")(**inputs(), labels=torch.zeros(2))
    with pytest.raises(MethodError, match="runs over its decoder"):
        rt.adapt(unet(), rt.Bypass(over="stages"))
    rt.adapt(unet(), "bypass").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="with other weights"):
        other = unet()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        rt.Tuned.from_pretrained(other, tmp_path)
    with pytest.raises(CheckpointError, match="made for"):
        rt.Tuned.from_pretrained(pixart(), tmp_path)


@pytest.fixture(scope="module")
def sd15() -> nn.Module:
    """Stable Diffusion 1.5's U-Net, described: its shapes without its weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("full", 859_520_964),
        ("lora", 9_964_800),
        ("adapter", 2_510_080),
        ("prefix", 4_992_000),
        ("prompt", 1_248_000),
        ("res-tuning", 2_535_040),
        ("bypass", 3_057_005),
    ],
)
def test_table_6(sd15: nn.Module, method: str, parameters: int) -> None:
    tuned = rt.adapt(sd15, method)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == parameters
    tuned.unload()


def test_xl() -> None:
    with torch.device("meta"):
        xl = diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    sites = find_sites(xl)
    assert len(sites.blocks) == 70 and len(sites.stems) == 4
    for method in METHODS:
        rt.adapt(xl, method).unload()
