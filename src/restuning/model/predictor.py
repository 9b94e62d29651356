"""A predictor: an immutable snapshot of a frozen backbone and some adapters, which any number of threads may call."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from restuning.backbones.sites import Site, Sites
from restuning.errors import CheckpointError, MethodError
from restuning.hooks.law import Attachment, group_by_site
from restuning.hooks.points import NamedTuners, backbone_lock
from restuning.hooks.taps import check_square, tap
from restuning.methods.spec import Method
from restuning.model.adapter import AdapterModule, Reader
from restuning.model.compiled import CompiledForward
from restuning.model.files import AdapterConfig, changes_the_base, fetch
from restuning.model.groups import CHUNK, Group, Prepared, hold_in_common, packed, padded_width, picked
from restuning.model.merge import require_unmerged
from restuning.model.mixed import kind_of
from restuning.model.stack import PerRow, Stack
from restuning.model.tuned import Tuned
from restuning.side.features import FeatureRequest, Features

MAX_ROWS = 256
"""Rows of a pass with tuners inside the backbone at most: more of them take another pass."""

Inputs = Tensor | Mapping[str, Tensor]
"""What a backbone reads, (b, …), or named tensors as tokenizers give them."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of some adapters.

    Args:
        tasks: (adapter, rows): of which rows of the batch the next `len(rows)` of `values` are its outputs.
        values: (m, c), or (m, n, c) of every token; −inf beyond an adapter's own classes.
    """

    tasks: Sequence[tuple[str, Sequence[int]]]
    values: Tensor


@dataclass(frozen=True)
class Answer:
    """Outputs of all adapters that were asked; passed: how many items went through the backbone for them, in how many
    passes."""

    outputs: Sequence[Outputs]
    passed: int
    passes: int


@dataclass
class _Loader:
    """Makes adapters from files, one at a time: a tuned model of its own, of which no snapshot is told. held: buffers
    of side networks, which all that have the same ones share."""

    lock: Lock = field(default_factory=Lock)
    tuned: Tuned | None = None
    held: WeakValueDictionary[Any, Tensor] = field(default_factory=WeakValueDictionary)


@dataclass(frozen=True, eq=False)
class Predictor:
    """An immutable snapshot of a backbone and adapters. Any number of threads may call it, and each gets the answers
    that it would get alone; those of one backbone take turns, since hooks are on it while it runs.

    `with_adapter` and `without` return the next snapshot and leave this one as it is. Made by `Predictor.of`.
    """

    backbone: nn.Module
    readers: Mapping[str, Reader]
    _sites: Sites
    _kinds: Mapping[str, str]
    _groups: Sequence[Group]
    _loader: _Loader
    forward: CompiledForward | None = None

    @classmethod
    def of(cls, tuned: Tuned, names: Sequence[str] | None = None) -> "Predictor":
        """A snapshot of a tuned model's adapters (all, or those named), which are copied: what becomes of the tuned
        model later, its active adapters among it, changes nothing here. The backbone is shared.

        Raises:
            MethodError: for a name that is not there, and a backbone that denoises.
        """
        if tuned.denoises:
            raise MethodError(f"{tuned.sites.anatomy.name} denoises: a predictor is of backbones with heads")
        require_unmerged(tuned.backbone, "a predictor")
        names = list(tuned.adapters) if names is None else names
        backbone = tuned.backbone
        held = (*backbone.modules(), *backbone.parameters(), *backbone.buffers(), tuned.sites)
        shared = {id(one): one for one in held}
        with torch.no_grad():
            readers = {name: _frozen(copy.deepcopy(tuned.reader(name), dict(shared))) for name in names}
        empty = cls(tuned.backbone, MappingProxyType({}), tuned.sites, MappingProxyType({}), (), _Loader())
        return empty._with(readers)

    # ---- the next snapshot

    def with_adapter(
        self, name: str, path: str | Path, *, method: Method | None = None, revision: str | None = None
    ) -> "Predictor":
        """The next snapshot, with a saved adapter that has been read and checked in full; this one stays as it is.

        Args:
            name: what it is to be called; an adapter of that name is replaced.
            path: a folder, or a hub id with its `revision`.
            method: needed if it has own tuners.

        Raises:
            CheckpointError: for files that are damaged, foreign, of another backbone or not finite, and for full
                fine-tuning, which would change the backbone under the others.
        """
        folder, loader = fetch(path, revision), self._loader
        if changes_the_base(folder):
            raise CheckpointError(f"{folder}: full fine-tuning changes the backbone, which others share")
        with loader.lock:
            if loader.tuned is None:
                loader.tuned = Tuned(self.backbone, anatomy=self._sites.anatomy)
            loader.tuned.load_adapter(folder, name, method=method)
            reader = _frozen(loader.tuned.reader(name))
            loader.tuned.delete_adapter(name)
        for key, tensor in reader.adapter.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{folder}: {key} is not finite")
        rest = self.without(name) if name in self.readers else self
        return rest._with({name: reader})

    def without(self, name: str) -> "Predictor":
        """The next snapshot, without an adapter. Raises MethodError for a name that is not there."""
        self._find(name)
        groups: list[Group] = []
        for group in self._groups:
            if name not in group.readers:
                groups.append(group)
            elif left := {key: reader for key, reader in group.readers.items() if key != name}:
                groups.append(Group.of(group.key, left, self.backbone))
        return replace(
            self,
            readers=MappingProxyType({key: reader for key, reader in self.readers.items() if key != name}),
            _kinds=MappingProxyType({key: kind for key, kind in self._kinds.items() if key != name}),
            _groups=tuple(groups),
        )

    def compiled(self, **options: Any) -> "Predictor":
        """The same, whose passes to the features (of side paths and heads) run as a compiled graph, in the next
        snapshots too; tuners inside the backbone run as they are.

        Args:
            options: those of `torch.compile`.
        """
        return replace(self, forward=CompiledForward(self.backbone, options))

    def _with(self, readers: Mapping[str, Reader]) -> "Predictor":
        kinds = {name: kind_of(name, reader.adapter) for name, reader in readers.items()}
        for reader in readers.values():
            hold_in_common(reader.adapter, self._loader.held)
        groups, keys = list(self._groups), dict[str, list[str]]()
        for name, reader in readers.items():
            if reader.adapter.reads_features:
                keys.setdefault(f"{padded_width(reader.adapter)} {kinds[name]}", []).append(name)
        for key, names in keys.items():
            for i, group in enumerate(groups):
                if group.key == key and (room := CHUNK - len(group.readers)) > 0:
                    more, names = names[:room], names[room:]
                    if more:
                        groups[i] = Group.of(
                            key, {**group.readers, **{name: readers[name] for name in more}}, self.backbone
                        )
            for i in range(0, len(names), CHUNK):
                groups.append(Group.of(key, {name: readers[name] for name in names[i : i + CHUNK]}, self.backbone))
        return replace(
            self,
            readers=MappingProxyType({**self.readers, **readers}),
            _kinds=MappingProxyType({**self._kinds, **kinds}),
            _groups=tuple(groups),
        )

    # ---- what it has

    @property
    def tasks(self) -> Sequence[str]:
        """The names of its adapters."""
        return tuple(self.readers)

    def adapter_config(self, name: str) -> AdapterConfig:
        """What is saved beside an adapter. Raises MethodError for a name that is not there."""
        return self._find(name).config

    # ---- what it computes

    def predict(self, inputs: Inputs, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits of every task for every item.

        Args:
            inputs: (b, …), or named tensors of b rows each.
            tasks: names of adapters; None: all.

        Returns:
            {task: (b, classes)}, (b, n, classes) of tasks by token; the pooled feature (b, d) without classes.

        Raises:
            MethodError: for a task that is not there, a batch of nothing, a backbone in training mode.
        """
        return self._by_task(inputs, tasks, True)

    def embed(self, inputs: Inputs, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What the tasks' heads read, (b, d) as a rule; otherwise as `predict`."""
        return self._by_task(inputs, tasks, False)

    def classify(self, task: str, embedded: Tensor) -> Tensor:
        """Logits of what `embed` gave for a task, (b, d) or (b, n, d)."""
        head = self._find(task).head
        with torch.inference_mode():
            return head(embedded)  # type: ignore[no-any-return]

    def as_module(self, task: str) -> nn.Module:
        """One task as a module without parameters: inputs → logits."""
        self._find(task)
        return _OneTask(self, task)

    def predict_rows(self, inputs: Inputs, tasks: Sequence[str]) -> list[Tensor]:
        """Logits (classes,) of row i for `tasks[i]`. Raises MethodError as `predict` does, and if there are not as many
        tasks as rows."""
        if len(tasks) != (batch := _batch(inputs)):
            raise MethodError(f"{len(tasks)} tasks for a batch of {batch}: expected one for every row")
        wanted: dict[str, list[int]] = {}
        for row, task in enumerate(tasks):
            wanted.setdefault(task, []).append(row)
        found: dict[int, Tensor] = {}
        for _, rows, values in self.unpacked(self.answer(inputs, wanted)):
            found |= dict(zip(rows, values, strict=True))
        return [found[row] for row in range(batch)]

    def unpacked(self, answer: Answer, head: bool = True) -> "list[tuple[str, Sequence[int], Tensor]]":
        """(task, rows, values (len(rows), c)) of an answer, cut to each task's own classes."""
        found = []
        for outputs in answer.outputs:
            start = 0
            for task, rows in outputs.tasks:
                width = self.readers[task].adapter.config.num_classes if head else None
                found.append((task, rows, outputs.values[start : start + len(rows), ..., :width]))
                start += len(rows)
        return found

    def answer(self, inputs: Inputs, wanted: Mapping[str, Sequence[int]], head: bool = True) -> Answer:
        """Every task for the rows that ask for it. One pass of the backbone serves all tasks that read its features
        only; tuners inside the backbone take a pass for every kind of them (and MAX_ROWS rows of it).

        Args:
            inputs: (b, …), or named tensors of b rows each.
            wanted: task → the rows that ask for it.
            head: whether the heads are run; else the outputs are what they read.
        """
        wanted = {task: tuple(rows) for task, rows in wanted.items() if len(rows)}
        for task in wanted:
            self._find(task)
        if not wanted or not _batch(inputs):
            raise MethodError("nothing to predict: expected at least one row and one task")
        if self.backbone.training:
            raise MethodError("the backbone is in training mode: a predictor needs it as it answers, call .eval()")
        device = next((p.device for p in self.backbone.parameters()), torch.device("cpu"))
        inputs = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs.to(device)
        inside: dict[str, list[tuple[str, int]]] = {}
        reading: dict[str, Sequence[int]] = {}
        for task, rows in wanted.items():
            if self.readers[task].adapter.reads_features:
                reading[task] = rows
            else:
                inside.setdefault(self._kinds[task], []).extend((task, row) for row in rows)
        outputs: list[Outputs] = []
        sizes: list[int] = []
        with torch.inference_mode(), backbone_lock(self.backbone):
            require_unmerged(self.backbone, "a predictor")
            if reading:
                rows = sorted({row for rows in reading.values() for row in rows})
                outputs += self._on_features(_rows(inputs, rows), rows, reading, head)
                sizes.append(len(rows))
            for pairs in inside.values():
                for i in range(0, len(pairs), MAX_ROWS):
                    part = pairs[i : i + MAX_ROWS]
                    outputs.append(self._inside(inputs, part, head))
                    sizes.append(len(part))
        return Answer(outputs, sum(sizes), len(sizes))

    def _on_features(
        self, inputs: Inputs, rows: Sequence[int], wanted: Mapping[str, Sequence[int]], head: bool
    ) -> list[Outputs]:
        """One pass of the backbone as it is, and every group on its features. rows: those of the batch given."""
        asked = [(group, names) for group in self._groups if (names := [n for n in group.readers if n in wanted])]
        groups = [group for group, _ in asked] if self.forward is None else self._groups  # one graph for any tasks
        requests = [next(iter(group.readers.values())).adapter.request for group in groups]
        features = self._pass(inputs, {}, FeatureRequest.of_all(requests))
        at, prepared, outputs = {row: i for i, row in enumerate(rows)}, dict[tuple[int, ...], Prepared](), []
        for pack in packed(asked):
            group, names = pack[0][0], [name for _, names in pack for name in names]
            reader = group.readers[names[0]]
            tasks = [(name, wanted[name]) for name in names]
            alike = len({rows for _, rows in tasks}) == 1
            index = [at[row] for _, rows in (tasks[:1] if alike else tasks) for row in rows]
            own = reader.select(features).map(partial(_rows, rows=index))
            if group.stack is None:
                same = [reader(own, head)] * len(names) if alike else [reader(own, head)]
                outputs.append(Outputs(tasks, torch.cat(same)))
                continue
            if alike:
                own = prepared.setdefault(tuple(index), Prepared()).of(group.stack, reader, own)
            else:
                own = own.map(lambda x: x[:, None])
            values = picked(pack, wanted, alike)(own, head, batched=not alike)
            outputs.append(Outputs(tasks, values.flatten(0, 1) if alike else values.squeeze(1)))
        return outputs

    def _inside(self, inputs: Inputs, pairs: Sequence[tuple[str, int]], head: bool) -> Outputs:
        """One pass with the tuners of every row's own adapter, all of one kind."""
        tasks: dict[str, list[int]] = {}
        for name, row in pairs:
            tasks.setdefault(name, []).append(row)
        readers = [self.readers[name] for name in tasks]
        rows = [row for own in tasks.values() for row in own]
        like = readers[0].adapter
        which = torch.tensor([i for i, own in enumerate(tasks.values()) for _ in own])
        which = which.to(next(self.backbone.parameters()).device)
        alike = zip(*(reader.adapter.inside for reader in readers), strict=True)
        inside = group_by_site(
            (same[0][0], "", same[0][1] if len(readers) == 1 else PerRow([tuner for _, tuner in same], which))
            for same in alike
        )
        features = self._pass(_rows(inputs, rows), inside, like.request)
        if len(readers) == 1 or not any(True for _ in like.parameters()):
            values = readers[0](features, head)
        else:
            own = features.map(lambda x: x[:, None])
            values = Stack(readers)(own, head, batched=True, which=which).squeeze(1)
        return Outputs(list(tasks.items()), values)

    def _pass(self, inputs: Inputs, inside: Mapping[Site, NamedTuners], request: FeatureRequest) -> Features:
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
        with Attachment(self.backbone, self._sites, inside).on(), tap(self.backbone, self._sites, request) as taps:
            if self.forward is None or inside:
                self.backbone(*args, **kwargs)
                features = taps.features
            else:
                features = self.forward(taps, args, kwargs)
        check_square(taps, self._sites)
        return features

    def _by_task(self, inputs: Inputs, tasks: Sequence[str] | None, head: bool) -> dict[str, Tensor]:
        tasks = self.tasks if tasks is None else list(dict.fromkeys(tasks))
        rows = range(_batch(inputs))
        parts: dict[str, list[Tensor]] = {task: [] for task in tasks}
        for task, _, values in self.unpacked(self.answer(inputs, dict.fromkeys(tasks, rows), head), head):
            parts[task].append(values)
        return {task: found[0] if len(found) == 1 else torch.cat(found) for task, found in parts.items()}

    def _find(self, name: str) -> AdapterModule:
        if name not in self.readers:
            raise MethodError(f"no adapter named {name!r}: there is {', '.join(self.readers) or 'none'}")
        return self.readers[name].adapter


class _OneTask(nn.Module):
    def __init__(self, predictor: Predictor, task: str) -> None:
        super().__init__()
        self.task, self._call = task, predictor.predict

    def forward(self, inputs: Inputs) -> Tensor:
        return self._call(inputs, [self.task])[self.task]


def _frozen(reader: Reader) -> Reader:
    reader.adapter.requires_grad_(False).eval()
    return reader


def _batch(inputs: Inputs) -> int:
    tensors = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
    return len(next(iter(tensors), torch.empty(0)))


def _rows(inputs: Any, rows: Sequence[int]) -> Any:
    """These rows, any of them any number of times."""
    if isinstance(inputs, Mapping):
        return {key: _rows(value, rows) for key, value in inputs.items()}
    if len(rows) == len(inputs) and all(i == row for i, row in enumerate(rows)):
        return inputs
    return inputs.index_select(0, torch.tensor(rows, device=inputs.device))
