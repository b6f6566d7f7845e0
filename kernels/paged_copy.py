"""Paged copy: KV of tokens between an engine's paged cache and chunks, all layers in one launch.

=====================  ============================  ============================
launcher               reads                         writes
=====================  ============================  ============================
:func:`store_tokens`   the cache, at ``slots``       chunks, token after token
:func:`load_tokens`    chunks, token after token     the cache, at ``slots``
=====================  ============================  ============================

Bytes moved: 2 x tokens x ``cache.token_bytes``, plus 16 for each access's row, which the device's
caches serve. The shortest possible time is those bytes divided by the memory bandwidth.

Bytes that are contiguous on both sides are one run: all heads of a token, or one head, as far as
the strides allow (:class:`~kvheap.kernels.paged_plan.Pairing`). The runs of one (layer, plane) are
the rows of a matrix, one for each run of each token, and their accesses of up to 16 bytes are
numbered through (:mod:`kvheap.kernels.tiles`), so that the tokens of a block follow each other as
they do in memory. The tiles of one (layer, plane) are next to each other; a plane of short runs has
few tiles. A program reads the entry of its tile in a small table (addresses, strides, layer), finds
for each access its token, its slot and its chunk, and moves the tile. Without an SM budget there is
a program for each tile; with one, a program for each multiprocessor of it, so it never runs on more
of them: program ``p`` of ``P`` copies tiles ``p``, ``p + P``, and so on.

All that depends on the cache, the chunks or the tokens is a number that the kernel is given, the
direction included. It is compiled for the width of an access only, once without and once with a
budget.

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

from collections.abc import Sequence
from typing import Any

from kvheap.kernels.arguments import require_sms
from kvheap.kernels.direct_launch import launch
from kvheap.kernels.launch import current, number_jit, runs_kernels, tl
from kvheap.kernels.paged_convert import launch_conversion
from kvheap.kernels.paged_convert_cpu import convert_on_cpu
from kvheap.kernels.paged_copy_cpu import copy_on_cpu
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_places import locate_tokens, report_bad_places
from kvheap.kernels.paged_slots import BlockIds, Slots
from kvheap.kernels.paged_tiles import BUDGET_TILE, TILE, TokenLaunches, width_of_access
from kvheap.kernels.tiles import Variant, locate_vectors, quotient, variant_of
from kvheap.kernels.token_copy import Chunks, TokenCopy

__all__ = ["BlockIds", "Chunks", "load_tokens", "run_copy", "store_tokens", "token_kernels"]


@number_jit("place_ptr")
def _copy_tokens_kernel(  # type: ignore[no-untyped-def]
    words_ptr,
    place_ptr,
    table_ptr,
    error_ptr,
    to_heap,
    num_all_tiles,
    num_groups,
    first_chunk,
    chunks_per_layer,
    num_tokens,
    place_start,
    place_bytes,
    place_limit,
    unit,
    unit_magic,
    unit_shift,
    group_tiles,
    tiles_magic,
    tiles_shift,
    run_vectors,
    run_magic,
    run_shift,
    runs,
    runs_magic,
    runs_shift,
    block_size,
    block_magic,
    block_shift,
    chunk_tokens,
    chunk_magic,
    chunk_shift,
    page_tokens,
    page_magic,
    page_shift,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Copy every P-th tile; table entries and addresses of chunks count accesses.

    The compiler knows no alignment of an integer that is cast to a pointer, so words are counted
    from ``words_ptr``, which is aligned to 16 bytes.
    """
    anchor = words_ptr.to(tl.pointer_type(WORD))
    anchor_vector = words_ptr.to(tl.int64) >> SHIFT
    for tile_of_all in range(tl.program_id(0), num_all_tiles, tl.num_programs(0)):
        first_entry = tile_of_all * 0
        first_tile = tile_of_all * 0
        tiles, t_magic, t_shift = group_tiles, tiles_magic, tiles_shift
        length, l_magic, l_shift = run_vectors, run_magic, run_shift
        for other in range(0, num_groups - 1):
            group_ptr = words_ptr + other * 8
            is_in = tile_of_all >= tl.load(group_ptr).to(tl.int32)
            first_tile = tl.where(is_in, tl.load(group_ptr).to(tl.int32), first_tile)
            first_entry = tl.where(is_in, tl.load(group_ptr + 1).to(tl.int32), first_entry)
            tiles = tl.where(is_in, tl.load(group_ptr + 2).to(tl.int32), tiles)
            t_magic = tl.where(is_in, tl.load(group_ptr + 3).to(tl.int32), t_magic)
            t_shift = tl.where(is_in, tl.load(group_ptr + 4).to(tl.int32), t_shift)
            length = tl.where(is_in, tl.load(group_ptr + 5).to(tl.int32), length)
            l_magic = tl.where(is_in, tl.load(group_ptr + 6).to(tl.int32), l_magic)
            l_shift = tl.where(is_in, tl.load(group_ptr + 7).to(tl.int32), l_shift)
        tile = tile_of_all - first_tile
        number = quotient(tile, t_magic, t_shift)
        tile -= number * tiles
        entry_ptr = table_ptr + (first_entry + number) * 9
        cache_base = tl.load(entry_ptr)
        chunk_offset = tl.load(entry_ptr + 1)
        block_stride = tl.load(entry_ptr + 2)
        slot_stride = tl.load(entry_ptr + 3)
        head_stride = tl.load(entry_ptr + 4)
        page_stride = tl.load(entry_ptr + 5)
        token_stride = tl.load(entry_ptr + 6)
        chunk_head_stride = tl.load(entry_ptr + 7)
        layer = tl.load(entry_ptr + 8).to(tl.int32)

        row, col = locate_vectors(tile, length, l_magic, l_shift, VECTORS)
        token = quotient(row, runs_magic, runs_shift)
        run = row - token * runs
        is_token = token < num_tokens
        place, block, offset, is_inside = locate_tokens(
            place_ptr,
            place_start,
            place_bytes,
            place_limit,
            token,
            is_token,
            unit,
            unit_magic,
            unit_shift,
            block_size,
            block_magic,
            block_shift,
        )
        if first_entry + number == 0:
            is_first = is_token & (run == 0) & (col == 0)
            report_bad_places(error_ptr, token, is_first, place, is_inside)
        chunk = quotient(token, chunk_magic, chunk_shift)
        in_chunk = token - chunk * chunk_tokens
        page = quotient(in_chunk, page_magic, page_shift)
        chunk_ptr = words_ptr + first_chunk + layer * chunks_per_layer
        in_heap = (
            tl.load(chunk_ptr + chunk, mask=is_token, other=0)
            + chunk_offset
            + page * page_stride
            + (in_chunk - page * page_tokens) * token_stride
            + run * chunk_head_stride
        )
        in_cache = cache_base + block * block_stride + offset * slot_stride + run * head_stride
        col_vector = col - anchor_vector
        source = tl.where(to_heap != 0, in_cache, in_heap) + col_vector
        target = tl.where(to_heap != 0, in_heap, in_cache) + col_vector
        words = tl.arange(0, VECTOR)[None, :]
        mask = is_inside[:, None] & (words >= 0)
        data = tl.load(anchor + (source[:, None] * VECTOR + words), mask=mask)
        tl.store(anchor + (target[:, None] * VECTOR + words), data, mask=mask)


