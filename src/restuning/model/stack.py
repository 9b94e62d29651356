"""Modules of one shape as one, in batched matrix products: grid points, tasks, or one adapter for every row."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from restuning.errors import MethodError
from restuning.side.features import Features
from restuning.tuners.base import copy_contract


class Stack:
    """Modules of one shape, of which only the heads may differ in their number of classes.

    `stack(*args)` gives what each of the N modules gives, (N, …): arguments are shared by all; with `batched=True`
    tensors (N, …), in tuples and dicts too, are one slice each. A head narrower than the widest gives −inf beyond its
    own classes. Differentiable to the modules' parameters, unless made without autograd.
    """

    def __init__(self, models: Sequence[nn.Module], classes: int = 0) -> None:
        """Raises MethodError if the shapes differ. A frozen `backbone` in the modules is that of all. classes: to how
        many heads are padded at least."""
        self.model, self.models = models[0], list(models)
        named = [_own(m) for m in models]
        # running statistics, which change, are vectors
        buffers = {name for name, t in models[0].named_buffers() if t.ndim > 1}
        alike = {name: self._of_one_shape(name, named, classes) for name in named[0]}
        # buffers that are the same in all are held once, and what depends on nothing else is computed once
        self.common = {n for n in buffers & alike.keys() if all(torch.equal(t, alike[n][0]) for t in alike[n])}
        self.tensors = {n: ts[0] if n in self.common else torch.stack(ts) for n, ts in alike.items()}
        if any(len(other) != len(self.tensors) for other in named):
            raise MethodError("adapters of different methods: each method needs a stack of its own")
        self._slots = [slot for m in models for slot in _slots(m)]
        self._held = [t for _, _, t in self._slots if isinstance(t, Tensor)]
        self._seen = list(map(_identity, self._held))

    @staticmethod
    def _of_one_shape(name: str, named: Sequence[dict[str, Tensor]], classes: int) -> list[Tensor]:
        first = named[0][name]
        for i, other in enumerate(named):
            p = other.get(name)
            if p is None or p.shape[1:] != first.shape[1:] or (p.shape != first.shape and not _in_head(name)):
                raise MethodError(f"adapter {i} has another shape than the first ({name}): it needs a stack of its own")
        rows = max(len(other[name]) for other in named) if first.ndim else 0
        rows = max(rows, classes) if _in_head(name) else rows
        return [_padded(other[name], rows, name) for other in named]

    def __len__(self) -> int:
        return len(self.models)

    def __call__(self, *args: Any, batched: bool = False, which: Tensor | None = None) -> Any:
        """which: (M,) the modules that are meant, any of them any number of times; N is M then."""

        def one(tensors: dict[str, Tensor], *args: Any) -> Any:
            return functional_call(self.model, tensors, args)

        tensors = self.tensors
        if which is not None:
            tensors = {n: t if n in self.common else t.index_select(0, which) for n, t in tensors.items()}
        kept = {name: None if name in self.common else 0 for name in tensors}
        dims = tuple(0 if batched and isinstance(arg, Tensor | tuple | dict | Features) else None for arg in args)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule: they would loop
            return torch.vmap(one, in_dims=(kept, *dims), randomness="different")(tensors, *args)

    @classmethod
    def joined(cls, parts: "Sequence[tuple[Stack, Sequence[int]]]") -> "Stack":
        """Some modules of several stacks of one kind that hold nothing in common, as one stack that is called and
        nothing else: its tensors are copies."""
        made = copy.copy(parts[0][0])
        picked = [(stack.tensors, torch.tensor(which)) for stack, which in parts]
        made.tensors = {
            n: torch.cat([ts[n].index_select(0, i.to(ts[n].device)) for ts, i in picked]) for n in made.tensors
        }
        return made

    @property
    def stale(self) -> bool:
        """Whether a module has been changed since: another module or tensor in its place, or another value in place
        (but for one that autograd does not see, `p.data.add_(1)`)."""
        if any(table.get(key) is not held for table, key, held in self._slots):
            return True
        return self._seen != list(map(_identity, self._held))

    @torch.no_grad()
    def write_back(self) -> None:
        """Give every module its own tensors, as they are now."""
        for i, model in enumerate(self.models):
            for name, t in _own(model).items():
                if name not in self.common:
                    t.copy_(self.tensors[name][i, : len(t)] if t.ndim else self.tensors[name][i])


class PerRow:
    """One tuner for every row of a batch: row i is tuned by `tuners[which[i]]`. Declares what they declare."""

    def __init__(self, tuners: Sequence[Any], which: Tensor) -> None:
        self.which, self.parameters = which, tuners[0].parameters
        copy_contract(tuners[0], self)
        self.stack = Stack([_Stateful(t) for t in tuners] if tuners[0].form == "stateful" else tuners)

    def __call__(self, first: Any, *rest: Any) -> Any:
        if not isinstance(first, Tensor):  # a call of the attention: keys and values for all of its rows
            return self.stack(first, which=self.which)
        which = self.which
        if len(first) != len(which):  # every row comes as several windows
            which = which.repeat_interleave(len(first) // len(which))
        rows = [arg[:, None] if isinstance(arg, Tensor) else arg for arg in (first, *rest)]
        out = self.stack(*rows, batched=True, which=which)
        if isinstance(out, Tensor):
            return out.squeeze(1)
        state, added = out
        rest[-1].update(state)
        return added[0].squeeze(1) if added else None


class _Stateful(nn.Module):
    """A stateful tuner as a function: its state goes in and comes out."""

    def __init__(self, tuner: nn.Module) -> None:
        super().__init__()
        self.tuner = tuner

    def forward(self, x: Tensor, y: Tensor, state: dict[str, Any]) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        state = dict(state)
        out = self.tuner(x, y, state)
        return state, () if out is None else (out,)


def _own(module: nn.Module) -> dict[str, Tensor]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: t for name, t in tensors if "backbone" not in name.split(".")}


def _slots(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where its modules and tensors hang, a frozen backbone's left out."""
    for table in (module._parameters, module._buffers, module._modules):
        for key, held in table.items():
            if key != "backbone":
                yield table, key, held
    for name, child in module._modules.items():
        if child is not None and name != "backbone":
            yield from _slots(child)


def _identity(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), 0 if t.is_inference() else t._version


def _in_head(name: str) -> bool:
    return "head" in name.split(".")[:-1]


def _padded(p: Tensor, rows: int, name: str) -> Tensor:
    if p.ndim == 0 or len(p) == rows:
        return p
    # the missing classes: weights of zero, and a bias that no softmax sees
    fill = -torch.inf if name.endswith("bias") else 0.0
    return torch.cat([p, p.new_full((rows - len(p), *p.shape[1:]), fill)])
