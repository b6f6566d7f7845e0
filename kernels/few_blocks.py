"""Block copy of a few blocks on a CPU, where what the call itself costs decides.

NumPy copies each block by one slice assignment, which takes 0.3 us and no other thread; a ``copy_``
of torch takes 2.2. A run is copied by one ``memmove``, without arrays. Only ordinary calls are made
here, for which a few comparisons are check enough. Everything else, and everything wrong, is left
to :mod:`kvheap.kernels.block_copy`.
"""

from __future__ import annotations

from ctypes import memmove
from operator import sub
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import runs_kernels
from kvheap.kernels.words import GRAIN, as_bytes

__all__ = ["HostMemory", "copy_few", "copy_run"]

Memory: TypeAlias = "npt.NDArray[np.uint8]"
"""The bytes of a tensor in host memory, uint8 ``[N]``, without a copy."""


class HostMemory(NamedTuple):
    """A buffer in host memory."""

    buffer: Memory
    """Its bytes, uint8 ``[N]``."""
    address: int
    """Where they begin."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> HostMemory:
        """The memory of a contiguous tensor on a CPU, of at least one dimension."""
        return cls(_memory_of(tensor), tensor.data_ptr())


MAX_BLOCKS = 64
"""The most blocks that are copied one by one; see benchmarks/NOTES.md."""

MAX_BYTES = 4 << 20
"""The most bytes that are copied so if the blocks form no run; see benchmarks/NOTES.md."""

MAX_MOVES = 4
"""The most blocks of a run with gaps that are moved one by one; see benchmarks/NOTES.md."""

MAX_RUN_BYTES = 1 << 20
MAX_RUN_OF_SMALL = 8 << 20
"""A longer run is copied by torch, with all its threads: the first if a loop over the blocks would
start them, too, and the second if it would not; see benchmarks/NOTES.md."""


def copy_few(blocks: Any, buffer: Any, addresses: Any, to_buffer: bool) -> bool:
    """Copy between ``blocks[i]`` and the block at byte ``addresses[i]`` of a buffer on a CPU.

    Args:
        blocks: as the arguments of ``scatter_blocks`` or ``gather_blocks``, not checked yet.
        buffer: likewise.
        addresses: likewise.
        to_buffer: whether the buffer is written; its blocks must be disjoint then.

    Returns:
        Whether they were copied. If not, nothing was: the call is not of this kind, or is wrong.
    """
    if type(addresses) is np.ndarray and addresses.dtype == np.int64 and addresses.ndim == 1:
        count = len(addresses)
        if not 0 < count <= MAX_BLOCKS:
            return False
        starts = addresses.tolist()
    elif type(addresses) is list and 0 < len(addresses) <= MAX_BLOCKS:
        count, starts = len(addresses), addresses
        if set(map(type, starts)) != {int}:
            return False
    else:
        return False
    if not (_is_ordinary(blocks) and _is_ordinary(buffer)) or not blocks.dim():
        return False
    if runs_kernels(buffer.device):
        return False
    if not (_has_memory(blocks) and _has_memory(buffer)):
        return False
    num_bytes = blocks.nbytes
    block_bytes = num_bytes // count
    if blocks.shape[0] != count or not num_bytes:
        return False
    ordered = sorted(starts)
    if ordered[0] < 0 or ordered[-1] + block_bytes > buffer.nbytes:
        return False
    smallest_gap = min(map(sub, ordered[1:], ordered), default=block_bytes)
    if to_buffer and smallest_gap < block_bytes:
        return False
    first, length = starts[0], (count - 1) * block_bytes
    if starts[-1] - first == length and smallest_gap >= block_bytes and starts == ordered:
        part = _memory_of(buffer)[first : first + num_bytes]
        _assign(part, _memory_of(blocks), to_buffer, _most_bytes(blocks.numel(), count))
        return True
    if num_bytes > MAX_BYTES:
        return False
    memory, rows = _memory_of(buffer), _memory_of(blocks).reshape(count, block_bytes)
    if to_buffer:
        for start, row in zip(starts, rows, strict=True):
            memory[start : start + block_bytes] = row
    else:
        for start, row in zip(starts, rows, strict=True):
            row[:] = memory[start : start + block_bytes]
    return True


def copy_run(
    blocks: torch.Tensor,
    memory: HostMemory,
    run: tuple[int, int],
    block_stride: int,
    to_run: bool,
) -> bool:
    """Copy between ``blocks[i]`` and the block at byte ``i * block_stride`` of a run.

    Args:
        blocks: ``[N, ...]``, each block contiguous and of at most ``block_stride`` bytes; whoever
            calls has looked whether their memory is there.
        memory: the buffer that the run is in.
        run: where it begins in the buffer, and its bytes, ``N * block_stride``.
        block_stride: bytes from one block of the run to the next.
        to_run: whether the run is written.

    Returns:
        Whether they were copied. If not, nothing was: the blocks are not contiguous, for example.
    """
    if not _is_ordinary(blocks) or runs_kernels(blocks.device):
        return False
    first, num_bytes = run
    count, piece_bytes = num_bytes // block_stride, blocks.nbytes
    most = _most_bytes(blocks.numel(), count) if num_bytes > MAX_RUN_BYTES else MAX_RUN_BYTES
    if piece_bytes == num_bytes:
        count = 1  # as they lie, they are one piece
    elif count > 1:
        piece_bytes //= count
    here, there = blocks.data_ptr(), memory.address + first
    if count <= MAX_MOVES and num_bytes <= MAX_RUN_BYTES:
        target, source = (there, here) if to_run else (here, there)
        memmove(target, source, piece_bytes)
        for _ in range(1, count):
            target += block_stride if to_run else piece_bytes
            source += piece_bytes if to_run else block_stride
            memmove(target, source, piece_bytes)
        return True
    part, rows = memory.buffer[first : first + num_bytes], _memory_of(blocks)
    if len(rows) < num_bytes:
        rows = rows.reshape(count, -1)
        part = part.reshape(count, block_stride)[:, : rows.shape[1]]
    _assign(part, rows, to_run, most)
    return True


def _most_bytes(num_elements: int, num_blocks: int) -> int:
    """The most bytes of a run that NumPy copies."""
    return MAX_RUN_BYTES if num_elements > GRAIN * num_blocks else MAX_RUN_OF_SMALL


def _assign(part: Memory, blocks: Memory, to_part: bool, most_bytes: int) -> None:
    target, source = (part, blocks) if to_part else (blocks, part)
    if source.nbytes <= most_bytes:
        target[:] = source
    else:
        torch.from_numpy(target).copy_(torch.from_numpy(source))


def _is_ordinary(tensor: Any) -> bool:
    """Whether a tensor is contiguous host memory whose bytes are its values."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether the memory of a contiguous tensor is there; see ``require_memory``."""
    first = tensor.storage_offset() * tensor.element_size()
    return first + tensor.nbytes <= tensor.untyped_storage().nbytes()


def _memory_of(tensor: torch.Tensor) -> Memory:
    """The bytes of a contiguous tensor in host memory, of at least one dimension."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != torch.uint8:
        tensor = as_bytes(tensor)
    found: Memory = tensor.numpy().reshape(-1)
    return found
