"""Tuning and generation on a small pipeline of Stable Diffusion's kind, built here."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from two import in_two

import restuning as rt
from restuning.cli.main import main
from restuning.errors import CheckpointError, DataError, MethodError, RestuningError
from restuning.methods.named import find_method
from restuning.methods.spec import resize
from restuning.training.config import TrainConfig

diffusers = pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402

from restuning.diffusion.base import (  # noqa: E402
    check_prompts,
    denoiser_of,
    latents_of,
    load_base,
    sampler_of,
    scheduler_of,
    texts_of,
)
from restuning.diffusion.generation import Asked, draw, painted, pictures, plug  # noqa: E402
from restuning.diffusion.training import DiffusionRun, Noised, execute, held_out_loss  # noqa: E402

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (120, 120, 120)}


def pipeline(kind: str = "sd", prediction: str = "epsilon") -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    from test_denoise import unet

    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{c}</w>" for c in ("a", "square", *COLOURS)),
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    words += [f"{c}</w>" for c in "bcdefghijklmnopqrstuvwxyz"]
    merges, vocabulary = [], dict.fromkeys(words)
    for word in ("square", *COLOURS):  # byte pairs that build the words from the left
        left = word[0]
        for i, letter in enumerate(word[1:], 1):
            right = letter + ("</w>" if i == len(word) - 1 else "")
            merges.append((left, right))
            vocabulary |= {left: None, right: None}
            left += right
            vocabulary[left] = None
    ids = {word: i for i, word in enumerate(vocabulary)}
    with tempfile.TemporaryDirectory() as folder:  # by its files: arguments differ from version to version
        (Path(folder) / "vocab.json").write_text(json.dumps(ids))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=8)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(ids),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()
    noise = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=noise,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def larger() -> Any:
    """Stable Diffusion XL's kind: two encoders, a pooled text, sizes beside the timestep."""
    from test_denoise import unet
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    small = pipeline()
    config = {**small.text_encoder.config.to_dict(), "projection_dim": 12}
    return diffusers.StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        tokenizer=small.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval(),
        tokenizer_2=small.tokenizer,
        unet=unet(
            cross_attention_dim=48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
        ),
        scheduler=small.scheduler,
        add_watermarker=False,
    )


def transformer() -> Any:
    """PixArt's kind: a T5 encoder, whose padding is masked, and a transformer that says variances too."""
    from test_denoise import pixart
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "square", *COLOURS]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=120
    )
    config = T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    small = pipeline()
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(config).eval(),
        vae=small.vae,
        transformer=pixart(),
        scheduler=diffusers.DPMSolverMultistepScheduler.from_config(small.scheduler.config),
    )


@pytest.mark.parametrize("make", [larger, transformer])
def test_other_pipelines(make: Any, data: str, tmp_path: Path) -> None:
    """The same pictures as the pipeline's own, at initialisation; trained, saved, painted."""
    make().save_pretrained(tmp_path / "base")
    pipe = load_base(str(tmp_path / "base"))
    pipe.scheduler = scheduler_of(pipe, "dpm")
    call: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16}
    call |= {"clean_caption": False, "use_resolution_binning": False} if make is transformer else {}
    call["generator"] = torch.Generator().manual_seed(1)
    theirs = pipe("a red square", **call).images[0]
    tuned = rt.adapt(denoiser_of(pipe), resize(find_method("bypass", "unet"), 4))
    ours = draw(pipe, tuned, Asked(("a red square",), seeds=(1,), size=16, steps=3, sampler="dpm"))[0]
    assert list(ours.getdata()) == list(theirs.getdata())
    run = run_of(str(tmp_path / "base"), data, "bypass", prompts=("blue",))
    result = execute(run, tmp_path / "run", progress=False)
    assert math.isfinite(result["loss"]) and (tmp_path / "run" / "samples-0001.png").is_file()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("squares")
    rows = []
    for i, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (20, 18), colour).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": [f"a {name} square", name]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return f"captions:{folder}"


