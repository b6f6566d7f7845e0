"""Keys that are none: a text, a tensor, a set where the order counts, something unhashable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvheap import BlockLayout, MemoryFormat, PrefixIndex, PrefixStore, TensorMemoryAllocator

LAYOUT = BlockLayout.of([2, 1, 512, 2], torch.float16, MemoryFormat.KV_2LTD)
SOURCE = torch.ones(2, *LAYOUT.shapes[0], dtype=torch.float16)


def index() -> PrefixIndex[Any, int]:
    """An index in which a text's letters, a bytes' numbers, and a list's texts are ready."""
    made: PrefixIndex[Any, int] = PrefixIndex()
    made.begin(["a", "b", 97, 98], [1, 2, 3, 4], 10).complete()
    return made


def store() -> PrefixStore[Any]:
    heap = TensorMemoryAllocator(torch.zeros(8 * 4096, dtype=torch.uint8), on_full=None)
    made: PrefixStore[Any] = PrefixStore(heap, LAYOUT)
    made.store(["a", "b"], SOURCE)
    made.store([97, 98], SOURCE)
    return made


def own(made: Any, name: str) -> Any:
    """A hold or a store of a new one's, to end it."""
    if name == "hold":
        return made.hold(["a", "b", 97, 98])
    made.remove(["a", "b", 97, 98])
    return made.begin(["a", "b", 97, 98], [1, 2, 3, 4], 10)


TAKES_KEYS: dict[str, Callable[[Any], Any]] = {
    **{
        f"PrefixIndex.{name}": lambda keys, name=name: getattr(index(), name)(keys)
        for name in ("prefix_length", "values", "missing", "touch", "hold", "remove")
    },
    "PrefixIndex.evict": lambda keys: index().evict(10, protected=keys),
    "PrefixIndex.begin": lambda keys: PrefixIndex().begin(keys, [1, 2], 10),
    "Hold.release": lambda keys: own(index(), "hold").release(keys),
    "PendingStore.complete": lambda keys: own(index(), "begin").complete(keys),
    "PendingStore.abort": lambda keys: own(index(), "begin").abort(keys),
    **{
        f"PrefixStore.{name}": lambda keys, name=name: getattr(store(), name)(keys)
        for name in ("prefix_length", "chunks", "addresses", "missing", "touch", "hold", "remove")
    },
    "PrefixStore.store": lambda keys: PrefixStore(store().heap, LAYOUT).store(keys, SOURCE),
    "PrefixStore.begin": lambda keys: PrefixStore(store().heap, LAYOUT).begin(keys),
    "ChunkHold.release": lambda keys: own(store(), "hold").release(keys),
}
STORES = ("PrefixIndex.begin", "PrefixStore.store", "PrefixStore.begin")


@pytest.mark.parametrize("name", TAKES_KEYS)
@pytest.mark.parametrize(
    "text", ["ab", b"ab", bytearray(b"ab"), memoryview(b"ab")], ids=lambda text: type(text).__name__
)
def test_a_text_is_one_key_and_not_many(name: str, text: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a list or another iterable of keys, got .*\["):
        TAKES_KEYS[name](text)
    if not isinstance(text, bytearray):
        TAKES_KEYS[name](["a", "b"])


@pytest.mark.parametrize("name", TAKES_KEYS)
@pytest.mark.parametrize("wrong", [3, torch.tensor([1, 2]), torch.zeros(()), object()])
def test_what_is_no_collection_of_keys(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match="must be a list or another iterable of keys, got"):
        TAKES_KEYS[name](wrong)


@pytest.mark.parametrize("name", TAKES_KEYS)
def test_an_unhashable_key_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=r"\['a', 'b'\] in (keys|protected) is unhashable"):
        TAKES_KEYS[name]([["a", "b"], "c"])


@pytest.mark.parametrize("look", ["state", "__contains__"])
@pytest.mark.parametrize("make", [index, store])
def test_one_unhashable_key_is_named(make: Any, look: str) -> None:
    with pytest.raises(TypeError, match=r"\['a'\] in key is unhashable"):
        getattr(make(), look)(["a"])


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("wrong", [{1, 2}, frozenset({1, 2}), iter([1, 2]), [*torch.arange(2)]])
def test_chunks_are_stored_under_keys_in_order(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match="keys must"):
        TAKES_KEYS[name](wrong)


@pytest.mark.parametrize("keys", [("a", "b"), {"a": 1, "b": 2}.keys(), np.array([3, 4]), range(2)])
def test_other_sequences_of_keys(keys: Any) -> None:
    for name in STORES:
        TAKES_KEYS[name](keys)
    assert index().prefix_length(iter(["a", "b", "z"])) == 2
    assert sorted(index().remove({"a", "b"})) == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("wrong", ["xy", b"xy", {1, 2}, 3, None, iter([1, 2])])
@pytest.mark.parametrize("argument", ["values", "size_bytes"])
def test_values_and_sizes_are_lists(argument: str, wrong: Any) -> None:
    if argument == "size_bytes" and wrong == 3:
        return
    arguments = {"values": [1, 2], "size_bytes": [10, 10], argument: wrong}
    with pytest.raises(TypeError, match=argument):
        PrefixIndex().begin(["a", "b"], **arguments)


def test_a_store_without_contents_is_refused() -> None:
    made = store()
    with pytest.raises(TypeError, match=r"source must be a torch.Tensor, got None"):
        made.store(["c", "d"], None)  # type: ignore[arg-type]
    assert made.missing(["c", "d"]) == ["c", "d"]
    assert made.stats().ready_chunks == 4
