"""``warm_up``: compiles the kernels that the copies of a cache will need, before they are needed.

A kernel is compiled for a width of access, and little else, so that a few variants serve all
traffic; each takes a good part of a second. See :mod:`kvheap.kernels.tiles`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kvheap.kernels import launch
from kvheap.kernels.arguments import as_whole
from kvheap.kernels.block_copy import block_kernels
from kvheap.kernels.direct_launch import compile_ahead, is_compiled
from kvheap.kernels.launch import anchor_on, current
from kvheap.kernels.paged_convert import conversion_kernels
from kvheap.kernels.paged_copy import token_kernels
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_tiles import access_widths
from kvheap.kernels.pointer_copy import piece_kernels
from kvheap.kernels.shared_work import do_all
from kvheap.kernels.tiles import Variant
from kvheap.kernels.whole_blocks import blocks_of_cache

__all__ = ["warm_up"]


def warm_up(
    cache: PagedKVCache | torch.device, *, align_bytes: int = 16, convert: bool = False
) -> int:
    """Compile and load all kernels that copies on a device may launch; copy nothing.

    Those of ``store`` and ``load`` for a cache, of chunks of any format, with and without an SM
    budget; those of the blocks of a heap on its device (``batched_allocate(source=)``,
    ``batched_free(out=)``, ``scatter_blocks`` and its like); and those of transfers by kernels.
    Without this, the first copy that needs a kernel waits for its compiler. In parallel, on all
    cores; what an earlier process compiled comes from Triton's cache on disk. Call it once for each
    process and device, outside of the capture of a CUDA graph. On a CPU, copies use no kernels, and
    this does nothing.

    Args:
        cache: the engine's cache; or a device, for the copies of heaps and transfers only.
        align_bytes: a power of two that divides the addresses of the chunks: their heap's
            ``align_bytes``, for example.
        convert: also for ``store`` and ``load`` with ``convert=True``, of a cache of bfloat16 or
            float16.

    Returns:
        How many kernels were compiled or loaded now: 0 if all had been, or on a CPU.

    Raises:
        TypeError: ``cache`` is neither a cache nor a device, or ``align_bytes`` not an integer.
        ValueError: ``align_bytes`` is not a power of two, or the cache cannot be converted.
        RuntimeError: Triton is missing, or the kernels need more than the device has.

    >>> layers = [torch.zeros(2, 8, 16, 4, 64, dtype=torch.float16) for _ in range(3)]
    >>> warm_up(PagedKVCache.of("vllm-flash-nhd", layers))
    0
    """
    if not isinstance(cache, (PagedKVCache, torch.device)):
        raise TypeError(f"cache must be a PagedKVCache or a torch.device, got {cache!r}")
    align_bytes = as_whole("align_bytes", align_bytes)
    if align_bytes <= 0 or align_bytes & (align_bytes - 1):
        raise ValueError(f"align_bytes must be a positive power of two, got {align_bytes}")
    if convert and isinstance(cache, torch.device):
        raise ValueError(f"convert=True needs the cache that is to be converted, got {cache!r}")
    device = cache.device if isinstance(cache, PagedKVCache) else cache
    kernels = [*block_kernels(), *piece_kernels()]
    if isinstance(cache, PagedKVCache):
        if convert:
            kernels += conversion_kernels(cache, align_bytes)
        kernels += token_kernels(_widths(cache, align_bytes))
    if not launch.runs_kernels(device):
        return 0
    with current(device):
        anchor_on(device)
        missing = [each for each in kernels if not is_compiled(*each)]
    # The paged copies first: they take longest.
    tasks = [partial(_compile, device, *each) for each in reversed(missing)]
    do_all(tasks, min(len(tasks), os.cpu_count() or 1))
    return len(tasks)


def _compile(device: torch.device, kernel: Any, variant: Variant) -> None:
    with current(device):
        compile_ahead(kernel, variant)


def _widths(cache: PagedKVCache, align_bytes: int) -> Sequence[int]:
    """The widths of access that copies between a cache and chunks of any format may have."""
    if cache.layout.whole_blocks:
        cache = blocks_of_cache(cache)
    return sorted(set(access_widths(cache, align_bytes)))
