"""What a frozen backbone's operations keep for backward: no more than they need.

torch keeps the input of every convolution, norm and activation, though a gradient with respect to the input alone needs
less (linear maps keep none where their weight is frozen). `FrozenOpMemory` replaces their backward passes while it
lasts; `MEMORY` is the table of its modes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import getitem
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from restuning.errors import MethodError
from restuning.hooks.backward import (
    Operation,
    Recomputed,
    storage_bytes,
)
from restuning.hooks.expressions import Expression, Program, mapped
from restuning.hooks.known import Known, Latest
from restuning.hooks.operations import RULES, passed

Memory = Literal["plain", "shared", "compact", "recompute"]


@dataclass(frozen=True)
class Mode:
    """A row of `MEMORY`: what is kept, what that costs, and how exact the gradients are."""

    keeps: str
    costs: str
    exact: str


MEMORY: dict[str, Mode] = {
    "plain": Mode("what torch keeps", "nothing", "as torch's"),
    "shared": Mode(
        "of frozen norms the output, which its reader keeps as a rule; of frozen convolutions and batch norms nothing; "
        "of gated activations their two inputs",
        "a division for each norm",
        "up to rounding",
    ),
    "compact": Mode(
        "the same, and of GELU, SiLU, QuickGELU and hardswish the derivative in 8 bits, of ReLU its sign",
        "the rounding of the derivatives",
        "1e-2",
    ),
    "recompute": Mode(
        "the same, but nothing of what follows a norm's output by frozen maps: queries, keys, values, the attention's "
        "output, the FFN's hidden units",
        "these once more, in the backward pass",
        "up to rounding where there are norms before; else as compact",
    ),
}
"""What `memory=` may be, as `adapt`, `restuning train` and `restuning bench` take it."""


def check_memory(memory: str) -> None:
    """Raises MethodError for a mode that is not there."""
    if memory not in get_args(Memory):
        raise MethodError(f"memory {memory!r}: expected one of {', '.join(MEMORY)}")


SHAPING = {
    "view", "reshape", "permute", "transpose", "unbind", "chunk", "split", "flatten", "unflatten", "contiguous",
    "__getitem__", "unsqueeze", "squeeze", "expand", "expand_as", "cat", "stack", "repeat_interleave", "swapaxes",
    "movedim",
}  # fmt: skip
ARITHMETIC = {
    "linear", "add", "sub", "mul", "neg", "div", "addcmul", "to", "float",
    "type_as", "gelu", "silu", "relu", "sigmoid", "rms_norm", "layer_norm", "pow", "mean", "rsqrt", "pad",
}  # fmt: skip
IN_PLACE = {"add_": torch.add, "mul_": torch.mul, "sub_": torch.sub}
"""Operations, by name, that are cheap enough to be done again, and give the same again."""


class FrozenOpMemory(TorchFunctionMode):
    """While it lasts, frozen operations keep for backward what `memory` says.

    Outputs are the same to the bit; gradients are those of `MEMORY`. It is for one forward pass.

    Args:
        memory: one of `MEMORY`; `plain` changes nothing.
    """

    def __init__(self, memory: str = "shared") -> None:
        super().__init__()
        check_memory(memory)
        self.compact, self.again = memory in ("compact", "recompute"), memory == "recompute"
        self.rounded = memory == "compact"  # whether a derivative was
        self.on, self.signs = memory != "plain", self.compact
        # What is known of a tensor, for as long as it is there, and as long as it is not written to (its version):
        self.kept = Known()  # that its values are kept for backward
        self.made = Known()  # the expression that gives it from tensors that are kept
        self.note = Latest()  # which part of an operation in several calls it is

    @contextmanager
    def but(self, last: nn.Module) -> Iterator[None]:
        """On, and from the moment at which `last` runs nothing is computed again: it would be at once."""

        def here(*_: Any) -> None:
            self.again, self.compact = False, self.compact and self.rounded

        handle = last.register_forward_pre_hook(here)
        try:
            with self:
                yield
        finally:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # not in a vmap: what it runs are adapters of a mixed batch, which are trained or read
        if not (self.on and torch.is_grad_enabled()) or torch._C._are_functorch_transforms_active():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Tensor) and args[0] in self.kept and _writes(func, name, args, kwargs):
            self._set_apart(args[0])
        if name in ("linear", "conv2d"):
            self._read_by(*args[:2], **kwargs)
        made = self._expression(func, args, kwargs) if self.again else None
        rule = RULES.get(func)
        out = NotImplemented if rule is None else rule(self, *args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        self._follow(name, args, out)
        if made is not None:
            self._record(made, out)
        return out

    def recomputed(self, operation: Operation, operands: Sequence[Tensor]) -> Any:
        """Its output, with those operands not kept that can be had from what is; NotImplemented if none can, or
        if that would keep more."""
        made = [self.made.get(t) for t in operands]
        program = Program([t if m is None else m for t, m in zip(operands, made, strict=True)])
        leaves = program.take_leaves()
        own = {id(t) for t, m in zip(operands, made, strict=True) if m is None}
        more = [t for t in leaves if id(t) not in own and t not in self.kept and not isinstance(t, nn.Parameter)]
        saved = storage_bytes([t for t, m in zip(operands, made, strict=True) if m is not None])
        if not any(map(passed, operands)) or 2 * storage_bytes(more) >= saved:
            return NotImplemented
        leaves = [t.detach() for t in leaves]
        return Recomputed.apply(operation, program, len(operands), *operands, *leaves)  # type: ignore[no-untyped-call]

    def _expression(self, func: Any, args: Any, kwargs: Any) -> Expression | None:
        """How the output comes from what is kept; None if it does not, or is no operation that is done again."""
        name = getattr(func, "__name__", "")
        if name not in SHAPING and name not in ARITHMETIC and name not in IN_PLACE:
            return None
        tensors = [*_tensors(args), *_tensors(kwargs)]
        from_kept = any(t in self.kept or t in self.made for t in tensors)
        # what reads a constant may be read by a tuner too, which will keep that
        from_kept |= name == "linear" or all(isinstance(t, nn.Parameter) for t in tensors)
        if not from_kept or not all(self._can_be_had(t) for t in tensors):
            return None

        def put(value: Any) -> Any:
            return (self.made.get(value) or value) if isinstance(value, Tensor) else value

        return Expression(IN_PLACE.get(name, func), mapped(put, args), mapped(put, kwargs))

    def _can_be_had(self, t: Tensor) -> bool:
        return not t.requires_grad or isinstance(t, nn.Parameter) or t in self.kept or t in self.made

    def _record(self, made: Expression, out: Any) -> None:
        if isinstance(out, Tensor):
            if out not in self.kept:
                self.made[out] = made
        elif isinstance(out, tuple | list):
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self.made[part] = Expression(getitem, (made, i), {})

    # ---- what is known of tensors

    def keep(self, out: Tensor) -> Tensor:
        self.kept[out] = True
        return out

    def _set_apart(self, x: Tensor) -> None:
        """An output that its norm keeps is about to be written to: from here on it has memory of its own."""
        if not x._is_view():
            self.kept.forget(x)
            x.data = x.data.clone()

    def _read_by(self, input: Tensor, weight: Tensor, bias: Any = None, **rest: Any) -> None:
        """What a trained map reads is kept for the gradient of its weight."""
        if weight.requires_grad:
            self.keep(input)
            self.made.forget(input)
        if self.note.get(input) is not None:
            self.note.clear()  # no gate follows

    def _follow(self, name: str, args: Any, out: Any) -> None:
        """Parts of operations that are written out in several calls."""
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not isinstance(out, Tensor):
            return
        second = args[1] if len(args) > 1 else None
        what, *rest = self.note.get(first) or (None,)
        if first in self.kept and out.untyped_storage().data_ptr() == first.untyped_storage().data_ptr():
            self.kept[out] = True
        elif (name == "pow" and not isinstance(second, Tensor) and second == 2) or name == "square":
            self.note[out] = "square", first
        elif name == "mean" and what == "square" and out.shape[-1] == 1 and out.ndim == first.ndim:
            self.note[out] = "mean square", *rest
        elif name == "add" and what == "mean square" and isinstance(second, float):
            self.note[out] = what, *rest
        elif name == "rsqrt" and what == "mean square":
            self.note[out] = "by", *rest
        elif name == "mul" and isinstance(second, Tensor):
            by: tuple[Any, ...] = self.note.get(second) or (None,)
            if by[0] == "by" and by[1] is first and passed(first):
                self.note[out] = "normalised", first, second
        elif name == "mul" and second == 1.702:
            self.note[out] = "times", first, float(second)
        elif name in ("to", "type_as", "float") and what == "normalised":
            self.note[out] = what, *rest
        elif name == "sigmoid":
            self.note[out] = ("sigmoid", *rest) if what == "times" else ("sigmoid", first, 1.0)


def _writes(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    """Whether its first argument is written to."""
    within = func in (F.relu, F.silu, F.hardswish) and len(args) > 1 and args[1]
    return bool(within or kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__")))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
