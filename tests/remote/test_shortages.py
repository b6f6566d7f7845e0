"""What NIXL needs is looked for before it starts: where it lacks, UCX may end the process."""

from __future__ import annotations

from errno import EMFILE

import pytest
from few_descriptors import descriptors_left
from foreign_code import interrupts
from remote_nodes import need_nixl

from kvheap import HostMemoryAllocator

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def test_a_node_without_descriptors_is_refused() -> None:
    from kvheap.remote import Node

    with HostMemoryAllocator(1 << 16) as heap:
        for count in (2, 10, 13):
            with (
                descriptors_left(count),
                pytest.raises(OSError, match="Too many open files: NIXL needs") as caught,
            ):
                Node("late", heap)
            assert caught.value.errno == EMFILE
        Node("later", heap).close()


def test_a_handlers_exception_is_not_taken_for_want_of_descriptors() -> None:
    from kvheap.remote.agent import Agent

    class HandlerError(TimeoutError):
        """Also an ``OSError``, as those of time-outs are."""

    with HostMemoryAllocator(1 << 16) as heap:
        for number in range(0, 60, 7):
            assert interrupts(
                number,
                lambda: Agent("late", heap.segments),
                HandlerError,
                modules=("kvheap.remote.agent", "kvheap.memory.descriptors"),
            )
