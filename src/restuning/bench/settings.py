"""Settings of a benchmark, what it measured, and what several of them share."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.load import describe_backbone, load_backbone, reading_of
from restuning.backbones.quantised import KINDS, quantise
from restuning.backbones.sites import Sites
from restuning.bench.peers import PEERS, missing, subject
from restuning.data import Preprocess
from restuning.errors import RestuningError
from restuning.hooks.memory import check_memory
from restuning.methods.named import find_method
from restuning.model.tuned import Tuned
from restuning.side.features import Features
from restuning.training.config import parameter_groups
from restuning.utils.options import ImageSize, Option

RUN_FULL = 19  # so many full models are run one after the other; other numbers of them are counted from one
GRID_STEPS, BANK_STEPS = 32, 8  # of an epoch from features kept
METHODS = (
    *("full", "linear", "bypass", "bypass-horizontal"),
    *("res-tuning", "res-tuning:plain", "res-tuning:compact", "res-tuning:recompute"),
    *("lora", "prefix", "adapter", "lst", "dtl"),
)

_OWN = ("methods", "tasks", "points", "items", "minutes", "memory", "data", "quantise", "found", "components")
"""Settings that only some benchmarks have."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """The settings of a benchmark. methods: of `memory` and `step`, peers among them, `:mode` after one of ours for a
    mode of `restuning.hooks.memory.MEMORY`; tasks: adapters; points: of a grid; memory: GiB that a batch should fit
    in."""

    backbone: Annotated[str, Option("a timm model, or restuning-micro")] = "vit_base_patch16_224"
    weights: Annotated[str, Option("file of pretrained weights")] = "random"
    image_size: ImageSize = None
    batch: Annotated[
        int, Option("images (default 8; mixed 64; grid and bank 32)", flag="batch-size", aliases=("batch",))
    ] = 8
    rounds: Annotated[int, Option("ratios are taken round by round")] = 5
    classes: Annotated[int, Option("of each head (default 100; multitask 10)")] = 100
    tasks: Annotated[int, Option("multitask: most tasks (default 1000); mixed: adapters (default 19)")] = 19
    points: Annotated[int, Option("of a grid (default 8; cluster 24)")] = 8
    items: Annotated[int, Option("window and cluster: of a bank")] = 1_000_000
    minutes: Annotated[float, Option("soak: how long")] = 30.0
    device: Annotated[str, Option("cpu or cuda")] = "cpu"
    methods: Annotated[
        tuple[str, ...],
        Option(
            "memory and step: methods, res-tuning:compact for a mode, and peers (default all); multitask: one (bypass)",
            flag="method",
        ),
    ] = (*METHODS, *PEERS)
    quantise: Annotated[
        str | None, Option(f"memory: weights of linear maps, none or one of {', '.join(KINDS)}", metavar="KIND")
    ] = None
    found: Annotated[
        bool, Option("step: each of ours once more, on an anatomy found by a trace, beside the written one")
    ] = False
    components: Annotated[
        int | None,
        Option("memory and step: bypass-query and the like once more, from so many components of a bank", metavar="K"),
    ] = None
    data: Annotated[
        tuple[str, ...], Option("app, cluster, labels: data sets of images (default sprites:orientation)")
    ] = ()
    memory: Annotated[float | None, Option("memory: print the largest batch that fits in so much", metavar="GIB")] = (
        None
    )

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "classes", "tasks", "points", "items"):
            if getattr(self, name) < 1:
                raise RestuningError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.components is not None and self.components < 1:
            raise RestuningError(f"components {self.components}: expected at least 1")
        if not self.minutes > 0:
            raise RestuningError(f"minutes {self.minutes}: expected a positive number")
        twice = next((m for m in self.methods if self.methods.count(m) > 1), None)
        if twice is not None:
            raise RestuningError(f"method {twice!r}: expected each once")
        if self.memory is not None and not self.memory > 0:
            raise RestuningError(f"memory {self.memory}: expected GiB above 0")
        for method in (m for m in self.methods if m not in PEERS):
            name, _, mode = method.partition(":")
            find_method(name)
            check_memory(mode or "shared")
        if self.quantise not in (None, "none", *KINDS):
            raise RestuningError(f"quantise {self.quantise!r}: expected none or one of {', '.join(KINDS)}")
        if self.device not in ("cpu", "cuda"):
            raise RestuningError(f"device {self.device!r}: expected cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RestuningError("device cuda: no GPU can be used here; leave out --device, or install torch for it")

    def load(self) -> nn.Module:
        torch.manual_seed(0)
        backbone = load_backbone(self.backbone, self.weights, self.image_size).to(self.device)
        return backbone if self.quantise in (None, "none") else quantise(backbone, self.quantise)

    def subject(self, name: str, backbone: nn.Module | None = None, sites: Sites | None = None) -> Any:
        """What is trained, in training mode, on this backbone or on its own; sites: if they are not the table's."""
        return subject(name, self.load() if backbone is None else backbone, self.classes, sites)

    def side(self) -> int:
        how = reading_of(describe_backbone(self.backbone), self.image_size)
        if not isinstance(how, Preprocess):
            raise RestuningError(f"{self.backbone} reads texts: benchmarks are of backbones of images")
        return how.size[0]

    def inputs(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        labels = torch.arange(self.batch) % self.classes
        return torch.randn(self.batch, 3, self.side(), self.side()).to(self.device), labels.to(self.device)

    def facts(self, own: Sequence[str]) -> dict[str, Any]:
        """What a figure depends on; own: which of methods, tasks and points do."""
        return {
            **{k: v for k, v in asdict(self).items() if k in own or k not in _OWN},
            "image_size": self.side(),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),  # glibc's; resident sets depend on it
            "device_name": torch.cuda.get_device_name() if self.device == "cuda" else processor(),
        }


