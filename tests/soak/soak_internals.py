"""Everything that the soak knows about the insides of kvheap, in one place.

The rest of the soak uses public names only. When the allocators are restructured, look here:

- ``kvheap.heaps`` copies blocks with ``scatter_blocks`` and ``gather_blocks`` of
  ``kvheap.kernels.block_copy``, which its modules import by name;
- ``MemoryBatch.claimable(rows, skip_freed)`` decides which of two frees of a block wins.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from kvheap import MemoryBatch, MemoryObj
from kvheap.kernels.block_copy import gather_blocks, scatter_blocks

BlockCopy = Callable[..., Any]


@contextlib.contextmanager
def block_copies_replaced(replace: Callable[[BlockCopy], BlockCopy]) -> Iterator[None]:
    """Let the allocators copy blocks with ``replace(copy)`` wherever they use ``copy``."""
    with contextlib.ExitStack() as stack:
        for copy in (scatter_blocks, gather_blocks):
            users = [
                module
                for name, module in list(sys.modules.items())
                if name.startswith("kvheap.heaps") and vars(module).get(copy.__name__) is copy
            ]
            assert users, f"no module of kvheap.heaps uses {copy.__name__}"
            for module in users:
                stack.enter_context(mock.patch.object(module, copy.__name__, replace(copy)))
        yield


def batch_of(obj: MemoryObj) -> MemoryBatch:
    """The batch of a block that was allocated alone."""
    return obj.batch


def let_rows_be_freed_unclaimed() -> None:
    """Break kvheap for the rest of this process: several threads may free the same rows."""
    claimable = MemoryBatch.claimable
    MemoryBatch.claimable = lambda batch, rows, skip_freed=False: (  # type: ignore[assignment, method-assign]
        claimable(batch, rows, skip_freed) if rows is None else rows
    )
