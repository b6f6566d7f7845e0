"""Pointer copy: N pieces of bytes between arbitrary addresses, within an SM budget.

============================  ==============  ===============  ==========================
launcher                      reads           writes           bytes moved
============================  ==============  ===============  ==========================
:meth:`PointerCopy.run`       ``sources[i]``  ``targets[i]``   2 x ``num_bytes``
============================  ==============  ===============  ==========================

plus 16 bytes for each piece if all have one size, else 24 for each row. The shortest possible time
is those bytes divided by the bandwidth of the slower side: the link's if one side is pinned host
memory, else that of the device's memory for reading and writing.

Addresses are absolute, and int64 until they become pointers. They may point to any memory that the
device can reach: its own, or pinned host memory across the link. Sizes and alignments are
arbitrary.

**Rows.** An access has the largest of 16, 8, 4, 2 and 1 bytes that divides all addresses and sizes.
Pieces of one size are the rows of a matrix, found by index arithmetic (descriptors ``[2, N]``:
sources, targets). Other pieces are cut on the host into rows of at most one length (descriptors
``[3, rows]``: sources, targets, bytes). If accesses would be narrower than 8 bytes, a piece whose
source and target are equal modulo a larger power of two is cut into a head and a tail, each shorter
than one access, and a body between them. One launch for each width of access copies the bodies, and
one more launch copies everything else: five launches at most.

**Tiles.** The accesses of all rows are numbered through, and a program copies tiles of consecutive
ones (:mod:`kvheap.kernels.tiles`): small pieces share a tile, large ones are split over many. The
kernel is compiled for a width of access, and for a large and a small tile of 16-byte accesses: six
times, whatever is copied. The grid is persistent. With a budget it has one program for each
multiprocessor of the budget, so it never runs on more of them, however programs are placed; without
a budget it has a few programs for each multiprocessor of the device. Program ``p`` of ``P`` copies
tiles ``p``, ``p + P``, and so on; all loads of a tile are in flight before its first store. A link
of 55 GB/s and 2 microseconds needs about 100 KiB in flight, which two programs provide.

Planning takes array operations on the host and one upload. Launches are on the current stream and
never synchronize.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from kvheap.kernels.arguments import require_sms
from kvheap.kernels.arrays import INT32_END, Int64Array
from kvheap.kernels.direct_launch import launch
from kvheap.kernels.launch import current, number_jit, send, staging, tl
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.tiles import (
    ACCESS_BYTES,
    MAX_ROW_VECTORS,
    Divisor,
    TileShape,
    Variant,
    locate_vectors,
    num_tiles,
    variant_of,
)

__all__ = ["PointerCopy", "copy_pieces", "piece_kernels"]

PIECE_TILE = TileShape(4096, 16)
"""Eight accesses for each of 512 threads, each with up to 128 registers, which hold the loads: 64
KiB in accesses of 16 bytes, so that two programs fill a link of 55 GB/s and 2 microseconds.
Reasoned, not yet measured on a GPU."""

SMALL_PIECE_TILE = TileShape(1024, 16)
"""16 KiB, in copies by accesses of 16 bytes that are too small to give every program large tiles;
narrower accesses make small tiles anyway. Reasoned, not yet measured on a GPU."""

MIN_TILES_PER_PROGRAM = 2
"""If a program would get fewer large tiles than this, tiles are small. Reasoned, not yet measured
on a GPU."""

PROGRAMS_PER_SM = 2
"""Programs for each multiprocessor without a budget: one waits for descriptors while the other
copies. Reasoned, not yet measured on a GPU; see benchmarks/NOTES.md."""

ROW_WORDS = (4, 16, 64, 256, 2048)
"""Row lengths that pieces of different sizes may be cut to, in words of up to 8 bytes.
Reasoned, not yet measured on a GPU; see benchmarks/NOTES.md."""

ROW_COST_BYTES = 512
"""The overhead of a row (planning, uploading and reading 24 bytes), as bytes of masked-off words.
Reasoned, not yet measured on a GPU; see benchmarks/NOTES.md."""

MIN_SPLIT_BYTES = 64
"""Smaller pieces are not cut into head, body and tail: that makes three rows of one or two 32-byte
sectors. Reasoned, not yet measured on a GPU."""

MAX_TILES = 1 << 30
"""Half the range of int32, because a program steps past the last tile by up to the grid's size."""

