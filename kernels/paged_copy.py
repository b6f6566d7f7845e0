"""Paged copy: KV of tokens between an engine's paged cache and chunks, all layers in one launch.

=====================  ============================  ============================
launcher               reads                         writes
=====================  ============================  ============================
:func:`store_tokens`   the cache, at ``slots``       chunks, token after token
:func:`load_tokens`    chunks, token after token     the cache, at ``slots``
=====================  ============================  ============================

Bytes moved: 2 x tokens x ``cache.token_bytes``, and 8 for each unit (a token, or a block) and
program that looks it up. The floor is those bytes over the memory's bandwidth.

What lies together on both sides is one run: all heads of a token, all tokens of a block, as far
as the strides allow (:class:`~kvheap.kernels.paged_plan.Pairing`). Runs form a matrix of (unit,
piece) rows by words. The grid is one program for each tile of it and each (layer, plane), the
tiles of one (layer, plane) next to each other; a program reads its entry of a small table (bases,
offset in the chunk, strides, run), the slots of its rows, and the addresses of their chunks, and
moves its tile with accesses of up to 16 bytes. Neighbouring blocks need no merging here, since
a tile holds as many rows as fit; slots on the host are merged into longer runs where all of them
allow it. Nothing depends on how many heads, layers, chunks or tokens there are.

A slot of -1 is skipped. A slot out of range is refused before anything is written where it is on
the host. On a device it is skipped too, and the lowest such token is kept in an error word that
``cache.synchronize()`` reads: to look at once would be to wait.

On CPU tensors: :mod:`kvheap.kernels.paged_copy_cpu`, which is also the reference. Chunks may lie
in pinned host memory while the cache is on a device, which then reads and writes them across the
link. Launches are on the current stream and never synchronize.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import alignment_of, bytes_of, jit, tl, upload
from kvheap.kernels.paged_copy_cpu import copy_on_cpu
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_plan import ChunkLayout, Pairing
from kvheap.kernels.paged_slots import BlockIds, Places, Slots
from kvheap.kernels.tiles import NUM_WARPS, TILE_WORDS, TilePlan

__all__ = ["BlockIds", "Chunks", "TokenCopy", "load_tokens", "pairing_of", "store_tokens"]

Int64Array = npt.NDArray[np.int64]

MANY_TILES = 1024
"""With fewer programs than this, about eight for each multiprocessor of an H100, tiles are made
smaller. Reasoned, not yet measured on a GPU."""

SMALL_TILE_WORDS = 512

INT32_END = 1 << 31


@jit(
    do_not_specialize=[
        "num_tokens",
        "num_tiles",
        "col_tiles",
        "num_blocks",
        "chunks_per_layer",
        "page_stride",
        "token_stride",
        "chunk_head_stride",
    ]
)
def _copy_tokens_kernel(  # type: ignore[no-untyped-def]
    cache_ptr,
    heap_ptr,
    table_ptr,
    place_ptr,
    chunk_ptr,
    error_ptr,
    num_tokens,
    num_tiles,
    col_tiles,
    num_blocks,
    chunks_per_layer,
    page_stride,
    token_stride,
    chunk_head_stride,
    TO_HEAP: tl.constexpr,
    ARE_BLOCKS: tl.constexpr,
    UNIT: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Copy one tile of one (layer, plane); strides and table entries count VECTOR words."""
    program = tl.program_id(0)  # divided as 32 bits, which is cheaper, multiplied as 64
    number = program // num_tiles
    tile = program % num_tiles
    entry = table_ptr + number * 7
    cache_base = tl.load(entry) * VECTOR
    chunk_offset = tl.load(entry + 1) * VECTOR
    block_stride = tl.load(entry + 2) * VECTOR
    slot_stride = tl.load(entry + 3) * VECTOR
    head_stride = tl.load(entry + 4) * VECTOR
    run_words = tl.load(entry + 5).to(tl.int32) * VECTOR
    layer = tl.load(entry + 6).to(tl.int32)

    rows = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    cols = (tile % col_tiles) * COLS + tl.arange(0, COLS)
    token = (rows // PIECES) * UNIT
    piece = (rows % PIECES).to(tl.int64)
    is_token = token < num_tokens
    if ARE_BLOCKS:
        block = tl.load(place_ptr + token // BLOCK_SIZE, mask=is_token, other=-1).to(tl.int64)
        offset = token % BLOCK_SIZE
        inside = (block >= 0) & (block < num_blocks)
        place = block
    else:
        place = tl.load(place_ptr + token // UNIT, mask=is_token, other=-1).to(tl.int64)
        inside = (place >= 0) & (place < num_blocks.to(tl.int64) * BLOCK_SIZE)
        slot = tl.where(inside, place, 0).to(tl.int32)
        block = (slot // BLOCK_SIZE).to(tl.int64)
        offset = slot % BLOCK_SIZE
    if number == 0:
        near = tl.minimum(tl.maximum(place, -2147483648), 2147483647)
        report = token.to(tl.int64) * 4294967296 + (near + 2147483648)
        is_bad = is_token & (place != -1) & (inside == 0)
        tl.atomic_min(error_ptr + rows * 0, report, mask=is_bad)

    cache_row = (
        cache_base + block * block_stride + offset.to(tl.int64) * slot_stride + piece * head_stride
    )
    in_chunk = token % CHUNK_TOKENS
    chunk_number = layer * chunks_per_layer + token // CHUNK_TOKENS
    chunk = tl.load(chunk_ptr + chunk_number, mask=is_token, other=0) * VECTOR
    heap_row = (
        chunk
        + chunk_offset
        + (in_chunk // PAGE_TOKENS).to(tl.int64) * (page_stride.to(tl.int64) * VECTOR)
        + (in_chunk % PAGE_TOKENS).to(tl.int64) * (token_stride.to(tl.int64) * VECTOR)
        + piece * (chunk_head_stride.to(tl.int64) * VECTOR)
    )
    length = run_words * tl.minimum(UNIT, num_tokens - token)
    mask = (is_token & inside)[:, None] & (cols[None, :] < length[:, None])
    in_cache = cache_ptr.to(tl.pointer_type(WORD)) + cache_row[:, None] + cols[None, :]
    in_heap = heap_ptr.to(tl.pointer_type(WORD)) + heap_row[:, None] + cols[None, :]
    if TO_HEAP:
        tl.store(in_heap, tl.load(in_cache, mask=mask), mask=mask)
    else:
        tl.store(in_cache, tl.load(in_heap, mask=mask), mask=mask)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Equal chunks in memory.

    Attributes:
        buffer: any tensor of the memory they are in; kept alive by the caller.
        addresses: absolute address of each, int64 ``[N]`` on the host; where a chunk holds one
            layer, those of the first layer first.
        size_bytes: of each.
        alignment: a power of two that divides all addresses.
        layout: what is where in a chunk.
    """

    buffer: torch.Tensor
    addresses: Int64Array
    size_bytes: int
    alignment: int
    layout: ChunkLayout


@dataclass(frozen=True, slots=True)
class TokenCopy:
    """One copy, checked and ready."""

    pairing: Pairing
    places: Places
    chunks: Chunks
    to_heap: bool


def store_tokens(
    cache: PagedKVCache,
    slots: Slots,
    chunks: Chunks,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    eager: bool = False,
) -> None:
    """Copy the KV of the tokens at ``slots`` into chunks, in one launch.

    Args:
        cache: where from.
        slots: the slot of each token, integers ``[T]``, or :class:`BlockIds`; on the host or on
            the cache's device. -1 skips a token.
        chunks: where to: chunk ``i`` gets tokens ``[i * n, (i + 1) * n)`` of the T, for ``n`` =
            ``chunks.layout.num_tokens``. Just as many chunks as the tokens need.
        layers: only those; see :meth:`Pairing.of`.
        heads: only those.
        eager: also check slots that are on a device, which waits for them.

    Raises:
        ValueError: slots are out of range, or the sides do not fit; nothing is written.
        TypeError: slots are not integers.
    """
    _copy(cache, slots, chunks, layers, heads, eager, to_heap=True)


def load_tokens(
    chunks: Chunks,
    cache: PagedKVCache,
    slots: Slots,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    eager: bool = False,
) -> None:
    """Copy the KV of tokens from chunks to ``slots``, in one launch.

    Arguments and errors are those of :func:`store_tokens`. Two tokens must not have one slot; in
    eager mode that is looked at.
    """
    _copy(cache, slots, chunks, layers, heads, eager, to_heap=False)


def _copy(
    cache: PagedKVCache,
    slots: Slots,
    chunks: Chunks,
    layers: range | None,
    heads: slice | None,
    eager: bool,
    to_heap: bool,
) -> None:
    pairing = pairing_of(cache, chunks.layout, layers, heads)
    places = Places.of(slots, pairing, eager, distinct=not to_heap)
    require_chunks(pairing, places.num_tokens, chunks)
    require_reachable(cache, chunks.buffer)
    if not places.num_tokens:
        return
    copy = TokenCopy(pairing, places, chunks, to_heap)
    if cache.device.type == "cpu":
        _copy_on_cpu(copy)
    else:
        with torch.cuda.device(cache.device):
            _copy_on_gpu(copy)


def pairing_of(
    cache: PagedKVCache, layout: ChunkLayout, layers: range | None, heads: slice | None
) -> Pairing:
    """The pairing of a cache and a chunk, made once: a server uses few, each again and again."""
    if layers is not None and not isinstance(layers, range):
        raise TypeError(f"layers must be a range, got {layers!r}")
    if heads is not None and not isinstance(heads, slice):
        raise TypeError(f"heads must be a slice, got {heads!r}")
    key = (layout, layers, None if heads is None else (heads.start, heads.stop, heads.step))
    found: Pairing | None = cache.kept.get(key)
    if found is None:
        found = Pairing.of(cache, layout, layers, heads)
        cache.kept[key] = found
    return found


def require_chunks(pairing: Pairing, num_tokens: int, chunks: Chunks) -> None:
    """Refuse another number of chunks than the tokens take."""
    needed = chunks.layout.num_chunks(num_tokens, pairing.num_layers)
    if len(chunks.addresses) != needed:
        raise ValueError(
            f"{num_tokens} tokens of {pairing.num_layers} layers take {needed} chunks of "
            f"{chunks.layout.num_tokens} tokens, got {len(chunks.addresses)}"
        )


def require_reachable(cache: PagedKVCache, buffer: torch.Tensor) -> None:
    """Refuse chunks that the cache's device cannot address."""
    if buffer.device == cache.device:
        return
    if cache.device.type == "cuda" and buffer.device.type == "cpu" and buffer.is_pinned():
        return
    raise ValueError(
        f"the cache is on {cache.device}, the chunks on {buffer.device}: they must be there, or in "
        f"pinned host memory"
    )


def _copy_on_cpu(copy: TokenCopy) -> None:
    chunks = copy.chunks
    copy_on_cpu(copy.pairing, copy.places, chunks.addresses, chunks.size_bytes, copy.to_heap)


def _copy_on_gpu(copy: TokenCopy) -> None:
    pairing, places, chunks = copy.pairing, copy.places, copy.chunks
    cache, layout = pairing.cache, pairing.chunk
    if not places.are_blocks and not isinstance(places.values, torch.Tensor):
        places = places.merged(pairing)
    num_entries = len(pairing.entries) * pairing.num_layers
    anchor = cache.tensors[0]
    # Bases are counted from the anchor, which need not be among the layers that are copied.
    alignment = alignment_of(pairing.alignment, chunks.alignment, anchor.data_ptr())
    plan, constants = _tile_plan(pairing, places, alignment, num_entries)
    access_bytes = plan.word_bytes * plan.words_per_vector
    shift = access_bytes.bit_length() - 1
    chunk_numbers = (chunks.addresses - chunks.buffer.data_ptr()) >> shift
    if isinstance(places.values, torch.Tensor):
        chunk_table, place_table = upload(chunk_numbers, cache.device), places.values
    else:
        both = upload(np.concatenate((chunk_numbers, places.values)), cache.device)
        chunk_table, place_table = both[: len(chunk_numbers)], both[len(chunk_numbers) :]
    num_programs = plan.num_tiles * num_entries
    if num_programs >= INT32_END:
        raise ValueError(f"{places.num_tokens} tokens need {num_programs} programs: split them")
    _copy_tokens_kernel[(num_programs,)](
        _anchor_bytes(cache),
        bytes_of(chunks.buffer),
        _table(pairing, access_bytes),
        place_table,
        chunk_table,
        cache.error_word(),
        places.num_tokens,
        plan.num_tiles,
        plan.col_tiles,
        cache.num_blocks,
        0 if not layout.is_per_layer else len(chunks.addresses) // pairing.num_layers,
        layout.page_stride // access_bytes,
        layout.token_stride // access_bytes,
        pairing.chunk_head_stride // access_bytes,
        TO_HEAP=copy.to_heap,
        ARE_BLOCKS=places.are_blocks,
        UNIT=places.unit_tokens,
        PIECES=pairing.pieces,
        BLOCK_SIZE=cache.block_size,
        CHUNK_TOKENS=layout.num_tokens,
        PAGE_TOKENS=layout.page_tokens,
        **constants,
        num_warps=NUM_WARPS,
    )


def _tile_plan(
    pairing: Pairing, places: Places, alignment: int, num_entries: int
) -> tuple[TilePlan, dict[str, object]]:
    num_rows = -(-places.num_tokens // places.unit_tokens) * pairing.pieces
    run_bytes = pairing.max_run_bytes * places.unit_tokens
    return _planned(num_rows, run_bytes, alignment, num_entries)


@lru_cache(maxsize=1024)
def _planned(
    num_rows: int, run_bytes: int, alignment: int, num_entries: int
) -> tuple[TilePlan, dict[str, object]]:
    """The tiles of every entry, and the kernel's constants for them."""
    plan = TilePlan.of(num_rows, run_bytes, alignment, TILE_WORDS)
    if plan.num_tiles * num_entries < MANY_TILES:
        plan = TilePlan.of(num_rows, run_bytes, alignment, SMALL_TILE_WORDS)
    return plan, plan.constants()


def _table(pairing: Pairing, access_bytes: int) -> torch.Tensor:
    """The pairing's table on its device, bases counted from the first tensor."""
    cache = pairing.cache
    found = pairing.tables.get(access_bytes)
    if found is None:
        table = pairing.table()
        table[:, 0] -= cache.tensors[0].data_ptr()
        table[:, :6] //= access_bytes
        # Complete when it returns, so that any stream may read it.
        found = torch.from_numpy(table.reshape(-1)).to(cache.device)
        pairing.tables[access_bytes] = found
    return found


def _anchor_bytes(cache: PagedKVCache) -> torch.Tensor:
    found: torch.Tensor | None = cache.kept.get("anchor")
    if found is None:
        found = cache.kept["anchor"] = bytes_of(cache.tensors[0])
    return found
