"""Block copy: N equal blocks of bytes between a dense tensor and addresses in one flat buffer.

============================  =====================  ======================  =================
launcher                      reads                  writes                  bytes moved
============================  =====================  ======================  =================
:func:`scatter_blocks`        ``blocks[i]``          ``buffer[address[i]]``  2 x N x block
:func:`gather_blocks`         ``buffer[address[i]]`` ``out[i]``              2 x N x block
:func:`move_blocks`           ``buffer[source[i]]``  ``buffer[target[i]]``   2 x N x block
:func:`fill_blocks`           nothing                ``buffer[address[i]]``  1 x N x block
============================  =====================  ======================  =================

plus 8 bytes for each address. The shortest possible time is those bytes divided by the memory
bandwidth.

``buffer`` is a contiguous tensor, viewed as bytes. Addresses are byte offsets in it, one for each
block; any value is allowed, even an odd one. ``blocks`` and ``out`` are ``[N, ...]`` of any dtype,
each block contiguous, with any stride between blocks; the blocks of ``out`` must not overlap.
Bytes are copied unchanged, so NaN patterns, fp8 and bool survive. Addressing is int64 from the
first multiplication on.

**On a GPU**, one kernel does all three copies: each side has an address for each block, or a
stride. The blocks are the rows of a matrix, and their accesses are numbered through
(:mod:`kvheap.kernels.tiles`), so that small blocks share a program and large ones are split over
many. The grid has one program for each tile. An access has the largest of 16, 8, 4, 2 and 1 bytes
that divides both bases, all addresses, the strides and the block size; the kernel is compiled for
that width and for nothing else.

**On a CPU**: :mod:`kvheap.kernels.block_copy_cpu`, which is also the reference; and
:mod:`kvheap.kernels.few_blocks` for a few.

Launches are on the current stream of the buffer's device and never synchronize. Host addresses are
checked. Addresses on the device are trusted, because a check would have to wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch

from kvheap.kernels.arguments import as_whole, require_memory, require_tensor, require_values
from kvheap.kernels.arrays import alignment_of
from kvheap.kernels.block_addresses import (
    Addresses,
    host_addresses,
    require_apart,
    require_disjoint,
)
from kvheap.kernels.block_copy_cpu import copy_on_cpu, fill_on_cpu, repeated_byte
from kvheap.kernels.block_sides import Dense, Scattered, Side, require_buffer
from kvheap.kernels.direct_launch import launch
from kvheap.kernels.few_blocks import copy_few
from kvheap.kernels.launch import anchor_on, current, jit, number_jit, runs_kernels, tl
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
from kvheap.kernels.untraced import untraced
from kvheap.kernels.uploads import Words

__all__ = ["block_kernels", "fill_blocks", "gather_blocks", "move_blocks", "scatter_blocks"]


TILE = TileShape(1024, 4)
"""Eight accesses for each of 128 threads: 16 KiB, if they have 16 bytes. Reasoned, not yet measured
on a GPU."""


@number_jit("source_ptr", "target_ptr")
def _copy_blocks_kernel(  # type: ignore[no-untyped-def]
    anchor_ptr,
    source_ptr,
    target_ptr,
    source_base: tl.int64,
    target_base: tl.int64,
    source_stride: tl.int64,
    target_stride: tl.int64,
    has_sources,
    has_targets,
    num_blocks,
    row_vectors,
    row_magic,
    row_shift,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Copy one tile; bases and addresses are in bytes, strides count accesses.

    The compiler knows no alignment of an integer that is cast to a pointer, so words are counted
    from ``anchor_ptr``, which is aligned to 16 bytes.
    """
    tile = tl.program_id(0)
    row, col = locate_vectors(tile, row_vectors, row_magic, row_shift, VECTORS)
    is_block = row < num_blocks
    first = col - (anchor_ptr.to(tl.int64) >> SHIFT)
    source = first + _first_vectors(
        source_ptr, source_base, source_stride, has_sources, row, is_block, SHIFT
    )
    target = first + _first_vectors(
        target_ptr, target_base, target_stride, has_targets, row, is_block, SHIFT
    )
    words = tl.arange(0, VECTOR)[None, :]
    mask = is_block[:, None] & (words >= 0)
    anchor = anchor_ptr.to(tl.pointer_type(WORD))
    data = tl.load(anchor + (source[:, None] * VECTOR + words), mask=mask)
    tl.store(anchor + (target[:, None] * VECTOR + words), data, mask=mask)


