"""``Descriptor``: a file that is open until it is closed, or until nobody has it any more.

An exception of a signal handler can strike between the return of ``os.open`` and the assignment of
its result, and the number is lost. Here it is noted within one call of the interpreter.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Descriptor"]


class Descriptor:
    """A file that is open here.

    Args:
        path: of the file.
        flags: as for ``os.open``; ``O_CLOEXEC`` is added.
        mode: of a file that is made.

    Raises:
        OSError: it cannot be opened.

    >>> file = Descriptor("/dev/null", os.O_RDONLY)
    >>> os.read(file.fd, 1), file.close(), file.close(), file.closed
    (b'', None, None, True)
    """

    def __init__(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> None:
        self._begin()
        self._fds.extend(map(os.open, (path,), (flags | os.O_CLOEXEC,), (mode,)))

    @classmethod
    def copy_of(cls, fd: int) -> Self:
        """Another descriptor of the same open file.

        Raises:
            OSError: there is none.
        """
        copy = cls.__new__(cls)
        copy._begin()
        copy._fds.extend(map(os.dup, (fd,)))
        return copy

    def _begin(self) -> None:
        self._fds: list[int] = []
        finalizer = weakref.finalize(self, _close, self._fds)
        finalizer.atexit = False  # some thread may still need it then

    @property
    def fd(self) -> int:
        """Its number; -1 once it is closed."""
        return self._fds[0] if self._fds else -1

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._fds

    def close(self) -> None:
        """Close it; may be repeated."""
        _close(self._fds)


def _close(fds: list[int]) -> None:
    """Close what is in a list, each number once, whenever this is interrupted."""
    while fds:
        deque(map(os.close, map(fds.pop, (0,))), maxlen=0)
