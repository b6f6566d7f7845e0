"""Handles on the chunks of a store: protected ones, and those that a copy is filling."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.errors import LifetimeError, TransferError
from kvheap.prefix.books import Chunk, OpenChunks
from kvheap.prefix.keys import as_key_error, require_keys
from kvheap.prefix.space import ChunkSpace

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ChunkHold", "StoreInFlight", "StoresInFlight"]

K = TypeVar("K", bound=Hashable)


class ChunkHold(Generic[K]):
    """Chunks of a store that are protected from eviction. Made by ``PrefixStore.hold``.

    A context manager, whose end releases them.
    """

    __slots__ = ("_space", "open_chunks")

    def __init__(self, space: ChunkSpace[K]) -> None:
        self._space = space
        self.open_chunks: OpenChunks[K, MemoryObj] = OpenChunks({})
        """The chunks that are held, for the store."""

    @property
    def keys(self) -> list[K]:
        """The keys that are held, in the order that they were given in."""
        return list(self.open_chunks.chunks)

    @property
    def chunks(self) -> list[MemoryObj]:
        """The chunks of those keys. They are valid even if they were removed meanwhile."""
        return [chunk.value for chunk in self.open_chunks.chunks.values()]

    def release(self, keys: Iterable[K] | None = None) -> None:
        """End the hold. Once it is released, a second call changes nothing. O(N * P).

        Chunks that were removed meanwhile are freed. Works on a closed store too. In the middle of
        another call of the store, as in a finalizer, the hold ends with that call.

        Args:
            keys: end it for these only; None: for all that are left.

        Raises:
            KeyError: a key, which it names, is not held by this hold; nothing is released.
        """
        held = self.open_chunks.chunks
        if keys is None:
            wanted = [*held]
        else:
            require_keys(keys)
            try:
                wanted = list(dict.fromkeys(keys))
            except TypeError as error:
                raise as_key_error(error, keys) from None
        for key in wanted:
            held[key]  # raises
        space = self._space
        try:
            if space.try_enter(sys._getframe()):
                self._release(wanted)
                space.free_ended()
            else:
                space.turn.leave(partial(self._release, wanted))
        finally:
            space.end_turn(sys._getframe())

    def _release(self, keys: list[K]) -> None:
        """End the hold for keys, in a turn; a second time this changes nothing."""
        held = self.open_chunks.chunks
        chunks = held if len(keys) == len(held) else {key: held[key] for key in keys if key in held}
        if chunks:
            self._space.books.release(self.open_chunks, chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        """How many keys are held."""
        return f"ChunkHold({len(self.open_chunks.chunks)} chunks)"


class StoresInFlight(Generic[K]):
    """The stores in flight of one ``PrefixStore``, which alone keeps this object alive."""

    def __init__(self) -> None:
        self.stores: dict[StoreInFlight[K], None] = {}


class StoreInFlight(Generic[K]):
    """Chunks that a copy is filling. Made by ``PrefixStore.begin`` and ``PrefixStore.offload``.

    Attributes:
        keys: the keys of the chunks.
        batch: the chunks, block ``i`` for ``keys[i]``; ``batch.transfer`` is the transfer that
            fills them, or None where the caller fills them in another way.
        state: ``in flight``; ``ready``, if look-ups find the chunks, or found them, those that were
            not removed before; ``removed``, if all chunks were removed before they were ready; or
            ``aborted``.
        error: why the transfer failed, if it did; else None.
    """

    __slots__ = (
        "__weakref__",
        "_end",
        "_in_flight",
        "_open",
        "_space",
        "batch",
        "error",
        "keys",
        "state",
    )

    def __init__(
        self,
        space: ChunkSpace[K],
        batch: MemoryBatch,
        keys: Sequence[K],
        in_flight: StoresInFlight[K],
        open_chunks: OpenChunks[K, MemoryObj],
    ) -> None:
        self._space = space
        # Weak: a store that is dropped, with its heap, must not stay alive through a cycle.
        self._in_flight = weakref.ref(in_flight)
        self._end: Literal["ready", "removed", "aborted"] | None = None  # what state will be
        self._open = open_chunks
        self.keys = list(keys)
        self.batch = batch
        self.state: Literal["in flight", "ready", "removed", "aborted"] = "in flight"
        self.error: TransferError | None = None

    def complete(self) -> None:
        """Make the chunks ready; where a transfer fills them, wait for its end first.

        Chunks that were removed meanwhile are freed instead. A second call changes nothing. In the
        middle of another call of the store, as in a finalizer, this takes effect with the end of
        that call.

        Raises:
            TransferError: the transfer failed; the store is aborted.
            LifetimeError: the store was aborted before.
        """
        if self.state in ("ready", "removed"):
            return
        if self.state == "aborted":
            raise LifetimeError(f"{self!r} cannot be completed")
        if self.batch.transfer is not None:
            try:
                self.batch.transfer.result()
            except TransferError as error:
                self.error = error
                self.abort()
                raise
        space = self._space
        try:
            if space.try_enter(sys._getframe()):
                self.complete_in_turn()
                space.free_ended()
            else:
                space.turn.leave(self.complete_in_turn)
        finally:
            space.end_turn(sys._getframe())

    def abort(self) -> None:
        """Free the chunks. On a store that has ended it changes nothing.

        A transfer that still fills them goes on, and the heap does not hand the bytes out before
        it has ended. In the middle of another call of the store, as in a finalizer, this takes
        effect with the end of that call.
        """
        if self.state != "in flight":
            return
        space = self._space
        try:
            if space.try_enter(sys._getframe()):
                self.abort_in_turn()
                space.free_ended()
            else:
                space.turn.leave(self.abort_in_turn)
        finally:
            space.end_turn(sys._getframe())

    def complete_in_turn(self) -> None:
        """Make the chunks ready, for a caller who has the turn; a second time changes nothing."""
        chunks = self._open.chunks.values()
        are_removed = bool(chunks) and all(chunk.is_removed for chunk in chunks)
        self._finish("removed" if are_removed else "ready", self._space.books.complete)

    def abort_in_turn(self) -> None:
        """End the chunks, for a caller who has the turn; a second time changes nothing."""
        self._finish("aborted", self._space.books.abort)

    def _finish(
        self,
        end: Literal["ready", "removed", "aborted"],
        change: Callable[[OpenChunks[K, MemoryObj], dict[K, Chunk[K, MemoryObj]]], None],
    ) -> None:
        if self.state != "in flight":
            return
        chunks = self._open.chunks
        if chunks or self._end is None:  # else an interrupted call has come further
            self._end = end
            if chunks:
                change(self._open, chunks)
        self._forget()
        self.state = self._end

    def _forget(self) -> None:
        in_flight = self._in_flight()
        if in_flight is not None:
            in_flight.stores.pop(self, None)

    def __repr__(self) -> str:
        """How many chunks, and the state."""
        return f"StoreInFlight({len(self.keys)} chunks, {self.state})"
