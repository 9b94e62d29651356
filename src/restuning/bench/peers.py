"""What a benchmark is measured on: our methods, and other libraries' models called as ours are."""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import SiteInfo
from restuning.backbones.sites import Sites, find_sites
from restuning.errors import line
from restuning.hooks.attention import Call
from restuning.methods.named import find_method
from restuning.methods.spec import Method, Residual
from restuning.model.count import count
from restuning.model.tuned import Tuned, adapt
from restuning.tuners import Lora

PEERS = {"peft-lora": "peft", "peft-lora-equal": "peft", "swift-bypass": "swift.tuners"}
"""Peers, and the package that each needs. LoRA of PEFT: at the rank of ours, and with as many parameters as
res-tuning; the bypass of ms-swift: at the width of ours."""


def missing() -> dict[str, str]:
    """The peers whose package cannot be imported, and why."""
    found = {}
    for name, package in PEERS.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            found[name] = line(error)
    return found


def subject(name: str, backbone: nn.Module, classes: int, sites: Sites | None = None) -> Any:
    """A model to train: a method of ours on the backbone (LoRA without dropout, as PEFT's is), or a peer, which changes
    the backbone. A name may end in a mode of `restuning.hooks.memory.MEMORY`, `res-tuning:compact`. Called with what
    the backbone reads and labels, it gives a dict of `loss`. sites: None: the table's."""
    name, _, memory = name.partition(":")
    sites = find_sites(backbone, sites)
    where = _lora_ops(sites)
    if name not in PEERS:
        method: str | Method = Residual(dict.fromkeys(where, Lora(8, dropout=0.0))) if name == "lora" else name
        return adapt(backbone, method, classes, anatomy=sites, memory=memory or "shared").train()
    if name == "swift-bypass":
        return Peer(_swift(backbone, sites), sites.info.out_features, classes).train()
    infos = {site.reads.path: site.info for op in where for site in sites.at(op)}
    rank, paths = 8, lora_paths(backbone)
    if name == "peft-lora-equal":
        tuned = adapt(backbone, "res-tuning", 1)
        tuners = count(tuned)["tuners"]
        tuned.unload()
        rank = max(1, round(tuners / sum(_cost(infos[path]) for path in paths)))
    return Peer(_peft(backbone, rank, paths), sites.info.out_features, classes).train()


def lora_paths(backbone: nn.Module) -> list[str]:
    """Modules that PEFT's LoRA is put on, where ours is."""
    sites = find_sites(backbone)
    infos = {site.reads.path: site.info for op in _lora_ops(sites) for site in sites.at(op)}
    return sorted(path for path, info in infos.items() if info.kernel is None or info.kernel.groups == 1)


def _lora_ops(sites: Sites) -> list[str]:
    method = find_method("lora", sites.anatomy.family)
    assert isinstance(method, Residual)
    return list(method.tuners)


def _cost(info: SiteInfo) -> int:
    """Parameters of LoRA there, for each rank."""
    return info.in_features * math.prod(() if info.kernel is None else info.kernel.size) + info.out_features


class Peer(nn.Module):
    """Another library's model of pooled features, and a head on it."""

    def __init__(self, model: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(width, classes, device=next(model.parameters()).device)

    def forward(self, *args: Any, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        out = self.model(*args, **kwargs)
        pooled = out if isinstance(out, Tensor) else out.last_hidden_state[:, -1]
        return {"loss": F.cross_entropy(self.head(pooled), labels)}


def _peft(backbone: nn.Module, rank: int, paths: list[str]) -> Any:
    import peft

    return peft.get_peft_model(backbone, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=paths))


def _swift(backbone: nn.Module, sites: Sites) -> Any:
    from swift.tuners import ResTuningConfig, Swift

    blocks = [site.writes.path for site in sites.at("block")]
    adapter = {"res_adapter": {"adapter_length": 10}}
    config = ResTuningConfig(
        dims=sites.info.out_features,
        root_modules=blocks[0],
        stem_modules=blocks,
        target_modules=sites.norm[-1],
        tuner_cfg={"lateral_cfg": adapter, "vertical_cfg": adapter},
    )
    return Swift.prepare_model(backbone, config=config)


def bound_loss(tuned: Tuned, x: Tensor, labels: Tensor) -> Tensor:
    """The loss of prefix tuning as Eq. 2 writes it, in the backbone's own attention call."""
    with _bound_prefix(tuned):
        return F.cross_entropy(tuned.adapters["default"].get_submodule("head")(tuned.backbone(x)), labels)


@contextmanager
def _bound_prefix(tuned: Tuned) -> Iterator[None]:
    """While it lasts, the prefixes' keys and values stand before the backbone's own."""
    tuners: Any = iter(tuned.adapters["default"].get_submodule("tuners").children())
    fused = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        own = next(tuners)(Call(q, k, v, None, False, 1.0))
        keys, values = (t.expand(len(q), -1, -1, -1) for t in own)
        return fused(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), **rest)

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
