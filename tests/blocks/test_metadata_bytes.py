"""Metadata as bytes: there and back, no larger than said, and refused whole if anything changed."""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap import (
    AddressBatch,
    BlockLayout,
    MemoryBatchMetadata,
    MemoryFormat,
    MemoryObjMetadata,
    TensorMemoryAllocator,
)
from kvheap.blocks import metadata_bytes
from kvheap.blocks.origin import Origin

PAGE = 4096
LAYOUT = BlockLayout.of([2, 4, 16, 8], torch.float16, MemoryFormat.KV_2LTD)
WORKER = TensorMemoryAllocator(torch.zeros(256 * PAGE, dtype=torch.uint8))


def runs_at(addresses: Any, block_bytes: int = PAGE) -> MemoryBatchMetadata:
    return MemoryBatchMetadata(AddressBatch.of_addresses(addresses, block_bytes), LAYOUT)


def rehashed(body: bytes) -> bytes:
    """A forger's bytes: with the hash of what they have become."""
    return body + hashlib.blake2b(body, digest_size=8).digest()


@st.composite
def metadata(draw: st.DrawFn) -> MemoryBatchMetadata:
    numbers = draw(st.lists(st.integers(0, 1 << 40), unique=True, max_size=30))
    if draw(st.booleans()):
        numbers = sorted(numbers)
    unit = draw(st.sampled_from([2048, 4096, 6144]))
    found = runs_at([number * unit for number in numbers], unit)
    count = len(numbers)
    if draw(st.booleans()):
        sets = st.one_of(st.none(), st.integers(0, (1 << 16) - 1))
        stored = draw(st.lists(sets, min_size=count, max_size=count))
        found = replace(found, stored=tuple(stored), form="rows")
    else:
        found = replace(found, num_tokens=draw(st.one_of(st.none(), st.integers(0, 1 << 60))))
    origin = st.one_of(st.none(), st.builds(Origin, *[st.integers(0, 9)] * 4))
    how = draw(st.sampled_from(["none", "one", "each"]))
    if how != "none":
        size = 1 if how == "one" else count
        origins = draw(st.lists(origin, min_size=size, max_size=size))
        found = replace(found, origins=tuple(origins) or None)
    return found


@settings(deadline=None)
@given(metadata())
def test_there_and_back(given_metadata: MemoryBatchMetadata) -> None:
    data = given_metadata.to_bytes()
    for form in (data, bytearray(data), memoryview(data)):
        found = MemoryBatchMetadata.from_bytes(form)
        assert found == given_metadata
        assert found.blocks.addresses.tolist() == given_metadata.blocks.addresses.tolist()
        assert found.to_bytes() == data
    assert MemoryBatchMetadata.from_dict(given_metadata.to_dict()) == found


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0],
        [(1 << 63) - 1],
        [0, (1 << 63) - 1, 0],
        [5, 5, 5],
        [0, 255, 510, 766],
        [-(1 << 63), (1 << 63) - 1, -(1 << 63)],
        [7, 7 - 256 * 3, 7 + 65535 * 3, 7],
        list(range(0, 1 << 20, 4096)),
    ],
)
def test_integers_there_and_back(values: list[int]) -> None:
    array = np.array(values, np.int64)
    other = np.ones(len(values), np.int64)
    data = metadata_bytes.packed("X", {"a": 1}, [array, other, array])
    found, arrays = metadata_bytes.unpacked("X", data)
    assert found == {"__type__": "X", "a": 1}
    assert [each.tolist() for each in arrays] == [values, other.tolist(), values]


def test_objects_there_and_back() -> None:
    heap = TensorMemoryAllocator(torch.zeros(64 * PAGE, dtype=torch.uint8))
    batch = heap.batched_allocate([[2, 1, 16, 8], [3]], [torch.float16, torch.float32], 3)
    assert batch is not None
    found = MemoryObjMetadata.from_bytes(batch[1].metadata.to_bytes())
    assert found == batch[1].metadata
    assert WORKER.view(found).addresses.tolist() == [batch[1].address]
    full = replace(found, stored=255, form="rows", origin=Origin(layer=3))
    assert MemoryObjMetadata.from_bytes(full.to_bytes()) == full