def run_of(base: str, data: str, method: str = "res-tuning", **more: Any) -> DiffusionRun:
    training = {
        "epochs": 2,
        "lr": 1e-2,
        "batch_size": 2,
        "warmup_epochs": 0,
        "schedule": "constant",
        **more.pop("training", {}),
    }
    return DiffusionRun(base, data, method, size=16, width=3, training=TrainConfig(**training), **more)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prefix", "prompt", "res-tuning", "bypass", "scedit"])
def test_every_method_learns_and_comes_back(method: str, base: str, data: str, tmp_path: Path) -> None:
    rate = 1e-3 if method == "full" else 1e-2
    run = run_of(base, data, method, training={"epochs": 6, "lr": rate}, drop=0.0)
    result = execute(run, tmp_path / "run", progress=False)
    losses = [epoch["loss"] for epoch in result["epochs"]]
    assert all(math.isfinite(loss) for loss in losses)
    pipe = load_base(base)
    from restuning.diffusion.latents import Latents

    latents = Latents(tmp_path / "run" / "latents")
    from restuning.diffusion.training import Denoiser

    linear = Denoiser(pipe, rt.adapt(denoiser_of(pipe), "linear"), 16)
    plain = held_out_loss(linear, latents, scheduler_of(pipe, "ddim"), draws=4)
    linear.tuned.unload()
    tuned = rt.Tuned.from_pretrained(denoiser_of(pipe), tmp_path / "run")
    after = held_out_loss(Denoiser(pipe, tuned, 16), latents, scheduler_of(pipe, "ddim"), draws=4)
    assert after < plain


@pytest.mark.parametrize(
    "more", [{}, {"prior_prompt": "a square", "prior_images": 3}, {"training": {"ema": 0.9, "accumulate": 2}}]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    more: dict[str, Any], base: str, data: str, tmp_path: Path, monkeypatch: Any
) -> None:
    import restuning.diffusion.training as training

    run = run_of(base, data, "bypass", flip=True, **more)
    execute(run, tmp_path / "whole", progress=False)

    class Killed(Exception):
        pass

    def killed(self: Noised, i: int) -> Any:
        if self.epoch == 1:
            raise Killed
        return original(self, i)

    original = training.Noised.__getitem__
    monkeypatch.setattr(training.Noised, "__getitem__", killed)
    with pytest.raises(Killed):
        execute(run, tmp_path / "killed", progress=False)
    monkeypatch.setattr(training.Noised, "__getitem__", original)
    with pytest.raises(RestuningError, match="continue it with --resume"):
        execute(run, tmp_path / "killed", progress=False)
    execute(run, tmp_path / "killed", resume=True, progress=False)
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_give_the_run_of_one(base: str, data: str, tmp_path: Path) -> None:
    argv = ["train-diffusion", "--base", base, "--data", data, "--method", "res-tuning", "--width", "3", "--size", "16"]
    argv += ["--lr", "0.01", "--epochs", "2", "--batch-size", "2", "--prior-prompt", "a square", "--prior-images", "3"]
    argv += ["--prompts", "a red square", "--quiet", "--json", "--out"]
    said = in_two("-m", "restuning.cli", *argv, str(tmp_path / "two"))
    assert said[1] == "" and json.loads(said[0])["processes"] == 2, "the first one speaks"
    assert main([*argv, str(tmp_path / "one")]) == 0
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 3e-4 for k in a), "Adam makes much of rounding"
    losses = [json.loads((tmp_path / name / "result.json").read_text())["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


@pytest.mark.parametrize("method", ["bypass", "res-tuning"])
def test_in_half_precision_with_checkpoints(method: str, base: str, data: str, tmp_path: Path) -> None:
    run = run_of(base, data, method, training={"precision": "bf16"}, gradient_checkpointing=True)
    plain = run_of(base, data, method)
    found, other = (execute(r, tmp_path / str(i), progress=False) for i, r in enumerate((run, plain)))
    assert found["loss"] == pytest.approx(other["loss"], rel=0.05)
    half = execute(run_of(base, data, method, training={"precision": "bf16"}), tmp_path / "half", progress=False)
    if method == "res-tuning":
        assert found["kept_bytes"] < half["kept_bytes"] < other["kept_bytes"]


def test_grids_show_what_is_kept(base: str, data: str, tmp_path: Path) -> None:
    run = run_of(base, data, training={"ema": 0.9, "lr": 0.1}, prompts=("red",))
    execute(run, tmp_path / "run", progress=False)
    pipe = load_base(base)
    tuned = rt.Tuned.from_pretrained(denoiser_of(pipe), tmp_path / "run")
    asked = Asked(("red",), size=16, steps=20)
    sheet = Image.open(tmp_path / "run" / "samples-0002.png")
    (image,) = draw(pipe, tuned, asked)
    left = sheet.width - 16 - 2
    assert sheet.crop((left, 0, left + 16, 16)).tobytes() == image.tobytes()
    (raw,) = draw(pipe, None, asked)
    assert raw.tobytes() != image.tobytes()


def test_few_prior_pictures_are_drawn_anew_each_time(base: str, data: str, tmp_path: Path) -> None:
    from restuning.data.captions import load_captions
    from restuning.diffusion.latents import keep_latents
    from restuning.diffusion.training import Both

    pipe, one = load_base(base), tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (16, 16), "red").save(one / "0.png")
    (one / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "red"}) + "\n")
    own, prior = (
        Noised(keep_latents(pipe, load_captions(spec), tmp_path / str(i), size=16), scheduler_of(pipe, "ddim"))
        for i, spec in enumerate((data, f"captions:{one}"))
    )
    drawn = [Both(own, prior)[i][0]["sample"] for i in range(4, 8)]
    assert len({x.numpy().tobytes() for x in drawn}) == 4


