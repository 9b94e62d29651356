"""NOAH (Zhang, Zhou and Liu 2022): a search that ends in a method, as `restuning.methods` has them."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from restuning._types import SiteInfo
from restuning.backbones.load import load_backbone, reading_of
from restuning.data import load_task, prepared
from restuning.data.objective import objective, sort_key
from restuning.errors import MethodError, RestuningError
from restuning.methods.files import to_dict
from restuning.methods.spec import Method, Mix, Residual, resize
from restuning.model.adapter import AdapterModule
from restuning.model.tuned import adapt
from restuning.runs.folder import finished, run_directory
from restuning.runs.settings import Run
from restuning.training.evaluate import Examples, evaluate
from restuning.training.loop import fit
from restuning.tuners import Adapter, Lora, PromptTuning
from restuning.tuners.base import TunerConfig, as_tuner, copy_contract
from restuning.utils.files import as_json, atomic_write
from restuning.utils.options import Option
from restuning.utils.plain import read_plain

KINDS: Mapping[str, tuple[str, TunerConfig]] = {
    "adapter": ("ffn", Adapter(10, source="out")),
    "lora": ("qkv", Lora(10)),
    "prompt": ("block", PromptTuning(10)),
}
"""What NOAH combines: its own three tuners, and where each goes."""

METHOD, SEARCH, SUPERNET = "method.json", "search.json", "supernet.pt"
_SANDWICH = 4

Subnet = dict[str, tuple[int, ...]]
"""For each kind its dimension in every block; 0: none there."""


@dataclass(frozen=True)
class Space:
    """The subnets: every kind in the first blocks up to one of `depths`, in each with one of `dims`; at most `limit`
    parameters, the head aside."""

    depth: int
    costs: Mapping[str, Mapping[int, int]]
    limit: int
    dims: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        smallest = self.parameters(self.extreme(0))
        if self.limit < smallest:
            raise MethodError(f"limit {self.limit:,}: the smallest subnet has {smallest:,} parameters")

    @property
    def depths(self) -> tuple[int, ...]:
        """A quarter, half, three quarters and all of the blocks: 3, 6, 9, 12 of 12."""
        return tuple(sorted({max(1, self.depth * quarter // 4) for quarter in (1, 2, 3, 4)}))

    def parameters(self, subnet: Subnet) -> int:
        return sum(self.costs[kind][dim] for kind, dims in subnet.items() for dim in dims)

    def extreme(self, end: int) -> Subnet:
        """The smallest subnet (0) or the largest (-1)."""
        depth = self.depths[end]
        return dict.fromkeys(KINDS, (self.dims[end],) * depth + (0,) * (self.depth - depth))

    def any(self, rng: random.Random) -> Subnet:
        """A random subnet, whatever its size."""
        subnet = {}
        for kind in KINDS:
            depth = rng.choice(self.depths)
            subnet[kind] = tuple(rng.choice(self.dims) if i < depth else 0 for i in range(self.depth))
        return subnet

    def within(self, subnet: Subnet, rng: random.Random) -> Subnet:
        """The subnet made smaller, here and there, until it keeps the limit."""
        while self.parameters(subnet) > self.limit:
            kind = rng.choice(sorted(subnet))
            used = [i for i, dim in enumerate(subnet[kind]) if dim]
            shorter = [d for d in self.depths if d < len(used)]
            wide = [i for i in used if subnet[kind][i] > self.dims[0]]
            dims = list(subnet[kind])
            if shorter and (not wide or rng.random() < 0.2):
                dims[shorter[-1] :] = [0] * (self.depth - shorter[-1])
            elif wide:
                i = rng.choice(wide)
                dims[i] = self.dims[self.dims.index(dims[i]) - 1]
            subnet = {**subnet, kind: tuple(dims)}
        return subnet

    def crossed(self, a: Subnet, b: Subnet, rng: random.Random) -> Subnet:
        """A child: each kind from one of its parents."""
        return self.within({kind: rng.choice((a, b))[kind] for kind in KINDS}, rng)

    def mutated(self, subnet: Subnet, rng: random.Random, rate: float) -> Subnet:
        """Kinds and blocks drawn anew, each with probability `rate`."""
        drawn = self.any(rng)
        child = {}
        for kind, dims in subnet.items():
            if rng.random() < rate:
                child[kind] = drawn[kind]
            else:
                child[kind] = tuple(rng.choice(self.dims) if dim and rng.random() < rate else dim for dim in dims)
        return self.within(child, rng)


def to_method(subnet: Subnet) -> Method:
    """A subnet as an ordinary method."""
    parts = []
    for kind, dims in subnet.items():
        op, config = KINDS[kind]
        for dim in sorted(set(dims) - {0}):
            part = resize(Residual({op: config}, tuple(i for i, d in enumerate(dims) if d == dim)), dim)
            assert isinstance(part, Residual)
            parts.append(part)
    return Mix(tuple(parts))


class ResizableTuner(nn.Module):
    """A tuner at its largest, of which any of its sizes can be used: the first rows and columns of its weights."""

    def __init__(self, config: TunerConfig, info: SiteInfo, sizes: Sequence[int]) -> None:
        super().__init__()
        self.whole = config(info)
        copy_contract(as_tuner(self.whole), self)
        with torch.device("meta"):  # in a plain dict: they are shapes and a forward, not modules of this one
            self.slim: dict[int, nn.Module] = {size: _sized(config, size)(info) for size in sizes}
        self.size = max(sizes)

    def forward(self, *args: Tensor) -> Tensor | None:
        if self.size == 0:
            return None if len(args) > 1 else args[0][:, :0]
        slim = self.slim[self.size].train(self.training)
        weights = {}
        for name, p in self.whole.named_parameters():
            shape = slim.get_parameter(name).shape
            weights[name] = p[tuple(slice(n) for n in shape)]
        return functional_call(slim, weights, args)  # type: ignore[no-any-return]


class Supernet(nn.Module):
    """Every subnet of the space in shared weights. In training each call uses another one, by the sandwich rule: the
    largest, the smallest and two at random, whose gradients one step of four batches adds up."""

    calls: Tensor

    def __init__(self, backbone: nn.Module, sizes: Sequence[int], limit: int, seed: int, **settings: Any) -> None:
        super().__init__()

        def slim(config: TunerConfig) -> TunerConfig:
            return lambda info: ResizableTuner(config, info, sizes)

        method = Residual({op: slim(config) for op, config in KINDS.values()})
        self.tuned = adapt(backbone, method, **settings)
        adapter = self.tuned.adapters["default"]
        assert isinstance(adapter, AdapterModule)
        self.slims: dict[str, list[list[ResizableTuner]]] = {
            kind: [
                [adapter.tuners[site.name] for site in self.tuned.sites.at(op, (block,))]  # type: ignore[misc]
                for block in range(adapter.depth)
            ]
            for kind, (op, _) in KINDS.items()
        }
        costs = {
            kind: {0: 0, **{size: sum(_count(slim.slim[size]) for slim in blocks[0]) for size in sizes}}
            for kind, blocks in self.slims.items()
        }
        self.space = Space(adapter.depth, costs, limit, tuple(sizes))
        self.seed = seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def use(self, subnet: Subnet) -> None:
        for kind, blocks in self.slims.items():
            for slims, dim in zip(blocks, subnet[kind], strict=True):
                for slim in slims:
                    slim.size = dim

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            call = int(self.calls)
            place = call % _SANDWICH
            self.use(
                self.space.extreme((-1, 0)[place])
                if place < 2
                else self.space.any(random.Random(f"{self.seed} {call}"))
            )
            self.calls += 1
        return self.tuned(x)  # type: ignore[no-any-return]


def evolve(
    net: Supernet,
    val: Examples,
    *,
    population: int,
    generations: int,
    seed: int,
    batch_size: int,
    kind: str = "single-label",
) -> Iterator[list[tuple[float, Subnet]]]:
    """Generation by generation, the best subnets within the limit, best first: (validation score, subnet)."""
    rng, space = random.Random(f"evolution {seed}"), net.space
    seen: dict[str, tuple[float, Subnet]] = {}

    def look(subnet: Subnet) -> None:
        key = json.dumps(subnet)
        if key not in seen:
            net.use(subnet)
            seen[key] = sort_key(next(evaluate(net, val, batch_size, kind=kind))[1]), subnet

    for _ in range(population):
        look(space.within(space.any(rng), rng))
    for generation in range(generations + 1):
        # of equal score the smaller one; sizes are many, scores on few items are not
        best = sorted(seen.values(), key=lambda found: (-found[0], space.parameters(found[1])))[
            : max(2, population // 4)
        ]
        yield best
        if generation < generations:
            for i in range(population):
                a, b = rng.sample(best, 2) if len(best) > 1 else (best[0], best[0])
                look(space.crossed(a[1], b[1], rng) if i % 2 else space.mutated(a[1], rng, 0.2))


@dataclass(frozen=True)
class SearchSettings:
    """How far a search goes."""

    limit: Annotated[int, Option("most tuner parameters")] = 360_000
    population: Annotated[int, Option("subnets in a generation")] = 16
    generations: Annotated[int, Option()] = 4

    def __post_init__(self) -> None:
        if self.population < 2 or self.generations < 0:
            raise RestuningError(
                f"population {self.population}, generations {self.generations}: expected at least 2 and 0"
            )


DEFAULT = SearchSettings()


@dataclass(frozen=True)
class SearchRun:
    """Everything that decides a search's outcome."""

    run: Run
    search: SearchSettings

    def to_dict(self) -> dict[str, Any]:
        return {**self.run.to_dict(), "search": asdict(self.search)}

    @classmethod
    def read(cls, path: Path) -> "SearchRun":
        """The run.json of a search. Raises RestuningError for one that cannot be read, or is a run's."""
        return read_plain(path, cls, lambda held: {"search": held.pop("search", None), "run": held})


