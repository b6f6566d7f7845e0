"""``KVHeapConnector``: vLLM's offloading connector, under which a failed copy costs a computation.

vLLM's own ends the engine when a transfer fails. Here the failed jobs of each step go to the
scheduler with the step's other results; their chunks are forgotten, and the requests that waited
for them compute their tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from kvheap.integrations.vllm.failures import JobKeys, TolerantWorker, WorkerReport
from kvheap.integrations.vllm.geometry import groups_of, needs_whole_chunks, require_places
from kvheap.integrations.vllm.heap_label import HeapReport
from kvheap.integrations.vllm.identity import identity_of, layout_of
from kvheap.integrations.vllm.spec import (
    GROUPS_KEY,
    IDENTITY_KEY,
    KVHeapOffloadingSpec,
    KVHeapTieringSpec,
)

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput

__all__ = ["KVHeapConnector"]

PACKAGE = "kvheap.integrations.vllm"

INSTEAD: dict[str, type] = {
    "CPUOffloadingSpec": KVHeapOffloadingSpec,
    "TieringOffloadingSpec": KVHeapTieringSpec,
    "KVHeapOffloadingSpec": KVHeapOffloadingSpec,
    "KVHeapTieringSpec": KVHeapTieringSpec,
}
"""By the name of a spec, kvheap's of the kind; the first is vLLM's default."""


@dataclass
class WorkerHeap(KVConnectorHandshakeMetadata):  # type: ignore[misc,unused-ignore]
    """What a worker tells the scheduler at start.

    Attributes:
        report: about its heap.
    """

    report: HeapReport


class KVHeapConnector(OffloadingConnector):  # type: ignore[misc,unused-ignore]
    """Offloads KV to a kvheap tier; see the package.

    Args:
        vllm_config: vLLM's; its ``kv_transfer_config`` selects this connector.
        role: the scheduler's half or a worker's.
        kv_cache_config: the engine's KV cache.

    Raises:
        ValueError: the configuration is wrong; the message names the key.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        require_recompute(vllm_config)
        vllm_config = with_spec(vllm_config)
        if require_spec(vllm_config).needs_groups:
            vllm_config = with_groups(vllm_config, kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._engine_caches = kv_cache_config
        self._request_of_load: dict[int, str] = {}
        self._worker: TolerantWorker | None = None
        self._layout = ""
        self._failed_jobs: set[int] = set()
        self._running: set[str] = set()
        self._jobs: JobKeys | None = None
        if self.connector_scheduler is not None:
            manager = self.connector_scheduler.manager
            self._jobs = JobKeys(
                manager,
                vllm_config.parallel_config.world_size,
                build_offloading_config(vllm_config, kv_cache_config).cache.blocks_per_chunk,
                needs_whole_chunks(kv_cache_config),
            )
            self.connector_scheduler.manager = self._jobs

    # -- worker's side ---------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Make the worker over the engine's tensors.

        Raises:
            ValueError: the tensors are not as the configuration says.
        """
        require_places(self._engine_caches, kv_caches)
        super().register_kv_caches(kv_caches)
        half = self.connector_worker
        assert half is not None
        assert half.worker is not None
        self._worker = half.worker = TolerantWorker(half.worker)
        self._layout = layout_of(kv_caches, half.kv_cache_config.num_blocks)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler learns at start, if there is an index: which bytes are in the heap."""
        spec = None if self.connector_worker is None else self.connector_worker.spec
        if isinstance(spec, KVHeapOffloadingSpec):
            report = spec.report_heap(self._layout)
            if report is not None:
                return WorkerHeap(report)
        return super().get_handshake_metadata()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take the jobs of a step from the scheduler."""
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, OffloadingConnectorMetadata):
            for job_id, job in connector_metadata.load_jobs.items():
                self._request_of_load[job_id] = job.req_id

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The requests whose loads have ended since the last call, and those whose loads failed."""
        results = super().get_transfer_results(finished_req_ids)
        if self._worker is None:
            return results
        failed = self._worker.take_failed()
        self._failed_jobs |= failed
        results.failed_recving |= {
            self._request_of_load[job_id] for job_id in failed if job_id in self._request_of_load
        }
        return results

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        """What the scheduler learns of this step."""
        metadata = super().build_connector_worker_meta()
        if metadata is None:
            return None
        failed, self._failed_jobs = self._failed_jobs, set()
        for job_id in metadata.completed_jobs:
            self._request_of_load.pop(job_id, None)
        worker = None if self._worker is None else self._worker.worker
        memory = getattr(worker, "memory", None)
        return WorkerReport.of(metadata, failed, getattr(memory, "pinned_share", None))

    # -- scheduler's side ------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Find the chunks of an earlier process, by what the workers say of their heaps."""
        reports = [each.report for each in metadata.values() if isinstance(each, WorkerHeap)]
        if reports and self._jobs is not None:
            self._jobs.restore_index(reports)
        else:
            super().set_xfer_handshake_metadata_pp_aware(metadata)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The jobs that the workers begin in this step."""
        metadata = super().build_connector_meta(scheduler_output)
        if self._jobs is not None and isinstance(metadata, OffloadingConnectorMetadata):
            self._jobs.begun(metadata)
            self._jobs.finished(scheduler_output.finished_req_ids)
        self._running.update(request.req_id for request in scheduler_output.scheduled_new_reqs)
        self._running.difference_update(scheduler_output.finished_req_ids)
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take a step's results: what failed is forgotten before its jobs are completed."""
        jobs, metadata = self._jobs, connector_output.kv_connector_worker_meta
        if jobs is not None and isinstance(metadata, OffloadingWorkerMetadata):
            if isinstance(metadata, WorkerReport):
                for job_id in metadata.failed_jobs:
                    jobs.forget(jobs.of_job(job_id))
                if metadata.pinned_share is not None:
                    jobs.note_pinned_share(metadata.pinned_share)
            for job_id in metadata.completed_jobs:
                jobs.forget(jobs.incomplete(job_id))
            jobs.ended(metadata.completed_jobs)
        super().update_connector_output(connector_output)

    def reset_cache(self) -> bool | None:
        """Forget all chunks; what is under way is waited for, and not used."""
        done: bool | None = super().reset_cache()
        if self._jobs is not None:
            self._jobs.clear()
            self._jobs.ran_at_reset(self._running)
        return done

    # -- metrics ---------------------------------------------------------------------------------

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """The metrics that the tier defines, for Prometheus."""
        return super().build_prom_metrics(
            with_spec(vllm_config), metric_types, labelnames, per_engine_labelvalues
        )


def with_spec(vllm_config: VllmConfig) -> VllmConfig:
    """The configuration with kvheap's tier in the place of vLLM's of the same kind.

    So that what was written for vLLM's ``OffloadingConnector`` needs another connector only.
    """
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    name = transfer.kv_connector_extra_config.get("spec_name", "CPUOffloadingSpec")
    if name not in INSTEAD:
        return vllm_config
    named = {"spec_name": INSTEAD[name].__name__, "spec_module_path": PACKAGE}
    return _with_extra(vllm_config, {**transfer.kv_connector_extra_config, **named})


def require_recompute(vllm_config: VllmConfig) -> None:
    """Raise unless a request whose load failed is to compute its tokens.

    Raises:
        ValueError: ``kv_load_failure_policy`` is another.
    """
    config = vllm_config.kv_transfer_config
    policy = None if config is None else config.kv_load_failure_policy
    if policy != "recompute":
        raise ValueError(
            f"kv_load_failure_policy is {policy!r}: KVHeapConnector needs 'recompute', so that a "
            f"failed load costs a computation and not the request; add "
            f'"kv_load_failure_policy": "recompute" to --kv-transfer-config'
        )


def require_spec(vllm_config: VllmConfig) -> type[KVHeapOffloadingSpec | KVHeapTieringSpec]:
    """The class of the tier, whose settings are right.

    Raises:
        ValueError: it is none of kvheap's, or a key or value of its settings is wrong.
    """
    config = vllm_config.kv_transfer_config
    assert config is not None
    extra = config.kv_connector_extra_config
    spec: Any = OffloadingSpecFactory.get_spec_cls(extra)
    if not issubclass(spec, KVHeapOffloadingSpec | KVHeapTieringSpec):
        raise ValueError(
            f"spec_name is {extra.get('spec_name')!r}: KVHeapConnector needs "
            f"'KVHeapOffloadingSpec' (its default) or 'KVHeapTieringSpec', and "
            f'"spec_module_path": "{PACKAGE}"'
        )
    found: type[KVHeapOffloadingSpec | KVHeapTieringSpec] = spec
    found.require_settings(extra, vllm_config.parallel_config.world_size)
    return found


def with_groups(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> VllmConfig:
    """A copy of the configuration whose extra config tells the spec what it does not see.

    The spec sees vLLM's ``OffloadingConfig``, which has no page sizes, and little of the model.

    Raises:
        ValueError: there is an ``index_path``, but block hashes are of no use to another process.
    """
    offloading = build_offloading_config(vllm_config, kv_cache_config)
    groups = groups_of(kv_cache_config, offloading.cache.blocks_per_chunk)
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    extra = {**transfer.kv_connector_extra_config, GROUPS_KEY: groups}
    if extra.get("index_path") is not None:
        extra[IDENTITY_KEY] = identity_of(vllm_config, offloading, groups)
    return _with_extra(vllm_config, extra)


def _with_extra(vllm_config: VllmConfig, extra: dict[str, Any]) -> VllmConfig:
    """A copy of the configuration with this ``kv_connector_extra_config``."""
    config = copy.copy(vllm_config)
    transfer = copy.copy(config.kv_transfer_config)
    assert transfer is not None
    transfer.kv_connector_extra_config = extra
    config.kv_transfer_config = transfer
    return config
