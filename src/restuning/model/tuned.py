"""adapt(backbone, method) → Tuned: a frozen backbone with named adapters, each with its tuners and its head."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning._types import Features
from restuning.backbones.anatomy import AFFINE, PARTS, Anatomy
from restuning.backbones.sites import Site, Sites, find_sites, tower_of
from restuning.data.objective import objective
from restuning.errors import CheckpointError, MethodError
from restuning.hooks.fsdp import Shards, require_unsharded
from restuning.hooks.law import Attachment, group_by_site
from restuning.hooks.memory import FrozenOpMemory
from restuning.hooks.points import NamedTuners, backbone_lock
from restuning.hooks.recompute import Replay, checkpoints, replays_nothing, switch_checkpoints
from restuning.hooks.tail import live, tail_of
from restuning.hooks.taps import Taps, tap
from restuning.methods.files import from_dict, to_dict
from restuning.methods.named import find_method
from restuning.methods.spec import Full, Ladder, Method, grid_of, parts_of
from restuning.model.adapter import AdapterModule, Reader
from restuning.model.denoiser import PerAdapter, Plug, each_of, joined, output_of, serves
from restuning.model.files import (
    AdapterConfig,
    check_config,
    fetch,
    fingerprint_of,
    push,
    read,
    read_config,
    same_weights,
    write,
)
from restuning.model.mixed import AdapterStack, kind_of, serve, take_rows
from restuning.model.stack import PerRow, Stack
from restuning.side.features import ALL, TokenSelection
from restuning.tuners.base import Mergeable


class Tuned(nn.Module):
    """A frozen backbone and its named adapters. Made by `adapt` or `Tuned.from_pretrained`.

    `tuned(x)` gives the active adapter's logits (b, classes), or {name: logits} when several are active: those read
    one pass of the backbone, in which the tuners of all of them act together. With `labels=` it gives a dict of
    `loss` (its kind of task's) and `logits`, as `transformers.Trainer` expects. Arguments go to the backbone as they
    are; a dict of tensors, as tokenizers give it, by keyword.
    The backbone is a guest: its code, attributes and state_dict stay as they came, and hooks live during `forward`
    only. It stays in eval mode (dropout and batch statistics frozen) unless `train_mode=True` or the method is `full`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        anatomy: Anatomy | Sites | None = None,
        train_mode: bool = False,
        backbone_name: str | None = None,
        device: torch.device | str | None = None,
        fingerprint: list[float] | None = None,
    ) -> None:
        """device and fingerprint: where adapters are made, and how the weights are told apart, if not as the backbone
        (which may be only described, on the meta device) has it."""
        super().__init__()
        self._device = device
        self.body = sum(p.numel() for p in backbone.parameters())
        self._sites = find_sites(backbone, anatomy)
        self._came = (
            {name: p.requires_grad for name, p in backbone.named_parameters()},
            {name: module.training for name, module in backbone.named_modules()},
        )
        self._train_mode, self._disabled = train_mode, False
        self._name, self._class = backbone_name or name_of(backbone), type(backbone).__name__
        self.active_adapters: tuple[str, ...] = ()
        self.backbone = backbone.requires_grad_(False)
        self._fingerprint = fingerprint or self._print()
        self.adapters = nn.ModuleDict()
        self._readers: dict[str, Reader] = {}
        self._stacks: list[AdapterStack] = []
        self._replay, self._checkpointed = Replay(), bool(checkpoints(backbone))
        self._compiled: Callable[..., Tensor] | None = None
        self._shards: Shards | None = None
        self.train(False)

    # ---- adapters: add, choose, disable, delete

    def add_adapter(
        self,
        name: str,
        method: str | Method,
        num_classes: int | None = None,
        *,
        pool: str | None = None,
        classes: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        kind: str = "single-label",
    ) -> None:
        """Add an adapter and make it active. Without classes its output is the pooled feature (b, d).

        pool: `cls`, `mean`, `cls+mean`, `last` (the last token that is no padding), `map` (the backbone's own pooler)
        or `none` (every token); None: as the backbone pools, or `none` per token (a side path on a grid has its head
        read all of its tokens). kind: of task, `single-label`, `multi-label`, `regression` or `per-token`; under
        regression `num_classes` is the number of targets. Raises MethodError for a name in use or unfit, an unknown
        method, a class count below 1, a pooling that a kind cannot have; SiteError for an operation that is not there.
        """
        if name in self.adapters:
            raise MethodError(f"there is an adapter named {name!r} already: delete it first, or choose another name")
        if not re.fullmatch(r"\w[\w-]*", name) or hasattr(self.adapters, name):
            raise MethodError(f"an adapter cannot be named {name!r}: use letters, digits, '_' and '-'")
        if num_classes is None and classes is not None:
            num_classes = len(classes)
        if num_classes is not None and (num_classes := int(num_classes)) < 1:
            raise MethodError(f"num_classes={num_classes}: expected at least 1")
        if classes is not None and len(classes) != num_classes:
            raise MethodError(f"{len(classes)} class names for num_classes={num_classes}")
        objective(kind)
        spec = find_method(method, self.family)
        if isinstance(spec, Full):
            require_unsharded(self._shards, "full fine-tuning")
        if any(isinstance(part, Ladder) and part.init != "random" for part in parts_of(spec)):
            require_unsharded(self._shards, "a ladder that is pruned from them")
        if kind == "per-token":
            if grid_of(spec) is not None or pool not in (None, "none"):
                raise MethodError("labels per token need every token: no grid, and no pooling but none")
            pool = "none"
        if (isinstance(spec, Full) and len(self.adapters)) or any(_adaptation(a).full for a in self.adapters.values()):
            raise MethodError("full fine-tuning changes the backbone itself, so it cannot share it with other adapters")
        tail = tail_of(self.backbone, self._sites, pool if grid_of(spec) is None else "flat")
        config = AdapterConfig(
            method=method if isinstance(method, str) else None,
            spec=to_dict(spec),
            backbone={
                "name": self._name,
                "class": self._class,
                "anatomy": self._sites.anatomy.name,
                "width": self._sites.info.out_features,
                "depth": len(self._sites.blocks),
                "fingerprint": self._fingerprint,
            },
            pool=tail.pool,
            num_classes=num_classes,
            classes=None if classes is None else tuple(c.item() if hasattr(c, "item") else c for c in classes),
            preprocessing=None if preprocessing is None else dict(preprocessing),
            kind=kind,
        )
        check_config(config)
        like = next(self.backbone.parameters(), torch.empty(0))
        with torch.device(self._device or like.device):
            adapter = AdapterModule(self.backbone, self._sites, spec, tail.pool, num_classes, config)
        self.adapters[name] = adapter.to(like.dtype).train(self.training)
        self._readers[name] = Reader(self._find(name), self.backbone, self._sites, tail)
        self.active_adapters = (name,)
        if adapter.full or len(self.adapters) == 1:  # the first after `unload` finds the backbone as that left it
            self.backbone.requires_grad_(adapter.full)
            self.train(self.training)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make one adapter active, or several. Nothing else changes, `requires_grad` neither."""
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        for name in names:
            self._find(name)
        if not names:
            raise MethodError("set_adapter needs a name at least; use disable_adapter() for the bare backbone")
        self.active_adapters = names

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While it lasts, `tuned(x)` is the bare backbone; the active adapters stay those they were."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; the others stay as they are."""
        full = self._find(name).full
        del self.adapters[name], self._readers[name]
        if full:
            self.backbone.requires_grad_(False)
            self.train(self.training)
            self._fingerprint = self._print()  # its weights are others now
        self._stacks = [served for served in self._stacks if name not in served.readers]
        self.active_adapters = tuple(n for n in self.active_adapters if n != name)

    def unload(self) -> nn.Module:
        """The backbone as it came: same code, flags, modes and (unless fully tuned) weights. The adapters are gone; so
        is the frozen state that another `Tuned` on the same backbone counts on."""
        self._replay.leave()
        self.gather()
        for name in list(self.adapters):
            self.delete_adapter(name)
        if bool(checkpoints(self.backbone)) != self._checkpointed:
            switch_checkpoints(self.backbone, self._checkpointed)
        flags, modes = self._came
        for name, p in self.backbone.named_parameters():
            p.requires_grad_(flags.get(name, True))  # what was put there since is as a new module is
        for name, module in self.backbone.named_modules():
            module.training = modes.get(name, modes[""])
        return self.backbone

    def merge_and_unload(self, name: str | None = None) -> nn.Module:
        """The backbone with the active (or the named) adapter in its own weights: no tuner is left, its features are
        the tuned ones. All adapters are gone, their heads too.

        Raises MethodError for a tuner that no weight can hold (all but LoRA, SSF and BitFit), or for a convolution that
        standardises its weight; nothing is changed then.
        """
        name = self._one(name)
        adapter = self._find(name)
        if adapter.full or adapter.side is not None:
            kind = "a side path" if adapter.side is not None else "full fine-tuning"
            raise MethodError(f"adapter {name!r} cannot be merged: {kind} is no change of frozen weights")
        for place, site in adapter.sites.items():
            tuner = adapter.tuners[place]
            if not isinstance(tuner, Mergeable) or site.op not in (*AFFINE, *PARTS, "words"):
                raise MethodError(
                    f"adapter {name!r} cannot be merged: {type(tuner).__name__} at {place} is no change of a weight; "
                    "LoRA, SSF and BitFit on affine modules are"
                )
            standardised = "" if site.weight else type(self.backbone.get_submodule(site.reads.path)).__name__
            if standardised.startswith(("StdConv", "ScaledStdConv")):
                raise MethodError(f"{standardised} standardises its weight: nothing can be merged into it")
        self.gather()
        changed: dict[Site, tuple[Tensor, Tensor]] = {}
        for place, site in adapter.sites.items():
            change: Any = adapter.tuners[place]
            affine = site.affine(self.backbone)
            weight, bias = affine.weight, affine.bias
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            more_weight, more_bias = change.merged(weight, bias)
            # tuners of one site add up, each to the frozen map
            to_weight, to_bias = changed.get(site, (weight, bias))
            changed[site] = to_weight + (more_weight - weight), to_bias + (more_bias - bias)
            alone = affine.bias is None and not _takes_bias(self.backbone, site)
            if alone and (weight.ndim == 1 or changed[site][1].any()):
                raise MethodError(f"adapter {name!r} cannot be merged: no bias is there to take what {place} adds")
        backbone = self.unload()
        for site, (weight, bias) in changed.items():
            affine = site.affine(backbone)
            affine.weight.data.copy_(weight.detach())
            if affine.bias is not None:
                affine.bias.data.copy_(bias.detach())
            elif bias.any():
                module: Any = backbone.get_submodule(site.reads.path)
                module.bias = nn.Parameter(bias.detach())
        return backbone

    # ---- what it computes

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the active adapters; with `adapter_names`, one for every row, logits (b, c) of a mixed batch.

        A row without an adapter (None) passes through the bare backbone and gives what that says, (b, c), or its pooled
        feature. Rows narrower than the widest say −inf beyond their own classes.
        Raises MethodError for a name that is not there, if there are not as many names as rows, and for a mix of pooled
        outputs with outputs of every token.
        """
        self._replay.leave()  # of a backward pass that was interrupted
        args, kwargs = arguments(args, kwargs)
        if self._disabled:
            return self.backbone(*args, **kwargs)
        if self.denoises:
            if labels is not None or adapter_names is not None:
                raise MethodError(f"{self._sites.anatomy.name} denoises: neither labels= nor adapter_names=")
            with self.acting() as spoke:
                out = self.backbone(*args, **kwargs)
                spoke(out)
            return out
        if adapter_names is not None:
            logits = self._mixed(adapter_names, args, kwargs)
        elif self._compiled is not None and len(self._active()) == 1:
            logits = self._in_one_graph(args, kwargs)
        else:
            logits = self.from_features(self.features(*args, **kwargs))
        if labels is None:
            return logits
        if not isinstance(logits, Tensor):
            raise MethodError("labels= needs one active adapter")
        configs = [self.adapter_config(name) for name in adapter_names or self._active() if name is not None]
        kinds = {config.kind for config in configs}
        if len(kinds) > 1:
            raise MethodError(f"labels= for adapters of several kinds of task ({', '.join(sorted(kinds))})")
        if kinds & {"multi-label", "regression"} and len({config.num_classes for config in configs}) > 1:
            raise MethodError(f"labels= for {kinds.pop()} adapters of several widths: a row would be padded with −inf")
        loss = objective(kinds.pop() if kinds else "single-label").loss
        return {"loss": loss(logits, labels), "logits": logits}

    @property
    def denoises(self) -> bool:
        """Whether the backbone predicts noise: it has no head, what it says is its own output, and the tuners of all
        active adapters act together."""
        return self._sites.join is not None

    @contextmanager
    def acting(self) -> Iterator[Callable[[Any], None]]:
        """While it lasts, one call of a backbone that denoises is one of the tuned backbone; what it yields is to be
        told what that said. Side paths add to the input of its last modules; what comes before these runs without
        autograd if nothing else is tuned."""
        self._replay.leave()
        active = [self._find(name) for name in self._active()]
        inside = group_by_site(
            (site, str(i), tuner) for i, adapter in enumerate(active) for site, tuner in adapter.inside
        )
        attachment = Attachment(self.backbone, self._sites, inside)
        replays = bool(inside) and torch.is_grad_enabled() and bool(checkpoints(self.backbone))

        def spoke(out: Any) -> None:
            if replays:
                self._replay.watch([output_of(out)], partial(attachment.on, recomputing=True))

        thrifty = torch.is_grad_enabled() and not checkpoints(self.backbone)
        with (
            backbone_lock(self.backbone),
            FrozenOpMemory() if thrifty else nullcontext(),
            attachment.on(),
            joined(self.backbone, self._sites, active),
        ):
            yield spoke

    def shares(self, name: str) -> bool:
        """Whether `each` can serve this adapter."""
        return serves(self._sites, self._find(name))

    def each(self, *args: Any, rows: bool = False, plain: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        """{name: output} of every active adapter alone, from one call of a backbone that denoises.

        rows: the batch holds a part of rows for each of them, in their order; else all of them read all of it. plain:
        the untuned backbone's too, under "". Raises MethodError if one of them tunes inside the backbone, or if its
        last modules are told more than what comes before them (DiT's).
        """
        args, kwargs = arguments(args, kwargs)
        active = {name: self._find(name) for name in self._active()}
        with backbone_lock(self.backbone):
            return each_of(self.backbone, self._sites, active, PerAdapter(rows, plain), args, kwargs)

    def plug(self) -> Plug:
        """Have a backbone that denoises act as the tuned one wherever it is called, in a pipeline of diffusers too,
        until `remove()`, or until the end of a `with` block."""
        return Plug(self.backbone, self)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """What the active adapter's head reads, (b, d) as a rule, or {name: …} when several are active."""
        return self.from_features(self.features(*args, **kwargs), head=False)

    def features(self, *args: Any, **kwargs: Any) -> Features:
        """The features x_l (b, n, d) that the active adapters read, the tokens that no output can see left out.

        They carry a gradient only if tuners act inside the backbone: a side path's backbone runs without autograd.
        """
        args, kwargs = arguments(args, kwargs)
        active = [(name, self._find(name)) for name in self._active()]
        inside = group_by_site((site, name, tuner) for name, adapter in active for site, tuner in adapter.inside)
        frozen = all(adapter.reads_features for _, adapter in active)
        return self._read(inside, self._layers(), self._live(), frozen, args, kwargs)

    def _read(
        self,
        inside: Mapping[Site, NamedTuners],
        layers: Sequence[int],
        view: TokenSelection,
        frozen: bool,
        args: Any,
        kwargs: Any,
    ) -> Features:
        self._replay.leave()
        attachment = Attachment(self.backbone, self._sites, inside)

        @contextmanager
        def on(recomputing: bool = False) -> Iterator[Taps]:
            with attachment.on(recomputing), tap(self.backbone, self._sites, layers, view) as taps:
                yield taps

        # a block that is run again in a backward pass has to keep what it kept
        thrifty = self._sites.anatomy.convolutional and not checkpoints(self.backbone)
        quiet = torch.no_grad() if frozen else FrozenOpMemory() if thrifty else nullcontext()
        with backbone_lock(self.backbone), quiet, on() as taps:
            self.backbone(*args, **kwargs)
        if taps.oblong and view == ALL and len(layers) > 1 and not self._sites.uniform:
            raise MethodError("a side path over stages needs square maps: images as high as wide")
        trained = any(p.requires_grad for here in inside.values() for _, tuner in here for p in tuner.parameters())
        if trained and torch.is_grad_enabled() and checkpoints(self.backbone):
            self._replay.watch(taps.features, partial(on, recomputing=True))
        return taps.features

    def from_features(self, features: Features, kept: TokenSelection | None = None, *, head: bool = True) -> Any:
        """From `features` to logits: side path, frozen tail, head. Needs nothing else of the backbone.

        A mean over a text's tokens, the last of them, and a ladder on them want the attention mask (b, n) ahead of the
        layers.

        kept: which tokens the features hold; None: those that `features` gives. head: whether the head is run.
        Without autograd, adapters of one shape run as one.
        """
        kept = kept or self._live()
        at = dict(zip(self._layers(kept), features, strict=True))
        names = self._active()
        if len(names) == 1:
            return self._readers[names[0]](self._readers[names[0]].own(at, kept), head)
        found: dict[str, Tensor] = {}
        if not torch.is_grad_enabled() and not self.training:
            stacks = self._stacks = serve(self._readers, names, self._stacks)
            for served in stacks:
                found |= served(at, kept, head)
        for name in names:
            if name not in found:
                found[name] = self._readers[name](self._readers[name].own(at, kept), head)
        return {name: found[name] for name in names}

    def compile(self, **options: Any) -> None:
        """Have the pass of one active adapter, from the input to what the head reads, run as a compiled graph.

        options: those of `torch.compile`, `fullgraph=True` among them. Adapters of one kind, whatever their classes,
        share the graph: to switch between them compiles nothing; torch compiles no more kinds than
        `torch._dynamo.config.recompile_limit`. (`torch.compile(tuned)` cannot see hooks that come and go: use this.)
        Raises MethodError for a backbone that denoises.
        """
        if self.denoises:
            raise MethodError(f"{self._sites.anatomy.name} denoises: only backbones with a head are compiled")
        require_unsharded(self._shards, "a compiled pass")
        self._compiled = torch.compile(self._pass, **options)

    def _in_one_graph(self, args: Any, kwargs: Any) -> Tensor:
        (name,) = self._active()
        adapter = self._find(name)
        added = group_by_site((site, "", tuner) for site, tuner in (*adapter.inside, *adapter.in_tail))
        attachment = Attachment(self.backbone, self._sites, added)
        with (
            backbone_lock(self.backbone),
            replays_nothing() if checkpoints(self.backbone) else nullcontext(),
            attachment.on(),
            tap(self.backbone, self._sites, adapter.layers, adapter.view) as taps,
        ):
            pooled = self._compiled(kind_of(name, adapter), self._readers[name], taps, args, kwargs)  # type: ignore[misc]
        out: Tensor = adapter.head(pooled)  # outside: tasks may differ in their classes
        return out

    def _pass(self, kind: str, reader: Reader, taps: Taps, args: Any, kwargs: Any) -> Tensor:
        """kind: part of the signature, since what is attached is not."""
        with torch.no_grad() if reader.adapter.reads_features else nullcontext():
            self.backbone(*args, **kwargs)
        return reader.read(taps.features, head=False)

    def _mixed(self, rows: Sequence[str | None], args: Any, kwargs: Any) -> Tensor:
        """Every kind of adapter takes one pass of the backbone, with all of its rows."""
        batch = len(next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), ()))
        if len(rows) != batch or not batch:
            raise MethodError(f"adapter_names has {len(rows)} names for a batch of {batch}: expected one for every row")
        kinds: dict[str | None, list[int]] = {}
        for i, name in enumerate(rows):
            kinds.setdefault(None if name is None else kind_of(name, self._find(name)), []).append(i)
        if len(kinds) > 1 and kwargs.get("past_key_values") is not None:
            raise MethodError("adapter_names with past_key_values: a cache is of one kind of adapter, one pass for all")
        parts = []
        for at in kinds.values():
            own_args, own_kwargs = take_rows((args, kwargs), at, batch)
            parts.append(self._rows([rows[i] for i in at], own_args, own_kwargs))
        if len({part.ndim for part in parts}) > 1:
            raise MethodError("adapter_names mixes pooled outputs with outputs of every token")
        wide = max(part.shape[-1] for part in parts)
        out = torch.cat([F.pad(part, (0, wide - part.shape[-1]), value=-torch.inf) for part in parts])
        return out[torch.tensor([i for at in kinds.values() for i in at], device=out.device).argsort()]

    def _rows(self, rows: Sequence[str | None], args: Any, kwargs: Any) -> Tensor:
        """Logits of rows whose adapters are of one kind."""
        names = [name for name in dict.fromkeys(rows) if name is not None]
        if not names:
            tail = tail_of(self.backbone, self._sites)
            last, view = [len(self._sites.blocks)], live(self._sites, tail.pool)
            with backbone_lock(self.backbone), tap(self.backbone, self._sites, last, view) as taps:
                said = self.backbone(*args, **kwargs)
            return said if isinstance(said, Tensor) and said.ndim == 2 else tail(taps.features[0])
        like = self._find(names[0])
        which = torch.tensor([names.index(str(name)) for name in rows], device=next(self.backbone.parameters()).device)
        alike = zip(*(self._find(name).inside for name in names), strict=True)
        inside = group_by_site(
            (same[0][0], "", same[0][1] if len(names) == 1 else PerRow([tuner for _, tuner in same], which))
            for same in alike
        )
        features = self._read(inside, like.layers, like.view, like.reads_features, args, kwargs)
        if len(names) == 1 or not any(True for _ in like.parameters()):
            return self._readers[names[0]](features)  # type: ignore[no-any-return]
        readers = Stack([self._readers[name] for name in names])
        out: Tensor = readers(tuple(x[:, None] for x in features), own=True, which=which)
        return out.squeeze(1)

    @property
    def family(self) -> str:
        """Which of `restuning.methods.FAMILIES` the methods' names mean."""
        return self._sites.anatomy.family

    @property
    def reads_features(self) -> bool:
        """Whether the active adapters leave the backbone's features alone, so that these can be kept and read again."""
        return all(self._find(name).reads_features for name in self._active())

    def train(self, mode: bool = True) -> "Tuned":
        """Train or evaluate the adapters; a frozen backbone stays in eval mode."""
        super().train(mode)
        full = any(_adaptation(a).full for a in self.adapters.values())
        self.backbone.train(mode and (self._train_mode or full))
        for module in checkpoints(self.backbone):
            module.training = mode  # transformers recomputes in training only; dropout, in other modules, stays off
        return self

    accepts_loss_kwargs = False
    """What transformers' Trainer asks: the loss is a mean over the batch, whatever else there is to count."""

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Have the backbone recompute its blocks in the backward pass, as transformers and timm do. Tuners inside them
        act then too; a side path needs none of it. Raises MethodError for a backbone that cannot, and for other
        than the defaults of every_n_layers and offload, which Trainer hands on."""
        if every_n_layers != 1 or offload:
            raise MethodError("every block is recomputed, and nothing offloaded: leave out every_n_layers and offload")
        switch_checkpoints(self.backbone, True, {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
        self.train(self.training)

    def gradient_checkpointing_disable(self) -> None:
        """The inverse of `gradient_checkpointing_enable`."""
        switch_checkpoints(self.backbone, False)
        self.train(self.training)

    def shard(self, device: torch.device | str | None = None) -> None:
        """Share the frozen blocks out over the processes of `torch.distributed` (FSDP2): each holds a part of them, and
        the whole of one block while that runs. Adapters stay whole everywhere, `restuning.train.fit` trains them as
        ever; from here on the processes run the backbone together, as often each. device: to which kind of device the
        shares go, block after block, if not where the backbone is.

        Raises RestuningError where there is one process, MethodError where the backbone is trained or denoises.
        """
        if self._shards is not None:
            raise MethodError("the backbone's blocks are shared out already")
        if self.denoises:
            raise MethodError(f"{self._sites.anatomy.name} denoises: its blocks cannot be shared out")
        if self._compiled is not None:
            raise MethodError("a compiled pass takes the backbone as it was: its blocks cannot be shared out")
        place = device or next(self.backbone.parameters()).device
        self._shards = Shards(self.backbone, self._sites.blocks, place)

    def gather(self) -> None:
        """The inverse of `shard`, by all processes together; nothing if it was not called. `unload` does it too."""
        if self._shards is not None:
            self._shards.gather()
            self._shards = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stacks": [], "_replay": Replay(), "_compiled": None}  # these are of this copy alone

    def _apply(self, fn: Any, recurse: bool = True) -> "Tuned":
        self._stacks = []  # of tensors that move now
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _active(self) -> tuple[str, ...]:
        if not self.active_adapters:
            raise MethodError("no adapter is active: add one, set one, or use disable_adapter()")
        return self.active_adapters

    def _one(self, name: str | None = None) -> str:
        """The named adapter, or the active one. Raises MethodError where several are active."""
        if name is None and len(self._active()) > 1:
            raise MethodError(f"several adapters are active ({', '.join(self._active())}): expected the name of one")
        return name if name is not None else self._active()[0]

    def _print(self) -> list[float] | None:
        """By which its blocks are told from those of other weights: heads and poolers come and go."""
        return fingerprint_of(nn.ModuleList(self.backbone.get_submodule(path) for path in self._sites.blocks))

    def _layers(self, kept: TokenSelection | None = None) -> list[int]:
        """Those that the active adapters read, where the tokens `kept` (None: those that are tapped) are there."""
        kept = kept or self._live()
        return sorted({layer for name in self._active() for layer in self._find(name).layers_of(kept)})

    def _live(self) -> TokenSelection:
        """What is tapped of every layer: the tokens that all active adapters' outputs can see, or all tokens."""
        views = {self._find(name).view for name in self._active()}
        return views.pop() if len(views) == 1 else ALL

    def _find(self, name: str) -> AdapterModule:
        if name not in self.adapters:
            raise MethodError(f"no adapter named {name!r}: there is {', '.join(self.adapters) or 'none'}")
        return _adaptation(self.adapters[name])

    # ---- save, load, publish

    def save_pretrained(self, path: str | Path, name: str | None = None) -> None:
        """Write the active (or the named) adapter with its head: adapter_config.json, adapter_model.safetensors."""
        adapter = self._find(self._one(name))
        state = adapter.state_dict()
        if adapter.full:
            state |= {f"backbone.{key}": value for key, value in self.backbone.state_dict().items()}
        write(Path(path), adapter.config, state)

    def check_adapter(self, folder: Path) -> None:
        """Raises CheckpointError for a saved adapter of another backbone, by what its card says."""
        made, here = read_config(folder).backbone, self._sites
        if (made.get("width"), made.get("depth")) != (here.info.out_features, len(here.blocks)):
            raise CheckpointError(
                f"{folder}: made for {made.get('name')} (width {made.get('width')}, {made.get('depth')} blocks); "
                f"this is {self._name} (width {here.info.out_features}, {len(here.blocks)} blocks)"
            )
        mine = (self._fingerprint, fingerprint_of(self.backbone))  # files of older versions have that of all of it
        if not any(same_weights(made.get("fingerprint"), one) for one in mine if one is not None or one is mine[0]):
            raise CheckpointError(f"{folder}: made for {made.get('name')} with other weights than this {self._name}")

    def load_adapter(
        self,
        path: str | Path,
        name: str = "default",
        *,
        method: Method | None = None,
        revision: str | None = None,
    ) -> None:
        """Add a saved adapter, from a folder or a hub id, and make it active. method: needed if it has own tuners.

        Raises CheckpointError for files that are damaged, foreign, or of another backbone; nothing is changed then.
        """
        folder, active = fetch(path, revision), self.active_adapters
        self.check_adapter(folder)
        config, state = read(folder)
        try:
            spec = method if method is not None else from_dict(config.spec)
            self.add_adapter(
                name,
                spec,
                config.num_classes,
                pool=config.pool,
                classes=config.classes,
                preprocessing=config.preprocessing,
                kind=config.kind,
            )
        except MethodError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        adapter = self._find(name)
        adapter.config = config
        own = {key: value for key, value in state.items() if not key.startswith("backbone.")}
        wrong = _mismatch(adapter.state_dict(), own)
        if wrong:
            self.delete_adapter(name)
            self.active_adapters = active
            raise CheckpointError(f"{folder}: the tensors do not fit the method it names: {wrong}")
        adapter.load_state_dict(own)
        if adapter.full:
            self.backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k not in own})

    @classmethod
    def from_pretrained(
        cls,
        backbone: nn.Module,
        path: str | Path,
        name: str = "default",
        *,
        anatomy: Anatomy | Sites | None = None,
        method: Method | None = None,
        revision: str | None = None,
    ) -> "Tuned":
        """A saved adapter on its backbone; see `load_adapter`."""
        tuned = cls(backbone, anatomy=anatomy)
        try:
            tuned.load_adapter(path, name, method=method, revision=revision)
        except Exception:
            tuned.unload()
            raise
        return tuned

    def push_to_hub(self, repo_id: str, name: str | None = None, *, private: bool = False) -> str:
        """Publish the active (or the named) adapter on the Hugging Face hub; returns the address of the commit."""
        return push(repo_id, lambda folder: self.save_pretrained(folder, name), private=private)

    def print_trainable_parameters(self) -> None:
        """As PEFT prints it: trainable, all, percent."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def adapter_config(self, name: str | None = None) -> AdapterConfig:
        """What is saved beside an adapter: method, backbone, classes, pooling, preprocessing."""
        return self._find(name if name is not None else self._active()[0]).config


def adapt(
    backbone: nn.Module,
    method: str | Method,
    num_classes: int | None = None,
    name: str = "default",
    *,
    pool: str | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    kind: str = "single-label",
    anatomy: Anatomy | Sites | None = None,
    tower: str | None = None,
    train_mode: bool = False,
    backbone_name: str | None = None,
) -> Tuned:
    """Freeze `backbone` and adapt it by `method`, a name of `restuning.methods` or a method of your own.

    anatomy: how a backbone is built, where neither the table knows it nor a trace finds it, or its sites. tower: of a
    model with several (CLIP, an encoder with a decoder), the path of the one that is tuned. train_mode: let the
    backbone's dropout and batch statistics follow `train()`. See `Tuned` and `Tuned.add_adapter` for the rest, and for
    the errors raised.
    """
    if tower is not None:
        backbone = tower_of(backbone, tower)
    tuned = Tuned(backbone, anatomy=anatomy, train_mode=train_mode, backbone_name=backbone_name)
    try:
        tuned.add_adapter(name, method, num_classes, pool=pool, classes=classes, preprocessing=preprocessing, kind=kind)
    except Exception:
        tuned.unload()
        raise
    return tuned


def name_of(backbone: nn.Module) -> str:
    """What a backbone calls itself: timm's architecture, transformers' path, else its class."""
    timm = getattr(backbone, "pretrained_cfg", None)
    config = getattr(backbone, "config", None)
    if isinstance(timm, Mapping) and timm.get("architecture"):
        return str(timm["architecture"])
    return str(getattr(config, "_name_or_path", "") or type(backbone).__name__)


def _takes_bias(backbone: nn.Module, site: Site) -> bool:
    """Whether a module is called there that has the place for a bias."""
    return site.weight is None and "bias" in backbone.get_submodule(site.reads.path)._parameters


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of named tensors, as tokenizers give it, is keyword arguments."""
    if len(args) == 1 and isinstance(args[0], Mapping):
        return (), {**args[0], **kwargs}
    return args, kwargs


def _adaptation(module: nn.Module) -> AdapterModule:
    assert isinstance(module, AdapterModule)
    return module


def _mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first difference in names or shapes, in words; empty if there is none."""
    for key in sorted(expected.keys() | found.keys()):
        if key not in found:
            return f"{key} is missing"
        if key not in expected:
            return f"{key} is not expected"
        if expected[key].shape != found[key].shape:
            return f"{key} is {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
    return ""
