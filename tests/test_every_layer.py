"""Side paths that read every layer, against their formulas in numpy and torch's own attention; masks, components."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adapt, plain_features, shake
from tiny import HIERARCHIES, TINY
from torch import Tensor
from torch.nn import functional as F

import restuning as rt
from restuning.backbones.load import describe_backbone
from restuning.cli.main import main
from restuning.data import load_task
from restuning.data.objective import objective
from restuning.errors import MethodError, RestuningError
from restuning.features.bank import Bank, FromFeatures
from restuning.training.components import Components, top
from restuning.utils.profiling import saved_bytes

VIT, BERT, GEMMA = TINY["timm-vit"], TINY["bert"], TINY["gemma3"]
QUERY = rt.BypassQuery(width=8, stages=2, queries=3, heads=2)
ATTENTION = rt.BypassAttention(width=8, stages=2, heads=2)
PATHS = {
    "query": QUERY,
    "query, gated": rt.BypassQuery(width=8, stages=3, queries=2, heads=4, readout="gated"),
    "query alone": rt.BypassQuery(width=8, stages=1, queries=1, heads=1, readout="none"),
    "query, components": rt.BypassQuery(width=8, stages=2, queries=3, heads=2, components=5),
    "query, fixed": rt.BypassQuery(width=8, stages=2, queries=3, heads=2, fixed=True),
    "attention": ATTENTION,
    "attention, gated": rt.BypassAttention(width=8, stages=3, heads=4, readout="gated"),
    "attention alone": rt.BypassAttention(width=8, stages=1, heads=1, readout="none"),
}


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def attended(a: Any, q: Tensor, kv: Tensor, mask: Tensor, order: Tensor | None = None) -> Tensor:
    """torch's own attention with the same weights."""
    weight, bias = torch.cat([a.q.weight, a.kv.weight]), torch.cat([a.q.bias, a.kv.bias])
    q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    own = (a.q.in_features, a.heads, weight, bias, None, None, False, 0.0, a.proj.weight, a.proj.bias)
    out, _ = F.multi_head_attention_forward(q, kv, kv, *own, key_padding_mask=~mask, attn_mask=order)
    return out.transpose(0, 1)


def written_out(side: Any, features: tuple[Tensor, ...], prefix: int, mask: Tensor, causal: bool) -> Tensor:
    """What the head reads, by the formulas of the docstrings."""
    t = [normed(x) for x in features]
    runs = np.array_split(np.arange(len(t)), len(side.attentions))
    fixed = side.stages.components is not None
    bases = [side.stages.basis(i) if fixed else torch.eye(x.shape[-1]) for i, x in enumerate(t)]
    inputs = [sum(t[i] @ bases[i].to(t[i]) @ side.stages.down[i] for i in run) for run in runs]

    def pooled(x: Tensor) -> list[Tensor]:
        mean = torch.stack([row[prefix:][kept[prefix:]].mean(0) for row, kept in zip(x, mask, strict=True)])
        return [x[:, 0], mean] if prefix else [mean]

    if hasattr(side, "queries"):
        q = side.queries.expand(len(t[0]), -1, -1)
        for attention, g in zip(side.attentions, inputs, strict=True):
            g = attention.norm_kv(g)
            q = q + attended(attention, attention.norm(q), g, mask)
        out = side.norm(q).flatten(1)
    else:
        s: Any = 0
        n = t[0].shape[1]
        order = torch.ones(n, n).triu(1).bool() if causal else None
        for attention, g in zip(side.attentions, inputs, strict=True):
            u = s + g
            v = attention.norm(u)
            s = u + attended(attention, v, v, mask, order)
        s = side.norm(s)
        out = s[range(len(s)), mask.sum(1) - 1] if causal else torch.cat(pooled(s), -1)
    if side.readout is None:
        return out
    summaries = [pooled(x) for x in t]
    if side.readout.gate is None:
        read = [0.3 * layer[i] for i in range(len(summaries[0])) for layer in summaries]
    else:
        gates = side.readout.gate.view(len(t), len(summaries[0]), -1)
        parts = range(len(summaries[0]))
        read = [sum(g[i] * layer[i] for g, layer in zip(gates, summaries, strict=True)) for i in parts]
    return torch.cat([*read, out], -1)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean", "timm-dinov2-registers", "bert", "gemma3"])
