"""How a paged copy is cut into tiles, and the numbers that its kernel is given for them.

They follow from the pairing, the width of an access, and how many tokens are given in which way, so
they are computed once for each and kept with the pairing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvheap.kernels.arrays import INT32_END, alignment_of, combined_bits
from kvheap.kernels.launch import resident
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_plan import Pairing
from kvheap.kernels.paged_slots import Places
from kvheap.kernels.tiles import (
    MAX_ROW_VECTORS,
    Divisor,
    TileShape,
    Variant,
    num_tiles,
    variant_of,
)

__all__ = [
    "BUDGET_TILE",
    "TILE",
    "PlannedLaunch",
    "TokenLaunches",
    "access_widths",
    "place_numbers",
    "width_of_access",
]

TILE = TileShape(512, 4)
"""Four accesses for each of 128 threads: 8 KiB, if they have 16 bytes. On an H200, 3,710 GB/s; two
and eight accesses have 3,660 and 3,370; see benchmarks/NOTES.md."""

BUDGET_TILE = TileShape(4096, 16)
"""For copies within an SM budget: 64 KiB in flight for each multiprocessor, so that two fill a link
of 55 GB/s and 2 microseconds. On an H200, three to four programs have 48 GB/s."""

MAX_TILES = 1 << 30
"""Half the range of int32, because a program steps past the last tile by up to the grid's size."""

MAX_ROWS = INT32_END - BUDGET_TILE.vectors
"""A tile may number rows behind the last one."""

MAX_PLANNED = 1024
"""Numbers of tokens whose launches are kept for a pairing, in about 1 KiB each."""


def access_widths(cache: PagedKVCache, chunk_alignment: int) -> tuple[int, int]:
    """The widths of access of all copies between a cache and chunks: the usual one, and the least.

    A copy of some heads or layers may be less aligned than one of all, or more. Each width is a
    kernel to compile, so there are two, whatever is copied.

    Args:
        cache: one side; if only whole blocks of it can be copied, its ``blocks_of_cache``.
        chunk_alignment: a power of two that divides the addresses of the chunks.
    """
    least = alignment_of(cache.alignment, chunk_alignment)
    heads_merge = all(plane.head_stride == plane.row_bytes for plane in cache.planes)
    if cache.num_heads == 1 or not heads_merge or len(cache.planes) != 1 + cache.is_key_value:
        return least, least
    values = [combined_bits(cache.base_addresses)]
    for plane in cache.planes:
        values.append(plane.row_bytes * cache.num_heads)  # all heads of a token are one run
        values += [plane.block_stride] if cache.num_blocks > 1 else []
        values += [plane.slot_stride] if cache.block_size > 1 else []
    return alignment_of(chunk_alignment, *values), least


def width_of_access(pairing: Pairing, chunk_alignment: int) -> int:
    """The width of access of a copy, one of :func:`access_widths`; kept with the pairing."""
    key = ("width", chunk_alignment)
    found: int | None = pairing.kept.get(key)
    if found is None:
        possible = alignment_of(pairing.alignment, chunk_alignment)
        usual, least = access_widths(pairing.cache, chunk_alignment)
        pairing.kept[key] = found = usual if possible >= usual else min(possible, least)
    return found


