"""kvheap: a batched heap for KV-cache blocks.

One flat buffer, a free list on the host that hands out addresses in batches, and kernels that
move thousands of KV blocks into or out of the buffer with one launch.

Names are loaded when first used, so that a process that only manages addresses (a scheduler)
never imports torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvheap.addresses.address_batch import AddressBatch as AddressBatch
    from kvheap.addresses.address_manager import AddressManager as AddressManager
    from kvheap.addresses.block_runs import BlockRuns as BlockRuns
    from kvheap.addresses.block_runs import MemorySegment as MemorySegment
    from kvheap.addresses.heap_stats import HeapStats as HeapStats
    from kvheap.blocks.batch_lease import BatchLease as BatchLease
    from kvheap.blocks.batch_slice import BatchSlice as BatchSlice
    from kvheap.blocks.block_layout import BlockLayout as BlockLayout
    from kvheap.blocks.lease import Lease as Lease
    from kvheap.blocks.memory_allocator import HeapOptions as HeapOptions
    from kvheap.blocks.memory_allocator import MemoryAllocatorInterface as MemoryAllocatorInterface
    from kvheap.blocks.memory_batch import BytesBufferMemoryObj as BytesBufferMemoryObj
    from kvheap.blocks.memory_batch import MemoryBatch as MemoryBatch
    from kvheap.blocks.memory_batch import MemoryObj as MemoryObj
    from kvheap.blocks.memory_format import MemoryFormat as MemoryFormat
    from kvheap.blocks.memory_metadata import MemoryBatchMetadata as MemoryBatchMetadata
    from kvheap.blocks.memory_metadata import MemoryObjMetadata as MemoryObjMetadata
    from kvheap.blocks.report import FullReport as FullReport
    from kvheap.blocks.report import LiveBlocks as LiveBlocks
    from kvheap.blocks.report import log_full_report as log_full_report
    from kvheap.engine.chunks import load as load
    from kvheap.engine.chunks import store as store
    from kvheap.errors import BlockInUseError as BlockInUseError
    from kvheap.errors import ClosedError as ClosedError
    from kvheap.errors import DoubleFreeError as DoubleFreeError
    from kvheap.errors import ForeignObjectError as ForeignObjectError
    from kvheap.errors import ForeignProcessError as ForeignProcessError
    from kvheap.errors import HeapCorruptionError as HeapCorruptionError
    from kvheap.errors import InUseError as InUseError
    from kvheap.errors import InvalidFreeError as InvalidFreeError
    from kvheap.errors import LifetimeError as LifetimeError
    from kvheap.errors import MismatchError as MismatchError
    from kvheap.errors import NegativeBatchSizeError as NegativeBatchSizeError
    from kvheap.errors import OutOfMemoryError as OutOfMemoryError
    from kvheap.errors import ReentrantCallError as ReentrantCallError
    from kvheap.errors import TransferError as TransferError
    from kvheap.errors import WriteAfterFreeError as WriteAfterFreeError
    from kvheap.heaps.allocator_stats import AllocatorStats as AllocatorStats
    from kvheap.heaps.device_allocators import GPUMemoryAllocator as GPUMemoryAllocator
    from kvheap.heaps.host_allocators import HostMemoryAllocator as HostMemoryAllocator
    from kvheap.heaps.host_allocators import PinMemoryAllocator as PinMemoryAllocator
    from kvheap.heaps.lazy_allocator import LazyMemoryAllocator as LazyMemoryAllocator
    from kvheap.heaps.mixed_allocator import MixedMemoryAllocator as MixedMemoryAllocator
    from kvheap.heaps.paged_allocator import (
        PagedTensorMemoryAllocator as PagedTensorMemoryAllocator,
    )
    from kvheap.heaps.plain_allocators import AdHocMemoryAllocator as AdHocMemoryAllocator
    from kvheap.heaps.plain_allocators import BufferAllocator as BufferAllocator
    from kvheap.heaps.tensor_allocator import TensorMemoryAllocator as TensorMemoryAllocator
    from kvheap.kernels.paged_layout import LayoutError as LayoutError
    from kvheap.kernels.paged_layout import PagedKVCache as PagedKVCache
    from kvheap.kernels.paged_slots import BlockIds as BlockIds
    from kvheap.kernels.warm_up import warm_up as warm_up
    from kvheap.memory.growth import GrowthProgress as GrowthProgress
    from kvheap.memory.host_memory import HostBuffer as HostBuffer
    from kvheap.memory.numa import numa_node_of_gpu as numa_node_of_gpu
    from kvheap.prefix.index import PrefixIndex as PrefixIndex
    from kvheap.prefix.store import PrefixStore as PrefixStore
    from kvheap.shared.shared_heap import SharedHeap as SharedHeap
    from kvheap.snapshots.heap_snapshot import HeapSnapshot as HeapSnapshot
    from kvheap.transfer import Transfer as Transfer
    from kvheap.transfer import foreign_transfer as foreign_transfer
    from kvheap.transfer import offload as offload
    from kvheap.transfer import restore as restore
    from kvheap.transfer.plan import CopyPlan as CopyPlan

__version__ = "0.2.0"

_MODULE_OF = {
    "AdHocMemoryAllocator": "heaps.plain_allocators",
    "AddressBatch": "addresses.address_batch",
    "AddressManager": "addresses.address_manager",
    "AllocatorStats": "heaps.allocator_stats",
    "BatchLease": "blocks.batch_lease",
    "BatchSlice": "blocks.batch_slice",
    "BlockIds": "kernels.paged_slots",
    "BlockInUseError": "errors",
    "BlockRuns": "addresses.block_runs",
    "BlockLayout": "blocks.block_layout",
    "BufferAllocator": "heaps.plain_allocators",
    "BytesBufferMemoryObj": "blocks.memory_batch",
    "ClosedError": "errors",
    "CopyPlan": "transfer.plan",
    "DoubleFreeError": "errors",
    "ForeignObjectError": "errors",
    "ForeignProcessError": "errors",
    "FullReport": "blocks.report",
    "GPUMemoryAllocator": "heaps.device_allocators",
    "GrowthProgress": "memory.growth",
    "HeapCorruptionError": "errors",
    "HeapOptions": "blocks.memory_allocator",
    "HeapSnapshot": "snapshots.heap_snapshot",
    "HeapStats": "addresses.heap_stats",
    "HostBuffer": "memory.host_memory",
    "HostMemoryAllocator": "heaps.host_allocators",
    "InUseError": "errors",
    "InvalidFreeError": "errors",
    "LayoutError": "kernels.paged_layout",
    "LazyMemoryAllocator": "heaps.lazy_allocator",
    "Lease": "blocks.lease",
    "LifetimeError": "errors",
    "LiveBlocks": "blocks.report",
    "MemoryAllocatorInterface": "blocks.memory_allocator",
    "MemoryBatch": "blocks.memory_batch",
    "MemoryBatchMetadata": "blocks.memory_metadata",
    "MemoryFormat": "blocks.memory_format",
    "MemoryObj": "blocks.memory_batch",
    "MemoryObjMetadata": "blocks.memory_metadata",
    "MemorySegment": "addresses.block_runs",
    "MismatchError": "errors",
    "MixedMemoryAllocator": "heaps.mixed_allocator",
    "NegativeBatchSizeError": "errors",
    "OutOfMemoryError": "errors",
    "PagedKVCache": "kernels.paged_layout",
    "PagedTensorMemoryAllocator": "heaps.paged_allocator",
    "PinMemoryAllocator": "heaps.host_allocators",
    "PrefixIndex": "prefix.index",
    "PrefixStore": "prefix.store",
    "ReentrantCallError": "errors",
    "SharedHeap": "shared.shared_heap",
    "TensorMemoryAllocator": "heaps.tensor_allocator",
    "Transfer": "transfer",
    "TransferError": "errors",
    "WriteAfterFreeError": "errors",
    "foreign_transfer": "transfer",
    "load": "engine.chunks",
    "log_full_report": "blocks.report",
    "numa_node_of_gpu": "memory.numa",
    "offload": "transfer",
    "restore": "transfer",
    "store": "engine.chunks",
    "warm_up": "kernels.warm_up",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kvheap' has no attribute {name!r}")
    value = getattr(import_module(f"kvheap.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if os.environ.get("KVHEAP_NVTX", "") not in ("", "0"):
    import_module("kvheap.nvtx").enable_by_environment()
