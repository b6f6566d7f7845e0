"""Paged copy: KV of tokens between an engine's paged cache and chunks, all layers in one launch.

=====================  ============================  ============================
launcher               reads                         writes
=====================  ============================  ============================
:func:`store_tokens`   the cache, at ``slots``       chunks, token after token
:func:`load_tokens`    chunks, token after token     the cache, at ``slots``
=====================  ============================  ============================

Bytes moved: 2 x tokens x ``cache.token_bytes``, plus 8 for each unit (a token or a block) in each
program that looks it up. The shortest possible time is those bytes divided by the memory bandwidth.

Bytes that are contiguous on both sides are one run: all heads of a token or all tokens of a block,
as far as the strides allow (:class:`~kvheap.kernels.paged_plan.Pairing`). The runs of one (layer,
plane) form a matrix with a row for each run of each unit and a column for each word. The grid has
one program for each tile of each (layer, plane); the tiles of one (layer, plane) are next to each
other. A program reads its entry of a small table (bases, offset in the chunk, strides, run), the
slots of its rows and the addresses of their chunks, and moves its tile with accesses of up to 16
bytes. Adjacent blocks need no merging, since a tile holds as many rows as fit. Slots on the host
are merged into longer runs if all of them allow it. The code is the same for any number of heads,
layers, chunks and tokens.

A slot of -1 skips its token. If the slots are on the host, a slot out of range is refused before
anything is written. If they are on a device, its token is skipped and recorded in the error word
that ``cache.synchronize()`` reads, because an immediate check would have to wait for the device.

Caches of which only whole blocks can be copied have one slot for each block here:
:mod:`kvheap.kernels.whole_blocks`.

Chunks of fp8 are converted on the way: :mod:`kvheap.kernels.paged_convert`. On CPU tensors:
:mod:`kvheap.kernels.paged_copy_cpu` and :mod:`kvheap.kernels.paged_convert_cpu`, which are also the
references. Chunks may be in pinned host memory while the cache is on a device, which then reads and
writes them across the link. Launches are on the current stream and never synchronize.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kvheap.kernels.arrays import INT32_END, alignment_of
from kvheap.kernels.launch import current, jit, runs_kernels, tl
from kvheap.kernels.paged_convert import launch_conversion
from kvheap.kernels.paged_convert_cpu import convert_on_cpu
from kvheap.kernels.paged_copy_cpu import copy_on_cpu
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_places import locate_tokens, report_bad_places
from kvheap.kernels.paged_plan import Pairing
from kvheap.kernels.paged_slots import BlockIds, Slots
from kvheap.kernels.tiles import NUM_WARPS, TILE_WORDS, TilePlan
from kvheap.kernels.token_copy import Chunks, TokenCopy

__all__ = ["BlockIds", "Chunks", "load_tokens", "run_copy", "store_tokens"]

MANY_TILES = 1024
"""Copies of fewer programs than this get smaller tiles: about eight programs for each
multiprocessor of an H100. Reasoned, not yet measured on a GPU."""

SMALL_TOKEN_TILE_WORDS = 512
"""Words of the smaller tiles."""


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
    RUNS: tl.constexpr,
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
    program = tl.program_id(0)  # divide in 32 bits, which is cheaper; multiply in 64
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
    token = (rows // RUNS) * UNIT
    run = (rows % RUNS).to(tl.int64)
    is_token = token < num_tokens
    place, block, offset, is_inside = locate_tokens(
        place_ptr, token, is_token, num_blocks, ARE_BLOCKS, UNIT, BLOCK_SIZE
    )
    if number == 0:
        report_bad_places(error_ptr, token, is_token, place, is_inside)

    cache_row = (
        cache_base + block * block_stride + offset.to(tl.int64) * slot_stride + run * head_stride
    )
    in_chunk = token % CHUNK_TOKENS
    chunk_number = layer * chunks_per_layer + token // CHUNK_TOKENS
    chunk = tl.load(chunk_ptr + chunk_number, mask=is_token, other=0) * VECTOR
    heap_row = (
        chunk
        + chunk_offset
        + (in_chunk // PAGE_TOKENS).to(tl.int64) * (page_stride.to(tl.int64) * VECTOR)
        + (in_chunk % PAGE_TOKENS).to(tl.int64) * (token_stride.to(tl.int64) * VECTOR)
        + run * (chunk_head_stride.to(tl.int64) * VECTOR)
    )
    length = run_words * tl.minimum(UNIT, num_tokens - token)
    mask = (is_token & is_inside)[:, None] & (cols[None, :] < length[:, None])
    in_cache = cache_ptr.to(tl.pointer_type(WORD)) + cache_row[:, None] + cols[None, :]
    in_heap = heap_ptr.to(tl.pointer_type(WORD)) + heap_row[:, None] + cols[None, :]
    if TO_HEAP:
        tl.store(in_heap, tl.load(in_cache, mask=mask), mask=mask)
    else:
        tl.store(in_cache, tl.load(in_heap, mask=mask), mask=mask)


def store_tokens(
    cache: PagedKVCache,
    slots: Slots,
    chunks: Chunks,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    eager: bool = False,
) -> None:
    """Copy the KV of the tokens at ``slots`` from a cache into chunks, in one launch.

    Args:
        cache: the source; bfloat16 or float16 if the chunks hold fp8.
        slots: the slot of each token, integers ``[T]``, or :class:`BlockIds`; on the host or on
            the cache's device. -1 skips a token.
        chunks: the target. Chunk ``i`` takes tokens ``[i * n, (i + 1) * n)`` of the T, for ``n`` =
            ``chunks.layout.num_tokens``. There must be as many chunks as the tokens need.
        layers: the layers to copy; see :meth:`~kvheap.kernels.paged_plan.Pairing.of`.
        heads: the heads to copy; see there.
        eager: whether to check slots on a device too, which waits for the device.

    Raises:
        ValueError: slots are out of range, or cache and chunks do not fit; nothing is written.
        TypeError: slots are not integers, or ``layers`` or ``heads`` have a wrong type; nothing is
            written.
    """
    run_copy(TokenCopy.of(cache, slots, chunks, layers, heads, eager, to_heap=True))


def load_tokens(
    chunks: Chunks,
    cache: PagedKVCache,
    slots: Slots,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    eager: bool = False,
) -> None:
    """Copy the KV of tokens from chunks to ``slots`` of a cache, in one launch.

    Arguments and errors are those of :func:`store_tokens`. Two tokens must not have the same slot:
    on the host that is refused, on a device only in eager mode.
    """
    run_copy(TokenCopy.of(cache, slots, chunks, layers, heads, eager, to_heap=False))


def run_copy(copy: TokenCopy) -> None:
    """Execute a checked copy in one launch on the current stream."""
    if not copy.places.num_tokens:
        return
    is_exact = copy.chunks.scale_offset is None
    device = copy.pairing.cache.device
    if runs_kernels(device):
        with current(device):
            (_launch_copy if is_exact else launch_conversion)(copy)
    else:
        (copy_on_cpu if is_exact else convert_on_cpu)(copy)


def _launch_copy(copy: TokenCopy) -> None:
    pairing, places, chunks = copy.pairing, copy.places, copy.chunks
    cache, layout = pairing.cache, pairing.chunk
    if not places.are_blocks and not isinstance(places.values, torch.Tensor):
        places = places.merged(pairing)
    num_entries = len(pairing.entries) * pairing.num_layers
    # Offsets in the table count from the first tensor, even if its layer is not copied.
    alignment = alignment_of(pairing.alignment, chunks.alignment, cache.tensors[0].data_ptr())
    num_rows = -(-places.num_tokens // places.unit_tokens) * pairing.runs_per_token
    run_bytes = pairing.max_run_bytes * places.unit_tokens
    plan, constants = _planned(num_rows, run_bytes, alignment, num_entries)
    num_programs = plan.num_tiles * num_entries
    if num_programs >= INT32_END:
        raise ValueError(
            f"{places.num_tokens} tokens need {num_programs} programs, too many for one launch: "
            f"split them"
        )
    access_bytes = plan.access_bytes
    _copy_tokens_kernel[(num_programs,)](
        *copy.kernel_tensors(_table(pairing, access_bytes), places, access_bytes),
        places.num_tokens,
        plan.num_tiles,
        plan.col_tiles,
        cache.num_blocks,
        len(chunks.addresses) // pairing.num_layers if layout.is_per_layer else 0,
        layout.page_stride // access_bytes,
        layout.token_stride // access_bytes,
        pairing.chunk_head_stride // access_bytes,
        TO_HEAP=copy.to_heap,
        ARE_BLOCKS=places.are_blocks,
        UNIT=places.unit_tokens,
        RUNS=pairing.runs_per_token,
        BLOCK_SIZE=cache.block_size,
        CHUNK_TOKENS=layout.num_tokens,
        PAGE_TOKENS=layout.page_tokens,
        **constants,
        num_warps=NUM_WARPS,
    )


@lru_cache(maxsize=1024)
def _planned(
    num_rows: int, run_bytes: int, alignment: int, num_entries: int
) -> tuple[TilePlan, dict[str, object]]:
    """The tiles of every entry, and the kernel's constants for them."""
    plan = TilePlan.of(num_rows, run_bytes, alignment, TILE_WORDS)
    if plan.num_tiles * num_entries < MANY_TILES:
        plan = TilePlan.of(num_rows, run_bytes, alignment, SMALL_TOKEN_TILE_WORDS)
    return plan, plan.constants()


def _table(pairing: Pairing, access_bytes: int) -> torch.Tensor:
    """The pairing's table on its device, counted in accesses."""
    found: torch.Tensor | None = pairing.kept.get(access_bytes)
    if found is None:
        table = pairing.table()
        table[:, :6] //= access_bytes
        # The upload has ended when this returns, so any stream may read the table.
        found = torch.from_numpy(table.reshape(-1)).to(pairing.cache.device)
        pairing.kept[access_bytes] = found
    return found
