"""A prefix store behind a model of Hugging Face: only new tokens are computed.

The model is a tiny Llama with random weights, so that nothing is downloaded. A first pass over a
prompt computes everything, and its KV goes to a ``PrefixStore``. Other prompts that begin with the
same tokens load that KV into a new cache and compute only the rest. Their logits are compared with
those of a pass that computes everything: they must be identical up to the order of floating-point
sums, and the next token must be the same.

Needs transformers (``pip install transformers``).
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
from collections.abc import Sequence

import torch

try:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
except ModuleNotFoundError as error:
    if error.name != "transformers" or __name__ != "__main__":
        raise
    raise SystemExit(
        f"{__doc__}\nThis Python has no transformers: pip install transformers"
    ) from None

import kvheap
from kvheap import BlockLayout, MemoryFormat, PagedKVCache, PrefixStore, TensorMemoryAllocator

CHUNK_TOKENS = 16
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
)
CACHE = "cache"
if CACHE not in inspect.signature(LlamaForCausalLM.forward).parameters:
    CACHE = "past_key_values"  # its name in older versions of transformers
HEAD_DIM = CONFIG.hidden_size // CONFIG.num_attention_heads


def chunk_keys(tokens: Sequence[int]) -> list[bytes]:
    """The key of each whole chunk: a hash of its tokens and of everything before them."""
    keys: list[bytes] = []
    before = b""
    for start in range(0, len(tokens) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        chunk = ",".join(map(str, tokens[start : start + CHUNK_TOKENS])).encode()
        before = hashlib.blake2b(before + chunk, digest_size=16).digest()
        keys.append(before)
    return keys


class Model:
    """A model with a prefix store.

    Attributes:
        store: chunks of KV by the hash of their prefix.
        computed_tokens: tokens that the model has run over, so far.
    """

    def __init__(self, seed: int, heap_bytes: int) -> None:
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(CONFIG).eval()
        width = CONFIG.num_key_value_heads * HEAD_DIM
        shape = (2, CONFIG.num_hidden_layers, CHUNK_TOKENS, width)
        heap = TensorMemoryAllocator(torch.empty(heap_bytes, dtype=torch.uint8))
        layout = BlockLayout.of(shape, self.model.dtype, MemoryFormat.KV_2LTD)
        self.store: PrefixStore[bytes] = PrefixStore(heap, layout)
        self.computed_tokens = 0

    @torch.no_grad()
    def run(self, tokens: list[int]) -> torch.Tensor:
        """The logits of the last token; what is stored of the prompt is not computed."""
        keys = chunk_keys(tokens)
        known = self.store.prefix_length(keys)
        # At least one token is computed: its logits are wanted.
        known = min(known, (len(tokens) - 1) // CHUNK_TOKENS)
        past = self._loaded(keys[:known])
        rest = torch.tensor([tokens[known * CHUNK_TOKENS :]])
        self.computed_tokens += rest.numel()
        logits = self.model(rest, **{CACHE: past}).logits  # the model extends the cache
        self._keep(keys, past)
        return logits[0, -1]

    def _loaded(self, keys: list[bytes]) -> DynamicCache:
        """A cache with the KV of stored chunks."""
        if not keys:
            return DynamicCache(config=CONFIG)
        num_tokens = len(keys) * CHUNK_TOKENS
        shape = (1, CONFIG.num_key_value_heads, num_tokens, HEAD_DIM)
        pairs = [
            (torch.empty(shape, dtype=self.model.dtype), torch.empty(shape, dtype=self.model.dtype))
            for _ in range(CONFIG.num_hidden_layers)
        ]
        with self.store.hold(keys) as hold:
            into = PagedKVCache.of_transformers(pairs)
            kvheap.load(hold.chunks, into, torch.arange(num_tokens)).result()
        return DynamicCache(pairs, config=CONFIG)

    def _keep(self, keys: list[bytes], cache: DynamicCache) -> None:
        """Store the chunks that are not stored yet; of a prefix, these are the last ones."""
        missing = self.store.missing(keys)
        if missing:
            first = (len(keys) - len(missing)) * CHUNK_TOKENS
            slots = torch.arange(first, len(keys) * CHUNK_TOKENS)
            self.store.store_from_engine(missing, PagedKVCache.of_transformers(cache), slots)


def main() -> None:
    """Compare runs with the store to runs without it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=4, help="(default: 4)")
    parser.add_argument("--shared", type=int, default=96, help="common tokens (default: 96)")
    parser.add_argument("--own", type=int, default=24, help="tokens of each (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    options = parser.parse_args()

    with_store = Model(options.seed, heap_bytes=32 << 20)
    shared = torch.randint(0, CONFIG.vocab_size, (options.shared,)).tolist()
    total = 0
    for number in range(options.prompts):
        tokens = shared + torch.randint(0, CONFIG.vocab_size, (options.own,)).tolist()
        total += len(tokens)
        logits = with_store.run(tokens)
        with torch.no_grad():
            expected = with_store.model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert logits.argmax() == expected.argmax()
        error = (logits - expected).abs().max().item()
        print(f"prompt {number}: the same next token; logits differ by {error:.1e} at most")
    print(f"{with_store.computed_tokens} of {total} tokens were computed")
    assert options.prompts < 2 or with_store.computed_tokens < total
    with_store.store.close()


if __name__ == "__main__":
    main()
