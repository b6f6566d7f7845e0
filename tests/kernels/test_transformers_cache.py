"""Caches like those of transformers 5.24.0, and those that it cannot be told what they hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_paths import ON_ALL_PATHS, running

import kvheap
from kvheap import LayoutError, MemoryFormat, PagedKVCache, TensorMemoryAllocator

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
        pairs = [tuple(side.to(device) for side in pair()) for _ in range(2)]
        if is_view:  # as a model's projection leaves them
            pairs = [
                tuple(s.transpose(1, 2).contiguous().transpose(1, 2) for s in p) for p in pairs
            ]
        cache = PagedKVCache.of_transformers(FORMS[form](pairs), num_kv_heads=H, head_dim=D)
        assert (cache.num_layers, cache.num_blocks, cache.block_size) == (2, B, T)
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
    ],
    ids=str,
)
def test_other_objects_are_refused(cache: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PagedKVCache.of_transformers(cache)
