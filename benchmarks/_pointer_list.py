"""A peer of copy kernels: a Triton kernel over a list of addresses, as vLLM's for offloading.

It reads 24 bytes for each piece: source, target and size. A few programs share the list.
"""

from __future__ import annotations

import torch

from kvheap.kernels.launch import jit, tl

PROGRAMS = 12
WORDS = 1024
"""Words of 8 bytes that a program moves at a time."""


@jit(do_not_specialize=["num_pieces"])
def _copy_list_kernel(  # type: ignore[no-untyped-def]
    source_ptr,
    target_ptr,
    bytes_ptr,
    num_pieces,
    PROGRAMS: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """Copy every ``PROGRAMS``-th piece of a list of addresses, in words of 8 bytes."""
    for piece in range(tl.program_id(0), num_pieces, PROGRAMS):
        source = tl.load(source_ptr + piece).to(tl.pointer_type(tl.int64))
        target = tl.load(target_ptr + piece).to(tl.pointer_type(tl.int64))
        num_words = tl.load(bytes_ptr + piece) // 8
        for first in range(0, num_words, WORDS):
            words = first + tl.arange(0, WORDS)
            mask = words < num_words
            tl.store(target + words, tl.load(source + words, mask=mask), mask=mask)


def copy_list(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor) -> None:
    """Launch the kernel over addresses and sizes in bytes, all int64 on the device.

    Sizes must be multiples of 8.
    """
    launch = _copy_list_kernel[(PROGRAMS,)]
    launch(sources, targets, sizes, len(sources), PROGRAMS=PROGRAMS, WORDS=WORDS)
