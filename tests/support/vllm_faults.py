"""A tier whose copies fail on demand, for the tests that run vLLM's engine.

Selected like kvheap's own: ``"spec_name": "FaultySpec", "spec_module_path": "vllm_faults"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
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
        fail_first: how many jobs fail before any other rule counts.
        fail_share: share of the jobs that fail, drawn with ``random``.
        by: how a job fails: by a ``"result"`` (a load leaves garbage in its blocks), by being
            ``"refused"``, or by what it ``"raises"``.
        slow: how often a job is asked after before its copy begins, unless it is waited for.
        break_polls: every how many calls of ``get_finished`` one raises; 0: none.
        break_waits: every how many calls of ``wait`` one raises, after it has waited; 0: none.
        zero_loads: loads give zeros, and say that they succeeded.
        stores, loads, polls, waits: jobs and calls so far, whether or not they failed.
        failed: jobs that failed.
        stored_bytes, loaded_bytes: bytes of those that did not.
        specs: the specs that were made.
        random: draws what fails.
    """

    fail_stores: int = 0
    fail_loads: int = 0
    fail_first: int = 0
    fail_share: float = 0.0
    by: str = "result"
    slow: int = 0
    break_polls: int = 0
    break_waits: int = 0
    zero_loads: bool = False
    stores: int = 0
    loads: int = 0
    polls: int = 0
    waits: int = 0
    failed: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    specs: list[Any] = field(default_factory=list)
    random: Random = field(default_factory=lambda: Random(0))

    def clear(self) -> None:
        """Nothing fails, and nothing has happened."""
        specs = self.specs
        self.__init__(specs=specs)  # type: ignore[misc]

    def heap(self) -> torch.Tensor:
        """The bytes of the newest tier."""
        worker: Any = KVHeapOffloadingSpec.get_worker(self.specs[-1], None)  # type: ignore[arg-type]
        found: torch.Tensor = worker.memory.tensor
        return found

    def is_to_fail(self, number: int, every: int) -> bool:
        """Whether the ``number``-th job of a direction fails, of which each ``every``-th does."""
        if self.fail_first:
            self.fail_first -= 1
            return True
        if self.fail_share and self.random.random() < self.fail_share:
            return True
        return bool(every) and number % every == 0


FAULTS = Faults()
"""The faults of every tier of this process."""


class FaultyWorker(OffloadingWorker):
    """A worker some of whose jobs fail, or are slow."""

    def __init__(self, worker: OffloadingWorker, kv_caches: CanonicalKVCaches) -> None:
        self.worker = worker
        self._caches = kv_caches
        self._ended: list[TransferResult] = []
        self._stores: set[int] = set()
        self._waiting: dict[int, list[Any]] = {}

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        FAULTS.stores += 1
        if FAULTS.is_to_fail(FAULTS.stores, FAULTS.fail_stores):
            return self._fail(job_id)
        self._stores.add(job_id)
        return self._begin(job_id, self.worker.submit_store, src_spec, dst_spec)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec, **options: Any
    ) -> bool:
        FAULTS.loads += 1
        if FAULTS.is_to_fail(FAULTS.loads, FAULTS.fail_loads):
            self._fill(dst_spec, 0x55)
            return self._fail(job_id)
        if FAULTS.zero_loads:
            self._fill(dst_spec, 0)
            self._ended.append(TransferResult(job_id, True, 0, 0.0))
            return True
        if FAULTS.slow:
            self._fill(dst_spec, 0x33)
        return self._begin(job_id, self.worker.submit_load, src_spec, dst_spec, **options)

    def get_finished(self) -> list[TransferResult]:
        FAULTS.polls += 1
        if FAULTS.break_polls and FAULTS.polls % FAULTS.break_polls == 0:
            raise RuntimeError("made up: the jobs cannot be asked after")
        for job_id, job in list(self._waiting.items()):
            job[0] -= 1
            if job[0] <= 0:
                self._run(job_id)
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
        for job_id in job_ids:
            self._run(job_id)
        self.worker.wait(job_ids)
        FAULTS.waits += 1
        if FAULTS.break_waits and FAULTS.waits % FAULTS.break_waits == 0:
            raise RuntimeError("made up: the jobs cannot be waited for")

    def shutdown(self) -> None:
        self.worker.shutdown()

    def _begin(self, job_id: int, submit: Any, *specs: Any, **options: Any) -> bool:
        if not FAULTS.slow:
            return bool(submit(job_id, *specs, **options))
        self._waiting[job_id] = [FAULTS.slow, lambda: submit(job_id, *specs, **options)]
        return True

    def _run(self, job_id: int) -> None:
        _, submit = self._waiting.pop(job_id, (0, None))
        if submit is not None:
            submit()

    def _fail(self, job_id: int) -> bool:
        FAULTS.failed += 1
        if FAULTS.by == "raises":
            raise RuntimeError("made up: the copy cannot begin")
        if FAULTS.by == "refused":
            return False
        self._ended.append(TransferResult(job_id, False))
        return True

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
