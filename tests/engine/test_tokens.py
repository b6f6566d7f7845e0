"""A batch knows the tokens that were stored into it, and loads no others.

The reference is what the bytes say: before each case the heap is filled with a former owner's
number. A load must never bring that number to the engine, and must not refuse what is there.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap import (
    BlockIds,
    BlockLayout,
    LifetimeError,
    MemoryBatch,
    MemoryBatchMetadata,
    MemoryFormat,
    MemoryObjMetadata,
    PagedKVCache,
    PrefixStore,
    TensorMemoryAllocator,
    load,
    offload,
    restore,
    store,
)
from kvheap.engine import tokens
from kvheap.kernels.paged_plan import Pairing
from kvheap.transfer import copy

F = MemoryFormat
BLOCKS, BLOCK_SIZE, CHUNK = 24, 4, 8
SLOTS = BLOCKS * BLOCK_SIZE
FORMATS = [F.KV_2LTD, F.KV_2TD, F.KV_T2D, F.KV_2TLD, F.KV_PL2TD]
OF_FORMERS = 7.0
"""What a former owner left in the heap; engines hold smaller numbers."""


def engine(layers: int = 2) -> tuple[PagedKVCache, list[torch.Tensor]]:
    tensors = [torch.rand(2, BLOCKS, BLOCK_SIZE, 2, 8) for _ in range(layers)]
    return PagedKVCache.of("vllm-flash-nhd", tensors), tensors


def soiled(num_bytes: int = 1 << 18, **options: Any) -> TensorMemoryAllocator:
    heap = TensorMemoryAllocator(torch.zeros(num_bytes, dtype=torch.uint8), on_full=None, **options)
    heap.buffer.view(torch.float32).fill_(OF_FORMERS)
    return heap


def stored(heap: TensorMemoryAllocator, cache: PagedKVCache, slots: Any, **how: Any) -> MemoryBatch:
    batch = heap.batched_store(cache, slots, CHUNK, **how)
    assert batch is not None
    return batch


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 19, 24])
def test_the_count_is_that_of_the_store(fmt: MemoryFormat, num_tokens: int) -> None:
    cache, tensors = engine()
    heap = soiled()
    batch = stored(heap, cache, range(num_tokens), fmt=fmt)
    assert batch.num_tokens == num_tokens
    room = -(-num_tokens // CHUNK) * CHUNK
    for more in range(num_tokens + 1, room + 1):
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(ValueError, match=f"token {num_tokens} of the {more} to load was never"):
            load(batch, cache, range(40, 40 + more))
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    for fewer in range(room - CHUNK + 1, num_tokens + 1):
        load(batch, cache, range(40, 40 + fewer))
        assert all((tensor < 1).all() for tensor in tensors)


@pytest.mark.parametrize("convert", [False, True])
def test_blocks_lists_and_converted_chunks(convert: bool) -> None:
    tensors = [torch.rand(2, BLOCKS, BLOCK_SIZE, 2, 8).half() for _ in range(2)]
    cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    heap = soiled()
    batch = stored(heap, cache, BlockIds(range(5), 17), convert=convert)
    assert batch.num_tokens == 17
    for ids in (BlockIds(range(7, 12), 18), BlockIds(range(7, 13))):
        with pytest.raises(ValueError, match="token 17"):
            load(batch, cache, ids, convert=convert)
        with pytest.raises(ValueError, match="token 17"):
            heap.batched_load(list(batch), cache, ids, convert=convert)
    with pytest.raises(ValueError, match="token 1 of the 2 to load was never stored: chunk 0 "):
        load([batch[2]], cache, range(2), convert=convert)
    load([batch[2], batch[0]], cache, [7, *[-1] * 7, *range(20, 28)], convert=convert)
    load([batch[0]], cache, range(20, 28), convert=convert)
    load(batch, cache, BlockIds(range(7, 12), 17), convert=convert)


def test_objects_of_several_batches() -> None:
    cache, _ = engine()
    heap = soiled()
    first, second = stored(heap, cache, range(8)), stored(heap, cache, range(8, 13))
    load([*first, *second], cache, range(40, 53))
    with pytest.raises(ValueError, match="token 13 of the 14"):
        load([*first, *second], cache, range(40, 54))
    other = heap.batched_allocate(first.shape, first.dtype, 1)
    assert other is not None
    load([*first, *other], cache, range(40, 56))  # of the second chunk, nothing is known


class TestSkippedTokens:
    def test_padding_at_the_end_counts_for_nothing(self) -> None:
        cache, _ = engine()
        heap = soiled()
        batch = stored(heap, cache, [*range(19), -1, -1])
        assert batch.num_tokens == 19
        load(batch, cache, [*range(40, 59), -1, -1])
        with pytest.raises(ValueError, match="token 19"):
            load(batch, cache, range(40, 60))

    def test_padding_of_a_whole_chunk(self) -> None:
        cache, _ = engine()
        batch = stored(soiled(), cache, [*range(8), *[-1] * 8])
        load(batch, cache, [*range(40, 48), *[-1] * 8])
        load(batch[:1], cache, range(40, 48))
        with pytest.raises(ValueError, match=r"token 8 .*: chunk 1 holds 0 tokens"):
            load(batch, cache, range(40, 49))

    def test_gaps_are_not_loaded(self) -> None:
        cache, _ = engine()
        batch = stored(soiled(), cache, [-1, -1, 2, 3, *range(4, 12)])
        assert batch.num_tokens is None
        load(batch, cache, [-1, -1, *range(40, 50)])
        load(batch, cache, [-1, -1, 40, -1, *range(50, 58)])
        with pytest.raises(ValueError, match=r"token 1 .* chunk 0 holds 6 tokens"):
            load(batch, cache, [-1, *range(40, 51)])

    @pytest.mark.parametrize("is_list", [False, True])
    def test_a_chunk_is_filled_bit_by_bit(self, is_list: bool) -> None:
        cache, _ = engine()
        batch = stored(soiled(), cache, range(11))
        objs = list(batch) if is_list else batch
        store(cache, [*[-1] * 11, 11, 12], objs)
        load(objs, cache, range(40, 53))
        with pytest.raises(ValueError, match="token 13"):
            load(objs, cache, range(40, 54))
        store(cache, range(9), objs)  # the chunk now begins another sequence
        with pytest.raises(ValueError, match="token 9"):
            load(objs, cache, range(40, 53))

    def test_skipped_blocks(self) -> None:
        cache, _ = engine()
        batch = stored(soiled(), cache, BlockIds([0, -1, 2]))
        load(batch, cache, BlockIds([9, -1, 10]))
        with pytest.raises(ValueError, match="token 4 "):
            load(batch, cache, BlockIds([9, 10, 11]))


class TestWhatIsNotKnown:
    def test_other_means_of_filling(self) -> None:
        cache, _ = engine()
        heap = soiled()
        shape = [2, 2, CHUNK, 16]
        source = torch.rand(2, *shape)
        batch = heap.batched_allocate(shape, torch.float32, 2, source=source)
        assert batch is not None
        assert batch.num_tokens is None
        load(batch, cache, range(9))
        batch.set_num_tokens(9)
        with pytest.raises(ValueError, match="token 9"):
            load(batch, cache, range(10))
        batch.set_num_tokens(None)
        load(batch, cache, range(10))

    def test_a_store_into_allocated_blocks_is_known(self) -> None:
        cache, _ = engine()
        heap = soiled()
        batch = heap.batched_allocate([2, 2, CHUNK, 16], torch.float32, 2)
        assert batch is not None
        for layer in range(2):
            store(cache, range(13), batch, layers=range(layer, layer + 1))
        assert batch.num_tokens == 13
        with pytest.raises(ValueError, match="token 13"):
            load(batch, cache, range(14), layers=range(1))

    @pytest.mark.parametrize("num_tokens", [-1, 0, 8, 17])
    def test_a_count_that_cannot_be(self, num_tokens: int) -> None:
        heap = soiled()
        batch = heap.batched_allocate([2, 2, CHUNK, 16], torch.float32, 2)
        assert batch is not None
        with pytest.raises(ValueError, match=f"num_tokens is {num_tokens}"):
            batch.set_num_tokens(num_tokens)
        with pytest.raises(TypeError, match="must be an integer"):
            batch.set_num_tokens("9")  # type: ignore[arg-type]
        plain = heap.batched_allocate([4], torch.uint8, 1, F.BINARY)
        assert plain is not None
        with pytest.raises(ValueError, match="hold no tokens"):
            plain.set_num_tokens(1)
        values = {**batch.metadata.to_dict(), "num_tokens": max(num_tokens, 0)}
        with pytest.raises(ValueError, match="num_tokens is"):
            heap.view(MemoryBatchMetadata.from_dict(values))

    def test_a_failed_store_changes_nothing(self) -> None:
        cache, _ = engine()
        batch = stored(soiled(), cache, range(9))
        with pytest.raises(ValueError, match="slots"):
            store(cache, [*range(9), SLOTS], batch)
        assert batch.num_tokens == 9
        batch.allocator.batched_free(batch)  # type: ignore[attr-defined]
        with pytest.raises(LifetimeError):
            load(batch, cache, range(10))


class TestWhereTheCountGoes:
    @pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
    def test_to_another_process(self, fmt: MemoryFormat) -> None:
        cache, _ = engine()
        heap = soiled()
        batch = stored(heap, cache, range(13), fmt=fmt)
        worker = TensorMemoryAllocator(heap.buffer)
        values = json.loads(json.dumps(batch.metadata.to_dict()))
        view = worker.view(MemoryBatchMetadata.from_dict(values))
        assert view.num_tokens == 13
        load(view, cache, range(40, 53))
        with pytest.raises(ValueError, match="token 13"):
            load(view, cache, range(40, 54))
        fresh = worker.view(view.addresses, view.shape, view.dtype, fmt)
        assert fresh.num_tokens is None
        load(fresh, cache, range(40, 54))

    WAYS: ClassVar[dict[str, Callable[[MemoryBatch], Any]]] = {
        "batch": lambda batch: batch.metadata,
        "pickle": lambda batch: pickle.loads(pickle.dumps(batch.metadata)),
        "json": lambda batch: MemoryBatchMetadata.from_dict(
            json.loads(json.dumps(batch.metadata.to_dict()))
        ),
        "objects": lambda batch: [obj.metadata for obj in batch],
        "json of objects": lambda batch: [
            MemoryObjMetadata.from_dict(json.loads(json.dumps(obj.metadata.to_dict())))
            for obj in batch
        ],
        "view of a view": lambda batch: batch.allocator.view(batch.metadata).metadata,  # type: ignore[attr-defined]
    }

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD], ids=lambda fmt: fmt.name)
    def test_to_another_process_by_any_way(self, fmt: MemoryFormat, way: str) -> None:
        """Whole, with gaps, by single blocks, and by layers: what was stored and no more."""
        cache, tensors = engine()
        heap = soiled()

        def view(batch: MemoryBatch) -> MemoryBatch:
            return heap.view(self.WAYS[way](batch))

        whole = stored(heap, cache, range(13), fmt=fmt)
        gaps = stored(heap, cache, [0, 1, -1, 3, *range(4, 12)], fmt=fmt)
        single = heap.batched_allocate(whole.shape, whole.dtype, len(whole), fmt)
        assert single is not None
        step = len(whole) // 2
        store(cache, range(5), single[::step] if step > 1 else single[:1])
        load(view(whole), cache, range(40, 53))
        load(view(gaps), cache, [40, 41, -1, *range(43, 52)])
        chosen = view(single)
        some: Any = chosen[::step] if step > 1 else chosen[:1]
        load(some, cache, range(40, 45))
        assert all((tensor < 1).all() for tensor in tensors)
        with pytest.raises(ValueError, match="token 13 "):
            load(view(whole), cache, range(40, 54))
        with pytest.raises(ValueError, match="token 2 "):
            load(view(gaps), cache, range(40, 52))
        with pytest.raises(ValueError, match="token 5 "):
            load(some, cache, range(40, 46))
        if fmt is F.KV_2TD:
            return
        store(cache, range(13), single, layers=range(1))
        with pytest.raises(ValueError, match="token 5 "):
            load(view(single), cache, range(40, 53))
        store(cache, range(13), single, layers=range(1, 2))
        load(view(single), cache, range(40, 53))

    @pytest.mark.parametrize("wrong", ["", "xyz", "-1", 7, "0x1f", ["1"], True, "1ff", "1_0"])
    def test_sets_that_cannot_be(self, wrong: Any) -> None:
        cache, _ = engine()
        heap = soiled()
        batch = stored(heap, cache, [0, -1, *range(2, 12)])
        values = batch.metadata.to_dict()
        for damaged in ([wrong, "1"], [None, wrong], ["1"], ["1"] * 3, "11", 3):
            with pytest.raises(ValueError, match="stored"):
                heap.view(MemoryBatchMetadata.from_dict({**values, "stored": damaged}))
        obj = {**batch[0].metadata.to_dict(), "stored": wrong}
        with pytest.raises(ValueError, match="stored"):
            heap.view(MemoryObjMetadata.from_dict(obj))

    @pytest.mark.parametrize("by_layer", [False, True])
    def test_to_another_heap_and_back(self, by_layer: bool) -> None:
        cache, tensors = engine()
        near, far = soiled(), soiled()
        batch = stored(near, cache, range(13))
        away = offload(batch, into=far, free=True, by_layer=by_layer)
        assert away is not None
        back = restore(away, into=near)
        assert back is not None
        assert away.num_tokens == back.num_tokens == 13
        with pytest.raises(ValueError, match="token 13"):
            load(back, cache, range(40, 54))
        load(back, cache, range(40, 53))
        flat = tensors[0].view(2, SLOTS, 2, 8)
        assert torch.equal(flat[:, 40:53], flat[:, :13])

    def test_some_blocks_to_another_heap(self) -> None:
        cache, _ = engine()
        near, far = soiled(), soiled()
        batch = stored(near, cache, range(21))
        objs = offload([batch[2], batch[0]], into=far)
        assert objs is not None
        load(objs, cache, [*range(40, 45), *[-1] * 3, *range(50, 58)])
        with pytest.raises(ValueError, match="token 5 "):
            load(objs, cache, range(40, 56))
        small = soiled(2 * batch.allocated_bytes)
        part = offload(batch, into=small, allow_partial=True)
        assert part is not None
        assert len(part) == 2
        load(part, cache, range(40, 56))

    def test_a_copy_over_the_blocks_makes_it_unknown(self) -> None:
        cache, _ = engine()
        heap = soiled()
        batch = stored(heap, cache, range(13))
        with copy((torch.rand(2, *batch.shape), batch)):
            pass
        assert batch.num_tokens is None
        load(batch, cache, range(16))
        again = stored(heap, cache, range(13))
        with copy((torch.rand(1, *batch.shape), [again[1]])):
            pass
        load(again, cache, range(16))

    def test_to_a_prefix_store(self) -> None:
        cache, _ = engine()
        layout = BlockLayout.of([2, 2, CHUNK, 16], torch.float32, F.KV_2LTD)
        kept: PrefixStore[str] = PrefixStore(soiled(), layout)
        kept.store_from_engine(["a", "ab"], cache, range(13))
        with kept.hold(["a", "ab"]) as hold:
            load(hold.chunks, cache, range(40, 53))
            with pytest.raises(ValueError, match="token 13"):
                load(hold.chunks, cache, range(40, 54))
        kept.close()


SLOT_LISTS = st.integers(17, 24).flatmap(
    lambda count: st.lists(st.booleans(), min_size=count, max_size=count)
)


def slots_of(flags: Sequence[bool], first: int) -> list[int]:
    return [first + at if flag else -1 for at, flag in enumerate(flags)]


@settings(deadline=None, max_examples=150)
@given(st.data())
@pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD], ids=lambda fmt: fmt.name)
def test_loads_bring_what_was_stored_and_nothing_else(
    fmt: MemoryFormat, data: st.DataObject
) -> None:
    """Random stores, with gaps, of whole batches and of chunks, beside a set of tokens a chunk."""
    cache, tensors = engine()
    heap = soiled()
    first = data.draw(SLOT_LISTS)
    batch = stored(heap, cache, slots_of(first, 0), fmt=fmt)
    per_layer = fmt is F.KV_2TD
    held = [set(np.flatnonzero(first[at : at + CHUNK]).tolist()) for at in range(0, 24, CHUNK)]
    for _ in range(data.draw(st.integers(0, 5))):
        which = data.draw(st.sampled_from([None, 0, 1, 2]))
        rows = [which] if which is not None else [0, 1, 2]
        objs: Any = batch
        if which is not None:
            objs = [batch[which + 3 * layer] for layer in range(2 if per_layer else 1)]
        count = data.draw(st.integers(1, CHUNK)) + CHUNK * (len(rows) - 1)
        flags = data.draw(st.lists(st.booleans() | st.just(True), min_size=count, max_size=count))
        wanted = [
            set(np.flatnonzero(flags[at : at + CHUNK]).tolist()) for at in range(0, count, CHUNK)
        ]
        if data.draw(st.booleans()):
            store(cache, slots_of(flags, 0), objs)
            for row, now, begin in zip(rows, wanted, range(0, count, CHUNK), strict=True):
                covered = set(range(min(CHUNK, count - begin)))
                held[row] = now | (held[row] & (covered - now))
            continue
        if all(now <= held[row] for row, now in zip(rows, wanted, strict=True)):
            load(objs, cache, slots_of(flags, 48))
            assert all((tensor < 1).all() for tensor in tensors), "a former owner's bytes"
        else:
            with pytest.raises(ValueError, match="never stored"):
                load(objs, cache, slots_of(flags, 48))


Slots = Callable[[int], Any]


@pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD], ids=lambda fmt: fmt.name)
def test_counts_are_kept_without_work_for_each_chunk(fmt: MemoryFormat) -> None:
    cache, _ = engine()
    batch = stored(soiled(), cache, range(90), fmt=fmt)
    load(batch, cache, range(90))
    store(cache, range(89), batch)
    assert batch.stored_tokens.first == 89
    assert batch.stored_tokens.num_rows_apart == 0


def test_what_a_pairing_means_to_the_records_is_found_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not at each of the thousands of calls that an engine makes in a second."""
    found: list[str] = []

    def form_of(cache: PagedKVCache, pairing: Pairing) -> str:
        found.append("rows of tokens")
        return found[-1]

    monkeypatch.setattr(tokens, "form_of", form_of)
    heap = soiled()
    for cache in (engine()[0], engine()[0]):
        for count in (CHUNK, 2 * CHUNK + 3):
            batch = stored(heap, cache, range(count))
            heap.batched_load(batch, cache, range(count))
            store(cache, range(count), list(batch))
            heap.batched_free(batch)
    assert len(found) == 2  # for each cache


