"""The worker's side: copies between the engine's KV cache tensors and this worker's heap.

A job is one asynchronous transfer over the pages of all its groups, on a stream of its direction:
stores follow the work that filled the blocks, and jobs of one direction end in order. A job that
cannot be started, or whose copy fails, is reported as failed, never raised: its chunks are not
used, and a request that waits for them computes its tokens itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from kvheap.integrations.vllm.pages import GroupPages, PagePairs
from kvheap.transfer import CopyPlan, Transfer, copy

if TYPE_CHECKING:
    from kvheap.integrations.vllm.chunk_memory import ChunkMemory
    from kvheap.integrations.vllm.groups import ChunkGroup
    from kvheap.integrations.vllm.locations import ChunkLocations

__all__ = ["KVHeapWorker", "device_of", "group_pages"]

logger = logging.getLogger(__name__)

NULL_BLOCK = 0
"""The block of vLLM that stands for blocks outside a window. Nobody reads it."""

HOST_POLL_S = 0.001
"""How long an engine on a CPU waits for a load when it asks after it.

A load of 4 MiB took 140 ms longer while Python's threads took turns (2-core Xeon, 2026-11-26).
"""


@dataclass(slots=True)
class Job:
    """A job that has not been reported yet.

    Attributes:
        job_id: the scheduler's number.
        began_s: when it was submitted, ``time.perf_counter()``.
        num_bytes: bytes to copy.
        transfer: the copy; None if it could not be started, or there was nothing to copy.
        error: why it could not be started.
    """

    job_id: int
    began_s: float = field(default_factory=time.perf_counter)
    num_bytes: int = 0
    transfer: Transfer | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has ended, successfully or not. Does not wait."""
        return self.transfer is None or self.transfer.done()

    @property
    def failure(self) -> Exception | None:
        """Why it failed; None if it has not."""
        if self.error is not None or self.transfer is None:
            return self.error
        return self.transfer.error


