"""``SharedHold``: chunks that this process reads where they are, protected by leases."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.shared.chunk_table import ChunkTable, Record
from kvheap.shared.errors import LeaseLostError
from kvheap.shared.leases import Leases
from kvheap.shared.tokens import Token

if TYPE_CHECKING:
    from typing import Self

__all__ = ["SharedHold"]


class SharedHold:
    """Chunks of a ``SharedHeap`` that are not reused while they are held. Made by its ``hold``.

    A context manager, whose end releases them, and raises ``LeaseLostError`` if they were not
    protected all the time. That can happen only if they are held for longer than the heap's
    ``lease_s`` while the heap is full, or after they were removed; see :meth:`check`.

    Attributes:
        keys: what is held, in the order given.
        num_tokens: how many tokens each holds, as it was stored; 0: not known.
    """

    def __init__(
        self,
        table: ChunkTable,
        leases: Leases,
        lease_s: float,
        asked_s: float,
        batch_of: Callable[[Sequence[int]], MemoryBatch],
    ) -> None:
        self._table = table
        self._leases = leases
        self._lease_s = lease_s
        self._safe_s = asked_s  # when no chunk had been forgotten yet
        self._records: list[Record] = []
        self._tokens: list[Token] = []  # of the places that are locked
        self._batch: MemoryBatch | None = None
        self._batch_of = batch_of

    def lock(self, places: Sequence[int]) -> None:
        """Lock places, and unlock those from before, for the heap."""
        num_before = len(self._tokens)
        self._tokens.append(Token())
        try:
            self._leases.read(self._tokens[-1], places)
        finally:  # also when the heap is closed meanwhile: nobody would look for them later
            self._end(num_before)

    def keep(self, records: Sequence[Record], is_all: bool) -> None:
        """Hold what these places have, and nothing else, for the heap."""
        self._records = list(records)
        if not is_all:
            self.lock([record.place for record in records])

    @property
    def batch(self) -> MemoryBatch:
        """The chunks as blocks for reading, block ``i`` for ``keys[i]``.

        Do not use it after the release.
        """
        if self._batch is None:
            self._batch = self._batch_of([record.place for record in self._records])
        return self._batch

    @property
    def keys(self) -> list[bytes]:
        """What is held, in the order given."""
        return [record.key for record in self._records]

    @property
    def num_tokens(self) -> list[int]:
        """How many tokens each holds, as it was stored; 0: not known."""
        return [record.num_tokens for record in self._records]

    @property
    def records(self) -> list[Record]:
        """The records of the chunks, as they were when they were locked."""
        return list(self._records)

    def is_valid(self) -> bool:
        """Whether the chunks' bytes have been theirs from the beginning until now. O(N).

        True while no chunk was evicted or removed, and then for ``lease_s`` at least from the last
        time that this was so.
        """
        now = time.monotonic()
        lost = self._forgotten()
        if not lost:
            self._safe_s = now
            return True
        return time.monotonic() < self._safe_s + self._lease_s

    def check(self) -> None:
        """Raise unless the chunks' bytes have been theirs from the beginning until now. O(N).

        To be called after the bytes were read or copied, if that is not the end of the hold.

        Raises:
            LeaseLostError: they have not.
        """
        if not self.is_valid():
            raise LeaseLostError([record.key for record in self._forgotten()])

    def _forgotten(self) -> list[Record]:
        generation = self._table.generation
        return [each for each in self._records if generation(each.place) != each.generation]

    def release(self) -> None:
        """End the hold; never waits, and may be repeated. Tells nothing: see :meth:`check`."""
        self._end(len(self._tokens))

    def _end(self, count: int) -> None:
        """Unlock what the first tokens stand for; a token goes last, so that none is lost."""
        for token in self._tokens[:count]:
            self._leases.end(token)
        del self._tokens[:count]

    def __len__(self) -> int:
        """How many keys are held."""
        return len(self._records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._tokens:
                self.check()
        finally:
            self.release()

    def __del__(self) -> None:
        if getattr(self, "_tokens", None):  # the constructor may have been interrupted
            self.release()

    def __repr__(self) -> str:
        """How many keys are held."""
        return f"SharedHold({len(self._records)} chunks)"
