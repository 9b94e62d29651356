"""Every family of backbones tried: what is found, and which methods are right on it, by one small random model each."""

import copy
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restuning.backbones.found_tail import copied
from restuning.backbones.inputs import inputs_of
from restuning.backbones.sites import Sites, find_sites, tower_of
from restuning.backbones.trace import quiet, tensors
from restuning.backbones.zoo import Unbuilt, build
from restuning.errors import RestuningError, TowersError, line
from restuning.hooks.attention import merged, on_call
from restuning.hooks.law import attach, group_by_site
from restuning.hooks.points import as_tokens
from restuning.hooks.taps import tap
from restuning.methods.named import find_method
from restuning.methods.spec import Method, Residual, resize
from restuning.model.tuned import Tuned, adapt
from restuning.side.bypass import Bypass
from restuning.side.features import FeatureRequest
from restuning.tuners import Adapter, Lora, PrefixTuning

METHODS = ("linear", "bypass", "block adapter", "lora", "res-tuning", "prefix")

RIGHT = "right"


@dataclass
class Checked:
    """One family: how it was found (`table`, `trace`, or `refused` and `why`), and each method: `right`, or `refused:
    …` with the reason, or `wrong: …`, which no family may be."""

    library: str
    family: str
    kind: str
    found: str = "refused"
    why: str = ""
    model: str = ""
    parameters: int = 0
    tower: str = ""
    anatomy: str = ""
    share: float | None = None
    sure: str = ""
    blocks: int = 0
    stages: int = 0
    pool: str = ""
    notes: Sequence[str] = ()
    methods: dict[str, str] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        return asdict(self)


ROWS = 2
"""Rows of the batches that a method is tried on: other than those of the trace."""


class _Wrong(Exception):
    """A check that does not hold."""


def check_family(library: str, family: str, kind: str) -> Checked:
    """One family; see `Checked`."""
    try:
        backbone = build(library, family)
    except Unbuilt as error:
        return Checked(library, family, kind, found="not built", why=str(error))
    return check_backbone(backbone, Checked(library, family, kind))


def check_backbone(backbone: nn.Module, found: Checked | None = None) -> Checked:
    """One model: how it is found, and which methods are right on it.

    Args:
        backbone: in eval mode; it is as it was afterwards.
        found: what is known of it already.
    """
    found = found or Checked("", type(backbone).__name__, "")
    found.parameters = sum(p.numel() for p in backbone.parameters())
    found.model = type(backbone).__name__
    try:
        try:
            sites = find_sites(backbone)
        except TowersError as error:
            found.tower = error.towers[0]
            backbone = tower_of(backbone, found.tower)
            sites = find_sites(backbone)
        inputs = {k: v[:ROWS] if isinstance(v, Tensor) else v for k, v in _inputs(backbone).items()}
        own, before = _hooked(backbone, sites, inputs)
    except RestuningError as error:
        found.why = str(error)
        return found
    except Exception as error:
        found.found, found.why = "wrong", f"{type(error).__name__}: {line(error)}"
        return found
    found.found = "trace" if sites.found else "table"
    found.anatomy, found.pool, found.blocks = sites.anatomy.name, sites.pool, len(sites.blocks)
    found.stages = len(sites.stages)
    if sites.found:
        found.share, found.sure, found.notes = sites.found.share, sites.found.sure, sites.found.notes
    for method in METHODS:
        found.methods[method] = _outcome(partial(_check, method, backbone, sites, inputs, own, before))
    return found


def _outcome(check: Callable[[], None]) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            check()
        except RestuningError as error:
            return f"refused: {error}"
        except Exception as error:  # of whatever kind: a family must be right or refused in words
            return f"wrong: {type(error).__name__}: {line(error)}"
    return RIGHT


def _inputs(backbone: nn.Module) -> dict[str, Any]:
    """The first inputs that the backbone takes, and no cache, which some write to in place (RWKV)."""
    last: Exception | None = None
    more = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
    for inputs in ({**one, **more} for one in inputs_of(backbone)):
        try:
            with quiet(backbone):
                backbone(**inputs)
            return inputs
        except Exception as error:
            last = error
    raise RestuningError(f"no input is known for {type(backbone).__name__}: {line(last) if last else ''}")


