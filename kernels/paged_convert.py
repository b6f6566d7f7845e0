"""Paged copy with conversion: bf16 or fp16 in the engine's cache, fp8 e4m3 in the chunks.

=========================  ==============================  ================================
launcher                   reads                           writes
=========================  ==============================  ================================
:func:`store_converted`    tokens of 2-byte elements       fp8 tokens, and float32 scales
:func:`load_converted`     fp8 tokens, scales              tokens of 2-byte elements
=========================  ==============================  ================================

One scale for each (chunk, plane, layer, head): the largest magnitude among the tokens that are
stored, over 448, the largest e4m3 number. With ``s`` the scale, an element ``x`` comes back
within

    ``max(|x| / 16, s / 1024) * (1 + 2**-20)``

before it is rounded to the cache's dtype: e4m3 has 3 mantissa bits, so half a step is a 16th of a
number's magnitude, and below ``s / 64`` steps have the fixed width ``s / 512``. NaN stays NaN;
infinities become the largest finite magnitude of their (chunk, plane, layer, head).

Storing is one launch: a program owns the tokens of one (chunk, head, plane, layer), reads them for
the maximum and again, now from the cache of the device, to convert them: 2 bytes read, and 1
written, for each element. Loading: 1 read, 2 written. Grid: layers x planes x heads x chunks.

e4m3 is rounded in integer arithmetic, to nearest and even, since sm_80 has no instruction for it;
from sm_89 on the instruction is used.

A chunk is stored whole: what an earlier call stored of it keeps its bytes but not its scale.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import alignment_of, bytes_of, jit, tl, triton, upload
from kvheap.kernels.paged_copy import (
    Chunks,
    load_tokens,
    pairing_of,
    require_chunks,
    require_reachable,
    store_tokens,
)
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_plan import Pairing
from kvheap.kernels.paged_slots import Places, Slots

__all__ = ["LARGEST_E4M3", "load_converted", "store_converted"]

Int64Array = npt.NDArray[np.int64]

LARGEST_E4M3 = 448.0

SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32: scales of chunks of zeros, and of the smallest numbers."""

CONVERTIBLE = (torch.bfloat16, torch.float16)

TILE_ELEMENTS = 4096
"""Elements of one step of a program: 8 KiB of 2 bytes, four 16-byte loads of each of 128 threads.
Reasoned, not yet measured on a GPU."""

