"""A snapshot in words, for a terminal, for a bug report, and for who does not see the picture."""

from __future__ import annotations

import math

from kvheap.snapshots.heap_map import STATES, HeapMap

__all__ = ["age_text", "bytes_text", "headline_of", "notes_of", "summary_of"]

SHOWN_OWNERS = 10


def bytes_text(num_bytes: int) -> str:
    """Bytes in the largest unit of which there is one, such as ``1.5 MiB``."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >> shift:
            return f"{num_bytes / (1 << shift):.4g} {unit}"
    return f"{num_bytes} B"


def age_text(seconds: float) -> str:
    """Seconds as people say them, such as ``3 min``."""
    if math.isnan(seconds):
        return "not known"
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"


def headline_of(snapshot: HeapMap) -> str:
    """One sentence: how much is used, and the largest free extent."""
    free = snapshot.bytes_by_state()["free"]
    share = 1 - free / snapshot.heap_bytes if snapshot.heap_bytes else 1.0
    return (
        f"{snapshot.heap} of {bytes_text(snapshot.heap_bytes)} on {snapshot.device}: {share:.1%} "
        f"in use; {bytes_text(free)} free in {len(snapshot.free_extents):,} extents, the largest "
        f"of {bytes_text(snapshot.largest_free_bytes)}"
    )


def notes_of(snapshot: HeapMap) -> list[str]:
    """What a reader must know about this snapshot."""
    notes = []
    if snapshot.is_view_only:
        notes.append(
            "Another process keeps the books of this heap: the map is that of the fork, or an "
            "empty one if the heap was attached."
        )
    if snapshot.owners and not any(owner.site for owner in snapshot.owners):
        notes.append("Allocation sites were not recorded: make the heap with trace_frames=4.")
    return notes


def summary_of(snapshot: HeapMap) -> str:
    """The map in words, several lines."""
    lines = [headline_of(snapshot)]
    lines.append(f"taken {snapshot.time} in process {snapshot.pid} by kvheap {snapshot.version}")
    for state, num_bytes in snapshot.bytes_by_state().items():
        if num_bytes:
            extents = int((snapshot.states == STATES.index(state)).sum())
            share = num_bytes / snapshot.heap_bytes
            lines.append(
                f"  {state:<12}{bytes_text(num_bytes):>11}  {share:6.1%}  in {extents:,} extents"
            )
    uses = snapshot.uses()
    if uses:
        lines.append("owners, most bytes first:")
    lines += [
        f"  {bytes_text(use.num_bytes):>11} in {use.num_blocks:,} blocks, "
        f"{bytes_text(use.pinned_bytes)} pinned, oldest {age_text(use.oldest_s)}: {use.owner}"
        for use in uses[:SHOWN_OWNERS]
    ]
    if len(uses) > SHOWN_OWNERS:
        lines.append(f"  and {len(uses) - SHOWN_OWNERS:,} others")
    return "\n".join(lines + notes_of(snapshot))
