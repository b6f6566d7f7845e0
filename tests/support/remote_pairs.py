"""Two nodes of one process: one has chunks, the other reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from remote_nodes import fill, keys_of, make_heap, until

from kvheap import TransferError

__all__ = ["Pair", "failure"]


class Pair:
    """A node with the chunks 0 to 127, and one that is connected to it."""

    def __init__(self, num_chunks: int = 512) -> None:
        from kvheap.remote import Node

        self.there, self.here = make_heap(num_chunks), make_heap(num_chunks)
        self.owner, self.reader = Node("owner", self.there), Node("reader", self.here)
        self.batch = fill(self.there, range(128))
        self.owner.publish(keys_of(range(128)), self.batch)
        self.peer = self.reader.connect(self.owner.address)

    def lease(self, numbers: Sequence[int], ttl_s: float = 20.0) -> Any:
        return self.peer.lease(keys_of(numbers), ttl_s)

    @property
    def num_leases(self) -> int:
        """How many leases the owner has given and not got back."""
        return int(self.owner.stats().leases)

    def is_idle(self) -> bool:
        """Whether nothing is in flight, and nothing is leased."""
        return not self.num_leases and not self.reader.stats().reads_in_flight

    def require_idle(self) -> None:
        """Fail unless everything ends by itself, soon."""
        assert until(self.is_idle), (self.reader.stats(), self.owner.stats())

    def close(self) -> None:
        for node in (self.reader, self.owner):
            node.close(20)
        for heap in (self.here, self.there):
            if not heap.closed:
                heap.memcheck()
            heap.close()


def failure(batch: Any) -> BaseException:
    """Why the read into a batch has failed."""
    with pytest.raises(TransferError) as raised:
        batch.transfer.result(20)
    cause = raised.value.__cause__
    assert cause is not None
    return cause
