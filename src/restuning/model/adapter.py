"""One adapter: its tuners, its side path, its head."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from restuning._types import Features, SiteInfo
from restuning.backbones.anatomy import PARTS, Affine, as_tuple
from restuning.backbones.sites import Site, Sites, check_blocks
from restuning.errors import MethodError
from restuning.hooks.law import attach, group_by_site
from restuning.hooks.tail import Tail, head_width, live
from restuning.hooks.taps import INPUT, MASK
from restuning.methods.spec import Bypass, Full, Ladder, Method, Residual, grid_of, parts_of
from restuning.model.files import AdapterConfig
from restuning.side import BypassNet, LadderNet, SideNet, keeps_mean, mixes_tokens, prune
from restuning.side.features import ALL, FIRST, LAST, MEAN, TokenSelection
from restuning.tuners.base import NeedsWeight, TunerConfig, as_tuner, is_prompt


class AdapterModule(nn.Module):
    """One adapter: `tuners` added inside the backbone, a `side` path beside it, a `head` after it. Its state_dict is
    the checkpoint."""

    def __init__(
        self,
        backbone: nn.Module,
        sites: Sites,
        method: Method,
        pool: str,
        num_classes: int | None,
        config: AdapterConfig,
    ) -> None:
        super().__init__()
        self.config, self.method = config, method
        self.depth, self.full = len(sites.blocks), isinstance(method, Full)
        self.path: Sequence[int] = range(len(sites.stems) + 1)
        if sites.join is not None and (num_classes is not None or grid_of(method) is not None):
            raise MethodError(f"{sites.anatomy.name} denoises: no classes, and no grid for a side path")
        self.sites: dict[str, Site] = {}
        self.tuners = nn.ModuleDict()
        self.side: nn.Module | None = None
        self.view = _view(sites, method, pool)
        width = head_width(sites.info.out_features, pool, 1 if pool != "flat" else self.view.count())
        for part in parts_of(method):
            if isinstance(part, Residual):
                for op, tuner_config in part.tuners.items():
                    for site in sites.at(op, part.blocks, part.exclude):
                        if op == "all-linear" and _narrow(site, tuner_config):
                            continue
                        self._add(backbone, sites, site, tuner_config)
            elif isinstance(part, Bypass):
                self.path = sites.stages if _over_stages(sites, part) else self.path
                self.side = _bypass(sites, part, self.path)
            elif sites.join is not None:
                raise MethodError(f"{type(part).__name__} needs a head; {sites.anatomy.name} has none: a Bypass can be")
            elif isinstance(part, Ladder):
                self.side = _ladder(backbone, sites, part)
            else:
                if pool == "none":
                    raise MethodError("side-tuning blends pooled features: pool must not be none")
                self.side = SideNet(_made(part.net, replace(sites.info, out_features=width), "side-tuning"))
        alone, averaged = not mixes_tokens(self.side), keeps_mean(self.side)
        one_grid = sites.uniform or not isinstance(self.side, BypassNet)  # between others tokens are averaged
        alone, averaged = alone and one_grid, averaged and one_grid
        if grid_of(method) is None and not {FIRST: alone, LAST: alone, MEAN: averaged}.get(self.view, True):
            self.view = ALL
        padded = sites.info.grid is None and "attention_mask" in inspect.signature(backbone.forward).parameters
        by_mask = "mean" in pool or pool == "last" or isinstance(self.side, LadderNet)
        self.reads_mask = padded and self.view == ALL and by_mask
        self.masked = padded and (self.reads_mask or self.view.by_mask)
        self.head: nn.Module = nn.Identity() if num_classes is None else nn.Linear(width, num_classes)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _add(self, backbone: nn.Module, sites: Sites, site: Site, config: TunerConfig) -> None:
        name, copies = site.name, sum(other == site for other in self.sites.values())
        name = name if not copies else f"{name}_{copies + 1}"
        tuner = as_tuner(_made(config, site.info, site.op))
        if site.op != tuner.only_on and (tuner.only_on is not None or site.op == "attention"):
            where = f"operation {tuner.only_on!r}" if tuner.only_on else f"operations other than {site.op!r}"
            raise MethodError(f"{type(config).__name__} goes to {where}, not to {site.op!r}")
        prompt, denoises = is_prompt(tuner), sites.join is not None
        over_stages = tuner.form == "stateful" or (prompt and not (denoises and tuner.span == "block"))
        if not sites.uniform and over_stages:
            raise MethodError(
                f"{type(config).__name__} needs blocks of one width, whose tokens are a sequence: {sites.anatomy.name} "
                f"has {len(sites.stages)} stages of maps, with the operations {', '.join(sites.ops)}"
            )
        if prompt and tuner.unbound and len(as_tuple(sites.anatomy.attention)) != 1:
            raise MethodError(f"unbound prompts need one attention a block, which {sites.anatomy.name} does not name")
        if isinstance(tuner, NeedsWeight):
            affine = site.affine(backbone)
            tuner.bind(affine.weight, affine.bias)
        self.sites[name], self.tuners[name] = site, tuner

    @property
    def inside(self) -> list[tuple[Site, nn.Module]]:
        """What is added inside the backbone, before its tail."""
        return [(site, self.tuners[name]) for name, site in self.sites.items() if site.op != "norm"]

    @property
    def in_tail(self) -> list[tuple[Site, nn.Module]]:
        """What is added to the final norm, which the tail runs."""
        return [(site, self.tuners[name]) for name, site in self.sites.items() if site.op == "norm"]

    @property
    def reads_features(self) -> bool:
        """Whether the backbone's own features are all that it needs: nothing is tuned inside the backbone."""
        return not self.full and not self.inside

    @property
    def layers(self) -> Sequence[int]:
        """The features that it reads: all those on the way of a side path, the pixels and what the last block says for
        a side network, else only what the last block says; and the mask where padding is left out."""
        if isinstance(self.side, SideNet):
            return (INPUT, self.depth)
        layers = self.path if self.side is not None else (self.depth,)
        return (MASK, *layers) if self.reads_mask else layers

    def layers_of(self, kept: TokenSelection) -> Sequence[int]:
        """The same, where the tokens `kept` are given: of all tokens, a mask tells which are padding."""
        return (MASK, *(x for x in self.layers if x != MASK)) if self.masked and kept == ALL else self.layers

    def beside(self, features: Sequence[Tensor]) -> Tensor:
        """What the side path says of the features of `path`, into which no gradient goes."""
        assert self.side is not None
        return self.side(tuple(x.detach() for x in features))  # type: ignore[no-any-return]

    def pooled(self, features: Features, tail: Tail) -> Tensor:
        """What the head reads, from the features of `layers`."""
        if isinstance(self.side, SideNet):
            return self.side(tail(features[-1]), features[0])  # type: ignore[no-any-return]
        mask = features[0] if self.reads_mask else None
        features = features[self.reads_mask :]
        if self.side is None:
            return tail(features[-1], mask)
        return tail(self.side(features, mask) if isinstance(self.side, LadderNet) else self.side(features), mask)


