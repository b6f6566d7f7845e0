"""Block copy: N equal blocks of bytes between a dense tensor and addresses in one flat buffer.

============================  =====================  ======================  =================
launcher                      reads                  writes                  bytes moved
============================  =====================  ======================  =================
:func:`scatter_blocks`        ``blocks[i]``          ``buffer[address[i]]``  2 x N x block
:func:`gather_blocks`         ``buffer[address[i]]`` ``out[i]``              2 x N x block
:func:`move_blocks`           ``buffer[source[i]]``  ``buffer[target[i]]``   2 x N x block
:func:`fill_blocks`           nothing                ``buffer[address[i]]``  1 x N x block
============================  =====================  ======================  =================

and 8 bytes for each address. The floor is those bytes over the memory's bandwidth.

``buffer`` is a contiguous tensor, seen as bytes. Addresses are byte offsets in it, one a block;
any value is allowed, also odd ones. ``blocks`` and ``out`` are ``[N, ...]`` of any dtype, each
block contiguous, with any stride between blocks that keeps those of ``out`` apart. Copies are of
bytes: NaN patterns, fp8 and bool survive. Addressing is int64 from the first multiplication on.

**On a GPU**, one kernel serves the three copies: each side is either indexed (a base and an
address a block) or strided (a base and a stride). The blocks form a matrix of N rows; a program
moves one tile of it, ``ROWS`` blocks by ``COLS`` words, so that small blocks share a program and
large ones are split over many. The grid is one program a tile, tiles of the same block next to
each other. A word has the largest of 8, 4, 2 and 1 bytes that divides both bases, all addresses,
the strides and the block size; where 16 does, words come in pairs and every access has 16 bytes.

**On a CPU**, blocks that are neighbours on both sides, all in one run, are one ``copy_``. Otherwise
the buffer is viewed as overlapping rows, one for each word that a block can start at, and one
indexing call picks the rows. Words have 16 bytes, or as many as divide everything. That path is
also the reference of the kernels. A ``copy_`` for each of several runs gains little and risks
much: on 2 cores, random blocks of 1 MiB are scattered at 24 to 33 GB/s read + write by ``copy_``
and at 27 to 28 by one indexing call; while another process computes, at 0.5 and 8, since every
``copy_`` waits for all threads.

Launches are on the current stream of the buffer's device and never synchronize. Host addresses
are checked; addresses that are already on the device are trusted, since to check them is to wait.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import (
    CPU_WORDS,
    Addresses,
    alignment_of,
    bytes_of,
    host_addresses,
    jit,
    require_disjoint,
    tl,
    upload,
)
from kvheap.kernels.tiles import NUM_WARPS, TilePlan

__all__ = ["fill_blocks", "gather_blocks", "move_blocks", "scatter_blocks"]

Int64Array = npt.NDArray[np.int64]


@jit(do_not_specialize=["num_blocks", "vectors", "col_tiles", "src_stride", "dst_stride"])
def _copy_blocks_kernel(  # type: ignore[no-untyped-def]
    src_ptr,
    dst_ptr,
    src_address_ptr,
    dst_address_ptr,
    num_blocks,
    vectors,
    col_tiles,
    src_stride,
    dst_stride,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Copy one tile of ROWS blocks by COLS words; strides and ``vectors`` count VECTOR words."""
    tile = tl.program_id(0)  # divided as 32 bits, which is cheaper, multiplied as 64
    rows = (tile // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tile % col_tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    is_block = rows < num_blocks
    if src_address_ptr is not None:
        src_address = tl.load(src_address_ptr + rows, mask=is_block, other=0)
        src_row = tl.multiple_of(src_address // WORD_BYTES, VECTOR)
    else:
        src_row = rows * src_stride * VECTOR
    if dst_address_ptr is not None:
        dst_address = tl.load(dst_address_ptr + rows, mask=is_block, other=0)
        dst_row = tl.multiple_of(dst_address // WORD_BYTES, VECTOR)
    else:
        dst_row = rows * dst_stride * VECTOR
    mask = is_block[:, None] & (cols < vectors.to(tl.int64) * VECTOR)[None, :]
    src = src_ptr.to(tl.pointer_type(WORD)) + src_row[:, None] + cols[None, :]
    dst = dst_ptr.to(tl.pointer_type(WORD)) + dst_row[:, None] + cols[None, :]
    tl.store(dst, tl.load(src, mask=mask), mask=mask)


@jit(do_not_specialize=["num_blocks", "vectors", "col_tiles", "value"])
def _fill_blocks_kernel(  # type: ignore[no-untyped-def]
    dst_ptr,
    dst_address_ptr,
    num_blocks,
    vectors,
    col_tiles,
    value,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Store ``value`` in one tile of ROWS blocks by COLS words."""
    tile = tl.program_id(0)  # divided as 32 bits, which is cheaper, multiplied as 64
    rows = (tile // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tile % col_tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    is_block = rows < num_blocks
    address = tl.load(dst_address_ptr + rows, mask=is_block, other=0)
    row = tl.multiple_of(address // WORD_BYTES, VECTOR)
    mask = is_block[:, None] & (cols < vectors.to(tl.int64) * VECTOR)[None, :]
    dst = dst_ptr.to(tl.pointer_type(WORD)) + row[:, None] + cols[None, :]
    tl.store(dst, tl.full([ROWS, COLS], value, WORD), mask=mask)


def scatter_blocks(
    blocks: torch.Tensor, buffer: torch.Tensor, addresses: Addresses, *, address_alignment: int = 1
) -> None:
    """Write ``blocks[i]`` to ``buffer`` at byte ``addresses[i]``, for all i, in one launch.

    Args:
        blocks: ``[N, ...]``, any dtype, on the buffer's device; each block contiguous.
        buffer: contiguous, any dtype.
        addresses: N byte offsets. On the host: checked, blocks must not overlap. An int64 tensor
            on the buffer's GPU: trusted.
        address_alignment: for addresses on a GPU, a power of two that divides all of them: the
            caller's promise, which allows wide accesses. Host addresses are looked at instead.

    Raises:
        ValueError: shapes, strides, devices or addresses do not fit; nothing is written.
        TypeError: ``addresses`` are not integers; nothing is written.
    """
    block_bytes = _require_blocks("blocks", blocks, buffer)
    target = _Scattered.of(buffer, "addresses", addresses, block_bytes, address_alignment)
    _require_length("addresses", target, len(blocks))
    if target.on_host is not None:
        require_disjoint("addresses", target.on_host, block_bytes)
    _copy(_Dense(blocks), target, len(blocks), block_bytes)


def gather_blocks(
    buffer: torch.Tensor, addresses: Addresses, out: torch.Tensor, *, address_alignment: int = 1
) -> torch.Tensor:
    """Write the block at byte ``addresses[i]`` of ``buffer`` to ``out[i]``, in one launch.

    Args:
        buffer: contiguous, any dtype.
        addresses: N byte offsets, as for :func:`scatter_blocks`; blocks may repeat and overlap.
        out: ``[N, ...]``, any dtype, on the buffer's device; each block contiguous, and apart
            from the others and from the buffer.
        address_alignment: as for :func:`scatter_blocks`.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, strides, devices or addresses do not fit; nothing is written.
        TypeError: ``addresses`` are not integers; nothing is written.
    """
    block_bytes = _require_blocks("out", out, buffer)
    if len(out) > 1 and abs(out.stride(0)) * out.element_size() < block_bytes:
        raise ValueError(
            f"the blocks of out overlap: shape {tuple(out.shape)}, strides {out.stride()}"
        )
    source = _Scattered.of(buffer, "addresses", addresses, block_bytes, address_alignment)
    _require_length("addresses", source, len(out))
    _copy(source, _Dense(out), len(out), block_bytes)
    return out


def move_blocks(
    buffer: torch.Tensor,
    source_addresses: Addresses,
    target_addresses: Addresses,
    block_bytes: int,
) -> None:
    """Copy the block at ``source_addresses[i]`` to ``target_addresses[i]``, within one buffer.

    All moves happen as if at once. Sources may repeat and overlap each other. Targets must be
    apart from each other and from every source, but for moves of a block onto itself, which are
    dropped once it is known that no other target overlaps that block.

    Args:
        buffer: contiguous, any dtype.
        source_addresses: N byte offsets on the host; the checks need them there.
        target_addresses: N byte offsets on the host.
        block_bytes: bytes of each block.

    Raises:
        ValueError: a block leaves the buffer, lengths differ, or blocks overlap in another way;
            nothing is moved.
        TypeError: addresses are not integers, or are on a GPU; nothing is moved.
    """
    _require_buffer(buffer)
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
    _require_apart(sources, targets, block_bytes)
    _copy(
        _Scattered(buffer, sources, None, alignment_of(_bits_of(sources))),
        _Scattered(buffer, targets, None, alignment_of(_bits_of(targets))),
        len(sources),
        block_bytes,
    )


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
        ValueError: ``value`` is not a byte, a block leaves the buffer, or two overlap; nothing is
            written.
        TypeError: an argument that must be an integer is not; nothing is written.
    """
    _require_buffer(buffer)
    block_bytes, value = _byte_count("block_bytes", block_bytes), operator.index(value)
    if not 0 <= value <= 255:
        raise ValueError(f"value must be a byte, 0 to 255, got {value}")
    target = _Scattered.of(buffer, "addresses", addresses, block_bytes, address_alignment)
    if target.on_host is not None:
        require_disjoint("addresses", target.on_host, block_bytes)
    if not target.length or not block_bytes:
        return
    if buffer.device.type == "cpu":
        _fill_on_cpu(target, block_bytes, value)
    else:
        with torch.cuda.device(buffer.device):
            _launch_fill(target, block_bytes, value)


@dataclass(frozen=True, slots=True)
class _Dense:
    """Blocks ``tensor[i]``: a base and a stride."""

    tensor: torch.Tensor

    @property
    def stride_bytes(self) -> int:
        return self.tensor.stride(0) * self.tensor.element_size()

    @property
    def alignment(self) -> int:
        # The stride of a single block is never used, and may be anything.
        stride_bytes = self.stride_bytes if len(self.tensor) > 1 else 0
        return alignment_of(self.tensor.data_ptr(), stride_bytes)

    def device_addresses(self) -> None:
        return None

    @property
    def offset_bytes(self) -> int:
        return int(self.tensor.storage_offset()) * self.tensor.element_size()

    def starts(self) -> Int64Array:
        """Where each block starts in :meth:`flat`."""
        return self.offset_bytes + np.arange(len(self.tensor), dtype=np.int64) * self.stride_bytes

    def flat(self) -> torch.Tensor:
        """All bytes of the tensor's storage, on a CPU."""
        return torch.empty(0, dtype=torch.uint8).set_(self.tensor.untyped_storage())

    def rows(self, block_bytes: int, word: torch.dtype) -> torch.Tensor:
        """The blocks as words, ``[N, words of a block]``, on a CPU."""
        size = (len(self.tensor), block_bytes // word.itemsize)
        stride = (self.stride_bytes // word.itemsize, 1)
        return _view_words(self.tensor, word, self.offset_bytes, size, stride)


@dataclass(frozen=True, slots=True)
class _Scattered:
    """Blocks at addresses of a buffer, known on the host or on the device."""

    buffer: torch.Tensor
    on_host: Int64Array | None
    on_device: torch.Tensor | None
    address_alignment: int

    @classmethod
    def of(
        cls,
        buffer: torch.Tensor,
        name: str,
        addresses: Addresses,
        block_bytes: int,
        address_alignment: int,
    ) -> _Scattered:
        _require_buffer(buffer)
        if address_alignment <= 0 or address_alignment & (address_alignment - 1):
            raise ValueError(
                f"address_alignment must be a positive power of two, got {address_alignment}"
            )
        if isinstance(addresses, torch.Tensor) and addresses.device.type != "cpu":
            if addresses.device != buffer.device or addresses.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be int64 on {buffer.device} or on the host, got "
                    f"{addresses.dtype} on {addresses.device}"
                )
            if addresses.dim() != 1:
                raise ValueError(
                    f"{name} must be one-dimensional, got shape {tuple(addresses.shape)}"
                )
            return cls(buffer, None, addresses.contiguous(), alignment_of(address_alignment))
        buffer_bytes = buffer.numel() * buffer.element_size()
        array = host_addresses(name, addresses, buffer_bytes, block_bytes)
        return cls(buffer, array, None, alignment_of(_bits_of(array)))

    @property
    def length(self) -> int:
        if self.on_host is not None:
            return len(self.on_host)
        assert self.on_device is not None
        return len(self.on_device)

    @property
    def tensor(self) -> torch.Tensor:
        return self.buffer

    @property
    def stride_bytes(self) -> int:
        return 0

    @property
    def alignment(self) -> int:
        return alignment_of(self.buffer.data_ptr(), self.address_alignment)

    def device_addresses(self) -> torch.Tensor:
        if self.on_device is not None:
            return self.on_device
        assert self.on_host is not None
        return upload(self.on_host, self.buffer.device)

    def starts(self) -> Int64Array:
        """Where each block starts in :meth:`flat`; the addresses, on the host."""
        assert self.on_host is not None
        return self.on_host

    @property
    def offset_bytes(self) -> int:
        return int(self.buffer.storage_offset()) * self.buffer.element_size()

    def flat(self) -> torch.Tensor:
        """All bytes of a CPU buffer."""
        num_bytes = self.buffer.numel() * self.buffer.element_size()
        return _view_words(self.buffer, torch.uint8, self.offset_bytes, (num_bytes,), (1,))

    def rows(self, block_bytes: int, word: torch.dtype) -> torch.Tensor:
        """Every block that a CPU buffer has, one for each word it can start at: they overlap."""
        words = self.buffer.numel() * self.buffer.element_size() // word.itemsize
        block_words = block_bytes // word.itemsize
        size = (words - block_words + 1, block_words)
        return _view_words(self.buffer, word, self.offset_bytes, size, (1, 1))

    def row_numbers(self, word: torch.dtype) -> torch.Tensor:
        """Where the blocks are in :meth:`rows`."""
        return torch.from_numpy(self.starts() // word.itemsize)


_Side = _Dense | _Scattered


def _copy(source: _Side, target: _Side, num_blocks: int, block_bytes: int) -> None:
    if not num_blocks or not block_bytes:
        return
    if target.tensor.device.type == "cpu":
        _copy_on_cpu(source, target, block_bytes)
    else:
        with torch.cuda.device(target.tensor.device):
            _launch_copy(source, target, num_blocks, block_bytes)


def _launch_copy(source: _Side, target: _Side, num_blocks: int, block_bytes: int) -> None:
    plan = TilePlan.of(num_blocks, block_bytes, alignment_of(source.alignment, target.alignment))
    _copy_blocks_kernel[(plan.num_tiles,)](
        bytes_of(source.tensor),
        bytes_of(target.tensor),
        source.device_addresses(),
        target.device_addresses(),
        plan.num_blocks,
        plan.vectors,
        plan.col_tiles,
        plan.strides(source.stride_bytes),
        plan.strides(target.stride_bytes),
        **plan.constants(),
        num_warps=NUM_WARPS,
    )


def _launch_fill(target: _Scattered, block_bytes: int, value: int) -> None:
    plan = TilePlan.of(target.length, block_bytes, target.alignment)
    _fill_blocks_kernel[(plan.num_tiles,)](
        bytes_of(target.tensor),
        target.device_addresses(),
        plan.num_blocks,
        plan.vectors,
        plan.col_tiles,
        _repeated(value, plan.word_bytes),
        **plan.constants(),
        num_warps=NUM_WARPS,
    )


def _view_words(
    tensor: torch.Tensor,
    word: torch.dtype,
    offset_bytes: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> torch.Tensor:
    """The tensor's storage as words, from ``offset_bytes`` on; ``stride`` counts words."""
    view = torch.empty(0, dtype=word, device=tensor.device)
    return view.set_(tensor.untyped_storage(), offset_bytes // word.itemsize, size, stride)


def _copy_on_cpu(source: _Side, target: _Side, block_bytes: int) -> None:
    if _is_one_run(source.starts(), block_bytes) and _is_one_run(target.starts(), block_bytes):
        whole = len(source.starts()) * block_bytes
        first, place = int(source.starts()[0]), int(target.starts()[0])
        target.flat()[place : place + whole].copy_(source.flat()[first : first + whole])
        return
    word = _cpu_word(block_bytes, source, target)
    blocks = source.rows(block_bytes, word)
    if isinstance(target, _Dense):
        assert isinstance(source, _Scattered)
        out = target.rows(block_bytes, word)
        torch.index_select(blocks, 0, source.row_numbers(word), out=out)
        return
    if isinstance(source, _Scattered):
        blocks = blocks.index_select(0, source.row_numbers(word))
    places, rows = target.row_numbers(word), target.rows(block_bytes, word)
    if word == torch.uint8:
        rows.numpy()[places.numpy()] = blocks.numpy()
    else:
        rows.index_copy_(0, places, blocks)


def _cpu_word(block_bytes: int, *sides: _Side) -> torch.dtype:
    """The widest word that all blocks consist of, in their storage and in memory."""
    alignments = [alignment_of(side.alignment, side.offset_bytes) for side in sides]
    return CPU_WORDS[alignment_of(block_bytes, *alignments)]


def _is_one_run(starts: Int64Array, block_bytes: int) -> bool:
    return bool((np.diff(starts) == block_bytes).all())


def _fill_on_cpu(target: _Scattered, block_bytes: int, value: int) -> None:
    word = _cpu_word(block_bytes, target)
    if word.itemsize >= 8:
        rows = target.rows(block_bytes, torch.int64)
        rows.index_fill_(0, target.row_numbers(torch.int64), _repeated(value, 8))
    else:
        rows = target.rows(block_bytes, torch.uint8)
        rows.numpy()[target.starts()] = value


def _repeated(byte: int, word_bytes: int) -> int:
    """A signed word of which every byte is ``byte``."""
    return int.from_bytes(bytes([byte]) * word_bytes, "little", signed=True)


def _bits_of(addresses: Int64Array) -> int:
    return int(np.bitwise_or.reduce(addresses)) if len(addresses) else 0


def _require_buffer(buffer: torch.Tensor) -> None:
    if not buffer.is_contiguous():
        raise ValueError(f"buffer must be contiguous, got strides {buffer.stride()}")
    if buffer.device.type not in ("cpu", "cuda"):
        raise ValueError(f"buffer must be on a CPU or a CUDA device, got {buffer.device}")


def _byte_count(name: str, value: int) -> int:
    if operator.index(value) < 0:
        raise ValueError(f"{name} must be non-negative, got {value}")
    return operator.index(value)


def _require_blocks(name: str, blocks: torch.Tensor, buffer: torch.Tensor) -> int:
    """Bytes of one block of ``blocks``, which must be ``[N, ...]`` on the buffer's device."""
    if blocks.dim() == 0:
        raise ValueError(f"{name} must be [N, ...], got a scalar")
    if blocks.is_conj() or blocks.is_neg():
        raise ValueError(f"{name} is a lazy conj or neg view: its bytes are not its values")
    if blocks.device != buffer.device:
        raise ValueError(f"{name} is on {blocks.device}, the buffer on {buffer.device}")
    if len(blocks) and not blocks[0].is_contiguous():
        raise ValueError(f"each block of {name} must be contiguous, got strides {blocks.stride()}")
    return blocks.shape[1:].numel() * blocks.element_size()


def _require_length(name: str, side: _Scattered, num_blocks: int) -> None:
    if side.length != num_blocks:
        raise ValueError(f"got {side.length} {name} for {num_blocks} blocks")


def _require_apart(sources: Int64Array, targets: Int64Array, block_bytes: int) -> None:
    if not len(sources) or not len(targets):
        return
    ordered = np.sort(sources)
    after = np.searchsorted(ordered, targets)
    next_source = np.append(ordered, np.iinfo(np.int64).max)[after]
    previous_source = np.append(np.iinfo(np.int64).min // 2, ordered)[after]
    overlap = (next_source - targets < block_bytes) | (targets - previous_source < block_bytes)
    if overlap.any():
        at = int(np.argmax(overlap))
        near = next_source if next_source[at] - targets[at] < block_bytes else previous_source
        raise ValueError(
            f"the target block at {targets[at]} overlaps the source block at {near[at]} "
            f"({block_bytes} bytes each)"
        )