def test_latents_are_kept_for_the_same_pictures_and_encoders_alone(data: str, tmp_path: Path) -> None:
    from restuning.data.captions import load_captions
    from restuning.diffusion.latents import Latents, keep_latents, shard_of

    pipe, folder = larger(), Path(data.partition(":")[2])
    keep_latents(pipe, load_captions(data), tmp_path / "l", size=16)
    keep_latents(pipe, load_captions(f"captions:{folder.parent / '.' / folder.name}"), tmp_path / "l", size=16)
    before = (folder / "0.png").read_bytes()
    Image.new("RGB", (99, 70), "white").save(folder / "0.png")
    with pytest.raises(RestuningError, match="of other files: delete it"):
        keep_latents(pipe, load_captions(data), tmp_path / "l", size=16)
    (folder / "0.png").write_bytes(before)
    with torch.no_grad():
        for p in pipe.text_encoder_2.parameters():
            p.mul_(1.7)
    with pytest.raises(RestuningError, match="of other text encoders"):
        keep_latents(pipe, load_captions(data), tmp_path / "l", size=16)
    shard = shard_of(tmp_path / "l", "pictures", 0)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="delete it, and it is built again"):
        Latents(tmp_path / "l").picture(0)


def test_a_run_with_a_prior_goes_on_where_it_was_moved_to(
    base: str, data: str, tmp_path: Path, monkeypatch: Any
) -> None:
    import restuning.diffusion.training as training

    run = run_of(base, data, prior_prompt="a square", prior_images=2)
    monkeypatch.setattr(training, "fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        execute(run, tmp_path / "what?", progress=False)
    monkeypatch.undo()
    (tmp_path / "what?").rename(tmp_path / "moved")
    execute(run, tmp_path / "moved", resume=True, progress=False)
    assert (tmp_path / "moved" / "result.json").exists()


def test_targets(base: str, data: str, tmp_path: Path) -> None:
    """Noise, or velocity α ε − σ z, by numpy's arithmetic."""
    from restuning.data.captions import load_captions
    from restuning.diffusion.latents import keep_latents

    pipe = load_base(base)
    latents = keep_latents(pipe, load_captions(data), tmp_path, size=16)
    found = {}
    for prediction in ("epsilon", "v_prediction"):
        pipe.scheduler.register_to_config(prediction_type=prediction)
        scheduler = scheduler_of(pipe, "ddim")
        found[prediction] = Noised(latents, scheduler, seed=3)[1]
    (inputs, noise), (same, velocity) = found.values()
    assert torch.equal(inputs["sample"], same["sample"])
    alpha = scheduler.alphas_cumprod[inputs["timestep"]]
    z = (inputs["sample"] - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    torch.testing.assert_close(velocity, alpha.sqrt() * noise - (1 - alpha).sqrt() * z)
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(RestuningError, match="predicts 'sample'"):
        Noised(latents, scheduler_of(pipe, "ddim"))


def moved(pipe: Any, names: str = "a", method: str = "bypass") -> rt.Tuned:
    tuned = rt.Tuned(pipe.unet)
    for i, name in enumerate(names):
        tuned.add_adapter(name, resize(find_method(method, "unet"), 4))
        torch.manual_seed(i)
        with torch.no_grad():
            for p in tuned.adapters[name].parameters():
                p.add_(torch.randn_like(p) * 0.2)
    return tuned


@pytest.mark.parametrize("sampler", ["plms", "ddim", "dpm"])
def test_as_the_pipeline_paints(sampler: str, base: str) -> None:

    pipe = load_base(base)
    tuned = moved(pipe, method="res-tuning")
    asked = Asked(("a red square", "blue"), seeds=(3, 4), steps=4, sampler=sampler)
    pipe.scheduler = scheduler_of(pipe, sampler)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4, 3, 4)]
    prompts = ["a red square"] * 2 + ["blue"] * 2
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generators, "height": 16, "width": 16}
    assert [list(i.getdata()) for i in draw(pipe, None, asked)] == [
        list(i.getdata()) for i in pipe(prompts, **call).images
    ]
    with tuned.plug():
        generators = [torch.Generator().manual_seed(s) for s in (3, 4, 3, 4)]
        theirs = pipe(prompts, **{**call, "generator": generators}).images
    ours = draw(pipe, tuned, asked)
    assert [list(i.getdata()) for i in ours] == [list(i.getdata()) for i in theirs]
    assert [list(i.getdata()) for i in ours] != [list(i.getdata()) for i in draw(pipe, None, asked)]