NUM_WARPS = 4

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
    return tl.where(bits >= 128, -x, x)


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
    if TO_HEAP:
        largest = tl.zeros([TOKENS], tl.float32)
        any_token = tl.zeros([TOKENS], tl.int32)
    else:
        scale = tl.load(scale_ptr)
    for step in range(0, 2 if TO_HEAP else 1):
        if TO_HEAP and step == 1:
            scale = tl.maximum(tl.max(largest) / 448.0, 1.1754943508222875e-38)
            tl.store(scale_ptr, scale, mask=tl.max(any_token) > 0)
        for first in range(0, CHUNK_TOKENS, TOKENS):
            in_chunk = first + tl.arange(0, TOKENS)
            token = chunk_number * CHUNK_TOKENS + in_chunk
            is_token = (token < num_tokens) & (in_chunk < CHUNK_TOKENS)
            if ARE_BLOCKS:
                place = tl.load(place_ptr + token // BLOCK_SIZE, mask=is_token, other=-1)
                block = place.to(tl.int64)
                inside = (block >= 0) & (block < num_blocks)
                in_block = token % BLOCK_SIZE
            else:
                place = tl.load(place_ptr + token, mask=is_token, other=-1).to(tl.int64)
                inside = (place >= 0) & (place < num_blocks.to(tl.int64) * BLOCK_SIZE)
                slot = tl.where(inside, place, 0).to(tl.int32)
                block = (slot // BLOCK_SIZE).to(tl.int64)
                in_block = slot % BLOCK_SIZE
            if number + head == 0:
                near = tl.minimum(tl.maximum(place.to(tl.int64), -2147483648), 2147483647)
                report = token.to(tl.int64) * 4294967296 + (near + 2147483648)
                is_bad = is_token & (place != -1) & (inside == 0)
                tl.atomic_min(error_ptr + in_chunk * 0, report, mask=is_bad)
            kept = is_token & inside
            mask = kept[:, None] & is_element[None, :]
            row = cache_base + block * block_stride + in_block.to(tl.int64) * slot_stride
            row += head.to(tl.int64) * cache_head_stride
            row = tl.multiple_of(row // 2, CACHE_VECTOR)
            in_cache = cache_ptr.to(tl.pointer_type(ELEMENT)) + row[:, None] + elements[None, :]
            place_in_chunk = (
                chunk
                + chunk_offset
                + in_chunk.to(tl.int64) * token_stride
                + head.to(tl.int64) * head_stride
            )
            place_in_chunk = tl.multiple_of(place_in_chunk, HEAP_VECTOR)
            in_heap = heap_ptr + place_in_chunk[:, None] + elements[None, :]
            if TO_HEAP:
                x = tl.load(in_cache, mask=mask, other=0.0).to(tl.float32)
                if step == 0:
                    size = tl.abs(x)
                    size = tl.where(size < float("inf"), size, 0.0)
                    largest = tl.maximum(largest, tl.max(size, 1))
                    any_token |= kept.to(tl.int32)
                else:
                    # Comparisons let NaN through, where a minimum might not.
                    y = x / scale
                    y = tl.where(y > 448.0, 448.0, tl.where(y < -448.0, -448.0, y))
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


@dataclass(frozen=True, slots=True)
class Conversion:
    """One copy with conversion, checked and ready."""

    exact: Pairing
    """The cache beside a chunk of its own dtype: which layers and heads are meant."""
    places: Places
    chunks: Chunks
    scale_offset: int
    """Where in a chunk the scales begin, float32 ``[planes, layers, heads]``."""
    chunk_heads: int
    to_heap: bool


def store_converted(
    cache: PagedKVCache,
    slots: Slots,
    chunks: Chunks,
    scale_offset: int,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    eager: bool = False,
) -> None:
    """Copy the KV of the tokens at ``slots`` into chunks of fp8, in one launch.

    Args:
        cache: where from, of bfloat16 or float16.
        slots: as for :func:`~kvheap.kernels.paged_copy.store_tokens`.
        chunks: where to; their layout counts elements of one byte.
        scale_offset: where in a chunk the scales are, bytes: float32 ``[planes, layers, heads]``.
        layers: only those.
        heads: only those.
        eager: also check slots that are on a device.

    Raises:
        ValueError: as ``store_tokens``, or the cache is of another dtype; nothing is written.
    """
    _convert(cache, slots, chunks, scale_offset, layers, heads, eager, to_heap=True)


def load_converted(
    chunks: Chunks,
    cache: PagedKVCache,
    slots: Slots,
    scale_offset: int,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    eager: bool = False,
) -> None:
    """The opposite of :func:`store_converted`, with the same arguments and errors."""
    _convert(cache, slots, chunks, scale_offset, layers, heads, eager, to_heap=False)


def _convert(
    cache: PagedKVCache,
    slots: Slots,
    chunks: Chunks,
    scale_offset: int,
    layers: range | None,
    heads: slice | None,
    eager: bool,
    to_heap: bool,
) -> None:
    if cache.dtype not in CONVERTIBLE:
        raise ValueError(f"a cache of bfloat16 or float16 can be converted, got {cache.dtype}")
    layout = chunks.layout
    if layout.num_planes != cache.num_planes:
        raise ValueError(
            f"{cache.layout.name} has {cache.num_planes} planes, the chunk {layout.num_planes}"
        )
    if layout.page_tokens < layout.num_tokens:
        raise ValueError("chunks of several pages are copied bit by bit only")
    exact = pairing_of(cache, layout.with_item_bytes(cache.dtype.itemsize), layers, heads)
    places = Places.of(slots, exact, eager, distinct=not to_heap)
    require_chunks(exact, places.num_tokens, chunks)
    require_reachable(cache, chunks.buffer)
    if not places.num_tokens:
        return
    conversion = Conversion(
        exact, places, chunks, scale_offset, layout.row_bytes // cache.head_dim, to_heap
    )
    if cache.device.type == "cpu":
        _convert_on_cpu(conversion)
    else:
        with torch.cuda.device(cache.device):
            _convert_on_gpu(conversion)


def _convert_on_gpu(conversion: Conversion) -> None:
    exact, places, chunks = conversion.exact, conversion.places, conversion.chunks
    cache, layout = exact.cache, chunks.layout
    chunk_numbers = chunks.addresses - chunks.buffer.data_ptr()
    table = upload(_table(conversion).reshape(-1), cache.device)
    num_chunks = -(-places.num_tokens // layout.num_tokens)
    dims: int = triton.next_power_of_2(cache.head_dim)
    tokens = max(1, min(TILE_ELEMENTS // dims, triton.next_power_of_2(layout.num_tokens)))
    num_programs = num_chunks * exact.num_heads * len(exact.entries) * exact.num_layers
    _convert_tokens_kernel[(num_programs,)](
        bytes_of(cache.tensors[0]),
        bytes_of(chunks.buffer),
        table,
        places.values
        if isinstance(places.values, torch.Tensor)
        else upload(places.values, cache.device),
        upload(chunk_numbers, cache.device),
        cache.error_word(),
        places.num_tokens,
        cache.num_blocks,
        num_chunks,
        num_chunks if layout.is_per_layer else 0,
        layout.token_stride,
        cache.head_dim,
        TO_HEAP=conversion.to_heap,
        ARE_BLOCKS=places.are_blocks,
        INSTRUCTION=_has_instruction(cache.device),
        ELEMENT=tl.bfloat16 if cache.dtype == torch.bfloat16 else tl.float16,
        HEADS=exact.num_heads,
        HEAD_DIM=cache.head_dim,
        BLOCK_SIZE=cache.block_size,
        CHUNK_TOKENS=layout.num_tokens,
        TOKENS=tokens,
        DIMS=dims,
        CACHE_VECTOR=max(1, _cache_alignment(exact) // 2),
        HEAP_VECTOR=_chunk_alignment(chunks, cache.head_dim),
        num_warps=NUM_WARPS,
    )


def _has_instruction(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= INSTRUCTION_CAPABILITY


def _cache_alignment(exact: Pairing) -> int:
    heads = (entries[0].head_stride for entries in exact.entries)
    anchor = exact.cache.tensors[0].data_ptr()
    return alignment_of(exact.alignment, anchor, *(heads if exact.num_heads > 1 else ()))


def _chunk_alignment(chunks: Chunks, head_dim: int) -> int:
    layout = chunks.layout
    strides = (layout.token_stride, layout.layer_stride, layout.plane_stride)
    return alignment_of(chunks.alignment, head_dim, *strides)


def _table(conversion: Conversion) -> Int64Array:
    """For each plane and layer what the kernel needs, int64 ``[planes * layers, 7]``, bytes."""
    exact, layout = conversion.exact, conversion.chunks.layout
    anchor = exact.cache.tensors[0].data_ptr()
    head_dim, first_head = exact.cache.head_dim, exact.chunk_head
    rows = []
    for plane, entries in enumerate(exact.entries):
        for entry, layer in zip(entries, exact.chunk_layers, strict=True):
            scales = (plane * layout.num_layers + layer) * conversion.chunk_heads + first_head
            rows.append(
                (
                    entry.cache_base - anchor,
                    layer * layout.layer_stride
                    + plane * layout.plane_stride
                    + first_head * head_dim,
                    entry.block_stride,
                    entry.slot_stride,
                    entry.head_stride,
                    conversion.scale_offset + scales * 4,
                    entry.layer,
                )
            )
    return np.array(rows, np.int64)


def _convert_on_cpu(conversion: Conversion) -> None:
    """By way of chunks of the cache's own dtype; a few torch calls for each chunk."""
    exact, chunks = conversion.exact, conversion.chunks
    chunk_bytes = exact.chunk.size_bytes
    plain = torch.zeros((len(chunks.addresses), chunk_bytes), dtype=torch.uint8)
    between = Chunks(
        plain,
        plain.data_ptr() + np.arange(len(plain), dtype=np.int64) * chunk_bytes,
        chunk_bytes,
        1,
        exact.chunk,
    )
    slots = conversion.places.as_slots(exact.cache.block_size).as_mapping()
    if conversion.to_heap:
        store_tokens(exact.cache, slots, between, layers=exact.layers, heads=exact.heads)
    is_kept = slots >= 0
    num_chunks = -(-len(slots) // chunks.layout.num_tokens)
    for row, address in enumerate(chunks.addresses.tolist()):
        first = row % num_chunks * chunks.layout.num_tokens
        kept = torch.from_numpy(is_kept[first : first + chunks.layout.num_tokens])
        _convert_chunk(conversion, plain[row], address, kept)
    if not conversion.to_heap:
        load_tokens(between, exact.cache, slots, layers=exact.layers, heads=exact.heads)


def _convert_chunk(
    conversion: Conversion, plain: torch.Tensor, address: int, kept: torch.Tensor
) -> None:
    """Convert one chunk to fp8 or back; ``kept`` says which of its tokens, bool ``[tokens]``."""
    exact, chunks = conversion.exact, conversion.chunks
    layout, heads = chunks.layout, conversion.chunk_heads
    raw: Any = (ctypes.c_char * chunks.size_bytes).from_address(address)
    packed = torch.frombuffer(raw, dtype=torch.uint8)
    part = (
        slice(None),
        slice(None) if layout.is_per_layer else torch.tensor(list(exact.chunk_layers)),
        slice(None),
        slice(exact.chunk_head, exact.chunk_head + exact.num_heads),
    )
    values = exact.chunk.view(plain.view(exact.cache.dtype), heads)
    codes = layout.view(packed.view(torch.float8_e4m3fn), heads)
    scale_shape = (layout.num_planes, layout.num_layers, heads)
    end = conversion.scale_offset + 4 * int(np.prod(scale_shape))
    scales = packed[conversion.scale_offset : end].view(torch.float32).view(scale_shape)
    if not conversion.to_heap:
        numbers = codes.float() * scales[:, :, None, :, None]
        values.copy_(numbers.to(values.dtype))
        return
    if not kept.any():
        return
    wanted = values[part][:, :, : len(kept)].float()
    sizes = wanted.abs()
    sizes = torch.where(sizes.isfinite() & kept[:, None, None], sizes, 0.0)
    found = (sizes.amax(dim=(2, 4)) / LARGEST_E4M3).clamp_min(SMALLEST_SCALE)
    scaled = (wanted / found[:, :, None, :, None]).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    # As bytes: torch indexes and selects no fp8 on a CPU.
    new, old = scaled.to(torch.float8_e4m3fn).view(torch.uint8), codes.view(torch.uint8)
    before = old[part][:, :, : len(kept)]
    merged = torch.where(kept[:, None, None], new, before)
    whole = old[part].clone()
    whole[:, :, : len(kept)] = merged
    old[part] = whole
    scales[part[0], part[1], part[3]] = found
