"""``Ownership``: whether this process keeps the books of a heap, or has only a view of its bytes.

The books are the free list, the counts and who owns which block. They are in one process's memory,
so two processes with books on the same bytes would both hand the same bytes out. A heap has a view
only

- in a forked child, if its bytes are shared: the child has a copy of the books, as they were at
  the fork. Private memory is copied with them, and the child's heap is one of its own;
- if it is attached to memory of another process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from kvheap.errors import ForeignProcessError
from kvheap.memory.sharing import is_shared

__all__ = ["Ownership"]


class Ownership:
    """Whether this process keeps a heap's books.

    Args:
        view_only: another process does.

    Attributes:
        is_view_only: whether this process has only a view.
        owner_pid: the process that keeps the books; None if it is not known.
    """

    __slots__ = ("is_view_only", "owner_pid")

    def __init__(self, view_only: bool) -> None:
        self.is_view_only = view_only
        self.owner_pid = None if view_only else os.getpid()

    def start_over_after_fork(self, buffers: Iterable[torch.Tensor]) -> None:
        """In a forked child: leave the books of shared bytes to the parent.

        Args:
            buffers: the heap's buffers.
        """
        if self.is_view_only:
            return
        if any(is_shared(buffer) for buffer in buffers):
            self.is_view_only = True
        else:
            self.owner_pid = os.getpid()

    def require(self, action: str) -> None:
        """Raise if this process has only a view.

        Args:
            action: what the caller wants to do.

        Raises:
            ForeignProcessError: names both processes.
        """
        if self.is_view_only:
            raise ForeignProcessError(action, self.owner_pid, os.getpid())
