"""Views of blocks that another process allocated: what fits, in which order, and what is refused.

Memory behind each heap is poisoned, and must stay so.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap import (
    AddressBatch,
    AddressManager,
    BlockIds,
    CopyPlan,
    MemoryBatchMetadata,
    MemoryFormat,
    PagedKVCache,
    PagedTensorMemoryAllocator,
    TensorMemoryAllocator,
    load,
    offload,
    store,
)
from kvheap.transfer import copy

PAGE = 4096
SHAPE = [2, 2, 64, 64]  # 32 KiB of float16: 8 units of the alignment
BLOCK = 8 * PAGE
HEAP = 64 * BLOCK


@contextmanager
def guarded_heap(num_bytes: int = HEAP, **options: Any) -> Iterator[TensorMemoryAllocator]:
    whole = torch.full((num_bytes + BLOCK,), 0x5A, dtype=torch.uint8)
    yield TensorMemoryAllocator(whole[:num_bytes], on_full=None, **options)
    assert (whole[num_bytes:] == 0x5A).all(), "bytes behind the heap were written"


def engine() -> tuple[PagedKVCache, list[torch.Tensor]]:
    layers = [torch.randn(2, 40, 16, 2, 32).half() for _ in range(2)]
    return PagedKVCache.of("vllm-flash-nhd", layers), layers


def shuffled(batch: AddressBatch, seed: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).permutation(batch.addresses)


ViewOf = Callable[[TensorMemoryAllocator, AddressBatch], Any]
WAYS: dict[str, ViewOf] = {
    "AddressBatch": lambda heap, blocks: heap.view(blocks, SHAPE, torch.float16),
    "array": lambda heap, blocks: heap.view(blocks.addresses, SHAPE, torch.float16),
    "list": lambda heap, blocks: heap.view(blocks.addresses.tolist(), SHAPE, torch.float16),
    "metadata": lambda heap, blocks: heap.view(_metadata(heap, blocks)),
    "pickled": lambda heap, blocks: heap.view(pickle.loads(pickle.dumps(_metadata(heap, blocks)))),
    "objects": lambda heap, blocks: heap.view(_objects(heap, blocks)),
    "one object": lambda heap, blocks: heap.view(_objects(heap, blocks)[0]),
}


def _metadata(heap: TensorMemoryAllocator, blocks: AddressBatch) -> MemoryBatchMetadata:
    layout = heap.layout_of(SHAPE, torch.float16, MemoryFormat.KV_2LTD)
    return MemoryBatchMetadata(blocks, layout)


def _objects(heap: TensorMemoryAllocator, blocks: AddressBatch) -> list[Any]:
    own = TensorMemoryAllocator(torch.empty(BLOCK, dtype=torch.uint8))
    obj = own.allocate(SHAPE, torch.float16)
    assert obj is not None
    made = obj.metadata
    return [
        type(made)(made.shape, made.dtype, address, size, 1, 0, made.fmt, made.shapes, made.dtypes)
        for address, size in blocks
    ]


class TestWhatFits:
    @pytest.mark.parametrize("way", WAYS)
    def test_blocks_of_an_equal_heap(self, way: str) -> None:
        with guarded_heap() as heap:
            blocks = AddressManager(HEAP).batched_allocate(BLOCK, 5)
            view = WAYS[way](heap, blocks)
            expected = blocks.addresses[: len(view)]
            assert len(view) == (1 if way == "one object" else 5)
            assert np.array_equal(view.addresses, expected)
            for obj in view:
                obj.tensor.fill_(obj.row)
            assert [int(heap.buffer[a : a + 2].view(torch.float16)) for a in expected] == list(
                range(len(view))
            )

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            (AddressBatch(BLOCK // 2, [0], [8]), "too small"),
            (AddressBatch(BLOCK, [512], [1]), "not aligned"),
            (AddressBatch(BLOCK + 512, [0], [1]), "not aligned"),
            (AddressBatch(BLOCK, [HEAP - BLOCK + PAGE], [1]), "leave"),
            (AddressBatch(BLOCK, [HEAP - BLOCK], [2]), "leave"),
            (AddressBatch(BLOCK, [-BLOCK], [2]), "non-negative"),
            (AddressBatch(BLOCK, [0, 0], [1, 1]), "overlap"),
            (AddressBatch(BLOCK, [4 * BLOCK, 0, BLOCK], [4, 2, 4]), "overlap"),
            (AddressBatch(BLOCK, [1 << 62], [1 << 20]), "beyond|leave"),
        ],
    )
    def test_other_blocks_are_refused_on_every_way_in(
        self, way: str, blocks: AddressBatch, message: str
    ) -> None:
        if len(blocks) > 1000 and way not in ("AddressBatch", "metadata", "pickled"):
            return  # its addresses cannot be listed
        if blocks.block_bytes != BLOCK and way in ("array", "list"):
            return  # addresses say nothing about sizes
        if way == "one object" and len(blocks) > 1 and "leave" not in message:
            return  # one block alone fits
        if way == "one object" and blocks.run_starts[0] == HEAP - BLOCK:
            return
        with guarded_heap() as heap, pytest.raises(ValueError, match=message):
            WAYS[way](heap, blocks)

    @pytest.mark.parametrize(
        "blocks",
        [
            AddressBatch(0, [0], [1]),
            AddressBatch(-BLOCK, [0], [1]),
            AddressBatch(BLOCK, [0, BLOCK], [1]),
            AddressBatch(BLOCK, [0], [-1]),
            AddressBatch(BLOCK, [0.9], [1]),  # type: ignore[list-item]
            AddressBatch(BLOCK, [True], [1]),
            AddressBatch(BLOCK, np.array([1 << 63], np.uint64), [1]),  # type: ignore[arg-type]
            AddressBatch(BLOCK, [1 << 70], [1]),
        ],
    )
    def test_a_batch_that_is_none_is_refused(self, blocks: AddressBatch) -> None:
        with guarded_heap() as heap, pytest.raises(ValueError, match=r"must|need"):
            heap.view(blocks, SHAPE, torch.float16)

    def test_the_scheduler_counts_smaller_chunks_than_the_worker(self) -> None:
        scheduler = AddressManager(HEAP)
        blocks = scheduler.batched_allocate(BLOCK // 2, 8)
        with guarded_heap() as heap:
            with pytest.raises(ValueError, match=r"16384 bytes are too small: .* has 32768 bytes"):
                heap.view(blocks, SHAPE, torch.float16)
            assert len(heap.view(blocks, [2, 1, 64, 64], torch.float16)) == 8

    def test_the_scheduler_aligns_to_less_than_the_worker(self) -> None:
        scheduler = AddressManager(HEAP, 64)
        scheduler.allocate(64)
        blocks = scheduler.batched_allocate(BLOCK, 2)
        with guarded_heap() as heap, pytest.raises(ValueError, match="align_bytes of 4096"):
            heap.view(blocks, SHAPE, torch.float16)
        with guarded_heap(align_bytes=64) as heap:
            assert len(heap.view(blocks, SHAPE, torch.float16)) == 2

    def test_pages_of_another_size_are_refused(self) -> None:
        buffer = torch.zeros(100 * 576, dtype=torch.uint8)
        pages = PagedTensorMemoryAllocator(buffer, [32, 9], torch.float16)
        batch = pages.batched_allocate([32, 9], torch.float16, 7)
        assert batch is not None
        other = PagedTensorMemoryAllocator(buffer, [32, 9], torch.float16)
        assert len(other.view(batch.metadata)) == 7
        smaller = PagedTensorMemoryAllocator(buffer, [16, 9], torch.float16)
        with pytest.raises(ValueError, match="more than a page of 288"):
            smaller.view(batch.metadata)

    def test_metadata_of_a_dtype_that_needs_more_alignment_is_refused(self) -> None:
        buffer = torch.zeros(100, dtype=torch.uint8)
        nine = PagedTensorMemoryAllocator(buffer, [9], torch.uint8)
        layout = TensorMemoryAllocator(torch.zeros(PAGE, dtype=torch.uint8)).layout_of(
            [1], torch.float64, MemoryFormat.UNDEFINED
        )
        with pytest.raises(ValueError, match="multiples of 8"):
            nine.view(MemoryBatchMetadata(AddressBatch(9, [9], [1]), layout))

    def test_bytes_that_have_not_grown_yet_are_refused(self) -> None:
        buffer = torch.zeros(4 * BLOCK, dtype=torch.uint8)
        heap = TensorMemoryAllocator(buffer, address_manager=AddressManager(2 * BLOCK))
        heap.view([BLOCK], SHAPE, torch.float16)
        with pytest.raises(ValueError, match=f"leave the heap, which has {2 * BLOCK} bytes now"):
            heap.view([2 * BLOCK], SHAPE, torch.float16)

    def test_a_run_over_two_buffers(self) -> None:
        first, second = (torch.zeros(4 * BLOCK, dtype=torch.uint8) for _ in range(2))
        heap = TensorMemoryAllocator(first)
        heap.add_buffer(second)
        view = heap.view(AddressBatch(BLOCK, [2 * BLOCK], [4]), SHAPE, torch.float16)
        for obj in view:
            obj.tensor.fill_(1)  # type: ignore[union-attr]
        assert int((first != 0).sum()) == int((second != 0).sum()) == BLOCK // 2 * 2
        with pytest.raises(ValueError, match="leave the buffer"):
            heap.view([3 * BLOCK + PAGE], SHAPE, torch.float16)

    @pytest.mark.parametrize(
        ("blocks", "error", "message"),
        [
            (7, ValueError, "sequence or an array of integers"),
            ("4096", ValueError, "sequence or an array of integers"),
            (["4096"], ValueError, "must be integers, got '4096'"),
            ([0.0], ValueError, "must be integers"),
            ([False], ValueError, "must be integers, got False"),
            ([[0, BLOCK]], ValueError, "one-dimensional"),
            (np.array([0.0]), ValueError, "must be integers"),
            ({"run_starts": [0]}, TypeError, "from_dict"),
        ],
    )
    def test_what_is_no_address(self, blocks: Any, error: type[Exception], message: str) -> None:
        with guarded_heap() as heap, pytest.raises(error, match=message):
            heap.view(blocks, SHAPE, torch.float16)

    def test_batches_and_objects_themselves_are_refused(self) -> None:
        with guarded_heap() as heap:
            batch = heap.batched_allocate(SHAPE, torch.float16, 2)
            assert batch is not None
            for blocks in (batch, batch[0]):
                with pytest.raises(TypeError, match="pass its metadata"):
                    heap.view(blocks, SHAPE, torch.float16)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="must all be metadata"):
                heap.view([batch[0].metadata, 7])  # type: ignore[list-item]
            with pytest.raises(ValueError, match="without a shape"):
                heap.view(batch.metadata, SHAPE, torch.float16)
            other = heap.allocate([4], torch.float16)
            assert other is not None
            with pytest.raises(ValueError, match="must be alike"):
                heap.view([batch[0].metadata, other.metadata])


class TestOrder:
    """A view keeps the caller's order, and everything that uses blocks follows it."""

    @pytest.mark.parametrize("seed", range(3))
    def test_store_and_load_follow_the_order(self, seed: int) -> None:
        cache, layers = engine()
        kept = [layer.clone() for layer in layers]
        ids = BlockIds(torch.randperm(40)[:32])
        with guarded_heap() as heap:
            addresses = shuffled(AddressManager(HEAP).batched_allocate(BLOCK, 8), seed)
            view = heap.view(addresses, SHAPE, torch.float16)
            assert np.array_equal(view.addresses, addresses)
            assert [obj.address for obj in view] == addresses.tolist()
            store(cache, ids, view)
            for number, address in enumerate(addresses):
                block = heap.buffer[address : address + BLOCK].view(torch.float16).view(SHAPE)
                for layer in range(2):
                    blocks = ids.ids[4 * number : 4 * number + 4]
                    expected = kept[layer][:, blocks].reshape(2, 64, 64)  # type: ignore[index]
                    assert torch.equal(block[:, layer], expected)
            for layer in layers:
                layer[:, ids.ids] = 0  # type: ignore[index]
            again = MemoryBatchMetadata.from_dict(json.loads(json.dumps(view.metadata.to_dict())))
            load(heap.view(again), cache, ids)
        assert all(torch.equal(one, other) for one, other in zip(layers, kept, strict=True))

    def test_transfers_follow_the_order(self) -> None:
        source = torch.randn(8, *SHAPE).half()
        with guarded_heap() as heap, guarded_heap() as far:
            addresses = shuffled(AddressManager(HEAP).batched_allocate(BLOCK, 8))
            view = heap.view(addresses, SHAPE, torch.float16)
            with copy((source, view)):
                pass
            away = offload(view, into=far)
            assert away is not None
            away.transfer.result()  # type: ignore[union-attr]
            for number, obj in enumerate(away):
                assert torch.equal(obj.tensor, source[number])  # type: ignore[arg-type]
            back = torch.empty_like(source)
            with copy(CopyPlan.between(view, back)):
                pass
            assert torch.equal(back, source)

    @settings(deadline=None, max_examples=50)
    @given(st.permutations(range(12)), st.integers(1, 12))
    def test_runs_of_any_order(self, order: list[int], count: int) -> None:
        addresses = np.array(order[:count], np.int64) * PAGE
        batch = AddressBatch.of_addresses(addresses, PAGE)
        assert batch.addresses.tolist() == addresses.tolist()
        steps = np.diff(addresses)
        assert batch.num_runs == 1 + np.count_nonzero(steps != PAGE)
        assert batch.is_ascending == bool((steps > 0).all())
        assert batch.checked() == batch
