"""Copies whose slots or block ids only the device sees, as where an engine keeps them there."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvheap import BlockIds, PagedKVCache
from kvheap.kernels import paged_copy
from kvheap.kernels.token_copy import Chunks, TokenCopy


def copy_unseen(
    cache: PagedKVCache,
    values: torch.Tensor,
    chunks: Chunks,
    num_tokens: int,
    are_blocks: bool,
    to_heap: bool = True,
) -> None:
    """Copy the tokens at slots, or in blocks, that are not checked on the host."""
    slots = BlockIds([0] * len(values), num_tokens) if are_blocks else [0] * num_tokens
    copy = TokenCopy.of(cache, slots, chunks, None, None, eager=False, to_heap=to_heap)
    unseen = values.to(cache.device)
    paged_copy._run(replace(copy, places=replace(copy.places, values=unseen)))
