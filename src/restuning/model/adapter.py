"""One adapter: its tuners, its side network, its head."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.backbones.anatomy import PARTS, Affine, as_tuple
from restuning.backbones.quantised import require_plain
from restuning.backbones.sites import Site, Sites
from restuning.errors import CheckpointError, MethodError
from restuning.hooks.law import attach, group_by_site
from restuning.hooks.points import backbone_lock
from restuning.hooks.tail import Tail, head_width, live
from restuning.methods.spec import Full, Method, grid_of, residuals_of, side_of
from restuning.model.files import AdapterConfig
from restuning.side.base import FeatureInfo, SideConfig, SideNetwork
from restuning.side.features import ALL, FIRST, LAST, MEAN, FeatureRequest, Features, TokenSelection
from restuning.side.ladder import LadderNet, prune
from restuning.side.stages import PathNetwork
from restuning.tuners.base import NeedsWeight, TunerConfig, as_tuner, is_prompt, make
from restuning.tuners.copied import CopiedModule


class AdapterModule(nn.Module):
    """One adapter: `tuners` added inside the backbone, a `side` network beside it, a `head` after it. Its state_dict is
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
        """
        Args:
            backbone: frozen; read for its shapes, and by a side network that begins from its weights.
            sites: the backbone's.
            method: which tuners on which operations, and which side network.
            pool: how the backbone's last layer is pooled.
            num_classes: of the head; None: there is none.
            config: what is saved beside the adapter.

        Raises:
            MethodError: the method does not fit the backbone.
            SiteError: an operation or a block that is not there.
        """
        super().__init__()
        self.config, self.method, self.merged = config, method, False
        self.unscaled: tuple[Method, dict[str, float]] | None = None
        self.depth, self.full = len(sites.blocks), isinstance(method, Full)
        if sites.join is not None and (num_classes is not None or grid_of(method) is not None):
            raise MethodError(f"{sites.anatomy.name} denoises: no classes, and no grid for a side path")
        self.sites: dict[str, Site] = {}
        self.tuners = nn.ModuleDict()
        for part in residuals_of(method):
            for op, tuner_config in part.tuners.items():
                for site in sites.at(op, part.blocks, part.exclude):
                    if op != "all-linear" or not _left_out(site, tuner_config):
                        self._add(backbone, sites, site, tuner_config)
        for name in dict.fromkeys(name for part in residuals_of(method) for name in part.modules_to_save):
            self._copy(backbone, sites, name)
        side, tokens = side_of(method), live(sites, pool)
        info = feature_info(backbone, sites, pool, side)
        if side is not None:
            tokens = side.tokens(info)
        width = head_width(sites.info.out_features, pool, tokens.count() if pool == "flat" else 1)
        self.side: SideNetwork | None = None
        if side is not None:
            self.side = _built(side, info, sites, pool, width)
            width = self.side.out_features if side.own_output else width
            one_grid = sites.uniform or tokens not in (FIRST, LAST)  # between others a path averages tokens
            if side.grid is None and not side.own_output and not (one_grid and _allows(self.side, tokens)):
                tokens = ALL
        padded = sites.info.grid is None and "attention_mask" in inspect.signature(backbone.forward).parameters
        by_mask = "mean" in pool or pool == "last" or (self.side is not None and self.side.reads_padding)
        reads_mask = padded and tokens == ALL and by_mask
        self.request = FeatureRequest(
            (self.depth,) if side is None else tuple(side.layers(info)),
            tokens,
            reads_mask,
            padded and (reads_mask or tokens.by_mask),
            side is not None and side.reads_pixels(),
        )
        self.head: nn.Module = nn.Identity() if num_classes is None else nn.Linear(width, num_classes)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _add(self, backbone: nn.Module, sites: Sites, site: Site, config: TunerConfig) -> None:
        name, copies = site.name, sum(other == site for other in self.sites.values())
        name = name if not copies else f"{name}_{copies + 1}"
        tuner = as_tuner(make(config, site.info, site.op))
        if site.op != tuner.only_on and (tuner.only_on is not None or site.op == "attention"):
            where = f"operation {tuner.only_on!r}" if tuner.only_on else f"operations other than {site.op!r}"
            raise MethodError(f"{type(config).__name__} goes to {where}, not to {site.op!r}")
        prompt, denoises = is_prompt(tuner), sites.join is not None
        one_width = tuner.form == "stateful" or (prompt and not (denoises and tuner.span == "block"))
        if not sites.uniform and one_width:
            raise MethodError(
                f"{type(config).__name__} needs blocks of one width, whose tokens are a sequence: {sites.anatomy.name} "
                f"has {len(sites.stages)} stages of maps, with the operations {', '.join(sites.ops)}"
            )
        if prompt and tuner.unbound and len(as_tuple(sites.anatomy.attention)) != 1:
            raise MethodError(f"unbound prompts need one attention a block, which {sites.anatomy.name} does not name")
        if isinstance(tuner, NeedsWeight):
            affine = site.affine(backbone)
            require_plain(affine.weight, type(config).__name__ + " with dora or pissa")
            tuner.bind(affine.weight, affine.bias)
        self.sites[name], self.tuners[name] = site, tuner

    def _copy(self, backbone: nn.Module, sites: Sites, name: str) -> None:
        """Have copies of the modules of a name trained in their place."""
        for site in sites.modules(backbone, name):
            path = site.reads.path
            for p in backbone.get_submodule(path).parameters():
                require_plain(p, f"a trained copy of {path}")
            tuner = CopiedModule(backbone.get_submodule(path))
            for other in self.sites.values():
                within = any(point.path.startswith(f"{path}.") for point in (other.reads, other.writes))
                if within or (other.reads.path == path and other.op in (*PARTS, "words", "embed", "norm")):
                    raise MethodError(f"modules_to_save: {path} is copied, and {other.reads.path} in it has a tuner")
            self.sites[site.name], self.tuners[site.name] = site, tuner

    @property
    def inside(self) -> list[tuple[Site, nn.Module]]:
        """What is added inside the backbone, before its tail: nothing while it is in the backbone's own weights."""
        return [] if self.merged else self._placed("norm", "tail", outside=True)

    @property
    def in_tail(self) -> list[tuple[Site, nn.Module]]:
        """What is added to the final norm, which the tail runs."""
        return [] if self.merged else self._placed("norm", "tail")

    def _placed(self, *ops: str, outside: bool = False) -> list[tuple[Site, nn.Module]]:
        return [(site, self.tuners[name]) for name, site in self.sites.items() if (site.op in ops) is not outside]

    @property
    def copies(self) -> bool:
        """Whether it trains copies of modules: one pass then serves one adapter."""
        return any(isinstance(tuner, CopiedModule) for tuner in self.tuners.values())

    @property
    def reads_features(self) -> bool:
        """Whether the backbone's own features are all that it needs: nothing is tuned inside the backbone."""
        return not self.full and not self._placed("norm", "tail", outside=True)

    @property
    def stackable(self) -> bool:
        """Whether adapters of its kind can run as one: a network on the pixels cannot."""
        return not self.copies and (self.side is None or self.side.output != "beside")

    def accepts(self, kept: TokenSelection) -> bool:
        """Whether its output can be had from features of which the tokens `kept` are there."""
        side = side_of(self.method)
        if kept.tokens == "components":
            return side is not None and side.accepts(kept.components)
        return self.request.tokens.of(kept) is not None

    @property
    def components(self) -> int | None:
        """How many of each layer's components its path reads; None: its tokens, or it has no such path."""
        return self.side.stages.components if isinstance(self.side, PathNetwork) else None

    def set_components(self, bases: Mapping[int, Tensor]) -> None:
        """Give a path that reads components those that were fitted, (d_l, k) by layer."""
        if isinstance(self.side, PathNetwork):
            self.side.set_components(bases)

    def set_shared(self, state: Mapping[str, Tensor]) -> None:
        """Give a path whose fixed weights are common to many tasks those that were trained.

        Raises:
            CheckpointError: it has none, or they are of other sizes.
        """
        if not isinstance(self.side, PathNetwork):
            raise CheckpointError("shared weights are of bypass-query-shared and the like: this method has none")
        self.side.set_shared(state)

    def beside(self, features: Features) -> Tensor:
        """The side network's output for features into which no gradient goes."""
        assert self.side is not None
        return self.side(features.detached())  # type: ignore[no-any-return]

    def pooled(self, features: Features, tail: Tail) -> Tensor:
        """What the head reads, (b, d) as a rule, from the features that it asks for."""
        if self.side is None:
            return tail(features.last, features.mask)
        out: Tensor = self.side(features)
        if self.side.output == "beside":
            return self.side.blend(tail(features.last), out)
        return out if self.side.output == "pooled" else tail(out, features.mask)

    def logits(self, features: Features, tail: Tail) -> Tensor:
        """What the head makes of it; of a side network's parts, a product each."""
        if self.side is None or self.side.output != "pooled" or not isinstance(self.head, nn.Linear):
            out: Tensor = self.head(self.pooled(features, tail))
            return out
        *rest, last = self.side.parts(features)
        weights = torch.split(self.head.weight, [part.shape[-1] for part in (*rest, last)], -1)
        out = F.linear(last, weights[-1], self.head.bias)
        for part, weight in zip(rest, weights[:-1], strict=True):
            out = out + (weight @ part.mT).mT  # so that of many heads on the same part one matrix is multiplied
        return out


