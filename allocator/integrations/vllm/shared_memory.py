"""``SharedMemory``: one heap for all workers of an engine whose caches hold the same bytes.

Under tensor parallelism, each worker of a model with latent attention (MLA) has the whole cache.
vLLM then lets the first worker store for all, and so does kvheap: the first worker makes the heap,
the others map it, and each pins its mapping. Nothing has a name in the file system: the heap is
gone with the last process that maps it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from vllm.v1.kv_offload.base import LoadStoreSpec

from kvheap.addresses.extents import Int64Array
from kvheap.integrations.vllm.chunk_memory import require_locations, require_ready
from kvheap.integrations.vllm.locations import ChunkLocations
from kvheap.memory.growth import BackgroundGrowth
from kvheap.memory.host_memory import HostBuffer
from kvheap.memory.pages import HugePages
from kvheap.memory.registrar import CudaHostRegistrar, HostRegistrar

__all__ = ["SharedMemory"]

FIRST_BYTES = 64 << 20
"""Bytes that are committed and pinned before the engine starts."""

PIECE_BYTES = 1 << 30
"""Bytes by which the usable part grows, a multiple of the page size."""

STEP_BYTES = 64 << 20
"""Bytes that are committed without looking whether the heap is to be closed."""


class SharedMemory:
    """A heap that the workers of an engine share; usable at once, it grows in the background.

    Args:
        size_bytes: bytes of the heap.
        exchange: gives the first worker's argument to all workers, each of which calls it once.
        is_first: whether this worker makes the heap.
        pin: page-lock this worker's mapping for CUDA.
        huge_pages: see ``HostBuffer``; not ``"explicit"``.
        numa_node: take memory of this node only.
        registrar: pins the memory; None: CUDA does.

    Raises:
        OSError: the system does not provide the memory, or does not let this worker map it.
        RuntimeError: the first worker could not make the heap, or the first bytes cannot be pinned.
    """

    def __init__(
        self,
        size_bytes: int,
        exchange: Callable[[str | None], str],
        *,
        is_first: bool,
        pin: bool,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
        registrar: HostRegistrar | None = None,
    ) -> None:
        self._size_bytes = size_bytes
        self._is_first = is_first
        self._is_closing = False
        self._registrar = registrar
        if registrar is None and pin:
            # Made here: it registers for the device that is current on this thread.
            self._registrar = CudaHostRegistrar()
        self._buffer = (
            _made(size_bytes, exchange, huge_pages, numa_node)
            if is_first
            else _attached(size_bytes, exchange(None), huge_pages, numa_node)
        )
        try:
            first = min(FIRST_BYTES, size_bytes)
            self._commit(0, first)
            self._ready_bytes = first
            self._growth = BackgroundGrowth(
                self._commit,
                self._publish,
                start_bytes=first,
                final_bytes=size_bytes,
                piece_bytes=PIECE_BYTES,
            ).start()
        except BaseException:
            self._buffer.close()
            raise

    @property
    def tensor(self) -> torch.Tensor:
        """All bytes, uint8."""
        return self._buffer.tensor

    @property
    def ready_bytes(self) -> int:
        """Bytes that have been committed, and pinned if they are to be, by this worker."""
        return self._ready_bytes

    @property
    def pinned_share(self) -> float:
        """Share of the memory that is page-locked, from 0 to 1."""
        return self._buffer.pinned_bytes / self._size_bytes

    def wait_until_grown(self) -> None:
        """Wait until all bytes are ready.

        Raises:
            BaseException: the error that ended growth.
        """
        self._growth.wait()

    def locations(self, chunks: LoadStoreSpec) -> ChunkLocations:
        """The job's own: the scheduler names addresses."""
        return require_locations(chunks)

    def absolute(self, addresses: Int64Array, sizes: Int64Array) -> Int64Array:
        """Absolute addresses of byte ranges, int64 ``[N]``.

        Raises:
            ValueError: a range is not within the bytes that are ready.
        """
        error = self._growth.progress.error
        require_ready(addresses, sizes, self._ready_bytes, self._size_bytes, error)
        return addresses + self._buffer.data_ptr

    def close(self) -> None:
        """Stop growing, unpin and unmap; the other workers' mappings stay."""
        self._is_closing = True
        self._growth.stop()
        self._buffer.close()

    def _commit(self, start: int, end: int) -> None:
        if self._is_first:
            for step in range(start, end, STEP_BYTES):
                if self._is_closing:
                    return
                self._buffer.populate(step, min(step + STEP_BYTES, end))
        if self._registrar is not None and start < end and not self._is_closing:
            self._buffer.pin(start, end, registrar=self._registrar)

    def _publish(self, num_bytes: int) -> None:
        self._ready_bytes += num_bytes


def _made(
    size_bytes: int,
    exchange: Callable[[str | None], str],
    huge_pages: HugePages,
    numa_node: int | None,
) -> HostBuffer:
    """Memory of this process, of which the other workers have been told."""
    try:
        buffer = HostBuffer.shared(size_bytes, huge_pages=huge_pages, numa_node=numa_node)
    except BaseException:
        exchange("")  # the others wait for an answer
        raise
    exchange(f"/proc/{os.getpid()}/fd/{buffer.fd}")
    return buffer


def _attached(
    size_bytes: int, path: str, huge_pages: HugePages, numa_node: int | None
) -> HostBuffer:
    """The memory of the first worker.

    Raises:
        RuntimeError: it has none.
        OSError: it cannot be opened.
    """
    if not path:
        raise RuntimeError("the first worker could not make the heap that all workers share")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return HostBuffer(size_bytes, huge_pages=huge_pages, numa_node=numa_node, fd=fd)
    finally:
        os.close(fd)
