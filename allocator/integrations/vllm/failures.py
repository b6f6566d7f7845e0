"""Failed copies: kept from vLLM's worker, which would end the engine; told to the scheduler.

:class:`TolerantWorker` stands between vLLM and a worker, :class:`JobKeys` between vLLM and a
manager. Between them travel the numbers of the jobs that failed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingWorker,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    TransferResult,
    get_offload_group_idx,
)

__all__ = ["ForgetfulManager", "JobKeys", "TolerantWorker", "WorkerReport"]

logger = logging.getLogger(__name__)


@dataclass
class WorkerReport(OffloadingWorkerMetadata):  # type: ignore[misc,unused-ignore]
    """What a worker tells the scheduler in a step: the jobs that ended, and which of them failed.

    Attributes:
        failed_jobs: numbers of the failed jobs, all of them also in ``completed_jobs``.
        pinned_share: share of the worker's heap that is page-locked, from 0 to 1; None: unknown.
    """

    failed_jobs: set[int] = field(default_factory=set)
    pinned_share: float | None = None

    @classmethod
    def of(
        cls,
        metadata: OffloadingWorkerMetadata,
        failed_jobs: set[int],
        pinned_share: float | None = None,
    ) -> WorkerReport:
        """VLLM's metadata of a step, and what it lacks."""
        return cls(metadata.completed_jobs, metadata.transfer_stats, failed_jobs, pinned_share)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """That of two workers together: a job has failed if it failed in one of them."""
        both = super().aggregate(other)
        assert isinstance(both, OffloadingWorkerMetadata)
        if not isinstance(other, WorkerReport):
            return self.of(both, self.failed_jobs, self.pinned_share)
        shares = [share for share in (self.pinned_share, other.pinned_share) if share is not None]
        return self.of(both, self.failed_jobs | other.failed_jobs, min(shares, default=None))


class TolerantWorker(OffloadingWorker):  # type: ignore[misc,unused-ignore]
    """A worker whose failed jobs end like any other, and are named apart.

    What the worker raises stays here. A job that it refuses, by ``False`` or an exception, has
    failed; so have the jobs that it cannot wait for or report.

    Args:
        worker: does the work.
    """

    def __init__(self, worker: OffloadingWorker) -> None:
        self._worker = worker
        self._under_way: set[int] = set()
        self._lost: set[int] = set()
        self._failed: set[int] = set()

    @property
    def worker(self) -> OffloadingWorker:
        """The worker that does the work."""
        return self._worker

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """As the worker; always True."""
        return self._submit(job_id, self._worker.submit_store, src_spec, dst_spec)

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, **options: Any
    ) -> bool:
        """As the worker; always True."""
        return self._submit(job_id, self._worker.submit_load, src_spec, dst_spec, **options)

    def get_finished(self) -> list[TransferResult]:
        """The jobs that have ended, each once and as a success. A failed one has no size and time.

        Where the worker raises, all jobs under way have failed, once they could be waited for.
        """
        try:
            found = self._worker.get_finished()
        except Exception:
            logger.exception("jobs %s have failed: no worker reports them", self._under_way)
            self.wait(set(self._under_way))
            self._lost |= self._under_way
            found = []
        results = []
        for result in [*(TransferResult(job_id, False) for job_id in self._lost), *found]:
            job_id = result.job_id
            if job_id not in self._under_way:
                continue  # was reported as failed before
            self._under_way.remove(job_id)
            if job_id in self._lost or not result.success:
                self._failed.add(job_id)
                result = TransferResult(job_id, True)
            results.append(result)
        self._lost.clear()
        return results

    def take_failed(self) -> set[int]:
        """The jobs that :meth:`get_finished` returned since the last call, and that failed."""
        failed, self._failed = self._failed, set()
        return failed

    def wait(self, job_ids: set[int]) -> None:
        """As the worker. Where it raises, the jobs have failed."""
        try:
            self._worker.wait(job_ids)
        except Exception:
            logger.exception("jobs %s have failed: they could not be waited for", job_ids)
            self._lost |= job_ids & self._under_way

    def shutdown(self) -> None:
        """As the worker."""
        self._worker.shutdown()

    def _submit(self, job_id: int, submit: Any, *specs: Any, **options: Any) -> bool:
        self._under_way.add(job_id)
        try:
            is_accepted = submit(job_id, *specs, **options)
        except Exception:
            logger.exception("job %d could not be started; its chunks are not used", job_id)
            is_accepted = False
        if not is_accepted:
            self._lost.add(job_id)
        return True