class Reader(nn.Module):
    """An adapter as a function of the features: side network, frozen tail, head. It refers to the backbone, for the
    tail's sake, and owns the adapter alone."""

    def __init__(self, adapter: AdapterModule, backbone: nn.Module, sites: Sites, tail: Tail) -> None:
        super().__init__()
        self.adapter, self.tail, self._frozen = adapter, tail, (backbone, sites)

    def select(self, features: Features) -> Features:
        """What it reads of more features.

        Raises:
            MethodError: they are too few.
        """
        adapter, request = self.adapter, self.adapter.request
        if features.tokens.tokens == "components" and adapter.accepts(features.tokens):
            return features
        try:
            chosen = features.select(request.tokens, request.layers)
        except KeyError:
            given, wanted = features.tokens.tokens, request.tokens.tokens
            raise MethodError(f"the adapter reads tokens {wanted!r}; given are {given!r}") from None
        return Features(
            chosen.layers,
            chosen.tokens,
            features.mask if request.mask else None,
            features.pixels if request.pixels else None,
        )

    def forward(self, features: Features, head: bool = True) -> Tensor:
        """Logits, or with `head=False` what the head reads."""
        backbone, sites = self._frozen
        in_tail = group_by_site((site, "", tuner) for site, tuner in self.adapter.in_tail)
        with backbone_lock(backbone), attach(backbone, sites, in_tail):
            return self.read(features, head)

    def read(self, features: Features, head: bool = True) -> Tensor:
        """The same, where what is added to the tail has been attached."""
        if self.adapter.side is not None and self.adapter.reads_features:
            features = features.detached()
        return self.adapter.logits(features, self.tail) if head else self.adapter.pooled(features, self.tail)