def _check(
    name: str, backbone: nn.Module, sites: Sites, inputs: Mapping[str, Tensor], own: Sequence[Tensor], before: Any
) -> None:
    """All that must hold of a method on a backbone. Raises RestuningError where it is refused, _Wrong and others.

    own, before: its features and its output, by hooks of the check's own.
    """
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    flags = [p.requires_grad for p in backbone.parameters()]
    hooks = _hooks(backbone)
    spec = _spec(name, sites)
    bare = adapt(backbone, spec, anatomy=sites, pool=None)
    try:
        if name == "linear":
            _features_are_hooks(backbone, sites, inputs)
            with torch.no_grad():
                read = _read_by_classifier(backbone, inputs, before)
                _pooled_is_its_own(bare(**inputs), before, read, bare.adapter_config().pool, sites)
        if name not in ("linear", "bypass", "prefix"):
            with torch.no_grad():
                after = bare.features(**inputs).last
            want = _view(bare, own[-1])
            loose = any(site.weight for site in bare.adapter("default").sites.values())
            _require(_equal(after, want, loose), "the output at initialisation is not the backbone's")
        if name == "prefix":
            _attention_is_understood(backbone, sites, inputs, before)
        if name == "bypass":
            _features_carry_no_gradient(bare, inputs)
    finally:
        bare.unload()
    tuned = adapt(backbone, spec, 3, anatomy=sites)
    try:
        _shake(tuned)
        if name == "block adapter":
            _law_holds(tuned, sites, inputs, own)
        out = tuned(**inputs)
        out.float().square().sum().backward()
        _require(all(p.grad is None for p in backbone.parameters()), "the backbone was given a gradient")
        learns = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tuned.adapters.parameters()]
        _require(
            any(learns[:-2]) if name != "linear" else all(learns), "nothing is learnt: the tuners have no gradient"
        )
        steady = torch.equal(tuned(**inputs), out)  # some kernels round otherwise from call to call
        with tempfile.TemporaryDirectory() as folder:
            tuned.save_pretrained(folder)
            tuned.unload()
            again = Tuned.from_pretrained(backbone, folder, anatomy=sites)
            new = again(**inputs)  # with autograd too: some models compute otherwise without
            same = torch.equal(new, out) or (not steady and _equal(new, out))
            _require(same, "a saved and loaded adapter gives another output")
            again.unload()
    finally:
        tuned.unload()
    with quiet(backbone):
        pairs = zip(tensors(before), tensors(backbone(**inputs)), strict=True)
    _require(all(torch.equal(a, b) for a, b in pairs), "the backbone's output is another after unload")
    now = backbone.state_dict()
    _require(all(torch.equal(value, now[key]) for key, value in state.items()), "a weight has changed")
    _require(flags == [p.requires_grad for p in backbone.parameters()], "requires_grad is another after unload")
    _require(_hooks(backbone) == hooks, "hooks are left after unload")


def _hooks(backbone: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise _Wrong(why)


def _spec(name: str, sites: Sites) -> Method:
    if name == "bypass":
        return Bypass(Adapter(4), Adapter(4))
    if name == "block adapter":
        return Residual({"block": Adapter(4)})
    if name == "prefix":
        return Residual({"attention": PrefixTuning(3)})
    if name == "lora":
        return Residual({"all-linear": Lora(2)})
    return resize(find_method(name, sites.anatomy.family), 4)


def _shake(tuned: Tuned) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))


def _hooked(backbone: nn.Module, sites: Sites, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Any]:
    """What comes out of every block, by hooks of our own, and the output. The first entry is what goes in."""
    outs: dict[str, list[Any]] = {}
    ins: list[Any] = []
    start = sites.layer(0)
    with ExitStack() as stack:
        for path in {*sites.blocks}:

            def after(m: nn.Module, args: Any, out: Any, path: str = path) -> None:
                outs.setdefault(path, []).append(copied(out))

            stack.callback(backbone.get_submodule(path).register_forward_hook(after).remove)

        def first_in(m: nn.Module, args: Any, kwargs: Any) -> None:
            ins.append(next(tensors((args, kwargs))).clone())

        def first_out(m: nn.Module, args: Any, out: Any) -> None:
            ins.append(next(tensors(out)).clone())

        module = backbone.get_submodule(start.path)
        handle = (
            module.register_forward_pre_hook(first_in, with_kwargs=True)
            if start.side == "in"
            else module.register_forward_hook(first_out)
        )
        stack.callback(handle.remove)
        with quiet(backbone):
            out = backbone(**inputs)
    nth: dict[str, int] = {}
    layers = [_tokens_of(ins[start.call or 0], sites, 0)]
    for i, path in enumerate(sites.blocks):
        k = nth.get(path, 0)
        nth[path] = k + 1
        value = outs[path][k if len(outs[path]) > k else -1]
        layers.append(_tokens_of(next(tensors(value)), sites, i + 1))
    return layers, copy.deepcopy(out)


def _tokens_of(x: Tensor, sites: Sites, layer: int) -> Tensor:
    """As tokens (b, n, d), by the width that the sites name."""
    if x.ndim != 4:
        return x[:, None] if x.ndim == 2 else x
    width = sites.features[layer].out_features
    last = x.shape[-1] == width and (x.shape[1] != width or sites.layer(layer).last)
    return x.flatten(1, 2) if last else x.flatten(2).transpose(1, 2)


