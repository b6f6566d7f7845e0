"""NVTX ranges around kvheap's launches and transfers, for Nsight Systems; off by default.

``KVHEAP_NVTX=1`` turns them on when kvheap is imported, :func:`enable` at any time. A range spans
the time that the host takes to queue the work, or to do it, on the thread that does: copies between
an engine's cache and a heap, transfers, jobs of a file tier, and within them the launches of
kernels and the calls of the copy engine. While they are off, nothing is added to any call.

>>> class Ranges:  # instead of torch.cuda.nvtx
...     def range_push(self, text): print("+", text)
...     def range_pop(self): print("-")
>>> import torch
>>> from kvheap import TensorMemoryAllocator, offload
>>> near = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
>>> far = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
>>> batch = near.batched_allocate([8], torch.float32, 4)
>>> enable(Ranges())
>>> away = offload(batch, into=far)
+ kvheap transfer h2h by host, 128 bytes, 4 runs
-
>>> disable()
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

from kvheap.engine import transfers as engine_transfers
from kvheap.files.chunk_file import ChunkFile
from kvheap.heaps.segments import Segments
from kvheap.kernels import block_copy, paged_convert, paged_copy, pointer_copy
from kvheap.kernels.bulk_copy import BulkCopy
from kvheap.kernels.copy_engine import Driver
from kvheap.kernels.untraced import untraced
from kvheap.probes import Place, Probe
from kvheap.transfer import moves

__all__ = ["Ranges", "disable", "enable", "enable_by_environment", "is_enabled"]

LOGGER = logging.getLogger("kvheap")

VARIABLE = "KVHEAP_NVTX"


class Ranges(Protocol):
    """What marks ranges: ``torch.cuda.nvtx``, or an object with its functions."""

    def range_push(self, msg: str) -> object:
        """Begin a range on this thread."""
        ...

    def range_pop(self) -> object:
        """End the range that was begun last on this thread."""
        ...


def _of_transfer(work: Any, run: Any, *_: Any) -> str:
    return f"transfer {work.direction} by {run.path}, {work.num_bytes} bytes, {work.num_runs} runs"


def _of_engine_copy(route: Any, copy: Any, *_: Any) -> str:
    return f"{'store' if copy.to_heap else 'load'} of {copy.places.num_tokens} tokens"


def _of_launch(kernel: Any, variant: Any, num_programs: int, *_: Any) -> str:
    function = getattr(kernel, "fn", kernel)
    return f"launch {getattr(function, '__name__', 'kernel').strip('_')}, {num_programs} programs"


def _of_bulk(copy: Any, *_: Any) -> str:
    return "launch copy_bulk_kernel"


def _of_pieces(driver: Any, pieces: Any, *_: Any) -> str:
    return f"copy engine, {len(pieces)} pieces"


def _of_blocks(name: str) -> Callable[..., str]:
    return lambda *_: f"{name} of blocks"


def _of_files(name: str) -> Callable[..., str]:
    return lambda file, keys, *_: f"file {name} of {len(keys)} chunks"


PLACES: tuple[tuple[Place, Callable[..., str]], ...] = (
    ((moves, "begin"), _of_transfer),
    ((engine_transfers, "begin"), _of_transfer),
    ((engine_transfers.Route, "execute"), _of_engine_copy),
    ((Segments, "scatter"), _of_blocks("scatter")),
    ((Segments, "gather"), _of_blocks("gather")),
    ((Segments, "fill"), _of_blocks("fill")),
    ((ChunkFile, "store"), _of_files("store")),
    ((ChunkFile, "load"), _of_files("load")),
    ((block_copy, "launch"), _of_launch),
    ((paged_convert, "launch"), _of_launch),
    ((paged_copy, "launch"), _of_launch),
    ((pointer_copy, "launch"), _of_launch),
    ((BulkCopy, "run"), _of_bulk),
    ((Driver, "copy_batch"), _of_pieces),
    ((Driver, "copy_each"), _of_pieces),
)
"""Each function that gets a range, with what names the range after the function's arguments."""

_probes: list[Probe] = []


def enable(ranges: Ranges | None = None) -> None:
    """Mark ranges from now on; nothing if they are marked.

    Args:
        ranges: what marks them; None: ``torch.cuda.nvtx``.

    Raises:
        RuntimeError: torch has no NVTX, as builds for CPUs.
    """
    if _probes:
        return
    if ranges is None:
        ranges = _ranges_of_torch()

    def wrap_with(text_of: Callable[..., str]) -> Callable[..., Any]:
        def wrap(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            @untraced
            @wraps(function)
            def ranged(*arguments: Any, **options: Any) -> Any:
                ranges.range_push(f"kvheap {text_of(*arguments)}")
                try:
                    return function(*arguments, **options)
                finally:
                    ranges.range_pop()

            return ranged

        return wrap

    for place, text_of in PLACES:
        probe = Probe([place], wrap_with(text_of))
        _probes.append(probe)
        probe.attach()


def disable() -> None:
    """Mark no more ranges. Those that are open end where they would have ended."""
    while _probes:
        _probes.pop().detach()


def is_enabled() -> bool:
    """Whether ranges are marked."""
    return bool(_probes)


def enable_by_environment() -> None:
    """:func:`enable`, if ``KVHEAP_NVTX`` is set, and neither empty nor 0; else warn why not."""
    if os.environ.get(VARIABLE, "") in ("", "0"):
        return
    try:
        enable()
    except RuntimeError as error:
        LOGGER.warning("%s is set, but no NVTX ranges are marked: %s", VARIABLE, error)


def _ranges_of_torch() -> Ranges:
    import torch

    ranges: Any = torch.cuda.nvtx
    try:
        ranges.range_push("kvheap")
        ranges.range_pop()
    except RuntimeError as error:
        raise RuntimeError(
            f"this torch ({torch.__version__}) marks no NVTX ranges ({error}): install a build for "
            f"CUDA, or pass the object that marks them"
        ) from error
    found: Ranges = ranges
    return found