class KVHeapWorker(OffloadingWorker):  # type: ignore[misc,unused-ignore]
    """Stores blocks of the engine's cache in chunks of a heap, and loads them back.

    Args:
        kv_caches: the engine's cache tensors, on one device, and what of them is whose.
        memory: the heap's memory, closed by :meth:`shutdown`.
        blocks_per_chunk: blocks of a chunk.
        groups: the pages of each KV cache group, if they are not :func:`group_pages`.

    Raises:
        ValueError: a group has no tensor, its tensors do not match, or kvheap cannot copy from
            their device.

    Attributes:
        groups: the pages of each KV cache group, in the scheduler's order.
        memory: the heap's memory.
        num_failed_stores: jobs that failed, each reported with ``success=False``.
        num_failed_loads: the same for loads.
    """

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        memory: ChunkMemory,
        blocks_per_chunk: int = 1,
        groups: Sequence[GroupPages] | None = None,
    ) -> None:
        device = device_of(kv_caches)
        if groups is None:
            groups = group_pages(kv_caches, blocks_per_chunk)
        self.groups = tuple(groups)
        self.memory = memory
        self.num_failed_stores = 0
        self.num_failed_loads = 0
        self._device = device
        self._keep = tuple(tensor.tensor for tensor in kv_caches.tensors)
        self._stores: dict[int, Job] = {}
        self._loads: dict[int, Job] = {}
        is_cuda = device.type == "cuda"
        make: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        self._store_stream = make(device) if is_cuda else None
        self._load_stream = make(device) if is_cuda else None
        self._is_closed = False

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """Begin to copy blocks of the engine into chunks; returns at once, and always True.

        The copy follows the work that is queued on the current stream.
        """
        self._stores[job_id] = self._begin(job_id, src_spec, dst_spec, is_store=True)
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        """Begin to copy chunks into blocks of the engine; returns at once, and always True.

        The copy follows the work on the current stream, which may still write to the blocks.
        ``expedited`` changes nothing: loads wait for loads only.
        """
        self._loads[job_id] = self._begin(job_id, dst_spec, src_spec, is_store=False)
        return True

    def get_finished(self) -> list[TransferResult]:
        """The jobs that have ended since the last call, in the order of their submission.

        A failed job has ``success=False``, and no size and time. On a CPU, this waits a moment for
        the first load: an engine that does nothing but ask would take its thread's turns.
        """
        if self._device.type == "cpu":
            for job in self._loads.values():
                if job.transfer is not None:
                    job.transfer.wait(HOST_POLL_S)
                break
        return [*self._take_ended(self._stores, "store"), *self._take_ended(self._loads, "load")]

    def wait(self, job_ids: set[int]) -> None:
        """Wait until jobs have ended, successfully or not. Unknown ones are ignored."""
        for job_id in job_ids:
            for jobs in (self._stores, self._loads):
                job = jobs.get(job_id)
                if job is not None and job.transfer is not None:
                    job.transfer.wait()

    def shutdown(self) -> None:
        """Wait for the jobs that are under way, and close the heap. Further calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self.wait({*self._stores, *self._loads})
        self._stores.clear()
        self._loads.clear()
        self._keep = ()
        self.memory.close()

    def _begin(
        self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, is_store: bool
    ) -> Job:
        job = Job(job_id)
        try:
            if self._is_closed:
                raise RuntimeError("the worker is shut down")
            pairs = self._pairs(blocks, self.memory.locations(chunks), is_store)
            job.num_bytes = int(pairs.sizes.sum())
            if len(pairs.sizes):
                job.transfer = self._copy(pairs, is_store)
        except Exception as error:  # the engine goes on without these chunks
            job.error = error
        return job

    def _pairs(self, blocks: GPULoadStoreSpec, chunks: ChunkLocations, is_store: bool) -> PagePairs:
        """The pages of a job.

        Raises:
            ValueError: the two sides do not match, or a chunk is not within the memory that is
                ready.
        """
        if len(blocks.group_sizes) != len(self.groups):
            raise ValueError(
                f"a job has blocks of {len(blocks.group_sizes)} groups, the cache has "
                f"{len(self.groups)}"
            )
        block_ids = np.asarray(blocks.block_ids, np.int64)
        if not is_store and np.count_nonzero(block_ids == NULL_BLOCK) > 1:
            block_ids = np.where(block_ids == NULL_BLOCK, -1, block_ids)
        addresses, sizes = chunks.addresses, chunks.sizes
        parts, block, chunk = [], 0, 0
        for group, num_blocks, first in zip(
            self.groups, blocks.group_sizes, blocks.block_indices, strict=True
        ):
            if not num_blocks:
                continue
            end = chunk + group.num_chunks(num_blocks, first)
            held = addresses[chunk:end]
            if len(held) < end - chunk:
                raise ValueError(f"a job has {len(addresses)} chunks, its blocks need more")
            if int(sizes[chunk:end].min()) < group.chunk_bytes:
                raise ValueError(
                    f"a chunk of {int(sizes[chunk:end].min())} bytes is too small for a group of "
                    f"{group.chunk_bytes}"
                )
            parts.append(group.pairs(block_ids[block : block + num_blocks], first, held))
            block, chunk = block + num_blocks, end
        if chunk != len(addresses):
            raise ValueError(f"a job has {len(addresses)} chunks, its blocks fill {chunk}")
        return PagePairs.joined(parts)

    def _copy(self, pairs: PagePairs, is_store: bool) -> Transfer:
        heap = self.memory.absolute(pairs.heap, pairs.sizes)
        cpu = torch.device("cpu")
        keep = (*self._keep, self.memory.tensor)
        if is_store:
            plan = CopyPlan.of_pointers(
                pairs.engine, heap, pairs.sizes, self._device, cpu, keep=keep
            )
            stream = self._store_stream
        else:
            plan = CopyPlan.of_pointers(
                heap, pairs.engine, pairs.sizes, cpu, self._device, keep=keep
            )
            stream = self._load_stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        return copy(plan, stream)

    def _take_ended(self, jobs: dict[int, Job], kind: str) -> list[TransferResult]:
        results = []
        for job in list(jobs.values()):
            if not job.is_done:
                break  # the jobs of one direction end in order
            del jobs[job.job_id]
            failure = job.failure
            if failure is None:
                seconds = time.perf_counter() - job.began_s
                results.append(TransferResult(job.job_id, True, job.num_bytes, seconds))
                continue
            logger.warning("%s job %d failed: %s", kind, job.job_id, failure)
            if kind == "store":
                self.num_failed_stores += 1
            else:
                self.num_failed_loads += 1
            results.append(TransferResult(job.job_id, False))
        return results


def group_pages(
    kv_caches: CanonicalKVCaches,
    blocks_per_chunk: int,
    groups: Sequence[ChunkGroup] = (),
) -> list[GroupPages]:
    """The pages of each KV cache group, each with its own tensors' pages only.

    Args:
        kv_caches: the engine's.
        blocks_per_chunk: blocks of a chunk.
        groups: the groups, if any has its bytes in pieces of packed blocks; by position.

    Raises:
        ValueError: a group has no tensor, its tensors do not match, or its pieces are not within
            one.
    """
    if groups and len(groups) != len(kv_caches.group_data_refs):
        raise ValueError(
            f"the engine has {len(kv_caches.group_data_refs)} KV cache groups, the scheduler "
            f"{len(groups)}"
        )
    found = []
    for at, refs in enumerate(kv_caches.group_data_refs):
        tensors = [kv_caches.tensors[ref.tensor_idx].tensor for ref in refs]
        sizes = [ref.page_size_bytes for ref in refs]
        pieces = groups[at].pieces if groups else ()
        if pieces:
            tensors = [_packed_block(tensors)[:, start : start + n] for start, n in pieces]
            sizes = [size for _, size in pieces]
        found.append(GroupPages.of(tensors, sizes, blocks_per_chunk))
    return found


def _packed_block(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The one tensor of whole blocks ``[B, bytes]`` that vLLM hands out if they are packed."""
    if len(tensors) != 1:
        raise ValueError(
            f"a KV cache group of packed blocks has {len(tensors)} tensors: vLLM hands out one"
        )
    return tensors[0]


def device_of(kv_caches: CanonicalKVCaches) -> torch.device:
    """The device of the engine's tensors.

    Raises:
        ValueError: there is no tensor, or kvheap cannot copy from its device.
    """
    if not kv_caches.tensors:
        raise ValueError("the engine has no KV cache tensor: there is nothing to keep")
    device: torch.device = kv_caches.tensors[0].tensor.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"kvheap copies from CPUs and CUDA devices, the KV cache is on {device}")
    return device
