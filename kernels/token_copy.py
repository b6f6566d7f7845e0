"""``TokenCopy``: a checked description of a copy between an engine's paged cache and chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.chunk_shape import CONVERTIBLE
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_plan import Pairing, pairing_of
from kvheap.kernels.paged_slots import Places, Slots
from kvheap.kernels.uploads import Words
from kvheap.kernels.whole_blocks import blocks_of_cache, ids_of_whole_blocks

__all__ = ["Chunks", "TokenCopy", "require_convertible"]


@dataclass(slots=True)  # as Places
class Chunks:
    """Equal chunks in memory.

    Attributes:
        buffer: any tensor over the memory that holds the chunks; the caller keeps it alive.
        addresses: absolute address of each chunk, int64 ``[N]`` on the host. If a chunk holds one
            layer, the chunks of the first layer come first.
        size_bytes: bytes of each chunk.
        alignment: a power of two that divides all addresses.
        layout: the chunk layout.
        scale_offset: None if the chunks hold the cache's own bytes. If they hold fp8 e4m3, whose
            elements have one byte in the chunk layout, the offset in bytes of a chunk's scales,
            float32 ``[planes, layers, heads]``.
        data_offset: bytes before a chunk's elements, if its scales come first.
        are_reachable: whether the caller knows that the cache's device can reach the chunks; else
            ``buffer`` must be on that device, or its start in pinned host memory.
    """

    buffer: torch.Tensor
    addresses: Int64Array
    size_bytes: int
    alignment: int
    layout: ChunkLayout
    scale_offset: int | None = None
    data_offset: int = 0
    are_reachable: bool = False

    def __repr__(self) -> str:
        """How many, their bytes and tokens."""
        return (
            f"Chunks({len(self.addresses)} x {self.size_bytes} bytes on {self.buffer.device}, "
            f"{self.layout.num_tokens} tokens each)"
        )


@dataclass(slots=True)  # as Places
class TokenCopy:
    """One copy of tokens, checked.

    Attributes:
        pairing: the cache and chunks of the cache's own dtype, even if the copy converts.
        places: where the tokens are in the cache.
        chunks: where they are in the heap.
        to_heap: True to copy from the cache to the chunks, False from the chunks to the cache.
    """

    pairing: Pairing
    places: Places
    chunks: Chunks
    to_heap: bool

    @classmethod
    def of(
        cls,
        cache: PagedKVCache,
        slots: Slots,
        chunks: Chunks,
        layers: range | None,
        heads: slice | None,
        eager: bool,
        to_heap: bool,
    ) -> TokenCopy:
        """Check a copy; arguments and errors are those of ``store_tokens``."""
        if cache.layout.whole_blocks:
            if chunks.scale_offset is not None:
                require_convertible(cache)
            slots = ids_of_whole_blocks(cache, slots)
            chunks = replace(chunks, layout=chunks.layout.of_blocks(cache.block_size))
            cache = blocks_of_cache(cache)
        pairing = pairing_of(cache, _exact_layout(cache, chunks), layers, heads)
        places = Places.of(slots, pairing, eager, distinct=not to_heap)
        if to_heap and cache.filled_tokens is not None:
            filled = min(cache.filled_tokens[layer] for layer in pairing.layers)
            places.require_filled(cache.block_size, filled, eager)
        _require_chunks(pairing, places.num_tokens, chunks)
        if not chunks.are_reachable:
            _require_reachable(cache, chunks.buffer)
        return cls(pairing, places, chunks, to_heap)

    def words(self, num_first: int) -> Words:
        """What kernels read of the host: words of their own, chunks' addresses, and places.

        Args:
            num_first: how many words come first.
        """
        num_words, places = num_first + len(self.chunks.addresses), self.places.values
        if not isinstance(places, torch.Tensor):
            num_words += len(places)
        return Words(num_words, self.pairing.cache.device)

    def send(
        self, words: Words, first_words: Sequence[int], access_bytes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the words and send them to the device.

        Args:
            words: of :meth:`words`.
            first_words: what comes first.
            access_bytes: what chunks' addresses are counted in, a power of two.

        Returns:
            The words on the device; and the tensor that has the places, which may be the same.
        """
        host, places, addresses = words.host, self.places.values, self.chunks.addresses
        num_first = len(first_words)
        end = num_first + len(addresses)
        if num_first:
            host[:num_first] = first_words
        np.right_shift(addresses, _SHIFTS[access_bytes], host[num_first:end])
        if isinstance(places, torch.Tensor):
            return words.send(), places
        host[end:] = places
        sent = words.send()
        return sent, sent


_SHIFTS = {1 << shift: np.array(shift) for shift in range(5)}
"""For each width of access. NumPy shifts by an array without dimensions in half the time that an
``int`` takes."""


def require_convertible(cache: PagedKVCache) -> None:
    """Refuse a cache whose KV cannot be converted.

    Raises:
        ValueError: says why.
    """
    if cache.layout.whole_blocks:
        raise ValueError(f"{cache.layout.name} holds no rows that could be converted")
    if cache.dtype not in CONVERTIBLE:
        raise ValueError(f"only a cache of bfloat16 or float16 can be converted, got {cache.dtype}")


def _exact_layout(cache: PagedKVCache, chunks: Chunks) -> ChunkLayout:
    """The layout of chunks of the cache's own dtype, with the tokens in the same order."""
    layout = chunks.layout
    if chunks.scale_offset is None:
        return layout
    require_convertible(cache)
    if layout.num_planes != cache.num_planes:
        raise ValueError(
            f"{cache.layout.name} has {cache.num_planes} planes, the chunk {layout.num_planes}"
        )
    if layout.head_groups > 1:
        raise ValueError("chunks that keep heads apart cannot be converted")
    if layout.page_tokens < layout.num_tokens:
        raise ValueError(
            f"chunks of several pages cannot be converted, got {layout.num_tokens} tokens in pages "
            f"of {layout.page_tokens}"
        )
    return layout.with_item_bytes(cache.dtype.itemsize)


def _require_chunks(pairing: Pairing, num_tokens: int, chunks: Chunks) -> None:
    """Check that there are exactly as many chunks as the tokens need."""
    needed = pairing.num_chunks(num_tokens)
    if len(chunks.addresses) != needed:
        raise ValueError(
            f"{num_tokens} tokens of {pairing.num_layers} layers need {needed} chunks of "
            f"{chunks.layout.num_tokens} tokens, got {len(chunks.addresses)}"
        )


def _require_reachable(cache: PagedKVCache, buffer: torch.Tensor) -> None:
    """Refuse chunks that the cache's device cannot address."""
    if buffer.device == cache.device:
        return
    if cache.device.type == "cuda" and buffer.device.type == "cpu" and buffer.is_pinned():
        return
    raise ValueError(
        f"the cache is on {cache.device}, the chunks on {buffer.device}: chunks must be on the "
        f"cache's device or in pinned host memory"
    )