class TestSize:
    """Of 16,384 blocks: 216 KB as JSON, 65 KB as block numbers of 4 bytes."""

    COUNT = 16384

    def size(self, addresses: Any) -> int:
        return len(runs_at(addresses).to_bytes())

    def test_one_run_takes_a_few_bytes(self) -> None:
        assert self.size(np.arange(self.COUNT) * PAGE) < 300

    def test_lone_runs_one_after_another_take_a_byte_each(self) -> None:
        addresses = np.arange(self.COUNT) * 2 * PAGE
        assert runs_at(addresses).blocks.num_runs == self.COUNT
        assert self.size(addresses) < self.COUNT + 300
        as_json = len(json.dumps(runs_at(addresses).to_dict()))
        assert as_json > 12 * self.size(addresses)

    def test_lone_runs_anywhere_in_a_large_heap_take_two(self) -> None:
        rng = np.random.default_rng(1)
        numbers = np.sort(rng.choice(1 << 22, self.COUNT, replace=False))  # 16 GiB
        addresses = numbers[np.append(True, np.diff(numbers) > 1)] * PAGE
        assert self.size(addresses) < 2 * self.COUNT + 300

    def test_blocks_in_any_order_take_four_and_a_count(self) -> None:
        numbers = np.random.default_rng(1).permutation(self.COUNT)
        assert self.size(numbers * PAGE) < 4 * self.COUNT + self.COUNT + 300

    def test_stored_tokens_are_told_once_if_alike(self) -> None:
        stored = ((1 << 16) - 1,) * (self.COUNT - 1) + (7,)
        found = replace(runs_at(np.arange(self.COUNT) * PAGE), stored=stored)
        assert len(found.to_bytes()) < self.COUNT + 400


def samples() -> dict[str, Any]:
    lone = runs_at(np.arange(0, 60, 3) * PAGE)
    return {
        "batch": lone,
        "an order": runs_at([5 * PAGE, 0, 2 * PAGE, PAGE]),
        "tokens": replace(
            lone,
            stored=tuple(row % 3 for row in range(20)),
            form="rows",
            origins=tuple(Origin(layer=row % 2) for row in range(20)),
        ),
        "empty": runs_at([]),
        "object": MemoryObjMetadata(
            *(LAYOUT.shapes[0], LAYOUT.dtypes[0], 8 * PAGE, PAGE, 1),
            shapes=list(LAYOUT.shapes),
            dtypes=list(LAYOUT.dtypes),
        ),
    }


SAMPLES = samples()


@pytest.mark.parametrize("name", SAMPLES)
class TestDamage:
    def test_every_changed_byte_is_found(self, name: str) -> None:
        whole, kind = SAMPLES[name].to_bytes(), type(SAMPLES[name])
        for at in range(len(whole)):
            for flip in (1, 0x80):
                damaged = bytearray(whole)
                damaged[at] ^= flip
                with pytest.raises(ValueError, match=r"damaged|begin with|of version"):
                    kind.from_bytes(damaged)

    def test_every_cut_and_every_addition_is_found(self, name: str) -> None:
        whole, kind = SAMPLES[name].to_bytes(), type(SAMPLES[name])
        for at in range(len(whole)):
            for damaged in (whole[:at], whole[at + 1 :], whole[:at] + b"\0" + whole[at:]):
                if damaged != whole:
                    with pytest.raises(ValueError, match=r"damaged|begin with|of version"):
                        kind.from_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            kind.from_bytes(whole + whole)

    def test_forged_bytes_are_refused_or_are_blocks(self, name: str) -> None:
        """Whoever makes the hash anew can say wrong things, but nothing that does harm."""
        whole, kind = SAMPLES[name].to_bytes()[:-8], type(SAMPLES[name])
        rng = random.Random(name)
        tracemalloc.start()
        try:
            for number in range(2000):
                body = bytearray(whole)
                for _ in range(rng.choice([1, 1, 2, 5])):
                    body[rng.randrange(5, len(body))] = rng.choice([0, 1, 2, 4, 8, 34, 127, 255])
                if not number % 3:
                    at = rng.randrange(len(body))
                    del body[at : at + rng.choice([1, 8])]
                try:
                    found = kind.from_bytes(rehashed(bytes(body)))
                    view = WORKER.view(found)
                except ValueError:
                    continue
                assert all(0 <= at <= 255 * PAGE for at in view.addresses.tolist())
                assert len(view) <= 256
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


