"""Metadata dicts that were damaged on the way: refused whole, or blocks that could be there."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap import (
    MemoryBatch,
    MemoryBatchMetadata,
    MemoryFormat,
    MemoryObjMetadata,
    TensorMemoryAllocator,
)

PAGE = 4096
HEAP = 64 * PAGE
WHOLE = torch.zeros(HEAP + 16 * PAGE, dtype=torch.uint8)
WORKER = TensorMemoryAllocator(WHOLE[:HEAP])


def fragmented() -> tuple[MemoryBatchMetadata, MemoryObjMetadata]:
    """A batch of two groups in several runs, and its first object."""
    heap = TensorMemoryAllocator(torch.zeros(HEAP, dtype=torch.uint8))
    taken = heap.batched_allocate([PAGE], torch.uint8, 20)
    assert taken is not None
    heap.batched_free([taken[row] for row in (0, 1, 5, 6, 7, 12)])
    shapes, dtypes = [[2, 1, 16, 8], [3]], [torch.float16, torch.float32]
    batch = heap.batched_allocate(shapes, dtypes, 48, MemoryFormat.KV_2LTD)
    assert batch is not None
    assert batch.num_runs > 2
    return batch.metadata, batch[0].metadata


BATCH, OBJECT = fragmented()
BATCH_DICT = BATCH.to_dict()
OBJECT_DICT = OBJECT.to_dict()


def test_there_and_back() -> None:
    read = MemoryBatchMetadata.from_dict(json.loads(json.dumps(BATCH_DICT)))
    assert read == BATCH
    assert WORKER.view(read).addresses.tolist() == BATCH.blocks.addresses.tolist()
    one = MemoryObjMetadata.from_dict(json.loads(json.dumps(OBJECT_DICT)))
    assert one == OBJECT
    assert WORKER.view(one).layout == BATCH.layout


def test_the_order_of_a_prefix_survives() -> None:
    addresses = BATCH.blocks.addresses[::-1].tolist()
    layout = BATCH.layout
    view = WORKER.view(addresses, list(layout.shapes), list(layout.dtypes), layout.fmt)
    values = json.loads(json.dumps(view.metadata.to_dict()))
    assert values["ascending"] is False
    assert WORKER.view(MemoryBatchMetadata.from_dict(values)).addresses.tolist() == addresses
    del values["ascending"]
    with pytest.raises(ValueError, match="run_starts must ascend"):
        MemoryBatchMetadata.from_dict(values)


@pytest.mark.parametrize("key", BATCH_DICT)
def test_a_missing_key_is_named(key: str) -> None:
    values = {name: value for name, value in BATCH_DICT.items() if name != key}
    if key in ("__type__", "ascending", "num_tokens"):
        assert MemoryBatchMetadata.from_dict(values) == BATCH
        return
    with pytest.raises(KeyError, match=f"{key} is missing"):
        MemoryBatchMetadata.from_dict(values)


ONE_RUN = {**BATCH_DICT, "run_starts": [0], "run_counts": [4]}
WRONG: list[dict[str, Any]] = [
    {"run_starts": []},
    {"run_counts": []},
    {"run_starts": [0], "run_counts": [4, 4]},
    {"run_starts": [0, PAGE], "run_counts": [1]},
    {"block_bytes": 0},
    {"block_bytes": -PAGE},
    {"block_bytes": 64},
    {"block_bytes": float(PAGE)},
    {"block_bytes": str(PAGE)},
    {"block_bytes": True},
    {"block_bytes": 1 << 64},
    {"run_starts": [1]},
    {"run_starts": [-PAGE]},
    {"run_starts": [HEAP]},
    {"run_starts": [0.9]},
    {"run_starts": ["0"]},
    {"run_starts": [None]},
    {"run_starts": [[0]]},
    {"run_starts": [False]},
    {"run_starts": [1 << 63]},
    {"run_starts": [(1 << 63) - 1]},
    {"run_starts": "0"},
    {"run_starts": {"0": 0}},
    {"run_starts": None},
    {"run_counts": [0]},
    {"run_counts": [-1]},
    {"run_counts": [1 << 62]},
    {"run_counts": [65]},
    {"run_counts": [1 << 40]},
    {"run_counts": [1.5]},
    {"run_starts": [0, 0], "run_counts": [4, 4]},
    {"run_starts": [0, PAGE], "run_counts": [2, 2]},
    {"run_starts": [16 * PAGE, 0], "run_counts": [4, 4]},
    {"shapes": []},
    {"shapes": [[2, 1, 16, 8]]},
    {"shapes": [[2, 1, 16, 0], [3]]},
    {"shapes": [[2, 1, 16, -8], [3]]},
    {"shapes": [[2, 1, 16, 8.0], [3]]},
    {"shapes": [["2", 1, 16, 8], [3]]},
    {"shapes": [2, 1, 16, 8]},
    {"shapes": [[2, 1, 16, 1 << 20], [3]]},
    {"shapes": [[1 << 62, 1 << 62], [3]]},
    {"shapes": "[]"},
    {"dtypes": []},
    {"dtypes": ["torch.float16"]},
    {"dtypes": ["torch.float16", "torch.quint8"]},
    {"dtypes": ["torch.float16", "torch.Tensor"]},
    {"dtypes": ["torch.float16", "__class__"]},
    {"dtypes": ["torch.float16", 1]},
    {"dtypes": "torch.float16"},
    {"fmt": 77},
    {"fmt": 1.0},
    {"fmt": True},
    {"fmt": "KV_2LTD"},
    {"fmt": None},
    {"ascending": 1},
    {"num_tokens": -1},
    {"num_tokens": 4.0},
    {"num_tokens": []},
    {"num_tokens": ()},
    {"form": 7},
    {"form": []},
    {"__type__": "MemoryObjMetadata"},
]


@pytest.mark.parametrize("change", WRONG, ids=[str(change)[:60] for change in WRONG])
def test_a_damaged_dict_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        WORKER.view(MemoryBatchMetadata.from_dict({**ONE_RUN, **change}))


@pytest.mark.parametrize("values", [None, 7, "{}", [], [("run_starts", [0])]])
def test_what_is_no_dict_is_refused(values: Any) -> None:
    for kind in (MemoryBatchMetadata, MemoryObjMetadata):
        with pytest.raises(ValueError, match="must be a dict"):
            kind.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"address": -PAGE},
        {"address": 1},
        {"address": HEAP},
        {"address": 0.5},
        {"address": "0"},
        {"phy_size": 0},
        {"phy_size": 64},
        {"phy_size": HEAP + PAGE},
        {"dtype": "torch.nothing"},
        {"dtype": 1},
        {"shape": [2, None]},
        {"shapes": [[4096]], "dtypes": ["torch.float32"]},
        {"shapes": [[2], [3]], "dtypes": ["torch.float32"]},
        {"fmt": 1.0},
        {"ref_count": "1"},
        {"ref_count": 0},
        {"ref_count": -1},
        {"ref_count": True},
        {"pin_count": None},
        {"pin_count": -1},
        {"shape": [1]},
        {"shape": [3]},
        {"shape": []},
        {"dtype": "torch.float32"},
        {"dtype": None},
        {"shapes": None},
        {"dtypes": None},
        {"shapes": None, "dtypes": None},
        {"shapes": [], "dtypes": []},
        {"shapes": (), "dtypes": ()},
        {"shapes": [[2, 1, 16, 8]], "dtypes": None},
        {"shapes": [[3], [2, 1, 16, 8]]},
        {"dtypes": ["torch.float32", "torch.float16"]},
        {"form": []},
        {"__type__": "MemoryBatchMetadata"},
    ],
)
def test_a_damaged_dict_of_an_object_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        WORKER.view(MemoryObjMetadata.from_dict({**OBJECT_DICT, **change}))
    if "address" not in change and change.get("phy_size") != HEAP + PAGE:  # what depends on a heap
        with pytest.raises(ValueError, match=r"\S"):
            MemoryObjMetadata.from_dict({**OBJECT_DICT, **change})


SHAPES = [torch.Size([2, 1, 16, 8]), torch.Size([3])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shape": torch.Size([1])},
            r"shape is torch.Size\(\[1\]\), but shapes\[0\] is .*2, 1, 16",
        ),
        ({"shape": None}, r"shape is None, but shapes\[0\] is"),
        ({"dtype": torch.float32}, r"dtype is torch.float32, but dtypes\[0\] is torch.float16"),
        ({"dtype": "torch.float16"}, r"dtype is 'torch.float16', but dtypes\[0\]"),
        ({"shapes": None, "dtypes": None}, r"all groups .* but shapes None and dtypes None"),
        ({"shapes": None}, "all groups .* but shapes None"),
        ({"shapes": SHAPES[:1]}, "shapes and dtypes differ in length"),
        ({"shapes": SHAPES[:1], "dtypes": [torch.float32]}, r"dtype is torch.float16, but dtypes"),
        ({"ref_count": 0, "address": 4096}, "ref_count is 0: the block at address 4096 is freed"),
        ({"ref_count": -2}, "ref_count is -2"),
        ({"ref_count": True}, "ref_count must be an integer, got True"),
        ({"pin_count": -1}, "pin_count must be non-negative, got -1"),
        ({"phy_size": 64}, "too small: phy_size is 64, but .* has 524 bytes"),
        ({"phy_size": None}, "phy_size must be an integer, got None"),
        ({"fmt": 1}, "fmt must be a MemoryFormat, got 1"),
        ({"form": 7}, "form must be a text or None, got 7"),
    ],
)
def test_metadata_of_an_object_that_contradicts_itself(
    change: dict[str, Any], message: str
) -> None:
    for blocks in (replace(OBJECT, **change), [replace(OBJECT, **change)]):
        with pytest.raises((ValueError, TypeError), match=message):
            WORKER.view(blocks)


def test_the_groups_of_scales_cannot_get_lost() -> None:
    """What a block holds beside its first group fits into the bytes that alignment adds."""
    data, scales = [2, 3, 8, 24], [2, 3, 8]
    dtypes = [torch.float8_e4m3fn, torch.float32]
    batch = WORKER.batched_allocate([data, scales], dtypes, 1, MemoryFormat.KV_2LTD)
    assert batch is not None
    try:
        metadata = batch[0].metadata
        assert WORKER.view(metadata).layout == batch.layout
        values = {**metadata.to_dict(), "shapes": None, "dtypes": None}
        with pytest.raises(ValueError, match="all groups"):
            MemoryObjMetadata.from_dict(values)
        with pytest.raises(ValueError, match="all groups"):
            WORKER.view(replace(metadata, shapes=None, dtypes=None))
    finally:
        WORKER.batched_free(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": None}, "layout must be a BlockLayout, got None"),
        ({"blocks": [0]}, r"blocks must be an AddressBatch, got \[0\]"),
        ({"stored": "11"}, "stored must be a list of sets of tokens or None, got '11'"),
        ({"form": 7}, "form must be a text or None, got 7"),
        ({"num_tokens": 8, "stored": (1, None)}, r"num_tokens is 8, but stored .*\(1, None\)"),
    ],
)
def test_metadata_of_a_batch_that_contradicts_itself(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        WORKER.view(replace(BATCH, **change))


def test_tokens_are_said_once() -> None:
    heap = TensorMemoryAllocator(torch.zeros(HEAP, dtype=torch.uint8))
    batch = heap.batched_allocate([2, 1, 16, 8], torch.float16, 2, MemoryFormat.KV_2LTD)
    assert batch is not None
    values = {**batch.metadata.to_dict(), "num_tokens": 20}
    assert MemoryBatchMetadata.from_dict(values).num_tokens == 20
    with pytest.raises(ValueError, match="num_tokens is 20, but stored says"):
        MemoryBatchMetadata.from_dict({**values, "stored": ["ff", "1"]})


def test_blocks_in_different_units_make_no_view() -> None:
    known, other = replace(OBJECT, form="blocks"), replace(OBJECT, form="rows", address=8 * PAGE)
    with pytest.raises(ValueError, match="block 1 was stored as rows, one before it as blocks"):
        WORKER.view([known, other])
    view = WORKER.view([known, replace(other, form=None)])
    assert view.metadata.form == "blocks"


@pytest.mark.parametrize("change", [{"shapes": [[8]]}, {"dtypes": ["uint8"]}, {"ref_count": 0}])
def test_plain_bytes(change: dict[str, Any]) -> None:
    bytes_of = MemoryObjMetadata(torch.Size([8]), None, 0, 8, 1, fmt=MemoryFormat.BINARY_BUFFER)
    values = bytes_of.to_dict()
    assert MemoryObjMetadata.from_dict(values) == bytes_of
    with pytest.raises(ValueError, match=r"dtype is None, as of plain bytes|ref_count is 0"):
        MemoryObjMetadata.from_dict({**values, **change})
    with pytest.raises(ValueError, match="plain bytes are in no heap"):
        WORKER.view(bytes_of)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 65), 1 << 65)
    | st.integers(-PAGE, 70 * PAGE)
    | st.sampled_from([0, 1, 512, PAGE, 63 * PAGE, HEAP, (1 << 63) - 1, 1 << 62])
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from(["torch.float32", "torch.uint8", "torch.qint8", "float64", "KV_2LTD"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def places_in(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of every value in nested dicts and lists."""
    found = []
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places_in(value, (*path, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """A dict with up to four values replaced, removed, repeated, swapped or a little off."""
    values: dict[str, Any] = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(places_in(values)))
        holder: Any = values
        for step in path[:-1]:
            holder = holder[step]
        how = draw(st.sampled_from(["replace", "nudge", "remove", "repeat", "swap", "reorder"]))
        old = holder[path[-1]]
        if how == "nudge" and type(old) is int:
            holder[path[-1]] = old + draw(st.sampled_from([-PAGE, -1, 1, 512, PAGE, 1 << 40]))
        elif how == "remove":
            del holder[path[-1]]
        elif how == "repeat" and isinstance(holder, list):
            holder.insert(path[-1], old)
        elif how == "reorder" and isinstance(old, list):
            holder[path[-1]] = draw(st.permutations(old))
        elif how == "swap":
            other = draw(st.sampled_from(sorted(values)))
            values[other], holder[path[-1]] = old, values[other]
        else:
            holder[path[-1]] = draw(JSON_VALUES)
        if not values:
            break
    return values


def require_blocks_of_the_heap(view: MemoryBatch) -> None:
    """What a view may be: disjoint aligned blocks of the heap, large enough for their contents."""
    taken = np.zeros(HEAP // PAGE, np.int64)
    for obj in view:
        assert obj.address % PAGE == 0
        assert obj.allocated_bytes % PAGE == 0
        assert obj.allocated_bytes >= obj.size_bytes
        assert 0 <= obj.address <= HEAP - obj.allocated_bytes
        taken[obj.address // PAGE : (obj.address + obj.allocated_bytes) // PAGE] += 1
        for group in range(len(obj.shapes)):
            tensor = obj.get_tensor(group)
            assert tensor is not None
            assert tensor.shape == obj.shapes[group]
            assert WHOLE.data_ptr() <= tensor.data_ptr()
            assert tensor.data_ptr() + tensor.nbytes <= WHOLE.data_ptr() + HEAP
    assert taken.max(initial=0) <= 1


@settings(deadline=None, max_examples=400)
@given(damaged(BATCH_DICT))
def test_random_damage_of_a_batch(values: dict[str, Any]) -> None:
    try:
        metadata = MemoryBatchMetadata.from_dict(values)
        view = WORKER.view(metadata)
    except (ValueError, KeyError):
        return
    require_blocks_of_the_heap(view)
    assert metadata.to_dict().keys() == BATCH_DICT.keys()
    assert MemoryBatchMetadata.from_dict(metadata.to_dict()) == metadata


@settings(deadline=None, max_examples=200)
@given(damaged(OBJECT_DICT))
def test_random_damage_of_an_object(values: dict[str, Any]) -> None:
    try:
        view = WORKER.view(MemoryObjMetadata.from_dict(values))
    except (ValueError, KeyError):
        return
    require_blocks_of_the_heap(view)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=64), st.integers(0, 600), st.booleans())
def test_random_damage_of_the_text(garbage: bytes, at: int, insert: bool) -> None:
    text = json.dumps(BATCH_DICT).encode()
    damaged_text = text[:at] + garbage + text[at if insert else at + len(garbage) :]
    try:
        values = json.loads(damaged_text)
    except ValueError:
        return
    try:
        view = WORKER.view(MemoryBatchMetadata.from_dict(values))
    except (ValueError, KeyError):
        return
    require_blocks_of_the_heap(view)
