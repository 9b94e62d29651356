"""How a tensor was computed from tensors that are kept anyway, so that it is computed again instead of being kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """func(*args, **kwargs), in which an argument may be an expression itself; other tensors are leaves."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a program finds a value: among its leaves, or among the results of its steps."""

    leaf: bool
    index: int


class Program:
    """Expressions that share parts, as steps in order: it holds no tensor itself.

    Args:
        wanted: what is computed, expressions or plain tensors (which become leaves).
    """

    def __init__(self, wanted: Sequence[Expression | Tensor]) -> None:
        self._steps: list[tuple[Callable[..., Any], Any, Any]] = []
        self._leaves: list[Tensor] = []
        slots: dict[int, _Slot] = {}

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor | Expression):
                return value
            if id(value) not in slots:
                if isinstance(value, Expression):
                    self._steps.append((value.func, mapped(place, value.args), mapped(place, value.kwargs)))
                    slots[id(value)] = _Slot(False, len(self._steps) - 1)
                else:
                    self._leaves.append(value)
                    slots[id(value)] = _Slot(True, len(self._leaves) - 1)
            return slots[id(value)]

        self._wanted = [place(value) for value in wanted]

    def take_leaves(self) -> list[Tensor]:
        """The tensors that `run` needs, in its order; asked for once, and not held from then on."""
        leaves, self._leaves = self._leaves, []
        return leaves

    def run(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The values that were wanted, from the values of the leaves."""
        results: list[Any] = []

        def value(slot: Any) -> Any:
            if not isinstance(slot, _Slot):
                return slot
            return leaves[slot.index] if slot.leaf else results[slot.index]

        for func, args, kwargs in self._steps:
            results.append(func(*mapped(value, args), **mapped(value, kwargs)))
        return [value(slot) for slot in self._wanted]


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of everything in nested tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        return type(value)(mapped(change, item) for item in value)
    if isinstance(value, dict):
        return {key: mapped(change, item) for key, item in value.items()}
    return change(value)