def test_pictures_at_birth_and_after_a_round_trip(base: str, tmp_path: Path) -> None:
    pipe = load_base(base)
    asked = Asked(("a red square",), steps=3)
    plain = list(draw(pipe, None, asked)[0].getdata())
    for method in ("res-tuning", "bypass", "lora", "adapter", "scedit"):
        tuned = rt.adapt(pipe.unet, resize(find_method(method, "unet"), 4))
        assert list(draw(pipe, tuned, asked)[0].getdata()) == plain
        tuned.unload()
    tuned = moved(pipe)
    ours = list(draw(pipe, tuned, asked)[0].getdata())
    tuned.save_pretrained(tmp_path)
    tuned.unload()
    assert list(draw(pipe, None, asked)[0].getdata()) == plain != ours
    handle = plug(pipe, tmp_path)
    generator = torch.Generator().manual_seed(0)

    pipe.scheduler = scheduler_of(pipe, "plms")
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": generator, "height": 16, "width": 16}
    assert list(pipe("a red square", **call).images[0].getdata()) == ours
    handle.remove()
    assert list(draw(pipe, None, asked)[0].getdata()) == plain


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_several_bypasses_side_by_side(guidance: float, base: str) -> None:
    """Exact equals one after another; a trajectory that is shared is exact after one step, and near after more."""
    pipe = load_base(base)
    tuned = moved(pipe, "ab")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red square", "blue"]
    texts = texts_of(pipe, prompts if guidance == 1 else ["", "", *prompts])

    def latents(names: str, tuned: rt.Tuned, **more: Any) -> dict[str, torch.Tensor]:
        asked = Asked(("x",), guidance=guidance, **more)
        return painted(pipe, tuned, list(names), asked, noise, texts)

    calls: list[int] = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    together = latents("ab", tuned, steps=4)
    rows = 2 if guidance == 1 else 4
    assert calls[0] == rows and set(calls[1:]) == {2 * rows}
    for name in "ab":
        torch.testing.assert_close(together[name], latents(name, tuned, steps=4)[name], rtol=1e-4, atol=1e-4)
    for share in ("base-trajectory", "mean-trajectory"):
        one = latents("ab", tuned, steps=1, sampler="ddim", share=share)
        exact = latents("ab", tuned, steps=1, sampler="ddim")
        torch.testing.assert_close(one, exact, rtol=1e-4, atol=1e-4)
        calls.clear()
        several = latents("ab", tuned, steps=4, share=share)
        assert set(calls) == {rows}
        assert not torch.allclose(several["a"], together["a"]) and not torch.allclose(several["a"], several["b"])
    handle.remove()


