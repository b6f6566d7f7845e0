"""``Storing``: how new chunks come into a store: room, bytes and keys, whole or not at all.

A store at once (:meth:`Storing.store`) makes a batch, enters its chunks as pending and completes
them, all in one turn. A store that a copy fills (:meth:`Storing.begin`) stays in flight until
:meth:`Storing.poll` finds that its transfer has ended. Either way the books are told first what
undoes the store, so that an exception at any point loses no bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FrameType
from typing import Generic, TypeVar

from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.errors import TransferError
from kvheap.prefix.books import Chunk, OpenChunks
from kvheap.prefix.keys import as_key_error, require_new
from kvheap.prefix.space import ChunkSpace
from kvheap.prefix.store_handles import StoreInFlight, StoresInFlight

__all__ = ["Storing"]

K = TypeVar("K", bound=Hashable)


class Storing(Generic[K]):
    """The stores of one ``PrefixStore``, those in flight included.

    Args:
        space: the heap, and the books of the chunks in it.
    """

    def __init__(self, space: ChunkSpace[K]) -> None:
        self._space = space
        self._in_flight: StoresInFlight[K] = StoresInFlight()

    @property
    def num_in_flight(self) -> int:
        """How many stores were begun and have not ended."""
        return len(self._in_flight.stores)

    def store(
        self,
        keys: Sequence[K],
        make_batch: Callable[[], MemoryBatch | None],
        check: Callable[[], object],
    ) -> None:
        """Store chunks that are ready on return, in a turn of this call's own.

        Args:
            keys: their keys.
            make_batch: allocates and fills them; None when they do not fit.
            check: raises if ``make_batch`` would raise; called before anything is evicted.

        Raises:
            ValueError: a key is stored or being stored already, or named twice.
            RequestTooLargeError: the chunks do not fit.
        """
        space = self._space
        try:
            books = space.enter(sys._getframe())
            self._require_new(keys)
            batch = space.allocate(len(keys), make_batch, check, self.poll)
            entered: OpenChunks[K, MemoryObj] = OpenChunks({})
            books.unclaimed = (books.abort, entered)
            self._enter_pending(keys, batch, entered)
            books.complete(entered, entered.chunks)
            books.unclaimed = None
            if space.turn.waiting:
                space.free_ended()
        finally:
            space.end_turn(sys._getframe())

    def begin(
        self,
        frame: FrameType,
        keys: Sequence[K],
        make_batch: Callable[[list[MemoryBatch]], MemoryBatch | None],
        check: Callable[[], object] = tuple,
        check_before_evicting: Callable[[], object] = tuple,
    ) -> StoreInFlight[K]:
        """Begin a store in the turn of ``frame``, which then ends the turn.

        Args:
            frame: the caller's. It hands the store over by setting ``unclaimed`` of the books to
                None; until then, an exception undoes it.
            keys: the chunks' keys.
            make_batch: allocates them; None when they do not fit. It puts a batch of which a
                transfer was begun into the list that it gets.
            check: raises if the arguments are wrong.
            check_before_evicting: as for :meth:`store`.

        Raises:
            ValueError, RequestTooLargeError: as for :meth:`store`.
        """
        space = self._space
        books = space.enter(frame)
        self._require_new(keys)
        check()
        moved: list[MemoryBatch] = []
        flights: list[StoreInFlight[K]] = []
        entered: OpenChunks[K, MemoryObj] = OpenChunks({})
        books.unclaimed = (partial(self._go_on, keys, moved, flights), entered)
        batch = space.allocate(
            len(keys), partial(make_batch, moved), check_before_evicting, self.poll
        )
        flights.append(StoreInFlight(space, batch, keys, self._in_flight, entered))
        self._enter_pending(keys, batch, entered)
        self._in_flight.stores[flights[0]] = None
        if space.turn.waiting:
            space.free_ended()
        return flights[0]

    def poll(self) -> list[StoreInFlight[K]]:
        """End the stores whose transfer has ended, for a caller who has the turn; returns them."""
        ended = []
        for store in list(self._in_flight.stores):
            transfer = store.batch.transfer
            if transfer is None or not transfer.done():
                continue
            try:
                transfer.result()
            except TransferError as error:
                store.error = error
                store.abort_in_turn()
            else:
                store.complete_in_turn()
            ended.append(store)
        return ended

    def abort_all(self) -> None:
        """Abort all stores in flight, for a caller who has the turn."""
        for store in list(self._in_flight.stores):
            store.abort_in_turn()

    def _require_new(self, keys: Sequence[K]) -> None:
        """Refuse keys that are known or named twice, before anything is evicted for them."""
        books = self._space.books
        try:
            require_new(keys, dict.fromkeys(keys), books.ready, books.pending)
        except TypeError as error:
            raise as_key_error(error, keys) from None

    def _go_on(
        self,
        keys: Sequence[K],
        moved: list[MemoryBatch],
        flights: list[StoreInFlight[K]],
        entered: OpenChunks[K, MemoryObj],
        chunks: object,
    ) -> None:
        """Settle a store that an exception has interrupted, in the turn of a later call.

        A transfer that was begun goes on, for :meth:`poll` to complete: it may be about to free the
        blocks that it copies, and then the chunks are the only copy.
        """
        if not flights and moved and moved[-1].transfer is not None:
            flights.append(StoreInFlight(self._space, moved[-1], keys, self._in_flight, entered))
        if not flights:
            return
        if flights[0].batch.transfer is None:
            flights[0].abort_in_turn()
            return
        if not entered.chunks:
            self._enter_pending(keys, flights[0].batch, entered)
        self._in_flight.stores[flights[0]] = None

    def _enter_pending(
        self, keys: Sequence[K], batch: MemoryBatch, into: OpenChunks[K, MemoryObj]
    ) -> None:
        size_bytes = batch.allocated_bytes
        self._space.books.begin(
            into,
            {
                key: Chunk(key, block, size_bytes, hash(key))
                for key, block in zip(keys, batch[:], strict=True)
            },
        )
