"""The peers of transfers: functions of a case that return a call."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np
import torch
from _pointer_list import copy_list
from _timing import Call
from _transfer_cases import Case

from kvheap import MemoryBatch, TensorMemoryAllocator
from kvheap.kernels.copy_engine import driver
from kvheap.kernels.launch import upload

LOOP_COPIES = 512
"""Copies of the loop on a GPU, where each takes microseconds of the host, whatever its size."""

BATCH_PIECES = 32_768
"""Pieces of one call of the copy engine; a call of 51,828 crashed a driver (vLLM #49276)."""


def contiguous(case: Case, seed: int) -> Call:
    """One ``copy_`` of as many bytes: the ceiling."""
    ends, size = case.buffers, case.num_bytes
    starts = [
        int(np.random.default_rng(seed).integers((side.nbytes - size) // 4096 + 1)) * 4096
        for side in (ends.source, ends.target)
    ]
    source = ends.source[starts[0] : starts[0] + size]
    target = ends.target[starts[1] : starts[1] + size]
    return partial(target.copy_, source, non_blocking=True)


def loop(case: Case, count: int | None) -> Call:
    """``copy_(non_blocking=True)`` for each of the first pieces, with views made beforehand."""
    views = case.views(count)

    def call() -> None:
        for target, source in views:
            target.copy_(source, non_blocking=True)

    return call


def batch_unmerged(case: Case, direction: Any, stream: int) -> Call:
    """The copy engine's batch call with all pieces, not merged."""
    groups = [case.pieces[part] for part in batches_of(len(case.pieces))]

    def call() -> None:
        for group in groups:
            driver().copy_batch(group, stream, over_link=direction in ("h2d", "d2h"))

    return call


def batches_of(num_pieces: int) -> list[slice]:
    """Split pieces into parts that one call of the copy engine takes."""
    return [slice(first, first + BATCH_PIECES) for first in range(0, num_pieces, BATCH_PIECES)]


def pointer_list(case: Case, device: torch.device) -> Call:
    """The pointer-list kernel; each call uploads the list. Sizes must be multiples of 8."""
    pieces = case.pieces

    def call() -> None:
        table = np.concatenate((pieces.sources, pieces.targets, pieces.size_array()))
        sources, targets, sizes = upload(table, device).view(3, -1)
        copy_list(sources, targets, sizes)

    return call


def bindings_lists(case: Case, stream: int) -> Call | None:
    """The batch call through cuda-bindings, which takes lists; None if that is not installed.

    Addresses are arrays, so each call makes lists of them.
    """
    try:
        cuda = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None
    if not hasattr(cuda, "cuMemcpyBatchAsync"):
        return None
    attributes = cuda.CUmemcpyAttributes()
    attributes.srcAccessOrder = cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    handle, pieces = cuda.CUstream(stream), case.pieces

    def call() -> None:
        for part in batches_of(len(pieces)):
            targets = [cuda.CUdeviceptr(address) for address in pieces.targets[part].tolist()]
            sources = [cuda.CUdeviceptr(address) for address in pieces.sources[part].tolist()]
            sizes = pieces[part].size_array().tolist()
            status, *_ = cuda.cuMemcpyBatchAsync(
                targets, sources, sizes, len(sizes), [attributes], [0], 1, handle
            )
            if status != cuda.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"cuMemcpyBatchAsync: {status}")

    return call


def batch_of_holes(buffer: torch.Tensor, block_bytes: int, num_blocks: int) -> MemoryBatch:
    """A batch in a heap whose every second block is taken: it has as many runs as blocks."""
    heap = TensorMemoryAllocator(
        buffer[: 2 * num_blocks * block_bytes], align_bytes=block_bytes, debug=False
    )
    every = heap.batched_allocate([block_bytes], torch.uint8, 2 * num_blocks)
    assert every is not None
    heap.batched_free(every[1::2])
    batch = heap.batched_allocate([block_bytes], torch.uint8, num_blocks)
    assert batch is not None
    if batch.num_runs != num_blocks:
        raise RuntimeError(f"{num_blocks} blocks have {batch.num_runs} runs")
    _taken.append(every)
    return batch


_taken: list[MemoryBatch] = []
"""Blocks that stay live until the process ends."""
