"""Snapshots as JSON; what is read back is checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from kvheap.snapshots.columns import SnapshotError, decoded, encoded
from kvheap.snapshots.heap_map import STATES, HeapMap, Owner

__all__ = ["FORMAT", "from_json", "to_json"]

Map = TypeVar("Map", bound=HeapMap)

FORMAT = "kvheap heap snapshot 1"
"""Name and version of the format."""

MAX_EXTENTS = 1 << 28
ADDRESS_BITS = 63

COLUMNS = {"sizes": "<i8", "states": "|u1", "batches": "<i4"}
BATCH_COLUMNS = {"ages_s": "<f8", "owner_of": "<i4", "block_bytes": "<i8"}
FACTS: dict[str, type] = {
    "heap": str,
    "device": str,
    "heap_bytes": int,
    "align_bytes": int,
    "is_view_only": bool,
    "time": str,
    "pid": int,
    "version": str,
}


def to_json(snapshot: HeapMap) -> dict[str, Any]:
    """A snapshot as an object of JSON."""
    return {
        "format": FORMAT,
        **{name: getattr(snapshot, name) for name in FACTS},
        "segments": list(snapshot.segments),
        "states_names": list(STATES),
        "owners": [{"layout": owner.layout, "site": owner.site} for owner in snapshot.owners],
        "num_extents": len(snapshot.sizes),
        "num_batches": len(snapshot.ages_s),
        **{name: encoded(getattr(snapshot, name)) for name in (*COLUMNS, *BATCH_COLUMNS)},
    }


def from_json(data: Any, kind: type[Map]) -> Map:
    """The snapshot, as an object of ``kind``.

    Raises:
        SnapshotError: it is none, of another version, or damaged.
    """
    if not isinstance(data, Mapping) or "format" not in data:
        raise SnapshotError(f"expected a {FORMAT}, got {str(data)[:80]}")
    if data["format"] != FORMAT:
        raise SnapshotError(
            f"expected a {FORMAT}, got {data['format']!r}: read it with the version of kvheap that "
            f"wrote it ({data.get('version', 'not known')})"
        )
    for name, type_ in FACTS.items():
        if type(data.get(name)) is not type_:
            raise SnapshotError(f"{name} must be of type {type_.__name__}, got {data.get(name)!r}")
    if data["heap_bytes"] < 0 or data["heap_bytes"] >> ADDRESS_BITS:
        raise SnapshotError(f"heap_bytes must be 0 to 2**63 - 1, got {data['heap_bytes']}")
    counts: dict[str, int] = {}
    for name in ("num_extents", "num_batches"):
        count = data.get(name)
        if type(count) is not int or not 0 <= count <= MAX_EXTENTS:
            raise SnapshotError(f"{name} must be 0 to {MAX_EXTENTS}, got {count!r}")
        counts[name] = count
    columns: dict[str, Any] = {
        name: decoded(name, data.get(name), dtype, counts["num_extents"])
        for name, dtype in COLUMNS.items()
    } | {
        name: decoded(name, data.get(name), dtype, counts["num_batches"])
        for name, dtype in BATCH_COLUMNS.items()
    }
    facts: dict[str, Any] = {name: data[name] for name in FACTS}
    snapshot = kind(
        **facts,
        segments=_segments(data.get("segments"), data["heap_bytes"]),
        owners=_owners(data.get("owners")),
        **columns,
    )
    _require_whole(snapshot)
    return snapshot


def _segments(segments: Any, heap_bytes: int) -> tuple[int, ...]:
    if not isinstance(segments, list) or not all(
        type(start) is int and 0 <= start <= heap_bytes for start in segments
    ):
        raise SnapshotError(f"segments must be addresses in the heap, got {str(segments)[:80]}")
    return tuple(segments)


def _owners(owners: Any) -> tuple[Owner, ...]:
    try:
        found = tuple(Owner(each["layout"], tuple(each["site"])) for each in owners)
    except (TypeError, KeyError):
        raise SnapshotError(f"owners must have a layout and a site: {str(owners)[:80]}") from None
    for owner in found:
        if not all(isinstance(text, str) for text in (owner.layout, *owner.site)):
            raise SnapshotError(f"an owner must be of texts, got {owner!r}")
    return found


def _require_whole(snapshot: HeapMap) -> None:
    """Raise unless the extents cover the heap, and everything that they refer to is there."""
    sizes, batches = snapshot.sizes, snapshot.batches
    if (sizes <= 0).any():
        raise SnapshotError(f"sizes must be positive, got {int(sizes.min())}")
    total = (int((sizes >> 32).sum()) << 32) + int((sizes & 0xFFFFFFFF).sum())  # without overflow
    if total != snapshot.heap_bytes:
        raise SnapshotError(
            f"extents must cover the heap of {snapshot.heap_bytes} bytes, got {total}"
        )
    limits = (
        ("states", snapshot.states, 0, len(STATES)),
        ("batches", batches, -1, len(snapshot.ages_s)),
        ("owner_of", snapshot.owner_of, 0, len(snapshot.owners)),
        ("block_bytes", snapshot.block_bytes, 1, 1 << ADDRESS_BITS),
    )
    for name, column, low, high in limits:
        if len(column) and not (column.min() >= low and int(column.max()) < high):
            raise SnapshotError(
                f"{name} must be {low} to {high - 1}, got {column.min()} to {column.max()}"
            )
    if (snapshot.ages_s < 0).any() or np.isinf(snapshot.ages_s).any():
        raise SnapshotError("ages_s must be seconds that have passed, or NaN")
    if not re.fullmatch(r"[\d:T.+Z-]+", snapshot.time):
        raise SnapshotError(f"time must be as in ISO 8601, got {snapshot.time!r}")
