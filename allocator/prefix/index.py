"""``PrefixIndex``: which chunks are stored under which keys, and which of them are evicted next.

Books only: no bytes, no tensor, no address space. A key leads to a value of the caller's (an
address, a ``MemoryObj``, a group and an address) and a size in bytes. A serving engine's scheduler
asks it what a request finds, protects what is being read, and learns from it what to free.

>>> index = PrefixIndex()
>>> store = index.begin(["a", "b", "c"], [0, 4096, 8192], 4096)  # copies begin
>>> index.prefix_length(["a", "b", "z"])
0
>>> store.complete()  # the copies have ended
[]
>>> index.prefix_length(["a", "b", "z"])
2
>>> with index.hold(["a", "b"]) as hold:  # a load begins
...     index.evict(8192), index.evict(4096), hold.values
(None, [('c', 8192)], [0, 4096])
>>> index.remove(["a"]), index.clear()
([('a', 0)], [('b', 4096)])
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, Literal, TypeAlias, TypeVar

from kvheap.addresses.arguments import require_count
from kvheap.prefix.books import Books, Chunk, IndexStats, OpenChunks
from kvheap.prefix.index_handles import Hold, PendingStore
from kvheap.prefix.keys import (
    as_key_error,
    require_key_list,
    require_keys,
    require_list,
    require_new,
    sizes_of,
)
from kvheap.prefix.policies import LRU, POLICIES, EvictionPolicy

__all__ = ["ChunkState", "PrefixIndex"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

ChunkState: TypeAlias = Literal["ready", "pending", "absent"]
"""``ready``: found by look-ups; ``pending``: its store has not ended; ``absent``: neither."""


class PrefixIndex(Generic[K, V]):
    """Chunks by key, in the states pending and ready, with an order of eviction.

    A chunk is *pending* from :meth:`begin` until its store is completed or aborted. Once it is
    completed it is *ready*, and look-ups find it. A ready chunk that no hold protects can be
    evicted. A chunk that is removed while it is held or pending is no longer found, but its value
    stays here until the last hold or the store ends.

    The index frees nothing. Every value that is passed in comes back exactly once, as a pair (key,
    value) in a list that a call returns: :meth:`evict`, :meth:`remove`, :meth:`clear`,
    :meth:`take_ended`, ``hold.release()``, ``store.complete()`` or ``store.abort()``. Each such
    list holds everything that has ended and was not returned before, so one batched free after
    the call suffices. The end of a ``with`` block returns nothing; what it ends is in the next
    list.

    An exception in the middle of a call, for example a ``KeyboardInterrupt`` or one from a key's
    ``__hash__`` or ``__eq__``, leaves the index whole. A :meth:`begin` or :meth:`hold` that raises
    has not happened. Any other call has not happened, or the next call finishes it.

    Not thread-safe: it belongs to one scheduler. But finalizers may run on any thread, and in the
    middle of any call. From there, and from signal handlers and other callbacks, look-ups and
    ``stats`` answer, and ``hold.release()``, ``store.complete()`` and ``store.abort()`` take effect
    with the end of the call in progress, if there is one. Their values are in the next list.
    Other calls raise ``BusyError`` in the middle of a call of their own thread, and change nothing.

    =============  ==========================================================================
    purpose        methods
    =============  ==========================================================================
    look up        ``prefix_length``, ``state``, ``in``, ``values``, ``missing``, ``len``
    use            ``touch``, ``hold``
    store          ``begin``; ``complete`` and ``abort`` of the store that it returns
    make room      ``evict``, ``remove``, ``clear``, ``take_ended``
    watch          ``stats``, ``evictable_bytes``, ``check``
    =============  ==========================================================================

    Complexities below are for N keys among n chunks; P is what the policy takes for one chunk,
    O(1) with those of :mod:`kvheap.prefix.policies`. No cost depends on how many chunks are ready,
    held or pending, unless it says so.

    Wherever keys are taken, a text or a tensor raises ``TypeError``: its parts would be the keys.

    Args:
        policy: the order of eviction, a new object that no other index uses, or the name of one
            (``POLICIES``); None: ``LRU()``.
        name: what messages call this index.

    Raises:
        TypeError: ``policy`` is not an ``EvictionPolicy``, as a class is none. ``name`` is
            not a text.
        ValueError: the policy was given to another index, or there is none of this name.
    """

    def __init__(
        self, policy: EvictionPolicy | str | None = None, *, name: str = "PrefixIndex"
    ) -> None:
        if policy is None:
            policy = LRU()
        elif isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(
                    f"policy must be one of {', '.join(POLICIES)}, or an object of an "
                    f"EvictionPolicy, got {policy!r}"
                )
            policy = POLICIES[policy]()
        if not isinstance(policy, EvictionPolicy):
            raise TypeError(f"policy must be an object of an EvictionPolicy, got {policy!r}")
        if policy.has_index or len(policy):
            raise ValueError(f"the {policy.name} policy is another index's: each needs a new one")
        if not isinstance(name, str):
            raise TypeError(f"name must be a text, got {name!r}")
        policy.has_index = True
        self._books: Books[K, V] = Books(policy, name)

    @property
    def books(self) -> Books[K, V]:
        """The chunks by state, for code that keeps their bytes too."""
        return self._books

    # -- look up -------------------------------------------------------------------------------

    def prefix_length(self, keys: Iterable[K]) -> int:
        """How many leading keys are ready: what a request need not compute. O(result).

        >>> index = PrefixIndex()
        >>> index.begin([1, 2], ["x", "y"], 10).complete()
        []
        >>> index.prefix_length([1, 3, 2])
        1
        """
        require_keys(keys)
        ready = self._books.look().ready
        length = 0
        try:
            for key in keys:
                if key not in ready:
                    break
                length += 1
        except TypeError as error:
            raise as_key_error(error, keys) from None
        return length

    def state(self, key: K) -> ChunkState:
        """Whether the chunk of a key is ready, pending or absent. O(1)."""
        books = self._books.look()
        try:
            if key in books.ready:
                return "ready"
            return "pending" if key in books.pending else "absent"
        except TypeError as error:
            raise as_key_error(error, [key], "key") from None

    def __contains__(self, key: K) -> bool:
        """Whether the chunk of a key is ready. O(1)."""
        ready = self._books.look().ready
        try:
            return key in ready
        except TypeError as error:
            raise as_key_error(error, [key], "key") from None

    def __len__(self) -> int:
        """How many chunks are ready. O(1)."""
        return len(self._books.look().ready)

    def values(self, keys: Iterable[K]) -> list[V]:
        """The values of ready chunks, in the order of the keys. O(N).

        Raises:
            KeyError: a key, which it names, is not ready.
        """
        require_keys(keys)
        ready = self._books.look().ready
        try:
            return [ready[key].value for key in keys]
        except TypeError as error:
            raise as_key_error(error, keys) from None

    def missing(self, keys: Iterable[K]) -> list[K]:
        """The keys that are neither ready nor pending, each once: what is to be stored. O(N).

        >>> index = PrefixIndex()
        >>> store = index.begin([1], ["x"], 10)
        >>> index.missing([1, 2, 3, 2])
        [2, 3]
        """
        require_keys(keys)
        books = self._books.look()
        ready, pending = books.ready, books.pending
        try:
            return [key for key in dict.fromkeys(keys) if key not in ready and key not in pending]
        except TypeError as error:
            raise as_key_error(error, keys) from None

    # -- use -----------------------------------------------------------------------------------

    def touch(self, keys: Iterable[K]) -> None:
        """Tell the policy that one request used chunks. O(N * P).

        Args:
            keys: the request's keys, the head of the prefix first. A key that is not ready is
                skipped, and one that is named twice counts once.
        """
        require_keys(keys)
        books = self._books
        try:
            books.enter(sys._getframe()).touch(keys)
            books.turn.state = {}
        except BaseException as error:
            books.turn.give_up(sys._getframe())
            raise as_key_error(error, keys)  # noqa: B904

    def hold(self, keys: Iterable[K]) -> Hold[K, V]:
        """Protect ready chunks from eviction until the hold is released. O(N * P).

        Holds nest: a chunk can be evicted when every hold on it has been released. Holding a
        chunk does not count as a use of it; see :meth:`touch`.

        Args:
            keys: the head of the prefix first. A key that is named twice is held once.

        Returns:
            The hold. It is a context manager too, whose end releases it. A hold that is dropped
            without being released protects its chunks for ever.

        Raises:
            KeyError: a key, which it names, is not ready; nothing is held.
            BusyError: another call is in progress; nothing is held.
        """
        require_keys(keys)
        books = self._books
        hold = Hold(books, OpenChunks({}))
        try:
            ready = books.enter(sys._getframe()).ready
            chunks = {key: ready[key] for key in keys}
            books.unclaimed = (books.release, hold.open_chunks)
            books.hold(hold.open_chunks, chunks)
            # One statement without a call: no signal handler runs before this returns.
            books.unclaimed, books.turn.state = None, {}
        except BaseException as error:
            books.turn.give_up(sys._getframe())
            raise as_key_error(error, keys)  # noqa: B904
        return hold

    # -- store ---------------------------------------------------------------------------------

    def begin(
        self,
        keys: Sequence[K],
        values: Sequence[V],
        size_bytes: int | Sequence[int],
    ) -> PendingStore[K, V]:
        """Enter chunks whose bytes are on their way. They are found once they are completed. O(N).

        Args:
            keys: N keys, the head of the prefix first, none of them ready or pending.
            values: a value for each key.
            size_bytes: a positive number of bytes for each key, or one for all: what freeing the
                chunk gives back.

        Returns:
            The store, which must be completed or aborted. A store that is dropped instead leaves
            its chunks pending for ever.

        Raises:
            ValueError: a key is ready or pending already, or named twice; a size is not positive;
                or the lists differ in length. The key is named.
            TypeError: a size is not an integer, or a key cannot be hashed.
            BusyError: another call is in progress.
            After any of them nothing is entered, and the values are still the caller's.
        """
        require_key_list(keys)
        require_list("values", values)
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys need as many values, got {len(values)}")
        sizes = sizes_of(keys, size_bytes)
        books = self._books
        store = PendingStore(books, OpenChunks({}), is_empty=not len(keys))
        try:
            books.enter(sys._getframe())
            chunks = {
                key: Chunk(key, value, size, hash(key))
                for key, value, size in zip(keys, values, sizes, strict=True)
            }
            require_new(keys, chunks, books.ready, books.pending)
            books.unclaimed = (books.take_back, store.open_chunks)
            books.begin(store.open_chunks, chunks)
            books.unclaimed, books.turn.state = None, {}  # see hold
        except BaseException as error:
            books.turn.give_up(sys._getframe())
            raise as_key_error(error, keys)  # noqa: B904
        return store

    # -- make room -----------------------------------------------------------------------------

    def evict(self, num_bytes: int, protected: Iterable[K] = ()) -> list[tuple[K, V]] | None:
        """End ready chunks that no hold protects, in the policy's order, whole or not at all.

        O((V + protected) * P) for V chunks that are evicted.

        Args:
            num_bytes: how many bytes to free at least.
            protected: keys that must stay, the head of the prefix first, as if they were held
                during the call. Keys that are not ready have no effect.

        Returns:
            Keys and values of what has ended, for the caller to free. None if all chunks that may
            go have fewer bytes together; nothing is evicted then.

        Raises:
            ValueError: ``num_bytes`` is negative.
            TypeError: ``num_bytes`` is not an integer.
            BusyError: another call is in progress; nothing is evicted.
        """
        num_bytes = require_count("num_bytes", num_bytes)
        require_keys(protected, "protected")
        books = self._books
        ended: list[tuple[K, V]] | None = None
        try:
            found = books.enter(sys._getframe()).ready_among(protected)
            kept = [chunk for chunk in found if not chunk.holds]
            free_bytes = books.evictable_bytes - sum([chunk.size_bytes for chunk in kept])
            if num_bytes > free_bytes:
                books.turn.state = {}
            else:
                if num_bytes:
                    books.evict(num_bytes, kept)
                ended = books.ended_pairs()
                books.ended, books.ended_bytes, books.turn.state = {}, 0, {}  # see hold
        except BaseException as error:
            books.turn.give_up(sys._getframe())
            raise as_key_error(error, protected, "protected")  # noqa: B904
        return ended

    def remove(self, keys: Iterable[K]) -> list[tuple[K, V]]:
        """End chunks whatever the policy thinks of them; look-ups no longer find them. O(N * P).

        Args:
            keys: of ready or pending chunks. Others are skipped.

        Returns:
            Keys and values of what has ended, for the caller to free. A chunk that is held or
            pending ends later, with its last hold or its store, and is in the list returned then.
        """
        require_keys(keys)
        books = self._books
        try:
            books.enter(sys._getframe()).remove(keys)
            ended = books.ended_pairs()
            books.ended, books.ended_bytes, books.turn.state = {}, 0, {}  # see hold
        except BaseException as error:
            books.turn.give_up(sys._getframe())
            raise as_key_error(error, keys)  # noqa: B904
        return ended

    def clear(self) -> list[tuple[K, V]]:
        """End all chunks, as :meth:`remove` does, and let the policy forget its history. O(n)."""
        books = self._books
        try:
            books.enter(sys._getframe()).clear()
            ended = books.ended_pairs()
            books.ended, books.ended_bytes, books.turn.state = {}, 0, {}  # see hold
        except BaseException:
            books.turn.give_up(sys._getframe())
            raise
        return ended

    def take_ended(self) -> list[tuple[K, V]]:
        """Keys and values of what has ended and was not returned before. O(result).

        That is what ``with`` blocks, interrupted calls, and finalizers in the middle of calls have
        ended. The caller frees it.
        """
        books = self._books
        try:
            ended = books.enter(sys._getframe()).ended_pairs()
            books.ended, books.ended_bytes, books.turn.state = {}, 0, {}  # see hold
        except BaseException:
            books.turn.give_up(sys._getframe())
            raise
        return ended

    # -- watch ---------------------------------------------------------------------------------

    @property
    def evictable_bytes(self) -> int:
        """How many bytes :meth:`evict` could free. O(1)."""
        return self._books.look().evictable_bytes

    def stats(self) -> IndexStats:
        """Chunks and bytes by state. O(1).

        >>> index = PrefixIndex()
        >>> index.begin([1, 2], ["x", "y"], [10, 20]).complete([1])
        []
        >>> stats = index.stats()
        >>> stats.ready_bytes, stats.pending_bytes, stats.evictable_chunks
        (10, 20, 1)
        """
        return self._books.look().stats()

    def check(self) -> None:
        """Check every invariant. O(n).

        Raises:
            HeapCorruptionError: one does not hold: a bug in kvheap or in the policy.
        """
        books = self._books
        try:
            books.enter(sys._getframe()).check()
        finally:
            books.turn.give_up(sys._getframe())

    def __repr__(self) -> str:
        """The policy and the counts."""
        return f"PrefixIndex({self._books.policy.name}, {self._books.stats()})"
