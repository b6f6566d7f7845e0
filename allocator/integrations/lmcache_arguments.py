"""The keyword arguments of LMCache's allocators, translated to kvheap's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypedDict

import torch

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_format import MemoryFormat

__all__ = [
    "HeapArguments",
    "NUMAMapping",
    "PageArguments",
    "alignment_of",
    "numa_node_of",
    "page_layout_of",
    "refuse_unknown",
    "whole_units",
]


class NUMAMapping(Protocol):
    """The nearest NUMA node of each GPU, as in LMCache's class of this name."""

    @property
    def gpu_to_numa_mapping(self) -> Mapping[int, int]:
        """NUMA node by GPU number."""
        ...


class PageArguments(TypedDict, total=False):
    """The layout of a page, under LMCache's names and its older ones. Unused without paging."""

    shapes: Shapes
    dtypes: Dtypes
    shape: Shapes
    dtype: Dtypes
    fmt: MemoryFormat


class HeapArguments(PageArguments, total=False):
    """The keyword arguments of LMCache's heaps in host memory, besides the size.

    ``align_bytes`` is unused with paging, and ``device`` is always unused. ``shm_name``, whether
    given here or in ``config``, must be None: kvheap shares memory by file descriptor, not by name.
    """

    align_bytes: int
    device: torch.device | str
    numa_mapping: NUMAMapping | None
    shm_name: str | None
    config: Any


def page_layout_of(use_paging: bool, arguments: PageArguments) -> BlockLayout | None:
    """The layout of a page; None without paging.

    Raises:
        ValueError: paging is requested, but the shapes, the dtypes or the format are missing.
    """
    if not use_paging:
        return None
    shapes = arguments.get("shapes", arguments.get("shape"))
    dtypes = arguments.get("dtypes", arguments.get("dtype"))
    fmt = arguments.get("fmt")
    if shapes is None or dtypes is None or fmt is None:
        raise ValueError(f"paging needs shapes, dtypes and fmt, got {shapes}, {dtypes} and {fmt}")
    return BlockLayout.of(shapes, dtypes, fmt)


def alignment_of(use_paging: bool, arguments: HeapArguments) -> int:
    """The alignment of a heap in host memory, bytes.

    Raises:
        TypeError: there is an argument that LMCache does not have.
        ValueError: a name for the memory is requested.
    """
    refuse_unknown(arguments, HeapArguments.__annotations__)
    config = arguments.get("config")
    shm_name = arguments.get("shm_name")
    if shm_name is None and config is not None:
        shm_name = config.get_extra_config_value("shm_name", None)
    if shm_name is not None:
        raise ValueError(
            f"kvheap's shared memory has no name, got shm_name {shm_name!r}: share it by file "
            f"descriptor, with kvheap.HostMemoryAllocator(shared=True)"
        )
    default = AddressManager.ALIGN_BYTES
    return default if use_paging else arguments.get("align_bytes", default)


def refuse_unknown(arguments: PageArguments, known: Iterable[str]) -> None:
    """Check that every argument is one of ``known``.

    Raises:
        TypeError: an argument is not known; the message names all such arguments.
    """
    unknown = arguments.keys() - set(known)
    if unknown:
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")


def numa_node_of(arguments: HeapArguments) -> int | None:
    """The NUMA node of the current GPU, or of GPU 0 without CUDA; None without a mapping.

    Raises:
        KeyError: the mapping does not have that GPU.
    """
    mapping = arguments.get("numa_mapping")
    if mapping is None:
        return None
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
    if gpu not in mapping.gpu_to_numa_mapping:
        raise KeyError(f"GPU {gpu} is not in the NUMA mapping {mapping!r}")
    return mapping.gpu_to_numa_mapping[gpu]


def whole_units(size: int, unit_bytes: int) -> int:
    """``size`` rounded up to a multiple of ``unit_bytes``.

    Wrong values are returned unchanged, and the allocator refuses them.

    Raises:
        TypeError: one of the two is not an integer.
    """
    size, unit_bytes = as_integer("size", size), as_integer("align_bytes", unit_bytes)
    return -(-size // unit_bytes) * unit_bytes if size > 0 < unit_bytes else size
