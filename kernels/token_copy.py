"""``TokenCopy``: a checked description of a copy between an engine's paged cache and chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.launch import bytes_of, staging
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_plan import Pairing, pairing_of
from kvheap.kernels.paged_slots import Places, Slots
from kvheap.kernels.whole_blocks import blocks_of_cache, ids_of_whole_blocks

__all__ = ["CONVERTIBLE", "Chunks", "TokenCopy"]

CONVERTIBLE = (torch.bfloat16, torch.float16)
"""The dtypes of caches whose KV can be converted to fp8."""


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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
                raise ValueError(f"{cache.layout.name} holds no rows that could be converted")
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

    def kernel_tensors(
        self, table: torch.Tensor, places: Places, access_bytes: int
    ) -> tuple[torch.Tensor, ...]:
        """The first arguments of a kernel, one for each of its pointers.

        The bytes of the cache's first tensor, the bytes of the chunks' buffer, the table, the
        places, the chunks' offsets in the buffer, and the cache's error word. Everything that is on
        the host is uploaded at once.

        Args:
            table: the pairing's table, on the device.
            places: the places of this copy, perhaps in longer units.
            access_bytes: the unit of the chunks' offsets, a power of two.
        """
        cache, chunks = self.pairing.cache, self.chunks
        num_chunks = len(chunks.addresses)
        # Both parts begin at a multiple of 16 bytes; Triton compiles again for other alignments.
        num_words = -(-num_chunks // 2) * 2
        on_host = None if isinstance(places.values, torch.Tensor) else places.values
        words = staging(num_words + (0 if on_host is None else len(on_host)), cache.device)
        host_words = words.numpy()
        shift = access_bytes.bit_length() - 1
        host_words[:num_chunks] = (chunks.addresses - chunks.buffer.data_ptr()) >> shift
        if on_host is not None:
            host_words[num_words:] = on_host
        uploaded = words.to(cache.device, non_blocking=True)
        return (
            _anchor_bytes(cache),
            bytes_of(chunks.buffer),
            table,
            places.values if isinstance(places.values, torch.Tensor) else uploaded[num_words:],
            uploaded,
            cache.error_word(),
        )


def _anchor_bytes(cache: PagedKVCache) -> torch.Tensor:
    """The bytes of the cache's first tensor; offsets in tables count from its address."""
    found: torch.Tensor | None = cache.kept.get("anchor")
    if found is None:
        found = cache.kept["anchor"] = bytes_of(cache.tensors[0])
    return found


def _exact_layout(cache: PagedKVCache, chunks: Chunks) -> ChunkLayout:
    """The layout of chunks of the cache's own dtype, with the tokens in the same order."""
    layout = chunks.layout
    if chunks.scale_offset is None:
        return layout
    if cache.dtype not in CONVERTIBLE:
        raise ValueError(f"only a cache of bfloat16 or float16 can be converted, got {cache.dtype}")
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
    needed = chunks.layout.num_chunks(num_tokens, pairing.num_layers)
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
