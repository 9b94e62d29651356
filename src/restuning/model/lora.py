"""LoRA adapters as PEFT's users know them: scaled, and several of them as one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from restuning.backbones.sites import Site, Sites
from restuning.errors import MethodError, SiteError
from restuning.methods.files import to_dict
from restuning.methods.spec import Method, Mix, Residual
from restuning.model.merge import require_unmerged
from restuning.tuners import Lora
from restuning.tuners.lora import ConvLoraTuner, EmbeddingLoraTuner, LoraTuner

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned

Combination: TypeAlias = Literal[
    "linear", "cat", "svd",
    "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
"""How adapters are combined, in PEFT's words: `linear` sums A's and B's, `cat` is the exact sum, of the sum of the
ranks, `svd` the best approximation of it at one rank. TIES (Yadav et al. 2023), DARE (Yu et al. 2024) and pruning by
magnitude are of A's and B's, or with `_svd` of the changes of the weights."""

_KINDS = (LoraTuner, ConvLoraTuner, EmbeddingLoraTuner)


def set_scale(tuned: "Tuned", scale: float, name: str | None = None) -> None:
    """Scale the active (or the named) adapter's LoRA: its factor is `scale` times the one that it was made with. The
    scale is saved with the adapter.

    Raises:
        MethodError: it has other tuners than LoRA, or is merged.
    """
    name = tuned.one(name)
    adapter = tuned.adapter(name)
    require_unmerged(tuned.backbone, "set_scale")
    other = [type(t).__name__ for t in adapter.tuners.values() if not isinstance(t, _KINDS)]
    if other or not adapter.tuners or adapter.side is not None:
        raise MethodError(f"set_scale is of LoRA: adapter {name!r} has {', '.join(dict.fromkeys(other)) or 'none'}")
    if not math.isfinite(scale):
        raise MethodError(f"set_scale({scale}): expected a finite number")
    method, factors = adapter.unscaled or (adapter.method, {key: t.factor for key, t in _loras(adapter.tuners)})
    adapter.unscaled = method, factors
    adapter.method = _scaled(method, scale)
    adapter.config = replace(adapter.config, method=None, spec=to_dict(adapter.method))
    for key, tuner in _loras(adapter.tuners):
        tuner.factor = factors[key] * scale
    tuned.forget_stacks(name)


def _loras(tuners: Any) -> Iterator[tuple[str, Any]]:
    return ((key, tuner) for key, tuner in tuners.items() if isinstance(tuner, _KINDS))


def _scaled(method: Any, scale: float) -> Any:
    if isinstance(method, Mix):
        return Mix(tuple(_scaled(part, scale) for part in method.parts))

    def one(config: Any) -> Any:
        alpha = config.rank if config.alpha is None else config.alpha
        return replace(config, alpha=float(alpha * scale))

    return replace(method, tuners={op: one(config) for op, config in method.tuners.items()})


def add_weighted_adapter(
    tuned: "Tuned",
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: Combination = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> None:
    """Add an adapter whose LoRA is a weighted combination of others', as PEFT's method of this name does, and make it
    active. Its head is a copy of the first one's.

    Args:
        adapters: names of adapters of plain LoRA; they may be on other operations.
        weights: one for each; negative ones subtract.
        name: of the new one.
        combination_type: see `Combination`. DARE draws at random, from torch's generator.
        svd_rank: of the new one, under svd; None: the largest of theirs.
        density: which part of the values is kept, in (0, 1], under ties, dare and magnitude_prune.
        majority_sign_method: whether signs are elected by values or by counts, under ties.

    Raises:
        MethodError: an unknown combination, adapters that hold more than plain LoRA, other ranks under one that sums
            A's and B's, no density where one is needed.
    """
    adapters, weights = list(adapters), [float(w) for w in weights]
    if combination_type not in get_args(Combination):
        names = ", ".join(get_args(Combination))
        raise MethodError(f"unknown combination_type {combination_type!r}: expected one of {names}")
    if not adapters or len(adapters) != len(weights):
        raise MethodError(f"{len(weights)} weights for {len(adapters)} adapters: expected one for each")
    if majority_sign_method not in ("total", "frequency"):
        raise MethodError(f"majority_sign_method {majority_sign_method!r}: expected total or frequency")
    prunes = combination_type.removesuffix("_svd") not in ("linear", "cat", "svd")
    if prunes and not (density is not None and 0 < density <= 1):
        raise MethodError(f"{combination_type} needs a density in (0, 1], not {density}")
    at_sites: dict[Site, list[tuple[float, Any]]] = {}
    for one, weight in zip(adapters, weights, strict=True):
        for site, tuner in _plain_lora(tuned, one):
            at_sites.setdefault(site, []).append((weight, tuner))

    def mixed(tensors: Sequence[Tensor], by: Sequence[float]) -> Tensor:
        kind = combination_type.removesuffix("_svd")
        return _combined(tensors, torch.tensor(by), kind, density or 1.0, majority_sign_method)

    most = svd_rank or max(len(tuner.a) for at in at_sites.values() for _, tuner in at)
    with torch.no_grad():
        halves = {site: _of_site(at, combination_type, most, mixed) for site, at in at_sites.items()}
    like = tuned.adapter(adapters[0])
    first, config = _plain_lora(tuned, adapters[0])[0][1], like.config
    dropout = getattr(first, "dropout", 0.0)
    method = lora_method(tuned.sites, {site: Lora(len(a), dropout=dropout) for site, (a, _) in halves.items()})
    tuned.add_adapter(
        name,
        method,
        config.num_classes,
        pool=config.pool,
        classes=config.classes,
        preprocessing=config.preprocessing,
        kind=config.kind,
    )
    made = tuned.adapter(name)
    made.head.load_state_dict(like.head.state_dict())
    with torch.no_grad():
        for key, site in made.sites.items():
            new: Any = made.tuners[key]
            for mine, value in zip((new.a, new.b), halves[site], strict=True):
                mine.copy_(value.view_as(mine))


def _plain_lora(tuned: "Tuned", name: str) -> list[tuple[Site, Any]]:
    adapter = tuned.adapter(name)
    plain = all(type(tuner) in _KINDS for tuner in adapter.tuners.values())
    if not plain or not adapter.tuners or adapter.side is not None:
        raise MethodError(f"a weighted adapter is of plain LoRA: adapter {name!r} is not")
    found = [(adapter.sites[key], tuner) for key, tuner in adapter.tuners.items()]
    if len({site for site, _ in found}) < len(found):
        raise MethodError(f"a weighted adapter is of one LoRA a site: adapter {name!r} has several")
    return found


def _of_site(at: Sequence[tuple[float, Any]], kind: str, rank: int, mixed: Any) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one site, kernels flattened; the new factor is one."""
    by = [weight * tuner.factor for weight, tuner in at]
    a, b = [tuner.a.flatten(1) for _, tuner in at], [tuner.b.flatten(1) for _, tuner in at]
    if kind == "cat":
        return torch.cat([w * x for w, x in zip(by, a, strict=True)]), torch.cat(b, 1)
    if kind.endswith("svd"):
        changes = [tuner.factor * y @ x for (_, tuner), x, y in zip(at, a, b, strict=True)]
        total = mixed(changes, [weight for weight, _ in at])
        u, s, v = torch.linalg.svd(total.float(), full_matrices=False)
        r = min(rank, len(s))
        return v[:r], u[:, :r] * s[:r]
    if len({len(x) for x in a}) > 1:
        ranks = ", ".join(str(len(x)) for x in a)
        raise MethodError(f"combination_type {kind!r} needs LoRA of one rank, not of {ranks}: use svd or cat")
    roots = [math.sqrt(abs(w)) for w in by]
    return mixed(a, [math.copysign(root, w) for root, w in zip(roots, by, strict=True)]), mixed(b, roots)


