"""``HeapStats``: the counters of an address space at one moment."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HeapStats"]


@dataclass(frozen=True, slots=True)
class HeapStats:
    """The heap at one moment; all fields in bytes, except ``free_extents``, which is a count."""

    heap_bytes: int
    allocated_bytes: int
    free_bytes: int
    largest_free_bytes: int
    free_extents: int

    @property
    def utilization(self) -> float:
        """Allocated bytes divided by heap bytes, 0.0 to 1.0; 1.0 for a heap of no bytes."""
        return self.allocated_bytes / self.heap_bytes if self.heap_bytes else 1.0
