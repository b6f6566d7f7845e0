"""``Books``: chunks by state, and the changes between states that no exception leaves half-done.

=========  ==============================================  ===================================
state      meaning                                         ends up as
=========  ==============================================  ===================================
pending    begun, found by nobody                          ready, ended, or removed
ready      found by look-ups; held, or in the policy's     ended, or removed
           order of eviction
removed    no longer found, but still held or pending      ended
ended      the caller must free its value                  taken
=========  ==============================================  ===================================

A change is written down in ``unfinished`` before it is made, and struck out when it is made. What
an exception interrupts is therefore known: the next operation calls :meth:`Books.settle` first,
which undoes the change (``begin``, ``hold``) or makes it again (all others). A change that is made
twice leaves states and counts of holds as one does; totals and the policy's order are computed
anew.

A policy that fails must not take the books with it. What it raises reaches the caller once. When it
fails again, at the repetition or at the next eviction, ``LRU`` takes its place.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Generic, TypeAlias, TypeVar, cast

from kvheap.errors import HeapCorruptionError
from kvheap.interrupts import is_interrupt
from kvheap.prefix.policies.base import CachedChunk, EvictionPolicy, total_bytes
from kvheap.prefix.policies.deaf import Deaf
from kvheap.prefix.policies.lru import LRU
from kvheap.prefix.turns import Turn

__all__ = ["Books", "Chunk", "IndexStats", "OpenChunks"]

LOGGER = logging.getLogger("kvheap")

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Chunk(CachedChunk, Generic[K, V]):
    """One chunk in the books.

    Attributes:
        key, value: the caller's.
        holds: how many holds protect it.
        is_removed: whether it was removed while it was held or pending.
    """

    __slots__ = ("holds", "is_removed", "key", "value")

    def __init__(self, key: K, value: V, size_bytes: int, fingerprint: int) -> None:
        # The base class's attributes too: calling its constructor would cost a quarter more.
        self.size_bytes = size_bytes
        self.fingerprint = fingerprint
        self.key = key
        self.value = value
        self.holds = 0
        self.is_removed = False


class OpenChunks(Generic[K, V]):
    """The chunks of one hold or one store that it has not given up yet, by key."""

    __slots__ = ("chunks",)

    def __init__(self, chunks: dict[K, Chunk[K, V]]) -> None:
        self.chunks = chunks

    def without(self, ended: dict[K, Chunk[K, V]]) -> dict[K, Chunk[K, V]]:
        """What remains when some end."""
        if ended is self.chunks:
            return {}
        return {key: chunk for key, chunk in self.chunks.items() if key not in ended}


Unclaimed: TypeAlias = (
    "tuple[Callable[[OpenChunks[K, V], dict[K, Chunk[K, V]]], None], OpenChunks[K, V]]"
)


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Chunks and bytes by state, at one moment.

    Attributes:
        ready_chunks, ready_bytes: found by look-ups.
        pending_chunks, pending_bytes: their stores have not ended.
        held_chunks, held_bytes: the ready ones that are held.
        evictable_chunks, evictable_bytes: the ready ones that are not held.
        removed_chunks, removed_bytes: no longer found, but still held or pending.
        ended_chunks, ended_bytes: for the caller to free, and not returned to it yet.
    """

    ready_chunks: int
    ready_bytes: int
    pending_chunks: int
    pending_bytes: int
    held_chunks: int
    held_bytes: int
    evictable_chunks: int
    evictable_bytes: int
    removed_chunks: int
    removed_bytes: int
    ended_chunks: int
    ended_bytes: int


