"""What is known of tensors while they are there, and as long as they are not written to."""

from collections import deque
from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Known:
    """What is known of tensors, until they go or are written to."""

    def __init__(self) -> None:
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __setitem__(self, t: Tensor, what: Any) -> None:
        self._of[t] = t._version, what

    def get(self, t: Tensor) -> Any:
        version, what = self._of.get(t) or (None, None)  # type: ignore[no-untyped-call]
        return what if version == t._version else None

    def __contains__(self, t: Tensor) -> bool:
        return self.get(t) is not None

    def forget(self, t: Tensor) -> None:
        self._of.pop(t, None)  # type: ignore[no-untyped-call]


class Latest:
    """What is known of the latest few tensors: it may hold others, and they should not be held for long."""

    def __init__(self) -> None:
        self._of: deque[tuple[ref[Tensor], int, Any]] = deque(maxlen=8)

    def __setitem__(self, t: Tensor, what: Any) -> None:
        self._of.append((ref(t), t._version, what))

    def get(self, t: Tensor) -> Any:
        return next((what for at, version, what in reversed(self._of) if at() is t and version == t._version), None)

    def clear(self) -> None:
        self._of.clear()
