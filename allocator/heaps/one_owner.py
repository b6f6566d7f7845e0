"""``check_one_owner``: no byte of a heap has two owners, or an owner while it is free."""

from __future__ import annotations

import numpy as np

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.extents import Extents, overlap_of
from kvheap.blocks.ledger import Ledger
from kvheap.errors import HeapCorruptionError
from kvheap.guards import is_inside_section, section

__all__ = ["check_one_owner"]


def check_one_owner(manager: AddressManager, ledger: Ledger) -> None:
    """Compare the extents of all live blocks and the free ones. O(blocks + F log F).

    Inside an operation of the same thread, this checks nothing.

    Raises:
        HeapCorruptionError: bytes are owned twice, or owned and free.
    """
    found = _extents(manager, ledger)
    if found is not None:
        _require_one_owner(*found)


@section
def _extents(manager: AddressManager, ledger: Ledger) -> tuple[Extents, Extents] | None:
    """Those of live blocks and the free ones, at one moment; None inside an operation."""
    guard = manager.guard
    if guard.busy and is_inside_section():
        return None
    with guard.lock:
        guard.busy = True
        if ledger.begun or ledger.allocation.done:
            ledger.finish()
        owned, free = ledger.extents(), manager.space.free_extents()
        guard.busy = False
    return owned, free


def _require_one_owner(owned: Extents, free: Extents) -> None:
    """Raise if bytes are owned twice, or owned and free.

    Args:
        owned: extents of blocks, in address order.
        free: the free extents, disjoint and in address order.

    Raises:
        HeapCorruptionError: names the first such block.
    """
    overlaps = np.flatnonzero(owned.ends[:-1] > owned.starts[1:])
    if len(overlaps):
        at = int(overlaps[0])
        raise HeapCorruptionError(
            f"two live blocks own the same bytes: those at [{owned.starts[at]}, {owned.ends[at]}) "
            f"and [{owned.starts[at + 1]}, {owned.ends[at + 1]})"
        )
    overlap = overlap_of(free, owned) if len(owned.starts) else None
    if overlap is not None:
        extent, block = overlap
        raise HeapCorruptionError(
            f"the live block at [{owned.starts[block]}, {owned.ends[block]}) is in the free extent "
            f"[{free.starts[extent]}, {free.ends[extent]})"
        )
