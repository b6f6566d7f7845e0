"""Where the pages of a chunk are: in the engine's cache tensors, and in the chunk.

A chunk of a group holds ``blocks_per_chunk`` blocks of each of the group's tensors, one tensor
after another, each with that many pages of its own size: what other groups keep in the same tensors
and what a padded page has beyond its contents takes no bytes of the heap.

For two tensors with pages of 8 and 4 bytes and 2 blocks a chunk:

    | tensor 0, block 0 | tensor 0, block 1 | tensor 1, block 0 | tensor 1, block 1 |
    0                   8                  16                  20                  24
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array

__all__ = ["GroupPages", "PagePairs"]


@dataclass(frozen=True, slots=True, eq=False)
class PagePairs:
    """Pages to copy: pairs of an absolute address in the engine and an address in the heap.

    Attributes:
        engine: absolute addresses, int64 ``[P]``.
        heap: addresses in the heap, int64 ``[P]``.
        sizes: bytes of each page, int64 ``[P]``.
    """

    engine: Int64Array
    heap: Int64Array
    sizes: Int64Array

    @classmethod
    def joined(cls, parts: Sequence[PagePairs]) -> PagePairs:
        """The pages of several groups, in order."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            nothing = np.empty(0, np.int64)
            return cls(nothing, nothing, nothing)
        return cls(
            np.concatenate([part.engine for part in parts]),
            np.concatenate([part.heap for part in parts]),
            np.concatenate([part.sizes for part in parts]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class GroupPages:
    """The pages of one KV cache group: T tensors of B blocks, each with its own page size.

    Attributes:
        bases: absolute address of block 0 in each tensor, int64 ``[T]``.
        strides: bytes from one block to the next, int64 ``[T]``.
        page_bytes: bytes of each page without padding, int64 ``[T]``.
        offsets: where the tensor's pages begin in a chunk, int64 ``[T]``.
        steps: bytes from one block's page to the next one's in a chunk, int64 ``[T]``.
        num_blocks: blocks of each tensor.
        blocks_per_chunk: blocks of a chunk.
        chunk_bytes: bytes of a chunk.
    """

    bases: Int64Array
    strides: Int64Array
    page_bytes: Int64Array
    offsets: Int64Array
    steps: Int64Array
    num_blocks: int
    blocks_per_chunk: int
    chunk_bytes: int

    @classmethod
    def of(
        cls,
        tensors: Sequence[torch.Tensor],
        page_bytes: Sequence[int],
        blocks_per_chunk: int,
        places: Sequence[tuple[int, int]] | None = None,
    ) -> GroupPages:
        """From the tensors of a group.

        Args:
            tensors: each ``[B, ...]``, the pages of its blocks at a constant distance.
            page_bytes: bytes to keep of each tensor's page, from its start.
            blocks_per_chunk: blocks of a chunk.
            places: by tensor, where its pages begin in a chunk, and how many bytes lie from one to
                the next; None: one behind the other.

        Raises:
            ValueError: the group has no tensor, the tensors have unlike numbers of blocks, or a
                page is larger than the tensor's block.
        """
        if not tensors:
            raise ValueError("a KV cache group has no tensor: there is nothing to keep of it")
        num_blocks = len(tensors[0])
        for at, (tensor, size) in enumerate(zip(tensors, page_bytes, strict=True)):
            if len(tensor) != num_blocks:
                raise ValueError(
                    f"tensor {at} of a KV cache group has {len(tensor)} blocks, tensor 0 has "
                    f"{num_blocks}"
                )
            held = tensor[0].numel() * tensor.element_size() if num_blocks else size
            if not 0 < size <= held:
                raise ValueError(
                    f"a page of tensor {at} has {size} bytes, its block {held}: a page is a part "
                    f"of its block"
                )
        sizes = steps = np.array(page_bytes, np.int64)
        offsets = np.cumsum(sizes * blocks_per_chunk) - sizes * blocks_per_chunk
        if places is not None:
            offsets, steps = np.array(places, np.int64).T
        return cls(
            bases=np.array([tensor.data_ptr() for tensor in tensors], np.int64),
            strides=np.array([t.stride(0) * t.element_size() for t in tensors], np.int64),
            page_bytes=sizes,
            offsets=offsets,
            steps=steps,
            num_blocks=num_blocks,
            blocks_per_chunk=blocks_per_chunk,
            chunk_bytes=int((offsets + steps * (blocks_per_chunk - 1) + sizes).max()),
        )

    def num_chunks(self, num_blocks: int, first_block: int) -> int:
        """Chunks that ``num_blocks`` blocks touch, of which the first is block ``first_block``."""
        if not num_blocks:
            return 0
        return -(-(first_block % self.blocks_per_chunk + num_blocks) // self.blocks_per_chunk)

    def pairs(self, block_ids: Int64Array, first_block: int, chunks: Int64Array) -> PagePairs:
        """The pages of some blocks, and their places in chunks.

        Args:
            block_ids: the engine's blocks, int64 ``[N]``; -1 skips a block.
            first_block: index of the first block in its request; the blocks follow one another.
            chunks: addresses of the chunks that they touch, int64 ``[num_chunks(N, first_block)]``.

        Returns:
            The pages in the order of the tensors, then of the blocks.

        Raises:
            ValueError: a block is none of the engine's.
        """
        places = first_block % self.blocks_per_chunk + np.arange(len(block_ids))
        is_kept = block_ids >= 0
        if not is_kept.all():
            block_ids, places = block_ids[is_kept], places[is_kept]
        if len(block_ids) and block_ids.max() >= self.num_blocks:
            raise ValueError(
                f"block {block_ids.max()} is none of the {self.num_blocks} blocks of the KV cache"
            )
        within = places % self.blocks_per_chunk
        engine = self.bases[:, None] + block_ids * self.strides[:, None]
        heap = (
            chunks[places // self.blocks_per_chunk]
            + self.offsets[:, None]
            + within * self.steps[:, None]
        )
        sizes = np.repeat(self.page_bytes, len(block_ids))
        return PagePairs(engine.reshape(-1), heap.reshape(-1), sizes)
