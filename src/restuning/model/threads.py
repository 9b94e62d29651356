"""Which adapters are active is one choice for all threads: raise where two of them would use it against each other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock, get_ident, local
from typing import Any, TypeVar, cast

from restuning.errors import MethodError

_USE = "use a restuning.Predictor, which any number of threads may call"


class Choice:
    """Counts the changes of a model's active adapters, and its calls that are under way, by thread.

    A thread that only calls the model is never in the way of others. One that has chosen adapters, and then calls the
    model after another thread has chosen others, would get that one's answers: it is told.
    """

    def __init__(self) -> None:
        self._lock, self._own = Lock(), local()
        self._changes, self._calls = 0, dict[int, int]()

    @contextmanager
    def changing(self, check: bool = True) -> Iterator[None]:
        """While it lasts, this thread chooses, and none begins a call. Raises MethodError while the model is called by
        another one, unless it need not be checked."""
        with self._lock:
            if check and any(thread != get_ident() for thread in self._calls):
                raise MethodError(f"the active adapters change while another thread calls the model: {_USE}")
            self._changes += 1
            self._own.changes = self._changes
            yield

    @contextmanager
    def used(self) -> Iterator[None]:
        """A call of the model. Raises MethodError if another thread has chosen since this one did."""
        with self._lock:
            if getattr(self._own, "changes", self._changes) != self._changes:
                raise MethodError(
                    f"another thread has changed the active adapters since this one chose its own: {_USE}"
                )
            self._calls[get_ident()] = self._calls.get(get_ident(), 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[get_ident()] -= 1
                if not self._calls[get_ident()]:
                    del self._calls[get_ident()]

    def __reduce__(self) -> tuple[type["Choice"], tuple[()]]:
        return Choice, ()  # a copy begins anew


F = TypeVar("F", bound=Callable[..., Any])


def by_choice(method: F) -> F:
    """A method that computes with the active adapters of a model, which holds a `_choice`."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._choice.used():
            return method(self, *args, **kwargs)

    return cast(F, call)