def store_tokens(
    cache: PagedKVCache,
    slots: Slots,
    chunks: Chunks,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    eager: bool = False,
    max_sms: int | None = None,
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
        max_sms: how many multiprocessors may be used; None for all. Ignored on a CPU.

    Raises:
        ValueError: slots are out of range, or cache and chunks do not fit; nothing is written.
        TypeError: slots are not integers, or ``layers`` or ``heads`` have a wrong type; nothing is
            written.
    """
    run_copy(TokenCopy.of(cache, slots, chunks, layers, heads, eager, to_heap=True), max_sms)


def load_tokens(
    chunks: Chunks,
    cache: PagedKVCache,
    slots: Slots,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    eager: bool = False,
    max_sms: int | None = None,
) -> None:
    """Copy the KV of tokens from chunks to ``slots`` of a cache, in one launch.

    Arguments and errors are those of :func:`store_tokens`. Two tokens must not have the same slot:
    on the host that is refused, on a device only in eager mode.
    """
    run_copy(TokenCopy.of(cache, slots, chunks, layers, heads, eager, to_heap=False), max_sms)


def run_copy(copy: TokenCopy, max_sms: int | None = None) -> None:
    """Execute a checked copy in one launch on the current stream.

    Args:
        copy: the copy.
        max_sms: how many multiprocessors may be used; None for all. Ignored on a CPU.

    Raises:
        ValueError: ``max_sms`` is less than 1, or the copy is too large for one launch; nothing is
            written.
        TypeError: ``max_sms`` is not an integer; nothing is written.
    """
    require_sms(max_sms)
    if not copy.places.num_tokens:
        return
    is_exact = copy.chunks.scale_offset is None
    device = copy.pairing.cache.device
    if runs_kernels(device):
        with current(device):
            (_launch_copy if is_exact else launch_conversion)(copy, max_sms)
    else:
        (copy_on_cpu if is_exact else convert_on_cpu)(copy)


def _launch_copy(copy: TokenCopy, max_sms: int | None = None) -> None:
    pairing, places = copy.pairing, copy.places
    access_bytes = width_of_access(pairing, copy.chunks.alignment)
    launches = TokenLaunches.of(pairing, access_bytes)
    planned = launches.planned(places, is_budgeted=max_sms is not None)
    with copy.words(len(planned.first_words)) as words:
        sent, place_words = copy.send(words, planned.first_words, access_bytes)
        launch(
            _copy_tokens_kernel,
            planned.variant,
            planned.num_tiles if max_sms is None else min(planned.num_tiles, max_sms),
            sent,
            place_words,
            launches.table,
            pairing.cache.error_word(),
            int(copy.to_heap),
            *planned.numbers,
        )


def token_kernels(widths: Sequence[int]) -> list[tuple[Any, Variant]]:
    """The kernels of copies by accesses of these widths, and what they are compiled for."""
    shapes = (TILE, BUDGET_TILE)
    return [(_copy_tokens_kernel, variant_of(each, to)) for each in widths for to in shapes]