def test_a_cache_of_whole_blocks_counts_tokens_too() -> None:
    """Its copies count blocks, its chunks have tokens."""
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8), on_full=None)
    cache = PagedKVCache.of("vllm-cpu", [torch.rand(8, 2, 4, 16)])
    batch = heap.batched_store(cache, BlockIds([3, 1, 6]), 8)
    assert batch is not None
    assert (len(batch), batch.num_tokens) == (2, 12)
    heap.batched_load(batch, cache, BlockIds([0, 2, 4]))
    with pytest.raises(ValueError, match="token 12 of the 16 to load was never stored"):
        heap.batched_load(batch, cache, BlockIds([0, 2, 4, 5]))


class TestSomeLayersAndHeads:
    """Tokens count for the layers and heads that were stored, and for no others."""

    @staticmethod
    def chunks(heads: int = 2, layers: int = 3, fmt: MemoryFormat = F.KV_2LTD) -> MemoryBatch:
        shape = [2, layers, CHUNK, 8 * heads] if fmt is F.KV_2LTD else [2, CHUNK, 8 * heads]
        number = 3 if fmt is F.KV_2LTD else 3 * layers
        batch = soiled(1 << 20).batched_allocate(shape, torch.float32, number, fmt)
        assert batch is not None
        return batch

    @pytest.mark.parametrize("is_list", [False, True])
    @pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
    def test_layer_after_layer(self, order: list[int], is_list: bool) -> None:
        cache, tensors = engine(3)
        batch = self.chunks()
        objs: Any = list(batch) if is_list else batch
        done: list[int] = []
        for layer in order:
            store(cache, range(19), objs, layers=range(layer, layer + 1))
            done.append(layer)
            for other in range(3):
                only = range(other, other + 1)
                if other in done:
                    load(objs, cache, range(40, 59), layers=only)
                    with pytest.raises(ValueError, match="token 19 "):
                        load(objs, cache, range(40, 60), layers=only)
                else:
                    with pytest.raises(ValueError, match=r"token 0 .*layers and heads to load"):
                        load(objs, cache, range(40, 59), layers=only)
            if len(done) < 3:
                assert batch.num_tokens in (0, None)
                for view in (objs, list(batch)):
                    with pytest.raises(ValueError, match="token 0 "):
                        load(view, cache, range(40, 59))
                with pytest.raises(ValueError, match="token 0 "):
                    load([batch[1]], cache, range(40, 48))
        load(objs, cache, range(40, 59))
        assert all((tensor < 1).all() for tensor in tensors)
        with pytest.raises(ValueError, match="token 19 "):
            load(objs, cache, range(40, 60))
        if not is_list:
            assert (batch.num_tokens, batch.stored_tokens.num_rows_apart) == (19, 0)

    def test_heads_of_two_ranks(self) -> None:
        cache, _ = engine(3)
        batch = self.chunks(heads=4)
        store(cache, range(19), batch, heads=slice(0, 2))
        load(batch, cache, range(40, 59), heads=slice(0, 2))
        load(batch, cache, range(40, 59), heads=slice(0, 2), layers=range(1, 3))
        for heads in (slice(2, 4), slice(1, 3)):
            with pytest.raises(ValueError, match="token 0 "):
                load(batch, cache, range(40, 59), heads=heads)
        store(cache, range(19), batch, heads=slice(2, 4), layers=range(2))
        load(batch, cache, range(40, 59), heads=slice(1, 3), layers=range(2))
        with pytest.raises(ValueError, match="token 0 "):
            load(batch, cache, range(40, 59), heads=slice(1, 3))
        store(cache, range(19), batch, heads=slice(2, 4), layers=range(2, 3))
        assert batch.num_tokens == 19

    def test_layers_with_chunks_of_their_own(self) -> None:
        cache, _ = engine(3)
        batch = self.chunks(fmt=F.KV_2TD)
        store(cache, range(19), batch[:3], layers=range(1))
        load(batch[:3], cache, range(40, 59), layers=range(1))
        for objs in (batch, list(batch)):
            with pytest.raises(ValueError, match="token 0 "):
                load(objs, cache, range(40, 59))
        store(cache, range(19), batch[3:], layers=range(1, 3))
        load(batch, cache, range(40, 59))

    def test_a_layer_of_a_whole_batch_again(self) -> None:
        cache, _ = engine(3)
        batch = self.chunks()
        store(cache, range(24), batch)
        store(cache, range(19), batch, layers=range(1))
        load(batch, cache, range(40, 64), layers=range(1, 3))
        load(batch, cache, range(40, 59))
        assert batch.num_tokens == 19
        with pytest.raises(ValueError, match="token 19 "):
            load(batch, cache, range(40, 64))
        store(cache, range(24), batch)
        assert (batch.num_tokens, batch.stored_tokens.first) == (24, 24)

    def test_where_they_go(self) -> None:
        cache, _ = engine(3)
        batch = self.chunks()
        store(cache, range(19), batch, layers=range(1))
        far = soiled(1 << 20)
        for source in (batch, list(batch)):
            away = offload(source, into=far)
            assert away is not None
            with pytest.raises(ValueError, match="token 0 "):
                load(away, cache, range(40, 59))
        whole = offload(batch, into=far)
        assert whole is not None
        load(whole, cache, range(40, 59), layers=range(1))

    @settings(deadline=None, max_examples=100)
    @given(st.data())
    def test_beside_a_set_of_cells(self, data: st.DataObject) -> None:
        wide = PagedKVCache.of(
            "vllm-flash-nhd", [torch.rand(2, BLOCKS, BLOCK_SIZE, 4, 8) for _ in range(3)]
        )
        batch = self.chunks(heads=4)
        held = np.zeros((3, 3, 4, CHUNK), bool)  # chunk, layer, head, token
        for _ in range(data.draw(st.integers(1, 8))):
            a, b = sorted(
                data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True))
            )
            c, d = sorted(
                data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True))
            )
            which = data.draw(st.sampled_from([[0], [1], [2], [0, 1, 2], [2, 0]]))
            objs: Any = batch if len(which) == 3 else [batch[row] for row in which]
            count = data.draw(st.integers(1, CHUNK)) + CHUNK * (len(which) - 1)
            spans = [min(CHUNK, count - at) for at in range(0, count, CHUNK)]
            if data.draw(st.booleans()):
                store(wide, range(count), objs, layers=range(a, b), heads=slice(c, d))
                for row, span in zip(which, spans, strict=True):
                    held[row, a:b, c:d] = np.arange(CHUNK) < span
                continue
            is_there = all(held[r, a:b, c:d, :n].all() for r, n in zip(which, spans, strict=True))
            was_stored = held.any()
            if is_there:
                load(objs, wide, range(48, 48 + count), layers=range(a, b), heads=slice(c, d))
            elif was_stored and all(held[r].any() for r in which):
                with pytest.raises(ValueError, match="never stored"):
                    load(objs, wide, range(48, 48 + count), layers=range(a, b), heads=slice(c, d))
        assert all((tensor < 1).all() for tensor in wide.tensors)