class Reader(nn.Module):
    """An adapter as a function of the features: side path, frozen tail, head. It refers to the backbone, for the tail's
    sake, and owns the adapter alone."""

    def __init__(self, adapter: AdapterModule, backbone: nn.Module, sites: Sites, tail: Tail) -> None:
        super().__init__()
        self.adapter, self.tail, self._frozen = adapter, tail, (backbone, sites)

    def own(self, features: Mapping[int, Tensor], kept: TokenSelection) -> Features:
        """What it reads of features of which the tokens `kept` are there; raises MethodError if they are too few."""
        view = self.adapter.view.of(kept)
        if view is None:
            raise MethodError(f"the adapter reads tokens {self.adapter.view.tokens!r}; given are {kept.tokens!r}")
        mask = features.get(MASK)
        return tuple(x if layer < 0 else view(x, mask) for layer in self.adapter.layers for x in (features[layer],))

    def forward(self, features: Features, head: bool = True) -> Tensor:
        """Logits, or with `head=False` what the head reads."""
        backbone, sites = self._frozen
        with attach(backbone, sites, group_by_site((site, "", tuner) for site, tuner in self.adapter.in_tail)):
            return self.read(features, head)

    def read(self, features: Features, head: bool = True) -> Tensor:
        """The same, where what is added to the tail has been attached."""
        if self.adapter.side is not None and self.adapter.reads_features:
            features = tuple(x.detach() for x in features)
        pooled = self.adapter.pooled(features, self.tail)
        return self.adapter.head(pooled) if head else pooled