class JobKeys:
    """The keys of each job that is under way, seen at a manager's calls.

    Every other call goes to the manager itself.

    Args:
        manager: makes the descriptions of where chunks are, from which jobs are made.
        num_workers: how many workers report the end of a job.
        blocks_per_chunk: blocks of a chunk.
        needs_whole: by group, whether a load may need any block of a chunk, and not the last only.
    """

    def __init__(
        self,
        manager: OffloadingManager,
        num_workers: int,
        blocks_per_chunk: int = 1,
        needs_whole: Sequence[bool] = (),
    ) -> None:
        self._manager = manager
        self._num_workers = num_workers
        self._blocks_per_chunk = blocks_per_chunk
        self._needs_whole = tuple(needs_whole)
        self._incomplete: dict[int, list[OffloadKey]] = {}
        self._stale_requests: set[str] = set()
        self._by_spec: dict[int, tuple[LoadStoreSpec, tuple[OffloadKey, ...]]] = {}
        self._by_job: dict[int, tuple[OffloadKey, ...]] = {}
        self._reports: dict[int, int] = {}
        self.lookup = manager.lookup  # once for each key: without a detour

    def __getattr__(self, name: str) -> Any:
        """What the manager has."""
        return getattr(self._manager, name)

    @property
    def manager(self) -> OffloadingManager:
        """The manager."""
        return self._manager

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """As the manager."""
        spec = self._manager.prepare_load(keys, req_context)
        self._by_spec[id(spec)] = (spec, tuple(keys))
        return spec

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """As the manager."""
        output = self._manager.prepare_store(keys, req_context)
        if output is not None and output.keys_to_store:
            self._by_spec[id(output.store_spec)] = (output.store_spec, tuple(output.keys_to_store))
        return output

    def begun(self, metadata: OffloadingConnectorMetadata) -> None:
        """Note the jobs of a step, made from what was prepared in it."""
        for jobs, side in ((metadata.load_jobs, "src_spec"), (metadata.store_jobs, "dst_spec")):
            for job_id, job in jobs.items():
                found = self._by_spec.get(id(getattr(job, side)))
                if found is not None:
                    self._by_job[job_id] = found[1]
        self._by_spec.clear()
        for job_id, job in metadata.store_jobs.items():
            keys = list(self.of_job(job_id))
            if job.req_id not in self._stale_requests:
                keys = self._without_some_blocks(keys, job.src_spec)
            if keys:
                self._incomplete[job_id] = keys

    def ran_at_reset(self, requests: Iterable[str]) -> None:
        """Note requests that have blocks of the engine while the tier is reset.

        vLLM then stores all their chunks anew, by block numbers that it has noted before. Blocks
        that a window has left behind may have been given to other requests meanwhile, so what these
        requests store must not be found.
        """
        self._stale_requests.update(requests)

    def finished(self, requests: Collection[str]) -> None:
        """Note requests that have stored all they ever will."""
        self._stale_requests.difference_update(requests)

    def _without_some_blocks(
        self, keys: Sequence[OffloadKey], blocks: GPULoadStoreSpec
    ) -> list[OffloadKey]:
        """The chunks of a store some of whose blocks the engine has let go of.

        A window has moved on, or its blocks were never in the engine, or have been given to another
        request. Another request may need them, and vLLM would load what happens to be in their
        place. Where not the first blocks of a group's first chunk are missing, the job does not say
        which are, and the blocks behind them have been stored in wrong places: then no chunk of the
        group is complete.
        """
        found: list[OffloadKey] = []
        n = self._blocks_per_chunk
        if n == 1:
            return found
        by_group = [list(of_group) for _, of_group in groupby(keys, get_offload_group_idx)]
        sizes = [
            (needs_whole, size, first % n)
            for needs_whole, size, first in zip(
                self._needs_whole, blocks.group_sizes, blocks.block_indices, strict=False
            )
            if size
        ]
        if len(by_group) != len(sizes):
            return list(keys)
        for of_group, (needs_whole, size, num_missing) in zip(by_group, sizes, strict=True):
            if size != n * len(of_group) - num_missing:
                found += of_group
            elif needs_whole and num_missing:
                found.append(of_group[0])
        return found

    def incomplete(self, job_id: int) -> list[OffloadKey]:
        """The chunks of a job that lack blocks, and must not be found."""
        return self._incomplete.get(job_id, [])

    def of_job(self, job_id: int) -> tuple[OffloadKey, ...]:
        """The keys of a job that is under way; none if it is unknown."""
        return self._by_job.get(job_id, ())

    def ended(self, completed_jobs: Mapping[int, int]) -> None:
        """Note how many workers have reported the end of jobs; forget those that all have."""
        for job_id, count in completed_jobs.items():
            reports = self._reports.pop(job_id, 0) + count
            if reports < self._num_workers and job_id in self._by_job:
                self._reports[job_id] = reports
            else:
                self._by_job.pop(job_id, None)
                self._incomplete.pop(job_id, None)

    def clear(self) -> None:
        """Forget all jobs: what they report from now on is stale."""
        self._by_spec.clear()
        self._by_job.clear()
        self._incomplete.clear()
        self._reports.clear()


class ForgetfulManager:
    """One of vLLM's managers that can be told that chunks are not to be used.

    A failed store is completed as one, and a chunk that could not be loaded is missed until it is
    stored anew, so that the request that waits for it computes its tokens. Every other call goes to
    the manager itself.

    Args:
        manager: vLLM's manager.
    """

    def __init__(self, manager: OffloadingManager) -> None:
        self._manager = manager
        self._pending: set[OffloadKey] = set()
        self._failed: set[OffloadKey] = set()
        self._missed: set[OffloadKey] = set()

    def __getattr__(self, name: str) -> Any:
        """What the manager has."""
        return getattr(self._manager, name)

    def forget(self, keys: Iterable[OffloadKey]) -> None:
        """Do not find these chunks any more. Those that are being stored are dropped at the end."""
        for key in keys:
            (self._failed if key in self._pending else self._missed).add(key)

    def note_pinned_share(self, share: float) -> None:
        """VLLM has no metric of it."""

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """As the manager, except for forgotten chunks."""
        if key in self._missed:
            return LookupResult.MISS
        return self._manager.lookup(key, req_context)

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """As the manager."""
        output = self._manager.prepare_store(keys, req_context)
        if output is not None:
            self._missed.difference_update(output.evicted_keys, output.keys_to_store)
            self._pending.update(output.keys_to_store)
        return output

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        """As the manager; a store with a forgotten chunk has failed."""
        self._pending.difference_update(keys)
        if not self._failed.isdisjoint(keys):
            self._failed.difference_update(keys)
            success = False
        self._manager.complete_store(keys, req_context, success)

    def reset_cache(self) -> None:
        """As the manager."""
        self._manager.reset_cache()
        for keys in (self._pending, self._failed, self._missed):
            keys.clear()