def test_paths_are_their_formulas(name: str, path: Any) -> None:
    """Outputs and gradients; with prefix tokens, with padding, in the order of a decoder."""
    tiny = TINY[name]
    tuned = shake(adapt(tiny, path, dtype=torch.float64))
    inputs = tiny.inputs(dtype=torch.float64)
    features = plain_features(tiny, tuned.backbone, inputs)
    mask = inputs.get("attention_mask", torch.ones(features[0].shape[:2])).bool()
    adapter = tuned.adapters["default"]
    prefix = tuned.sites.info.grid or 0
    expected = adapter.head(written_out(adapter.side, features, prefix, mask, name == "gemma3"))
    torch.testing.assert_close(tuned(**inputs), expected, rtol=1e-9, atol=1e-9)
    parameters = list(adapter.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (tuned(**inputs), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean", "bert", "gemma3"])
def test_linear_all_is_linear_in_the_normalised_features(name: str, gated: bool) -> None:
    tiny = TINY[name]
    tuned = shake(adapt(tiny, rt.LinearAll(gated), dtype=torch.float64))
    inputs = tiny.inputs(dtype=torch.float64)
    features = plain_features(tiny, tuned.backbone, inputs)
    mask = inputs.get("attention_mask", torch.ones(features[0].shape[:2])).double().numpy()
    first = tuned.sites.info.grid or 0
    layers = []
    for x in (f.numpy() for f in features):
        t = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        mean = (t * mask[..., None])[:, first:].sum(1) / mask[:, first:].sum(1, keepdims=True)
        layers.append([t[:, 0], mean] if first else [mean])
    if gated:
        gate = tuned.adapters["default"].side.readout.gate.detach().numpy().reshape(len(layers), len(layers[0]), -1)
        read = [sum(g[i] * layer[i] for g, layer in zip(gate, layers, strict=True)) for i in range(len(layers[0]))]
    else:
        read = [0.3 * layer[i] for i in range(len(layers[0])) for layer in layers]
    head = tuned.adapters["default"].head
    expected = np.concatenate(read, -1) @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(tuned(**inputs).detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    assert all(x.shape[1] == len(layers[0]) for x in tuned.features(**inputs).layers.values()), (
        "no more is kept of a layer"
    )


@pytest.mark.parametrize("path", [QUERY, ATTENTION], ids=["query", "attention"])
def test_padding_on_either_side_and_of_any_value_is_never_seen(path: Any) -> None:
    tuned = shake(adapt(GEMMA, path, dtype=torch.float64)).eval()
    ids = torch.randint(3, 50, (1, 5))
    alone = tuned(input_ids=ids)
    for left, right in ((0, 3), (2, 0), (1, 2)):
        padded = F.pad(ids, (left, right), value=7)
        mask = F.pad(torch.ones_like(ids), (left, right))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = tuned(input_ids=padded, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(out, alone, rtol=1e-6, atol=1e-6)


def test_a_decoders_tokens_see_none_that_come_after() -> None:
    """The states of the first tokens are those of the text that ends there."""
    tuned = shake(adapt(GEMMA, ATTENTION, None, torch.float64)).eval()
    ids = torch.randint(3, 50, (2, 6))
    side = tuned.adapters["default"].side
    features = tuned.features(input_ids=ids).map(lambda x: x[:, :4])
    torch.testing.assert_close(side(features)[:, -8:], tuned(input_ids=ids[:, :4])[:, -8:])


@pytest.mark.parametrize("path", [QUERY, ATTENTION, rt.LinearAll()], ids=["query", "attention", "linear"])
@pytest.mark.parametrize("name", ["timm-convnext", "timm-resnet", "timm-swin"])
def test_over_stages_of_any_shape(name: str, path: Any) -> None:
    """A path over stages reads a grid of cells, of whatever maps: the same, whoever pools them."""
    tiny = HIERARCHIES[name]
    tuned = shake(adapt(tiny, path, dtype=torch.float64))
    sites = tuned.sites
    features = tuned.features(**tiny.inputs(dtype=torch.float64))
    assert [x.shape[2] for x in features.layers.values()] == [
        sites.features[stage].out_features for stage in sites.stages
    ]
    assert {x.shape[1] for x in features.layers.values()} == {1 if isinstance(path, rt.LinearAll) else 49}
    if "swin" not in name:
        wide = tuned(torch.randn(2, 3, 32, 64, dtype=torch.float64))
        assert wide.shape == (2, 4) and wide.isfinite().all()


@pytest.mark.parametrize("path", [QUERY, ATTENTION], ids=["query", "attention"])
def test_a_stem_reads_the_pixels(path: Any) -> None:
    from dataclasses import replace

    tuned = shake(adapt(VIT, replace(path, stem=True)))
    x = torch.randn(2, 3, 16, 16)
    features = tuned.features(x)
    torch.testing.assert_close(features.pixels, x)
    other = tuned.from_features(replace(features, pixels=x + 1))
    assert not torch.allclose(other, tuned(x)), "what the stem reads is part of the output"
    stem = tuned.adapters["default"].side.stem
    assert stem(torch.randn(2, 3, 16, 48), 12).shape == (2, 12, 8), "the patches of an oblong are an oblong"


@pytest.mark.parametrize("path", [QUERY, ATTENTION], ids=["query", "attention"])
def test_components_keep_less_for_backward(path: Any) -> None:
    from dataclasses import replace

    size = {}
    for components in (None, 4):
        tuned = adapt(VIT, replace(path, components=components), 3).train()
        size[components] = saved_bytes(lambda t=tuned: t(**VIT.inputs(16)).sum(), tuned.parameters())
    tokens = 16 * 5 * 4  # images, tokens, bytes
    assert size[None] - size[4] == 3 * tokens * (32 - 4), "three layers"


@pytest.mark.parametrize("dims", [(0, None), (1, None), (0, 0), (None, 0), (2, 1)], ids=str)
def test_attention_of_many_is_that_of_each(dims: Any) -> None:
    """torch's own, slice by slice, and its gradients, whichever of rows and tokens is shared; with padding."""
    from restuning.side.attending import attend

    rows, keys, values = (torch.randn(2, m, 6, dtype=torch.float64) for m in (4, 7, 7))
    where = (dims[0], dims[1], dims[1])
    inputs = [
        t if d is None else torch.stack([t, -2 * t, t + 1], d) for t, d in zip((rows, keys, values), where, strict=True)
    ]
    for t in inputs:
        t.requires_grad_()
    seen = torch.arange(7) < torch.tensor([[7], [4]])
    for mask in (None, seen):
        out = torch.vmap(attend, in_dims=(*where, None))(*inputs, mask)
        slices = [[t if d is None else t.select(d, i) for t, d in zip(inputs, where, strict=True)] for i in range(3)]
        masked = None if mask is None else mask[:, None]
        expected = torch.stack([F.scaled_dot_product_attention(*s, masked, scale=1.0) for s in slices])
        torch.testing.assert_close(out, expected)
        seed = torch.randn_like(out)
        for a, b in zip(*(torch.autograd.grad(o, inputs, seed) for o in (out, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_tasks_with_fixed_projections_share_what_they_attend_to() -> None:
    """The same projections in every task; a stack holds them, and works on the tokens, once."""
    from restuning.model.stack import Stack

    path = rt.BypassQuery(width=8, stages=2, queries=3, heads=2, fixed=True, components=6)
    tuned = rt.Tuned(VIT.backbone(torch.float64))
    for name in ("a", "b", "c"):
        tuned.add_adapter(name, path, 4)
    shake(tuned)
    sides = [tuned.adapters[name].side for name in "abc"]
    assert all(torch.equal(x, y) for s in sides for x, y in zip(s.buffers(), sides[0].buffers(), strict=True))
    assert not any("stages" in name for name, _ in tuned.adapters.named_parameters())
    tuned.set_adapter(["a", "b", "c"])
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        together = tuned.eval()(x)
    stack = tuned.stacks[0].stack
    assert isinstance(stack, Stack) and len(stack.common) == 6, "a basis and a projection of each layer"
    for name, y in together.items():
        tuned.set_adapter(name)
        torch.testing.assert_close(tuned(x), y, rtol=1e-9, atol=1e-10)


# ---- components


def test_components_are_the_top_eigenvectors() -> None:
    x = torch.randn(200, 12, dtype=torch.float64) @ torch.diag(torch.linspace(3, 0.1, 12, dtype=torch.float64))
    basis = top(x.T @ x, 5).double().numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-6)
    _, _, vt = np.linalg.svd(x.numpy())
    np.testing.assert_allclose(basis @ basis.T, vt[:5].T @ vt[:5], atol=1e-5)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bank") / "pca"
    data = ["--data", "digits", "--train-size", "60", "--test-size", "20", "--quiet"]
    assert main(["bank", *data, "--tokens", "pca:12", "--out", str(out)]) == 0
    return out


def reads(bank: Bank, method: Any) -> FromFeatures:
    """A method on what is left of the backbone beside a bank."""
    tuned = bank.tuned(describe_backbone("restuning-micro"))
    tuned.add_adapter("default", bank.fitted(method), 10)
    bank.accepts(tuned)
    if bank.components is not None:
        tuned.adapter("default").set_components(bank.components.bases)
    shake(tuned)
    if bank.components is not None:  # they are fixed: nothing shakes them
        tuned.adapter("default").set_components(bank.components.bases)
    return FromFeatures(tuned)


@pytest.mark.parametrize("method", ["bypass-query", "bypass-attention", "linear-all", "linear-all-gated"])
def test_a_bank_of_components_is_live(bank: Path, method: str, tmp_path: Path) -> None:
    """Outputs and gradients of what reads the bank, and of the same adapter on the backbone, saved and loaded."""
    opened = Bank(bank)
    away = reads(opened, rt.METHODS[method])
    away.tuned.save_pretrained(tmp_path)
    live = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), tmp_path)
    assert rt.count(live) == rt.count(away.tuned)
    from restuning.data import Preprocess

    task, preprocess = load_task("digits", train_size=60, test_size=20), Preprocess.from_dict(opened.preprocessing)
    pixels = torch.stack([preprocess(task.train.item(i)) for i in (3, 30, 59)])
    features, _ = opened.rows("train").fetch([3, 30, 59])
    a, b = away(features), live(pixels)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    a.square().sum().backward()
    b.square().sum().backward()
    pairs = zip(away.tuned.adapters.named_parameters(), live.adapters.parameters(), strict=True)
    for (name, p), q in pairs:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_components_come_from_a_file(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another data set's; fitted again, they are the same to the bit; of another backbone or count, refused."""
    file = bank / "components.safetensors"
    run = ["bank", "--data", "sprites:count", "--train-size", "20", "--test-size", "10", "--out"]
    assert main([*run, str(tmp_path / "other"), "--tokens", f"pca:12:{file}", "--dtype", "float16"]) == 0
    said = capsys.readouterr().err
    opened = Bank(tmp_path / "other")
    kept = sum(x.nbytes for x in opened.rows("train").fetch([0])[0].tensors()) // 2
    assert said.startswith(f"{kept:,} bytes an item"), "what is said before is what is kept"
    for layer, basis in Components.load(file).bases.items():
        assert torch.equal(basis, opened.components.bases[layer])
    for tokens, words in {
        f"pca:13:{file}": "12 components of a layer: expected 13",
        f"pca:12:{bank / 'manifest.json'}": "holds no components",
        "pca:": "expected pca:K or pca:K:FILE",
        "pca:many": "expected pca:K or pca:K:FILE",
    }.items():
        assert main([*run, str(tmp_path / "wrong"), "--tokens", tokens, "--quiet"]) == 2
        assert words in capsys.readouterr().err
    wider = tmp_path / "wider.safetensors"
    wider.write_bytes(file.read_bytes())
    with pytest.raises(RestuningError, match="components of 13 layers of widths"):
        Components({i: torch.eye(7) for i in range(13)}).check({0: 8}, "a file")


def test_what_a_bank_of_components_cannot_serve(bank: Path) -> None:
    opened = Bank(bank)
    for method in (rt.Bypass(), rt.BypassQuery(components=5), rt.BypassQuery(grid=2)):
        with pytest.raises(RestuningError, match="holds 12 components of each layer's tokens"):
            reads(opened, method)


def test_tokens_in_int8(tmp_path: Path) -> None:
    """Every token within half a step of its own scale; a path reads them as any tokens."""
    data = ["--data", "digits", "--train-size", "20", "--test-size", "10", "--quiet", "--tokens"]
    assert main(["bank", *data, "all", "--out", str(tmp_path / "all")]) == 0
    assert main(["bank", *data, "int8", "--out", str(tmp_path / "int8")]) == 0
    (plain, _), (coarse, _) = (Bank(tmp_path / name).rows("train").fetch(range(20)) for name in ("all", "int8"))
    for x, y in zip(plain.tensors(), coarse.tensors(), strict=True):
        step = x.abs().amax(-1, keepdim=True) / 127
        assert ((x - y).abs() <= 0.6 * step + 1e-6).all()
    sizes = [sum(s.bytes for s in Bank(tmp_path / name).shards) for name in ("all", "int8")]
    assert sizes[1] < 0.3 * sizes[0]
    assert reads(Bank(tmp_path / "int8"), rt.BypassQuery())(coarse).shape == (20, 10)


def test_a_path_that_begins_with_components_of_its_data(tmp_path: Path) -> None:
    """Trained live, it has the components that a bank of the same data has."""
    (tmp_path / "method.json").write_text(json.dumps({"kind": "bypassquery", "components": 12}))
    data = ["--data", "digits", "--train-size", "60", "--test-size", "20", "--quiet"]
    run = ["--method", str(tmp_path / "method.json"), "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *data, *run]) == 0
    assert main(["bank", *data, "--tokens", "pca:12", "--out", str(tmp_path / "bank")]) == 0
    tuned = rt.Tuned.from_pretrained(rt.load_backbone("restuning-micro"), tmp_path / "run")
    for i, basis in Bank(tmp_path / "bank").components.bases.items():
        torch.testing.assert_close(tuned.adapters["default"].side.stages.basis(i), basis)


def test_a_sweep_reads_components(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Points side by side; the winner is what `train --bank` gives, and is evaluated on the backbone."""
    methods = ["linear-all", "bypass-query"]
    grid = ["--lr", "0.003", "--epochs", "2", "--seeds", "1", "--label-smoothing", "0.1", "--json"]
    assert main(["sweep", "--bank", str(bank), "--method", *methods, *grid, "--out", str(tmp_path / "sweep")]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    run = ["--bank", str(bank), "--method", "bypass-query", "--lr", "0.003", "--epochs", "2", "--seed", "1", "--quiet"]
    assert main(["train", *run, "--label-smoothing", "0.1", "--json", "--out", str(tmp_path / "run")]) == 0
    alone, score = json.loads(capsys.readouterr().out), found["bypass-query"]["test_score"]
    assert alone["test_accuracy"] == pytest.approx(score, abs=5.1)
    assert main(["evaluate", str(tmp_path / "sweep" / "bypass-query-seed1"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(
        found["bypass-query"]["test_score"], abs=5.1
    )


# ---- settings, and the loss


def test_settings_that_make_no_sense() -> None:
    for make, words in {
        lambda: rt.BypassQuery(width=10): r"BypassQuery\(width=10\): expected a multiple of its 4 heads",
        lambda: rt.BypassQuery(queries=0): r"queries=0\): expected a whole number",
        lambda: rt.BypassAttention(readout="some"): "expected full, gated or none",
        lambda: rt.BypassAttention(components=0): r"components=0\): expected a whole number",
        lambda: rt.BypassQuery(stem=1): "expected true or false",
        lambda: rt.LinearAll(gated=1): "expected true or false",
        lambda: adapt(BERT, rt.BypassQuery(stem=True)): "a stem reads images",
        lambda: adapt(BERT, rt.BypassQuery(grid=2)): "grid of patches",
        lambda: adapt(VIT, QUERY, pool="mean"): r"pool='mean': this method reads every layer in a way of its own",
        lambda: adapt(BERT, QUERY, kind="per-token"): "labels per token",
        lambda: rt.Mix((QUERY, rt.Bypass())): "several side paths",
    }.items():
        with pytest.raises(MethodError, match=words):
            make()


def test_smoothed_labels() -> None:
    """As torch has them; and classes that are not there (−inf) have no share."""
    logits, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 5, (7,))
    loss = objective(smoothing=0.2).loss
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.2))
    wider = F.pad(logits, (0, 3), value=-torch.inf).requires_grad_()
    torch.testing.assert_close(loss(wider, labels), loss(logits, labels))
    loss(wider, labels).backward()
    assert wider.grad is not None and wider.grad.isfinite().all()
    for asked in ({"kind": "regression"}, {"weights": torch.ones(5)}):
        with pytest.raises(RestuningError, match="label smoothing under"):
            objective(**asked, smoothing=0.1)
    with pytest.raises(RestuningError, match=r"label_smoothing is 1.0: expected a number below 1"):
        from restuning.training.config import TrainConfig

        TrainConfig(label_smoothing=1.0)


def test_little_is_kept_of_tokens_that_are_attended_to() -> None:
    """Of each stage its normalised tokens alone: neither what was normalised nor a weight of the attention."""
    b, n, w, rows = 4, 50, 16, 40
    from restuning.side.attending import attend, normalised_tokens

    g, q = torch.randn(b, n, w, requires_grad=True), torch.randn(b, rows, w, requires_grad=True)
    kept = saved_bytes(lambda: (lambda t: attend(q, t, t))(normalised_tokens(g)), [g, q])
    assert kept == 4 * b * n * (w + 1), "and a scale of each token"
