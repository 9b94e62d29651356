"""A frozen backbone with named adapters, the public face: what they compute, and their files."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning.backbones.anatomy import Anatomy
from restuning.backbones.sites import Sites, tower_of
from restuning.errors import MethodError
from restuning.hooks.fsdp import Shards, require_unsharded
from restuning.hooks.law import group_by_site
from restuning.hooks.recompute import switch_checkpoints
from restuning.methods.spec import Method
from restuning.model import denoiser, files, lora, merge, mixed, publish
from restuning.model.build import loss_and_logits
from restuning.model.collection import AdapterCollection
from restuning.model.compiled import CompiledPass
from restuning.model.passes import features_of
from restuning.model.threads import by_choice
from restuning.side.features import FeatureRequest, Features


class Tuned(AdapterCollection):
    """A frozen backbone and its named adapters. Made by `adapt` or `Tuned.from_pretrained`.

    `tuned(x)` gives the active adapter's logits (b, classes), or {name: logits} when several are active: those read
    one pass of the backbone, in which the tuners of all of them act together. With `labels=` it gives a dict of
    `loss` (its kind of task's) and `logits`, as `transformers.Trainer` expects. Arguments go to the backbone as they
    are; a dict of tensors, as tokenizers give it, by keyword.
    The backbone is a guest: its code, attributes and state_dict stay as they came, and hooks live during `forward`
    only. It stays in eval mode (dropout and batch statistics frozen) unless `train_mode=True` or the method is `full`.
    """

    merge_adapter = merge.merge_adapter
    merge_and_unload = merge.merge_and_unload
    set_scale = lora.set_scale
    add_weighted_adapter = lora.add_weighted_adapter

    # ---- what it computes

    @by_choice
    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the active adapters; with `adapter_names`, one for every row, logits (b, c) of a mixed batch.

        A row without an adapter (None) passes through the bare backbone and gives its output, (b, c), or its pooled
        feature. Rows narrower than the widest are −inf beyond their own classes.

        Raises:
            MethodError: a name that is not there, not as many names as rows, pooled outputs mixed with outputs of every
                token, labels for several adapters.
        """
        if torch.compiler.is_compiling():
            # a graph that breaks inside the hooks would leave autograd off: torch.compile(tuned) runs as it is
            plain: Any = torch._dynamo.disable(self._forward)  # type: ignore[no-untyped-call]
            return plain(args, kwargs, labels, adapter_names)
        return self._forward(args, kwargs, labels, adapter_names)

    def _forward(
        self, args: Any, kwargs: Any, labels: Tensor | None, adapter_names: Sequence[str | None] | None
    ) -> Any:
        self.replay.leave()  # of a backward pass that was interrupted
        args, kwargs = arguments(args, kwargs)
        if self._disabled:
            return self.backbone(*args, **kwargs)
        if self.denoises:
            if labels is not None or adapter_names is not None:
                raise MethodError(f"{self.sites.anatomy.name} denoises: neither labels= nor adapter_names=")
            return denoiser.call(self, args, kwargs)
        if adapter_names is not None:
            merge.require_unmerged(self.backbone, "a mixed batch")
            logits = mixed.mixed_batch(self, adapter_names, args, kwargs)
        elif self._compiled is not None and len(self.active()) == 1 and self.merged is None:
            logits = self._compiled(self, self.active()[0], args, kwargs)
        else:
            logits = self.from_features(self.features(*args, **kwargs))
        if labels is None:
            return logits
        used = (name for name in adapter_names or self.active() if name is not None)
        return loss_and_logits(logits, labels, [self.adapter_config(name) for name in used])

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """What the active adapter's head reads, (b, d) as a rule, or {name: …} when several are active."""
        return self.from_features(self.features(*args, **kwargs), head=False)

    @by_choice
    def features(self, *args: Any, **kwargs: Any) -> Features:
        """The features that the active adapters read, the tokens that no output can see left out.

        They carry a gradient only if tuners act inside the backbone: a side path's backbone runs without autograd.
        """
        args, kwargs = arguments(args, kwargs)
        adapters = {name: self.adapter(name) for name in self.active()}
        inside = group_by_site((site, name, tuner) for name, a in adapters.items() for site, tuner in a.inside)
        return features_of(self, inside, self.request, self.reads_features, args, kwargs)

    @by_choice
    def from_features(self, features: Features, *, head: bool = True) -> Any:
        """From `features` to logits: side network, frozen tail, head. Needs nothing else of the backbone. Without
        autograd, adapters of one shape run as one.

        Args:
            features: at least those that the active adapters read.
            head: whether the heads run; else the outputs are what they read.

        Raises:
            MethodError: these tokens are too few.
        """
        return mixed.from_features(self, features, head)

    @property
    def request(self) -> FeatureRequest:
        """Which features the active adapters read: what `features` gives."""
        return FeatureRequest.of_all(self.adapter(name).request for name in self.active())

    @property
    def reads_features(self) -> bool:
        """Whether the active adapters leave the backbone's features alone, so that these can be cached."""
        return all(self.adapter(name).reads_features for name in self.active())

    def compile(self, **options: Any) -> None:
        """Have the pass of one active adapter, from the input to what the head reads, run as a compiled graph.

        options: those of `torch.compile`, `fullgraph=True` among them. Adapters of one kind, whatever their classes,
        share the graph: to switch between them compiles nothing; torch compiles no more kinds than
        `torch._dynamo.config.recompile_limit`. (`torch.compile(tuned)` cannot see hooks that come and go: use this.)

        Raises:
            MethodError: a backbone that denoises, or whose blocks are sharded; torch before 2.12.
        """
        if self.denoises:
            raise MethodError(f"{self.sites.anatomy.name} denoises: only backbones with a head are compiled")
        require_unsharded(self.shards, "a compiled pass")
        self._compiled = CompiledPass(self.backbone, options)

    # ---- backbones that denoise

    def acting(self) -> AbstractContextManager[Any]:
        """See `restuning.model.denoiser.acting`."""
        return denoiser.acting(self)

    def shares(self, name: str) -> bool:
        """Whether `each` can serve this adapter."""
        return denoiser.serves(self.sites, self.adapter(name))

    def each(self, *args: Any, rows: bool = False, plain: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        """{name: output} of every active adapter alone, from one call of a backbone that denoises.

        Args:
            rows: whether the batch holds a part of rows for each of them, in their order; else all read all of it.
            plain: whether the untuned backbone's output is there too, under "".

        Raises:
            MethodError: one of them tunes inside the backbone, or the backbone's last modules are told more than what
                comes before them (DiT's).
        """
        args, kwargs = arguments(args, kwargs)
        return denoiser.each_of(self, denoiser.PerAdapter(rows, plain), args, kwargs)

    def plug(self) -> denoiser.Plug:
        """Have a backbone that denoises act as the tuned one wherever it is called, in a pipeline of diffusers too,
        until `remove()`, or until the end of a `with` block."""
        return denoiser.Plug(self.backbone, self)

    # ---- modes and memory

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
        act then too; a side path needs none of it.

        Raises:
            MethodError: a backbone that cannot; other than the defaults of every_n_layers and offload.
        """
        if every_n_layers != 1 or offload:
            raise MethodError("every block is recomputed, and nothing offloaded: leave out every_n_layers and offload")
        switch_checkpoints(self.backbone, True, {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
        self.train(self.training)

    def gradient_checkpointing_disable(self) -> None:
        """The inverse of `gradient_checkpointing_enable`."""
        switch_checkpoints(self.backbone, False)
        self.train(self.training)

    def fully_shard(self, device: torch.device | str | None = None) -> None:
        """Shard the frozen blocks over the processes of `torch.distributed` (FSDP2): each holds a part of them, and the
        whole of one block while that runs. Adapters stay whole everywhere, `restuning.training.loop.fit` trains them as
        ever; from here on the processes run the backbone together, as often each.

        Args:
            device: to which kind of device the shards go, block after block; None: where the backbone is.

        Raises:
            RestuningError: there is one process.
            MethodError: the backbone is trained, compiled, sharded already, or denoises.
        """
        if self.shards is not None:
            raise MethodError("the backbone's blocks are sharded already")
        merge.require_unmerged(self.backbone, "a share of it")
        if self.denoises:
            raise MethodError(f"{self.sites.anatomy.name} denoises: its blocks cannot be sharded")
        if self._compiled is not None:
            raise MethodError("a compiled pass takes the backbone as it was: its blocks cannot be sharded")
        self.shards = Shards(self.backbone, self.sites.blocks, device or next(self.backbone.parameters()).device)

    # ---- save, load, publish

    def save_pretrained(self, path: str | Path, name: str | None = None) -> None:
        """Write the active (or the named) adapter with its head: adapter_config.json, adapter_model.safetensors."""
        files.save_adapter(self, Path(path), self.one(name))

    def write_card(self, path: str | Path, name: str | None = None, *, repo_id: str | None = None) -> None:
        """Write README.md beside a saved adapter: what it is, and the lines that load it, from `repo_id` or `path`."""
        publish.write_card(self, Path(path), self.one(name), repo_id and f"hub:{repo_id}")

    def load_adapter(
        self,
        path: str | Path,
        name: str = "default",
        *,
        method: Method | None = None,
        revision: str | None = None,
        subfolder: str = "",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a saved adapter, from a folder or a hub id, and make it active.

        Args:
            path: a folder, or a hub id.
            name: what it is called here.
            method: needed if it has own tuners.
            revision: on the hub.
            subfolder: of the folder or repository, where the adapter is.
            autocast_adapter_dtype: see `add_adapter`.

        Raises:
            CheckpointError: files that are damaged, foreign, or of another backbone; nothing is changed then.
        """
        files.load_adapter(self, path, name, method, revision, subfolder, autocast_adapter_dtype)

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
        subfolder: str = "",
        autocast_adapter_dtype: bool = True,
    ) -> "Tuned":
        """A saved adapter on its backbone; see `load_adapter`."""
        tuned = cls(backbone, anatomy=anatomy)
        try:
            tuned.load_adapter(
                path,
                name,
                method=method,
                revision=revision,
                subfolder=subfolder,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
        except Exception:
            tuned.unload()
            raise
        return tuned

    def push_to_hub(self, repo_id: str, name: str | None = None, *, private: bool = False) -> str:
        """Publish the active (or the named) adapter and its card on the Hugging Face hub; returns the address of the
        commit."""

        def save(folder: Path) -> None:
            self.save_pretrained(folder, name)
            self.write_card(folder, name, repo_id=repo_id)

        return publish.push(repo_id, save, private=private)

    def print_trainable_parameters(self) -> None:
        """As PEFT prints it: trainable, all, percent."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


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
    autocast_adapter_dtype: bool = True,
    anatomy: Anatomy | Sites | None = None,
    tower: str | None = None,
    train_mode: bool = False,
    backbone_name: str | None = None,
    memory: str = "shared",
) -> Tuned:
    """Freeze `backbone` and adapt it by `method`, a name of `restuning.METHODS` or a method of your own.

    anatomy: how a backbone is built, where neither the table knows it nor a trace finds it, or its sites. tower: of a
    model with several (CLIP, an encoder with a decoder), the path of the one that is tuned. The other arguments, and
    the errors raised, are those of `Tuned` and of `Tuned.add_adapter`.
    """
    if tower is not None:
        backbone = tower_of(backbone, tower)
    tuned = Tuned(backbone, anatomy=anatomy, train_mode=train_mode, backbone_name=backbone_name, memory=memory)
    try:
        tuned.add_adapter(
            name,
            method,
            num_classes,
            pool=pool,
            classes=classes,
            preprocessing=preprocessing,
            kind=kind,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    except Exception:
        tuned.unload()
        raise
    return tuned


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of named tensors, as tokenizers give it, is keyword arguments."""
    if len(args) == 1 and isinstance(args[0], Mapping):
        return (), {**args[0], **kwargs}
    return args, kwargs
