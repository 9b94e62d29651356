"""A frozen backbone and its named adapters: added, chosen, removed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from restuning.backbones.anatomy import Anatomy
from restuning.backbones.sites import Sites, find_sites
from restuning.errors import MethodError
from restuning.hooks.fsdp import Shards
from restuning.hooks.memory import check_memory
from restuning.hooks.recompute import Replay, checkpoints, switch_checkpoints
from restuning.methods.spec import Method
from restuning.model import files, merge, mixed
from restuning.model.adapter import AdapterModule, Reader
from restuning.model.build import Head, build_adapter
from restuning.model.compiled import CompiledPass
from restuning.model.threads import Choice


class AdapterCollection(nn.Module):
    """What `Tuned` holds: a frozen backbone, and adapters by name. What they compute is `Tuned`'s."""

    def __init__(
        self,
        backbone: nn.Module,
        *,
        anatomy: Anatomy | Sites | None = None,
        train_mode: bool = False,
        backbone_name: str | None = None,
        device: torch.device | str | None = None,
        fingerprint: list[float | None] | None = None,
        memory: str = "shared",
    ) -> None:
        """
        Args:
            backbone: frozen from here on.
            anatomy: how it is built, where the table does not know.
            train_mode: whether its dropout and batch statistics follow `train()`.
            backbone_name: its name in saved files; None: as it calls itself.
            device: where adapters are made; None: where the backbone is (which may be the meta device).
            fingerprint: how its weights are told from others; None: of those that are there.
            memory: what frozen operations keep for the backward pass, a mode of `restuning.hooks.memory.MEMORY`; it
                can be set anew between passes.

        Raises:
            SiteError: no anatomy fits.
            MethodError: an unknown mode of memory.
        """
        super().__init__()
        check_memory(memory)
        merge.require_unmerged(backbone, "another Tuned")
        self.memory = memory
        self.made_on = device
        self.sites: Sites = find_sites(backbone, anatomy)
        self.body = sum(p.numel() for p in backbone.parameters())
        self._came = (
            {name: p.requires_grad for name, p in backbone.named_parameters()},
            {name: module.training for name, module in backbone.named_modules()},
        )
        self._train_mode, self._disabled = train_mode, False
        self._choice = Choice()
        self.backbone_name = backbone_name or files.name_of(backbone)
        self.active_adapters: tuple[str, ...] = ()
        self.backbone = backbone.requires_grad_(False)
        self.fingerprint = fingerprint or files.fingerprint_of_blocks(backbone, self.sites)
        self.adapters = nn.ModuleDict()
        self._readers: dict[str, Reader] = {}
        self.stacks: list[mixed.AdapterStack] = []
        self.merged: merge.Merged | None = None
        self.replay, self._checkpointed = Replay(), bool(checkpoints(backbone))
        self._compiled: CompiledPass | None = None
        self.shards: Shards | None = None
        self.train(False)

    unmerge_adapter = merge.unmerge_adapter

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
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter and make it active. Without classes its output is the pooled feature (b, d).

        Args:
            name: letters, digits, `_` and `-`.
            method: a name of `restuning.METHODS`, a .json file of one, or a method.
            num_classes: of the head; under regression, the number of targets.
            pool: `cls`, `mean`, `cls+mean`, `last` (the last token that is no padding), `map` (the backbone's own
                pooler) or `none` (every token); None: as the backbone pools, or `none` per token (a side path on a grid
                has its head read all of its tokens).
            classes: their names, saved beside the adapter.
            preprocessing: of its items, saved beside the adapter.
            kind: of task, `single-label`, `multi-label`, `regression` or `per-token`.
            autocast_adapter_dtype: whether, on a backbone in float16 or bfloat16, the adapter is in float32, and what
                it reads is cast, as in PEFT; else it is in the backbone's dtype.

        Raises:
            MethodError: a name in use or unfit, an unknown method, a class count below 1, a pooling that a kind cannot
                have.
            SiteError: an operation that is not there.
        """
        head = Head.of(num_classes, kind, pool, classes)
        adapter, reader = build_adapter(self, name, method, head, preprocessing, autocast_adapter_dtype)
        with self._choice.changing():
            self.adapters[name], self._readers[name] = adapter.train(self.training), reader
            self.active_adapters = (name,)
        if adapter.full or len(self.adapters) == 1:  # the first after `unload` finds the backbone as that left it
            self.backbone.requires_grad_(adapter.full)
            self.train(self.training)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make one adapter active, or several. Nothing else changes, `requires_grad` neither."""
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        for name in names:
            self.adapter(name)
        if not names:
            raise MethodError("set_adapter needs a name at least; use disable_adapter() for the bare backbone")
        if self.merged is not None and {*names} != {*self.merged.names}:
            merge.require_unmerged(self.backbone, "another choice of adapters")
        with self._choice.changing():
            self.active_adapters = names

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While it lasts, `tuned(x)` is the bare backbone; the active adapters stay those they were."""
        merge.require_unmerged(self.backbone, "disable_adapter")
        with self._choice.changing():
            before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            with self._choice.changing(check=False):
                self._disabled = before

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; the others stay as they are."""
        merge.require_unmerged(self.backbone, "delete_adapter")
        full = self.adapter(name).full
        del self.adapters[name], self._readers[name]
        if full:
            self.backbone.requires_grad_(False)
            self.train(self.training)
            self.fingerprint = files.fingerprint_of_blocks(self.backbone, self.sites)  # its weights are others now
        self.forget_stacks(name)
        self.active_adapters = tuple(n for n in self.active_adapters if n != name)

    def unload(self) -> nn.Module:
        """The backbone as it came: same code, flags, modes and (unless fully tuned) weights. The adapters are gone; so
        is the frozen state that another `Tuned` on the same backbone counts on."""
        self.unmerge_adapter()
        self.replay.leave()
        self.unshard()
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

    # ---- modes

    def train(self, mode: bool = True) -> Self:
        """Train or evaluate the adapters; a frozen backbone stays in eval mode."""
        if mode:
            merge.require_unmerged(self.backbone, "training")
        super().train(mode)
        full = any(self.adapter(name).full for name in self.adapters)
        self.backbone.train(mode and (self._train_mode or full))
        for module in checkpoints(self.backbone):
            module.training = mode  # transformers recomputes in training only; dropout, in other modules, stays off
        return self

    def unshard(self) -> None:
        """The inverse of `fully_shard`, by all processes together; nothing if it was not called. `unload` does it
        too."""
        if self.shards is not None:
            self.shards.unshard()
            self.shards = None

    # ---- what it holds

    def adapter(self, name: str) -> AdapterModule:
        """The named adapter's modules. Raises MethodError for a name that is not there."""
        if name not in self.adapters:
            raise MethodError(f"no adapter named {name!r}: there is {', '.join(self.adapters) or 'none'}")
        found = self.adapters[name]
        assert isinstance(found, AdapterModule)
        return found

    def reader(self, name: str) -> Reader:
        """The named adapter as a function of the features. Raises MethodError for a name that is not there."""
        self.adapter(name)
        return self._readers[name]

    def adapter_config(self, name: str | None = None) -> files.AdapterConfig:
        """What is saved beside an adapter: method, backbone, classes, pooling, preprocessing."""
        return self.adapter(name if name is not None else self.active()[0]).config

    def active(self) -> tuple[str, ...]:
        """The names of the active adapters, one at least. Raises MethodError where none is."""
        if not self.active_adapters:
            raise MethodError("no adapter is active: add one, set one, or use disable_adapter()")
        return self.active_adapters

    def one(self, name: str | None = None) -> str:
        """The named adapter, or the active one. Raises MethodError where several are active."""
        if name is None and len(self.active()) > 1:
            raise MethodError(f"several adapters are active ({', '.join(self.active())}): expected the name of one")
        return name if name is not None else self.active()[0]

    def describe(self) -> dict[str, Any]:
        """The backbone, as saved files tell it from others."""
        return {
            "name": self.backbone_name,
            "class": type(self.backbone).__name__,
            "anatomy": self.sites.anatomy.name,
            "width": self.sites.info.out_features,
            "depth": len(self.sites.blocks),
            "fingerprint": self.fingerprint,
        }

    @property
    def family(self) -> str:
        """Which of `restuning.methods.FAMILIES` the methods' names mean."""
        return self.sites.anatomy.family

    @property
    def denoises(self) -> bool:
        """Whether the backbone predicts noise: it has no head, the output is its own, and the tuners of all active
        adapters act together."""
        return self.sites.join is not None

    def forget_stacks(self, name: str) -> None:
        """Have the named adapter's stacks made anew, when they are needed."""
        self.stacks = [stack for stack in self.stacks if name not in stack.readers]

    def __getstate__(self) -> dict[str, Any]:
        merge.require_unmerged(self.backbone, "a copy")
        return {**self.__dict__, "stacks": [], "replay": Replay(), "_compiled": None}  # these are of this copy alone

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.stacks = []  # of tensors that move now
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