def search(
    run: Run,
    out: Path,
    settings: SearchSettings = DEFAULT,
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a supernet on the run's data, search it on validation items; method.json and search.json in `out`.

    The found method is trained from its initialisation by `restuning train --method OUT/method.json`. Returns what
    search.json holds. Raises MethodError for a limit below the smallest subnet.
    """
    limit = settings.limit
    if resume and (before := finished(out, SearchRun(run, settings), SearchRun.read, SEARCH)) is not None:
        return before
    with run_directory(out, SearchRun(run, settings), resume, SearchRun.read, SEARCH):
        backbone = load_backbone(run.backbone, run.weights, run.image_size)
        how = reading_of(backbone, run.image_size, run.crop, run.tokenizer, run.max_length)
        config = replace(run.training, lr=(run.lrs or (run.training.lr,))[0], accumulate=_SANDWICH)
        task = load_task(
            run.data, train_size=run.train_size, val_size=run.val_size, test_size=run.test_size, seed=config.seed
        )
        if task.val is None:
            raise RestuningError("a search chooses on validation items, and there are none: give --val-size")
        torch.manual_seed(config.seed)
        net = Supernet(
            backbone, (1, 5, 10), limit, config.seed, num_classes=len(task.classes), pool=run.pool, kind=task.kind
        )
        train, val = prepared(task.train, how, run.augment, config.seed), prepared(task.val, how)
        asked = objective(task.kind)
        fit(net, train, None, config, state=out / SUPERNET, resume=resume, progress=progress, objective=asked)
        net.eval()
        best: list[tuple[float, Subnet]] = []
        history = []
        for best in evolve(
            net,
            val,
            population=settings.population,
            generations=settings.generations,
            seed=config.seed,
            batch_size=config.batch_size,
            kind=task.kind,
        ):
            history.append(best[0][0])
        score, subnet = best[0]
        found = {
            "validation_score": score,
            "parameters": net.space.parameters(subnet),
            "limit": limit,
            "subnet": subnet,
            "best_by_generation": history,
            "settings": run.to_dict(),
        }
        atomic_write(out / METHOD, as_json(to_dict(to_method(subnet))))
        atomic_write(out / SEARCH, as_json(found))
        return found


def _sized(config: TunerConfig, size: int) -> TunerConfig:
    part = resize(Residual({"mha": config}), size)
    assert isinstance(part, Residual)
    return part.tuners["mha"]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
