"""What ``bench_paged_copy.py`` copies: engine caches of models, a heap, and tokens in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _buffers import random_bytes

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels.paged_layout import LAYOUTS

CHUNK_TOKENS = 256
RUN_BLOCKS = 8
SLOTS_PER_TOKEN = 2

PATTERNS = {"blocks": "random blocks", "runs": f"runs of {RUN_BLOCKS} blocks", "tokens": "tokens"}
OPERATIONS = ("store", "load")

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The KV cache of a model, in an engine layout."""

    model: str
    layout: str
    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16

    @property
    def name(self) -> str:
        """Model and engine layout."""
        return f"{self.model} {self.layout}"

    @property
    def num_planes(self) -> int:
        """2 if K and V are separate, else 1."""
        return LAYOUTS[self.layout].num_planes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one token in one plane."""
        return self.head_dim * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer and plane."""
        return self.num_heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers and planes."""
        return self.num_layers * self.num_planes * self.row_bytes

    @property
    def is_contiguous(self) -> bool:
        """Whether heads of a token and tokens of a block are in the same order as in a chunk."""
        return "HN" not in LAYOUTS[self.layout].dims

    def run_bytes(self, pattern: str) -> int:
        """Bytes that are contiguous on both sides."""
        if not self.is_contiguous:
            return self.head_bytes
        return self.row_bytes * (1 if pattern == "tokens" else self.block_size)


LLAMA_8B = Geometry("llama-3-8b", "vllm-flash-nhd", 32, 8, 128)
GPU_GEOMETRIES = (
    LLAMA_8B,
    Geometry("llama-3-8b", "vllm-flashinfer-nhd", 32, 8, 128),
    Geometry("llama-3-8b", "vllm-flash-hnd", 32, 8, 128),
    Geometry("llama-3-70b-tp4", "vllm-flash-nhd", 80, 2, 128),
    Geometry("qwen3-8b", "vllm-flash-nhd", 36, 8, 128),
    Geometry("gpt-oss, 12 full layers", "vllm-flash-nhd", 12, 8, 64),
    Geometry("deepseek-v3", "mla", 61, 1, 576, block_size=64),
    Geometry("deepseek-v3-fp8", "mla", 61, 1, 576, torch.uint8, block_size=64),
    Geometry("deepseek-v3-fp8-656", "mla", 61, 1, 656, torch.uint8, block_size=64),
)
CPU_GEOMETRIES = (
    Geometry("llama-3-8b, 8 layers", "vllm-flash-nhd", 8, 8, 128),
    Geometry("llama-3-8b, 8 layers", "vllm-flashinfer-nhd", 8, 8, 128),
    Geometry("llama-3-8b, 8 layers", "vllm-flash-hnd", 8, 8, 128),
    Geometry("deepseek-v2-lite", "mla", 27, 1, 576),
)


@dataclass(frozen=True, slots=True)
class World:
    """A set of tensors: an engine's cache, and a heap that consists of one batch of chunks."""

    geometry: Geometry
    num_tokens: int
    engine: torch.Tensor
    layers: list[torch.Tensor]
    cache: PagedKVCache
    heap: torch.Tensor
    batch: kvheap.MemoryBatch

    @classmethod
    def make(cls, device: torch.device, geometry: Geometry, num_tokens: int) -> World:
        """Fill both sides with random bytes."""
        num_blocks = SLOTS_PER_TOKEN * -(-num_tokens // geometry.block_size)
        engine = random_bytes(num_blocks * geometry.block_size * geometry.token_bytes, device)
        dims = LAYOUTS[geometry.layout].dims
        sizes = {"P": 2, "B": num_blocks, "N": geometry.block_size}
        sizes |= {"H": geometry.num_heads, "C": geometry.head_dim}
        layers = [
            part.view(geometry.dtype).view([sizes[dim] for dim in dims])
            for part in engine.chunk(geometry.num_layers)
        ]
        num_chunks = -(-num_tokens // CHUNK_TOKENS)
        heap = random_bytes(num_chunks * CHUNK_TOKENS * geometry.token_bytes, device)
        shape = (
            geometry.num_planes,
            geometry.num_layers,
            CHUNK_TOKENS,
            geometry.num_heads * geometry.head_dim,
        )
        is_mla = geometry.num_planes == 1
        fmt = MemoryFormat.KV_MLA_FMT if is_mla else MemoryFormat.KV_2LTD
        allocator = TensorMemoryAllocator(heap, debug=False)
        batch = allocator.batched_allocate(shape, geometry.dtype, num_chunks, fmt)
        if batch is None or batch.num_runs != 1:
            raise RuntimeError(f"{num_chunks} chunks {shape} do not fill the heap")
        cache = PagedKVCache.of(geometry.layout, layers)
        return cls(geometry, num_tokens, engine, layers, cache, heap, batch)

    @property
    def side_bytes(self) -> int:
        """Bytes that a copy reads; it writes as many."""
        return self.num_tokens * self.geometry.token_bytes

    def blocks_of(self, layer: int) -> torch.Tensor:
        """A layer as int64 words ``[planes, blocks, block size, heads, words]``, a view."""
        words, dims = self.layers[layer].view(torch.int64), LAYOUTS[self.geometry.layout].dims
        ordered = words.permute([dims.index(dim) for dim in "PBNHC" if dim in dims])
        return ordered if "P" in dims else ordered[None, :, :, None]

    def chunks_of(self, layer: int) -> torch.Tensor:
        """A layer as int64 words ``[planes, chunks, tokens, heads, words]``, a view."""
        geometry = self.geometry
        parts = (geometry.num_planes, geometry.num_layers, CHUNK_TOKENS, geometry.num_heads)
        words = self.heap.view(torch.int64).view(len(self.batch), *parts, -1)
        return words[:, :, layer].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Case:
    """A set of tensors, and the places of the tokens in the cache."""

    world: World
    pattern: str
    slots: Int64Array
    given: BlockIds | Int64Array
    """The slots or block ids that kvheap is called with, on the host."""

    @classmethod
    def make(cls, world: World, pattern: str, seed: int) -> Case:
        """Put the tokens into random places."""
        generator = np.random.default_rng(seed)
        if pattern == "tokens":
            slots = generator.permutation(world.cache.num_slots)[: world.num_tokens]
            return cls(world, pattern, slots, slots)
        num_blocks = world.num_tokens // world.cache.block_size
        run = 1 if pattern == "blocks" else min(RUN_BLOCKS, num_blocks)
        firsts = generator.permutation(world.cache.num_blocks // run)[: -(-num_blocks // run)] * run
        ids = (firsts[:, None] + np.arange(run)).ravel()[:num_blocks]
        slots = (ids[:, None] * world.cache.block_size + np.arange(world.cache.block_size)).ravel()
        return cls(world, pattern, slots, BlockIds(ids))

    def on_device(self) -> BlockIds | torch.Tensor | Int64Array:
        """The slots or block ids on the cache's device."""
        device = self.world.cache.device
        if device.type == "cpu":
            return self.given
        if isinstance(self.given, BlockIds):
            return BlockIds(torch.from_numpy(np.asarray(self.given.ids)).to(device))
        return torch.from_numpy(self.given).to(device)

    @property
    def unit_tokens(self) -> int:
        """Tokens that are contiguous on both sides."""
        is_unit = self.pattern != "tokens" and self.world.geometry.is_contiguous
        return self.world.geometry.block_size if is_unit else 1

    def run_numbers(self) -> Int64Array:
        """The numbers of a layer's runs in the cache, ``[planes, units, runs of a unit]``."""
        cache, geometry = self.world.cache, self.world.geometry
        plane = cache.planes[0]
        blocks, offsets = np.divmod(self.slots[:: self.unit_tokens], cache.block_size)
        starts = blocks * plane.block_stride + offsets * plane.slot_stride
        pieces = 1 if geometry.is_contiguous else geometry.num_heads
        heads = np.arange(pieces) * plane.head_stride
        planes = cache.base_addresses[0] - cache.base_addresses[0, 0]
        addresses = planes[:, None, None] + starts[:, None] + heads
        numbers: Int64Array = addresses // geometry.run_bytes(self.pattern)
        return numbers
