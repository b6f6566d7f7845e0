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

**On a CPU**, neighbouring blocks are merged into runs. A few long runs are copied one by one, by
all threads; otherwise the buffer is viewed as overlapping rows, one for each start byte, and one
indexing call picks the rows. That path is also the reference of the kernels.

Launches are on the current stream of the buffer's device and never synchronize. Host addresses
are checked; addresses that are already on the device are trusted, since to check them is to wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import (
    Addresses,
    alignment_of,
    host_addresses,
    jit,
    require_disjoint,
    tl,
    upload,
)

__all__ = ["fill_blocks", "gather_blocks", "move_blocks", "scatter_blocks"]

Int64Array = npt.NDArray[np.int64]

TILE_WORDS = 2048
"""Words of one program's tile: 16 KiB of 8-byte words, eight 16-byte loads in flight for each of
128 threads. Chosen by counting bytes in flight; not yet measured on a GPU."""

NUM_WARPS = 4

MIN_COLS = 16
"""Words of the narrowest tile row that is worth its waste: 128 bytes of 8-byte words, one line."""

MAX_WASTED_SHARE = 0.125
"""How much of a tile row may be masked off before a narrower one is taken."""

LONG_RUN_BYTES = 256 << 10
"""CPU: mean run from which on one ``copy_`` a run wins. Scatter of random blocks, 2 cores, GB/s
read + write: 64 KiB blocks 13.6 by ``copy_`` and 14.1 by indexing, 1 MiB blocks 24.6 and 14.4."""


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
    tile = tl.program_id(0).to(tl.int64)
    rows = (tile // col_tiles) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    cols = (tile % col_tiles) * COLS + tl.arange(0, COLS).to(tl.int64)
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
    mask = is_block[:, None] & (cols < vectors * VECTOR)[None, :]
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
    tile = tl.program_id(0).to(tl.int64)
    rows = (tile // col_tiles) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    cols = (tile % col_tiles) * COLS + tl.arange(0, COLS).to(tl.int64)
    is_block = rows < num_blocks
    address = tl.load(dst_address_ptr + rows, mask=is_block, other=0)
    row = tl.multiple_of(address // WORD_BYTES, VECTOR)
    mask = is_block[:, None] & (cols < vectors * VECTOR)[None, :]
    dst = dst_ptr.to(tl.pointer_type(WORD)) + row[:, None] + cols[None, :]
    tl.store(dst, tl.full([ROWS, COLS], value, WORD), mask=mask)


# -- launchers ---------------------------------------------------------------------------------


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
    _require_block_bytes(block_bytes)
    buffer_bytes = buffer.numel() * buffer.element_size()
    sources = host_addresses("source_addresses", source_addresses, buffer_bytes, block_bytes)
    targets = host_addresses("target_addresses", target_addresses, buffer_bytes, block_bytes)
    if len(sources) != len(targets):
        raise ValueError(f"got {len(sources)} source addresses but {len(targets)} target addresses")
    if block_bytes == 0:
        return
    require_disjoint("target_addresses", targets, block_bytes)
    moving = sources != targets
    _require_apart(sources, targets[moving], block_bytes)
    sources, targets = sources[moving], targets[moving]
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
        addresses: N byte offsets, as for :func:`scatter_blocks`; blocks may overlap.
        block_bytes: bytes of each block.
        value: 0 to 255.
        address_alignment: as for :func:`scatter_blocks`.

    Raises:
        ValueError: ``value`` is not a byte, or a block leaves the buffer; nothing is written.
        TypeError: ``addresses`` are not integers; nothing is written.
    """
    _require_buffer(buffer)
    _require_block_bytes(block_bytes)
    if not 0 <= value <= 255:
        raise ValueError(f"value must be a byte, 0 to 255, got {value}")
    target = _Scattered.of(buffer, "addresses", addresses, block_bytes, address_alignment)
    if not target.length or not block_bytes:
        return
    if buffer.device.type == "cpu":
        _fill_on_cpu(target, block_bytes, value)
    else:
        with torch.cuda.device(buffer.device):
            _launch_fill(target, block_bytes, value)


# -- the two kinds of sides --------------------------------------------------------------------


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

    def rows(self, block_bytes: int) -> torch.Tensor:
        """The blocks as bytes, ``[N, block_bytes]``, on a CPU."""
        size, stride = (len(self.tensor), block_bytes), (self.stride_bytes, 1)
        return self.flat().as_strided(size, stride, self.offset_bytes)


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
        if isinstance(addresses, torch.Tensor) and addresses.device.type != "cpu":
            if address_alignment <= 0 or address_alignment & (address_alignment - 1):
                raise ValueError(
                    f"address_alignment must be a positive power of two, got {address_alignment}"
                )
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

    def flat(self) -> torch.Tensor:
        """All bytes of a CPU buffer."""
        return self.buffer.detach().reshape(-1).view(torch.uint8)

    def rows(self, block_bytes: int) -> torch.Tensor:
        """Every block that a CPU buffer has, one for each start byte: they overlap."""
        flat = self.flat()
        size = (flat.numel() - block_bytes + 1, block_bytes)
        return flat.as_strided(size, (1, 1), flat.storage_offset())


_Side = _Dense | _Scattered


def _copy(source: _Side, target: _Side, num_blocks: int, block_bytes: int) -> None:
    if not num_blocks or not block_bytes:
        return
    if target.tensor.device.type == "cpu":
        _copy_on_cpu(source, target, block_bytes)
    else:
        with torch.cuda.device(target.tensor.device):
            _launch_copy(source, target, num_blocks, block_bytes)


# -- GPU ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How blocks are cut into words and tiles; the constants that a kernel is compiled for."""

    word_bytes: int
    words_per_vector: int
    rows: int
    cols: int
    num_blocks: int
    vectors: int
    col_tiles: int
    num_tiles: int

    @classmethod
    def of(cls, num_blocks: int, block_bytes: int, alignment: int) -> TilePlan:
        """Plan for blocks whose sizes, strides, bases and addresses share ``alignment``."""
        access_bytes = alignment_of(alignment, block_bytes)
        word_bytes = min(access_bytes, 8)
        words = block_bytes // word_bytes
        cols = _tile_cols(words)
        rows = TILE_WORDS // cols
        col_tiles = -(-words // cols)
        return cls(
            word_bytes=word_bytes,
            words_per_vector=access_bytes // word_bytes,
            rows=rows,
            cols=cols,
            num_blocks=num_blocks,
            vectors=block_bytes // access_bytes,
            col_tiles=col_tiles,
            num_tiles=-(-num_blocks // rows) * col_tiles,
        )

    def constants(self) -> dict[str, object]:
        """The kernels' constexpr arguments."""
        word = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[self.word_bytes]
        return {
            "WORD": word,
            "WORD_BYTES": self.word_bytes,
            "VECTOR": self.words_per_vector,
            "ROWS": self.rows,
            "COLS": self.cols,
        }

    def strides(self, stride_bytes: int) -> int:
        """A stride in vectors."""
        return stride_bytes // (self.word_bytes * self.words_per_vector)


def _tile_cols(words: int) -> int:
    """The widest power of two that wastes little of a row of ``words``.

    >>> [_tile_cols(words) for words in (1, 72, 512, 5000)]
    [1, 16, 512, 1024]
    """
    cols = min(TILE_WORDS, 1 << (words - 1).bit_length())
    while cols > MIN_COLS and -(-words // cols) * cols > words * (1 + MAX_WASTED_SHARE):
        cols //= 2
    return cols


def _launch_copy(source: _Side, target: _Side, num_blocks: int, block_bytes: int) -> None:
    plan = TilePlan.of(num_blocks, block_bytes, alignment_of(source.alignment, target.alignment))
    _copy_blocks_kernel[(plan.num_tiles,)](
        _as_bytes(source.tensor),
        _as_bytes(target.tensor),
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
        _as_bytes(target.tensor),
        target.device_addresses(),
        plan.num_blocks,
        plan.vectors,
        plan.col_tiles,
        int.from_bytes(bytes([value]) * plan.word_bytes, "little", signed=True),
        **plan.constants(),
        num_warps=NUM_WARPS,
    )


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A uint8 tensor at the same address: Triton knows few dtypes, and compiles once for each."""
    if tensor.dtype == torch.uint8:
        return tensor
    offset = int(tensor.storage_offset()) * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), offset, (1,), (1,))


# -- CPU, and the reference --------------------------------------------------------------------


def _copy_on_cpu(source: _Side, target: _Side, block_bytes: int) -> None:
    runs = _long_runs(source.starts(), target.starts(), block_bytes)
    if runs is not None:
        source_bytes, target_bytes = source.flat(), target.flat()
        for source_start, target_start, length in runs:
            target_bytes[target_start : target_start + length].copy_(
                source_bytes[source_start : source_start + length]
            )
        return
    blocks = source.rows(block_bytes)
    if isinstance(source, _Scattered):
        # Picks rows by all threads: 23 GB/s read + write where NumPy reached 5 (4 KiB blocks).
        index = torch.from_numpy(np.array(source.starts()))
        if isinstance(target, _Dense):
            torch.index_select(blocks, 0, index, out=target.rows(block_bytes))
            return
        blocks = blocks.index_select(0, index)
    # NumPy, on the same bytes: 12 GB/s where torch.Tensor.index_copy_ reached 6 (4 KiB blocks).
    target.rows(block_bytes).numpy()[target.starts()] = blocks.numpy()


def _long_runs(
    source_starts: Int64Array, target_starts: Int64Array, block_bytes: int
) -> list[tuple[int, int, int]] | None:
    """``(source, target, bytes)`` of each run of blocks that are neighbours on both sides.

    None when the runs are short on average, so that one indexing call is faster.
    """
    breaks = (np.diff(source_starts) != block_bytes) | (np.diff(target_starts) != block_bytes)
    num_runs = 1 + int(np.count_nonzero(breaks))
    if len(source_starts) * block_bytes < num_runs * LONG_RUN_BYTES:
        return None
    firsts = np.append(0, np.flatnonzero(breaks) + 1)
    counts = np.diff(np.append(firsts, len(source_starts)))
    runs = zip(source_starts[firsts], target_starts[firsts], counts * block_bytes, strict=True)
    return [(int(source), int(target), int(length)) for source, target, length in runs]


def _fill_on_cpu(target: _Scattered, block_bytes: int, value: int) -> None:
    target.rows(block_bytes).numpy()[target.starts()] = value


# -- checks ------------------------------------------------------------------------------------


def _bits_of(addresses: Int64Array) -> int:
    return int(np.bitwise_or.reduce(addresses)) if len(addresses) else 0


def _require_buffer(buffer: torch.Tensor) -> None:
    if not buffer.is_contiguous():
        raise ValueError(f"buffer must be contiguous, got strides {buffer.stride()}")


def _require_block_bytes(block_bytes: int) -> None:
    if block_bytes < 0:
        raise ValueError(f"block_bytes must be non-negative, got {block_bytes}")


def _require_blocks(name: str, blocks: torch.Tensor, buffer: torch.Tensor) -> int:
    """Bytes of one block of ``blocks``, which must be ``[N, ...]`` on the buffer's device."""
    if blocks.dim() == 0:
        raise ValueError(f"{name} must be [N, ...], got a scalar")
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