@dataclass
class Measured:
    """samples: name → unit → a value for every round (or one for all); operations: name → bytes that each module keeps;
    absent: what could not be measured, and why."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    operations: dict[str, dict[str, int]] = field(default_factory=dict)
    pairs: list[tuple[str, str, str]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def seconds(self, times: Mapping[str, list[float]], what: str = "", amounts: Mapping[str, int] = {}) -> None:
        """Times by name, and how much of `what` (images, steps) that is in a second."""
        for name, values in times.items():
            self.samples[name] = {"seconds": values}
            if name in amounts:
                self.samples[name][f"{what}_per_second"] = [amounts[name] / s for s in values]

    def against(self, to: str, unit: str = "seconds", names: Sequence[str] | None = None) -> None:
        self.pairs += [(name, to, unit) for name in (self.samples if names is None else names) if name != to]


def absent_peers(settings: Bench) -> dict[str, str]:
    """The peers among the methods that are not installed."""
    return {name: why for name, why in missing().items() if name in settings.methods}


def many_adapters(settings: Bench, backbone: nn.Module, method: str) -> Tuned:
    tuned = Tuned(backbone)
    for i in range(settings.tasks):
        tuned.add_adapter(f"t{i}", method, settings.classes)
    return tuned.eval()


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Call:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def without_grad(call: Call) -> Call:
    return torch.no_grad()(call)


def loss_of(model: nn.Module, features: Features, labels: Tensor, batch: Sequence[int]) -> Tensor:
    at = torch.tensor(batch, device=labels.device)
    return F.cross_entropy(model(features.rows(at)), labels[at])


def on_device(batch: Any, device: torch.device) -> tuple[Features, Tensor]:
    features, labels = batch
    return features.map(lambda x: x.to(device)), labels.to(device)


def processor() -> str:
    with suppress(OSError, StopIteration):
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        return next(row.split(":")[1].strip() for row in rows if row.startswith("model name"))
    return platform.processor() or platform.machine()


def short(value: float) -> float:
    return float(f"{value:.6g}")
