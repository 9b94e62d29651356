"""One training step: bytes kept for backward, peak memory, seconds."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.auto import find
from restuning.backbones.quantised import bytes_of
from restuning.bench.limit import least_bytes
from restuning.bench.peers import PEERS, bound_loss
from restuning.bench.settings import Bench, Call, Measured, absent_peers, training_step, without_grad
from restuning.errors import MethodError, RestuningError, SiteError, line
from restuning.features.bank import FromFeatures
from restuning.methods.named import find_method
from restuning.methods.spec import side_of, with_components
from restuning.model.tuned import adapt
from restuning.training.components import Components
from restuning.utils.profiling import in_turn, peak_bytes, saved_by_module

BANKED = ", from components"
"""After the name of a method that reads components of a bank, not images."""

# ---- what is measured


def memory(settings: Bench) -> Measured:
    """One training step of each, in a fresh process for each round."""
    settings.load()  # a backbone that cannot be loaded is refused once, not by every process
    measured, threads = Measured(absent=absent_peers(settings)), torch.get_num_threads()
    for _ in range(settings.rounds):
        for name in (m for m in _named(settings) if m not in measured.absent):
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    found, measured.operations[name] = fresh.submit(cost, settings, name, threads).result()
            except (MethodError, SiteError) as error:
                measured.absent[name] = line(error)
            except BrokenProcessPool as error:
                raise RestuningError(f"the process that measured {name} was killed: too little memory?") from error
            else:
                units = measured.samples.setdefault(name, {unit: [] for unit in found})
                for unit, value in found.items():
                    units[unit].append(value)
    measured.against("full", "saved_bytes")
    measured.against("full", "peak_bytes")
    measured.against("linear", "peak_bytes")
    measured.against("peft-lora-equal", "saved_bytes", [m for m in measured.samples if m.startswith("res-tuning")])
    return measured


def cost(settings: Bench, name: str, threads: int) -> tuple[dict[str, float], dict[str, int]]:
    """Of one training step, in all and by module; `peak_bytes` are those above `loaded_bytes`, `limit_bytes` what an
    exact method of ours must keep that computes nothing twice."""
    torch.set_num_threads(threads)
    (x, labels), loss = settings.inputs(), None
    if name.endswith(BANKED):
        model, loss = from_components(settings, name.removesuffix(BANKED), settings.load())
    else:
        model = settings.subject(name)
    run = loss or (lambda: model(x, labels=labels)["loss"])
    tiny = nn.Linear(2, 2, device=x.device)
    training_step(tiny, lambda: tiny(torch.ones(1, 2, device=x.device)).sum())()  # what any first step loads
    loaded, above = peak_bytes(training_step(model, run), x.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = saved_by_module(run, model)
    costs: dict[str, float] = {
        "parameters": trained,
        "saved_bytes": sum(saved.values()),
        "peak_bytes": above,
        "loaded_bytes": loaded,
    }
    if settings.quantise in (None, "none") and name not in PEERS and not name.endswith(BANKED):
        of_torch = settings.subject(f"{name.partition(':')[0]}:plain")
        costs["limit_bytes"] = least_bytes(lambda: of_torch(x, labels=labels)["loss"], of_torch)
    if settings.quantise is not None:
        costs["weight_bytes"] = bytes_of(model)
    if settings.memory is not None:
        weights = sum(p.nbytes for p in model.parameters())
        fixed = weights + 3 * 4 * trained  # a gradient and AdamW's two means
        each = max(1.0, (above - 3 * 4 * trained) / settings.batch)
        costs["largest_batch"] = max(0, int((settings.memory * 2**30 - fixed) / each))
    return costs, saved


def steps(settings: Bench) -> Measured:
    """Training steps and forwards, in turn."""
    shared, (x, labels), measured = settings.load(), settings.inputs(), Measured(absent=absent_peers(settings))
    calls: dict[str, Call] = {"forward": without_grad(lambda: shared(x))}
    for name in (m for m in settings.methods if m not in measured.absent):
        try:
            model = settings.subject(name, None if name == "full" or name in PEERS else shared)
        except (MethodError, SiteError) as error:
            measured.absent[name] = line(error)
            continue
        calls[name] = training_step(model, lambda m=model: m(x, labels=labels)["loss"])  # type: ignore[misc]
        if settings.found and name not in PEERS and name != "full":
            again = settings.subject(name, shared, find(shared))
            calls[f"{name}, found"] = training_step(again, lambda m=again: m(x, labels=labels)["loss"])  # type: ignore[misc]
            measured.pairs.append((f"{name}, found", name, "seconds"))
        if name == "res-tuning":
            calls["forward, res-tuning"] = without_grad(partial(model, x))
        if name == "prefix":
            calls["prefix, bound"] = training_step(model, partial(bound_loss, model, x, labels))
        if settings.components is not None and reads_components(name, settings.components):
            model, loss = from_components(settings, name, shared)
            calls[name + BANKED] = training_step(model, loss)
            measured.pairs.append((name + BANKED, "forward", "seconds"))
    measured.seconds(in_turn(calls, settings.rounds))
    measured.against("full")
    measured.against("forward", names=["forward, res-tuning", "linear", "bypass"])
    modes = [name for name in calls if name.startswith("res-tuning")]
    measured.against("peft-lora-equal", names=[*modes, "bypass"])
    pairs = ("prefix", "prefix, bound"), ("lora", "peft-lora"), ("bypass", "swift-bypass")
    measured.pairs += [(name, to, "seconds") for name, to in pairs]
    return measured


def _named(settings: Bench) -> list[str]:
    """The methods, and once more those that read components, where these are asked for."""
    k = settings.components
    names = settings.methods
    return [*names, *(name + BANKED for name in names if k is not None and reads_components(name, k))]


def reads_components(name: str, count: int) -> bool:
    """Whether the method's side path reads so many fixed components of each layer."""
    side = None if name in PEERS else side_of(with_components(find_method(name.partition(":")[0]), count))
    return side is not None and side.own_output and side.accepts(count) and not side.accepts(None)


def from_components(settings: Bench, name: str, backbone: nn.Module) -> tuple[nn.Module, Callable[[], Tensor]]:
    """What trains on the components of a bank, and its loss on a batch of them: the first ones of each layer."""
    assert settings.components is not None
    tuned = adapt(backbone, with_components(find_method(name), settings.components), settings.classes).train()
    x, labels = settings.inputs()
    with torch.no_grad():
        features = tuned.features(x)
        bases = {
            i: torch.eye(f.shape[-1], device=f.device)[:, : settings.components] for i, f in features.layers.items()
        }
        features = Components(bases).of(features, tuned.sites.info.grid or 0)
    model = FromFeatures(tuned)
    return model, lambda: F.cross_entropy(model(features), labels)
