"""A tier whose copies fail on demand, for the tests that run vLLM's engine.

Selected like kvheap's own: ``"spec_name": "FaultySpec", "spec_module_path": "vllm_faults"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from kvheap.integrations.vllm import KVHeapOffloadingSpec, KVHeapTieringSpec


@dataclass
class Faults:
    """What fails from now on, and what has happened since the last :meth:`clear`.

    Attributes:
        fail_stores, fail_loads: every how many jobs one fails; 0: none.
        zero_loads: loads give zeros, and say that they succeeded.
        stores, loads: jobs so far, whether or not they failed.
        failed: jobs that failed.
        stored_bytes, loaded_bytes: bytes of those that did not.
        specs: the specs that were made.
    """

    fail_stores: int = 0
    fail_loads: int = 0
    zero_loads: bool = False
    stores: int = 0
    loads: int = 0
    failed: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    specs: list[Any] = field(default_factory=list)

    def clear(self) -> None:
        """Nothing fails, and nothing has happened."""
        specs = self.specs
        self.__init__(specs=specs)  # type: ignore[misc]


FAULTS = Faults()
"""The faults of every tier of this process."""


class FaultyWorker(OffloadingWorker):
    """A worker some of whose jobs fail. A load that fails leaves garbage in its blocks."""

    def __init__(self, worker: OffloadingWorker, kv_caches: CanonicalKVCaches) -> None:
        self.worker = worker
        self._caches = kv_caches
        self._ended: list[TransferResult] = []
        self._stores: set[int] = set()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        FAULTS.stores += 1
        if FAULTS.fail_stores and FAULTS.stores % FAULTS.fail_stores == 0:
            FAULTS.failed += 1
            self._ended.append(TransferResult(job_id, False))
            return True
        self._stores.add(job_id)
        return self.worker.submit_store(job_id, src_spec, dst_spec)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec, **options: Any
    ) -> bool:
        FAULTS.loads += 1
        if FAULTS.fail_loads and FAULTS.loads % FAULTS.fail_loads == 0:
            FAULTS.failed += 1
            self._fill(dst_spec, 0x55)
            self._ended.append(TransferResult(job_id, False))
            return True
        if FAULTS.zero_loads:
            self._fill(dst_spec, 0)
            self._ended.append(TransferResult(job_id, True, 0, 0.0))
            return True
        return self.worker.submit_load(job_id, src_spec, dst_spec, **options)

    def get_finished(self) -> list[TransferResult]:
        ended, self._ended = self._ended, []
        for result in self.worker.get_finished():
            ended.append(result)
            if result.job_id in self._stores:
                self._stores.remove(result.job_id)
                FAULTS.stored_bytes += result.transfer_size or 0
            else:
                FAULTS.loaded_bytes += result.transfer_size or 0
        return ended

    def wait(self, job_ids: set[int]) -> None:
        self.worker.wait(job_ids)

    def shutdown(self) -> None:
        self.worker.shutdown()

    def _fill(self, blocks: GPULoadStoreSpec, value: int) -> None:
        at = 0
        for refs, count in zip(self._caches.group_data_refs, blocks.group_sizes, strict=True):
            for block in blocks.block_ids[at : at + count]:
                for ref in refs:
                    page = self._caches.tensors[ref.tensor_idx].tensor[int(block)]
                    page[: ref.page_size_bytes] = value
            at += count


class FaultySpec(KVHeapOffloadingSpec):
    """kvheap's tier with :class:`FaultyWorker`."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        FAULTS.specs.append(self)
        return FaultyWorker(super().get_worker(kv_caches), kv_caches)


class FaultyTieringSpec(KVHeapTieringSpec):
    """vLLM's tiers with :class:`FaultyWorker`."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        FAULTS.specs.append(self)
        return FaultyWorker(super().get_worker(kv_caches), kv_caches)
