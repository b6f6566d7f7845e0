"""A vLLM-like paged cache under tensor parallelism, and chunks that serve any degree of it.

Two ranks hold half of the KV heads each, in tensors ``[2, blocks, block size, heads, head dim]``
for each layer. The script writes tokens into their blocks, stores all of them into chunks that hold
every head, and frees the blocks. Then four ranks, each with a quarter of the heads, load the same
chunks into other blocks, and each token is compared.

Everything is in one process here, rank by rank. In an engine each rank is a process with a heap of
its own, or with a view of a shared one.
"""

from __future__ import annotations

import argparse

import torch

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator

BLOCK_SIZE = 16


class Rank:
    """The paged cache of one rank.

    Args:
        heads: which of the model's KV heads it has.
        num_layers: layers of the model.
        num_blocks: blocks of its cache.
        head_dim: elements of a head.
    """

    def __init__(self, heads: slice, num_layers: int, num_blocks: int, head_dim: int) -> None:
        self.heads = heads
        shape = (2, num_blocks, BLOCK_SIZE, heads.stop - heads.start, head_dim)
        self.layers = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(num_layers)]
        self.cache = PagedKVCache.of("vllm-flash-nhd", self.layers)

    def at(self, layer: int, block_table: torch.Tensor) -> torch.Tensor:
        """K and V of a request's tokens in one layer: ``[2, tokens, heads, head dim]``."""
        return self.layers[layer][:, block_table].flatten(1, 2)


def ranks(degree: int, options: argparse.Namespace) -> list[Rank]:
    """The ranks of a tensor-parallel degree, each with its share of the heads."""
    share = options.heads // degree
    return [
        Rank(slice(n * share, (n + 1) * share), options.layers, options.blocks, 64)
        for n in range(degree)
    ]


def main() -> None:
    """Store with two ranks, load with four."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="(default: 4)")
    parser.add_argument("--heads", type=int, default=8, help="KV heads, by 4 (default: 8)")
    parser.add_argument("--blocks", type=int, default=64, help="of each rank (default: 64)")
    parser.add_argument("--tokens", type=int, default=500, help="of the request (default: 500)")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="(default: 256)")
    options = parser.parse_args()
    if options.heads % 4:
        parser.error(f"--heads must be a multiple of 4, got {options.heads}")
    num_blocks = -(-options.tokens // BLOCK_SIZE)
    if num_blocks > options.blocks:
        parser.error(f"{options.tokens} tokens need {num_blocks} blocks: give --blocks")

    # The model writes the KV of a request into the blocks that the engine's table names.
    table = torch.randperm(options.blocks)[:num_blocks]
    kv = torch.randn(options.layers, 2, num_blocks * BLOCK_SIZE, options.heads, 64).bfloat16()
    writers = ranks(2, options)
    for rank in writers:
        for layer, tensor in enumerate(rank.layers):
            blocks = kv[layer][:, :, rank.heads].unflatten(1, (num_blocks, BLOCK_SIZE))
            tensor[:, table] = blocks

    # Chunks hold all heads: [K and V, layers, tokens, heads * head dim].
    shape = (2, options.layers, options.chunk_tokens, options.heads * 64)
    num_chunks = -(-options.tokens // options.chunk_tokens)
    heap = TensorMemoryAllocator(torch.empty(256 << 20, dtype=torch.uint8))
    batch = heap.batched_allocate(shape, torch.bfloat16, num_chunks, MemoryFormat.KV_2LTD)
    assert batch is not None, "full: evict something and try again"
    places = BlockIds(table, num_tokens=options.tokens)
    for rank in writers:
        kvheap.store(rank.cache, places, batch, heads=rank.heads)
    print(batch)

    # Another engine, with four ranks and other blocks.
    elsewhere = torch.randperm(options.blocks)[:num_blocks]
    for rank in ranks(4, options):
        places = BlockIds(elsewhere, num_tokens=options.tokens)
        kvheap.load(batch, rank.cache, places, heads=rank.heads)
        for layer in range(options.layers):
            loaded = rank.at(layer, elsewhere)[:, : options.tokens]
            assert torch.equal(loaded, kv[layer][:, : options.tokens, rank.heads])
        first, last = rank.heads.start, rank.heads.stop - 1
        print(f"heads {first} to {last}: {options.tokens} tokens in {options.layers} layers match")
    heap.batched_free(batch)


if __name__ == "__main__":
    main()
