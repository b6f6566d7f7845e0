"""``FileTier``: chunks of a host heap in a file, which outlive the process.

>>> import tempfile, torch
>>> from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat
>>> from kvheap.files import FileTier
>>> heap = HostMemoryAllocator(1 << 20)
>>> layout = BlockLayout.of([2, 4, 16, 8], torch.float16, MemoryFormat.KV_2LTD)
>>> kv = torch.randn(3, 2, 4, 16, 8).half()
>>> batch = heap.batched_allocate(layout.shapes[0], torch.float16, 3, layout.fmt, source=kv)
>>> folder = tempfile.TemporaryDirectory()
>>> with FileTier(folder.name, 1 << 20, layout, namespace="a model") as tier:
...     tier.store([b"a", b"b", b"c"], batch).result()
>>> tier = FileTier(folder.name, 1 << 20, layout, namespace="a model")  # in a later process
>>> tier.lookup([b"c", b"x"]).tolist()
[True, False]
>>> loading = tier.load([b"c"], into=heap)
>>> loading.result(), torch.equal(loading.batch[0].tensor, kv[2])
(None, True)
>>> tier.close()
>>> folder.cleanup()
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.addresses.arguments import require_count, require_flags
from kvheap.addresses.integers import round_up
from kvheap.blocks.block_layout import BlockLayout, as_block_layout
from kvheap.blocks.heap import BlockObjects, Heap, heap_of, layout_and_addresses
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.rows import Rows
from kvheap.closing import Closer, never_opened
from kvheap.device.completion import Completion, in_flight
from kvheap.device.host_queue import NestedWaitError
from kvheap.device.transfer import Transfer
from kvheap.files.chunk_file import ChunkFile, Moved
from kvheap.files.chunk_index import MAX_KEY_BYTES
from kvheap.files.data_file import PLACE_ALIGN_BYTES
from kvheap.files.folder import TierFolder
from kvheap.files.host_blocks import HostBlocks
from kvheap.files.io_threads import IOThreads, Kind
from kvheap.files.packages import need_lmdb, need_xxhash
from kvheap.files.tier_stats import FileTierStats
from kvheap.files.transfers import FileJob, FileTransfer
from kvheap.forks import starts_over_after_fork
from kvheap.kernels.chunk_shape import ChunkShape
from kvheap.prefix.keys import as_bytes_keys, require_distinct
from kvheap.prefix.orders import ORDERS
from kvheap.renamed import renamed

__all__ = ["FileTier"]

ADDRESS_BITS = 63

MAX_THREADS = 256
"""For loads, and as many for stores."""

EXIT_S = 60.0
"""Seconds that the end of a program waits for the jobs of a tier that was not closed."""


class FileTier:
    """Chunks of one layout in one folder, by their keys.

    Stores and loads are asynchronous: they return at once, and their blocks are protected until the
    bytes are moved. Blocks must be in host memory, in any heap but ``AdHocMemoryAllocator``. Those
    of a ``HostMemoryAllocator`` or ``PinMemoryAllocator`` are aligned, and are moved past the page
    cache.

    =============  ==================================================================
    purpose        methods
    =============  ==================================================================
    look           ``lookup``, ``keys``, ``stats``, ``check``
    move           ``store``, ``load``, ``touch``
    drop           ``remove``, ``close``
    =============  ==================================================================

    All methods may be called by any thread. Finalizers and signal handlers may call them too;
    ``remove``, ``check`` and ``close`` raise ``NestedWaitError`` in a finalizer that happens to run
    on a thread of the tier. A forked child cannot use the tier.

    What survives: after ``close``, everything; after ``kill -9``, every chunk whose store had
    ended; after a loss of power or a crash of the system, with ``durable=True`` the same, else
    nothing. A chunk whose bytes were damaged since is found by its checksum when it is loaded.

    Args:
        path: a folder of the tier's own on a local file system; made if it is missing.
        size: bytes for chunks, rounded down to whole places: chunks rounded up to 4096 bytes. The
            file is sparse until it is filled. May differ from that of an earlier process: chunks
            beyond the end of a smaller file are dropped.
        layout: what a chunk holds: a ``BlockLayout``, or ``cache.chunk_layout(...)``.
        namespace: whose KV it is: name the model, its weights, and the rank in a group of workers.
            A folder with chunks of another namespace or layout is refused.
        policy: which chunks leave a full tier first: ``lru``, ``arc``, ``s3fifo`` or ``adaptive``.
        threads: threads for loads, and as many for stores; at most 256.
        direct: move aligned blocks past the page cache (``O_DIRECT``) if the file system can do
            that; ``stats().is_direct`` tells.
        durable: synchronize bytes and index before a store ends, which takes milliseconds.

    Raises:
        ImportError: lmdb or xxhash is not installed.
        TierInUseError: another tier, here or in another process, has the folder.
        TierMismatchError: the folder has chunks of another namespace or layout. A ``ValueError``.
        ValueError, TypeError: an argument is wrong; the message names it.
        OSError: the folder cannot be used.
    """

    @renamed(order="policy")
    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        layout: BlockLayout | ChunkShape,
        *,
        namespace: str,
        policy: str = "lru",
        threads: int = 4,
        direct: bool = True,
        durable: bool = False,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
            raise TypeError(f"path must be the path of a folder, got {path!r}")
        if not os.fspath(path) or "\0" in os.fspath(path):
            raise ValueError(f"path must be the path of a folder, got {path!r}")
        layout = as_block_layout("layout", layout)
        size = require_count("size", size)
        if size >= 1 << ADDRESS_BITS:
            raise ValueError(f"size must be less than 2**{ADDRESS_BITS}, got {size}")
        threads = require_count("threads", threads, at_least=1)
        if threads > MAX_THREADS:
            raise ValueError(f"threads must be at most {MAX_THREADS}, got {threads}")
        require_flags(direct=direct, durable=durable)
        if not isinstance(namespace, str):
            raise TypeError(f"namespace must be a text, got {namespace!r}")
        if not namespace:
            raise ValueError("namespace must name the model, its weights and the rank, got ''")
        if not isinstance(policy, str) or policy not in ORDERS:
            raise ValueError(f"policy must be one of {', '.join(ORDERS)}, got {policy!r}")
        place_bytes = round_up(layout.size_bytes, PLACE_ALIGN_BYTES)
        num_places = size // place_bytes
        if not num_places:
            raise ValueError(
                f"size must be at least {place_bytes}, the bytes of one chunk's place, got {size}"
            )
        need_lmdb()
        need_xxhash()
        self.layout = layout
        """What a chunk holds."""
        self._place_bytes = place_bytes
        identity = {
            "namespace": namespace,
            "layout": str(layout),
            "chunk_bytes": layout.size_bytes,
            "place_bytes": place_bytes,
        }
        self._threads = IOThreads(threads)
        self._folder = TierFolder(path, identity)
        try:
            self._file = ChunkFile(
                self._folder,
                num_places,
                layout.size_bytes,
                place_bytes,
                ORDERS[policy](num_places * place_bytes),
                direct=direct,
                is_durable=durable,
            )
            self._threads.start()
            self._closer = Closer(
                self,
                exit_s=EXIT_S,
                in_child="a forked child cannot use it, and may open the folder once that process "
                "has closed it",
            )
            starts_over_after_fork(self)
        except BaseException:  # also of a signal handler, at any moment
            never_opened(self)
            self._threads.abandon()
            self._end()
            raise

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closer.is_closing

    # -- look ----------------------------------------------------------------------------------

    def lookup(self, keys: Iterable[bytes]) -> npt.NDArray[np.bool_]:
        """Which chunks can be loaded now; this is not a use of them. O(N).

        Returns:
            bool ``[N]``.

        Raises:
            TypeError, ValueError: a key is wrong; the message names it.
            ClosedError: the tier is closed, or another process's.
        """
        self._closer.require_open()
        found = _as_keys(keys)
        return np.fromiter(map(self._file.is_ready, found), np.bool_, len(found))

    def keys(self) -> list[bytes]:
        """The keys of all chunks that can be loaded. O(n).

        Raises:
            ClosedError: the tier is closed, or another process's.
        """
        self._closer.require_open()
        return self._file.ready_keys()

    def stats(self) -> FileTierStats:
        """Bytes and counts. O(1); also of a tier that is closed."""
        return self._file.stats

    def check(self) -> None:
        """Check the books against the free list and the index. O(n log n); reads no chunk.

        Raises:
            HeapCorruptionError: something does not hold; the message names it.
            ClosedError: the tier is closed, or another process's.
        """
        self._ask(self._file.check)

    # -- move ----------------------------------------------------------------------------------

    def store(self, keys: Sequence[bytes], batch: BlockObjects) -> FileTransfer:
        """Write blocks under keys; returns at once.

        Chunks that are in the tier already are not written again. A full tier evicts chunks that
        nobody moves; if that does not suffice, the first keys are stored.

        Args:
            keys: bytes, 1 to 511 each, no two equal, the head of the prefix first.
            batch: a batch, or objects of one heap, of the tier's layout; as many as there are keys.
                Blocks that a transfer still fills are written once that has ended. Do not change
                blocks until their store has ended.

        Returns:
            The transfer. Its end means that the chunks can be loaded.

        Raises:
            TypeError, ValueError: a key is wrong or named twice, or the blocks have another layout
                or number, or are not in host memory; nothing is stored.
            LifetimeError: a block is freed; nothing is stored.
            TransferError: the transfer that was to fill a block has failed; nothing is stored.
            ClosedError: the tier or the heap is closed, or the tier is another process's.
        """
        self._closer.require_open()
        names = _as_keys(keys, is_list=True)
        require_distinct(names)
        rows = self._rows_of("batch", batch, len(names))
        filling = _filling(rows)
        for transfer in filling:
            transfer.require_success()
        waits = [transfer.result for transfer in filling if not transfer.done()]
        return self._begin("store", names, batch, rows, waits)

    def load(self, keys: Sequence[bytes], into: Heap | BlockObjects) -> FileTransfer | None:
        """Read chunks into blocks; returns at once. This is a use of them by one request.

        Args:
            keys: bytes, the head of the prefix first. A key may be named twice.
            into: a heap in host memory, which allocates a batch for all keys; or blocks of the
                tier's layout, as many as there are keys, which are filled once the transfers that
                use them have ended. The result's ``batch`` is that batch, and its ``transfer`` is
                set, so that copies and handles wait for the bytes. Wait for it yourself before you
                read or copy blocks that were given as single objects.

        Returns:
            The transfer; None if ``into`` is a heap without room. Chunks that are missing or
            damaged are found by its ``result()`` or ``succeeded()``.

        Raises:
            TypeError, ValueError, LifetimeError, ClosedError: as :meth:`store`, or a block is named
                twice; nothing is loaded.
            ForeignObjectError: the blocks are another process's, and a view for reading here.
        """
        self._closer.require_open()
        names = _as_keys(keys, is_list=True)
        if not isinstance(into, Heap) and callable(getattr(into, "batched_allocate", None)):
            raise TypeError(f"into must be a heap in host memory or its blocks, got {into!r}")
        if not isinstance(into, Heap):
            return self._load(names, into)
        _require_host(into, "into")
        layout = self.layout
        batch = into.batched_allocate(
            list(layout.shapes), list(layout.dtypes), len(names), layout.fmt
        )
        if batch is None:
            return None
        try:
            return self._load(names, batch)
        except BaseException:
            into.batched_free(batch)
            raise

    def _load(self, names: list[bytes], into: BlockObjects) -> FileTransfer:
        rows = self._rows_of("into", into, len(names))
        for part in rows:
            part.batch.require_writable()
            if part.rows is not None and len(np.unique(part.rows)) < len(part.rows):
                raise ValueError("into must not name a block twice")
        for part in rows:
            part.batch.stored_tokens.forget(part.rows)
        return self._begin("load", names, into, rows, [])

    def _rows_of(self, name: str, blocks: BlockObjects, num_keys: int) -> list[Rows]:
        """The blocks of a call by batch; raises if they are not what the tier moves."""
        if not isinstance(blocks, Sequence):
            raise TypeError(
                f"{name} must be a MemoryBatch or a list of its objects, got {blocks!r}"
            )
        if len(blocks) != num_keys:
            raise ValueError(f"{num_keys} keys need as many blocks, got {len(blocks)} in {name}")
        if not num_keys:
            return []
        heap = heap_of(blocks)
        _require_host(heap, name)
        layout, _ = layout_and_addresses(blocks)
        if layout != self.layout:
            raise ValueError(f"the blocks of {name} must be {self.layout}, got {layout}")
        heap.require_open()
        return heap.rows_by_batch(blocks)

    def _begin(
        self,
        kind: Kind,
        names: list[bytes],
        blocks: BlockObjects,
        rows: list[Rows],
        before: Sequence[Any],
    ) -> FileTransfer:
        """Protect blocks, and let a thread move them once other transfers have done with them."""
        if kind == "load":
            before = [*before, *[user.wait for part in rows for user in part.users()]]
        else:  # others may read them at the same time
            before = [*before, *[user.arrive for part in rows for user in part.fillers()]]
        memory, host_blocks = self._host_blocks(blocks, rows)
        completion = Completion(memory)
        work = self._file.store if kind == "store" else self._file.load
        task: partial[Moved] = partial(work, names, host_blocks, self._threads.share)
        job = FileJob(before, task, completion, self._threads)
        transfer = Transfer(
            completion,
            path="file",
            direction="h2f" if kind == "store" else "f2h",
            num_bytes=len(names) * self.layout.size_bytes,
            num_runs=len(names),
            device=None,
        )
        transfer.begun((job.event,))
        batch = blocks if isinstance(blocks, MemoryBatch) else None
        filled = batch if kind == "load" else None
        earlier = None if filled is None else filled.transfer
        try:
            for part in rows:
                if kind == "load":
                    part.record_filling(completion)
                else:
                    part.record_reading(completion)
            in_flight.add(completion)
            completion.queued(job.event)
            if filled is not None:
                filled.transfer = transfer
            self._threads.submit(kind, job.run)
            if self._closer.is_closing and job.withdraw():
                raise self._closer.closed_error()
        except BaseException:
            if job.withdraw() and filled is not None:
                filled.transfer = earlier
            completion.nothing_queued()
            raise
        return FileTransfer(names, transfer, job, batch)

    def _host_blocks(
        self, blocks: BlockObjects, rows: list[Rows]
    ) -> tuple[tuple[Any, ...], HostBlocks]:
        """The buffers of blocks, and the blocks as buffers for calls."""
        size_bytes, place_bytes = self.layout.size_bytes, self._place_bytes
        if not rows:
            return (), HostBlocks((), np.empty(0, np.int64), size_bytes, size_bytes, place_bytes)
        segments = heap_of(blocks).segments
        _, addresses = layout_and_addresses(blocks)
        allocated = min(part.batch.allocated_bytes for part in rows)
        memory = tuple(buffer for _, buffer in segments)
        return memory, HostBlocks(segments, addresses, size_bytes, allocated, place_bytes)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that one request used chunks, the head of its prefix first; returns at once.

        Keys that are not there are skipped. A load is such a use too.

        Raises:
            TypeError, ValueError: a key is wrong; the message names it.
            ClosedError: the tier is closed, or another process's.
        """
        self._closer.require_open()
        self._file.note_use(_as_keys(keys))
        self._threads.submit("short", self._file.count_uses)

    # -- drop ----------------------------------------------------------------------------------

    def remove(self, keys: Iterable[bytes]) -> list[bytes]:
        """Remove chunks; when this returns, they are not found any more, here or after a restart.

        The place of one that is being stored or loaded becomes free when that has ended.

        Args:
            keys: those that are not there are skipped.

        Returns:
            The keys that were there.

        Raises:
            TypeError, ValueError: a key is wrong; the message names it.
            ClosedError: the tier is closed, or another process's.
            lmdb.Error: the index cannot be written; an earlier state may come back after a restart.
        """
        removed: list[bytes] = self._ask(partial(self._file.remove, _as_keys(keys)))
        return removed

    def close(self, timeout_s: float | None = None) -> None:
        """End all stores and loads, synchronize the files, and let others open them.

        May be repeated. In a forked child nothing happens.

        Args:
            timeout_s: the most seconds to wait; None: no limit.

        Raises:
            TimeoutError: not all has ended in time; it goes on, and a later call can wait for it.
            NestedWaitError: in a finalizer on a thread of the tier. A ``RuntimeError``.
        """
        self._closer.close(timeout_s, wait=self._wait_for_end, release=_nothing)

    def _wait_for_end(self, timeout_s: float | None) -> None:
        """Let the threads end, the last of which closes the files."""
        threads = self._threads
        if threads.have_ended.is_open:
            return
        threads.stop(self._end)
        if threads.is_here():
            raise NestedWaitError(
                "a thread of a FileTier cannot wait for its end: the tier closes without this "
                "finalizer"
            )
        if not threads.have_ended.wait(timeout_s):
            stats = self._file.stats
            raise TimeoutError(
                f"{self!r} has not ended in {timeout_s:g} s ({stats.pending_chunks} chunks are "
                f"being stored, {stats.loading_chunks} loaded): close it again later"
            )

    def _end(self) -> None:
        """Close the files; on the last of the threads, if they have run."""
        file = getattr(self, "_file", None)  # there may be none yet
        try:
            if file is not None:
                file.close()
        finally:
            self._folder.unlock()

    # -- the rest ------------------------------------------------------------------------------

    def _ask(self, question: Any) -> Any:
        """What a short call on a thread of the tier returns or raises."""
        self._closer.require_open()
        if self._threads.is_here():
            raise NestedWaitError("a finalizer on a thread of a FileTier cannot wait for that tier")
        return self._threads.ask(question, self._closer.closed_error)

    def start_over_after_fork(self) -> None:
        """Give the tier up in a forked child: its threads and its index are the parent's."""
        self._file.start_over_after_fork()
        self._folder.unlock()

    def __enter__(self) -> FileTier:
        self._closer.require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """The folder."""
        return f"FileTier({str(self._folder.path)!r}, {self.layout})"


def _as_keys(keys: Any, is_list: bool = False) -> list[bytes]:
    return as_bytes_keys(keys, MAX_KEY_BYTES, "FileTier", is_list=is_list)


def _filling(rows: list[Rows]) -> list[Transfer]:
    """The transfers that fill batches as a whole."""
    transfers = [part.batch.transfer for part in rows]
    return [transfer for transfer in transfers if transfer is not None]


def _require_host(heap: Heap, name: str) -> None:
    if heap.device.type != "cpu":
        raise ValueError(
            f"{name} must be in host memory, got a heap on {heap.device}: move its blocks by "
            f"kvheap.offload to a pinned host heap, and back by kvheap.restore"
        )


def _nothing() -> None:
    """The last of the threads has closed everything."""