MAX_ROWS = INT32_END - PIECE_TILE.vectors
"""A tile may number rows behind the last one."""


@number_jit()
def _copy_pieces_kernel(  # type: ignore[no-untyped-def]
    descriptor_ptr,
    num_rows,
    num_tiles,
    row_vectors,
    row_magic,
    row_shift,
    is_ragged,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Copy every P-th tile of ``num_tiles``; a row has ``row_vectors`` accesses or fewer.

    The compiler knows no alignment of an integer that is cast to a pointer, so words are counted
    from ``descriptor_ptr``, which is aligned to 16 bytes.
    """
    anchor = descriptor_ptr.to(tl.pointer_type(WORD))
    anchor_vector = descriptor_ptr.to(tl.int64) >> SHIFT
    target_ptr = descriptor_ptr + num_rows.to(tl.int64)
    size_ptr = target_ptr + num_rows.to(tl.int64)
    words = tl.arange(0, VECTOR)[None, :]
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row, col = locate_vectors(tile, row_vectors, row_magic, row_shift, VECTORS)
        is_row = row < num_rows
        source = tl.load(descriptor_ptr + row, mask=is_row, other=0)
        target = tl.load(target_ptr + row, mask=is_row, other=0)
        size = tl.load(size_ptr + row, mask=is_row & (is_ragged != 0), other=0)
        length = tl.where(is_ragged != 0, (size >> SHIFT).to(tl.int32), row_vectors)
        mask = (is_row & (col < length))[:, None] & (words >= 0)
        source_vector = (source >> SHIFT) - anchor_vector + col
        target_vector = (target >> SHIFT) - anchor_vector + col
        data = tl.load(
            anchor + (source_vector[:, None] * VECTOR + words),
            mask=mask,
            eviction_policy="evict_first",
        )
        tl.store(
            anchor + (target_vector[:, None] * VECTOR + words),
            data,
            mask=mask,
            eviction_policy="evict_first",
        )


@dataclass(frozen=True, slots=True, eq=False)
class PointerCopy:
    """Pieces ready to be copied by a device: descriptors uploaded, tiles planned.

    Attributes:
        device: the device that copies.
        num_bytes: bytes of all pieces.
        descriptor_bytes: bytes that :meth:`prepare` uploaded.
        launches: one for each width of access.
    """

    device: torch.device
    num_bytes: int
    descriptor_bytes: int
    launches: tuple[Launch, ...]

    @classmethod
    def prepare(cls, pieces: Pieces, device: torch.device) -> PointerCopy:
        """Plan the copy and upload its descriptors, in stream order and without waiting.

        O(N) array operations on the host, and one row for every 16 KiB of pieces that differ in
        size.

        Args:
            pieces: any number, of any sizes, whose targets overlap neither each other nor a source.
                This is not checked. The device must be able to reach all addresses.
            device: a CUDA device.

        Raises:
            ValueError: there are too many rows or tiles for one launch; nothing is uploaded.
            RuntimeError: the current stream is being captured in a CUDA graph.
        """
        if not len(pieces):
            return cls(device, 0, 0, ())
        plans = [_Rows.of(part) for part in _by_access_width(pieces)]
        # The kernel counts from the start of its part, so each part is a multiple of 16 bytes.
        lengths = [-(-rows.num_words // 2) * 2 for rows in plans]
        ends = np.cumsum(lengths).tolist()
        parts = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        with current(device):
            descriptors = staging(ends[-1], device)
            for rows, part in zip(plans, parts, strict=True):
                rows.write(descriptors.numpy()[part])
            uploaded = send(descriptors, device)
        if uploaded.data_ptr() % 16:
            raise RuntimeError(
                f"descriptors must be at a multiple of 16 bytes, got address {uploaded.data_ptr()}"
            )
        launches = [
            Launch(uploaded[part], rows.num_rows, rows.row_bytes, rows.alignment, rows.is_uniform)
            for rows, part in zip(plans, parts, strict=True)
        ]
        return cls(uploaded.device, pieces.num_bytes, descriptors.nbytes, tuple(launches))

    @property
    def num_launches(self) -> int:
        """Launches of one :meth:`run`: none for no pieces, five at most."""
        return len(self.launches)

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
        if not self.launches:
            return
        programs = PROGRAMS_PER_SM * _num_sms(self.device) if max_sms is None else max_sms
        with current(self.device):
            for each in self.launches:
                each.run(programs)

    def warm_up(self) -> None:
        """Compile and load every kernel that :meth:`run` may launch; copy nothing."""
        with current(self.device):
            for each in self.launches:
                each.warm_up()


def copy_pieces(pieces: Pieces, device: torch.device, max_sms: int | None = None) -> None:
    """Prepare a copy and run it once; arguments and errors are those of :class:`PointerCopy`."""
    PointerCopy.prepare(pieces, device).run(max_sms)


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One launch of a :class:`PointerCopy`.

    Attributes:
        descriptors: on the device, int64 ``[2 or 3, num_rows]``: sources, targets and, unless rows
            are uniform, bytes.
        num_rows: rows of all pieces.
        row_bytes: bytes of each row, or of the longest.
        alignment: a power of two up to 16 that divides all addresses and sizes.
        is_uniform: whether every row has ``row_bytes``.
    """

    descriptors: torch.Tensor
    num_rows: int
    row_bytes: int
    alignment: int
    is_uniform: bool

    def run(self, max_programs: int) -> None:
        """Copy the rows with at most ``max_programs`` programs."""
        for variant in self.variants():
            tiles = num_tiles(self.num_rows, self.row_vectors, variant)
            if tiles >= MIN_TILES_PER_PROGRAM * max_programs:
                break
        self._launch(variant, min(max_programs, tiles), tiles)

    def warm_up(self) -> None:
        """Launch the kernels of both tile sizes with no tiles."""
        for variant in self.variants():
            self._launch(variant, num_programs=1, tiles=0)

    def variants(self) -> tuple[Variant, ...]:
        """What the kernel may be compiled for, largest tiles first."""
        return piece_variants(self.alignment)

    @property
    def row_vectors(self) -> int:
        """Accesses of a row, or of the longest."""
        return self.row_bytes // self.alignment

    def _launch(self, variant: Variant, num_programs: int, tiles: int) -> None:
        launch(
            _copy_pieces_kernel,
            variant,
            num_programs,
            self.descriptors,
            self.num_rows,
            tiles,
            *Divisor.of(self.row_vectors),
            int(not self.is_uniform),
        )


def piece_variants(access_bytes: int) -> tuple[Variant, ...]:
    """What the kernel may be compiled for, for a width of access; largest tiles first."""
    shapes = (PIECE_TILE, SMALL_PIECE_TILE) if access_bytes == 16 else (PIECE_TILE,)
    return tuple(variant_of(access_bytes, shape) for shape in shapes)


def piece_kernels() -> list[tuple[Any, Variant]]:
    """The kernels of all copies of pieces, and what they are compiled for."""
    variants = [variant for width in ACCESS_BYTES for variant in piece_variants(width)]
    return [(_copy_pieces_kernel, variant) for variant in variants]


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The pieces of one launch and the rows that they are cut into."""

    pieces: Pieces
    alignment: int
    num_rows: int
    row_bytes: int
    is_uniform: bool

    @classmethod
    def of(cls, pieces: Pieces) -> _Rows:
        alignment = pieces.alignment
        size = _one_size(pieces)
        if size is not None and size // alignment <= MAX_ROW_VECTORS:
            rows = cls(pieces, alignment, len(pieces), size, True)
        else:
            num_rows, row_bytes = _ragged_rows(pieces.size_array(), min(alignment, 8))
            rows = cls(pieces, alignment, num_rows, row_bytes, False)
        smallest = piece_variants(alignment)[-1]
        tiles = num_tiles(rows.num_rows, rows.row_bytes // alignment, smallest)
        if rows.num_rows >= MAX_ROWS or tiles >= MAX_TILES:
            raise ValueError(
                f"{pieces!r} need {rows.num_rows} rows and {tiles} tiles, too many for one launch: "
                f"split them"
            )
        return rows

    @property
    def num_words(self) -> int:
        """Words of the descriptors."""
        return self.num_rows * (2 if self.is_uniform else 3)

    def write(self, out: Int64Array) -> None:
        """Write the descriptors to ``out``, which may be one word longer."""
        num_rows, pieces = self.num_rows, self.pieces
        sources, targets = out[:num_rows], out[num_rows : 2 * num_rows]
        out[self.num_words :] = 0
        if self.num_rows == len(pieces):
            sources[:] = pieces.sources
            targets[:] = pieces.targets
            if not self.is_uniform:
                out[2 * num_rows : 3 * num_rows] = pieces.sizes
            return
        counts = _row_counts(pieces.size_array(), self.row_bytes)
        ends = np.cumsum(counts)
        # Rows are numbered through all pieces: shift each piece's start back by the rows before it.
        offsets = np.arange(num_rows) * self.row_bytes
        before = (ends - counts) * self.row_bytes
        np.add(np.repeat(pieces.sources - before, counts), offsets, out=sources)
        np.add(np.repeat(pieces.targets - before, counts), offsets, out=targets)
        sizes = out[2 * num_rows : 3 * num_rows]
        sizes[:] = self.row_bytes
        sizes[ends - 1] = pieces.sizes - (counts - 1) * self.row_bytes


def _by_access_width(pieces: Pieces) -> list[Pieces]:
    """The same bytes, in one part for each width of access that is worth a launch of its own."""
    common = pieces.alignment
    if common >= 8:
        return [pieces]
    sizes = pieces.size_array()
    # The lowest bit in which source and target differ: they are equal modulo that power of two.
    access = (pieces.sources ^ pieces.targets) | 16
    access &= -access
    is_wide = (access > common) & (sizes >= MIN_SPLIT_BYTES)
    if not is_wide.any():
        return [pieces]
    wide, sizes, access = pieces[is_wide], sizes[is_wide], access[is_wide]
    heads = -wide.targets & (access - 1)
    tails = (sizes - heads) & (access - 1)
    ends = sizes - tails
    bodies = Pieces(wide.sources + heads, wide.targets + heads, ends - heads)
    parts = [bodies[access == width] for width in (16, 8, 4, 2)]
    has_head, has_tail = heads > 0, tails > 0
    narrow = [
        pieces[~is_wide],
        Pieces(wide.sources, wide.targets, heads)[has_head],
        Pieces(wide.sources + ends, wide.targets + ends, tails)[has_tail],
    ]
    parts.append(Pieces.joined([part for part in narrow if len(part)]))
    return [part for part in parts if len(part)]


def _one_size(pieces: Pieces) -> int | None:
    """The size of all pieces, or None if they differ."""
    sizes = pieces.sizes
    if isinstance(sizes, int):
        return sizes
    return int(sizes[0]) if (sizes == sizes[0]).all() else None


def _ragged_rows(sizes: Int64Array, word_bytes: int) -> tuple[int, int]:
    """The number of rows, and bytes of each, that cost the least, masked-off words included."""
    choices = []
    for words in ROW_WORDS:
        row_bytes = words * word_bytes
        num_rows = int(_row_counts(sizes, row_bytes).sum())
        choices.append((num_rows * (row_bytes + ROW_COST_BYTES), num_rows, row_bytes))
    _, num_rows, row_bytes = min(choices)
    return num_rows, row_bytes


def _row_counts(sizes: Int64Array, row_bytes: int) -> Int64Array:
    """How many rows each piece is cut into; ``row_bytes`` is a power of two."""
    counts: Int64Array = (sizes + (row_bytes - 1)) >> (row_bytes.bit_length() - 1)
    return counts


@lru_cache(maxsize=64)
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
