"""What PEFT tests of its LoRA, of ours: custom models of every kind of map, and small BERT, Llama and ViT.

`docs/peft-tests.md` lists the behaviours; `test_the_page_lists_these` holds it to this file.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import MORE, TINY, Q
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import restuning as rt
from restuning.errors import CheckpointError, MethodError, RestuningError, SiteError

PAGE = Path(__file__).parent.parent / "docs" / "peft-tests.md"


class Residual(nn.Module):
    """x + f(x), f by its kind; maps have the names that PEFT's custom models give them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "mha":
            self.norm, self.mha = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        elif kind.startswith("conv"):
            self.conv2d = nn.Conv2d(16, 16, 3, padding=1, groups=4 if kind == "conv groups" else 1)
            self.norm = nn.BatchNorm2d(16)
        elif kind == "Conv1D":
            self.lin0, self.lin1 = Conv1D(32, 16), Conv1D(16, 32)
        else:
            self.lin0, self.lin1 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mha":
            y = self.norm(x)
            return x + self.mha(y, y, y, need_weights=False)[0]
        if self.kind.startswith("conv"):
            return x + self.relu(self.norm(self.conv2d(x)))
        return x + self.lin1(self.relu(self.lin0(x)))


class Custom(nn.Module):
    """Three blocks of a kind; no configuration, no base class."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        conv = kind.startswith("conv")
        self.emb = nn.Embedding(50, 16) if kind == "emb" else nn.Conv2d(3, 16, 1) if conv else nn.Linear(8, 16)
        self.layers = nn.ModuleList(Residual(kind) for _ in range(3))
        if kind == "tied":
            self.layers[2].lin0.weight = self.layers[0].lin0.weight  # type: ignore[union-attr]
        self.norm = nn.BatchNorm2d(16) if conv else nn.LayerNorm(16)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.emb(x) * scale
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@dataclass(frozen=True)
class Case:
    """A model, what it reads, which maps are tuned by their names here and in PEFT."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    target: str
    peft: tuple[str, ...] | None
    """None: PEFT has no LoRA there that merges, or another."""
    custom: bool = False

    def backbone(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return model.to(dtype)

    def adapt(
        self, lora: Any = None, name: str = "default", dtype: torch.dtype = torch.float32, **more: Any
    ) -> rt.Tuned:
        backbone, inputs = self.backbone(dtype), self.batch(dtype)
        sites = rt.find_sites(backbone, inputs=inputs) if self.custom else None
        torch.manual_seed(1)
        spec = more.pop("spec", None) or rt.Residual({self.target: lora or rt.Lora(4, 8, 0.0)})
        return rt.adapt(backbone, spec, name=name, anatomy=sites, pool="mean", **more)

    def same(self, a: Tensor, b: Tensor) -> None:
        """To the bit, but for torch's own attention, whose kernel rounds otherwise than its parts do."""
        close(a, b) if self.target == "qkv" else torch.testing.assert_close(a, b, rtol=0, atol=0)

    def blocks(self) -> list[int]:
        """Those that hold a map that is tuned."""
        return sorted({s.block for s in self.adapt().adapters["default"].sites.values() if s.block is not None})

    def batch(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        torch.manual_seed(2)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs().items()}


def _custom(kind: str, target: str, peft_targets: tuple[str, ...] | None) -> Case:
    def inputs() -> dict[str, Tensor]:
        if kind == "emb":
            return {"x": torch.randint(0, 50, (3, 6))}
        return {"x": torch.randn(3, 3, 6, 6) if kind.startswith("conv") else torch.randn(3, 6, 8)}

    return Case(lambda: Custom(kind), inputs, target, peft_targets, custom=True)


def _tiny(name: str, target: str, peft_targets: tuple[str, ...]) -> Case:
    return Case(({**TINY, **MORE})[name].build, ({**TINY, **MORE})[name].inputs, target, peft_targets)


CASES = {
    "MLP": _custom("mlp", "lin0", ("lin0",)),
    "Conv1D of transformers": _custom("Conv1D", "lin0", ("lin0",)),
    "Conv2d": _custom("conv", "conv2d", ("conv2d",)),
    "Conv2d, groups": _custom("conv groups", "conv2d", None),
    "Embedding": _custom("emb", "emb", ("emb",)),
    "MultiheadAttention": _custom("mha", "qkv", None),
    "BERT": _tiny("bert", "query", ("query",)),
    "Llama": _tiny("llama", "q_proj", ("q_proj",)),
    "ViT": _tiny("hf-vit", Q, (Q,)),
}


def shaken(tuned: rt.Tuned, name: str | None = None) -> rt.Tuned:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, adapter in tuned.adapters.items():
            for p in adapter.parameters() if name in (None, key) else ():
                p.add_(0.2 * torch.randn(p.shape, generator=draw).to(p.dtype))
    return tuned


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def tensor_of(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out["last_hidden_state"]
    return found


BEHAVIOURS: dict[str, Callable[[Case, Path], None]] = {}


def behaviour(words: str) -> Callable[[Callable[[Case, Path], None]], Callable[[Case, Path], None]]:
    def put(check: Callable[[Case, Path], None]) -> Callable[[Case, Path], None]:
        BEHAVIOURS[words] = check
        return check

    return put


@behaviour("an untrained adapter leaves the output as it is")
def _(case: Case, folder: Path) -> None:
    for lora in (rt.Lora(4), rt.Lora(4, 8, rank_stabilized=True)):
        tuned = case.adapt(lora)
        with torch.no_grad():
            before = tuned.adapters["default"].tuners
            out = tuned(**case.batch())
            assert len(before)
            with tuned.disable_adapter():
                tuned(**case.batch())
            bare = rt.adapt(case.backbone(), "linear", pool="mean", anatomy=tuned.sites)
            case.same(out, bare(**case.batch()))


@behaviour("output, merged weights and number of parameters are PEFT's own")
def _(case: Case, folder: Path) -> None:
    if case.peft is None:
        return
    tuned = shaken(case.adapt())
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(case.peft))
    other: Any = peft.get_peft_model(case.backbone(), config).eval()
    layers = {n.removeprefix("base_model.model."): m for n, m in other.named_modules() if hasattr(m, "lora_A")}
    adapter, used = tuned.adapters["default"], set()
    with torch.no_grad():
        for place, site in adapter.sites.items():
            mine: Any = adapter.tuners[place]
            theirs: Any = layers[site.reads.path]
            used.add(site.reads.path)
            embeds = "default" in theirs.lora_embedding_A
            a = theirs.lora_embedding_A["default"] if embeds else theirs.lora_A["default"].weight
            b = theirs.lora_embedding_B["default"] if embeds else theirs.lora_B["default"].weight
            a.copy_(mine.a), b.copy_(mine.b)
    assert used == {*layers}
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == other.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        want = tensor_of(other(**case.batch()))
        merged = tuned.merge_and_unload()
        close(tensor_of(merged(**case.batch())), want)
        theirs_merged = other.merge_and_unload().state_dict()
        for key, value in merged.state_dict().items():
            close(value, theirs_merged[key])


@behaviour("what is saved is the adapter alone, and is loaded to the bit")
def _(case: Case, folder: Path) -> None:
    tuned = shaken(case.adapt())
    tuned.save_pretrained(folder)
    assert {f.name for f in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == tuned.adapters["default"].state_dict().keys()
    again = rt.Tuned.from_pretrained(case.backbone(), folder, anatomy=tuned.sites if case.custom else None)
    with torch.no_grad():
        assert torch.equal(again(**case.batch()), tuned(**case.batch()))


@behaviour("of several adapters the one that is named is saved, and is loaded beside others")
def _(case: Case, folder: Path) -> None:
    tuned = case.adapt(name="one")
    tuned.add_adapter("two", rt.Residual({case.target: rt.Lora(2)}), pool="mean")
    shaken(tuned)
    tuned.save_pretrained(folder, "one")
    tuned.load_adapter(folder, "three")
    assert tuned.active_adapters == ("three",) and {*tuned.adapters} == {"one", "two", "three"}
    with torch.no_grad():
        three = tuned(**case.batch())
        tuned.set_adapter("two")
        two = tuned(**case.batch())
        tuned.set_adapter("one")
        assert torch.equal(tuned(**case.batch()), three) and not torch.allclose(two, three)


@behaviour("a merged model is the tuned one, has the classes and names of the plain one, and no tuner")
def _(case: Case, folder: Path) -> None:
    tuned = shaken(case.adapt())
    plain = case.backbone()
    with torch.no_grad():
        want = tuned(**case.batch())
        merged = tuned.merge_and_unload()
        assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
        assert merged.state_dict().keys() == plain.state_dict().keys()
        close(rt.adapt(merged, "linear", pool="mean", anatomy=tuned.sites)(**case.batch()), want)


@behaviour("a merge in place is undone to the bit")
def _(case: Case, folder: Path) -> None:
    tuned = shaken(case.adapt())
    before = {k: v.clone() for k, v in tuned.backbone.state_dict().items()}
    with torch.no_grad():
        want = tuned(**case.batch())
        tuned.merge_adapter()
        close(tuned(**case.batch()), want)
        tuned.unmerge_adapter()
        assert all(torch.equal(v, before[k]) for k, v in tuned.backbone.state_dict().items())
        assert torch.equal(tuned(**case.batch()), want)


@behaviour("a merge of weights that are not finite is refused, and changes nothing")
def _(case: Case, folder: Path) -> None:
    tuned = shaken(case.adapt())
    before = {k: v.clone() for k, v in tuned.backbone.state_dict().items()}
    with torch.no_grad():
        next(tuned.adapters["default"].tuners.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="finite"):
        tuned.merge_adapter(safe_merge=True)
    assert all(torch.equal(v, before[k]) for k, v in tuned.backbone.state_dict().items())


@behaviour("several adapters are merged as their sum")
def _(case: Case, folder: Path) -> None:
    tuned = case.adapt(name="one")
    tuned.add_adapter("two", rt.Residual({case.target: rt.Lora(2, dropout=0.0)}), pool="mean")
    shaken(tuned)
    own = {k: v.clone() for k, v in tuned.backbone.state_dict().items()}
    changes = []
    for names in ("one", "two", ("one", "two")):
        tuned.merge_adapter(names)
        changes.append({k: v - own[k] for k, v in tuned.backbone.state_dict().items() if v.is_floating_point()})
        tuned.unmerge_adapter()
    one, two, both = changes
    for key in both:
        torch.testing.assert_close(both[key], one[key] + two[key], rtol=1e-4, atol=1e-5)
    assert any(bool(v.any()) for v in both.values())


@behaviour("a disabled adapter is not there, before training and after, and is there again")
def _(case: Case, folder: Path) -> None:
    tuned = case.adapt()
    with torch.no_grad():
        plain = tensor_of(case.backbone()(**case.batch()))
    for _ in range(2):
        with torch.no_grad():
            out = tuned(**case.batch())
            with tuned.disable_adapter():
                case.same(tensor_of(tuned(**case.batch())), plain)
            case.same(tuned(**case.batch()), out)
        shaken(tuned)


@behaviour("active, inactive and unknown adapters are deleted, kept, refused")
def _(case: Case, folder: Path) -> None:
    tuned = case.adapt(name="one")
    tuned.add_adapter("two", rt.Residual({case.target: rt.Lora(2)}), pool="mean")
    shaken(tuned)
    with torch.no_grad():
        two = tuned(**case.batch())
        tuned.delete_adapter("one")
        assert torch.equal(tuned(**case.batch()), two) and {*tuned.adapters} == {"two"}
        with pytest.raises(MethodError, match="no adapter named 'one'"):
            tuned.delete_adapter("one")
        tuned.delete_adapter("two")
        with pytest.raises(MethodError, match="no adapter is active"):
            tuned(**case.batch())


@behaviour("unload gives the plain model back")
def _(case: Case, folder: Path) -> None:
    tuned = shaken(case.adapt())
    with torch.no_grad():
        tuned(**case.batch())
        plain = tuned.unload()
        assert torch.equal(tensor_of(plain(**case.batch())), tensor_of(case.backbone()(**case.batch())))
        assert not [n for n, _ in plain.named_parameters() if "tuner" in n or "lora" in n]


@behaviour("a weighted sum of adapters, weights below zero too")
def _(case: Case, folder: Path) -> None:
    tuned = case.adapt(name="one")
    tuned.add_adapter("two", rt.Residual({case.target: rt.Lora(4, dropout=0.0)}), pool="mean")
    shaken(tuned)
    with torch.no_grad():
        tuned.set_adapter("one")
        one = tuned(**case.batch())
        tuned.add_weighted_adapter(["one", "two"], [1.0, 0.0], "same", "cat")
        close(tuned(**case.batch()), one)
        tuned.add_weighted_adapter(["one", "one"], [1.0, -1.0], "none", "svd")
        bare = rt.adapt(case.backbone(), "linear", pool="mean", anatomy=tuned.sites)
        close(tuned(**case.batch()), bare(**case.batch()))


@behaviour("rows of one batch have adapters of their own, or none")
def _(case: Case, folder: Path) -> None:
    tuned = case.adapt(name="one")
    tuned.add_adapter("two", rt.Residual({case.target: rt.Lora(4, 8, 0.0)}), pool="mean")
    shaken(tuned)
    with torch.no_grad():
        alone = {}
        for name in ("one", "two"):
            tuned.set_adapter(name)
            alone[name] = tuned(**case.batch())
        rows = tuned(**case.batch(), adapter_names=["two", "one", "two"])
        for i, name in enumerate(("two", "one", "two")):
            close(rows[i], alone[name][i])
        with pytest.raises(MethodError, match="2 names for a batch of 3"):
            tuned(**case.batch(), adapter_names=["two", "one"])


@behaviour("half precision: float32 adapters by default, the backbone's dtype on request, autocast")
def _(case: Case, folder: Path) -> None:
    exact = shaken(case.adapt())
    for dtype in (torch.bfloat16, torch.float16):
        tuned = shaken(case.adapt(dtype=dtype))
        assert {p.dtype for p in tuned.adapters.parameters()} == {torch.float32}
        narrow = case.adapt(dtype=dtype, autocast_adapter_dtype=False)
        assert {p.dtype for p in narrow.adapters.parameters()} == {dtype}
        with torch.no_grad():
            out = tuned(**case.batch(dtype))
            assert narrow(**case.batch(dtype)).isfinite().all()
        torch.testing.assert_close(out.float(), exact(**case.batch()), rtol=0.1, atol=0.15)
    with torch.no_grad():
        want = exact(**case.batch())
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(exact(**case.batch()).float(), want, rtol=0.1, atol=0.15)


@behaviour("names and classes in the backbone stay; what is trained is in a tree of its own")
def _(case: Case, folder: Path) -> None:
    tuned, plain = case.adapt(name="mine"), case.backbone()
    assert [n for n, _ in tuned.backbone.named_modules()] == [n for n, _ in plain.named_modules()]
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith("adapters.mine.") for n in trained)


@behaviour("only what is active is trained; the backbone stays, to the bit")
def _(case: Case, folder: Path) -> None:
    tuned = case.adapt(name="one")
    tuned.add_adapter("two", rt.Residual({case.target: rt.Lora(2)}), pool="mean")
    shaken(tuned)
    before = {k: v.detach().clone() for k, v in tuned.state_dict().items()}
    flags = {n: p.requires_grad for n, p in tuned.named_parameters()}
    tuned.set_adapter("one")
    assert flags == {n: p.requires_grad for n, p in tuned.named_parameters()}
    tuned.train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned(**case.batch()).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in tuned.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and changed == {k for k in before if k.startswith("adapters.one.")}


@behaviour("training makes the loss less")
def _(case: Case, folder: Path) -> None:
    tuned = case.adapt()
    optimizer = torch.optim.Adam(tuned.adapters.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (tuned(**case.batch()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@behaviour("layers are chosen by their number, and left out by name")
def _(case: Case, folder: Path) -> None:
    if case.target == "emb":
        return
    every, n = case.adapt().adapters["default"].sites.values(), case.blocks()[0]
    first = case.adapt(spec=rt.Residual({case.target: rt.Lora(2)}, blocks=(n,))).adapters["default"].sites.values()
    assert [s.reads.path for s in first] == [s.reads.path for s in every if s.block == n]
    path = next(iter(first)).reads.path
    rest = case.adapt(spec=rt.Residual({case.target: rt.Lora(2)}, exclude=(path,))).adapters["default"].sites.values()
    assert [s.reads.path for s in rest] == [s.reads.path for s in every if s.reads.path != path]


@behaviour("ranks and factors of their own for some layers")
def _(case: Case, folder: Path) -> None:
    if case.target == "emb":
        return
    m, n = case.blocks()[:2]
    settings = ((m, rt.Lora(2)), (n, rt.Lora(3, 6)))
    tuned = case.adapt(spec=rt.Mix(tuple(rt.Residual({case.target: lora}, blocks=(i,)) for i, lora in settings)))
    ranks = {s.block: len(tuned.adapters["default"].tuners[k].a) for k, s in tuned.adapters["default"].sites.items()}
    assert ranks == {m: 2, n: 3}
    tuned.save_pretrained(folder)
    rt.Tuned.from_pretrained(case.backbone(), folder, anatomy=tuned.sites if case.custom else None)


@behaviour("a target that is not there is refused, with what is")
def _(case: Case, folder: Path) -> None:
    with pytest.raises(SiteError, match="no operation 'nowhere'"):
        case.adapt(spec=rt.Residual({"nowhere": rt.Lora(2)}))


@behaviour("a whole module is trained in a copy, saved and loaded")
def _(case: Case, folder: Path) -> None:
    names = [n for n, m in case.backbone().named_modules() if "Norm" in type(m).__name__ and "layer" in n]
    name = (names or ["layers.2.lin1"])[-1]
    tuned = case.adapt(spec=rt.Residual({case.target: rt.Lora(2)}, modules_to_save=(name,)))
    shaken(tuned)
    tuned.save_pretrained(folder)
    again = rt.Tuned.from_pretrained(case.backbone(), folder, anatomy=tuned.sites if case.custom else None)
    with torch.no_grad():
        assert torch.equal(again(**case.batch()), tuned(**case.batch()))
        plain = rt.adapt(case.backbone(), "linear", pool="mean", anatomy=tuned.sites)
        assert not torch.allclose(plain(**case.batch()), tuned(**case.batch()))


@behaviour("dropout is on in training and off in evaluation")
def _(case: Case, folder: Path) -> None:
    if case.target == "emb":
        return  # nothing is dropped of words
    tuned = shaken(case.adapt(rt.Lora(4, dropout=0.5)))
    batch = case.batch()
    with torch.no_grad():
        assert torch.equal(tuned(**batch), tuned(**batch))
        tuned.train()
        assert not torch.equal(tuned(**batch), tuned(**batch))


@behaviour("arguments of the forward go through, a dict of inputs too")
def _(case: Case, folder: Path) -> None:
    tuned = shaken(case.adapt())
    with torch.no_grad():
        out = tuned(**case.batch())
        assert torch.equal(tuned(case.batch()), out)
        if case.custom:
            assert not torch.allclose(tuned(**case.batch(), scale=2.0), out)
            with pytest.raises(TypeError, match="nothing"):
                tuned(**case.batch(), nothing=1)
        else:
            assert torch.equal(tuned(**case.batch(), output_hidden_states=True), out)


@behaviour("a copy of the model is apart from it")
def _(case: Case, folder: Path) -> None:
    tuned = shaken(case.adapt())
    with torch.no_grad():
        other, out = copy.deepcopy(tuned), tuned(**case.batch())
        assert torch.equal(other(**case.batch()), out)
        shaken(other)
        assert torch.equal(tuned(**case.batch()), out) and not torch.equal(other(**case.batch()), out)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("words", BEHAVIOURS)
def test_behaviour(words: str, name: str, tmp_path: Path) -> None:
    BEHAVIOURS[words](CASES[name], tmp_path)


LINEAR = ("MLP", "Conv1D of transformers", "BERT", "Llama", "ViT")


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("lora", [rt.Lora(4, 8, 0.0, dora=True), rt.Lora(4, 8, 0.0, init="pissa")])
def test_dora_and_pissa_begin_as_the_plain_model_and_merge(name: str, lora: rt.Lora) -> None:
    case = CASES[name]
    tuned = case.adapt(lora)
    with torch.no_grad():
        bare = rt.adapt(case.backbone(), "linear", pool="mean", anatomy=tuned.sites)
        close(tuned(**case.batch()), bare(**case.batch()))
        shaken(tuned)
        want = tuned(**case.batch())
        merged = tuned.merge_and_unload()
        close(rt.adapt(merged, "linear", pool="mean", anatomy=tuned.sites)(**case.batch()), want)


@pytest.mark.parametrize("name", ["BERT", "Llama", "ViT"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    case = CASES[name]
    tuned = shaken(case.adapt())
    grads = []
    for on in (False, True):
        if on:
            tuned.gradient_checkpointing_enable()
        tuned.train()
        tuned.zero_grad()
        tuned(**case.batch()).square().sum().backward()
        grads.append([p.grad.clone() for p in tuned.adapters.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_embedded_inputs_are_read(name: str) -> None:
    case = CASES[name]
    tuned, batch = shaken(case.adapt()), case.batch()
    words: Any = tuned.backbone.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        ids = batch.pop("input_ids")
        out = tuned(inputs_embeds=words(ids), **batch)
        close(out, tuned(input_ids=ids, **batch))


REFUSED: dict[str, Callable[[], Any]] = {
    "DoRA beside convolutions": lambda: CASES["Conv2d"].adapt(rt.Lora(2, dora=True)),
    "DoRA beside embeddings": lambda: CASES["Embedding"].adapt(rt.Lora(2, dora=True)),
    "a model without blocks": lambda: rt.find_sites(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), inputs={"input": torch.randn(3, 8)}
    ),
    "tied weights, both tuned, merged": lambda: _custom("tied", "lin0", None).adapt().merge_adapter(),
    "a second merge": lambda: [t := CASES["MLP"].adapt(), t.merge_adapter(), t.merge_adapter()],
    "disable_adapter while merged": lambda: [
        t := CASES["MLP"].adapt(),
        t.merge_adapter(),
        t.disable_adapter().__enter__(),
    ],
    "an adapter of a name that is there": lambda: CASES["MLP"].adapt().add_adapter("default", "linear"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_differs_is_refused_in_words(words: str) -> None:
    with pytest.raises(RestuningError) as error:
        REFUSED[words]()
    assert str(error.value) and "\n" not in str(error.value)


def test_the_page_lists_these() -> None:
    """Every behaviour that is tried here has its line, and the counts are those of this file."""
    text = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\| (.+?) \| (?:the same|differs)", text, re.MULTILINE)
    assert [words for words in (*BEHAVIOURS, *REFUSED) if words not in lines] == []
    assert f"{len(BEHAVIOURS)} behaviours" in text and f"{len(CASES)} models" in text
