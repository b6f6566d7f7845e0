"""``ChunkFile``: chunks in one file, with their books, their index and their checksums.

Everything here blocks, and is called on the threads of a tier.

The order of a store: what was evicted leaves the index; the bytes are written; with ``is_durable``
they are synchronized; the index gets them. So the index never names a place whose bytes are another
chunk's or half written, whenever the process is killed, as no place is written while the index has
it for another chunk. A chunk's checksum (xxh3, seeded with its key) is compared at every load.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from errno import EBADMSG, EILSEQ, EIO, ENODATA, EUCLEAN
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array
from kvheap.errors import HeapCorruptionError
from kvheap.files.books import Books, Chunk
from kvheap.files.chunk_index import Entry
from kvheap.files.data_file import DataFile
from kvheap.files.folder import TierFolder
from kvheap.files.host_blocks import HostBlocks
from kvheap.files.index_restore import restored_index
from kvheap.files.packages import need_xxhash
from kvheap.files.pieces import cut_into_pieces
from kvheap.files.tier_stats import FileTierStats
from kvheap.guards import read_meanwhile
from kvheap.prefix.keys import shown_keys
from kvheap.prefix.orders import EvictionOrder

__all__ = ["ChunkFile", "Moved", "Share"]

LOGGER = logging.getLogger("kvheap")

DAMAGE = frozenset({EIO, ENODATA, EBADMSG, EUCLEAN, EILSEQ})
"""Errors of a read that say that the bytes are lost."""

Share = Callable[[Callable[[Int64Array], None], Sequence[Int64Array]], None]
"""Does a task for all pieces, which may be done at the same time, and returns when all are done."""


class Moved(NamedTuple):
    """What became of the chunks of one call.

    Attributes:
        succeeded: for each key, whether its chunk is in the tier (store) or in its block (load).
        damaged: keys of chunks that were found damaged, and were removed.
        failed: keys of chunks that could not be moved.
        error: the first error that was met.
    """

    succeeded: npt.NDArray[np.bool_]
    damaged: list[bytes]
    failed: list[bytes]
    error: BaseException | None


@dataclass(slots=True)
class _Counts:
    restored_chunks: int = 0
    dropped_chunks: int = 0
    stored_chunks: int = 0
    refused_chunks: int = 0
    failed_chunks: int = 0
    loaded_chunks: int = 0
    missed_chunks: int = 0
    damaged_chunks: int = 0
    evicted_chunks: int = 0
    removed_chunks: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    direct_bytes: int = 0


class ChunkFile:
    """The chunks of one folder.

    Args:
        folder: where, locked.
        num_places: how many chunks there can be.
        chunk_bytes: bytes of each.
        place_bytes: bytes of the place of each, a multiple of ``PLACE_ALIGN_BYTES``.
        order: which chunks leave first, a new object.
        direct: use ``O_DIRECT`` where it is possible.
        is_durable: whether stored chunks outlive a loss of power.

    Raises:
        ImportError: lmdb or xxhash is not installed.
        OSError: the files cannot be opened.
    """

    def __init__(
        self,
        folder: TierFolder,
        num_places: int,
        chunk_bytes: int,
        place_bytes: int,
        order: EvictionOrder[bytes],
        *,
        direct: bool,
        is_durable: bool,
    ) -> None:
        self._digest: Callable[..., int] = need_xxhash().xxh3_64_intdigest
        self._folder = folder
        self._chunk_bytes = chunk_bytes
        self._place_bytes = place_bytes
        self._is_durable = is_durable
        self._books = Books(num_places, place_bytes, order)
        self.is_ready = self._books.is_ready
        """Whether a key's chunk can be loaded. O(1); may be called on any thread."""
        self.start_over_after_fork()
        self._counts = _Counts()
        self._stale: dict[bytes, None] = {}  # keys that the index has or may have, wrongly
        # Of closing, the last one first. They do not refer to this object: if it is lost in an
        # exception of a signal handler, its files are closed before a garbage collection.
        self._stages: list[Callable[[ChunkFile], object]] = [ChunkFile._close_files]
        try:
            self._file = DataFile(folder.data_path, num_places * place_bytes, direct)
            self._index, entries, num_dropped = restored_index(
                folder.index_path, num_places, is_durable
            )
            self._restore(entries, num_dropped)
            if is_durable:  # an earlier owner may not have been
                self._file.sync()
                self._index.sync()
            folder.write_state(is_closed=False, is_durable=is_durable)
            self.stats = self._stats()
            """The latest snapshot."""
            self._stages += [ChunkFile._settle, ChunkFile._index_uses]
        except BaseException:
            self.close()
            raise

    def start_over_after_fork(self) -> None:
        """Replace the locks in a forked child, which only looks at the last snapshot."""
        self._index_lock = threading.Lock()  # for the index; taken first
        self._used: deque[Sequence[bytes]] = deque()  # not counted yet
        self._lock = threading.Lock()  # for the books, the counts and what is stale
        self._has_settled = threading.Condition(self._lock)
        """Chunks are no longer pending."""

    def _restore(self, entries: list[Entry], num_dropped: int) -> None:
        """Take over what an earlier owner has left in the index."""
        wrong = self._books.restore(entries)
        self._index.write(wrong)
        self._counts.restored_chunks = len(self._books)
        self._counts.dropped_chunks = num_dropped + len(wrong)

    # -- store and load ------------------------------------------------------------------------

    def store(self, keys: Sequence[bytes], blocks: HostBlocks, share: Share) -> Moved:
        """Write blocks under keys; those that are there already are not written again.

        If another call is storing some of them, this one begins once that has ended, well or not.

        Args:
            keys: each once, the head of the prefix first.
            blocks: as many as there are keys.
            share: does the work.
        """
        with self._lock:
            # The others have begun, so they wait for none that waits here.
            while self._books.are_pending(keys):
                self._has_settled.wait()
            self._count_uses()  # what was used before is not evicted for these
            plan = self._books.begin_store(keys)
            self._stale.update(dict.fromkeys(plan.evicted))
            self._counts.evicted_chunks += len(plan.evicted)
            self._counts.refused_chunks += plan.refused
            self._publish()
        chunks = plan.chunks
        is_written = np.zeros(len(chunks), np.bool_)
        errors: list[BaseException] = []
        indexed: list[Chunk] = []
        num_bytes = 0
        try:
            if chunks:
                self._commit()  # before any place is written
                is_written, num_bytes = self._write(keys, chunks, blocks, share, errors)
                if self._is_durable:
                    self._file.sync()
                indexed = [chunks[at] for at in np.flatnonzero(is_written).tolist()]
                self._commit(indexed)
        except Exception as error:
            errors.insert(0, error)
            indexed = []
        finally:
            is_indexed = set(indexed)
            failed = [chunk for chunk in chunks if chunk not in is_indexed]
            with self._lock:
                # The key of one that was removed is stale already, or another chunk's by now.
                self._stale.update(dict.fromkeys(each.key for each in failed if not each.is_gone))
                self._books.end_store(indexed, is_stored=True)
                self._books.end_store(failed, is_stored=False)
                self._counts.stored_chunks += len(indexed)
                self._counts.failed_chunks += len(failed)
                self._counts.written_bytes += int(is_written.sum()) * self._place_bytes
                self._counts.direct_bytes += num_bytes
                self._publish()
                self._has_settled.notify_all()
        find = self._books.find
        succeeded = np.fromiter([find(key) is not None for key in keys], np.bool_, len(keys))
        first = errors[0] if errors else None
        return Moved(succeeded, [], [chunk.key for chunk in failed], first)

    def _write(
        self,
        keys: Sequence[bytes],
        chunks: list[Chunk],
        blocks: HostBlocks,
        share: Share,
        errors: list[BaseException],
    ) -> tuple[npt.NDArray[np.bool_], int]:
        """Write chunks; returns which ones, and how many bytes went past the page cache."""
        rows = _rows_of(keys, chunks)
        addresses = _addresses_of(chunks)
        is_written = np.zeros(len(chunks), np.bool_)
        is_aligned = self._is_aligned(blocks)
        direct: list[int] = []

        def write(piece: Int64Array) -> None:
            try:
                for at in piece.tolist():
                    chunks[at].digest = self._digest_of(chunks[at].key, blocks.block(rows[at]))
                address = chunks[piece[0]].address
                if self._file.write(blocks.buffers(rows[piece]), address, is_aligned):
                    direct.append(len(piece))
                is_written[piece] = True
            except Exception as error:
                error.__traceback__ = None  # its frames would keep the blocks
                errors.append(error)

        share(write, cut_into_pieces(addresses, self._place_bytes, blocks.max_buffers_per_block))
        return is_written, sum(direct) * self._place_bytes

    def load(self, keys: Sequence[bytes], blocks: HostBlocks, share: Share) -> Moved:
        """Read the chunks of keys into blocks; this is a use of them by one request.

        A chunk whose bytes do not fit its checksum, or are lost, is removed.

        Args:
            keys: the head of the prefix first.
            blocks: as many as there are keys.
            share: does the work.
        """
        with self._lock:
            self._count_uses()
            found = self._books.begin_load(keys)
            self._publish()
        rows = np.array([row for row, chunk in enumerate(found) if chunk is not None], np.int64)
        chunks = [chunk for chunk in found if chunk is not None]
        succeeded = np.zeros(len(keys), np.bool_)
        damaged: dict[Chunk, None] = {}
        errors: list[BaseException] = []
        num_bytes = 0
        try:
            if chunks:
                is_right, num_bytes = self._read(chunks, rows, blocks, share, damaged, errors)
                succeeded[rows] = is_right
        except Exception as error:
            errors.append(error)
        finally:
            failed = [
                chunk.key
                for chunk, row in zip(chunks, rows.tolist(), strict=True)
                if not succeeded[row] and chunk not in damaged
            ]
            with self._lock:
                gone = self._books.forget(damaged)
                self._stale.update(dict.fromkeys(gone))
                self._books.end_load(found)
                self._counts.loaded_chunks += int(succeeded.sum())
                self._counts.missed_chunks += len(keys) - len(chunks)
                self._counts.damaged_chunks += len(gone)
                self._counts.failed_chunks += len(failed)
                self._counts.read_bytes += int(succeeded.sum()) * self._place_bytes
                self._counts.direct_bytes += num_bytes
                self._publish()
        lost = [chunk.key for chunk in damaged]
        if lost:
            LOGGER.warning(
                "%d chunks in %s were damaged, and are removed: %s",
                len(lost),
                self._folder.path,
                shown_keys(lost),
            )
            self._try_commit()
        return Moved(succeeded, lost, failed, errors[0] if errors else None)

    def _read(
        self,
        chunks: list[Chunk],
        rows: Int64Array,
        blocks: HostBlocks,
        share: Share,
        damaged: dict[Chunk, None],
        errors: list[BaseException],
    ) -> tuple[npt.NDArray[np.bool_], int]:
        """Read chunks; returns which ones are right, and the bytes that went past the page cache.

        Args:
            chunks: the chunks.
            rows: the numbers of their blocks.
            blocks: where they go.
            share: does the work.
            damaged: gets the chunks whose bytes are wrong or lost.
            errors: gets other errors.
        """
        is_right = np.zeros(len(chunks), np.bool_)
        is_aligned = self._is_aligned(blocks)
        direct: list[int] = []

        def read(piece: Int64Array) -> None:
            try:
                address = chunks[piece[0]].address
                if self._file.read(blocks.buffers(rows[piece]), address, is_aligned):
                    direct.append(len(piece))
            except OSError as error:
                error.__traceback__ = None
                if len(piece) > 1:  # which one of them?
                    for at in range(len(piece)):
                        read(piece[at : at + 1])
                elif error.errno in DAMAGE:
                    damaged[chunks[piece[0]]] = None
                else:
                    errors.append(error)
                return
            for at in piece.tolist():
                chunk = chunks[at]
                if self._digest_of(chunk.key, blocks.block(rows[at])) == chunk.digest:
                    is_right[at] = True
                else:
                    damaged[chunk] = None

        def read_or_note(piece: Int64Array) -> None:
            try:
                read(piece)
            except Exception as error:
                error.__traceback__ = None
                errors.append(error)

        addresses = _addresses_of(chunks)
        pieces = cut_into_pieces(addresses, self._place_bytes, blocks.max_buffers_per_block)
        share(read_or_note, pieces)
        return is_right, sum(direct) * self._place_bytes

    def _digest_of(self, key: bytes, block: memoryview) -> int:
        # With the key as the seed, another key's chunk is wrong even if it is whole.
        return self._digest(block, self._digest(key))

    def _is_aligned(self, blocks: HostBlocks) -> bool:
        align = self._file.direct_align
        return align is not None and blocks.are_aligned(align)

    # -- the rest ------------------------------------------------------------------------------

    def note_use(self, keys: Sequence[bytes]) -> None:
        """Note that one request used chunks, the head of its prefix first. Takes no lock.

        It counts from the next store, load or :meth:`count_uses` on.
        """
        self._used.append(keys)

    def count_uses(self) -> None:
        """Count the uses that were noted."""
        with self._lock:
            self._count_uses()

    def _count_uses(self) -> None:
        while self._used:
            self._books.touch([*dict.fromkeys(self._used.popleft())])

    def remove(self, keys: Sequence[bytes]) -> list[bytes]:
        """Remove chunks, also those that are being stored or loaded.

        Returns:
            The keys that were ready or pending.
        """
        with self._lock:
            find = self._books.find
            chunks = [chunk for key in keys if (chunk := find(key)) is not None]
            gone = self._books.forget(chunks)
            self._stale.update(dict.fromkeys(gone))
            self._counts.removed_chunks += len(gone)
            self._publish()
            self._has_settled.notify_all()
        if gone:
            self._commit()
        return gone

    def ready_keys(self) -> list[bytes]:
        """The keys of all chunks that can be loaded. O(n); may be called on any thread."""
        return [chunk.key for chunk in read_meanwhile(self._books.ready)]

    def _commit(self, stored: Sequence[Chunk] = ()) -> None:
        """Bring the index up to date: without what is stale, and with these chunks."""
        with self._index_lock:
            with self._lock:
                stale = [*self._stale]
                self._stale.clear()
                entries = [chunk.entry for chunk in stored if not chunk.is_gone]
            if not stale and not entries:
                return
            try:
                self._index.write(stale, entries)
            except BaseException:
                with self._lock:
                    self._stale.update(dict.fromkeys(stale))
                raise

    def _try_commit(self) -> None:
        """:meth:`_commit`, which the next store does if it fails now."""
        try:
            self._commit()
        except Exception as error:
            LOGGER.warning("the index of %s cannot be written: %s", self._folder.path, error)

    def check(self) -> None:
        """Check the books, and the index against them. O(n log n).

        Raises:
            HeapCorruptionError: something does not hold; the message names it.
        """
        with self._index_lock, self._lock:
            self._books.check()
            indexed: dict[bytes, tuple[int, int]] = {}
            for entry in self._index.entries():
                if not isinstance(entry, Entry):
                    raise HeapCorruptionError(f"the index has no entry for {entry!r}, but a value")
                indexed[entry.key] = (entry.address, entry.digest)
            for chunk in self._books.ready():
                found = indexed.pop(chunk.key, None)
                if found != (chunk.address, chunk.digest):
                    raise HeapCorruptionError(f"the index has {found} for the ready {chunk}")
            for key in indexed:
                chunk_of = self._books.find(key)
                if key not in self._stale and chunk_of is None:
                    raise HeapCorruptionError(f"the index has {key!r}, which is not in the books")

    def close(self) -> None:
        """Synchronize and close everything; goes on where an earlier call was interrupted."""
        while self._stages:
            self._stages[-1](self)
            self._stages.pop()

    def _close_files(self) -> None:
        for name in ("_index", "_file"):  # the opening may have been interrupted before
            if (file := getattr(self, name, None)) is not None:
                file.close()

    def _index_uses(self) -> None:
        """Note in the index when chunks were last used, for the next owner's order."""
        used = [chunk for chunk in self._books.ready() if chunk.used != chunk.indexed_used]
        try:
            self._commit(used)
        except Exception as error:
            LOGGER.warning("the index of %s cannot be written: %s", self._folder.path, error)

    def _settle(self) -> None:
        """Synchronize everything, and note that the tier is closed."""
        try:
            self._file.sync()
            self._index.sync()
            self._folder.write_state(is_closed=True, is_durable=self._is_durable)
        except Exception as error:  # the next owner takes it for killed
            LOGGER.warning("%s could not be synchronized: %s", self._folder.path, error)

    def _publish(self) -> None:
        """Take a new snapshot. Call with the lock held."""
        self.stats = self._stats()

    def _stats(self) -> FileTierStats:
        books, counts = self._books, self._counts
        ready = len(books) - books.pending
        return FileTierStats(
            file_bytes=books.file_bytes,
            free_bytes=books.free_places * self._place_bytes,
            chunk_bytes=self._chunk_bytes,
            place_bytes=self._place_bytes,
            ready_chunks=ready,
            pending_chunks=books.pending,
            loading_chunks=ready - books.idle,
            is_direct=self._file.direct_align is not None,
            is_durable=self._is_durable,
            **{name: getattr(counts, name) for name in COUNTED},
        )


COUNTED: tuple[Any, ...] = tuple(field.name for field in fields(_Counts))


def _addresses_of(chunks: Sequence[Chunk]) -> Int64Array:
    return np.fromiter([chunk.address for chunk in chunks], np.int64, len(chunks))


def _rows_of(keys: Sequence[bytes], chunks: Sequence[Chunk]) -> Int64Array:
    """The numbers of the blocks of chunks."""
    if len(chunks) == len(keys):
        return np.arange(len(keys), dtype=np.int64)
    row_of = {key: row for row, key in enumerate(keys)}
    return np.fromiter([row_of[chunk.key] for chunk in chunks], np.int64, len(chunks))