@dataclass(frozen=True, slots=True)
class PlannedLaunch:
    """A launch, but for its pointers and its direction.

    Attributes:
        variant: what the kernel is compiled for.
        num_tiles: all tiles.
        first_words: what the kernel reads of the words before the chunks' addresses. Planes whose
            runs are equally long are a group; for each but the first, 8 words: its first tile and
            its first entry; the tiles of an entry and the accesses of a run, as divisors.
        numbers: the kernel's numbers from ``num_all_tiles`` on.
    """

    variant: Variant
    num_tiles: int
    first_words: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TokenLaunches:
    """The launches for one pairing and one width of access.

    Attributes:
        pairing: the cache and the chunk layout.
        access_bytes: the width.
        table: the pairing's table on its device, counted in accesses.
        groups: for each length of a run, its accesses, and how many entries have it.
        last_numbers: the kernel's numbers from ``runs`` on.
    """

    pairing: Pairing
    access_bytes: int
    table: torch.Tensor
    groups: tuple[tuple[Divisor, int], ...]
    last_numbers: tuple[int, ...]
    kept: dict[tuple[int, bool, int, bool], PlannedLaunch] = field(default_factory=dict)

    @classmethod
    def of(cls, pairing: Pairing, access_bytes: int) -> TokenLaunches:
        """Those of a pairing, kept with it.

        Raises:
            ValueError: a run is too long for a kernel.
        """
        found: TokenLaunches | None = pairing.kept.get(access_bytes)
        if found is not None:
            return found
        longest = pairing.max_run_bytes
        if longest > MAX_ROW_VECTORS * access_bytes:
            raise ValueError(
                f"a run of {longest} bytes in accesses of {access_bytes} is too long for a kernel, "
                f"which copies up to {MAX_ROW_VECTORS * access_bytes}"
            )
        table = pairing.table()
        table[:, :8] //= access_bytes
        found = cls(
            pairing,
            access_bytes,
            resident(table.reshape(-1), pairing.cache.device),
            tuple((Divisor.of(size // access_bytes), count) for size, count in pairing.groups),
            (
                *Divisor.of(pairing.runs_per_token),
                *Divisor.of(pairing.cache.block_size),
                *Divisor.of(pairing.chunk.num_tokens),
                *Divisor.of(pairing.chunk.page_tokens),
            ),
        )
        pairing.kept[access_bytes] = found
        return found

    def planned(self, places: Places, is_budgeted: bool) -> PlannedLaunch:
        """The launch for as many tokens as ``places`` have, given as they are.

        Raises:
            ValueError: they are too many for one launch.
        """
        values = places.values
        place_bytes = values.element_size() if isinstance(values, torch.Tensor) else 0
        key = (places.num_tokens, places.are_blocks, place_bytes, is_budgeted)
        found = self.kept.get(key)
        if found is None:
            found = self._plan(*key)
            if len(self.kept) >= MAX_PLANNED:
                self.kept.clear()
            self.kept[key] = found
        return found

    def _plan(
        self, num_tokens: int, are_blocks: bool, place_bytes: int, is_budgeted: bool
    ) -> PlannedLaunch:
        chunk = self.pairing.chunk
        variant = variant_of(self.access_bytes, BUDGET_TILE if is_budgeted else TILE)
        num_rows = num_tokens * self.pairing.runs_per_token
        tiles = [num_tiles(num_rows, run.value, variant) for run, _ in self.groups]
        all_tiles = sum(each * count for each, (_, count) in zip(tiles, self.groups, strict=True))
        if all_tiles >= MAX_TILES or num_rows >= MAX_ROWS:
            raise ValueError(
                f"{num_tokens} tokens have {num_rows} rows in each layer and plane and need "
                f"{all_tiles} tiles, too many for one launch: split them"
            )
        words: tuple[int, ...] = ()
        first_tile = first_entry = 0
        for each, (run, count) in zip(tiles, self.groups, strict=True):
            words += (first_tile, first_entry, *Divisor.of(each), *run)
            first_tile += each * count
            first_entry += count
        num_chunks = chunk.num_chunks(num_tokens, self.pairing.num_layers)
        num_words = len(words[8:])
        numbers = (
            all_tiles,
            len(self.groups),
            num_words,
            num_chunks // self.pairing.num_layers if chunk.is_per_layer else 0,
            num_tokens,
            *place_numbers(self.pairing, are_blocks, place_bytes, num_words + num_chunks),
            *words[2:8],
            *self.last_numbers,
        )
        return PlannedLaunch(variant, all_tiles, words[8:], numbers)


def place_numbers(
    pairing: Pairing, are_blocks: bool, place_bytes: int, first_word: int
) -> tuple[int, ...]:
    """What ``locate_tokens`` is told of places.

    Args:
        pairing: whose cache they are in.
        are_blocks: whether they are block ids instead of slots.
        place_bytes: bytes of each on the device; 0 if they are on the host and sent as words.
        first_word: which word is the first of them then.

    Returns:
        Where they start, the bytes of each, the place after the last one, and the tokens of one as
        a divisor.
    """
    cache = pairing.cache
    limit, unit = (cache.num_blocks, cache.block_size) if are_blocks else (cache.num_slots, 1)
    return 0 if place_bytes else first_word, place_bytes or 8, limit, *Divisor.of(unit)
