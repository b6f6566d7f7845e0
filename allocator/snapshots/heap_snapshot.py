"""``HeapSnapshot``: the map of a heap at one moment.

>>> import torch
>>> from kvheap import TensorMemoryAllocator
>>> from kvheap.snapshots.heap_map import STATES
>>> heap = TensorMemoryAllocator(torch.zeros(8 * 4096, dtype=torch.uint8))
>>> batch = heap.batched_allocate([1024], torch.float32, 3)
>>> batch[1].pin()
True
>>> snapshot = heap.snapshot()
>>> snapshot.bytes_by_state()["live"], snapshot.bytes_by_state()["pinned"]
(8192, 4096)
>>> snapshot.starts.tolist(), [STATES[state] for state in snapshot.states]
([0, 4096, 8192, 12288], ['live', 'pinned', 'live', 'free'])
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvheap.snapshots.heap_map import HeapMap
from kvheap.snapshots.saving import need_plot, save
from kvheap.snapshots.snapshot_json import from_json, to_json
from kvheap.snapshots.summary import summary_of

if TYPE_CHECKING:
    from typing import Self

    from matplotlib.figure import Figure

__all__ = ["HeapSnapshot"]


@dataclass(frozen=True, eq=False, repr=False)
class HeapSnapshot(HeapMap):
    """The map of a heap at one moment, made by ``heap.snapshot()``.

    - what is where: ``starts``, ``sizes``, ``states``, ``ages``, ``extent_owners``, ``blocks``,
      ``owners``;
    - in sum: ``bytes_by_state``, ``uses``, ``largest_free_bytes``, ``free_extents``, ``summary``;
    - keep and show: ``save``, ``plot``, ``to_json``, ``from_json``.
    """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file, in the format of its suffix.

        Args:
            path: ``.json``: everything, for ``open_snapshot`` and ``kvheap plot``. ``.html``: a
                page to zoom and hover, which needs no network. ``.png``, ``.svg``, ``.pdf``: a
                picture, which needs matplotlib.

        Raises:
            ValueError: the suffix is none of these; nothing is written.
            ImportError: a picture needs matplotlib; the message says how to install it.
            OSError: the file cannot be written.
        """
        save(self, path)

    def plot(self) -> Figure:
        """Draw the map: by state, by age and by owner, as a figure of matplotlib's.

        Raises:
            ImportError: matplotlib is not installed; the message says how to install it.
        """
        figure: Figure = need_plot().draw(self)
        return figure

    def summary(self) -> str:
        """The map in words, several lines."""
        return summary_of(self)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`save` writes as JSON."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The snapshot that :meth:`to_json` was called on.

        Raises:
            SnapshotError: it is none, of another version, or damaged. A ``ValueError``.
        """
        return from_json(data, cls)
