"""A prefix cache with eviction, under a stream of chat turns.

Every session begins with one of a few system prompts, and each turn appends tokens to it. A request
is cut into chunks of tokens, and the key of a chunk is a hash of its tokens and of the key before
it: equal keys mean equal prefixes. For each request, the script

1. looks up how many leading chunks are stored, and holds them while it reads them;
2. "computes" the others, here by a function of the key, so that every byte can be checked;
3. stores these in one batch, for which the store evicts where the heap is full.

It needs no GPU. With ``--device cuda`` the heap is in GPU memory.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Sequence

import torch

from kvheap import BlockLayout, MemoryFormat, PrefixStore, TensorMemoryAllocator
from kvheap.prefix import POLICIES, RequestTooLargeError

CHUNK_TOKENS = 16
LAYERS, HEADS, HEAD_DIM = 4, 2, 32


def chunk_keys(tokens: Sequence[int]) -> list[bytes]:
    """The key of each whole chunk: a hash of its tokens and of everything before them."""
    keys: list[bytes] = []
    before = b""
    for start in range(0, len(tokens) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        chunk = ",".join(map(str, tokens[start : start + CHUNK_TOKENS])).encode()
        before = hashlib.blake2b(before + chunk, digest_size=16).digest()
        keys.append(before)
    return keys


def computed(keys: Sequence[bytes], shape: Sequence[int]) -> torch.Tensor:
    """What a model would compute for these chunks; here numbers that follow from the key."""
    kv = torch.empty(len(keys), *shape, dtype=torch.float16)
    for row, key in zip(kv, keys, strict=True):
        row.copy_(torch.tensor(list(key)).repeat(row.numel() // len(key)).view(row.shape))
    return kv


def main() -> None:
    """Run the traffic, and print what became of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=400, help="room in the heap (default: 400)")
    parser.add_argument("--sessions", type=int, default=60, help="chat sessions (default: 60)")
    parser.add_argument("--turns", type=int, default=6, help="turns of each (default: 6)")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="lru", help="(default: lru)")
    parser.add_argument("--device", default="cpu", help="where the heap is (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic (default: 0)")
    options = parser.parse_args()
    rng = random.Random(options.seed)

    shape = (2, LAYERS, CHUNK_TOKENS, HEADS * HEAD_DIM)
    layout = BlockLayout.of(shape, torch.float16, MemoryFormat.KV_2LTD)
    size = options.chunks * layout.size_bytes
    heap = TensorMemoryAllocator(torch.empty(size, dtype=torch.uint8, device=options.device))
    store: PrefixStore[bytes] = PrefixStore(heap, layout, POLICIES[options.policy]())

    system_prompts = [[rng.randrange(1000) for _ in range(64)] for _ in range(3)]
    sessions = [list(rng.choice(system_prompts)) for _ in range(options.sessions)]
    hits = references = 0
    for _ in range(options.sessions * options.turns):
        tokens = rng.choice(sessions)
        tokens += [rng.randrange(1000) for _ in range(rng.randrange(20, 80))]
        keys = chunk_keys(tokens)

        known = store.prefix_length(keys)
        store.touch(keys[:known])
        with store.hold(keys[:known]) as hold:
            if known:  # an engine would load these; here they are compared
                stored = [chunk.tensor for chunk in hold.chunks if chunk.tensor is not None]
                assert torch.equal(torch.stack(stored).cpu(), computed(keys[:known], shape))
            missing = store.missing(keys[known:])
            try:
                store.store(missing, computed(missing, shape))
            except RequestTooLargeError as error:
                print(f"not stored: {error}")
        hits += known
        references += len(keys)

    stats = store.stats()
    print(f"{references:,} chunks were asked for, {hits / references:.1%} of them were stored")
    print(f"{stats.ready_chunks:,} chunks are in the heap, {stats.evicted_chunks:,} were evicted")
    store.close()
    assert heap.memcheck()
    assert heap.stats().allocated_bytes == 0


if __name__ == "__main__":
    main()