def _combined(tensors: Sequence[Tensor], weights: Tensor, kind: str, density: float, sign: str) -> Tensor:
    """Σ wᵢ tᵢ of tensors that may be pruned first; under TIES the mean of those with the majority's sign."""
    if "dare" in kind and density < 1:
        tensors = [t * torch.bernoulli(torch.full_like(t, density)) / density for t in tensors]
    elif kind in ("ties", "magnitude_prune") and density < 1:
        tensors = [_largest(t, int(density * t.numel())) for t in tensors]
    stack = torch.stack(list(tensors))
    weighted = stack * weights.to(stack).view(-1, *[1] * (stack.ndim - 1))
    if "ties" not in kind:
        return weighted.sum(0)
    votes = (stack if sign == "total" else stack.sign()).sum(0)
    agree = stack.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(t: Tensor, count: int) -> Tensor:
    """The tensor with all but its `count` largest values zero."""
    at = t.abs().flatten().topk(count).indices
    return torch.zeros_like(t).flatten().index_copy(0, at, t.flatten()[at]).view_as(t)


def lora_method(sites: Sites, settings: Mapping[Site, Lora]) -> Method:
    """A method that is LoRA at these sites, by the shortest names that mean them and nothing else."""
    parts: list[Residual] = []
    groups: dict[tuple[str, Lora], list[Site]] = {}
    for site, lora in settings.items():
        groups.setdefault((_last(site), lora), []).append(site)
    for (last, lora), at in groups.items():
        blocks = (
            None if any(s.block is None for s in at) else tuple(sorted({s.block for s in at if s.block is not None}))
        )
        for op in (last, *dict.fromkeys(".".join(_path(s).split(".")[-2:]) for s in at)):
            if _meant(sites, op, blocks) == {*at}:
                parts.append(Residual({op: lora}, blocks))
                break
        else:
            parts.append(Residual({"re:" + "|".join(_path(s).replace(".", r"\.") for s in at): lora}))
    return parts[0] if len(parts) == 1 else Mix(tuple(parts))


def _path(site: Site) -> str:
    return site.reads.path


def _last(site: Site) -> str:
    return _path(site).rpartition(".")[2]


def _meant(sites: Sites, op: str, blocks: Sequence[int] | None) -> set[Site]:
    try:
        return {*sites.at(op, blocks)}
    except SiteError:
        return set()
