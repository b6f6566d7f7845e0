"""Made-up snapshots of heaps."""

from __future__ import annotations

import numpy as np

from kvheap.snapshots import STATES, HeapSnapshot, Owner

UNIT = 4096


def made_up_map(
    layout: str = "a <layout> & more", site: tuple[str, ...] = ("/a/file.py:12 in <module>",)
) -> HeapSnapshot:
    """A heap of 4 MiB with extents of each state."""
    rows = [
        # units, state, batch
        (64, "live", 0),
        (64, "free", -1),
        (32, "pinned", 0),
        (128, "pending", 1),
        (128, "quarantined", 2),
        (64, "other", -1),
        (64, "live", 3),
        *[(1, ("free", "live")[i % 2], (-1, 3)[i % 2]) for i in range(64)],
        (416, "free", -1),
    ]
    rows[-1] = (1024 - sum(units for units, _, _ in rows[:-1]), "free", -1)
    return of_rows(
        [units * UNIT for units, _, _ in rows],
        [STATES.index(state) for _, state, _ in rows],
        [batch for _, _, batch in rows],
        ages=[300.0, np.nan, np.nan, 0.25],
        owners=(Owner(layout, site), Owner("another layout")),
        owner_of=[0, 0, 1, 1],
        block_bytes=[4096, 8192, 4096, 4096],
    )


def of_rows(
    sizes: list[int] | np.ndarray,
    states: list[int] | np.ndarray,
    batches: list[int] | np.ndarray,
    ages: list[float] | np.ndarray,
    owners: tuple[Owner, ...],
    owner_of: list[int] | np.ndarray,
    block_bytes: list[int] | np.ndarray,
) -> HeapSnapshot:
    sizes = np.asarray(sizes, np.int64)
    return HeapSnapshot(
        heap="TensorMemoryAllocator",
        device="cpu",
        heap_bytes=int(sizes.sum()),
        align_bytes=UNIT,
        segments=(0,),
        is_view_only=False,
        time="2026-11-26T12:00:00.000+00:00",
        pid=7,
        version="0.1.0",
        sizes=sizes,
        states=np.asarray(states, np.uint8),
        batches=np.asarray(batches, np.int32),
        ages_s=np.asarray(ages, np.float64),
        owner_of=np.asarray(owner_of, np.int32),
        block_bytes=np.asarray(block_bytes, np.int64),
        owners=owners,
    )


def random_map(num_extents: int, num_batches: int = 5000, num_owners: int = 30) -> HeapSnapshot:
    random = np.random.default_rng(7)
    states = random.integers(0, 4, num_extents)
    batches = np.where(states == 0, -1, random.integers(0, num_batches, num_extents))
    return of_rows(
        random.integers(1, 64, num_extents) * UNIT,
        states,
        batches,
        ages=random.exponential(600, num_batches),
        owners=tuple(Owner(f"layout {n}", (f"file.py:{n} in f",)) for n in range(num_owners)),
        owner_of=random.integers(0, num_owners, num_batches),
        block_bytes=np.full(num_batches, UNIT),
    )