def test_a_converted_chunk_is_stored_as_a_whole() -> None:
    """A second store has scales of its own, which are not those of the tokens before."""
    tensors = [torch.ones(2, BLOCKS, BLOCK_SIZE, 2, 8).half() for _ in range(2)]
    cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    batch = stored(soiled(), cache, range(12), convert=True)
    store(cache, [*[-1] * 12, 12, 13], batch, convert=True)
    load(batch, cache, [*range(40, 48), *[-1] * 4, 48, 49], convert=True)
    with pytest.raises(ValueError, match="token 8 "):
        load(batch, cache, range(40, 54), convert=True)
    with pytest.raises(ValueError, match="token 8 "):
        load(list(batch), cache, range(40, 54), convert=True)


@pytest.mark.parametrize("by_row", [False, True])
def test_whole_blocks_stay_whole_blocks_in_another_heap(by_row: bool) -> None:
    """Also if they are moved one by one: another layout would take their bytes for rows."""
    tensors = [torch.rand(8, 2, 4, 16)]
    cache, other = (PagedKVCache.of(name, tensors) for name in ("vllm-cpu", "vllm-lbhnc"))
    near, far = soiled(), soiled()
    batch = near.batched_store(cache, BlockIds([3, 1]), 8)
    assert batch is not None
    away = offload(list(batch) if by_row else batch, into=far)
    assert away is not None
    with pytest.raises(ValueError, match="the chunks hold whole blocks of 4 slots of vllm-cpu"):
        load(away, other, BlockIds([0, 2]))
    load(away, cache, BlockIds([0, 2]))
    assert torch.equal(tensors[0][[0, 2]], tensors[0][[3, 1]])