def _features_are_hooks(backbone: nn.Module, sites: Sites, inputs: Mapping[str, Tensor]) -> None:
    """Of one and the same forward, to the bit."""
    with tap(backbone, sites, FeatureRequest(tuple(range(len(sites.blocks) + 1)))) as taps:
        own, _ = _hooked(backbone, sites, inputs)
    for layer, (a, b) in enumerate(zip(taps.features.tensors(), own, strict=True)):
        _require(torch.equal(a, b), f"feature {layer} is not what hooks of the check's own see")


def _view(tuned: Tuned, x: Tensor) -> Tensor:
    return tuned.request.tokens(x)


def _equal(a: Tensor, b: Tensor, loose: bool = False) -> bool:
    """To the bit, or to a few roundings: some kernels round otherwise from call to call, as memory lies. loose: where
    torch's own multi-head attention is written out."""
    scale = float(b.abs().max()) + 1e-6
    return torch.equal(a, b) or torch.allclose(a, b, rtol=1e-6, atol=(1e-4 if loose else 1e-6) * scale)


def _read_by_classifier(backbone: nn.Module, inputs: Mapping[str, Any], before: Any) -> Tensor | None:
    """What the linear map reads whose output is the model's own, if there is one."""
    if not isinstance(before, Tensor) or before.ndim != 2:
        return None
    read: list[Tensor] = []

    def see(m: nn.Module, args: Any, out: Tensor) -> None:
        if out.shape == before.shape and _equal(out, before, loose=True):
            read.append(args[0].clone())

    with ExitStack() as stack:
        for module in backbone.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(see).remove)
        with quiet(backbone):
            backbone(**inputs)
    return read[-1] if read else None


def _pooled_is_its_own(pooled: Tensor, out: Any, read: Tensor | None, pool: str, sites: Sites) -> None:
    """The model's own pooled output, what its classifier reads, or the pooling that is named of its own last tokens."""
    wanted = [] if read is None else [read]
    if isinstance(out, Mapping):
        wanted += [t.flatten(1) for t in (out.get("pooler_output"),) if isinstance(t, Tensor)]
        out = out.get("last_hidden_state", next(tensors(out)))
    first = next(t for t in tensors(out) if t.is_floating_point())
    if first.ndim == 2 or first.shape[2:] == (1, 1):
        wanted.append(first.flatten(1))
    else:
        tokens = as_tokens(first)
        skip = sites.prefix if tokens.shape[1] > sites.prefix else 0
        by_name = {"cls": tokens[:, 0], "last": tokens[:, -1], "mean": tokens[:, skip:].mean(1)}
        if tokens.shape[-1] != pooled.shape[-1] and first.ndim == 4:
            by_name = {"mean": first.flatten(1, 2).mean(1)}
        wanted += [by_name[pool]] if pool in by_name else []
    same = any(
        w.shape == pooled.shape and torch.allclose(w, pooled, rtol=1e-3, atol=1e-4 * float(w.abs().max() + 1e-6))
        for w in wanted
    )
    _require(same, f"the pooled feature ({pool}) is not the model's own")


def _features_carry_no_gradient(tuned: Tuned, inputs: Mapping[str, Tensor]) -> None:
    with torch.enable_grad():
        features = tuned.features(**inputs)
    _require(not any(x.requires_grad for x in features.tensors()), "features of a side path carry a gradient")


def _law_holds(tuned: Tuned, sites: Sites, inputs: Mapping[str, Tensor], own: Sequence[Tensor]) -> None:
    """The first block's output is its own plus what the tuner adds, which is worked out here."""
    backbone = tuned.backbone
    site = next(s for s in sites.at("block") if s.block == 0)
    tuner = dict(tuned.adapter("default").inside)[site]
    with torch.no_grad():
        layers = [0, 1] if site.reads.side == "in" else [1, 1]
        x, y = (own[layer] for layer in layers)
        if site.reads.side == "in" and sites.layer(0).side != "in":
            return
        if x.shape[1] != y.shape[1]:
            return  # pooled on the way: the tuner's own tests say how
        want = y + tuner(x, y)
        inside = group_by_site((site, "", tuner) for site, tuner in tuned.adapter("default").inside if site.block == 0)
        with quiet(backbone), attach(backbone, sites, inside), tap(backbone, sites, FeatureRequest((1,))) as taps:
            backbone(**inputs)
    _require(
        torch.allclose(taps.features.last, want, rtol=1e-4, atol=1e-5),
        "OP(x) + tuner(x) is not what the first block gives",
    )


def _attention_is_understood(backbone: nn.Module, sites: Sites, inputs: Mapping[str, Tensor], before: Any) -> None:
    """softmax(QKᵀ)V, computed again from what was seen of it, leaves the output as it was."""
    with ExitStack() as stack:
        for site in sites.at("attention"):
            stack.enter_context(on_call(backbone.get_submodule(site.reads.path), lambda call: merged(call, [])))
        with quiet(backbone):
            out = backbone(**inputs)
    for a, b in zip(tensors(before), tensors(out), strict=True):
        if a.is_floating_point():
            _require(torch.allclose(a, b, rtol=1e-3, atol=1e-4), "the attention is not what was seen of it")
