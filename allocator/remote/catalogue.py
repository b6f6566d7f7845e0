"""``Catalogue``: which blocks of this node's heap a key stands for.

Blocks that were published are found first; for other keys the user's function is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.heap import BlockObjects, Heap, layout_and_addresses
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj

__all__ = ["Catalogue", "Found", "Lookup", "Place", "batches_of"]

Lookup: TypeAlias = "Callable[[list[bytes]], Sequence[MemoryObj | None]]"
"""Finds the block of each key, or None; called on a thread of the node."""

Place: TypeAlias = "tuple[MemoryBatch, int]"
"""A block: its batch, and its row there."""


class Found(NamedTuple):
    """What was found for some keys."""

    places: list[Place | None]
    """The block of each key; None for those that cannot be read now."""
    batches: set[MemoryBatch]
    """The batches of these blocks."""


class Catalogue:
    """The blocks of a heap that other nodes may read, by key.

    Args:
        heap: whose blocks they are.
        lookup: finds the blocks of keys that were not published.
    """

    def __init__(self, heap: Heap, lookup: Lookup | None) -> None:
        self._heap = heap
        self._lookup = lookup
        self._published: dict[bytes, Place] = {}
        self._layout: BlockLayout | None = None

    def __len__(self) -> int:
        """How many keys were published."""
        return len(self._published)

    @property
    def layout(self) -> BlockLayout | None:
        """The layout of the blocks that were found last; None before."""
        return self._layout

    def publish(self, keys: Sequence[bytes], blocks: BlockObjects) -> None:
        """Let blocks be found under keys, instead of others that were.

        Raises:
            ValueError: there are not as many blocks as keys, or they are another heap's.
            LifetimeError, TypeError: as ``layout_and_addresses``.
        """
        if len(keys) != len(blocks):
            raise ValueError(f"{len(keys)} keys need as many blocks, got {len(blocks)}")
        if not len(keys):
            return
        layout, _ = layout_and_addresses(blocks)
        parts = self._heap.rows_by_batch(blocks)  # refuses blocks of another heap
        if len(parts) == 1 and isinstance(blocks, MemoryBatch):
            places: Iterable[Place] = zip([blocks] * len(keys), range(len(keys)), strict=True)
        else:
            places = [(block.batch, block.row) for block in blocks]
        self._published.update(zip(keys, places, strict=True))
        self._layout = layout

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """Let keys be found no more; those that are not published are skipped."""
        for key in keys:
            self._published.pop(key, None)

    def clear(self) -> None:
        """Let no key be found."""
        self._published.clear()
        self._lookup = None

    def find(self, keys: list[bytes]) -> Found:
        """The block of each key.

        Raises:
            Exception: what the user's function raised.
            ClosedError: the heap is closed.
            TypeError, ValueError: what it returned is no list of blocks, as long as that of keys.
        """
        self._heap.require_open()
        places: list[Place | None] = [*map(self._published.get, keys)]
        if self._lookup is not None and None in places:
            unknown = [at for at, place in enumerate(places) if place is None]
            found = self._lookup([keys[at] for at in unknown])
            for at, place in zip(unknown, self._places_of(found, len(unknown)), strict=True):
                places[at] = place
        return self._readable(places)

    def _places_of(self, found: Any, num_keys: int) -> list[Place | None]:
        if not isinstance(found, (Sequence, np.ndarray)) or len(found) != num_keys:
            raise ValueError(
                f"lookup must return a block or None for each of {num_keys} keys, "
                f"got {found!r:.200}"
            )
        places: list[Place | None] = []
        for block in found:
            if block is None:
                places.append(None)
                continue
            if not isinstance(block, MemoryObj):
                raise TypeError(
                    f"lookup must return MemoryObj or None, got {block!r:.200} in a list"
                )
            if block.batch.allocator is not self._heap:
                raise ValueError(f"lookup must return blocks of the node's heap, got {block!r}")
            places.append((block.batch, block.row))
        return places

    def _readable(self, places: list[Place | None]) -> Found:
        """Without blocks that are freed, or that a transfer has not filled."""
        batches = batches_of(filter(None, places))
        if not batches:
            return Found(places, batches)
        self._layout = next(iter(batches)).layout
        live: dict[int, npt.NDArray[np.bool_]] = {}
        for batch in batches:
            if not _is_filled(batch):
                live[id(batch)] = np.zeros(len(batch), np.bool_)
            elif not batch.counts.all_live():
                live[id(batch)] = batch.live
        if not live:
            return Found(places, batches)
        found: list[Place | None] = []
        for place in places:
            rows = None if place is None else live.get(id(place[0]))
            found.append(None if rows is not None and not rows[place[1]] else place)  # type: ignore[index]
        return Found(found, batches_of(filter(None, found)))


def batches_of(places: Iterable[Place]) -> set[MemoryBatch]:
    """The batches of blocks."""
    return {*map(itemgetter(0), places)}


def _is_filled(batch: MemoryBatch) -> bool:
    transfer = batch.transfer
    return transfer is None or (transfer.done() and transfer.error is None)
