"""``Reading``: how any process holds and loads the chunks of a segment. The owner is not asked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.heap import Heap, heap_of, layout_and_addresses
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.files.errors import MissingChunksError
from kvheap.files.host_blocks import HostBlocks
from kvheap.shared.channels import Channel
from kvheap.shared.chunk_table import ChunkTable, Record
from kvheap.shared.holds import SharedHold
from kvheap.shared.leases import Leases
from kvheap.shared.places import Places
from kvheap.transfer.moves import copy
from kvheap.transfer.plan import CopyPlan

__all__ = ["Reading"]


class Reading:
    """Holds and loads of one process.

    Args:
        table: the records.
        leases: of this process.
        places: the memory.
        channel: tells the owner of damaged chunks.
        lease_s: how long the owner waits for who holds a chunk that is to be reused.
    """

    def __init__(
        self,
        table: ChunkTable,
        leases: Leases,
        places: Places,
        channel: Channel,
        lease_s: float,
    ) -> None:
        self._table = table
        self._leases = leases
        self._places = places
        self._channel = channel
        self._lease_s = lease_s
        self._verified: dict[int, int] = {}  # by place: the generation whose bytes were right

    def hold(self, names: Sequence[bytes], *, verify: bool) -> SharedHold:
        """Hold the leading keys that have a chunk that is right.

        Args:
            names: the keys, each once.
            verify: compare the checksums of chunks that this process has not compared before.
        """
        table = self._table
        hold = SharedHold(table, self._leases, self._lease_s, time.monotonic())
        places = []
        for key in names:
            place = table.find(key)
            if place < 0:
                break
            places.append(place)
        hold.lock(places)
        try:
            records = []
            for key, place in zip(names, places, strict=False):
                record = table.read(place)
                if record is None:
                    self._report_record(place)
                if record is None or record.key != key:
                    break
                if verify and self._verified.get(place) != record.generation:
                    if self.damaged([record]):
                        break
                    self._verified[place] = record.generation
                records.append(record)
            batch = self._places.blocks([record.place for record in records], writable=False)
            hold.keep(records, batch, is_all=len(records) == len(places))
        except BaseException:
            hold.release()
            raise
        return hold

    def damaged(self, records: Iterable[Record]) -> list[Record]:
        """Those whose bytes do not fit their checksum; the owner is told."""
        damaged = []
        for record in records:
            content = self._places.content(record.place)
            if self._table.digest_of(record.key, content) != record.digest:
                damaged.append(record)
                self._channel.report(record.place, record.generation)
        return damaged

    def _report_record(self, place: int) -> None:
        """Tell the owner of a record that is damaged."""
        generation = self._table.generation(place)
        if generation and not generation & 1 and self._table.read(place) is None:
            self._channel.report(place, generation)

    def load(self, names: Sequence[bytes], into: Heap | MemoryBatch) -> MemoryBatch | None:
        """Copy chunks to blocks; see ``SharedHeap.load``."""
        with self.hold(names, verify=False) as hold:
            if len(hold) < len(names):
                missing = [key for key in names if self._table.find(key) < 0]
                raise MissingChunksError(missing or [names[len(hold)]], [], [])
            if isinstance(into, MemoryBatch):
                self._copy(hold, into)
                batch: MemoryBatch | None = into
            else:
                batch = self._loaded(hold, into)
            self._table.touch([record.place for record in hold.records])
        return batch

    def _loaded(self, hold: SharedHold, into: Heap) -> MemoryBatch | None:
        layout = self._places.layout
        batch = into.batched_allocate(
            list(layout.shapes), list(layout.dtypes), len(hold), layout.fmt
        )
        if batch is None:
            return None
        try:
            self._copy(hold, batch)
        except BaseException:
            into.batched_free(batch)
            raise
        return batch

    def _copy(self, hold: SharedHold, into: MemoryBatch) -> None:
        heap = heap_of(into)
        layout, addresses = layout_and_addresses(into)
        if layout != self._places.layout:
            raise ValueError(f"the blocks of into must be {self._places.layout}, got {layout}")
        into.require_writable()
        into.stored_tokens.forget(None)
        is_idle = into.transfer is None and into.counts.streams is None
        if heap.device.type == "cpu" and is_idle:
            self._copy_here(hold, heap, addresses)
            return
        damaged = self.damaged(hold.records)
        if damaged:
            raise MissingChunksError([], [record.key for record in damaged], [])
        if len(into):
            copy(CopyPlan.between(hold.batch, into)).result()
        hold.check()

    def _copy_here(self, hold: SharedHold, heap: Heap, addresses: Int64Array) -> None:
        """Copy chunks to blocks in host memory that nobody else uses, and check each at once."""
        size = self._places.layout.size_bytes
        blocks = HostBlocks(heap.segments, addresses, size, size, size)
        damaged = []
        for row, record in enumerate(hold.records):
            block = blocks.block(row)
            block[:] = self._places.content(record.place)
            if self._table.digest_of(record.key, block) != record.digest:
                damaged += self.damaged([record]) or [record]
        hold.check()
        if damaged:
            raise MissingChunksError([], [record.key for record in damaged], [])
