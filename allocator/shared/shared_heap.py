"""``SharedHeap``: chunks that all processes of a host share, and that outlive them.

>>> import os, torch
>>> from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat, SharedHeap
>>> layout = BlockLayout.of([2, 4, 16, 8], torch.float16, MemoryFormat.KV_2LTD)
>>> kv = torch.randn(3, 2, 4, 16, 8).half()
>>> name = f"kvheap-{os.getpid()}"  # in /dev/shm
>>> with SharedHeap(name, 1 << 20, layout, namespace="a model") as heap:
...     heap.store([b"a", b"b", b"c"], kv).tolist()
[True, True, True]
>>> heap = SharedHeap(name, 1 << 20, layout, namespace="a model", unlink=True)  # a later process
>>> replica = SharedHeap.attach(name, layout, namespace="a model")  # another one
>>> replica.lookup([b"c", b"x"]).tolist()
[True, False]
>>> with replica.hold([b"a", b"c"]) as hold:  # not evicted before the block ends
...     torch.equal(hold.batch[1].tensor, kv[2])
True
>>> replica.store([b"d"], kv[:1]).tolist(), len(heap.keys())
([True], 4)
>>> replica.close(), heap.close()
(None, None)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvheap.addresses.arguments import as_number, require_count, require_flags
from kvheap.addresses.integers import round_up
from kvheap.blocks.block_layout import BlockLayout, as_block_layout
from kvheap.blocks.heap import BlockObjects, Heap
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.closing import Closer, never_opened
from kvheap.files.errors import MissingChunksError
from kvheap.forks import starts_over_after_fork
from kvheap.heaps.host_allocators import HostMemoryAllocator
from kvheap.kernels.chunk_shape import ChunkShape
from kvheap.memory.file_locks import RangeLocks
from kvheap.prefix.keys import as_bytes_keys, require_distinct
from kvheap.prefix.orders import ORDERS
from kvheap.shared.channels import Channel, RemoteChannel
from kvheap.shared.chunk_table import MAX_KEY_BYTES, ChunkTable
from kvheap.shared.geometry import PAGE_BYTES
from kvheap.shared.holds import SharedHold
from kvheap.shared.leases import Leases
from kvheap.shared.ownership import Ownership
from kvheap.shared.places import Places
from kvheap.shared.reading import Reading
from kvheap.shared.segment import Segment, as_target
from kvheap.shared.stats import SharedHeapStats
from kvheap.shared.stores import SharedStore, as_tokens
from kvheap.shared.storing import Storing

if TYPE_CHECKING:
    from typing import Self

__all__ = ["SharedHeap"]

MAX_PLACES = (1 << 32) - 2

LEASE_S = 60.0

EXIT_S = 10.0
"""Seconds that the end of a program waits for a heap that was not closed."""


class SharedHeap:
    """Chunks of one layout in one file of memory, by their keys.

    The file is on a tmpfs or hugetlbfs, or a memfd that is passed on. One process owns it, and
    keeps the books: the one that has made a ``SharedHeap(...)``. Others :meth:`attach`. All of them
    look chunks up, hold them, read them where they are, and store chunks; the owner's part of that
    is done by a thread of the owner's.

    =============  ==================================================================
    purpose        methods
    =============  ==================================================================
    look           ``lookup``, ``prefix_length``, ``keys``, ``stats``, ``check``
    read           ``hold``, ``load``, ``touch``
    store          ``store``; for copies of your own ``begin``
    drop           ``remove``, ``close``
    =============  ==================================================================

    What a reader may rely on: the bytes of chunks that it holds are theirs until it releases them,
    unless it holds them for longer than ``lease_s``: chunks that somebody removes, or that are all
    that a full heap can evict, are reused then. ``hold.check()``, the end of ``with hold`` and
    ``load`` raise ``LeaseLostError`` if that has happened, so that nobody uses what was read. It
    needs no answer of the owner, and goes on while the owner is stopped, or dead. A process that
    dies holds nothing.

    What survives: when the owner is killed, at any moment, the next one finds every chunk whose
    store had ended, and no other. Bytes that something else has damaged are found by their
    checksum: by ``hold`` once for each process, and by every ``load``. A restart of the machine
    empties the heap.

    All methods may be called by any thread. In finalizers and signal handlers, ``release`` and
    ``abort`` never wait; other methods may raise ``NestedWaitError`` there. A forked child cannot
    use the heap: it attaches anew.

    Nothing is left in the file system but the file, which stays until somebody removes it: its
    owner by ``unlink=True``, or you.

    Args:
        path: the path of the file, a name for one in ``/dev/shm``, or the descriptor of a file,
            such as a memfd, which stays open. The file is made if there is none.
        size: bytes for chunks, rounded down to whole places: chunks rounded up to 4096 bytes. An
            index of 152 bytes for each, and at most 20 KiB, are added. All memory is taken at once.
        layout: what a chunk holds; ``cache.chunk_layout(n)`` for chunks of an engine's cache.
        namespace: whose KV it is: name the model, its weights, and the rank in a group of workers.
        policy: which chunks leave a full heap first: ``lru``, ``arc``, ``s3fifo`` or ``adaptive``.
        lease_s: how long the owner waits for who holds a chunk that is to be reused. It is the same
            for all processes, and part of the file.
        unlink: remove the file's name when this owner closes the heap.

    Raises:
        ImportError: xxhash is not installed.
        SegmentInUseError: another heap, here or in another process, owns the file.
        SegmentMismatchError: it is one of another namespace, layout, size or version. A
            ``ValueError``.
        SegmentDamagedError: it is no segment, or was cut off. A ``ValueError``.
        ValueError, TypeError: an argument is wrong; the message names it.
        OSError: the file cannot be made, as where there is no room for it.
    """

    def __init__(
        self,
        path: int | str | os.PathLike[str],
        size: int,
        layout: BlockLayout | ChunkShape,
        *,
        namespace: str,
        policy: str = "lru",
        lease_s: float = LEASE_S,
        unlink: bool = False,
    ) -> None:
        target = as_target(path)
        layout = as_block_layout("layout", layout)
        identity = _identity(layout, namespace)
        identity["lease_s"] = as_number("lease_s", lease_s, positive=True)
        require_flags(unlink=unlink)
        if not isinstance(policy, str) or policy not in ORDERS:
            raise ValueError(f"policy must be one of {', '.join(ORDERS)}, got {policy!r}")
        place_bytes = round_up(layout.size_bytes, PAGE_BYTES)
        num_places = require_count("size", size) // place_bytes
        if not 0 < num_places <= MAX_PLACES:
            raise ValueError(
                f"size must be {place_bytes}, the bytes of one chunk's place, to "
                f"{MAX_PLACES * place_bytes}, got {size}"
            )
        new_order = ORDERS[policy](num_places * place_bytes)
        segment = Segment.own(target, identity, num_places, layout.size_bytes, place_bytes)
        owner = None
        try:
            table, places = ChunkTable(segment), Places(segment, layout)
            leases = _leases_of(segment)
            lease_s = float(segment.identity["lease_s"])
            owner = Ownership(segment, table, places.content, new_order, lease_s)
            owner.start()
            self._open(segment, table, places, leases, owner, owner.channel)
            self._unlink = unlink
        except BaseException:  # also of a signal handler, at any moment
            never_opened(self)
            if owner is not None:
                owner.abandon()
            segment.leave()
            raise

    @classmethod
    def attach(
        cls,
        path: int | str | os.PathLike[str],
        layout: BlockLayout | ChunkShape,
        *,
        namespace: str,
        timeout_s: float = 10.0,
    ) -> Self:
        """Read chunks of a heap that another process owns, and have chunks stored in it.

        Args:
            path: as for the class.
            layout: as for the class.
            namespace: as for the class.
            timeout_s: how long to wait for the owner's answers.

        Raises:
            FileNotFoundError: there is no such file.
            ImportError, SegmentMismatchError, SegmentDamagedError: as for the class.
            ValueError, TypeError, OSError: as for the class.
        """
        target = as_target(path)
        layout = as_block_layout("layout", layout)
        identity = _identity(layout, namespace)
        timeout_s = as_number("timeout_s", timeout_s, positive=True)
        segment = Segment.attach(target, identity)
        heap = cls.__new__(cls)
        channel = RemoteChannel(segment.path, segment.state, timeout_s)
        table, places = ChunkTable(segment), Places(segment, layout)
        heap._open(segment, table, places, _leases_of(segment), None, channel)
        return heap

    def _open(
        self,
        segment: Segment,
        table: ChunkTable,
        places: Places,
        leases: Leases,
        owner: Ownership | None,
        channel: Channel,
    ) -> None:
        self.layout = places.layout
        """What a chunk holds."""
        self.path = segment.path
        """Of the file."""
        self.lease_s = float(segment.identity["lease_s"])
        """How long the owner waits for who holds a chunk that is to be reused."""
        self._segment = segment
        self._table = table
        self._places = places
        self._owner = owner
        self._channel = channel
        self._unlink = False
        self._leases = leases
        self._reading = Reading(table, leases, places, channel, self.lease_s)
        self._storing = Storing(segment, table, leases, places, channel)
        self._closer = Closer(
            self,
            exit_s=EXIT_S,
            in_child="a forked child cannot use it, and attaches by SharedHeap.attach instead",
            is_kept=owner is not None,
        )
        starts_over_after_fork(self)

    # -- look ----------------------------------------------------------------------------------

    @property
    def is_owner(self) -> bool:
        """Whether this process owns the heap."""
        return self._owner is not None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closer.is_closing

    @property
    def heap(self) -> HostMemoryAllocator:
        """The memory as a view-only heap, whose blocks the batches of holds and stores are."""
        self._require_open()
        return self._places.heap

    def lookup(self, keys: Iterable[bytes]) -> npt.NDArray[np.bool_]:
        """Which chunks can be held and loaded now; this is not a use of them. O(N).

        Returns:
            bool ``[N]``. Another process may evict or remove them before they are held.

        Raises:
            TypeError, ValueError: a key is wrong; the message names it.
            ClosedError: the heap is closed, or was opened by this process's parent.
        """
        self._require_open()
        names = _as_keys(keys)
        find = self._table.find
        return np.fromiter((find(key) >= 0 for key in names), np.bool_, len(names))

    def prefix_length(self, keys: Iterable[bytes]) -> int:
        """How many leading keys have a chunk: what a request need not compute. O(result).

        Raises:
            TypeError, ValueError, ClosedError: as for :meth:`lookup`.
        """
        self._require_open()
        find = self._table.find
        length = 0
        for key in _as_keys(keys):
            if find(key) < 0:
                break
            length += 1
        return length

    def keys(self) -> list[bytes]:
        """The keys of all chunks that can be held and loaded. O(places).

        Raises:
            ClosedError: as for :meth:`lookup`.
        """
        self._require_open()
        records = map(self._table.read, self._table.ready_places().tolist())
        return [record.key for record in records if record is not None]

    def stats(self) -> SharedHeapStats:
        """Bytes and counts. O(places).

        Raises:
            ClosedError: as for :meth:`lookup`.
        """
        self._require_open()
        geometry = self._segment.geometry
        return SharedHeapStats(
            heap_bytes=geometry.data_bytes,
            segment_bytes=geometry.file_bytes,
            chunk_bytes=geometry.chunk_bytes,
            place_bytes=geometry.place_bytes,
            ready_chunks=len(self._table.ready_places()),
            is_owner=self.is_owner,
            owner_pid=self._segment.state.pid,
            keeper=None if self._owner is None else self._owner.stats(),
        )

    def check(self, *, contents: bool = False) -> None:
        """Check the owner's books against the free list and the index; for the owner.

        Args:
            contents: also compare the checksums of all chunks; those that are damaged are removed.

        Raises:
            HeapCorruptionError: something does not hold; the message names it.
            MissingChunksError: chunks were damaged; it names them.
            ValueError: another process owns the heap.
            ClosedError: as for :meth:`lookup`.
        """
        self._require_open()
        require_flags(contents=contents)
        if self._owner is None:
            raise ValueError(f"only the owner of {self.path} can check it, attached processes not")
        self._owner.check()
        if contents:
            damaged = []
            for key in self.keys():
                with self._reading.hold([key], verify=False) as hold:
                    damaged += self._reading.damaged(hold.records)
            if damaged:
                raise MissingChunksError([], [record.key for record in damaged], [])

    # -- read ----------------------------------------------------------------------------------

    def hold(
        self, keys: Iterable[bytes], *, allow_partial: bool = False, verify: bool = True
    ) -> SharedHold:
        """Protect chunks, and give their blocks for reading where they are. O(N).

        It is not a use of them; see :meth:`touch`. The owner is not asked.

        Args:
            keys: the head of the prefix first. A key that is named twice is held once.
            allow_partial: hold the leading keys that have a chunk; otherwise all or none.
            verify: compare the checksums of chunks that this process has not compared before.

        Returns:
            The hold, also a context manager.

        Raises:
            KeyError: a key, which it names, has no chunk or a damaged one; nothing is held.
            TypeError, ValueError, ClosedError: as for :meth:`lookup`.
        """
        self._require_open()
        require_flags(allow_partial=allow_partial, verify=verify)
        names = list(dict.fromkeys(_as_keys(keys)))
        hold = self._reading.hold(names, verify=verify)
        if len(hold) < len(names) and not allow_partial:
            hold.release()
            raise KeyError(names[len(hold)])
        _ = hold.batch  # made now: afterwards the heap may be closed
        return hold

    def load(self, keys: Sequence[bytes], into: Heap | MemoryBatch) -> MemoryBatch | None:
        """Copy chunks to blocks of another heap; returns when they are there. It is a use of them.

        Args:
            keys: the head of the prefix first.
            into: a heap, which allocates a batch; or a batch of the heap's layout, with as many
                blocks as there are keys.

        Returns:
            The batch; None if ``into`` is a heap without room.

        Raises:
            MissingChunksError: chunks are not there, or were damaged; nothing is allocated. The
                blocks of a given batch have undefined contents.
            LeaseLostError: this process was stopped for so long that the chunks were reused; as
                above.
            TypeError, ValueError, ClosedError: as for :meth:`hold`, or the blocks do not fit.
        """
        self._require_open()
        names = _as_keys(keys, is_list=True)
        require_distinct(names)
        if not isinstance(into, (Heap, MemoryBatch)):
            raise TypeError(f"into must be a heap or a batch of its blocks, got {into!r}")
        if isinstance(into, MemoryBatch) and len(into) != len(names):
            raise ValueError(f"{len(names)} keys need as many blocks, got {len(into)}")
        return self._reading.load(names, into)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that one request used chunks, the head of its prefix first. O(N).

        Keys that have no chunk are skipped. The owner sees it before it evicts.

        Raises:
            TypeError, ValueError, ClosedError: as for :meth:`lookup`.
        """
        self._require_open()
        find = self._table.find
        places = [find(key) for key in dict.fromkeys(_as_keys(keys))]
        self._table.touch([place for place in places if place >= 0])

    # -- store ---------------------------------------------------------------------------------

    def begin(self, keys: Sequence[bytes]) -> SharedStore:
        """Get places for chunks that this process fills; they are found when it completes them.

        A full heap evicts chunks that nobody holds. If that does not suffice, places are for the
        first keys, and the chunks that others hold are reused later, see ``lease_s``.

        Args:
            keys: each once, the head of the prefix first.

        Returns:
            The store, also a context manager.

        Raises:
            NoOwnerError: nobody owns the heap now.
            TimeoutError: its owner does not answer.
            SegmentReplacedError: the path leads to another file by now.
            TypeError, ValueError, ClosedError: as for :meth:`lookup`, or a key is named twice.
        """
        self._require_open()
        names = _as_keys(keys, is_list=True)
        require_distinct(names)
        store = self._storing.begin(names)
        _ = store.batch  # as for a hold
        return store

    def store(
        self,
        keys: Sequence[bytes],
        source: torch.Tensor | BlockObjects,
        num_tokens: Sequence[int] | None = None,
    ) -> npt.NDArray[np.bool_]:
        """Copy chunks into the heap; returns when everybody can find them.

        Chunks that are there already are not written again, and those that somebody else is
        storing are left to him. A full heap evicts others, see :meth:`begin`.

        Args:
            keys: each once, the head of the prefix first.
            source: the chunks' contents, ``[N, *shape]`` of the layout's dtype, for a layout of
                several groups ``[N, size_bytes]`` of uint8; or N blocks of another heap.
            num_tokens: how many tokens each chunk holds, N numbers; None: it is not known.

        Returns:
            bool ``[N]``: which keys have a chunk now.

        Raises:
            NoOwnerError, TimeoutError, SegmentReplacedError: as for :meth:`begin`.
            TypeError, ValueError, ClosedError: as for :meth:`begin`, or ``source`` does not fit;
                nothing is stored.
            TransferError: the copy has failed; nothing is stored.
        """
        self._require_open()
        names = _as_keys(keys, is_list=True)
        require_distinct(names)
        self._storing.require_source(source, len(names))
        return self._storing.store(names, source, as_tokens(num_tokens, len(names)))

    # -- drop ----------------------------------------------------------------------------------

    def remove(self, keys: Iterable[bytes]) -> list[bytes]:
        """Remove chunks; when this returns, nobody finds them any more, here or after a restart.

        Those that somebody holds can be read on for ``lease_s``. A chunk that is being stored is
        not found when its store ends.

        Args:
            keys: those that are not there are skipped.

        Returns:
            The keys that were there.

        Raises:
            NoOwnerError: as for :meth:`begin`.
            TimeoutError: the owner does not answer; they are removed once it goes on.
            TypeError, ValueError, ClosedError: as for :meth:`lookup`.
        """
        self._require_open()
        return self._channel.remove(list(dict.fromkeys(_as_keys(keys))))

    def close(self, timeout_s: float | None = None) -> None:
        """Let go of the heap; the owner lets others own it. May be repeated.

        The chunks stay. What is being stored is given up. Batches of holds and stores must not be
        used any more. In a forked child nothing happens.

        Args:
            timeout_s: the most seconds to wait for the owner's thread, and for calls of other
                threads that ask another process; None: no limit.

        Raises:
            TimeoutError: not all has ended in time; a later call can wait for it.
            NestedWaitError: in a finalizer on the owner's thread. A ``RuntimeError``.
            OSError: the file's name could not be removed; the heap is closed all the same.
        """
        self._closer.close(timeout_s, wait=self._wait_for_end, release=self._release)

    def _wait_for_end(self, timeout_s: float | None) -> None:
        if not self._channel.stop(timeout_s):
            raise TimeoutError(f"{self!r} has not ended in {timeout_s:g} s: close it again later")

    def _release(self) -> None:
        unlink, self._unlink = self._unlink, False
        try:
            if unlink:
                self._segment.unlink()
        finally:  # whether or not the name could be removed
            self._leases.close()
            if self._owner is not None:
                self._owner.leave()
            self._places.close()

    # -- the rest ------------------------------------------------------------------------------

    def start_over_after_fork(self) -> None:
        """Give the heap up in a forked child: its locks and its thread are the parent's."""
        if self._closer.has_ended:
            return
        self._channel.start_over_after_fork()
        self._leases.start_over_after_fork()
        if self._owner is not None:
            self._owner.start_over_after_fork()

    def _require_open(self) -> None:
        self._closer.require_open()
        self._leases.give_back()
        self._channel.give_back()

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """The file."""
        role = "owner" if self._owner is not None else "attached"
        return f"SharedHeap({self.path!r}, {self.layout}, {role})"


def _leases_of(segment: Segment) -> Leases:
    return Leases(RangeLocks(segment.open_file()), segment.geometry.num_places)


def _identity(layout: BlockLayout, namespace: Any) -> dict[str, object]:
    if not isinstance(namespace, str):
        raise TypeError(f"namespace must be a text, got {namespace!r}")
    if not namespace:
        raise ValueError("namespace must name the model, its weights and the rank, got ''")
    return {"namespace": namespace, "layout": str(layout), "chunk_bytes": layout.size_bytes}


def _as_keys(keys: Any, *, is_list: bool = False) -> list[bytes]:
    return as_bytes_keys(keys, MAX_KEY_BYTES, "SharedHeap", is_list=is_list)