@number_jit("target_ptr")
def _fill_blocks_kernel(  # type: ignore[no-untyped-def]
    anchor_ptr,
    target_ptr,
    target_base: tl.int64,
    value: tl.int64,
    num_blocks,
    row_vectors,
    row_magic,
    row_shift,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Store ``value`` in one tile."""
    tile = tl.program_id(0)
    row, col = locate_vectors(tile, row_vectors, row_magic, row_shift, VECTORS)
    is_block = row < num_blocks
    target = _first_vectors(target_ptr, target_base, 0, 1, row, is_block, SHIFT)
    target += col - (anchor_ptr.to(tl.int64) >> SHIFT)
    words = tl.arange(0, VECTOR)[None, :]
    mask = is_block[:, None] & (words >= 0)
    anchor = anchor_ptr.to(tl.pointer_type(WORD))
    data = tl.full([VECTORS, VECTOR], value, WORD)
    tl.store(anchor + (target[:, None] * VECTOR + words), data, mask=mask)


@jit()
def _first_vectors(  # type: ignore[no-untyped-def]
    address_ptr, base, stride, has_addresses, row, is_block, SHIFT: tl.constexpr
):
    """The first access of each block, from its address or, without addresses, the stride."""
    is_indexed = is_block & (has_addresses != 0)
    address = base + tl.load(address_ptr + row, mask=is_indexed, other=0)
    return (address >> SHIFT) + row.to(tl.int64) * stride


@untraced
def scatter_blocks(
    blocks: torch.Tensor, buffer: torch.Tensor, addresses: Addresses, *, address_alignment: int = 1
) -> None:
    """Write ``blocks[i]`` to ``buffer`` at byte ``addresses[i]``, for all i, in one launch.

    Args:
        blocks: ``[N, ...]``, any dtype, on the buffer's device; each block contiguous.
        buffer: contiguous, any dtype.
        addresses: N byte offsets. Those on the host are checked: blocks must not overlap. An int64
            tensor on the buffer's GPU is trusted.
        address_alignment: for addresses on a GPU, a power of two that divides all of them. It
            allows wide accesses and is not checked; for host addresses it is computed.

    Raises:
        ValueError: shapes, strides, devices or addresses do not fit; nothing is written.
        TypeError: ``addresses`` are not integers; nothing is written.
    """
    is_plain = type(address_alignment) is int and address_alignment == 1
    if is_plain and copy_few(blocks, buffer, addresses, to_buffer=True):
        return
    block_bytes = _require_blocks("blocks", blocks, buffer)
    target = Scattered.of(buffer, addresses, block_bytes, address_alignment)
    _require_length(target, len(blocks))
    if target.on_host is not None:
        require_disjoint("addresses", target.on_host, block_bytes)
    _copy(Dense(blocks), target, len(blocks), block_bytes)


@untraced
def gather_blocks(
    buffer: torch.Tensor, addresses: Addresses, out: torch.Tensor, *, address_alignment: int = 1
) -> torch.Tensor:
    """Write the block at byte ``addresses[i]`` of ``buffer`` to ``out[i]``, in one launch.

    Args:
        buffer: contiguous, any dtype.
        addresses: N byte offsets, as for :func:`scatter_blocks`; blocks may repeat and overlap.
        out: ``[N, ...]``, any dtype, on the buffer's device; each block contiguous. The blocks must
            overlap neither each other nor the buffer.
        address_alignment: as for :func:`scatter_blocks`.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, strides, devices or addresses do not fit; nothing is written.
        TypeError: ``addresses`` are not integers; nothing is written.
    """
    is_plain = type(address_alignment) is int and address_alignment == 1
    if is_plain and copy_few(out, buffer, addresses, to_buffer=False):
        return out
    block_bytes = _require_blocks("out", out, buffer)
    if len(out) > 1 and abs(out.stride(0)) * out.element_size() < block_bytes:
        raise ValueError(
            f"the blocks of out overlap: shape {tuple(out.shape)}, strides {out.stride()}"
        )
    source = Scattered.of(buffer, addresses, block_bytes, address_alignment)
    _require_length(source, len(out))
    _copy(source, Dense(out), len(out), block_bytes)
    return out


def move_blocks(
    buffer: torch.Tensor,
    source_addresses: Addresses,
    target_addresses: Addresses,
    block_bytes: int,
) -> None:
    """Copy the block at ``source_addresses[i]`` to ``target_addresses[i]``, within one buffer.

    All moves happen as if at once. Sources may repeat and overlap each other. Targets must overlap
    neither each other nor any source. A block may be moved onto itself if no other target overlaps
    it; such a move copies nothing.

    Args:
        buffer: contiguous, any dtype.
        source_addresses: N byte offsets, on the host because they are checked.
        target_addresses: N byte offsets on the host.
        block_bytes: bytes of each block.

    Raises:
        ValueError: a block is not within the buffer, lengths differ, or blocks overlap in a way
            that is not allowed; nothing is moved.
        TypeError: addresses are not integers, or are on a GPU; nothing is moved.
    """
    require_buffer(buffer)
    block_bytes = _byte_count("block_bytes", block_bytes)
    buffer_bytes = buffer.numel() * buffer.element_size()
    sources = host_addresses("source_addresses", source_addresses, buffer_bytes, block_bytes)
    targets = host_addresses("target_addresses", target_addresses, buffer_bytes, block_bytes)
    if len(sources) != len(targets):
        raise ValueError(f"got {len(sources)} source addresses but {len(targets)} target addresses")
    if block_bytes == 0:
        return
    require_disjoint("target_addresses", targets, block_bytes)
    moving = sources != targets
    sources, targets = sources[moving], targets[moving]
    require_apart(sources, targets, block_bytes)
    source, target = Scattered.checked(buffer, sources), Scattered.checked(buffer, targets)
    _copy(source, target, len(sources), block_bytes)


@untraced
def fill_blocks(
    buffer: torch.Tensor,
    addresses: Addresses,
    block_bytes: int,
    value: int,
    *,
    address_alignment: int = 1,
) -> None:
    """Set every byte of the blocks at ``addresses`` to ``value``, in one launch.

    Args:
        buffer: contiguous, any dtype.
        addresses: N byte offsets, as for :func:`scatter_blocks`.
        block_bytes: bytes of each block.
        value: 0 to 255.
        address_alignment: as for :func:`scatter_blocks`.

    Raises:
        ValueError: ``value`` is not a byte, a block is not within the buffer, or two blocks
            overlap; nothing is written.
        TypeError: ``addresses``, ``block_bytes`` or ``value`` are not integers; nothing is written.
    """
    require_buffer(buffer)
    block_bytes, value = _byte_count("block_bytes", block_bytes), as_whole("value", value)
    if not 0 <= value <= 255:
        raise ValueError(f"value must be a byte, 0 to 255, got {value}")
    target = Scattered.of(buffer, addresses, block_bytes, address_alignment)
    if target.on_host is not None:
        require_disjoint("addresses", target.on_host, block_bytes)
    if not target.length or not block_bytes:
        return
    if runs_kernels(buffer.device):
        with current(buffer.device):
            _launch_fill(target, block_bytes, value)
    else:
        fill_on_cpu(target, block_bytes, value)


def _copy(source: Side, target: Side, num_blocks: int, block_bytes: int) -> None:
    if not num_blocks or not block_bytes:
        return
    device = target.tensor.device
    if runs_kernels(device):
        with current(device):
            _launch_copy(source, target, num_blocks, block_bytes)
    else:
        copy_on_cpu(source, target, block_bytes)


def _launch_copy(source: Side, target: Side, num_blocks: int, block_bytes: int) -> None:
    access_bytes = alignment_of(source.alignment, target.alignment, block_bytes)
    variant = variant_of(access_bytes, TILE)
    device = target.tensor.device
    with Words(source.num_words + target.num_words, device) as words:
        anchor, sources, targets = _sent(words, device, source, target)
        for first_byte, row_vectors in _columns(block_bytes, access_bytes):
            launch(
                _copy_blocks_kernel,
                variant,
                num_tiles(num_blocks, row_vectors, variant),
                anchor,
                anchor if sources is None else sources,
                anchor if targets is None else targets,
                source.tensor.data_ptr() + first_byte,
                target.tensor.data_ptr() + first_byte,
                source.stride_bytes // access_bytes,
                target.stride_bytes // access_bytes,
                int(sources is not None),
                int(targets is not None),
                num_blocks,
                *Divisor.of(row_vectors),
            )


def _launch_fill(target: Scattered, block_bytes: int, value: int) -> None:
    access_bytes = alignment_of(target.alignment, block_bytes)
    variant = variant_of(access_bytes, TILE)
    device = target.tensor.device
    with Words(target.num_words, device) as words:
        anchor, addresses = _sent(words, device, target)
        for first_byte, row_vectors in _columns(block_bytes, access_bytes):
            launch(
                _fill_blocks_kernel,
                variant,
                num_tiles(target.length, row_vectors, variant),
                anchor,
                addresses,
                target.tensor.data_ptr() + first_byte,
                repeated_byte(value, min(access_bytes, 8)),
                target.length,
                *Divisor.of(row_vectors),
            )


def _sent(words: Words, device: torch.device, *sides: Side) -> tuple[torch.Tensor | None, ...]:
    """An anchor of the kernels, and the addresses of each side on the device, uploaded if need be.

    Args:
        words: as many as the sides have addresses on the host.
        device: where the kernels run.
        sides: all sides of the copy.
    """
    at = 0
    for side in sides:
        if side.num_words:
            words.host[at : at + side.num_words] = side.starts()
            at += side.num_words
    if not at:
        return anchor_on(device), *(side.on_device for side in sides)
    sent, at = words.send(), 0
    addresses = []
    for side in sides:
        addresses.append((sent[at:] if at else sent) if side.num_words else side.on_device)
        at += side.num_words
    return sent, *addresses


def block_kernels() -> list[tuple[Any, Variant]]:
    """The kernels of all copies and fills of blocks, and what they are compiled for."""
    variants = [variant_of(width, TILE) for width in ACCESS_BYTES]
    kernels = (_copy_blocks_kernel, _fill_blocks_kernel)
    return [(kernel, variant) for kernel in kernels for variant in variants]


def _columns(block_bytes: int, access_bytes: int) -> list[tuple[int, int]]:
    """The parts of a block that one launch copies, as a first byte and a number of accesses."""
    step = MAX_ROW_VECTORS * access_bytes
    return [
        (first, min(step, block_bytes - first) // access_bytes)
        for first in range(0, block_bytes, step)
    ]


def _byte_count(name: str, value: int) -> int:
    number = as_whole(name, value)
    if number < 0:
        raise ValueError(f"{name} must be non-negative, got {number}")
    return number


def _require_blocks(name: str, blocks: torch.Tensor, buffer: torch.Tensor) -> int:
    """Bytes of one block of ``blocks``, which must be ``[N, ...]`` on the buffer's device."""
    require_tensor(name, blocks)
    require_tensor("buffer", buffer)
    if blocks.dim() == 0:
        raise ValueError(f"{name} must be [N, ...], got a scalar")
    require_values(name, blocks)
    if blocks.device != buffer.device:
        raise ValueError(f"{name} is on {blocks.device}, the buffer on {buffer.device}")
    require_memory(name, blocks)
    if len(blocks) and not blocks[0].is_contiguous():
        raise ValueError(f"each block of {name} must be contiguous, got strides {blocks.stride()}")
    return blocks.shape[1:].numel() * blocks.element_size()


def _require_length(addresses: Scattered, num_blocks: int) -> None:
    if addresses.length != num_blocks:
        raise ValueError(f"got {addresses.length} addresses for {num_blocks} blocks")