def test_latents_are_those_of_the_pipeline(base: str) -> None:
    pipe = load_base(base)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = latents_of(pipe, pixels)
    found = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, found.mean * pipe.vae.config.scaling_factor)
    assert std is not None and mean.shape == std.shape == (2, 4, 8, 8)
    embeds, _ = pipe.encode_prompt(["a red square"], "cpu", 1, False)
    assert torch.equal(texts_of(pipe, ["a red square"])["encoder_hidden_states"], embeds)


# ---- how good pictures are


def test_distances_by_hand() -> None:
    """Against numpy: ‖μ − ν‖² + tr(C + D − 2 (C D)^½), and the unbiased polynomial MMD."""
    import numpy as np
    from scipy.linalg import sqrtm

    from restuning.diffusion.quality import distances

    random = np.random.default_rng(0)
    a, b = random.normal(size=(60, 5)), random.normal(size=(60, 5)) * 1.3 + 0.2
    found = distances(torch.tensor(a).float(), torch.tensor(b).float())
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert found["fid"] == pytest.approx(fid, rel=1e-4)

    def k(x: Any, y: Any) -> Any:
        return (x @ y.T / 5 + 1) ** 3

    n = len(a)
    within = sum((k(x, x).sum() - np.trace(k(x, x))) / (n * (n - 1)) for x in (a, b))
    assert found["kid"] == pytest.approx(within - 2 * k(a, b).mean(), rel=1e-4)


