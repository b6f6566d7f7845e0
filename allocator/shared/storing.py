"""``Storing``: how any process fills places that the owner of a segment has given to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvheap.blocks.heap import BlockObjects, layout_and_addresses
from kvheap.heaps.block_tensors import require_matching
from kvheap.kernels.host_copy import copy_on_host
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.words import as_bytes
from kvheap.shared.channels import Channel
from kvheap.shared.chunk_table import ChunkTable
from kvheap.shared.errors import NoOwnerError, SegmentReplacedError
from kvheap.shared.leases import Leases
from kvheap.shared.places import Places
from kvheap.shared.segment import Segment
from kvheap.shared.stores import SharedStore
from kvheap.shared.tokens import Token
from kvheap.transfer.moves import copy
from kvheap.transfer.plan import CopyPlan

__all__ = ["Storing"]

MAX_ATTEMPTS = 16
"""To get places that nobody else has just locked; the owner sets those aside at each."""


SHARED_BYTES = 4 << 20
"""From so many bytes on, several threads share the copy."""


class Storing:
    """Stores of one process.

    Args:
        segment: the segment.
        table: its records.
        leases: of this process.
        places: the memory.
        channel: to the owner.
    """

    def __init__(
        self,
        segment: Segment,
        table: ChunkTable,
        leases: Leases,
        places: Places,
        channel: Channel,
    ) -> None:
        self._segment = segment
        self._table = table
        self._leases = leases
        self._places = places
        self._channel = channel

    def begin(self, names: Sequence[bytes]) -> SharedStore:
        """Get places for keys, each named once; see ``SharedHeap.begin``."""
        if not self._segment.is_linked:
            raise SegmentReplacedError(self._segment.path)
        blocks_of = partial(self._places.blocks, writable=True)
        for _ in range(MAX_ATTEMPTS):
            token = Token()
            try:
                ticket, link = self._channel.begin(token, names)
                store = SharedStore(
                    self._channel,
                    self._leases,
                    token,
                    names,
                    ticket,
                    link,
                    blocks_of,
                    self._digests,
                )
            except BaseException:  # also a signal handler's, when the places were given already
                self._channel.abort(token)
                raise
            if store.lock(self._epoch):
                return store
        raise NoOwnerError(
            f"places of {self._segment.path} are locked by another program, {MAX_ATTEMPTS} times "
            f"in a row"
        )

    def _epoch(self) -> int:
        return self._segment.state.epoch

    def _digests(self, keys: Sequence[bytes], places: Sequence[int]) -> list[int]:
        digest_of, content = self._table.digest_of, self._places.content
        return [digest_of(key, content(place)) for key, place in zip(keys, places, strict=True)]

    def store(
        self, names: Sequence[bytes], source: torch.Tensor | BlockObjects, tokens: Sequence[int]
    ) -> npt.NDArray[np.bool_]:
        """Copy chunks into the heap; see ``SharedHeap.store``."""
        with self.begin(names) as store:
            stored = store.were_ready
            if store.rows:
                self._fill(store, source)
                num_ready = store.complete([tokens[row] for row in store.rows])
                stored[store.rows] = True
                if num_ready < len(store.rows):
                    find = self._table.find
                    return np.fromiter((find(key) >= 0 for key in names), np.bool_, len(names))
        return stored

    def require_source(self, source: Any, num_keys: int) -> None:
        """Raise unless these are as many chunks as keys.

        Raises:
            TypeError, ValueError: they are not.
        """
        layout = self._places.layout
        if isinstance(source, torch.Tensor):
            require_matching("source", source, num_keys, layout, source.device, cpu_is_fine=True)
            return
        if not isinstance(source, Sequence):
            raise TypeError(f"source must be a tensor or blocks of a heap, got {source!r}")
        if len(source) != num_keys:
            raise ValueError(f"{num_keys} keys need as many blocks, got {len(source)} in source")
        if num_keys and (found := layout_and_addresses(source)[0]) != layout:
            raise ValueError(f"the blocks of source must be {layout}, got {found}")

    def _fill(self, store: SharedStore, source: torch.Tensor | BlockObjects) -> None:
        rows = store.rows
        if not isinstance(source, torch.Tensor):
            is_whole = len(rows) == len(source)
            blocks = source if is_whole else [source[row] for row in rows]
            store.batch.transfer = copy(CopyPlan.between(blocks, store.batch))
            return
        chunk_bytes = self._places.layout.size_bytes
        given = as_bytes(source.detach().reshape(len(source), -1))
        given = given.reshape(-1, chunk_bytes)
        places, target = store.places, self._places.rows
        if source.device.type != "cpu":
            for begin, end in _runs(rows, places):
                into = target[places[begin] : places[begin] + end - begin]
                torch.from_numpy(into).copy_(given[rows[begin] : rows[begin] + end - begin])
        elif len(rows) * chunk_bytes < SHARED_BYTES:
            _copy_alone(given.numpy(), rows, target, places)
        else:
            _copy_together(given.numpy(), rows, target, places)


Bytes = npt.NDArray[np.uint8]


def _copy_alone(given: Bytes, rows: Sequence[int], target: Bytes, places: Sequence[int]) -> None:
    """Copy rows to places on this thread; torch would let several wait for each other."""
    for begin, end in _runs(rows, places):
        into = target[places[begin] : places[begin] + end - begin]
        np.copyto(into, given[rows[begin] : rows[begin] + end - begin])


def _copy_together(given: Bytes, rows: Sequence[int], target: Bytes, places: Sequence[int]) -> None:
    """Copy rows to places on several threads, none of which waits for another in the middle."""
    sources, targets = (
        array.ctypes.data + np.array(numbers, np.int64) * array.strides[0]
        for array, numbers in ((given, rows), (target, places))
    )
    copy_on_host(Pieces(sources, targets, given.shape[1]))


def _runs(rows: Sequence[int], places: Sequence[int]) -> list[tuple[int, int]]:
    """Begin and end of each stretch in which both go up by one. O(rows)."""
    cuts = [
        at
        for at in range(1, len(rows))
        if rows[at] != rows[at - 1] + 1 or places[at] != places[at - 1] + 1
    ]
    return list(pairwise([0, *cuts, len(rows)]))
