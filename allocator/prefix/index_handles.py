"""What users hold of an index: chunks that are protected, and chunks whose store has not ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from kvheap.errors import LifetimeError
from kvheap.prefix.books import Books, Chunk, OpenChunks
from kvheap.prefix.keys import as_key_error, require_keys

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Hold", "PendingStore"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Handle(Generic[K, V]):
    """What holds and stores share: the keys that they have not given up."""

    __slots__ = ("_books", "_is_empty", "open_chunks")

    def __init__(
        self, books: Books[K, V], open_chunks: OpenChunks[K, V], *, is_empty: bool = False
    ) -> None:
        self._books = books
        self._is_empty = is_empty  # from the beginning
        self.open_chunks = open_chunks
        """The chunks that have not ended, for the index."""

    @property
    def keys(self) -> list[K]:
        """The keys that have not ended, in the order that they were given in."""
        return list(self.open_chunks.chunks)

    @property
    def values(self) -> list[V]:
        """The values of those keys. They are valid even if the chunks were removed meanwhile."""
        return [chunk.value for chunk in self.open_chunks.chunks.values()]

    def __len__(self) -> int:
        """How many keys have not ended."""
        return len(self.open_chunks.chunks)

    def _select(self, keys: Iterable[K] | None) -> dict[K, Chunk[K, V]]:
        """The chunks of ``keys``; None: of all keys that have not ended."""
        chunks = self.open_chunks.chunks
        if keys is None:
            return chunks
        require_keys(keys)
        try:
            return {key: chunks[key] for key in keys}
        except TypeError as error:
            raise as_key_error(error, keys) from None

    def _end(
        self,
        change: Callable[[OpenChunks[K, V], dict[K, Chunk[K, V]]], None],
        keys: Iterable[K] | None,
    ) -> None:
        """End some chunks later, in the turn of another call; a second time changes nothing."""
        chunks = self.open_chunks.chunks
        wanted = chunks if keys is None else {key: chunks[key] for key in keys if key in chunks}
        if wanted:
            change(self.open_chunks, wanted)

    def __repr__(self) -> str:
        """How many keys have not ended."""
        return f"{type(self).__name__}({len(self)} chunks)"


class Hold(_Handle[K, V]):
    """Ready chunks that are protected from eviction. Made by ``PrefixIndex.hold``."""

    __slots__ = ()

    def release(self, keys: Iterable[K] | None = None) -> list[tuple[K, V]]:
        """End the hold. Once it is released, a second call changes nothing. O(N * P).

        In the middle of another call of the index, as in a finalizer, the hold ends with that call,
        and this returns nothing.

        Args:
            keys: end it for these only; None: for all that are left.

        Returns:
            Keys and values of what has ended, for the caller to free: among others the chunks
            that were removed while they were held.

        Raises:
            KeyError: a key, which it names, is not held by this hold; nothing is released.
        """
        books = self._books
        ended: list[tuple[K, V]] = []
        try:
            if books.try_enter(sys._getframe()):
                books.release(self.open_chunks, self._select(keys))
                ended = books.ended_pairs()
                books.ended, books.ended_bytes, books.turn.state = {}, 0, {}  # see PrefixIndex.hold
            else:
                books.turn.leave(
                    partial(self._end, books.release, _listed(self._select(keys), keys))
                )
        except BaseException:
            books.turn.give_up(sys._getframe())
            raise
        return ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        books = self._books
        try:
            if books.try_enter(sys._getframe()):
                books.release(self.open_chunks, self.open_chunks.chunks)
            else:
                books.turn.leave(partial(self._end, books.release, None))
        finally:
            books.turn.give_up(sys._getframe())


class PendingStore(_Handle[K, V]):
    """Chunks whose bytes are on their way. Made by ``PrefixIndex.begin``."""

    __slots__ = ()

    def complete(self, keys: Iterable[K] | None = None) -> list[tuple[K, V]]:
        """Make chunks ready, because their bytes have arrived. O(N * P).

        In the middle of another call of the index, as in a finalizer, they become ready with the
        end of that call, and this returns nothing.

        Args:
            keys: complete these only; None: all that are left.

        Returns:
            Keys and values of what has ended, for the caller to free: among others the chunks
            that were removed while they were pending, which do not become ready.

        Raises:
            KeyError: a key, which it names, is not pending in this store; nothing is completed.
            LifetimeError: the whole store is completed or aborted already.
        """
        books = self._books
        ended: list[tuple[K, V]] = []
        try:
            is_mine = books.try_enter(sys._getframe())
            chunks = self._select(keys)
            if not self.open_chunks.chunks and not self._is_empty:
                raise LifetimeError("this store is completed or aborted already")
            if is_mine:
                books.complete(self.open_chunks, chunks)
                ended = books.ended_pairs()
                books.ended, books.ended_bytes, books.turn.state = {}, 0, {}  # see PrefixIndex.hold
            else:
                books.turn.leave(partial(self._end, books.complete, _listed(chunks, keys)))
        except BaseException:
            books.turn.give_up(sys._getframe())
            raise
        return ended

    def abort(self, keys: Iterable[K] | None = None) -> list[tuple[K, V]]:
        """End chunks, because their bytes will not arrive. O(N).

        On a store that is completed or aborted as a whole it changes nothing. In the middle of
        another call of the index, as in a finalizer, they end with that call, and this returns
        nothing.

        Args:
            keys: abort these only; None: all that are left.

        Returns:
            Keys and values of what has ended, for the caller to free.

        Raises:
            KeyError: a key, which it names, is not pending in this store; nothing is aborted.
        """
        books = self._books
        ended: list[tuple[K, V]] = []
        try:
            if books.try_enter(sys._getframe()):
                books.abort(self.open_chunks, self._select(keys))
                ended = books.ended_pairs()
                books.ended, books.ended_bytes, books.turn.state = {}, 0, {}  # see PrefixIndex.hold
            else:
                books.turn.leave(partial(self._end, books.abort, _listed(self._select(keys), keys)))
        except BaseException:
            books.turn.give_up(sys._getframe())
            raise
        return ended


def _listed(chunks: dict[K, Chunk[K, V]], keys: Iterable[K] | None) -> list[K] | None:
    """The keys that a call named, to be ended later; None: all."""
    return None if keys is None else list(chunks)
