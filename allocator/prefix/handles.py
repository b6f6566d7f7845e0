"""Handles on the chunks of a store: protected ones, and those that a copy is filling."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.errors import LifetimeError, TransferError
from kvheap.prefix.index import Hold, PendingStore
from kvheap.prefix.space import ChunkSpace

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ChunkHold", "StoreInFlight"]

K = TypeVar("K", bound=Hashable)


class ChunkHold(Generic[K]):
    """Chunks of a store that are protected from eviction. Made by ``PrefixStore.hold``.

    A context manager, whose end releases them.
    """

    __slots__ = ("_hold", "_space")

    def __init__(self, space: ChunkSpace[K], hold: Hold[K, MemoryObj]) -> None:
        self._space = space
        self._hold = hold

    @property
    def keys(self) -> list[K]:
        """The keys that are held, in the order that they were given in."""
        return self._hold.keys

    @property
    def chunks(self) -> list[MemoryObj]:
        """The chunks of those keys. They are valid even if they were removed meanwhile."""
        return self._hold.values

    def release(self, keys: Iterable[K] | None = None) -> None:
        """End the hold. Once it is released, a second call changes nothing. O(N * P).

        Chunks that were removed meanwhile are freed. Works on a closed store too.

        Args:
            keys: end it for these only; None: for all that are left.

        Raises:
            KeyError: a key, which it names, is not held by this hold; nothing is released.
        """
        self._space.ended.append(self._hold.release(keys))
        self._space.settle()

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
        return f"ChunkHold({len(self._hold)} chunks)"


class StoreInFlight(Generic[K]):
    """Chunks that a copy is filling. Made by ``PrefixStore.begin`` and ``PrefixStore.offload``.

    Attributes:
        keys: the keys of the chunks.
        batch: the chunks, block ``i`` for ``keys[i]``; ``batch.transfer`` is the transfer that
            fills them, or None where the caller fills them in another way.
        state: ``in flight``, ``ready`` or ``aborted``.
        error: why the transfer failed, if it did; else None.
    """

    __slots__ = (
        "__weakref__",
        "_in_flight",
        "_pending",
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
        pending: PendingStore[K, MemoryObj],
        in_flight: MutableMapping[StoreInFlight[K], None],
    ) -> None:
        self._space = space
        self._pending = pending
        self._in_flight = in_flight
        self.keys = pending.keys
        self.batch = batch
        self.state: Literal["in flight", "ready", "aborted"] = "in flight"
        self.error: TransferError | None = None

    def complete(self) -> None:
        """Make the chunks ready; where a transfer fills them, wait for its end first.

        Chunks that were removed meanwhile are freed instead. A second call changes nothing.

        Raises:
            TransferError: the transfer failed; the store is aborted.
            LifetimeError: the store was aborted before.
        """
        if self.state == "ready":
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
        if len(self._pending):  # an interrupted call may have come further
            self._space.ended.append(self._pending.complete())
        self._close("ready")

    def abort(self) -> None:
        """Free the chunks. On a store that is ready or aborted it changes nothing.

        A transfer that still fills them goes on, and the heap does not hand the bytes out before
        it has ended.
        """
        if self.state == "in flight":
            self._space.ended.append(self._pending.abort())
            self._close("aborted")

    def _close(self, state: Literal["ready", "aborted"]) -> None:
        self.state = state
        self._in_flight.pop(self, None)
        self._space.settle()

    def __repr__(self) -> str:
        """How many chunks, and the state."""
        return f"StoreInFlight({len(self.keys)} chunks, {self.state})"
