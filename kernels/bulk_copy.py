"""Bulk copy: N pieces of bytes between arbitrary addresses, by the bulk copies of sm_90.

============================  ==============  ===============  ==========================
launcher                      reads           writes           bytes moved
============================  ==============  ===============  ==========================
:meth:`BulkCopy.run`          ``sources[i]``  ``targets[i]``   2 x ``num_bytes``
============================  ==============  ===============  ==========================

plus 16 bytes for each piece if all have one size, else 24 for each row. It copies what
:mod:`kvheap.kernels.pointer_copy` copies, if a GPU has ``cp.async.bulk`` (compute capability 9.0
and later) and 16 divides all addresses and sizes. Bytes pass through shared memory and not through
registers, so a program is one warp with few registers and 25 KiB of shared memory, which finds a
place beside the programs of a matrix multiplication.

**Rows.** Pieces of one size are the rows of a matrix, and rows are cut into items of nearly one
size, ``ITEM_BYTES`` at most, found by index arithmetic (descriptors ``[2, N]``: sources, targets).
Other pieces are cut on the host into rows of at most ``cols`` items (descriptors ``[3, rows]``:
sources, targets, bytes); items behind the end of a row are empty.

**Programs.** A batch has up to 32 items, one for each lane of a warp. The grid is persistent:
program ``p`` of ``P`` copies batches ``p``, ``p + P``, and so on. Small items share a stage, of
which as many as shared memory can hold are in flight; :mod:`kvheap.kernels.bulk_loop` says how.

Planning takes array operations on the host and one upload. Launches are on the current stream and
never synchronize.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvheap.kernels.arguments import require_sms
from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.bulk_loop import MAX_STAGES, SLOT_HEAD_BYTES, bulk_loop
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.launch import current, jit, send, staging, tl
from kvheap.kernels.pieces import Pieces

__all__ = ["BulkCopy", "has_bulk_copies"]

SHARED_BYTES = 24 << 10
"""Shared memory of one program: what a matrix multiplication of 200 KiB leaves free. Reasoned, not
yet measured on a GPU."""

ITEM_BYTES = 2048
"""Bytes of the largest item. A program takes about 200 ns for a stage, so that items of 1, 2 and 4
KiB leave an H200 at 5, 10 and 16 GB/s per program. To the device, a program gets 9 GB/s, which is
what its stages in flight bring in 2 microseconds: with larger items, fewer are."""

STAGE_BYTES = ITEM_BYTES
"""Bytes of a stage: one large item, or several small ones."""

DRAINING = 2
"""Stages whose bytes may still be on their way to the targets when an earlier one is filled again.
Reasoned, not yet measured on a GPU."""

PROGRAMS_PER_SM = 4
"""Programs for each multiprocessor without a budget. Within an H200, 1, 2, 4 and 8 moved 16 KiB
pieces at 2,120, 2,816, 2,827 and 2,851 GB/s, and 64-byte ones at 228, 443, 839 and 1,426."""

ROW_BYTES = (64, 128, 256, 512, 1024, ITEM_BYTES, 8 * ITEM_BYTES, 32 * ITEM_BYTES)
"""Row lengths that pieces of different sizes may be cut to, in bytes: powers of two."""

ROW_COST_BYTES = 512
"""The overhead of a row (planning, uploading and reading 24 bytes), as bytes of empty items.
Reasoned, not yet measured on a GPU."""

LINE_BYTES = 128
"""Items are aligned to as much in shared memory. At 16 bytes behind a line, so that every line is
filled from two lines of the source, bulk copies reached 25 GB/s of a link of 55 to the device, and
34 from it (H200, PCIe 5, 2026-11-26). Not yet measured with this alignment."""

WARP = 32

MAX_ITEMS = 1 << 30
"""Half the range of int32, because a program steps past the last item by up to a grid of them."""

if tl is not None:
    LOOP = tl.constexpr(bulk_loop(SHARED_BYTES, DRAINING))


@jit(
    do_not_specialize=[
        "num_rows",
        "num_items",
        "cols",
        "item_bytes",
        "last_bytes",
        "stage_items",
        "batch_items",
        "stages",
        "slot_bytes",
        "first_slot",
        "ahead",
    ]
)
def _copy_bulk_kernel(  # type: ignore[no-untyped-def]
    descriptor_ptr,
    num_rows,
    num_items,
    cols,
    item_bytes,
    last_bytes,
    stage_items,
    batch_items,
    stages,
    slot_bytes,
    first_slot,
    ahead,
):
    """Copy every P-th batch of items.

    A row has ``cols`` items, the last of ``last_bytes``; 0: every row has its own number of bytes.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_batches = tl.cdiv(tl.cdiv(num_items, batch_items) - program, num_programs)
    tl.inline_asm_elementwise(
        LOOP,
        "=r,l,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [
            descriptor_ptr.to(tl.int64),
            num_rows,
            num_items,
            cols,
            item_bytes,
            last_bytes,
            stage_items,
            batch_items,
            stages,
            slot_bytes,
            first_slot,
            program * batch_items,
            num_programs * batch_items,
            num_batches * (batch_items // stage_items),
            ahead,
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@lru_cache(maxsize=64)
def has_bulk_copies(device: torch.device) -> bool:
    """Whether a CUDA device has the instructions."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@dataclass(frozen=True, slots=True, eq=False)
class BulkCopy:
    """Pieces ready to be copied by bulk copies: descriptors uploaded, items planned.

    Attributes:
        device: the device that copies.
        num_bytes: bytes of all pieces.
        descriptors: on the device, int64 ``[2 or 3, rows]``: sources, targets and, if rows differ,
            bytes.
        items: how pieces are cut.
    """

    device: torch.device
    num_bytes: int
    descriptors: torch.Tensor
    items: Items

    @classmethod
    def prepare(cls, pieces: Pieces, device: torch.device) -> BulkCopy:
        """Plan the copy and upload its descriptors, in stream order and without waiting.

        O(N) array operations on the host, and one row for every 64 KiB of pieces that differ in
        size.

        Args:
            pieces: any number, whose targets overlap neither each other nor a source. This is not
                checked. The device must be able to reach all addresses.
            device: a CUDA device of compute capability 9.0 or later.

        Raises:
            ValueError: an address or a size is not a multiple of 16, the device has no bulk copies,
                or there are too many items for one launch; nothing is uploaded.
            RuntimeError: the current stream is being captured in a CUDA graph.
        """
        found = cls.prepare_if_suited(pieces, device)
        if found is None and not has_bulk_copies(device):
            raise ValueError(
                f"{device} has no bulk copies, which need compute capability 9.0: use PointerCopy"
            )
        if found is None:
            raise ValueError(
                f"bulk copies need addresses and sizes that are multiples of 16, but those of "
                f"{pieces!r} are multiples of {pieces.alignment}: use PointerCopy"
            )
        return found

    @classmethod
    def prepare_if_suited(cls, pieces: Pieces, device: torch.device) -> BulkCopy | None:
        """Like :meth:`prepare`; None if the device or an alignment rules out bulk copies."""
        if not has_bulk_copies(device) or (len(pieces) and pieces.alignment < 16):
            return None
        items, rows = Items.of(pieces)
        if items.num_items >= MAX_ITEMS:
            raise ValueError(
                f"{pieces!r} need {items.num_items} items, too many for one launch: split them"
            )
        num_arrays = 2 if items.last_bytes else 3
        with current(device):
            words = staging(num_arrays * len(rows), device)
            arrays = words.numpy().reshape(num_arrays, len(rows))
            arrays[0], arrays[1] = rows.sources, rows.targets
            if num_arrays == 3:
                arrays[2] = rows.sizes
            uploaded = send(words, device)
        return cls(uploaded.device, pieces.num_bytes, uploaded, items)

    @property
    def descriptor_bytes(self) -> int:
        """Bytes that :meth:`prepare` uploaded."""
        return self.descriptors.nbytes

    @property
    def num_launches(self) -> int:
        """Launches of one :meth:`run`: one, or none for no pieces."""
        return int(self.items.num_items > 0)

    def run(self, max_sms: int | None = None) -> None:
        """Copy all pieces, on the current stream of the device.

        Nothing is allocated or uploaded, so a run can be captured in a CUDA graph, once
        :meth:`warm_up` or a similar run has loaded the kernel. A run on another stream than that of
        :meth:`prepare` must wait for that stream. Keep this object until the device has finished,
        and for a graph, as long as the graph is replayed.

        Args:
            max_sms: how many multiprocessors may be used; None for all.

        Raises:
            ValueError: ``max_sms`` is less than 1.
            TypeError: it is not an integer.
        """
        require_sms(max_sms)
        if not self.items.num_items:
            return
        programs = PROGRAMS_PER_SM * _num_sms(self.device) if max_sms is None else max_sms
        batch_items = self.items.batch_items(programs)
        num_batches = -(-self.items.num_items // batch_items)
        self._launch(min(programs, num_batches), batch_items, self.items.num_items)

    def warm_up(self) -> None:
        """Compile and load the kernel; copy nothing."""
        if self.items.num_items:
            self._launch(num_programs=1, batch_items=self.items.stage_items, num_items=0)

    def _launch(self, num_programs: int, batch_items: int, num_items: int) -> None:
        items = self.items
        with current(self.device), Relaxed():  # a first launch loads the kernel
            _copy_bulk_kernel[(num_programs,)](
                self.descriptors,
                items.num_rows,
                num_items,
                items.cols,
                items.item_bytes,
                items.last_bytes,
                items.stage_items,
                batch_items,
                items.stages,
                items.slot_bytes,
                items.first_slot,
                items.stages - DRAINING,
                num_warps=1,
            )


@dataclass(frozen=True, slots=True)
class Items:
    """How pieces are cut into rows, rows into items, and how items share stages.

    Attributes:
        num_rows: how many rows there are.
        cols: items of each row.
        item_bytes: bytes of each item, or of the largest.
        last_bytes: bytes of each row's last item; 0 if every row has its own number of bytes.
        stage_items: items that share a stage.
        stages: how many stages there are.

    >>> Items.of_one_size(1000, 5008)
    Items(num_rows=1000, cols=3, item_bytes=1680, last_bytes=1648, stage_items=1, stages=13)
    """

    num_rows: int
    cols: int
    item_bytes: int
    last_bytes: int
    stage_items: int
    stages: int

    @classmethod
    def of(cls, pieces: Pieces) -> tuple[Items, Pieces]:
        """The items of pieces, and the rows as pieces."""
        if not len(pieces):
            return cls(0, 1, 16, 16, 1, MAX_STAGES), pieces
        sizes = pieces.sizes
        size = sizes if isinstance(sizes, int) else int(sizes[0])
        if isinstance(sizes, int) or (sizes == size).all():
            return cls.of_one_size(len(pieces), size), pieces
        row_bytes = _ragged_row_bytes(sizes)
        item_bytes = min(row_bytes, ITEM_BYTES)
        rows = pieces.cut(row_bytes)
        return cls(len(rows), row_bytes // item_bytes, item_bytes, 0, *_stages(item_bytes)), rows

    @classmethod
    def of_one_size(cls, num_rows: int, size_bytes: int) -> Items:
        """The items of rows that all have ``size_bytes``: nearly equal parts of them."""
        granules = size_bytes // 16
        item_bytes = 16 * -(-granules // -(-size_bytes // ITEM_BYTES))
        cols = -(-size_bytes // item_bytes)
        last_bytes = size_bytes - (cols - 1) * item_bytes
        return cls(num_rows, cols, item_bytes, last_bytes, *_stages(item_bytes))

    @property
    def slot_bytes(self) -> int:
        """Bytes from one item in shared memory to the next."""
        return _slot_bytes(self.item_bytes)

    @property
    def first_slot(self) -> int:
        """Where slots begin in shared memory."""
        return _first_slot(self.stage_items * self.stages)

    @property
    def num_items(self) -> int:
        """Items of all rows."""
        return self.num_rows * self.cols

    def batch_items(self, num_programs: int) -> int:
        """Items of a batch: as many as fit a warp, or fewer, so that every program has some."""
        stages = -(-self.num_items // self.stage_items)
        most = WARP // self.stage_items
        return self.stage_items * max(1, min(most, -(-stages // num_programs)))


def _stages(item_bytes: int) -> tuple[int, int]:
    """How many items share a stage, and how many stages there are."""
    slot_bytes = _slot_bytes(item_bytes)
    stage_items = min(WARP, STAGE_BYTES // slot_bytes)
    room_bytes = SHARED_BYTES - _first_slot(0) - LINE_BYTES  # for rounding up where slots begin
    stage_bytes = stage_items * (slot_bytes + SLOT_HEAD_BYTES)
    return stage_items, min(MAX_STAGES, room_bytes // stage_bytes)


def _slot_bytes(item_bytes: int) -> int:
    """Room for an item, such that none crosses more lines than it must."""
    if item_bytes >= LINE_BYTES:
        return -(-item_bytes // LINE_BYTES) * LINE_BYTES
    return 1 << (item_bytes - 1).bit_length()


def _first_slot(num_slots: int) -> int:
    """Where slots begin, behind the mbarriers and the head of each slot."""
    return -(-(8 * MAX_STAGES + SLOT_HEAD_BYTES * num_slots) // LINE_BYTES) * LINE_BYTES


def _ragged_row_bytes(sizes: Int64Array) -> int:
    """The length of rows that costs the least, empty items included."""
    costs = []
    for row_bytes in ROW_BYTES:
        num_rows = int(((sizes + (row_bytes - 1)) >> (row_bytes.bit_length() - 1)).sum())
        costs.append((num_rows * (row_bytes + ROW_COST_BYTES), row_bytes))
    return min(costs)[1]


@lru_cache(maxsize=64)
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