class TestForgery:
    @pytest.mark.parametrize(
        ("length", "width"), [(1 << 40, 0), (1 << 40, 1), (1 << 62, 8), (3, 3), (1 << 63, 0)]
    )
    def test_lengths_that_nothing_follows(self, length: int, width: int) -> None:
        data = metadata_bytes.packed("MemoryBatchMetadata", {}, [np.zeros(1, np.int64)])
        head = metadata_bytes.ARRAY.pack(length, 0, 1, 1, width)
        body = data[: -8 - metadata_bytes.ARRAY.size] + head + b"\1\1"
        with pytest.raises(ValueError, match="an array of a MemoryBatchMetadata has"):
            MemoryBatchMetadata.from_bytes(rehashed(body))

    def test_runs_that_wrap_around_are_no_runs(self) -> None:
        values = {**runs_at([0]).to_dict()}
        for starts in ([0, -PAGE], [(1 << 63) - PAGE, (1 << 63) - 1]):
            arrays = [np.array(starts, np.int64), np.ones(2, np.int64)]
            data = metadata_bytes.packed("MemoryBatchMetadata", values, arrays)
            with pytest.raises(ValueError, match=r"not what it writes: .*(run_starts|2\*\*63)"):
                MemoryBatchMetadata.from_bytes(data)

    @pytest.mark.parametrize(
        "change",
        [
            {"fmt": 99},
            {"shapes": []},
            {"dtypes": ["torch.qint8"]},
            {"dtypes": ["os.system"]},
            {"block_bytes": 1},
            {"block_bytes": True},
            {"num_tokens": -1},
            {"__type__": "MemoryObjMetadata"},
            {"stored": ["1"]},
            {"origins": [[0, 0, 0, 0, 0]]},
            {"form": 7},
        ],
    )
    def test_values_that_are_wrong(self, change: dict[str, Any]) -> None:
        values = {**runs_at([0]).to_dict(), **change}
        arrays = [np.zeros(1, np.int64), np.ones(1, np.int64)]
        data = metadata_bytes.packed("MemoryBatchMetadata", values, arrays)
        with pytest.raises(ValueError, match="the bytes of a MemoryBatchMetadata are not what"):
            MemoryBatchMetadata.from_bytes(data)

    @pytest.mark.parametrize("arrays", [0, 1, 3, 5])
    def test_more_or_fewer_arrays(self, arrays: int) -> None:
        values = runs_at([0]).to_dict()
        data = metadata_bytes.packed("MemoryBatchMetadata", values, [np.ones(1, np.int64)] * arrays)
        with pytest.raises(ValueError, match="are not what it writes"):
            MemoryBatchMetadata.from_bytes(data)

    def test_values_that_are_no_json(self) -> None:
        for text in (b"[" * 100_000, b"\xff", b"[1]", b"7", b"{"):
            head = metadata_bytes.HEAD.pack(b"KVHM", 1, 0, len(text))
            with pytest.raises(ValueError, match="the values of a MemoryObjMetadata"):
                MemoryObjMetadata.from_bytes(rehashed(head + text))

    def test_another_version_is_named(self) -> None:
        data = bytearray(runs_at([0]).to_bytes())
        data[4] = 2
        with pytest.raises(ValueError, match="are of version 2, but this kvheap reads version 1"):
            MemoryBatchMetadata.from_bytes(rehashed(bytes(data[:-8])))

    @pytest.mark.parametrize("data", ["KVHM", None, 7, [1], {}, np.zeros(4)])
    def test_what_are_no_bytes(self, data: Any) -> None:
        for kind in (MemoryBatchMetadata, MemoryObjMetadata):
            with pytest.raises(TypeError, match="must be bytes, got"):
                kind.from_bytes(data)
