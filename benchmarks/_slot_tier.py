"""vLLM's own CPU tier, as far as it runs without a GPU: its spec and manager, plain copies.

``CPUOffloadingWorker`` copies with CUDA or XPU only. This one copies the same pages between the
same slots with ``torch.index_select`` and ``index_copy_``, at once. Selected by ``"spec_name":
"SlotSpec", "spec_module_path": "_slot_tier"`` under vLLM's ``OffloadingConnector``.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

__all__ = ["SlotSpec", "SlotWorker"]


class SlotWorker(OffloadingWorker):
    """Copies blocks into slots that have room for a block of every tensor.

    Args:
        kv_caches: the engine's.
        num_slots: of the tier.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, num_slots: int) -> None:
        self._caches = kv_caches
        self._slots = [
            torch.zeros(num_slots, tensor.page_size_bytes, dtype=torch.int8)
            for tensor in kv_caches.tensors
        ]
        self._ended: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec
    ) -> bool:
        return self._copy(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(
        self,
        job_id: int,
        src_spec: CPULoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        return self._copy(job_id, dst_spec, src_spec, is_store=False)

    def get_finished(self) -> list[TransferResult]:
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        """Every copy has ended."""

    def _copy(
        self, job_id: int, blocks: GPULoadStoreSpec, slots: CPULoadStoreSpec, is_store: bool
    ) -> bool:
        began, at, num_bytes = time.perf_counter(), 0, 0
        for refs, count in zip(self._caches.group_data_refs, blocks.group_sizes, strict=True):
            theirs = torch.from_numpy(blocks.block_ids[at : at + count].astype(np.int64))
            ours = torch.from_numpy(slots.block_ids[at : at + count].astype(np.int64))
            at += count
            for ref in refs:
                size = ref.page_size_bytes
                cache = self._caches.tensors[ref.tensor_idx].tensor[:, :size]
                held = self._slots[ref.tensor_idx][:, :size]
                if is_store:
                    held.index_copy_(0, ours, cache.index_select(0, theirs))
                else:
                    cache.index_copy_(0, theirs, held.index_select(0, ours))
                num_bytes += size * count
        seconds = time.perf_counter() - began
        self._ended.append(TransferResult(job_id, True, num_bytes, seconds))
        return True


class SlotSpec(CPUOffloadingSpec):
    """VLLM's spec with :class:`SlotWorker`, one block a chunk."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return SlotWorker(kv_caches, self.num_chunks)
