"""What vLLM makes a tier from: ``KVHeapOffloadingSpec``, and ``KVHeapTieringSpec`` for more tiers.

Named by ``spec_name`` and ``spec_module_path`` in ``kv_connector_extra_config``, under
``KVHeapConnector``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.gpu_worker import pin_mmap_region
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvheap.integrations.vllm.chunk_memory import (
    ChunkMemory,
    FileMemory,
    HeapMemory,
    RegionMemory,
)
from kvheap.integrations.vllm.failures import ForgetfulManager
from kvheap.integrations.vllm.groups import ChunkGroup
from kvheap.integrations.vllm.heap_label import HeapReport
from kvheap.integrations.vllm.manager import CONFIG_INFO_KEYS, KVHeapManager
from kvheap.integrations.vllm.metrics import build_metric_definitions
from kvheap.integrations.vllm.pages import GroupPages
from kvheap.integrations.vllm.restart import RestartIndex
from kvheap.integrations.vllm.settings import TierSettings
from kvheap.integrations.vllm.shared_memory import SharedMemory
from kvheap.integrations.vllm.worker import KVHeapWorker, device_of, group_pages

__all__ = ["GROUPS_KEY", "IDENTITY_KEY", "KVHeapOffloadingSpec", "KVHeapTieringSpec"]

GROUPS_KEY = "kvheap.groups"
"""Where ``KVHeapConnector`` puts the groups, in the spec's ``extra_config``."""

IDENTITY_KEY = "kvheap.identity"
"""Where it puts what an index and an engine must have in common."""

OWN_MEMORY = "vLLM's tiers share memory of their own; use KVHeapOffloadingSpec"

UNFIT_FOR_TIERS = {
    **dict.fromkeys(("heap_path", "huge_pages", "numa_node", "index_path"), OWN_MEMORY),
    "canonical_layout": "kvheap keeps pages as the workers have them",
    "sync_load_budget_bytes": "kvheap's loads are asynchronous",
}
"""Keys that ``KVHeapTieringSpec`` refuses, and why."""


