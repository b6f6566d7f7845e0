"""``Dropped``: what is to be given back when the object that stands for it is gone.

A ``__del__`` is not enough: an exception from a signal handler can strike in it, or between a call
that returns something and the assignment of it. What is tracked here is given back all the same:
when a token dies, the interpreter puts its weak reference into a queue, without running any
bytecode, and a later call finds it there.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Dropped", "Token"]

T = TypeVar("T")


class Token:
    """Stands for something, as long as anybody has a reference to it."""

    __slots__ = ("__weakref__", "reference")

    def __init__(self) -> None:
        self.reference: weakref.ref[Token] | None = None
        """Set once it is tracked."""


class Dropped(Generic[T]):
    """Things by their tokens. All methods may be called in finalizers and signal handlers.

    >>> dropped = Dropped[str]()
    >>> one, other = Token(), Token()
    >>> dropped.track(one, "one"), dropped.track(other, "other")
    (None, None)
    >>> dropped.take()
    []
    >>> del one
    >>> dropped.end(other)
    >>> dropped.take(), dropped.take()
    (['one', 'other'], [])
    """

    def __init__(self) -> None:
        self._live: dict[weakref.ref[Token], T] = {}
        self._dead: deque[weakref.ref[Token]] = deque()

    def track(self, token: Token, what: T) -> None:
        """Remember something until its token is gone."""
        reference = weakref.ref(token, self._dead.append)
        self._live[reference] = what
        token.reference = reference

    def end(self, token: Token) -> None:
        """Let :meth:`take` return what a token stands for, if anything; a second time nothing."""
        if token.reference is not None:
            self._dead.append(token.reference)

    def forget(self, token: Token) -> None:
        """No longer remember what a token stands for."""
        if token.reference is not None:
            self._live.pop(token.reference, None)

    @property
    def has_any(self) -> bool:
        """Whether :meth:`take` may return something."""
        return bool(self._dead)

    def first(self) -> T | None:
        """What :meth:`take` would return first; for one thread at a time."""
        while self._dead:
            found = self._live.get(self._dead[0])
            if found is not None:
                return found
            self._dead.popleft()
        return None

    def remove_first(self) -> None:
        """Forget what :meth:`first` has returned."""
        self._live.pop(self._dead[0], None)
        self._dead.popleft()

    def live(self) -> list[T]:
        """Everything that is remembered, also what :meth:`take` would return."""
        return list(self._live.values())

    def take(self) -> list[T]:
        """What has been ended, or whose token is gone, since the last call."""
        taken = []
        while self._dead:
            try:
                reference = self._dead.popleft()
            except IndexError:  # another thread takes them too
                break
            found = self._live.pop(reference, None)
            if found is not None:
                taken.append(found)
        return taken
