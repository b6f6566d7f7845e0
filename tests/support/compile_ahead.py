"""Compile every variant of the copies' kernels in parallel, before the tests on a GPU need them.

``python compile_ahead.py``: into Triton's cache on disk, where all test processes find them. Only
conversions are compiled by their tests, since they depend on the dimensions of heads.
"""

from __future__ import annotations

import os
import time
from functools import partial

import torch

from kvheap.kernels.block_copy import block_kernels
from kvheap.kernels.direct_launch import compile_ahead, is_compiled
from kvheap.kernels.paged_copy import token_kernels
from kvheap.kernels.pointer_copy import piece_kernels
from kvheap.kernels.shared_work import do_all
from kvheap.kernels.tiles import ACCESS_BYTES


def compile_all() -> int:
    """How many kernels were compiled for the current device."""
    kernels = [*token_kernels(ACCESS_BYTES), *block_kernels(), *piece_kernels()]
    missing = [each for each in kernels if not is_compiled(*each)]
    do_all([partial(compile_ahead, *each) for each in missing], os.cpu_count() or 1)
    return len(missing)


if __name__ == "__main__":
    if torch.cuda.is_available():
        start = time.perf_counter()
        count = compile_all()
        print(f"{count} kernels compiled in {time.perf_counter() - start:.1f} s")
    else:
        print("no CUDA device: nothing to compile")