class KVHeapOffloadingSpec(OffloadingSpec):  # type: ignore[misc,unused-ignore]
    """A tier in a heap of each worker, in which a chunk takes the bytes of its own group.

    Args:
        config: vLLM's, with the groups that ``KVHeapConnector`` adds.

    Raises:
        ValueError: a key or value of ``kv_connector_extra_config`` is wrong, or another connector
            uses the spec; the message names the key.
    """

    needs_groups = True
    """Whether ``KVHeapConnector`` is to tell the bytes of each group."""

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """The tier's own metrics, for Prometheus."""
        return build_metric_definitions(extra_config)

    @classmethod
    def config_info_keys(cls, extra_config: dict[str, Any]) -> tuple[str, ...]:
        """Labels of what does not change, which vLLM 0.33 publishes."""
        return CONFIG_INFO_KEYS

    @classmethod
    def require_settings(cls, extra_config: Mapping[str, Any], world_size: int) -> TierSettings:
        """The settings of the tier.

        Raises:
            ValueError: a key or value is wrong; the message names the key.
        """
        return TierSettings.of(extra_config, world_size)

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        given = dict(self.extra_config)
        groups = given.pop(GROUPS_KEY, None)
        self._identity: dict[str, str] = given.pop(IDENTITY_KEY, {})
        if groups is None:
            raise ValueError(
                'kv_connector must be "KVHeapConnector" (with "kv_connector_module_path": '
                '"kvheap.integrations.vllm") for KVHeapOffloadingSpec: the bytes of each KV cache '
                "group are known to it only"
            )
        self.replicated_layout = shares_heap(config)
        num_heaps = 1 if self.replicated_layout else config.parallel.world_size
        self.settings = replace(
            self.require_settings(given, num_heaps),
            blocks_per_chunk=self.blocks_per_chunk,  # 'block_size' may have said it in tokens
        )
        self.groups: tuple[ChunkGroup, ...] = tuple(groups)
        require_room(self.groups, self.settings, num_heaps)
        self._manager: KVHeapManager | None = None
        self._worker: KVHeapWorker | None = None

    def get_manager(self) -> OffloadingManager:
        """The scheduler's half of the tier; the same one at each call.

        Raises:
            BlockingIOError: another engine has the index.
            OSError: the index cannot be written where it is to be.
        """
        if self._manager is None:
            self._manager = KVHeapManager(
                self.groups, self.settings, self.kv_events_config, self._index()
            )
        return self._manager

    def _index(self) -> RestartIndex | None:
        settings = self.settings
        if settings.index_path is None or settings.heap_path is None:
            return None
        identity = self._identity | {
            "heap_path": f"{os.path.abspath(settings.heap_path)}{self._replica}",
            "bytes of a heap": str(settings.heap_bytes),
        }
        path = f"{settings.index_path}{self._replica}"
        return RestartIndex(path, identity, self.config.parallel.world_size)

    @property
    def _replica(self) -> str:
        """What the names of a data-parallel replica's files end in. The first may be the only."""
        parallel = self.config.parallel
        # vLLM makes the replicas of a dense model engines of their own, of which each is one of 1.
        is_one_of_many = parallel.data_parallel_size > 1 or parallel.data_parallel_index > 0
        return f".dp{parallel.data_parallel_index}" if is_one_of_many else ""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker's half of the tier; the same one at each call.

        Raises:
            ValueError: the engine's tensors need more bytes than the scheduler allocates, or their
                device is neither a CPU nor CUDA's.
            OSError: the system does not provide the memory.
        """
        if self._worker is None:
            pages = group_pages(kv_caches, self.blocks_per_chunk, self.groups)
            require_same_bytes(pages, self.groups)
            memory = self._memory(is_pinned=device_of(kv_caches).type == "cuda")
            self._worker = KVHeapWorker(kv_caches, memory, self.blocks_per_chunk, pages)
        return self._worker

    def report_heap(self, layout: str) -> HeapReport | None:
        """What the scheduler must know of the worker's heap; None if there is no index.

        From the first call on, the bytes that were in the heap belong to no other index.

        Args:
            layout: how the pages of the worker's KV cache are laid out.
        """
        memory = None if self._worker is None else self._worker.memory
        if self.settings.index_path is None or not isinstance(memory, FileMemory):
            return None
        label = memory.label
        label.renew()
        return HeapReport(
            self.config.parallel.rank,
            memory.path,
            label.previous,
            label.why,
            label.current,
            layout,
        )

    def _memory(self, is_pinned: bool) -> ChunkMemory:
        settings, parallel = self.settings, self.config.parallel
        if self.replicated_layout:
            return SharedMemory(
                settings.heap_bytes,
                _from_first_worker,
                is_first=parallel.rank == 0,
                pin=is_pinned,
                huge_pages=settings.huge_pages,
                numa_node=settings.numa_node,
            )
        if settings.heap_path is None:
            return HeapMemory(
                settings.heap_bytes,
                pin=is_pinned,
                huge_pages=settings.huge_pages,
                numa_node=settings.numa_node,
            )
        return FileMemory(
            f"{settings.heap_path}{self._replica}.{self.config.parallel.rank}",
            settings.heap_bytes,
            pin=is_pinned,
            huge_pages=settings.huge_pages,
            numa_node=settings.numa_node,
            is_indexed=settings.index_path is not None,
        )


def shares_heap(config: OffloadingConfig) -> bool:
    """Whether the workers, whose caches hold the same bytes, have one heap, filled by the first.

    As vLLM's own tier: of latent attention under tensor parallelism, in processes of one machine.
    A heap in a file or in explicit huge pages is one worker's.
    """
    extra = config.extra_config
    has_own = extra.get("heap_path") is not None or extra.get("huge_pages") == "explicit"
    return config.replicated_layout and not has_own


def _from_first_worker(path: str | None) -> str:
    """What the first worker says; every worker asks once."""
    said: str = get_tp_group().broadcast_object(path, src=0)
    return said


class KVHeapTieringSpec(TieringOffloadingSpec):  # type: ignore[misc,unused-ignore]
    """vLLM's tiers behind host memory (disk, object store, peers), with kvheap's copies.

    vLLM's tiers address host memory by slots of one size, so a chunk takes a whole slot here. The
    bytes of a slot are where vLLM's own worker puts them: both read the other's files.
    """

    needs_groups = False

    @classmethod
    def require_settings(cls, extra_config: Mapping[str, Any], world_size: int) -> None:
        """Refuse what this spec cannot do. vLLM's own checks of the rest follow.

        Raises:
            ValueError: names the key.
        """
        for key, why in UNFIT_FOR_TIERS.items():
            if extra_config.get(key):
                raise ValueError(
                    f"kv_connector_extra_config has the key {key!r}, which KVHeapTieringSpec does "
                    f"not take: {why}"
                )

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self._forgetful: ForgetfulManager | None = None
        self._kvheap_worker: KVHeapWorker | None = None

    def get_manager(self) -> Any:
        """VLLM's manager of tiers, which can be told of failed copies."""
        if self._forgetful is None:
            self._forgetful = ForgetfulManager(super().get_manager())
        return self._forgetful

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker, over the region that the tiers share; the same one at each call.

        Raises:
            ValueError: as for ``KVHeapOffloadingSpec``.
        """
        if self._kvheap_worker is None:
            device = device_of(kv_caches)
            pages = slot_pages(kv_caches, self.blocks_per_chunk)
            part = 0 if self.replicated_layout else self.config.parallel.rank
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=part,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            try:
                if device.type == "cuda":
                    pin_mmap_region(region)
                memory = RegionMemory(
                    region, self.kv_bytes_per_chunk, self.cpu_page_size_per_worker, part
                )
                self._kvheap_worker = KVHeapWorker(kv_caches, memory, self.blocks_per_chunk, pages)
            except BaseException:
                region.cleanup()  # its file too
                raise
        return self._kvheap_worker


def slot_pages(kv_caches: CanonicalKVCaches, blocks_per_chunk: int) -> list[GroupPages]:
    """The pages of each group in a slot, in which every unique tensor has its place, padded."""
    places, at = [], 0
    for tensor in kv_caches.tensors:
        places.append((at, tensor.page_size_bytes))
        at += tensor.page_size_bytes * blocks_per_chunk
    return [
        GroupPages.of(
            [kv_caches.tensors[ref.tensor_idx].tensor for ref in refs],
            [ref.page_size_bytes for ref in refs],
            blocks_per_chunk,
            [places[ref.tensor_idx] for ref in refs],
        )
        for refs in kv_caches.group_data_refs
    ]


def require_room(groups: tuple[ChunkGroup, ...], settings: TierSettings, num_heaps: int) -> None:
    """Raise unless each heap has room for a chunk of any group.

    Raises:
        ValueError: names the key.
    """
    largest = max(groups, key=lambda group: group.allocated_bytes)
    if largest.allocated_bytes > settings.heap_bytes:
        raise ValueError(
            f"kv_connector_extra_config['cpu_bytes_to_use'] gives each of {num_heaps} heaps "
            f"{settings.heap_bytes} bytes, a chunk of {largest.name} takes "
            f"{largest.allocated_bytes}: give at least {num_heaps * largest.allocated_bytes} "
            f"bytes, or fewer 'blocks_per_chunk'"
        )


def require_same_bytes(pages: list[GroupPages], groups: tuple[ChunkGroup, ...]) -> None:
    """Raise unless a worker's chunks have the bytes that the scheduler allocates.

    Raises:
        ValueError: names both.
    """
    worker = [group.chunk_bytes for group in pages]
    scheduler = [group.chunk_bytes for group in groups]
    if worker != scheduler:
        raise ValueError(
            f"chunks of this worker's KV cache groups have {worker} bytes, the scheduler allocates "
            f"{scheduler} for {[group.name for group in groups]}: this model's cache is not "
            f"supported"
        )