def _left_out(site: Site, config: TunerConfig) -> bool:
    """Among all linear maps there may be a few that LoRA has no use for: those narrower than the rank, and convolutions
    whose padding depends on the map."""
    rank, kernel = getattr(config, "rank", 0), site.info.kernel
    if kernel is not None:
        return bool(rank) and kernel.padding is None
    return bool(rank > min(site.info.in_features, site.info.out_features))


def feature_info(backbone: nn.Module, sites: Sites, pool: str, side: SideConfig | None) -> FeatureInfo:
    """What a side network may know of the backbone.

    Args:
        backbone: read for its weights, where the side network begins from them.
        sites: its.
        pool: how its last layer is pooled.
        side: the side network's settings.
    """
    first = next((site for site in sites.all if site.op == "fc1"), None)
    weight = None if first is None else getattr(backbone.get_submodule(first.writes.path), "weight", None)
    described = first is not None and (weight is None or weight.is_meta)
    return FeatureInfo(
        name=sites.anatomy.name,
        layers=sites.features,
        stages=sites.stages,
        blocks=len(sites.blocks),
        head=sites.info,
        pool=sites.pool,
        pooled=live(sites, pool),
        hidden=next((site.info.in_features for site in sites.all if site.op == "fc2"), 4 * sites.info.out_features),
        denoises=sites.join is not None,
        decoder=bool(sites.anatomy.stems),
        weights=None if described else lambda: affine_maps(backbone, sites),
    )


def affine_maps(backbone: nn.Module, sites: Sites) -> Sequence[Mapping[str, Sequence[Affine]]]:
    """Role → affine maps of every block."""
    roles: list[dict[str, list[Affine]]] = [{} for _ in sites.blocks]
    for site in sites.all:
        if site.op in PARTS and site.block is not None:
            affine = site.affine(backbone)
            require_plain(affine.weight, "a side network that begins from them")
            roles[site.block].setdefault(site.op, []).append(affine)
    return roles


def prune_ladder(net: LadderNet, backbone: nn.Module, sites: Sites, score: Callable[[nn.Parameter], Tensor]) -> None:
    """Give a ladder the best of the backbone's own weights by `score`; see `restuning.side.ladder.prune`."""
    prune(net, affine_maps(backbone, sites), score)


def _built(side: SideConfig, info: FeatureInfo, sites: Sites, pool: str, width: int) -> SideNetwork:
    if sites.join is not None and (side.own_output or side.reads_pixels() or side.needs_weights):
        raise MethodError(f"{type(side).__name__} needs a head; {sites.anatomy.name} has none: a Bypass can be")
    if side.reads_pixels() and not side.own_output:
        if pool == "none":
            raise MethodError("side-tuning blends pooled features: pool must not be none")
        info = replace(info, head=replace(info.head, out_features=width))
    return side.build(info)


def _allows(net: SideNetwork, tokens: TokenSelection) -> bool:
    """Whether the network can compute its output for these tokens from these tokens alone."""
    if tokens in (FIRST, LAST):
        return not net.mixes_tokens
    return net.keeps_mean if tokens == MEAN else True
