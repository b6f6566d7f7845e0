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

import numpy as np
import torch

from kvheap.kernels.arrays import Int64Array, alignment_of
from kvheap.kernels.launch import jit, tl, triton, upload
from kvheap.kernels.paged_places import locate_tokens, report_bad_places
from kvheap.kernels.tiles import NUM_WARPS
from kvheap.kernels.token_copy import Chunks, TokenCopy

__all__ = ["launch_conversion"]

TILE_ELEMENTS = 4096
"""Elements that a program converts in one step, 8 KiB at 2 bytes each: four 16-byte loads for each
of 128 threads. Reasoned, not yet measured on a GPU."""

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


@jit(
    do_not_specialize=[
        "num_tokens",
        "num_blocks",
        "num_chunks",
        "chunks_per_layer",
        "token_stride",
        "head_stride",
    ]
)
def _convert_tokens_kernel(  # type: ignore[no-untyped-def]
    cache_ptr,
    heap_ptr,
    table_ptr,
    place_ptr,
    chunk_ptr,
    error_ptr,
    num_tokens,
    num_blocks,
    num_chunks,
    chunks_per_layer,
    token_stride,
    head_stride,
    TO_HEAP: tl.constexpr,
    ARE_BLOCKS: tl.constexpr,
    INSTRUCTION: tl.constexpr,
    ELEMENT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
    CACHE_VECTOR: tl.constexpr,
    HEAP_VECTOR: tl.constexpr,
):
    """Convert the tokens of one (chunk, head, plane, layer); table entries count bytes."""
    program = tl.program_id(0)
    chunk_number = program % num_chunks
    head = (program // num_chunks) % HEADS
    number = program // num_chunks // HEADS
    entry = table_ptr + number * 7
    cache_base = tl.load(entry)
    chunk_offset = tl.load(entry + 1)
    block_stride = tl.load(entry + 2)
    slot_stride = tl.load(entry + 3)
    cache_head_stride = tl.load(entry + 4)
    scale_offset = tl.load(entry + 5)
    layer = tl.load(entry + 6)
    chunk = tl.load(chunk_ptr + layer * chunks_per_layer + chunk_number)
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
        for first in range(0, CHUNK_TOKENS, TOKENS):
            in_chunk = first + tl.arange(0, TOKENS)
            token = chunk_number * CHUNK_TOKENS + in_chunk
            is_token = (token < num_tokens) & (in_chunk < CHUNK_TOKENS)
            place, block, in_block, is_inside = locate_tokens(
                place_ptr, token, is_token, num_blocks, ARE_BLOCKS, 1, BLOCK_SIZE
            )
            if number + head == 0:
                report_bad_places(error_ptr, token, is_token, place, is_inside)
            kept = is_token & is_inside
            mask = kept[:, None] & is_element[None, :]
            cache_row = cache_base + block * block_stride + in_block.to(tl.int64) * slot_stride
            cache_row += head.to(tl.int64) * cache_head_stride
            cache_row = tl.multiple_of(cache_row // 2, CACHE_VECTOR)
            in_cache = (
                cache_ptr.to(tl.pointer_type(ELEMENT)) + cache_row[:, None] + elements[None, :]
            )
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


def launch_conversion(copy: TokenCopy) -> None:
    """Convert at least one token on the current device, on its current stream.

    Args:
        copy: the copy; its chunks hold fp8.
    """
    pairing, places, chunks = copy.pairing, copy.places, copy.chunks
    cache, layout = pairing.cache, chunks.layout
    table = upload(_table(copy).reshape(-1), cache.device)
    num_chunks = -(-places.num_tokens // layout.num_tokens)
    dims: int = triton.next_power_of_2(cache.head_dim)
    tokens = max(1, min(TILE_ELEMENTS // dims, triton.next_power_of_2(layout.num_tokens)))
    num_programs = num_chunks * pairing.num_heads * len(pairing.entries) * pairing.num_layers
    _convert_tokens_kernel[(num_programs,)](
        *copy.kernel_tensors(table, places, access_bytes=1),
        places.num_tokens,
        cache.num_blocks,
        num_chunks,
        num_chunks if layout.is_per_layer else 0,
        layout.token_stride,
        cache.head_dim,
        TO_HEAP=copy.to_heap,
        ARE_BLOCKS=places.are_blocks,
        INSTRUCTION=_has_instruction(cache.device),
        ELEMENT=tl.bfloat16 if cache.dtype == torch.bfloat16 else tl.float16,
        HEADS=pairing.num_heads,
        HEAD_DIM=cache.head_dim,
        BLOCK_SIZE=cache.block_size,
        CHUNK_TOKENS=layout.num_tokens,
        TOKENS=tokens,
        DIMS=dims,
        CACHE_VECTOR=max(1, _cache_alignment(copy) // 2),
        HEAP_VECTOR=_chunk_alignment(chunks, cache.head_dim),
        num_warps=NUM_WARPS,
    )


def _has_instruction(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= INSTRUCTION_CAPABILITY


def _cache_alignment(copy: TokenCopy) -> int:
    pairing = copy.pairing
    heads = (entries[0].head_stride for entries in pairing.entries)
    anchor = pairing.cache.tensors[0].data_ptr()
    return alignment_of(pairing.alignment, anchor, *(heads if pairing.num_heads > 1 else ()))


def _chunk_alignment(chunks: Chunks, head_dim: int) -> int:
    layout = chunks.layout
    strides = (layout.token_stride, layout.layer_stride, layout.plane_stride)
    return alignment_of(chunks.alignment, head_dim, chunks.data_offset, *strides)


def _table(copy: TokenCopy) -> Int64Array:
    """The pairing's table in bytes, int64 ``[planes * layers, 7]``, with columns 1 and 5 replaced.

    Column 1 is the offset in a chunk of fp8, column 5 the offset of the first head's scale.
    """
    pairing, chunks = copy.pairing, copy.chunks
    head_dim, num_layers = pairing.cache.head_dim, chunks.layout.num_layers
    table = pairing.table()
    table[:, 1] = table[:, 1] // pairing.cache.dtype.itemsize + chunks.data_offset
    planes = np.arange(len(pairing.entries))[:, None]
    chunk_heads = chunks.layout.row_bytes // head_dim
    scales = (planes * num_layers + np.array(pairing.chunk_layers)) * chunk_heads
    assert chunks.scale_offset is not None
    table[:, 5] = chunks.scale_offset + 4 * (scales.reshape(-1) + pairing.chunk_head)
    return table
