"""Where a worker's chunks are: in a heap of its own, or in the region that vLLM's tiers share.

Both answer the same questions for :class:`~kvheap.integrations.vllm.worker.KVHeapWorker`: which
chunks does a job name, where are they in memory, and may they be used yet.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from vllm.v1.kv_offload.base import LoadStoreSpec
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from kvheap import HostMemoryAllocator, LazyMemoryAllocator
from kvheap.addresses.extents import Int64Array
from kvheap.integrations.vllm.file_locks import LockedFile
from kvheap.integrations.vllm.groups import CHUNK_ALIGN_BYTES
from kvheap.integrations.vllm.heap_label import LABEL_BYTES, HeapLabel
from kvheap.integrations.vllm.locations import ChunkLocations
from kvheap.memory.host_memory import HostBuffer
from kvheap.memory.pages import PAGE_BYTES, HugePages

if TYPE_CHECKING:
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

__all__ = ["ChunkMemory", "FileMemory", "HeapMemory", "RegionMemory"]

FIRST_BYTES = 64 << 20
"""Bytes of a heap that are committed and pinned before the engine starts."""


class ChunkMemory(Protocol):
    """The memory of a worker's chunks."""

    @property
    def tensor(self) -> torch.Tensor:
        """All bytes, uint8 or int8 on the CPU."""

    @property
    def ready_bytes(self) -> int:
        """Bytes from the start that can be used now."""

    @property
    def pinned_share(self) -> float:
        """Share of the memory that is page-locked, from 0 to 1."""

    def locations(self, chunks: LoadStoreSpec) -> ChunkLocations:
        """Where the chunks of a job are.

        Raises:
            TypeError: ``chunks`` is no description of this memory's chunks.
        """

    def absolute(self, addresses: Int64Array, sizes: Int64Array) -> Int64Array:
        """Absolute addresses of byte ranges, int64 ``[N]``.

        Raises:
            ValueError: a range is not within the bytes that are ready.
        """

    def close(self) -> None:
        """Give the memory back; nothing may use it any more."""


def require_ready(
    addresses: Int64Array,
    sizes: Int64Array,
    ready: int,
    size: int,
    error: BaseException | None = None,
) -> None:
    """Raise unless byte ranges are within the first ``ready`` of ``size`` bytes.

    Args:
        addresses: where the ranges begin, int64 ``[N]``.
        sizes: bytes of each, int64 ``[N]``.
        ready: bytes that can be used.
        size: bytes that there are to be.
        error: why there will be no more.

    Raises:
        ValueError: names the first that is not.
    """
    if not len(addresses):
        return
    ends = addresses + sizes
    if addresses.min() >= 0 and ends.max() <= ready:
        return
    at = int(np.argmax((addresses < 0) | (ends > ready)))
    raise ValueError(
        f"bytes [{addresses[at]}, {ends[at]}) are not ready: {ready} of the heap's {size} bytes "
        f"can be used so far" + (f", and no more will be: {error}" if error else "")
    )


class HeapMemory:
    """A heap that is usable at once, and grows to its size in the background.

    Args:
        size_bytes: bytes of the heap when it has grown.
        pin: page-lock it for CUDA.
        huge_pages: see ``HostBuffer``.
        numa_node: take memory of this node only.

    Raises:
        OSError: the system does not provide the memory.
        RuntimeError: the first bytes cannot be pinned.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        pin: bool,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
    ) -> None:
        self._size_bytes = size_bytes
        self._heap = LazyMemoryAllocator(
            min(FIRST_BYTES, size_bytes // PAGE_BYTES * PAGE_BYTES),  # in whole pages
            size_bytes,
            CHUNK_ALIGN_BYTES,
            pin="required" if pin else "no",
            huge_pages=huge_pages,
            numa_node=numa_node,
            on_full=None,
        )

    @property
    def tensor(self) -> torch.Tensor:
        """All bytes, uint8."""
        return self._heap.host_buffer.tensor

    @property
    def ready_bytes(self) -> int:
        """Bytes that have been committed, and pinned if they are to be."""
        return self._heap.address_manager.get_heap_size()

    @property
    def pinned_share(self) -> float:
        """See :class:`ChunkMemory`."""
        return self._heap.pinned_bytes / self._size_bytes

    def locations(self, chunks: LoadStoreSpec) -> ChunkLocations:
        """The job's own: the scheduler names addresses."""
        return require_locations(chunks)

    def absolute(self, addresses: Int64Array, sizes: Int64Array) -> Int64Array:
        """See :class:`ChunkMemory`."""
        error = self._heap.progress.error
        require_ready(addresses, sizes, self.ready_bytes, self._size_bytes, error)
        return addresses + self._heap.host_buffer.data_ptr

    def close(self) -> None:
        """Stop growing, unpin and unmap."""
        self._heap.close()


