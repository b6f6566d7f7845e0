"""Pointer copy: N pieces of bytes, each from an address to an address, by a few multiprocessors.

============================  ==============  ===============  ==========================
launcher                      reads           writes           bytes moved
============================  ==============  ===============  ==========================
:meth:`PointerCopy.run`       ``sources[i]``  ``targets[i]``   2 x ``num_bytes``
============================  ==============  ===============  ==========================

and 16 bytes for each piece where all have one size, 24 for each row otherwise. The floor is the
bytes over the bandwidth of the slower side: of the link where one side is pinned host memory, of
the device's memory for both directions otherwise.

Addresses are absolute, int64 up to the pointer, and of anything that the device can reach: its own
memory, or pinned host memory across the link. Sizes and alignments are any.

**Rows.** A word has the largest of 8, 4, 2 and 1 bytes that divides all addresses and sizes; where
16 does, words come in pairs and every access has 16 bytes. Pieces of one size are the rows of a
matrix of N pieces by their words, found by index arithmetic (descriptors ``[2, N]``: sources,
targets). Others are cut on the host into rows of at most ``COLS`` words (descriptors ``[3, rows]``:
sources, targets, bytes). Where words would be narrower than 8 bytes, pieces of which source and
target agree modulo a larger power of two are cut into a head and a tail, shorter than one access,
and a body between them; bodies are copied by one launch for each width of access, and all that is
left by one more: five launches at most.

**Tiles.** A program copies tiles of ``ROWS`` rows by ``COLS`` words: small pieces share a tile,
large ones are split over many. The grid is persistent: one program for each multiprocessor of the
budget, which bounds how many are touched however programs are spread over them; without a budget,
a few for each that there is. Program ``p`` of ``P`` copies tiles ``p``, ``p + P``, and so on; all
loads of a tile are on their way before its first store. A link of 55 GB/s and 2 microseconds needs
about 100 KiB on their way, which two programs have.

Planning is array operations on the host, and one upload. Launches are on the current stream and
never synchronize.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import jit, staging, tl
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.tiles import TilePlan

__all__ = ["PointerCopy", "copy_pieces"]

Int64Array = npt.NDArray[np.int64]

NUM_WARPS = 16
"""512 threads, of which each may have 128 registers: room for the loads of a large tile, eight of
16 bytes or sixteen of a narrower word. Reasoned; not yet measured on a GPU."""

TILE_WORDS = 8192
"""64 KiB of 8-byte words, eight 16-byte loads for each of 512 threads: two programs have more on
their way than a link of 55 GB/s and 2 microseconds holds. Reasoned; not yet measured on a GPU."""

SMALL_TILE_WORDS = 2048
"""16 KiB, for copies too small to give each program large tiles: what is on its way is then
bounded by how many programs there are. Reasoned; not yet measured on a GPU."""

MIN_TILES_PER_PROGRAM = 2
"""With fewer large tiles than this for each program, tiles are small. Reasoned; not yet measured
on a GPU."""

PROGRAMS_PER_SM = 2
"""Where all multiprocessors may be used: one waits for descriptors while the other copies. Where a
thread takes more than 64 registers (rows shorter than a tile, narrow words) they run one after the
other. Reasoned; not yet measured on a GPU."""

ROW_WORDS = (4, 16, 64, 256, 2048)
"""What rows of pieces of different sizes may be cut to; the last not above ``SMALL_TILE_WORDS``.
Descriptors of rows of 16 KiB are 0.15 % of the bytes. Reasoned; not yet measured on a GPU."""

ROW_COST_BYTES = 512
"""What a row costs beside its words, counted in words' bytes that are masked off: 24 bytes to plan
(10 to 25 ns on one core), to upload, and to read. Reasoned; not yet measured on a GPU."""

MIN_SPLIT_BYTES = 64
"""Smaller pieces are copied whole by narrow accesses: head, body and tail would be three rows for
what is one or two sectors of 32 bytes. Reasoned; not yet measured on a GPU."""

MAX_TILES = 1 << 30
"""Half of what 32 bits count: a program steps past the last tile by up to the grid."""

INT32_END = 1 << 31


@jit(do_not_specialize=["num_rows", "num_tiles", "col_tiles", "vectors"])
def _copy_pieces_kernel(  # type: ignore[no-untyped-def]
    descriptor_ptr,
    num_rows,
    num_tiles,
    col_tiles,
    vectors,
    UNIFORM: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Copy every P-th tile of ROWS rows by COLS words; ``vectors`` of VECTOR words are a row.

    Pointers are reached from ``descriptor_ptr``, which is aligned to 16 bytes: an integer that is
    cast to a pointer has no known alignment.
    """
    anchor = descriptor_ptr.to(tl.pointer_type(WORD))
    anchor_address = descriptor_ptr.to(tl.int64)
    target_ptr = descriptor_ptr + num_rows.to(tl.int64)
    size_ptr = target_ptr + num_rows.to(tl.int64)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        # Divided as 32 bits, which is cheaper, multiplied as 64.
        rows = (tile // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        cols = (tile % col_tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
        is_row = rows < num_rows
        source = tl.load(descriptor_ptr + rows, mask=is_row, other=0)
        target = tl.load(target_ptr + rows, mask=is_row, other=0)
        if UNIFORM:
            mask = is_row[:, None] & (cols < vectors.to(tl.int64) * VECTOR)[None, :]
        else:
            size = tl.load(size_ptr + rows, mask=is_row, other=0)
            mask = cols[None, :] < tl.multiple_of(size // WORD_BYTES, VECTOR)[:, None]
        source_word = tl.multiple_of((source - anchor_address) // WORD_BYTES, VECTOR)
        target_word = tl.multiple_of((target - anchor_address) // WORD_BYTES, VECTOR)
        words = tl.load(
            anchor + source_word[:, None] + cols[None, :], mask=mask, eviction_policy="evict_first"
        )
        tl.store(
            anchor + target_word[:, None] + cols[None, :],
            words,
            mask=mask,
            eviction_policy="evict_first",
        )


@dataclass(frozen=True, slots=True, eq=False)
class PointerCopy:
    """Pieces ready to be copied by a device: descriptors uploaded, tiles planned.

    Attributes:
        device: that copies.
        num_bytes: of all pieces.
        descriptor_bytes: what :meth:`prepare` uploaded.
        launches: one for each width of access.
    """

    device: torch.device
    num_bytes: int
    descriptor_bytes: int
    launches: tuple[_Launch, ...]

    @classmethod
    def prepare(cls, pieces: Pieces, device: torch.device) -> PointerCopy:
        """Plan the copy and upload its descriptors, in stream order and without waiting.

        O(N) array operations on the host, with a row for every 16 KiB of pieces that differ in
        size.

        Args:
            pieces: any number of any size, whose targets overlap neither each other nor a source.
                Trusted: addresses must be those of memory that the device can reach.
            device: a CUDA device.

        Raises:
            ValueError: there are too many rows or tiles for one launch; nothing is uploaded.
            RuntimeError: the current stream is being captured in a CUDA graph.
        """
        if not len(pieces):
            return cls(device, 0, 0, ())
        plans = [_Rows.of(group) for group in _groups(pieces)]
        # Each launch's part is an anchor, so it starts at a multiple of 16 bytes.
        lengths = [-(-rows.num_words // 2) * 2 for rows in plans]
        ends = np.cumsum(lengths).tolist()
        parts = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        with _current(device):
            descriptors = staging(ends[-1], device)
            for rows, part in zip(plans, parts, strict=True):
                rows.write(descriptors.numpy()[part])
            uploaded = descriptors.to(device, non_blocking=True)
        if uploaded.data_ptr() % 16:
            raise RuntimeError(f"descriptors are at {uploaded.data_ptr()}, no multiple of 16")
        launches = [
            _Launch(uploaded[part], rows.num_rows, rows.row_bytes, rows.alignment, rows.is_uniform)
            for rows, part in zip(plans, parts, strict=True)
        ]
        return cls(uploaded.device, pieces.num_bytes, descriptors.nbytes, tuple(launches))

    @property
    def num_launches(self) -> int:
        """Launches of one :meth:`run`: 0 for no pieces, 5 at most."""
        return len(self.launches)

    def run(self, max_sms: int | None = None) -> None:
        """Copy all pieces, on the current stream of the device.

        Nothing is allocated or uploaded, so a run can be captured in a CUDA graph, once
        :meth:`warm_up` or a run like it has loaded the kernel. On another stream than that of
        :meth:`prepare`, which it must wait for, this object must be kept until the device is done;
        in a graph, as long as that.

        Args:
            max_sms: how many multiprocessors may be used; None for all.

        Raises:
            ValueError: ``max_sms`` is less than 1.
        """
        if max_sms is not None and max_sms < 1:
            raise ValueError(f"max_sms must be at least 1, got {max_sms}")
        if not self.launches:
            return
        programs = PROGRAMS_PER_SM * _num_sms(self.device) if max_sms is None else max_sms
        with _current(self.device):
            for launch in self.launches:
                launch.run(programs)

    def warm_up(self) -> None:
        """Compile and load all that :meth:`run` may launch, with any budget; copies nothing."""
        with _current(self.device):
            for launch in self.launches:
                launch.warm_up()


def copy_pieces(pieces: Pieces, device: torch.device, max_sms: int | None = None) -> None:
    """Prepare a copy and run it once; arguments and errors are those of :class:`PointerCopy`."""
    PointerCopy.prepare(pieces, device).run(max_sms)


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """One launch: its descriptors on the device, and what its tiles are planned from."""

    descriptors: torch.Tensor
    num_rows: int
    row_bytes: int
    alignment: int
    is_uniform: bool

    def run(self, max_programs: int) -> None:
        plan = self._plan(TILE_WORDS)
        if plan.num_tiles < MIN_TILES_PER_PROGRAM * max_programs:
            plan = self._plan(SMALL_TILE_WORDS)
        self._launch(plan, min(max_programs, plan.num_tiles), plan.num_tiles)

    def warm_up(self) -> None:
        for tile_words in (TILE_WORDS, SMALL_TILE_WORDS):
            self._launch(self._plan(tile_words), num_programs=1, num_tiles=0)

    def _plan(self, tile_words: int) -> TilePlan:
        return _planned(self.num_rows, self.row_bytes, self.alignment, tile_words)

    def _launch(self, plan: TilePlan, num_programs: int, num_tiles: int) -> None:
        _copy_pieces_kernel[(num_programs,)](
            self.descriptors,
            self.num_rows,
            num_tiles,
            plan.col_tiles,
            plan.vectors,
            UNIFORM=self.is_uniform,
            **plan.constants(),
            num_warps=NUM_WARPS,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Pieces of one launch, and how many rows they are cut into."""

    pieces: Pieces
    alignment: int
    num_rows: int
    row_bytes: int
    is_uniform: bool

    @classmethod
    def of(cls, pieces: Pieces) -> _Rows:
        alignment = pieces.alignment
        size = _one_size(pieces)
        if size is not None and size // alignment < INT32_END:
            rows = cls(pieces, alignment, len(pieces), size, True)
        else:
            num_rows, row_bytes = _ragged_rows(pieces.size_array(), min(alignment, 8))
            rows = cls(pieces, alignment, num_rows, row_bytes, False)
        plan = _planned(rows.num_rows, rows.row_bytes, alignment, SMALL_TILE_WORDS)
        if rows.num_rows >= INT32_END or plan.num_tiles >= MAX_TILES:
            raise ValueError(
                f"{pieces!r} need {rows.num_rows} rows and {plan.num_tiles} tiles: split them"
            )
        return rows

    @property
    def num_words(self) -> int:
        """Length of the descriptors."""
        return self.num_rows * (2 if self.is_uniform else 3)

    def write(self, out: Int64Array) -> None:
        """Write the descriptors; one word more may be left over."""
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
        # Rows count on through all pieces, so that each starts before its own first row.
        offsets = np.arange(num_rows) * self.row_bytes
        before = (ends - counts) * self.row_bytes
        np.add(np.repeat(pieces.sources - before, counts), offsets, out=sources)
        np.add(np.repeat(pieces.targets - before, counts), offsets, out=targets)
        sizes = out[2 * num_rows : 3 * num_rows]
        sizes[:] = self.row_bytes
        sizes[ends - 1] = pieces.sizes - (counts - 1) * self.row_bytes


def _groups(pieces: Pieces) -> list[Pieces]:
    """The same bytes, one group for each width of access that is worth a launch of its own."""
    common = pieces.alignment
    if common >= 8:
        return [pieces]
    sizes = pieces.size_array()
    # Source and target agree modulo this, whatever they are: the lowest bit of the difference.
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
    groups = [bodies[access == width] for width in (16, 8, 4, 2)]
    has_head, has_tail = heads > 0, tails > 0
    left = [
        pieces[~is_wide],
        Pieces(wide.sources, wide.targets, heads)[has_head],
        Pieces(wide.sources + ends, wide.targets + ends, tails)[has_tail],
    ]
    groups.append(Pieces.joined([part for part in left if len(part)]))
    return [group for group in groups if len(group)]


def _one_size(pieces: Pieces) -> int | None:
    """The size of all pieces, or None where they differ."""
    sizes = pieces.sizes
    if isinstance(sizes, int):
        return sizes
    return int(sizes[0]) if (sizes == sizes[0]).all() else None


def _ragged_rows(sizes: Int64Array, word_bytes: int) -> tuple[int, int]:
    """How many rows, of how many bytes each: what costs least with masked words counted in."""
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


@lru_cache(maxsize=1024)
def _planned(num_rows: int, row_bytes: int, alignment: int, tile_words: int) -> TilePlan:
    return TilePlan.of(num_rows, row_bytes, alignment, tile_words)


@lru_cache(maxsize=64)
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one. On a CPU, kernels run in tests only, interpreted."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
