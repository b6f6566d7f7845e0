"""``batch[2:5]``: the same blocks as a list of their handles, with addresses, extents and metadata.

The reference is always the list of handles that the same slice of a list gives.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_tiers import LAYOUT, fill, key_of, make_heap, open_tier
from hypothesis import given
from hypothesis import strategies as st
from small_heaps import PAGE, FakeStream, allocated_pages, heap_of, take

from kvheap import (
    BatchSlice,
    BlockLayout,
    BufferAllocator,
    MemoryBatch,
    MemoryFormat,
    MixedMemoryAllocator,
    PagedKVCache,
    PinMemoryAllocator,
    PrefixStore,
    TensorMemoryAllocator,
    foreign_transfer,
    load,
    offload,
    store,
)
from kvheap.errors import (
    BlockInUseError,
    DoubleFreeError,
    ForeignObjectError,
    LifetimeError,
)
from kvheap.transfer import CopyPlan, copy, extents, paired_runs

N = 7
NUMBERED = torch.arange(N * PAGE // 8).reshape(N, -1)
SLICES = [
    slice(None),
    slice(2, 5),
    slice(5, 2),
    slice(-3, None),
    slice(None, None, -1),
    slice(None, None, 2),
    slice(5, 0, -2),
    slice(3, 3),
    slice(-100, 100),
]
BOUND = st.none() | st.integers(-9, 9)
STEP = st.none() | st.integers(-3, 3).filter(bool)


def numbered(heap: Any, source: torch.Tensor = NUMBERED) -> MemoryBatch:
    batch = heap.batched_allocate([PAGE // 8], torch.int64, len(source), source=source)
    assert batch is not None
    return batch


def one_run() -> MemoryBatch:
    return numbered(heap_of(16))


def many_runs() -> MemoryBatch:
    """Blocks in several runs and two buffers."""
    heap = heap_of(8)
    singles = [take(heap, 1) for _ in range(8)]
    heap.add_buffer(torch.zeros(4 * PAGE, dtype=torch.uint8))
    for single in singles[::2]:
        heap.batched_free(single)
    batch = numbered(heap)
    assert batch.num_runs > 3
    batch.record_stream(FakeStream())  # with the other blocks' holders
    object.__getattribute__(heap, "__dict__")["kept"] = singles
    return batch


def viewed() -> MemoryBatch:
    """Blocks of another process, out of order."""
    heap = heap_of(16)
    owner = numbered(heap)
    other = TensorMemoryAllocator(heap.buffer, view_only=True)
    batch = other.view([obj.metadata for obj in owner[::-1]])
    object.__getattribute__(other, "__dict__")["kept"] = owner
    return batch


MAKERS = pytest.mark.parametrize("make", [one_run, many_runs, viewed])


def contents(objs: Any) -> list[list[int]]:
    return [obj.tensor.tolist() for obj in objs]


class TestIsTheList:
    @MAKERS
    @pytest.mark.parametrize("chosen", SLICES, ids=str)
    def test_has_the_blocks_of_the_list(
        self, make: Callable[[], MemoryBatch], chosen: slice
    ) -> None:
        batch = make()
        whole = [batch[row] for row in range(N)]
        found, reference = batch[chosen], whole[chosen]
        assert isinstance(found, BatchSlice)
        assert found.batch is batch
        assert found.rows.tolist() == list(range(N))[chosen]
        assert len(found) == len(reference)
        assert list(found) == reference
        assert found == reference
        assert reference == found
        assert found == batch[chosen]
        assert [found[i] for i in range(-len(found), len(found))] == reference * 2
        assert [*reversed(found)] == reference[::-1]
        assert all(obj in found for obj in reference)
        assert [obj for obj in whole if obj in found] == [obj for obj in whole if obj in reference]
        assert found + reference == reference + found == reference + reference
        assert found + found == reference + reference
        assert found.addresses.tolist() == [obj.address for obj in reference]
        assert (found.layout, found.allocated_bytes) == (batch.layout, batch.allocated_bytes)
        assert (found.shape, found.dtype, found.fmt) == (batch.shape, batch.dtype, batch.fmt)
        assert contents(found) == [t.tolist() for t in found.tensors if t is not None]
        assert contents(found) == contents(reference)
        assert contents(found.batch) == [t.tolist() for t in batch.tensors if t is not None]
        assert list(found.live) == [obj.is_valid() for obj in reference]
        assert list(found.ref_counts) == [obj.ref_count for obj in reference]

    @given(st.lists(st.builds(slice, BOUND, BOUND, STEP), min_size=1, max_size=3))
    def test_slices_of_slices(self, chosen: list[slice]) -> None:
        batch = one_run()
        found: Any = batch
        reference = [batch[row] for row in range(N)]
        for each in chosen:
            found, reference = found[each], reference[each]
        assert found == reference
        assert found.addresses.tolist() == [obj.address for obj in reference]

    @MAKERS
    @pytest.mark.parametrize("chosen", SLICES, ids=str)
    @pytest.mark.parametrize("padding", [True, False])
    def test_extents(self, make: Callable[[], MemoryBatch], chosen: slice, padding: bool) -> None:
        found = make()[chosen]
        if not len(found):
            assert [len(part) for part in found.extents(padding=padding)] == [0, 0]
            return
        reference = extents(list(found), padding=padding)
        for each in (found.extents(padding=padding), extents(found, padding=padding)):
            assert each.starts.tolist() == reference.starts.tolist()
            assert each.sizes.tolist() == reference.sizes.tolist()
        assert found.block_runs().num_runs == len(reference.starts)

    def test_a_wrong_index_is_named(self) -> None:
        some = one_run()[2:5]
        for index in (3, -4, 1 << 70):
            with pytest.raises(IndexError, match=str(index)):
                some[index]
        with pytest.raises((TypeError, ValueError), match="nonsense"):
            some["nonsense"]  # type: ignore[call-overload]
        with pytest.raises(TypeError):
            some["a":]  # type: ignore[misc]
        with pytest.raises(TypeError):
            some + 3  # type: ignore[operator]

    def test_is_no_value_to_keep(self) -> None:
        some = one_run()[2:5]
        with pytest.raises(TypeError, match="metadata"):
            pickle.dumps(some)
        with pytest.raises(TypeError, match="unhashable"):
            hash(some)
        assert some != one_run()[2:5]
        assert (some == 3) is False
        assert repr(some) == f"BatchSlice(3 x {some.layout}, blocks 2 to 4 of 7)"
        assert repr(some[::-2]) == f"BatchSlice(2 x {some.layout}, blocks 4 to 2 by -2 of 7)"
        assert "no blocks" in repr(some[:0])

    @MAKERS
    @pytest.mark.parametrize("chosen", SLICES, ids=str)
    def test_metadata_is_that_of_its_blocks(
        self, make: Callable[[], MemoryBatch], chosen: slice
    ) -> None:
        some = make()[chosen]
        heap: Any = some.batch.allocator
        received = type(some.metadata).from_bytes(some.metadata.to_bytes())
        assert received == some.metadata
        if len(some):
            assert contents(heap.view(received)) == contents(some)
            assert heap.view(received).addresses.tolist() == some.addresses.tolist()


class TestLifetimes:
    @pytest.mark.parametrize("chosen", SLICES, ids=str)
    def test_frees_exactly_its_blocks(self, chosen: slice) -> None:
        batch = one_run()
        heap: Any = batch.allocator
        some = batch[chosen]
        rows = some.rows.tolist()
        heap.batched_free(some)
        assert [row for row in range(N) if not batch.live[row]] == sorted(rows)
        assert allocated_pages(heap) == N - len(rows)
        assert some.tensors == [None] * len(rows)
        assert list(some.ref_counts) == [0] * len(rows)
        if rows:
            with pytest.raises(DoubleFreeError):
                heap.batched_free(some)
            with pytest.raises(LifetimeError):
                some.extents()
        else:
            heap.batched_free(some)
        assert allocated_pages(heap) == N - len(rows)
        heap.check()

    @pytest.mark.parametrize("chosen", [slice(2, 5), slice(None), slice(None, None, -1)], ids=str)
    def test_gathers_what_it_frees(self, chosen: slice) -> None:
        for make in (one_run, many_runs):
            batch = make()
            heap: Any = batch.allocator
            out = torch.empty_like(NUMBERED[: len(batch[chosen])])
            with pytest.raises(ValueError, match="out"):
                heap.batched_free(batch[chosen], out=out[1:])
            assert batch.live.all()
            expected = torch.stack([t for t in batch[chosen].tensors if t is not None])
            heap.batched_free(batch[chosen], out=out)
            assert torch.equal(out, expected)

    def test_a_free_in_the_middle_of_it(self) -> None:
        batch = one_run()
        heap: Any = batch.allocator
        some = batch[2:5]
        heap.free(batch[3])
        assert some.live.tolist() == [True, False, True]
        assert [t is None for t in some.tensors] == [False, True, False]
        for call in (
            lambda: heap.batched_free(some),
            lambda: heap.lease(some, 9.0),
            some.extents,
            lambda: copy((some, batch[4:7])),
            lambda: offload(some, into=heap),
            lambda: some.record_stream(FakeStream()),
        ):
            with pytest.raises((DoubleFreeError, LifetimeError), match="block 3"):
                call()
        assert allocated_pages(heap) == N - 1
        heap.batched_free(some[::2])
        heap.batched_free([*batch[:2], *batch[5:]])
        assert allocated_pages(heap) == 0

    def test_idempotent_frees(self) -> None:
        heap = heap_of(16, idempotent_free=True)
        batch = numbered(heap)
        heap.batched_free(batch[:5])
        heap.batched_free(batch[3:])
        heap.batched_free(batch[::-1])
        assert allocated_pages(heap) == 0

    def test_outlives_the_names_of_its_batch(self) -> None:
        heap = heap_of(16)
        some: Any = numbered(heap)[2:5]
        gc.collect()
        assert heap.stats().dropped_blocks == 0
        assert contents(some) == NUMBERED[2:5].tolist()
        inner = some[1:]
        del some
        assert allocated_pages(heap) == N
        del inner
        gc.collect()
        assert (allocated_pages(heap), heap.stats().dropped_blocks) == (0, N)

    def test_counts_are_those_of_the_batch(self) -> None:
        batch = one_run()
        heap: Any = batch.allocator
        some = batch[2:5]
        some[1].ref_count_up()
        batch[4].pin()
        assert (some.ref_counts.tolist(), some.pin_counts.tolist()) == ([1, 2, 1], [0, 0, 1])
        with pytest.raises(BlockInUseError):
            heap.batched_free(some)
        assert batch.live.all()
        batch[3].ref_count_down()
        some[-1].unpin()
        heap.batched_free(some)

    def test_leases(self) -> None:
        batch = one_run()
        heap: Any = batch.allocator
        with heap.lease(batch[4:1:-1], 60.0):
            assert batch.pin_counts.tolist() == [0, 0, 1, 1, 1, 0, 0]
            with pytest.raises(BlockInUseError):
                heap.batched_free(batch[:3])
        heap.lease(batch[:0], 60.0).release()
        heap.batched_free(batch[:3])

    def test_recorded_streams(self) -> None:
        batch, stream = one_run(), FakeStream()
        heap: Any = batch.allocator
        stream.submit()
        batch[2:5].record_stream(stream)
        for each in (batch[:2], batch[2:5], batch[5:]):
            heap.batched_free(each)
        assert heap.stats().pending_bytes == 3 * PAGE
        stream.finish()
        assert heap.stats().pending_bytes == 0

    def test_blocks_of_others_are_refused(self) -> None:
        batch, other = one_run(), heap_of(4)
        for call in (
            lambda: other.batched_free(batch[2:5]),
            lambda: other.lease(batch[2:5], 9.0),
            lambda: other.batched_evict(batch[2:5]),
        ):
            with pytest.raises(ForeignObjectError):
                call()
        view = viewed()
        with pytest.raises(ForeignObjectError, match="is a view"):
            view.allocator.batched_free(view[2:5])  # type: ignore[attr-defined]
        assert batch.live.all()

    def test_debug_mode_and_scrub(self) -> None:
        for options in ({"debug": True}, {"scrub": True}):
            heap = heap_of(16, **options)
            batch = numbered(heap)
            heap.batched_free(batch[1::2])
            heap.batched_free(batch[::2])
            again = numbered(heap)
            assert contents(again) == NUMBERED.tolist()
            heap.check()


class TestCopies:
    @pytest.mark.parametrize("chosen", SLICES, ids=str)
    @pytest.mark.parametrize("free", [False, True])
    def test_moves(self, chosen: slice, free: bool) -> None:
        batch, far = one_run(), heap_of(16)
        expected = contents(batch[chosen])
        away = offload(batch[chosen], into=far, free=free)
        assert away is not None
        assert contents(away) == expected
        if away.transfer is not None:
            away.transfer.result()
        assert allocated_pages(batch.allocator) == N - free * len(expected)  # type: ignore[arg-type]

    def test_moves_as_many_as_fit(self) -> None:
        batch, far = one_run(), heap_of(2)
        assert offload(batch[6:2:-1], into=far) is None
        away = offload(batch[6:2:-1], into=far, free=True, allow_partial=True)
        assert away is not None
        assert contents(away) == NUMBERED[[6, 5]].tolist()
        away.transfer.result()  # type: ignore[union-attr]
        assert batch.live.tolist() == [True] * 5 + [False] * 2

    def test_a_slice_of_what_a_transfer_fills(self) -> None:
        batch, far = one_run(), heap_of(16)
        away = offload(batch, into=far)
        assert away is not None
        assert away[2:5].transfer is away.transfer
        assert contents(away[2:5]) == NUMBERED[2:5].tolist()

    def test_copies_within_a_batch(self) -> None:
        batch = one_run()
        copy((batch[:3], batch[4:])).result()
        assert contents(batch[4:]) == contents(batch[:3]) == NUMBERED[:3].tolist()
        with pytest.raises(ValueError, match="overlap"):
            copy((batch[:3], batch[1:4]))

    def test_whole_runs_are_copied_at_once(self) -> None:
        batch, other = one_run(), one_run()
        assert CopyPlan.between(batch[1:6], other[2:7]).num_runs == 1
        assert CopyPlan.between(batch[1:6], other[6:1:-1]).num_runs == 5
        assert len(paired_runs(batch[1:6], other[2:7])) == 1

    def test_foreign_transfers_protect_it(self) -> None:
        batch = one_run()
        heap: Any = batch.allocator
        work: Future[None] = Future()
        transfer = foreign_transfer(work, target=batch[2:5])
        for each in (batch[:2], batch[2:5], batch[5:]):
            heap.batched_free(each)
        assert heap.stats().pending_bytes == 3 * PAGE
        work.set_result(None)
        transfer.result()
        assert heap.stats().pending_bytes == 0
        batch = numbered(heap)
        assert foreign_transfer(Future(), target=batch[:]) is batch.transfer

    def test_a_prefix_store_takes_it(self) -> None:
        batch, far = one_run(), heap_of(16)
        prefixes: PrefixStore[str] = PrefixStore(far, batch.layout)
        prefixes.offload(["a", "b", "c"], batch[4:1:-1]).complete()
        with prefixes.hold(["a", "b", "c"]) as hold:
            assert contents(hold.chunks) == NUMBERED[[4, 3, 2]].tolist()

    def test_a_file_tier_takes_it(self, tmp_path: Path) -> None:
        pytest.importorskip("lmdb")
        pytest.importorskip("xxhash")
        heap = make_heap(16)
        keys = [key_of(number) for number in range(6)]
        batch = fill(heap, keys)
        with open_tier(tmp_path) as tier:
            tier.store(keys[4:1:-1], batch[4:1:-1]).result(60)
            target = fill(heap, [key_of(100)] * 6)
            tier.load(keys[2:4], target[1:3]).result(60)
            assert contents(target[1:3]) == contents(batch[2:4])
            assert contents(target[3:]) == contents(fill(heap, [key_of(100)] * 3))
        assert batch.layout == LAYOUT


def engine() -> PagedKVCache:
    tensors = [torch.rand(2, 16, 4, 2, 8) for _ in range(3)]
    return PagedKVCache.of("vllm-flash-nhd", tensors)


def fresh() -> PagedKVCache:
    return PagedKVCache.of("vllm-flash-nhd", [torch.zeros(2, 16, 4, 2, 8) for _ in range(3)])


def tokens_of(cache: PagedKVCache, slots: range) -> Any:
    rows = [t.reshape(2, 64, 2, 8)[:, list(slots)] for t in cache.tensors]
    return torch.stack(rows).tolist()


class TestTokens:
    """Chunks of 8 tokens; 6 chunks of 44 tokens are stored."""

    def stored(self, **how: Any) -> tuple[MemoryBatch, PagedKVCache]:
        cache = engine()
        heap = TensorMemoryAllocator(torch.zeros(1 << 18, dtype=torch.uint8))
        batch = heap.batched_store(cache, range(44), 8, **how)
        assert batch is not None
        return batch, cache

    def test_loads_its_tokens(self) -> None:
        batch, cache = self.stored()
        target = fresh()
        load(batch[2:5], target, range(10, 34))
        assert tokens_of(target, range(10, 34)) == tokens_of(cache, range(16, 40))
        load(batch[4:], target, range(40, 52))
        assert tokens_of(target, range(40, 52)) == tokens_of(cache, range(32, 44))
        with pytest.raises(ValueError, match="never stored"):
            load(batch[4:], target, range(40, 53))
        with pytest.raises(ValueError, match="chunk"):
            load(batch[2:5], target, range(10, 60))

    def test_knows_its_tokens(self) -> None:
        batch, _ = self.stored()
        found = [batch[a:b].num_tokens for a, b in ((0, 6), (0, 2), (2, 5), (4, 6), (5, 6), (3, 3))]
        assert found == [44, 16, 24, 12, 4, 0]
        assert batch[::-1].num_tokens is None  # the last block is not full
        assert batch[4::-1].num_tokens == 40
        assert batch[::2].num_tokens == 24
        batch.set_num_tokens(None)
        assert batch[2:5].num_tokens is None

    @pytest.mark.parametrize("chosen", SLICES, ids=str)
    @pytest.mark.parametrize("fmt", ["KV_2LTD", "KV_2TD", "KV_2TLD"])
    @pytest.mark.parametrize("layers", [None, range(1, 3)])
    def test_metadata_knows_what_lists_know(
        self, chosen: slice, fmt: str, layers: range | None
    ) -> None:
        batch, _ = self.stored(fmt=fmt, layers=layers)
        heap: Any = batch.allocator
        some = batch[chosen]
        if not len(some):
            return
        as_slice, as_list = heap.view(some.metadata), heap.view([obj.metadata for obj in some])
        for one, other in zip(as_slice, as_list, strict=True):
            assert one.metadata == other.metadata
        assert as_slice.num_tokens in (as_list.num_tokens, some.num_tokens)

    def test_stores_into_it(self) -> None:
        batch, _ = self.stored()
        other = engine()
        store(other, range(3, 21), batch[1:4])
        assert batch[1:4].num_tokens == 18
        assert batch[:4].num_tokens == 26
        assert batch[:5].num_tokens is batch.num_tokens is None
        target = fresh()
        load(batch[1:4], target, range(18))
        assert tokens_of(target, range(18)) == tokens_of(other, range(3, 21))
        with pytest.raises(ValueError, match="never stored"):
            load(batch[1:4], target, range(19))
        away = offload(batch[1:4], into=batch.allocator)  # type: ignore[arg-type]
        assert away is not None
        assert away[:].num_tokens == 18
        with pytest.raises(ValueError, match="overlap"):
            store(other, range(16), [batch[0], batch[0]])

    def test_of_whole_batches_it_is_the_batch(self) -> None:
        batch, cache = self.stored()
        store(cache, range(41), batch[:])
        assert batch[:].num_tokens == 41
        target = fresh()
        load(batch, target, range(41))
        assert tokens_of(target, range(41)) == tokens_of(cache, range(41))


def test_a_mixed_allocator_takes_slices_of_either_kind() -> None:
    with PinMemoryAllocator(1 << 16, allow_unpinned=True) as heap:
        mixed = MixedMemoryAllocator(heap, BufferAllocator())
        for fmt in (MemoryFormat.KV_2LTD, MemoryFormat.BINARY_BUFFER):
            batch = mixed.batched_allocate([16], torch.uint8, 5, fmt)
            assert batch is not None
            mixed.batched_free(batch[1:3])
            mixed.batched_free(batch[3:])
            mixed.batched_free(batch[5:])
            assert batch.live.tolist() == [True, False, False, False, False]
            with pytest.raises(DoubleFreeError):
                mixed.batched_free(batch[:2])
            mixed.batched_free(batch[:1])
        assert mixed.leaks() == ()


def test_a_layout_of_several_groups() -> None:
    heap = heap_of(16)
    layout = BlockLayout.of([[3], [5]], [torch.float32, torch.int8], MemoryFormat.UNDEFINED)
    source = torch.randint(256, (4, layout.size_bytes), dtype=torch.uint8)
    batch = heap.batched_allocate(
        list(layout.shapes), list(layout.dtypes), 4, layout.fmt, source=source
    )
    assert batch is not None
    out = torch.empty(2, layout.size_bytes, dtype=torch.uint8)
    heap.batched_free(batch[1::2], out=out)
    assert torch.equal(out, source[1::2])
    assert np.array_equal(batch.live, [True, False, True, False])
