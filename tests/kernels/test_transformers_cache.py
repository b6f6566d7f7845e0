"""Caches like those of transformers 5.24.0, and those that it cannot be told what they hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_paths import ON_ALL_PATHS, running

import kvheap
from kvheap import BlockIds, LayoutError, MemoryFormat, PagedKVCache, TensorMemoryAllocator

B, H, T, D = 2, 3, 7, 8


class Layer:
    """``DynamicLayer`` of transformers: tensors ``[batch, heads, tokens, head dim]``."""

    def __init__(self, keys: Any, values: Any, num_tokens: int | None = None) -> None:
        self.keys, self.values = keys, values
        self._num_tokens = num_tokens

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self._num_tokens is None else self._num_tokens


def pair(*shape: int, v_dim: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(shape or (B, H, T, D)).half()
    return keys, torch.randn((*keys.shape[:3], v_dim)).half()


def as_layers(pairs: list[Any]) -> Any:
    return SimpleNamespace(layers=[Layer(*both) for both in pairs])


def as_lists(pairs: list[Any]) -> Any:
    return SimpleNamespace(key_cache=[k for k, _ in pairs], value_cache=[v for _, v in pairs])


FORMS = {"layers": as_layers, "lists": as_lists, "list of pairs": list, "pairs": tuple}


@ON_ALL_PATHS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_view", [False, True], ids=["contiguous", "a view of [B, T, H, D]"])
def test_tokens_go_through_a_heap(form: str, is_view: bool, path: str) -> None:
    with running(path) as device:
        pairs = [tuple(side.to(device) for side in pair()) for _ in range(3)]
        if is_view:  # as a model's projection leaves them
            pairs = [
                tuple(s.transpose(1, 2).contiguous().transpose(1, 2) for s in p) for p in pairs
            ]
        cache = PagedKVCache.of_transformers(FORMS[form](pairs), num_kv_heads=H, head_dim=D)
        assert (cache.num_layers, cache.num_blocks, cache.block_size) == (3, B, T)
        assert (cache.num_heads, cache.head_dim) == (H, D)
        heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8, device=device))
        slots = [T + 3, 0, 6, 13, 2]  # row b, token t: b * T + t
        batch = heap.batched_store(cache, slots, 4)
        for token, slot in enumerate(slots):
            row, t = divmod(slot, T)
            for layer, sides in enumerate(pairs):
                for plane, side in enumerate(sides):
                    found = batch[token // 4].tensor[plane, layer, token % 4]
                    assert torch.equal(found, side[row, :, t].reshape(-1))
        empty = [tuple(torch.zeros_like(side) for side in sides) for sides in pairs]
        kvheap.load(batch, PagedKVCache.of_transformers(FORMS[form](empty)), slots)
        is_token = torch.zeros(B, T, dtype=torch.bool)
        is_token.view(-1)[slots] = True
        for sides, loaded in zip(pairs, empty, strict=True):
            for side, found in zip(sides, loaded, strict=True):
                assert torch.equal(found, side * is_token[:, None, :, None].to(device))


def test_v_of_another_size() -> None:
    cache = PagedKVCache.of_transformers([pair(v_dim=5)], head_dim=D)
    assert [plane.row_bytes for plane in cache.planes] == [16, 10]
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    batch = heap.batched_store(cache, range(4), 4)
    assert (batch.fmt, batch.shape) == (MemoryFormat.KV_MLA_FMT, (1, 1, 4, H * 13))


def swapped(*shape: int) -> list[Any]:
    return [tuple(side.transpose(1, 2) for side in pair(*shape)) for _ in range(2)]


REFUSED: list[tuple[str, Any, dict[str, int], str]] = [
    (
        "heads and tokens swapped",
        swapped(),
        {"num_kv_heads": H},
        r"\[B, H, T, D\] with H = 7, not 3; heads and tokens are swapped: transpose\(1, 2\)",
    ),
    (
        "more heads than models have",
        [pair(1, 300, 4, 8)],
        {},
        "H = 300: heads and tokens are swapped",
    ),
    ("another number of heads", [pair()], {"num_kv_heads": 4}, "with H = 3, not 4$"),
    ("another head dim", [pair()], {"head_dim": 4}, "with D = 8, not 4"),
    ("V swapped", [(pair()[0], pair()[1].transpose(1, 2))], {}, "must have the same B, H and T"),
    ("one layer swapped", [pair(B, H, T, D), swapped()[0]], {}, "layer 1 has shape .*, layer 0"),
    (
        "heads that differ like tokens",
        [pair(B, T, H, D), pair(B, T + 1, H, D)],
        {},
        "heads and tokens are swapped",
    ),
    (
        "swapped in an object that counts",
        SimpleNamespace(layers=[Layer(*swapped()[0], num_tokens=T)]),
        {},
        "heads and tokens are swapped",
    ),
    (
        "a window of tokens",
        SimpleNamespace(layers=[Layer(*pair(), num_tokens=90)]),
        {},
        "counts 90 tokens.*it keeps a window",
    ),
    (
        "layers of another length",
        as_layers([pair(), pair(B, H, T - 1, D)]),
        {},
        "keep another number of tokens need a cache of their own",
    ),
    (
        "a layer without tokens",
        as_layers([pair(), (torch.tensor([]), torch.tensor([]))]),
        {},
        r"layer 1, K must be \[B, H, T, D\] with tokens, got shape \(0,\)",
    ),
    (
        "a layer that was never used",
        SimpleNamespace(layers=[Layer(None, None)]),
        {},
        "layer 0, a Layer, has no keys and values",
    ),
    (
        "a layer with another state",
        SimpleNamespace(layers=[SimpleNamespace(conv_states=1)]),
        {},
        "a SimpleNamespace, has no keys and values",
    ),
    ("no layers", as_layers([]), {}, "the cache has no layers"),
    (
        "tensors in place of pairs",
        [pair()[0]],
        {},
        r"layer 0 must be a pair \(K, V\), got a tensor",
    ),
    (
        "lists of unequal length",
        SimpleNamespace(key_cache=[pair()[0]], value_cache=[]),
        {},
        "1 layers of K, 0 of V",
    ),
    ("three dimensions", [(pair()[0][0], pair()[1][0])], {}, r"layer 0, K must be \[B, H, T, D\]"),
]


@pytest.mark.parametrize(
    ("cache", "known", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_does_not_fit_is_refused(cache: Any, known: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        PagedKVCache.of_transformers(cache, **known)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (torch.zeros(2, 3, 4, 5), "got a tensor of shape"),
        ("cache", "got 'cache'"),
        (7, "got int"),
        (SimpleNamespace(self_attention_cache=1), "is two caches: give its self_attention_cache"),
        ([(pair()[0], None)], "layer 0, V must be a tensor, got None"),
        (SimpleNamespace(layers=3), "layers of a cache must be a list, got 3"),
        (SimpleNamespace(layers=None), "layers of a cache must be a list, got None"),
        (SimpleNamespace(layers="ab"), "layers of a cache must be a list, got 'ab'"),
        (SimpleNamespace(layers={0: 1}), "layers of a cache must be a list, got {0: 1}"),
        (SimpleNamespace(key_cache=None, value_cache=None), "key_cache of a cache must be a list"),
        (SimpleNamespace(key_cache=[], value_cache=7), "value_cache of a cache must be a list"),
        (SimpleNamespace(key_cache=torch.ones(2), value_cache=[]), "key_cache of a cache must be"),
        (
            SimpleNamespace(layers=[SimpleNamespace(**vars(Layer(*pair())), get_seq_length=list)]),
            r"get_seq_length\(\) of layer 0, a SimpleNamespace must be an integer, got \[\]",
        ),
    ],
    ids=str,
)
def test_other_objects_are_refused(cache: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PagedKVCache.of_transformers(cache)


class TestTokensThatAreNotFilled:
    """A ``StaticCache`` has room for more tokens than it counts: those hold nothing yet."""

    @staticmethod
    def cache(*filled: Any) -> PagedKVCache:
        layers = [Layer(*pair(1, H, 9, D), num_tokens=count) for count in filled]
        return PagedKVCache.of_transformers(SimpleNamespace(layers=layers))

    @staticmethod
    def heap(**options: Any) -> TensorMemoryAllocator:
        return TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8), **options)

    @pytest.mark.parametrize("count", [3, torch.tensor(3)], ids=str)  # as StaticLayer counts
    def test_they_are_not_stored(self, count: Any) -> None:
        cache, heap = self.cache(count, count), self.heap()
        for slots, first in ((range(9), 3), ([0, -1, 4], 4), (BlockIds([0]), 3), ([8], 8)):
            with pytest.raises(
                ValueError, match=f"slot {first} is token {first} of row 0, .* had 3"
            ):
                heap.batched_store(cache, slots, 16)
        assert heap.stats().allocated_bytes == 0
        for slots in (range(3), [2, -1, 0], BlockIds([0], 3)):
            batch = heap.batched_store(cache, slots, 16)
            assert batch is not None
        heap.batched_load(batch, cache, [6, 7, 8])  # to the empty ones

    def test_rows_of_their_own(self) -> None:
        keys, values = pair(2, H, 9, D)
        layers = [Layer(keys, values, num_tokens=3)]
        cache = PagedKVCache.of_transformers(SimpleNamespace(layers=layers))
        assert self.heap().batched_store(cache, [2, 9, 11], 4) is not None
        with pytest.raises(ValueError, match="slot 12 is token 3 of row 1"):
            self.heap().batched_store(cache, [2, 9, 12], 4)
        with pytest.raises(ValueError, match="slot 3 is token 3 of row 0"):
            self.heap().batched_store(cache, BlockIds([0, 1], 12), 16)

    def test_layer_after_layer(self) -> None:
        """In the middle of a step, the first layers have a token more."""
        cache = self.cache(4, 3)
        assert self.heap().batched_store(cache, range(4), 4, layers=range(1)) is not None
        for layers in (None, range(1, 2)):
            with pytest.raises(ValueError, match="slot 3 is token 3"):
                self.heap().batched_store(cache, range(4), 4, layers=layers)

    def test_an_older_cache_counts_too(self) -> None:
        keys, values = pair(1, H, 9, D)
        old = SimpleNamespace(key_cache=[keys], value_cache=[values], get_seq_length=lambda: 5)
        cache = PagedKVCache.of_transformers(old)
        assert self.heap().batched_store(cache, range(5), 16) is not None
        with pytest.raises(ValueError, match="slot 5 is token 5"):
            self.heap().batched_store(cache, range(6), 16)
        old.get_seq_length = lambda: 10
        with pytest.raises(LayoutError, match="counts 10 tokens, but"):
            PagedKVCache.of_transformers(old)

    def test_nothing_is_known_of_pairs(self) -> None:
        cache = PagedKVCache.of_transformers([pair(1, H, 9, D)])
        assert cache.filled_tokens is None
        assert self.heap().batched_store(cache, range(9), 16) is not None


class TestTwoPairs:
    """Two lists of two tensors: K and V of two layers, or K of both layers and V of both."""

    def test_they_are_asked_for(self) -> None:
        pairs = [pair(), pair()]
        for nested in (pairs, tuple(pairs), [list(both) for both in pairs]):
            with pytest.raises(LayoutError, match=r"two pairs .* choose one by name"):
                PagedKVCache.of_transformers(nested, num_kv_heads=H, head_dim=D)
        assert PagedKVCache.of("kv-tuples-hnd", pairs).num_layers == 2
        assert PagedKVCache.of("sglang-mha-hnd", pairs).num_layers == 2
        for form in (as_layers, as_lists):
            assert PagedKVCache.of_transformers(form(pairs)).num_layers == 2

    def test_sizes_tell(self) -> None:
        assert PagedKVCache.of_transformers([pair(v_dim=5), pair(v_dim=5)]).num_layers == 2
        keys, values = ([both[side] for both in (pair(v_dim=5), pair(v_dim=5))] for side in (0, 1))
        with pytest.raises(LayoutError):  # K of both layers
            PagedKVCache.of_transformers([keys, values])
