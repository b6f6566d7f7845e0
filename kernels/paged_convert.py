"""Paged copy with conversion: bf16 or fp16 in the engine's cache, fp8 e4m3 in the chunks.

====================================  ==============================  ==============================
launcher, with fp8 ``Chunks``         reads                           writes
====================================  ==============================  ==============================
:func:`~.paged_copy.store_tokens`     tokens of 2-byte elements       fp8 tokens, and float32 scales
:func:`~.paged_copy.load_tokens`      fp8 tokens, and their scales    tokens of 2-byte elements
====================================  ==============================  ==============================

There is one scale for each (chunk, plane, layer, head): the largest finite magnitude ``m`` among
the tokens that are stored, divided by 448, the largest e4m3 number; but at least ``2**-126``. With
``s`` the scale, an element ``x`` comes back with an error of at most

    ``max(|x| / 16, s / 1024) * (1 + 2**-20)``

before it is rounded to the cache's dtype: e4m3 has 3 mantissa bits, so half a step is a 16th of a
number's magnitude; below ``s / 64`` steps have the fixed width ``s / 512``. As ``s / 1024`` is
``m / 458752``, one large element costs its neighbours their precision: a few of 3e38 and a thousand
of 1 come back as the same few and a thousand zeros. Signs are kept, that of zero included. NaN
stays NaN; infinities become ``m`` with their sign, which is 0 if nothing finite is beside them.

Storing is one launch. A program owns the tokens of one (chunk, head, plane, layer). It reads them
once for the maximum and a second time, now from the device's L2 cache, to convert them: 2 bytes
read and 1 written for each element. Loading reads 1 and writes 2. Grid: layers x planes x heads x
chunks.

e4m3 is rounded to nearest even in integer arithmetic, since sm_80 has no instruction for it; from
sm_89 on the instruction is used.

Store all tokens of a chunk in one call: a later call leaves the bytes of earlier tokens as they are
but overwrites their scale. On a CPU: :mod:`kvheap.kernels.paged_convert_cpu`, which is also the
reference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from kvheap.kernels.arrays import alignment_of
from kvheap.kernels.direct_launch import launch
from kvheap.kernels.launch import jit, number_jit, resident, tl, triton
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_places import locate_tokens, report_bad_places
from kvheap.kernels.paged_tiles import place_numbers
from kvheap.kernels.tiles import Divisor, Variant
from kvheap.kernels.token_copy import Chunks, TokenCopy, require_convertible

__all__ = ["conversion_kernels", "launch_conversion"]

SCALE_BYTES = 4
"""Bytes of a scale, a float32."""

TILE_ELEMENTS = 4096
"""Elements that a program converts in one step, 8 KiB at 2 bytes each: four 16-byte loads for each
of 128 threads. Reasoned, not yet measured on a GPU."""

NUM_WARPS = 4
"""Warps of one program."""

INSTRUCTION_CAPABILITY = (8, 9)
"""The first compute capability with an instruction for e4m3."""


@jit()
def _to_e4m3(x):  # type: ignore[no-untyped-def]
    """The e4m3 codes of float32 numbers of magnitude up to 448, rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 128
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Adding 2**23 rounds to a whole number of the smallest step, 2**-9.
    steps = magnitude.to(tl.float32, bitcast=True) * 512.0 + 8388608.0
    subnormal = steps.to(tl.int32, bitcast=True) & 15
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 127, code)
    return (sign | code).to(tl.uint8)