class Books(Generic[K, V]):
    """All chunks of one index. See the module's docstring.

    The methods expect valid arguments, and no ``unfinished`` change.

    =================  ======================================================
    purpose            methods
    =================  ======================================================
    chunks in use      ``ready_among``, ``touch``, ``hold``, ``release``
    stores             ``begin``, ``complete``, ``abort``
    chunks that end    ``evict``, ``remove``, ``clear``, ``ended_pairs``
    upkeep             ``enter``, ``settle``, ``stats``, ``check``
    =================  ======================================================

    Attributes:
        policy: the order of the ready chunks that are not held.
        ready, pending: chunks by key.
        ended, ended_bytes: chunks that have ended and whose values were not taken; and their bytes.
            Who takes the values assigns an empty dict and 0.
        unclaimed: what undoes the hold or the store that a call is making, and its chunks; until
            the call hands it over, an exception undoes it.
        turn: whose turn it is to change anything.
        evictable_bytes: bytes of the chunks in the policy's order.
        unfinished: undoes or repeats the change that was interrupted; None if there is none.
    """

    def __init__(self, policy: EvictionPolicy, name: str) -> None:
        self.policy = policy
        self.ready: dict[K, Chunk[K, V]] = {}
        self.pending: dict[K, Chunk[K, V]] = {}
        self._removed: dict[Chunk[K, V], None] = {}
        self.ended: dict[Chunk[K, V], None] = {}
        self.evictable_bytes = self.ended_bytes = 0
        self._ready_bytes = self._pending_bytes = self._removed_bytes = 0
        self.unfinished: Callable[[], None] | None = None
        self.unclaimed: Unclaimed[K, V] | None = None
        self.turn = Turn(name)
        self._evictions_have_failed = False

    # -- chunks in use -------------------------------------------------------------------------

    def ready_among(self, keys: Iterable[K]) -> list[Chunk[K, V]]:
        """The ready ones of the chunks of ``keys``, each once, in their order."""
        find = self.ready.get
        return [chunk for key in dict.fromkeys(keys) if (chunk := find(key)) is not None]

    def touch(self, keys: Iterable[K]) -> None:
        """Tell the policy that one request used the ready ones of the chunks of ``keys``."""
        self._make(partial(self._touch, self.ready_among(keys)))

    def _touch(self, chunks: list[Chunk[K, V]]) -> None:
        self.policy.touch(chunks)

    def hold(self, hold: OpenChunks[K, V], chunks: dict[K, Chunk[K, V]]) -> None:
        """Count one more hold on each ready chunk; undone if it is interrupted."""
        held = list(chunks.values())
        counts = [chunk.holds for chunk in held]
        idle = [chunk for chunk in held if not chunk.holds]
        self.unfinished = partial(self._undo_hold, hold, held, counts, idle)
        for chunk in held:
            chunk.holds += 1
        self.policy.take_out(idle)
        self.evictable_bytes -= total_bytes(idle)
        hold.chunks = chunks
        self.unfinished = None

    def _undo_hold(
        self,
        hold: OpenChunks[K, V],
        held: list[Chunk[K, V]],
        counts: list[int],
        idle: list[Chunk[K, V]],
    ) -> None:
        hold.chunks = {}
        for chunk, count in zip(held, counts, strict=True):
            chunk.holds = count
        self.policy.put_back(idle)

    def release(self, hold: OpenChunks[K, V], chunks: dict[K, Chunk[K, V]]) -> None:
        """Take back one hold on each of some of the chunks of a hold."""
        counts = [chunk.holds - 1 for chunk in chunks.values()]
        released = list(chunks.values())
        self._make(partial(self._release, hold, hold.without(chunks), released, counts))

    def _release(
        self,
        hold: OpenChunks[K, V],
        left: dict[K, Chunk[K, V]],
        released: list[Chunk[K, V]],
        counts: list[int],
    ) -> None:
        for chunk, count in zip(released, counts, strict=True):
            chunk.holds = count
        idle = [chunk for chunk in released if not chunk.holds]
        removed = [chunk for chunk in idle if chunk.is_removed]
        if removed:
            idle = [chunk for chunk in idle if not chunk.is_removed]
            self._end_removed(removed)
        self.policy.put_back(idle)
        self.evictable_bytes += total_bytes(idle)
        hold.chunks = left

    # -- stores --------------------------------------------------------------------------------

    def begin(self, store: OpenChunks[K, V], chunks: dict[K, Chunk[K, V]]) -> None:
        """Enter pending chunks; undone if it is interrupted."""
        num_bytes = total_bytes(chunks.values())
        self.unfinished = partial(self._undo_begin, store, chunks)
        self.pending.update(chunks)
        self._pending_bytes += num_bytes
        store.chunks = chunks
        self.unfinished = None

    def _undo_begin(self, store: OpenChunks[K, V], chunks: dict[K, Chunk[K, V]]) -> None:
        store.chunks = {}
        for key, chunk in chunks.items():
            if self.pending.get(key) is chunk:
                del self.pending[key]

    def complete(self, store: OpenChunks[K, V], chunks: dict[K, Chunk[K, V]]) -> None:
        """Make some of the chunks of a store ready; those that were removed end."""
        removed = [chunk for chunk in chunks.values() if chunk.is_removed]
        kept = chunks
        if removed:
            kept = {key: chunk for key, chunk in chunks.items() if not chunk.is_removed}
        self._make(partial(self._complete, store, store.without(chunks), kept, removed))

    def _complete(
        self,
        store: OpenChunks[K, V],
        left: dict[K, Chunk[K, V]],
        kept: dict[K, Chunk[K, V]],
        removed: list[Chunk[K, V]],
    ) -> None:
        self.ready.update(kept)
        for key in kept:
            self.pending.pop(key, None)
        self.policy.insert(list(kept.values()))
        num_bytes = total_bytes(kept.values())
        self._pending_bytes -= num_bytes
        self._ready_bytes += num_bytes
        self.evictable_bytes += num_bytes
        self._end_removed(removed)
        store.chunks = left

    def abort(self, store: OpenChunks[K, V], chunks: dict[K, Chunk[K, V]]) -> None:
        """End some of the chunks of a store."""
        removed = [chunk for chunk in chunks.values() if chunk.is_removed]
        kept = [chunk for chunk in chunks.values() if not chunk.is_removed]
        self._make(partial(self._abort, store, store.without(chunks), kept, removed))

    def _abort(
        self,
        store: OpenChunks[K, V],
        left: dict[K, Chunk[K, V]],
        kept: list[Chunk[K, V]],
        removed: list[Chunk[K, V]],
    ) -> None:
        for chunk in kept:
            self.pending.pop(chunk.key, None)
        self._pending_bytes -= total_bytes(kept)
        self._end(kept)
        self._end_removed(removed)
        store.chunks = left

    # -- chunks that end -----------------------------------------------------------------------

    def evict(self, num_bytes: int, protected: list[Chunk[K, V]]) -> None:
        """End the chunks that the policy chooses; there are enough beside ``protected``."""
        # Undone, if it is interrupted before the victims are known.
        self.unfinished = partial(self._put_back, protected)
        self.policy.take_out(protected)
        victims = self._victims(num_bytes, protected)
        self.policy.put_back(protected)
        self._make(partial(self._evict, victims))

    def _put_back(self, chunks: list[Chunk[K, V]]) -> None:
        self.policy.put_back(chunks)

    def _victims(self, num_bytes: int, protected: list[Chunk[K, V]]) -> list[Chunk[K, V]]:
        """What the policy chooses; what ``LRU`` chooses, if the policy fails a second time."""
        try:
            victims = cast("list[Chunk[K, V]]", self.policy.evict(num_bytes))
            self._require_victims(victims, num_bytes)
        except Exception as error:
            if is_interrupt(error) or not self._evictions_have_failed:
                self._evictions_have_failed = not is_interrupt(error)
                raise
            self._replace_policy(error, protected)
            victims = cast("list[Chunk[K, V]]", self.policy.evict(num_bytes))
        self._evictions_have_failed = False
        return victims

    def _require_victims(self, victims: Sequence[Chunk[K, V]], num_bytes: int) -> None:
        find = self.ready.get
        is_known = all(find(chunk.key) is chunk and not chunk.holds for chunk in victims)
        if not is_known or total_bytes(victims) < num_bytes or len(set(victims)) < len(victims):
            raise HeapCorruptionError(
                f"the policy {self.policy.name} chose {len(victims)} chunks of "
                f"{total_bytes(victims)} bytes where {num_bytes} are to be freed: too few, or "
                f"chunks that it does not have"
            )

    def _evict(self, victims: list[Chunk[K, V]]) -> None:
        for chunk in victims:
            self.ready.pop(chunk.key, None)
        num_bytes = total_bytes(victims)
        self._ready_bytes -= num_bytes
        self.evictable_bytes -= num_bytes
        self._end(victims)

    def remove(self, keys: Iterable[K]) -> None:
        """End the chunks of ``keys``; those that are held or pending are only removed for now."""
        wanted, find = dict.fromkeys(keys), self.pending.get
        ready = self.ready_among(wanted)
        pending = [chunk for key in wanted if (chunk := find(key)) is not None]
        idle = [chunk for chunk in ready if not chunk.holds]
        held = [chunk for chunk in ready if chunk.holds]
        self._make(partial(self._remove, idle, held, pending))

    def _remove(
        self, idle: list[Chunk[K, V]], held: list[Chunk[K, V]], pending: list[Chunk[K, V]]
    ) -> None:
        for chunk in (*idle, *held):
            self.ready.pop(chunk.key, None)
        for chunk in pending:
            self.pending.pop(chunk.key, None)
        self.policy.remove([*idle, *held])
        self._count_removed(idle, held, pending)

    def clear(self) -> None:
        """Remove all chunks."""
        idle = [chunk for chunk in self.ready.values() if not chunk.holds]
        held = [chunk for chunk in self.ready.values() if chunk.holds]
        self._make(partial(self._clear, idle, held, list(self.pending.values())))

    def _clear(
        self, idle: list[Chunk[K, V]], held: list[Chunk[K, V]], pending: list[Chunk[K, V]]
    ) -> None:
        self.ready, self.pending = {}, {}
        self.policy.clear()
        self._count_removed(idle, held, pending)

    def _count_removed(
        self, idle: list[Chunk[K, V]], held: list[Chunk[K, V]], pending: list[Chunk[K, V]]
    ) -> None:
        in_use = [*held, *pending]
        for chunk in in_use:
            chunk.is_removed = True
        self._removed.update(dict.fromkeys(in_use))
        self._removed_bytes += total_bytes(in_use)
        self._ready_bytes -= total_bytes(idle) + total_bytes(held)
        self.evictable_bytes -= total_bytes(idle)
        self._pending_bytes -= total_bytes(pending)
        self._end(idle)

    def _end(self, chunks: list[Chunk[K, V]]) -> None:
        self.ended.update(dict.fromkeys(chunks))
        self.ended_bytes += total_bytes(chunks)

    def _end_removed(self, chunks: list[Chunk[K, V]]) -> None:
        """End chunks that were removed before."""
        for chunk in chunks:
            self._removed.pop(chunk, None)
        self._removed_bytes -= total_bytes(chunks)
        self._end(chunks)

    def ended_pairs(self) -> list[tuple[K, V]]:
        """Keys and values of the ended chunks, those that finalizers have ended included."""
        if self.turn.waiting:
            self.turn.do_what_waits()
        return [(chunk.key, chunk.value) for chunk in self.ended]

    # -- upkeep --------------------------------------------------------------------------------

    def enter(self, frame: FrameType) -> Books[K, V]:
        """Begin a call that changes something: take the turn, and settle; returns the books.

        Raises:
            BusyError: another call is in progress.
        """
        self.turn.begin(frame)
        if self.needs_settling:
            self.settle()
        return self

    def try_enter(self, frame: FrameType) -> bool:
        """:meth:`enter` if no other call is in progress; returns whether it did."""
        if not self.turn.try_begin(frame):
            return False
        if self.needs_settling:
            self.settle()
        return True

    def look(self) -> Books[K, V]:
        """The books for a call that only looks; settled, unless a call is in progress."""
        if self.needs_settling:
            try:
                self.try_enter(sys._getframe())
            finally:
                self.turn.give_up(sys._getframe())
        return self

    @property
    def needs_settling(self) -> bool:
        """Whether anything was interrupted, or left to a call that had the turn."""
        return bool(self.unfinished is not None or self.unclaimed is not None or self.turn.waiting)

    def _make(self, change: Callable[[], None]) -> None:
        """Make a change that stands from here on: if it is interrupted, it is made again."""
        self.unfinished = change
        change()
        self.unfinished = None

    def settle(self) -> None:
        """Make good what was interrupted.

        Undo or repeat the unfinished change, and compute every total anew, O(n log n); and undo the
        hold or the store that did not reach its caller.
        """
        if self.unfinished is not None:
            self._finish(self.unfinished)
        if self.unclaimed is not None:
            undo, handle = self.unclaimed
            undo(handle, handle.chunks)
            self.unclaimed = None
        self.turn.do_what_waits()

    def take_back(self, store: OpenChunks[K, V], chunks: dict[K, Chunk[K, V]]) -> None:
        """Undo :meth:`begin`; the values do not end: they are the caller's again."""
        self._make(partial(self._undo_begin, store, chunks))
        self._pending_bytes = total_bytes(self.pending.values())

    def _finish(self, unfinished: Callable[[], None]) -> None:
        try:
            unfinished()
            self._repair_policy()
        except Exception as error:
            if is_interrupt(error):
                raise
            policy, self.policy = self.policy, Deaf()
            try:
                unfinished()  # raises if not the policy has failed, but a key
            finally:
                self.policy = policy
            self._replace_policy(error)
        ready = self.ready.values()
        self.evictable_bytes = sum([chunk.size_bytes for chunk in ready if not chunk.holds])
        self._ready_bytes = total_bytes(ready)
        self._pending_bytes = total_bytes(self.pending.values())
        self._removed_bytes = total_bytes(self._removed)
        self.ended_bytes = total_bytes(self.ended)
        self.unfinished = None

    def _repair_policy(self) -> None:
        ready = self.ready.values()
        idle = [chunk for chunk in ready if not chunk.holds]
        self.policy.repair(idle, [chunk for chunk in ready if chunk.holds])

    def _replace_policy(self, error: Exception, taken_out: Iterable[Chunk[K, V]] = ()) -> None:
        """Go on with ``LRU``, in which the chunks that became ready first go first."""
        LOGGER.error(
            "the eviction policy %s fails again and again; LRU takes its place",
            self.policy.name,
            exc_info=error,
        )
        left_out = set(taken_out)
        idle = [chunk for chunk in reversed(self.ready.values()) if not chunk.holds]
        lru = LRU()
        lru.has_index = True
        lru.insert([chunk for chunk in idle if chunk not in left_out])
        self.policy = lru

    def stats(self) -> IndexStats:
        """Chunks and bytes by state."""
        evictable = len(self.policy)
        return IndexStats(
            ready_chunks=len(self.ready),
            ready_bytes=self._ready_bytes,
            pending_chunks=len(self.pending),
            pending_bytes=self._pending_bytes,
            held_chunks=len(self.ready) - evictable,
            held_bytes=self._ready_bytes - self.evictable_bytes,
            evictable_chunks=evictable,
            evictable_bytes=self.evictable_bytes,
            removed_chunks=len(self._removed),
            removed_bytes=self._removed_bytes,
            ended_chunks=len(self.ended),
            ended_bytes=self.ended_bytes,
        )

    def check(self) -> None:
        """Check every invariant. O(n).

        Raises:
            HeapCorruptionError: one does not hold.
        """
        require = self._require
        ready, pending = list(self.ready.values()), list(self.pending.values())
        idle = [chunk for chunk in ready if not chunk.holds]
        held = [chunk for chunk in ready if chunk.holds]
        for keyed in (self.ready, self.pending):
            for key, chunk in keyed.items():
                require(chunk.key == key, f"the chunk of {chunk.key!r} is kept under {key!r}")
        require(not self.ready.keys() & self.pending.keys(), "a key is ready and pending")
        everything = [*ready, *pending, *self._removed, *self.ended]
        require(len(set(everything)) == len(everything), "a chunk is in two states")
        require(all(chunk.holds >= 0 for chunk in everything), "a count of holds is negative")
        require(not any(chunk.holds for chunk in pending), "a pending chunk is held")
        require(not any(chunk.holds for chunk in self.ended), "an ended chunk is held")
        require(not any(c.is_removed for c in (*ready, *pending)), "a chunk is removed and found")
        require(all(chunk.is_removed for chunk in self._removed), "a removed chunk is not marked")
        self._check_bytes("ready", ready, self._ready_bytes)
        self._check_bytes("pending", pending, self._pending_bytes)
        self._check_bytes("evictable", idle, self.evictable_bytes)
        self._check_bytes("removed", self._removed, self._removed_bytes)
        self._check_bytes("ended", self.ended, self.ended_bytes)
        require(len(self.policy) == len(idle), "the policy orders more or fewer chunks")
        self.policy.check(idle, held, require)

    def _check_bytes(self, state: str, chunks: Iterable[Chunk[K, V]], num_bytes: int) -> None:
        expected = total_bytes(chunks)
        self._require(expected == num_bytes, f"{num_bytes} {state} bytes should be {expected}")

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise HeapCorruptionError(f"{message}; {self.stats()}")
