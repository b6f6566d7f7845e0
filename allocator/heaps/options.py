"""Checks of a heap's options, before anything is allocated for it."""

from __future__ import annotations

from typing import Any

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.arguments import as_number, as_seconds, require_count, require_flags
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout

__all__ = ["require_heap_options", "require_size", "require_units"]


def require_heap_options(
    *,
    page_layout: Any,
    address_manager: Any,
    idempotent_free: Any,
    scrub: Any,
    debug: Any,
    trace_frames: Any,
    stream_wait_s: Any,
    on_full_interval_s: Any,
    view_only: Any,
) -> None:
    """Raise if an option of ``TensorMemoryAllocator`` has a wrong type or is out of range.

    Raises:
        TypeError, ValueError: names the option and its value.
    """
    if page_layout is not None and not isinstance(page_layout, BlockLayout):
        raise TypeError(
            f"page_layout must be a BlockLayout, got {page_layout!r}: make one with "
            f"BlockLayout.of(shapes, dtypes, fmt)"
        )
    if address_manager is not None and not isinstance(address_manager, AddressManager):
        raise TypeError(f"address_manager must be an AddressManager, got {address_manager!r}")
    require_flags(idempotent_free=idempotent_free, scrub=scrub)
    if debug is not None:
        require_flags(debug=debug)
    if view_only is not None:
        require_flags(view_only=view_only)
    if trace_frames is not None:
        require_count("trace_frames", trace_frames)
    as_number("stream_wait_s", stream_wait_s)
    as_seconds("on_full_interval_s", on_full_interval_s)


def require_size(size: Any, align_bytes: Any, page_layout: Any) -> int:
    """The bytes of a new heap, which must hold at least one unit.

    Raises:
        TypeError: ``size`` or ``align_bytes`` is not an integer.
        ValueError: ``size`` is too small.
    """
    num_bytes = require_count("size", size, at_least=1)
    unit = page_layout.size_bytes if isinstance(page_layout, BlockLayout) else align_bytes
    require_units("a size", num_bytes, as_integer("align_bytes", unit))
    return num_bytes


def require_units(what: str, num_bytes: int, unit_bytes: int) -> None:
    """Raise if memory makes a heap of no byte: blocks take whole units of its alignment.

    No memory at all is accepted: such a heap is empty on purpose, and may grow.

    Raises:
        ValueError: names what is too small, and the unit.
    """
    if 0 < num_bytes < unit_bytes:
        raise ValueError(
            f"{what} of {num_bytes} bytes makes a heap of 0 bytes: it needs at least "
            f"{unit_bytes}, the bytes to which every block is rounded up (align_bytes, or a page)"
        )