@jit()
def _from_e4m3(code):  # type: ignore[no-untyped-def]
    """The numbers of e4m3 codes, as float32."""
    bits = code.to(tl.int32)
    magnitude = bits & 127
    normal = ((magnitude << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    subnormal = magnitude.to(tl.float32) * 0.001953125
    x = tl.where(magnitude < 8, subnormal, normal)
    x = tl.where(magnitude == 127, float("nan"), x)
    return _with_sign(x, bits << 24)


@jit()
def _with_sign(magnitude, bits):  # type: ignore[no-untyped-def]
    """Float32 numbers with the sign that is the highest of 32 ``bits``.

    By an operation on bits: Triton lowers ``-x`` to ``0 - x``, which loses the sign of zero.
    """
    return (magnitude.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(
        tl.float32, bitcast=True
    )


@number_jit("place_ptr")
def _convert_tokens_kernel(  # type: ignore[no-untyped-def]
    words_ptr,
    place_ptr,
    table_ptr,
    error_ptr,
    num_programs,
    num_chunks,
    chunks_per_layer,
    num_tokens,
    place_start,
    place_bytes,
    place_limit,
    unit,
    unit_magic,
    unit_shift,
    heads,
    block_size,
    block_magic,
    block_shift,
    chunk_tokens,
    TO_HEAP: tl.constexpr,
    INSTRUCTION: tl.constexpr,
    ELEMENT: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    CACHE_VECTOR: tl.constexpr,
    HEAP_VECTOR: tl.constexpr,
):
    """Convert the tokens of every P-th (chunk, head, plane, layer); table entries count bytes.

    The compiler knows no alignment of an integer that is cast to a pointer, so elements are counted
    from ``words_ptr``, which is aligned to 16 bytes.
    """
    for program in range(tl.program_id(0), num_programs, tl.num_programs(0)):
        _convert_part(
            words_ptr,
            place_ptr,
            table_ptr,
            error_ptr,
            program,
            num_chunks,
            chunks_per_layer,
            num_tokens,
            place_start,
            place_bytes,
            place_limit,
            unit,
            unit_magic,
            unit_shift,
            heads,
            block_size,
            block_magic,
            block_shift,
            chunk_tokens,
            TO_HEAP,
            INSTRUCTION,
            ELEMENT,
            TOKENS,
            HEAD_DIM,
            DIMS,
            CACHE_VECTOR,
            HEAP_VECTOR,
        )


@jit()
def _convert_part(  # type: ignore[no-untyped-def]
    words_ptr,
    place_ptr,
    table_ptr,
    error_ptr,
    program,
    num_chunks,
    chunks_per_layer,
    num_tokens,
    place_start,
    place_bytes,
    place_limit,
    unit,
    unit_magic,
    unit_shift,
    heads,
    block_size,
    block_magic,
    block_shift,
    chunk_tokens,
    TO_HEAP: tl.constexpr,
    INSTRUCTION: tl.constexpr,
    ELEMENT: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    CACHE_VECTOR: tl.constexpr,
    HEAP_VECTOR: tl.constexpr,
):
    """Convert the tokens of one (chunk, head, plane, layer)."""
    anchor = words_ptr.to(tl.int64)
    cache_ptr = words_ptr.to(tl.pointer_type(ELEMENT))
    heap_ptr = words_ptr.to(tl.pointer_type(tl.uint8))
    chunk_number = program % num_chunks
    head = (program // num_chunks) % heads
    number = program // num_chunks // heads
    entry = table_ptr + number * 9
    cache_base = tl.load(entry) - anchor
    chunk_offset = tl.load(entry + 1)
    block_stride = tl.load(entry + 2)
    slot_stride = tl.load(entry + 3)
    cache_head_stride = tl.load(entry + 4)
    scale_offset = tl.load(entry + 5)
    token_stride = tl.load(entry + 6)
    head_stride = tl.load(entry + 7)
    layer = tl.load(entry + 8)
    chunk = tl.load(words_ptr + layer * chunks_per_layer + chunk_number) - anchor
    scale_ptr = (heap_ptr + chunk + scale_offset + head * 4).to(tl.pointer_type(tl.float32))
    elements = tl.arange(0, DIMS)
    is_element = elements < HEAD_DIM
    scale = 0.0
    most = 0.0
    if TO_HEAP:
        largest = tl.zeros([TOKENS], tl.float32)
        any_token = tl.zeros([TOKENS], tl.int32)
    else:
        scale = tl.load(scale_ptr)
    for step in range(0, 2 if TO_HEAP else 1):
        if TO_HEAP and step == 1:
            scale = tl.maximum(tl.max(largest) / 448.0, 1.1754943508222875e-38)
            most = tl.max(largest) / scale
            tl.store(scale_ptr, scale, mask=tl.max(any_token) > 0)
        for first in range(0, chunk_tokens, TOKENS):
            in_chunk = first + tl.arange(0, TOKENS)
            token = chunk_number * chunk_tokens + in_chunk
            is_token = (token < num_tokens) & (in_chunk < chunk_tokens)
            place, block, in_block, is_inside = locate_tokens(
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
            if number + head == 0:
                report_bad_places(error_ptr, token, is_token, place, is_inside)
            kept = is_token & is_inside
            mask = kept[:, None] & is_element[None, :]
            cache_row = cache_base + block * block_stride + in_block.to(tl.int64) * slot_stride
            cache_row += head.to(tl.int64) * cache_head_stride
            cache_row = tl.multiple_of(cache_row // 2, CACHE_VECTOR)
            in_cache = cache_ptr + cache_row[:, None] + elements[None, :]
            heap_row = (
                chunk
                + chunk_offset
                + in_chunk.to(tl.int64) * token_stride
                + head.to(tl.int64) * head_stride
            )
            heap_row = tl.multiple_of(heap_row, HEAP_VECTOR)
            in_heap = heap_ptr + heap_row[:, None] + elements[None, :]
            if TO_HEAP:
                x = tl.load(in_cache, mask=mask, other=0.0).to(tl.float32)
                if step == 0:
                    size = tl.abs(x)
                    size = tl.where(size < float("inf"), size, 0.0)
                    largest = tl.maximum(largest, tl.max(size, 1))
                    any_token |= kept.to(tl.int32)
                else:
                    # Comparisons keep NaN; a minimum might not.
                    y = x / scale
                    size = tl.abs(y)
                    y = _with_sign(tl.where(size > most, most, size), y.to(tl.int32, bitcast=True))
                    if INSTRUCTION:
                        code = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
                    else:
                        code = _to_e4m3(y)
                    tl.store(in_heap, code, mask=mask)
            else:
                code = tl.load(in_heap, mask=mask, other=0)
                if INSTRUCTION:
                    x = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
                else:
                    x = _from_e4m3(code)
                tl.store(in_cache, (x * scale).to(ELEMENT), mask=mask)


def launch_conversion(copy: TokenCopy, max_sms: int | None = None) -> None:
    """Convert at least one token on the current device, on its current stream.

    Args:
        copy: the copy; its chunks hold fp8.
        max_sms: how many multiprocessors may be used; None for all.
    """
    pairing, places, chunks = copy.pairing, copy.places, copy.chunks
    cache, layout = pairing.cache, chunks.layout
    num_chunks = -(-places.num_tokens // layout.num_tokens)
    num_programs = num_chunks * pairing.num_heads * len(pairing.entries) * pairing.num_layers
    variant = _variant_for(cache, copy.to_heap, _chunk_alignment(chunks, cache.head_dim))
    values = places.values
    place_bytes = values.element_size() if isinstance(values, torch.Tensor) else 0
    with copy.words(0) as words:
        sent, place_words = copy.send(words, (), access_bytes=1)
        launch(
            _convert_tokens_kernel,
            variant,
            num_programs if max_sms is None else min(num_programs, max_sms),
            sent,
            place_words,
            _table(copy),
            cache.error_word(),
            num_programs,
            num_chunks,
            num_chunks if layout.is_per_layer else 0,
            places.num_tokens,
            *place_numbers(pairing, places.are_blocks, place_bytes, len(chunks.addresses)),
            pairing.num_heads,
            *Divisor.of(cache.block_size),
            layout.num_tokens,
        )


def conversion_kernels(cache: PagedKVCache, align_bytes: int) -> list[tuple[Any, Variant]]:
    """The kernel of conversions of a cache, and what it is compiled for.

    Args:
        cache: of bfloat16 or float16.
        align_bytes: what divides the addresses of chunks, a power of two.

    Raises:
        ValueError: the cache cannot be converted.
    """
    require_convertible(cache)
    usual = alignment_of(align_bytes, cache.head_dim)
    variants = [
        _variant_for(cache, to_heap, alignment)
        for alignment in {usual, min(usual, SCALE_BYTES)}
        for to_heap in (True, False)
    ]
    return [(_convert_tokens_kernel, variant) for variant in variants]


def _variant_for(cache: PagedKVCache, to_heap: bool, chunk_alignment: int) -> Variant:
    """What the kernel is compiled for, for the device of a cache."""
    return _variant(
        to_heap,
        _has_instruction(cache.device),
        cache.dtype == torch.bfloat16,
        cache.head_dim,
        max(1, cache.alignment // 2),
        chunk_alignment,
    )


@lru_cache(maxsize=256)
def _variant(
    to_heap: bool,
    has_instruction: bool,
    is_bfloat16: bool,
    head_dim: int,
    cache_vector: int,
    heap_vector: int,
) -> Variant:
    dims: int = triton.next_power_of_2(head_dim)
    constants = {
        "TO_HEAP": to_heap,
        "INSTRUCTION": has_instruction,
        "ELEMENT": tl.bfloat16 if is_bfloat16 else tl.float16,
        "TOKENS": max(1, TILE_ELEMENTS // dims),
        "HEAD_DIM": head_dim,
        "DIMS": dims,
        "CACHE_VECTOR": cache_vector,
        "HEAP_VECTOR": heap_vector,
    }
    return Variant(1, TILE_ELEMENTS, NUM_WARPS, constants)


def _has_instruction(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= INSTRUCTION_CAPABILITY


def _chunk_alignment(chunks: Chunks, head_dim: int) -> int:
    """What divides the address of each head in the chunks: one of two values for one alignment.

    Scales that come first leave the elements at any multiple of 4 bytes, and each width of access
    is a kernel to compile.
    """
    layout = chunks.layout
    strides = (layout.token_stride, layout.layer_stride, layout.plane_stride)
    possible = alignment_of(chunks.alignment, head_dim, chunks.data_offset, *strides)
    usual = alignment_of(chunks.alignment, head_dim)
    return usual if possible >= usual else min(possible, SCALE_BYTES)


def _table(copy: TokenCopy) -> torch.Tensor:
    """The pairing's table on its device, in bytes; what is of the chunks is of those of fp8.

    Column 5 is the offset of the first head's scale. The table is kept with the pairing.
    """
    pairing, chunks = copy.pairing, copy.chunks
    key = ("fp8", chunks.layout, chunks.data_offset, chunks.scale_offset)
    found: torch.Tensor | None = pairing.kept.get(key)
    if found is None:
        head_dim, num_layers = pairing.cache.head_dim, chunks.layout.num_layers
        table = pairing.table()
        table[:, 1] = table[:, 1] // pairing.cache.dtype.itemsize + chunks.data_offset
        planes = np.arange(len(pairing.entries))[:, None]
        chunk_heads = chunks.layout.row_bytes // head_dim
        scales = (planes * num_layers + np.array(pairing.chunk_layers)) * chunk_heads
        assert chunks.scale_offset is not None
        table[:, 5] = chunks.scale_offset + 4 * (scales.reshape(-1) + pairing.chunk_head)
        table[:, 6] = chunks.layout.token_stride
        table[:, 7] = head_dim
        found = resident(table.reshape(-1), pairing.cache.device)
        pairing.kept[key] = found
    return found