class FileMemory:
    """A heap in a file, whose bytes outlive the process. One process at a time may have it.

    The file begins with a page that says whose the bytes are; see :class:`HeapLabel`.

    Args:
        path: the file; made if it does not exist, and given its size.
        size_bytes: bytes of the heap.
        pin: page-lock it for CUDA.
        huge_pages: see ``HostBuffer``.
        numa_node: take memory of this node only.
        is_indexed: whether a later process is to find the bytes: they are flushed at the end.

    Raises:
        BlockingIOError: another process has the file.
        OSError: the file cannot be made, or the file system has not enough space.
        RuntimeError: the memory cannot be pinned.

    Attributes:
        path: the file.
        label: its label.
    """

    def __init__(
        self,
        path: str,
        size_bytes: int,
        *,
        pin: bool,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
        is_indexed: bool = False,
    ) -> None:
        self.path = path
        self._size_bytes = size_bytes
        self._is_indexed = is_indexed
        file_bytes = LABEL_BYTES + size_bytes
        self._file = _locked_file(path, file_bytes)
        try:
            buffer = HostBuffer(
                file_bytes, huge_pages=huge_pages, numa_node=numa_node, fd=self._file.fd
            )
            if pin:
                buffer.pin(0, file_bytes)
        except BaseException:
            self._file.release()
            raise
        page = buffer.tensor[:LABEL_BYTES].numpy()
        self.label = HeapLabel(page, size_bytes, partial(os.fsync, self._file.fd))
        self._heap = HostMemoryAllocator(
            file_bytes, CHUNK_ALIGN_BYTES, host_buffer=buffer, view_only=False, on_full=None
        )

    @property
    def tensor(self) -> torch.Tensor:
        """All bytes, uint8."""
        return self._heap.host_buffer.tensor[LABEL_BYTES:]

    @property
    def ready_bytes(self) -> int:
        """All of them."""
        return self._size_bytes

    @property
    def pinned_share(self) -> float:
        """See :class:`ChunkMemory`."""
        return self._heap.pinned_bytes / (LABEL_BYTES + self._size_bytes)

    def locations(self, chunks: LoadStoreSpec) -> ChunkLocations:
        """The job's own: the scheduler names addresses."""
        return require_locations(chunks)

    def absolute(self, addresses: Int64Array, sizes: Int64Array) -> Int64Array:
        """See :class:`ChunkMemory`. From the first call on, no earlier index is valid."""
        require_ready(addresses, sizes, self._size_bytes, self._size_bytes)
        first = self._heap.host_buffer.data_ptr + LABEL_BYTES
        self.label.renew()
        return addresses + first

    def close(self) -> None:
        """Flush the bytes if they have an index, unpin and unmap; the file stays."""
        if self._is_indexed:
            self.label.seal()
        self.label.close()
        self._heap.close()
        self._file.release()


class RegionMemory:
    """The host memory that vLLM's tiers share: slots of one size, in which each worker has a part.

    Args:
        region: vLLM's region, closed with this.
        slot_bytes: bytes of a slot, all workers' parts together.
        part_bytes: bytes of this worker's part.
        part: which part is this worker's.
    """

    def __init__(
        self, region: SharedOffloadRegion, slot_bytes: int, part_bytes: int, part: int
    ) -> None:
        self._region = region
        self._tensor: torch.Tensor = region.base_tensor
        self._slot_bytes = slot_bytes
        self._part_bytes = part_bytes
        self._offset = part * part_bytes

    @property
    def tensor(self) -> torch.Tensor:
        """All bytes, int8."""
        return self._tensor

    @property
    def ready_bytes(self) -> int:
        """All of them."""
        return self._tensor.nbytes

    @property
    def pinned_share(self) -> float:
        """See :class:`ChunkMemory`."""
        return float(self._region.is_pinned)

    def locations(self, chunks: LoadStoreSpec) -> ChunkLocations:
        """This worker's part of each slot that vLLM's manager names."""
        if not isinstance(chunks, CPULoadStoreSpec):
            raise TypeError(f"a job of vLLM's tiers has a CPULoadStoreSpec, got {chunks!r}")
        slots = np.asarray(chunks.block_ids, np.int64)
        sizes = np.full(len(slots), self._part_bytes)
        return ChunkLocations(slots * self._slot_bytes + self._offset, sizes)

    def absolute(self, addresses: Int64Array, sizes: Int64Array) -> Int64Array:
        """See :class:`ChunkMemory`."""
        require_ready(addresses, sizes, self.ready_bytes, self.ready_bytes)
        return addresses + self._tensor.data_ptr()

    def close(self) -> None:
        """Unpin and unmap the region; its last user removes its file."""
        self._tensor = torch.empty(0, dtype=torch.int8, device="cpu")
        self._region.cleanup()


def require_locations(chunks: LoadStoreSpec) -> ChunkLocations:
    """The argument, if it is a ``ChunkLocations``.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(chunks, ChunkLocations):
        raise TypeError(f"a job of a kvheap tier has ChunkLocations, got {chunks!r}")
    return chunks


def _locked_file(path: str, num_bytes: int) -> LockedFile:
    """The file of a heap, with at least so many bytes.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made, or the file system has not enough space.
    """
    try:
        file = LockedFile(
            path, f"heap_path is used by another process: give each engine its own: {path}"
        )
        try:
            # Now, since a write to a hole of a full file system kills the process.
            os.posix_fallocate(file.fd, 0, num_bytes)
        except BaseException:
            file.release()
            raise
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"kv_connector_extra_config['heap_path']: no file of {num_bytes} bytes at {path}: "
            f"{error.strerror}",
        ) from None
    return file
