"""``KVHeapFileTier``: a ``FileTier`` behind vLLM's host memory, as one of its ``secondary_tiers``.

::

    "secondary_tiers": [{
        "type": "KVHeapFileTier",
        "module_path": "kvheap.integrations.vllm.file_tier",
        "path": "/nvme/kv",
        "size_bytes": 1099511627776
    }]

It works under vLLM's ``TieringOffloadingSpec`` and under ``KVHeapTieringSpec``. Unlike vLLM's
``fs`` tier it keeps to a number of bytes, compares checksums, and refuses chunks of another model,
dtype, parallelism or cache layout by name. Keys are vLLM's block hashes: set ``PYTHONHASHSEED``
where the hash of a prefix is not a cryptographic one, as for every tier that outlives its process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.errors import TransferError
from kvheap.files import FileTier, FileTransfer
from kvheap.heaps.paged_allocator import PagedTensorMemoryAllocator

__all__ = ["KVHeapFileTier", "namespace_of"]


@dataclass(frozen=True, slots=True)
class _Job:
    """A store or load that vLLM waits for."""

    transfer: FileTransfer
    keys: list[OffloadKey]
    is_load: bool
    began: float


class KVHeapFileTier(SecondaryTierManager):  # type: ignore[misc,unused-ignore]
    """Chunks of vLLM's host memory in one bounded file.

    Args:
        offloading_spec: whose chunks they are.
        primary_kv_view: the slots of the host memory, ``[slots, bytes]``.
        tier_type: what vLLM calls the tier.
        path: a folder of this engine's own; see ``FileTier``.
        size_bytes: bytes for chunks.
        eviction_policy: ``lru``, ``arc``, ``s3fifo`` or ``adaptive``.
        threads, direct, durable: as for ``FileTier``.
        locality: whether the file system is ``LOCAL`` or ``REMOTE``, for vLLM's events.
        backpressure_detector: vLLM's.

    Raises:
        ImportError: lmdb or xxhash is not installed.
        TierInUseError: another engine has the folder.
        TierMismatchError: the folder has chunks of another model or cache.
        ValueError, TypeError: an option is wrong; the message names it.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        path: str,
        size_bytes: int,
        eviction_policy: str = "lru",
        threads: int = 4,
        direct: bool = True,
        durable: bool = False,
        locality: str | None = None,
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = None if locality is None else Locality(locality)
        slot_bytes = self.block_size_bytes
        layout = BlockLayout.of([slot_bytes], torch.uint8, MemoryFormat.UNDEFINED)
        self._tier = FileTier(
            path,
            size_bytes,
            layout,
            namespace=namespace_of(offloading_spec.config),
            policy=eviction_policy,
            threads=threads,
            direct=direct,
            durable=durable,
        )
        try:
            memory = torch.frombuffer(primary_kv_view.cast("B"), dtype=torch.uint8)
            self._heap: PagedTensorMemoryAllocator | None = PagedTensorMemoryAllocator(
                memory, [slot_bytes], torch.uint8, layout.fmt
            )
            # All slots as one batch, whose rows are vLLM's numbers. vLLM says which are in use.
            self._slots: MemoryBatch | None = self._heap.batched_allocate(
                [slot_bytes], torch.uint8, len(memory) // slot_bytes, layout.fmt
            )
        except BaseException:
            self._tier.close()
            raise
        self._jobs: dict[int, _Job] = {}

    @property
    def tier(self) -> FileTier:
        """The tier, for statistics."""
        return self._tier

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a chunk can be loaded. O(1)."""
        return LookupResult.HIT if self._tier.lookup([key])[0] else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to write chunks from their slots."""
        self._begin(job_metadata, is_load=False)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begin to read chunks into their slots."""
        self._begin(job_metadata, is_load=True)

    def _begin(self, job: TransferJob, is_load: bool) -> None:
        assert self._slots is not None
        rows = dict(zip(job.keys, job.chunk_ids.tolist(), strict=True))
        keys = list(rows)
        blocks = [self._slots[row] for row in rows.values()]
        transfer = self._tier.load(keys, blocks) if is_load else self._tier.store(keys, blocks)
        assert transfer is not None
        self._jobs[job.job_id] = _Job(transfer, keys, is_load, time.monotonic())

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """The jobs that have ended since the last call, with the keys that a load has filled."""
        ended = [number for number, job in self._jobs.items() if job.transfer.done()]
        return [self._result_of(number, self._jobs.pop(number)) for number in ended]

    def _result_of(self, number: int, job: _Job) -> JobResult:
        try:
            succeeded = job.transfer.succeeded(0.0).tolist()
        except TransferError:
            succeeded = [False] * len(job.keys)
        moved = [key for key, is_there in zip(job.keys, succeeded, strict=True) if is_there]
        is_whole = len(moved) == len(job.keys)
        return JobResult(
            job_id=number,
            success=is_whole,
            successful_keys=tuple(moved) if job.is_load and moved and not is_whole else None,
            transfer_time=time.monotonic() - job.began,
            transfer_bytes=len(moved) * self.block_size_bytes,
        )

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Note that a request used chunks."""
        self._tier.touch(list(keys))

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Chunks are offloaded as they are computed."""
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        """Wait until all jobs have ended; their results stay for :meth:`get_finished_jobs`."""
        for job in self._jobs.values():
            job.transfer.wait()

    def shutdown(self) -> None:
        """End all jobs, close the file, and let go of vLLM's memory."""
        self._tier.close()
        self._jobs.clear()
        heap, self._heap, self._slots = self._heap, None, None
        if heap is not None:
            heap.close()


def namespace_of(config: OffloadingConfig) -> str:
    """Whose chunks an engine offloads: what must be equal for them to be of use to another."""
    parallel = config.parallel
    identity = {
        "engine": "vllm",
        "model": config.model.name,
        "dtype": str(config.model.dtype),
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "tp_pp_pcp_dcp": [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size],
        "rank": parallel.rank,
        "groups": [[group.tokens_per_block, list(group.layer_names)] for group in config.groups],
        "kv_cache_layout": config.kv_cache_layout,
        "canonical_layout": config.canonical_layout,
        "replicated_layout": config.replicated_layout,
    }
    return json.dumps(identity, sort_keys=True, separators=(",", ":"))