def test_scores_from_the_command_line(data: str, tmp_path: Path, capsys: Any) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor

    from restuning.diffusion.generation import Picture

    for i, (name, colour) in enumerate(COLOURS.items()):
        asked = Asked((f"a {name} square",))
        Picture(Image.new("RGB", (16, 16), colour), "", f"a {name} square", i, asked).save(tmp_path / "p" / f"{i}.png")
    call = ["score", str(tmp_path / "p"), "--real", data, "--features", "restuning-micro", "--json"]
    assert main(call) == 0
    near = json.loads(capsys.readouterr().out)
    assert near["pictures"] == near["real"] == 4 and abs(near["fid"]) < 0.1
    for file in (tmp_path / "p").glob("*.png"):
        Image.new("RGB", (16, 16), "white").save(file)
    assert main(call) == 0
    far = json.loads(capsys.readouterr().out)
    assert far["fid"] > near["fid"] and far["kid"] > near["kid"]
    config = CLIPConfig()
    config.text_config.update(
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 90}
    )
    config.vision_config.update(
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        }
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"shortest_edge": 16}
    crop = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=crop), pipeline().tokenizer).save_pretrained(
        tmp_path / "clip"
    )
    capsys.readouterr()
    assert "says nothing of its prompt" in said(capsys, *call, "--clip", str(tmp_path / "clip"))
    Picture(Image.new("RGB", (16, 16)), "", "a red square", 0, asked).save(tmp_path / "q" / "0.png")
    Picture(Image.new("RGB", (16, 16), "red"), "", "blue", 1, asked).save(tmp_path / "q" / "1.png")
    call[1] = str(tmp_path / "q")
    assert main([*call, "--clip", str(tmp_path / "clip")]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["clip_score"] <= 100
    assert "no CLIP model at" in said(capsys, *call, "--clip", str(tmp_path / "nothing"))
    call[call.index("restuning-micro")] = f"inception:{tmp_path / 'nothing.pth'}"
    assert "no Inception weights" in said(capsys, *call)


def test_inception_by_path(tmp_path: Path) -> None:
    """The published network, with weights from a file: torch-fidelity's own features of it."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from restuning.diffusion.quality import _net, seen

    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        empty = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "none")
    torch.manual_seed(0)
    state = {
        k: torch.randn(v.shape) * 0.02 if v.is_floating_point() else torch.tensor(0)
        for k, v in empty.state_dict().items()
    }
    state |= {k: v.abs() + 1 for k, v in state.items() if k.endswith("running_var")}
    torch.save(state, tmp_path / "inception.pth")
    features = seen(_net(f"inception:{tmp_path / 'inception.pth'}", None), [Image.new("RGB", (64, 64), "red")] * 2)
    assert features.shape == (2, 2048) and features.isfinite().all()


# ---- the command line


def said(capsys: Any, *args: str) -> str:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return str(error)


def test_from_the_command_line(base: str, data: str, tmp_path: Path, capsys: Any) -> None:
    common = [
        "--base",
        base,
        "--data",
        data,
        "--size",
        "16",
        "--width",
        "3",
        "--lr",
        "0.05",
        "--epochs",
        "2",
        "--batch-size",
        "2",
        "--quiet",
    ]
    for method in ("bypass", "full", "lora"):
        out = str(tmp_path / method)
        assert main(["train-diffusion", *common, "--method", method, "--prompts", "a red square", "--out", out]) == 0
        assert (tmp_path / method / "samples-0002.png").is_file()
        assert json.loads((tmp_path / method / "result.json").read_text())["parameters"]["head"] == 0
    runs = [str(tmp_path / m) for m in ("bypass", "full", "lora")]
    call = ["generate", *runs, "--base", base, "--plain", "--prompts", "a red square", "blue", "--seeds", "1", "2"]
    call += ["--steps", "2", "--out", str(tmp_path / "pictures"), "--grid", str(tmp_path / "grid.png")]
    assert main(call) == 0
    files = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(files) == 16
    assert len({Image.open(file).tobytes() for file in files if file.name.endswith("000-1.png")}) == 4
    held = Image.open(files[0]).text  # type: ignore[attr-defined]
    settings = json.loads(held["restuning"])
    assert settings["prompt"] == held["prompt"] and settings["guidance"] == 3.0 and settings["sampler"] == "plms"
    assert Image.open(tmp_path / "grid.png").height > 3 * 16
    assert "holds pictures" in said(capsys, *call)
    assert "of several adapters (base, bypass, full, lora)" in said(
        capsys, "score", str(tmp_path / "pictures"), "--real", data, "--features", "restuning-micro"
    )


def test_adapters_of_one_name_and_of_any(base: str, tmp_path: Path, monkeypatch: Any) -> None:
    """No picture takes another's place, and any folder can be named."""
    places = ["a/x", "c/x-2", "b/x", "base", "lr=0.1", "train"]
    for place in places:
        rt.adapt(pipeline().unet, resize(find_method("bypass", "unet"), 3)).save_pretrained(tmp_path / place)
    monkeypatch.chdir(tmp_path / "base")
    folders = [str(tmp_path / place) for place in places[:3]] + [".", *(str(tmp_path / p) for p in places[4:])]
    call = ["generate", *folders, "--base", base, "--plain", "--prompts", "red", "--steps", "1", "--size", "16"]
    assert main([*call, "--out", str(tmp_path / "p")]) == 0
    names = {file.name.removesuffix("-000-0.png") for file in (tmp_path / "p").iterdir()}
    assert names == {"base", "x", "x-2", "x-3", "base-2", "lr=0.1", "train"}


def test_a_plug_gives_the_pipeline_back_and_follows_its_precision(base: str, tmp_path: Path) -> None:
    pipe = load_base(base)
    tuned = rt.adapt(denoiser_of(pipe), "full")
    before = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1.0
    tuned.save_pretrained(tmp_path / "full")
    pipe = load_base(base)
    with pytest.raises(CheckpointError, match="other weights"):
        plug(load_base(base), _wider(tmp_path), tmp_path / "full")
    with plug(pipe, tmp_path / "full"):
        assert not torch.equal(pipe.unet.conv_out.bias, before["conv_out.bias"])
    assert all(torch.equal(x, before[name]) for name, x in pipe.unet.state_dict().items())
    moved(pipe).save_pretrained(tmp_path / "bypass")
    with plug(pipe, tmp_path / "bypass"):
        pipe.to(torch.bfloat16)
        assert pipe("red", num_inference_steps=1, height=16, width=16, output_type="pt").images.shape == (1, 3, 16, 16)


def test_bad_input(base: str, data: str, tmp_path: Path, capsys: Any) -> None:
    def train(*more: str, **changed: str) -> str:
        given = {"base": base, "data": data, "size": "16", "out": str(tmp_path / "out"), **changed}
        error = said(capsys, "train-diffusion", *(x for k, v in given.items() for x in (f"--{k}", v)), "--quiet", *more)
        assert not (tmp_path / "out").exists()
        return error

    assert "no such folder" in train(base=str(tmp_path / "nothing"))
    (tmp_path / "folder").mkdir()
    assert "has no model_index.json" in train(base=str(tmp_path / "folder"))
    assert "metadata.jsonl" in train(data=f"captions:{tmp_path / 'folder'}")
    assert "unknown method 'res-tunin' (did you mean 'res-tuning'?)" in train("--method", "res-tunin")
    assert "expected a multiple of 8" in train(size="20")
    long = tmp_path / "long"
    long.mkdir()
    Image.new("RGB", (16, 16)).save(long / "0.png")
    assert "the text encoder reads 8" in train("--truncate", "--prompts", "red " * 20)
    assert "the text encoder reads 8" in train("--truncate", "--prior-prompt", "red " * 20)
    assert "needs a head" in train("--method", "lst") and "nothing to train" in train("--method", "linear")
    assert "precision fp16" in train("--precision", "fp16")
    (long / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a red square " * 9}) + "\n")
    assert "the text encoder reads 8" in train(data=f"captions:{long}")
    (long / "0.png").write_bytes(b"no picture")
    assert "0.png" in train("--truncate", data=f"captions:{long}")
    run = tmp_path / "run"
    execute(run_of(base, data, "bypass", training={"epochs": 1}), run, progress=False)
    other = tmp_path / "other"
    pipe = pipeline()
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.mul_(1.5)
    pipe.save_pretrained(other)
    paint = ["--prompts", "a red square", "--out", str(tmp_path / "pictures")]
    assert "with other weights" in said(capsys, "generate", str(run), "--base", str(other), *paint)
    assert "the text encoder reads 8" in said(
        capsys, "generate", str(run), "--prompts", "red " * 20, "--out", str(tmp_path / "p")
    )
    assert "is asked for twice" in said(capsys, "generate", "--base", base, *paint, "--seeds", "1", "1")
    assert "is a folder" in said(capsys, "generate", "--base", base, *paint, "--grid", str(tmp_path))
    assert "at most 1000" in said(capsys, "generate", "--base", base, *paint, "--steps", "1001")
    assert "expected 1 or more" in said(capsys, "generate", "--base", base, *paint, "--guidance", "nan")
    assert "seeds" in said(capsys, "generate", "--base", base, *paint, "--seeds", str(10**25))
    assert "expected a multiple" in said(capsys, "generate", "--base", base, *paint, "--size", "0")
    run.joinpath("run.json").write_text("null")
    assert "is damaged" in said(capsys, "generate", str(run), *paint)
    assert not (tmp_path / "pictures").exists() and not (tmp_path / "p").exists()
    with pytest.raises(DataError, match="expected a multiple"):
        list(pictures(load_base(base), None, Asked(("red",), size=20)))
    with pytest.raises(DataError, match="has 22 tokens"):
        check_prompts(load_base(base), ["red " * 20])
    with pytest.raises(CheckpointError, match="made for"):
        plug(load_base(base), _wider(tmp_path))
    with pytest.raises(MethodError, match="denoises"):
        rt.adapt(pipeline().unet, "linear").compile()
    zero = pipeline()
    zero.scheduler.register_to_config(rescale_betas_zero_snr=True)
    with pytest.raises(RestuningError, match="expected ddim or dpm"):
        draw(zero, None, Asked(("red",), size=16, steps=2))
    assert sampler_of(zero) == "ddim" and sampler_of(pipeline()) == "plms"


def _wider(tmp_path: Path) -> Path:
    from test_denoise import unet

    wide: nn.Module = unet(block_out_channels=(32, 64, 96))
    rt.adapt(wide, "bypass").save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_no_room(base: str, data: str, tmp_path: Path, monkeypatch: Any) -> None:
    import restuning.diffusion.latents as latents

    monkeypatch.setattr(latents.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(RestuningError, match="no room for pictures"):
        execute(run_of(base, data), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