def _narrow(site: Site, config: TunerConfig) -> bool:
    """Whether a map is narrower than the rank: among all linear maps there may be a few that LoRA has no use for."""
    return site.info.kernel is None and getattr(config, "rank", 0) > min(site.info.in_features, site.info.out_features)


def _view(sites: Sites, method: Method, pool: str) -> TokenSelection:
    """What its output can see of a layer, if nothing mixes tokens."""
    grid, prefix = grid_of(method), sites.info.grid
    if grid is None:
        return live(sites, pool)
    if grid == 1 and not prefix:
        return MEAN
    if prefix is None:
        raise MethodError("a side path on a grid needs a grid of patches, and this backbone's tokens are none")
    return TokenSelection(grid, prefix)


def _over_stages(sites: Sites, part: Bypass) -> bool:
    if sites.anatomy.stems:
        if part.over is not None:
            raise MethodError(f"Bypass(over={part.over!r}): on {sites.anatomy.name} it runs over its decoder")
        return False
    if part.over == "stages" and sites.uniform:
        raise MethodError(f"Bypass(over='stages'): {sites.anatomy.name} has one stage; leave it out")
    return part.over == "stages" or (part.over is None and not sites.uniform)


def _bypass(sites: Sites, part: Bypass, path: Sequence[int]) -> BypassNet:
    infos = [sites.features[layer] for layer in path]
    check_blocks(part.blocks, len(infos) - 1, *(() if len(infos) > len(sites.blocks) else ("step", "the path")))
    steps = range(len(infos) - 1) if part.blocks is None else part.blocks

    def side(config: TunerConfig | None) -> dict[int, nn.Module]:
        if config is None:
            return {}
        made = {step: _made(config, infos[step + 1], "the bypass") for step in steps}
        if any(as_tuner(tuner).only_on for tuner in made.values()):
            raise MethodError(f"{type(config).__name__} acts inside a backbone: it cannot be a tuner of the bypass")
        return made

    widths = [info.out_features for info in infos]
    tuners = side(part.horizontal), side(part.vertical)
    return BypassNet(widths, *tuners, sites.join is not None, part.gate, part.gates == "channel", part.normed)


def _ladder(backbone: nn.Module, sites: Sites, part: Ladder) -> LadderNet:
    if not sites.uniform:
        widths = ", ".join(str(sites.features[layer].out_features) for layer in sites.stages)
        raise MethodError(f"a ladder needs blocks of one width: {sites.anatomy.name} has stages of widths {widths}")
    width, heads = sites.info.out_features, sites.info.heads
    side = width // part.reduction
    if side < heads or width % part.reduction or side % heads:
        raise MethodError(f"a ladder of width {width} / {part.reduction}: expected a multiple of its {heads} heads")
    hidden = next((site.info.in_features for site in sites.all if site.op == "fc2"), 4 * width)
    net = LadderNet(len(sites.blocks), width, side, heads, max(hidden // part.reduction, 1))
    first = next((backbone.get_submodule(site.writes.path) for site in sites.all if site.op == "fc1"), None)
    described = first is not None and getattr(first, "weight", torch.empty(0, device="meta")).is_meta
    if part.init != "random" and not described:
        prune_ladder(net, backbone, sites, lambda weight: weight.detach().abs())
    return net


def prune_ladder(net: LadderNet, backbone: nn.Module, sites: Sites, score: Callable[[nn.Parameter], Tensor]) -> None:
    """Give a ladder the best of the backbone's own weights by `score`; see `restuning.side.prune`."""
    roles: list[dict[str, list[Affine]]] = [{} for _ in sites.blocks]
    for site in sites.all:
        if site.op in PARTS and site.block is not None:
            roles[site.block].setdefault(site.op, []).append(site.affine(backbone))
    prune(net, roles, score)


def _made(config: TunerConfig, info: SiteInfo, where: str) -> nn.Module:
    module = config(info)
    if not isinstance(module, nn.Module):
        raise MethodError(f"the tuner of {where} made a {type(module).__name__}: expected an nn.Module")
    return module
