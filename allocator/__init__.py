"""kvheap: a batched heap for KV-cache blocks.

One flat buffer, a free list on the host that hands out addresses in batches, and kernels that
move thousands of KV blocks into or out of the buffer with one launch.

Names are loaded when first used, so that a process that only manages addresses (a scheduler)
never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvheap.address_batch import AddressBatch as AddressBatch
    from kvheap.address_manager import AddressManager as AddressManager
    from kvheap.address_manager import HeapStats as HeapStats
    from kvheap.block_layout import BlockLayout as BlockLayout
    from kvheap.copy_plan import CopyPlan as CopyPlan
    from kvheap.device_allocators import GPUMemoryAllocator as GPUMemoryAllocator
    from kvheap.errors import BlockInUseError as BlockInUseError
    from kvheap.errors import ClosedError as ClosedError
    from kvheap.errors import DoubleFreeError as DoubleFreeError
    from kvheap.errors import ForeignObjectError as ForeignObjectError
    from kvheap.errors import HeapCorruptionError as HeapCorruptionError
    from kvheap.errors import InvalidFreeError as InvalidFreeError
    from kvheap.errors import LifetimeError as LifetimeError
    from kvheap.errors import NegativeBatchSizeError as NegativeBatchSizeError
    from kvheap.errors import OutOfMemoryError as OutOfMemoryError
    from kvheap.errors import TransferError as TransferError
    from kvheap.errors import WriteAfterFreeError as WriteAfterFreeError
    from kvheap.growth import GrowthProgress as GrowthProgress
    from kvheap.host_allocators import HostMemoryAllocator as HostMemoryAllocator
    from kvheap.host_allocators import MixedMemoryAllocator as MixedMemoryAllocator
    from kvheap.host_allocators import PinMemoryAllocator as PinMemoryAllocator
    from kvheap.host_memory import HostBuffer as HostBuffer
    from kvheap.host_memory import numa_node_of_gpu as numa_node_of_gpu
    from kvheap.kernels.paged_layout import LayoutError as LayoutError
    from kvheap.kernels.paged_layout import PagedKVCache as PagedKVCache
    from kvheap.kernels.paged_slots import BlockIds as BlockIds
    from kvheap.lazy_allocator import LazyMemoryAllocator as LazyMemoryAllocator
    from kvheap.lifetime import FullReport as FullReport
    from kvheap.lifetime import Lease as Lease
    from kvheap.lifetime import LiveBlocks as LiveBlocks
    from kvheap.memory_allocator import HeapOptions as HeapOptions
    from kvheap.memory_allocator import MemoryAllocatorInterface as MemoryAllocatorInterface
    from kvheap.memory_batch import MemoryBatch as MemoryBatch
    from kvheap.memory_format import MemoryFormat as MemoryFormat
    from kvheap.memory_metadata import MemoryBatchMetadata as MemoryBatchMetadata
    from kvheap.memory_metadata import MemoryObjMetadata as MemoryObjMetadata
    from kvheap.memory_object import BytesBufferMemoryObj as BytesBufferMemoryObj
    from kvheap.memory_object import MemoryObj as MemoryObj
    from kvheap.paged_allocator import PagedTensorMemoryAllocator as PagedTensorMemoryAllocator
    from kvheap.paged_batches import load as load
    from kvheap.paged_batches import store as store
    from kvheap.plain_allocators import AdHocMemoryAllocator as AdHocMemoryAllocator
    from kvheap.plain_allocators import BufferAllocator as BufferAllocator
    from kvheap.tensor_allocator import AllocatorStats as AllocatorStats
    from kvheap.tensor_allocator import TensorMemoryAllocator as TensorMemoryAllocator
    from kvheap.transfer import Transfer as Transfer
    from kvheap.transfer import offload as offload
    from kvheap.transfer import restore as restore

__version__ = "0.1.0"

_MODULE_OF = {
    "AdHocMemoryAllocator": "plain_allocators",
    "AddressBatch": "address_batch",
    "AddressManager": "address_manager",
    "AllocatorStats": "tensor_allocator",
    "BlockIds": "kernels.paged_slots",
    "BlockInUseError": "errors",
    "BlockLayout": "block_layout",
    "BufferAllocator": "plain_allocators",
    "BytesBufferMemoryObj": "memory_object",
    "ClosedError": "errors",
    "CopyPlan": "copy_plan",
    "DoubleFreeError": "errors",
    "ForeignObjectError": "errors",
    "FullReport": "lifetime",
    "GPUMemoryAllocator": "device_allocators",
    "GrowthProgress": "growth",
    "HeapCorruptionError": "errors",
    "HeapOptions": "memory_allocator",
    "HeapStats": "address_manager",
    "HostBuffer": "host_memory",
    "HostMemoryAllocator": "host_allocators",
    "InvalidFreeError": "errors",
    "LayoutError": "kernels.paged_layout",
    "LazyMemoryAllocator": "lazy_allocator",
    "Lease": "lifetime",
    "LifetimeError": "errors",
    "LiveBlocks": "lifetime",
    "MemoryAllocatorInterface": "memory_allocator",
    "MemoryBatch": "memory_batch",
    "MemoryBatchMetadata": "memory_metadata",
    "MemoryFormat": "memory_format",
    "MemoryObj": "memory_object",
    "MemoryObjMetadata": "memory_metadata",
    "MixedMemoryAllocator": "host_allocators",
    "NegativeBatchSizeError": "errors",
    "OutOfMemoryError": "errors",
    "PagedKVCache": "kernels.paged_layout",
    "PagedTensorMemoryAllocator": "paged_allocator",
    "PinMemoryAllocator": "host_allocators",
    "TensorMemoryAllocator": "tensor_allocator",
    "Transfer": "transfer",
    "TransferError": "errors",
    "WriteAfterFreeError": "errors",
    "load": "paged_batches",
    "numa_node_of_gpu": "host_memory",
    "offload": "transfer",
    "restore": "transfer",
    "store": "paged_batches",
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
