"""PrefixStore on a heap: what is stored, evicted, refused and freed, and nothing left behind."""

from __future__ import annotations

import gc
import itertools
import pickle
import re
import weakref
from collections.abc import Sequence

import pytest
import torch

from kvheap import (
    BlockIds,
    BlockLayout,
    ClosedError,
    InvalidFreeError,
    LifetimeError,
    MemoryFormat,
    MemoryObj,
    PagedKVCache,
    PrefixIndex,
    PrefixStore,
    TensorMemoryAllocator,
    TransferError,
)
from kvheap.device.host_queue import host_queue
from kvheap.prefix import GDSF, LRU, S3FIFO, RequestTooLargeError

LAYOUT = BlockLayout.of([2, 1, 512, 2], torch.float16, MemoryFormat.KV_2LTD)
CHUNK = 4096
assert LAYOUT.size_bytes == CHUNK


def heap_of(num_chunks: int, **options: object) -> TensorMemoryAllocator:
    buffer = torch.zeros(num_chunks * CHUNK, dtype=torch.uint8)
    return TensorMemoryAllocator(buffer, on_full=None, **options)


def store_of(num_chunks: int, *keys: object, **options: object) -> PrefixStore:
    """A store on a heap of its own, in which these keys are ready."""
    store: PrefixStore = PrefixStore(heap_of(num_chunks, **options), LAYOUT)
    if keys:
        store.store(keys, contents(keys))
    return store


def contents(keys: Sequence[object]) -> torch.Tensor:
    """Chunks that differ by their keys."""
    values = torch.tensor([hash(key) % 1000 for key in keys], dtype=torch.float16)
    return values.view(-1, 1, 1, 1, 1).expand(-1, *LAYOUT.shapes[0]).contiguous()


def holds_its_contents(store: PrefixStore, keys: Sequence[object]) -> bool:
    chunks = [chunk.tensor for chunk in store.chunks(keys)]
    return torch.equal(torch.stack(chunks), contents(keys))


def ready(store: PrefixStore, keys: Sequence[object]) -> list[object]:
    return [key for key in keys if key in store]


def frees_of(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each ``batched_free`` from now on frees."""
    freed: list[int] = []
    batched_free = store.heap.batched_free

    def counted_free(objs: list[MemoryObj]) -> None:
        freed.append(len(objs))
        batched_free(objs)

    monkeypatch.setattr(store.heap, "batched_free", counted_free)
    return freed


class TestLookUp:
    def test_the_longest_stored_prefix_and_where_it_is(self) -> None:
        store = store_of(4, 1, 2, 3)
        lengths = [store.prefix_length(keys) for keys in ([], [9, 1], [1, 2, 9, 3], [1, 2, 3, 3])]
        assert lengths == [0, 0, 2, 4]
        assert store.addresses([3, 1]).tolist() == [8192, 0]
        assert [chunk.address for chunk in store.chunks([3, 1])] == [8192, 0]
        assert (3 in store, 9 in store, len(store)) == (True, False, 3)
        assert store.missing([1, 9, 9]) == [9]
        for look in (store.addresses, store.chunks):
            with pytest.raises(KeyError, match="9"):
                look([1, 9])

    def test_the_bytes_are_those_that_were_stored(self) -> None:
        store = store_of(8, "a", "b", "c")
        store.store(["d"], contents(["d"]))
        assert holds_its_contents(store, ["d", "a", "c", "b"])
        store.check()


class TestEviction:
    def test_a_request_loses_its_tail_first_and_in_one_free(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = store_of(4, 1, 2, 3, 4)
        freed = frees_of(store, monkeypatch)
        store.store([8, 9], contents([8, 9]))
        assert ready(store, range(10)) == [1, 2, 8, 9]
        assert freed == [2]
        stats = store.stats()
        assert (stats.evicted_chunks, stats.evicted_bytes) == (2, 2 * CHUNK)

    def test_what_is_held_stays_and_the_policy_decides_the_rest(self) -> None:
        store = store_of(4, 1, 2, 3, 4)
        store.touch([4])
        with store.hold([3, 2]) as hold:
            store.store([8, 9], contents([8, 9]))
            assert hold.keys == [3, 2]
            assert ready(store, range(10)) == [2, 3, 8, 9]

    def test_a_request_beyond_the_heap_leaves_it_as_it_was(self) -> None:
        store = store_of(4, 1, 2)
        with pytest.raises(RequestTooLargeError, match="no room for 5 more chunks of 4096 bytes"):
            store.store([3, 4, 5, 6, 7], contents([3, 4, 5, 6, 7]))
        with store.hold([1, 2]):
            with pytest.raises(RequestTooLargeError, match="only 0 may be evicted") as caught:
                store.store([3, 4, 5], contents([3, 4, 5]))
            assert store.stats().evicted_chunks == 0
        error = caught.value
        assert (error.num_chunks, error.chunk_bytes, error.heap_bytes) == (3, CHUNK, 4 * CHUNK)
        assert (error.free_bytes, error.pending_bytes) == (2 * CHUNK, 0)
        assert (error.evictable_bytes, error.in_use_bytes, error.others_bytes) == (0, 2 * CHUNK, 0)
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.in_use_bytes) == (str(error), 2 * CHUNK)
        assert holds_its_contents(store, [1, 2])

    def test_a_policy_can_be_chosen_and_is_not_shared(self) -> None:
        policy = LRU()
        PrefixStore(heap_of(4), LAYOUT, policy).store([1], contents([1]))
        with pytest.raises(ValueError, match="another index's"):
            PrefixStore(heap_of(4), LAYOUT, policy)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("keys", "message"), [([9, 1], "1 is stored already"), ([5, 6, 5], "5 is named twice")]
    )
    def test_a_key_is_stored_once(self, keys: list[int], message: str) -> None:
        store = store_of(2, 1, 2)
        for call in (lambda: store.store(keys, contents(keys)), lambda: store.begin(keys)):
            with pytest.raises(ValueError, match=message):
                call()
        assert ready(store, range(10)) == [1, 2], "nothing was evicted for it"

    def test_a_key_in_flight_is_not_stored_again(self) -> None:
        store = store_of(4)
        store.begin([1])
        with pytest.raises(ValueError, match="1 is being stored already"):
            store.store([1], contents([1]))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (contents([3]), r"source must have shape \(2, 2, 1, 512, 2\), got \(1, "),
            (contents([3, 4]).float(), "source must be torch.float16, got torch.float32"),
            (contents([3, 4]).to("meta"), "source must be on cpu, got meta"),
            (contents([3, 4]).transpose(1, 4).contiguous().transpose(1, 4), "must be contiguous"),
        ],
    )
    def test_a_wrong_source_evicts_nothing(self, source: torch.Tensor, message: str) -> None:
        store = store_of(2, 1, 2)
        with pytest.raises(ValueError, match=message):
            store.store([3, 4], source)
        assert ready(store, range(10)) == [1, 2]

    def test_a_copy_that_fails_stores_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = store_of(4)

        def fail(*arguments: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("kvheap.heaps.segments.copy_run", fail)
        with pytest.raises(KeyboardInterrupt):
            store.store([1, 2], contents([1, 2]))
        assert len(store) == store.heap.stats().allocated_bytes == 0

    def test_empty_calls_do_nothing(self) -> None:
        store = store_of(1, 1)
        store.store([], contents([]))
        flight = store.begin([])
        flight.complete()
        store.hold([]).release()
        store.remove([])
        assert (flight.state, ready(store, [1])) == ("ready", [1])


class RaisesOnce(LRU):
    """A policy whose ``clear`` is interrupted the first time."""

    def clear(self) -> None:
        if not hasattr(self, "raised"):
            self.raised = True
            raise KeyboardInterrupt
        super().clear()


class TestEnd:
    def test_what_an_interrupted_clear_has_ended_is_freed_by_the_next_call(self) -> None:
        heap = heap_of(4)
        store: PrefixStore[int] = PrefixStore(heap, LAYOUT, RaisesOnce())
        store.store([1, 2, 3, 4], contents([1, 2, 3, 4]))
        with pytest.raises(KeyboardInterrupt):
            store.clear()
        store.store([5, 6], contents([5, 6]))
        assert store.stats().ended_chunks == 0
        assert holds_its_contents(store, [5, 6])

    def test_removed_chunks_are_freed_at_once_or_with_their_last_hold(self) -> None:
        store = store_of(4, 1, 2, 3)
        first, second = store.hold([1, 2]), store.hold([1])
        store.remove([1, 3, 99])
        assert store.heap.stats().allocated_bytes == 2 * CHUNK
        assert first.chunks[0].is_valid()
        store.store([1], contents([1]))
        first.release()
        assert store.heap.stats().allocated_bytes == 3 * CHUNK
        second.release([1])
        second.release()
        assert store.heap.stats().allocated_bytes == 2 * CHUNK
        assert ready(store, range(5)) == [1, 2]

    def test_clear_frees_all_that_is_not_in_use(self) -> None:
        store = store_of(4, 1, 2, 3)
        hold, flight = store.hold([1]), store.begin([4])
        store.clear()
        assert len(store) == 0
        assert store.heap.stats().allocated_bytes == 2 * CHUNK
        hold.release()
        flight.complete()
        assert store.heap.leaks() == ()

    def test_closing_frees_all_and_the_heap_goes_on(self) -> None:
        store = store_of(4, 1, 2, 3)
        heap, hold, flight = store.heap, store.hold([1]), store.begin([4])
        with store:
            pass
        assert (flight.state, heap.stats().allocated_bytes) == ("aborted", CHUNK)
        store.close()
        hold.release()
        assert heap.leaks() == ()
        assert heap.batched_allocate([8], torch.float32, 1) is not None
        calls = (
            lambda: store.store([1], contents([1])),
            lambda: store.begin([1]),
            lambda: store.hold([]),
            lambda: store.prefix_length([1]),
            lambda: store.state(1),
            lambda: store.chunks([]),
            lambda: store.missing([]),
            lambda: store.touch([1]),
            lambda: store.remove([1]),
            store.poll,
            store.clear,
            store.__enter__,
        )
        for call in calls:
            with pytest.raises(ClosedError, match="this PrefixStore is closed"):
                call()

    def test_a_heap_that_is_closed_first_is_no_error(self) -> None:
        store = store_of(4, 1, 2)
        hold = store.hold([1])
        store.heap.close()
        with pytest.raises(ClosedError):
            store.store([3], contents([3]))
        hold.release()
        store.close()

    def test_a_store_that_is_dropped_leaves_nothing_behind(self) -> None:
        store = store_of(4, 1, 2)
        heap = store.heap
        store.begin([3])
        store.hold([1])
        del store
        gc.collect()
        assert heap.leaks() == ()
        assert heap.stats().dropped_blocks == 3


class TestOtherHolders:
    """Whoever pins or references a chunk keeps its bytes; the store makes room elsewhere."""

    def test_a_pinned_chunk_is_evicted_but_freed_by_its_holder(self) -> None:
        store = store_of(4, 1, 2, 3, 4)
        (last,) = store.chunks([4])
        last.pin()
        store.store([8], contents([8]))
        assert ready(store, range(10)) == [1, 2, 8]
        assert last.is_valid()
        assert torch.equal(last.tensor, contents([4])[0])
        last.unpin()
        assert not last.is_valid()
        assert store.heap.stats().allocated_bytes == 3 * CHUNK

    def test_a_referenced_chunk_too(self) -> None:
        store = store_of(3, 1, 2, 3)
        (last,) = store.chunks([3])
        last.ref_count_up()
        store.store([8], contents([8]))
        assert ready(store, range(10)) == [1, 8]
        last.ref_count_down()
        assert not last.is_valid()

    def test_a_chunk_that_others_have_freed_does_no_harm(self) -> None:
        store = store_of(3, 1, 2, 3)
        store.heap.free(store.chunks([3])[0])
        store.store([7, 8], contents([7, 8]))
        store.store([9], contents([9]))
        assert ready(store, range(10)) == [7, 8, 9]
        store.close()
        assert store.heap.leaks() == ()

    def test_others_in_the_heap_are_named_when_there_is_no_room(self) -> None:
        store = store_of(4, 1)
        others = store.heap.batched_allocate([CHUNK], torch.uint8, 2)
        with pytest.raises(RequestTooLargeError, match=re.escape("others hold 8192")) as caught:
            store.store([2, 3, 4], contents([2, 3, 4]))
        assert caught.value.others_bytes == 2 * CHUNK
        store.heap.batched_free(others)
        store.store([2, 3, 4], contents([2, 3, 4]))

    def test_it_evicts_on_until_scattered_holes_are_large_enough(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Blocks of another user, half as large, leave half a chunk free at four places."""
        heap = heap_of(8, align_bytes=CHUNK // 2)
        store: PrefixStore = PrefixStore(heap, LAYOUT)
        halves = heap.batched_allocate([CHUNK // 2], torch.uint8, 8)
        store.store([1, 2, 3, 4], contents([1, 2, 3, 4]))
        heap.batched_free(halves[::2])
        assert heap.stats().free_bytes == 2 * CHUNK
        assert heap.max_batch(LAYOUT.shapes[0], LAYOUT.dtypes[0]) == 0
        freed = frees_of(store, monkeypatch)
        store.store([5, 6], contents([5, 6]))
        assert ready(store, range(10)) == [1, 2, 5, 6]
        assert freed == [2]
        with store.hold([1, 2, 5, 6]), pytest.raises(RequestTooLargeError) as caught:
            store.store([7], contents([7]))
        assert caught.value.free_bytes == 2 * CHUNK


class SlowStream:
    """A stream whose work ends when it is told to."""

    def __init__(self) -> None:
        self.has_ended = False

    def record_event(self) -> SlowStream:
        return self

    def query(self) -> bool:
        return self.has_ended


def test_bytes_that_wait_for_a_stream_are_not_evicted_for_twice() -> None:
    store = store_of(4, 1, 2, 3, 4, stream_wait_s=0.0)
    stream = SlowStream()
    for chunk in store.chunks([3, 4]):
        chunk.record_stream(stream)
    for _ in range(3):
        with pytest.raises(RequestTooLargeError, match="8192 wait for streams") as caught:
            store.store([8, 9], contents([8, 9]))
        assert caught.value.pending_bytes == 2 * CHUNK
        assert ready(store, range(10)) == [1, 2]
    stream.has_ended = True
    store.store([8, 9], contents([8, 9]))
    assert ready(store, range(10)) == [1, 2, 8, 9]
    assert store.stats().evicted_chunks == 2


class StubTransfer:
    """A transfer that ends when it is told to."""

    def __init__(self) -> None:
        self.has_ended = False
        self.error: Exception | None = None

    def done(self) -> bool:
        return self.has_ended

    def result(self) -> None:
        self.has_ended = True
        if self.error is not None:
            raise self.error


class TestStoresInFlight:
    def test_chunks_are_found_once_they_are_completed(self) -> None:
        store = store_of(4, 1)
        flight = store.begin([2, 3])
        assert flight.keys == [2, 3]
        for block, expected in zip(flight.batch, contents([2, 3]), strict=True):
            block.tensor.copy_(expected)
        assert [store.state(key) for key in (1, 2, 3)] == ["ready", "pending", "pending"]
        assert (store.prefix_length([1, 2]), store.stats().stores_in_flight) == (1, 1)
        assert store.poll() == [], "a store without a transfer is the caller's"
        flight.complete()
        flight.complete()
        flight.abort()
        assert (flight.state, store.stats().stores_in_flight) == ("ready", 0)
        assert holds_its_contents(store, [1, 2, 3])

    def test_they_are_not_evicted(self) -> None:
        store = store_of(3, 1)
        flight = store.begin([2, 3])
        with pytest.raises(RequestTooLargeError, match="8192 are of chunks in use"):
            store.store([8, 9], contents([8, 9]))
        store.store([8], contents([8]))
        flight.complete()
        store.store([9], contents([9]))
        assert ready(store, range(10)) == [2, 3, 9]

    def test_a_failed_copy_of_the_callers_is_aborted(self) -> None:
        store = store_of(4)
        flight = store.begin([2, 3])
        flight.abort()
        flight.abort()
        assert (flight.state, store.heap.stats().allocated_bytes) == ("aborted", 0)
        with pytest.raises(RuntimeError, match=r"aborted\) cannot be completed"):
            flight.complete()
        store.store([2, 3], contents([2, 3]))

    def test_poll_completes_what_has_ended_and_aborts_what_has_failed(self) -> None:
        store = store_of(6)
        flights = [store.begin([key]) for key in range(4)]
        transfers = [StubTransfer() for _ in range(3)]
        for flight, transfer in zip(flights, transfers, strict=False):
            flight.batch.transfer = transfer
        assert store.poll() == []
        transfers[0].has_ended = transfers[1].has_ended = True
        transfers[1].error = TransferError("the other machine is gone")
        assert store.poll() == flights[:2]
        assert [flight.state for flight in flights] == ["ready", "aborted"] + ["in flight"] * 2
        assert [flight.error for flight in flights[:2]] == [None, transfers[1].error]
        assert ready(store, range(4)) == [0]
        assert store.heap.stats().allocated_bytes == 3 * CHUNK
        flights[2].complete()  # waits
        assert transfers[2].has_ended
        assert ready(store, range(4)) == [0, 2]

    def test_complete_raises_what_went_wrong(self) -> None:
        store = store_of(2)
        flight = store.begin([1])
        flight.batch.transfer = StubTransfer()
        flight.batch.transfer.error = TransferError("broken")
        with pytest.raises(TransferError, match="broken"):
            flight.complete()
        assert (flight.state, store.heap.leaks()) == ("aborted", ())

    def test_what_has_ended_makes_room(self) -> None:
        store = store_of(2)
        flight = store.begin([1, 2])
        flight.batch.transfer = StubTransfer()
        flight.batch.transfer.has_ended = True
        store.store([3], contents([3]))
        assert (flight.state, ready(store, range(4))) == ("ready", [1, 3])

    def test_what_is_removed_in_flight_is_freed_at_the_end(self) -> None:
        store = store_of(4)
        flights = [store.begin([key]) for key in (1, 2)]
        store.remove([1, 2])
        store.store([1], contents([1]))
        flights[0].complete()
        flights[1].abort()
        assert store.heap.stats().allocated_bytes == CHUNK
        assert holds_its_contents(store, [1])

    def test_blocks_of_another_heap_are_offloaded(self) -> None:
        store = store_of(4, 1, 2, 3)
        near = heap_of(4)
        shape, dtype = LAYOUT.shapes[0], LAYOUT.dtypes[0]
        batch = near.batched_allocate(shape, dtype, 2, LAYOUT.fmt, source=contents([8, 9]))
        flight = store.offload([8, 9], batch, free=True)
        flight.complete()
        assert holds_its_contents(store, [1, 2, 8, 9])
        near.lifetime.reclaimer.settle()
        assert near.leaks() == ()
        with pytest.raises(ValueError, match="2 keys need as many blocks, got 1"):
            store.offload([5, 6], near.batched_allocate(shape, dtype, 1, LAYOUT.fmt))
        with pytest.raises(ValueError, match=r"the blocks must be \(2, 1, 512, 2\)"):
            store.offload([5], near.batched_allocate([8], dtype, 1, LAYOUT.fmt))
        assert ready(store, range(10)) == [1, 2, 8, 9]

    def test_an_offload_is_polled(self) -> None:
        store, near = store_of(4), heap_of(4)
        batch = near.batched_allocate(LAYOUT.shapes[0], LAYOUT.dtypes[0], 2, LAYOUT.fmt)
        flight = store.offload([8, 9], batch)
        flight.batch.transfer.wait()
        assert store.poll() == [flight]
        assert ready(store, [8, 9]) == [8, 9]


class TestFromAnEngine:
    @staticmethod
    def engine() -> tuple[PagedKVCache, list[torch.Tensor]]:
        layers = [torch.randn(2, 128, 16, 1, 2).half()]
        return PagedKVCache.of("vllm-flash-nhd", layers), layers

    def test_chunks_come_from_its_blocks_and_evict_others(self) -> None:
        cache, (layer,) = self.engine()
        store = store_of(3, 1, 2)
        ids = torch.randperm(128)[:64]
        store.store_from_engine([8, 9], cache, BlockIds(ids))
        assert ready(store, range(10)) == [1, 8, 9]
        expected = layer[:, ids].reshape(2, 2, 512, 2)
        for number, chunk in enumerate(store.chunks([8, 9])):
            assert torch.equal(chunk.tensor[:, 0], expected[:, number])

    def test_slots_are_taken_too_and_the_last_chunk_may_be_short(self) -> None:
        cache, _ = self.engine()
        store = store_of(3)
        store.store_from_engine([1, 2], cache, torch.arange(600))
        assert ready(store, [1, 2]) == [1, 2]

    @pytest.mark.parametrize(
        ("num_blocks", "message"),
        [(32, "2 keys need as many chunks, but the slots make 1"), (65, "the slots make 3")],
    )
    def test_wrong_slots_evict_nothing(self, num_blocks: int, message: str) -> None:
        cache, _ = self.engine()
        store = store_of(2, 1, 2)
        with pytest.raises(ValueError, match=message):
            store.store_from_engine([8, 9], cache, BlockIds(torch.arange(num_blocks)))
        assert ready(store, range(10)) == [1, 2]

    def test_a_cache_of_another_shape_evicts_nothing(self) -> None:
        cache = PagedKVCache.of("vllm-flash-nhd", [torch.zeros(2, 128, 16, 1, 4).half()])
        store = store_of(2, 1, 2)
        with pytest.raises(ValueError, match=r"the cache's chunks are \(2, 1, 512, 4\)"):
            store.store_from_engine([8, 9], cache, BlockIds(torch.arange(64)))
        assert ready(store, range(10)) == [1, 2]


def test_chunks_of_several_groups() -> None:
    layout = BlockLayout.of([(4, 8), (3,)], [torch.float32, torch.uint8], MemoryFormat.UNDEFINED)
    heap = heap_of(2)
    store: PrefixStore = PrefixStore(heap, layout)
    source = torch.arange(2 * layout.size_bytes, dtype=torch.uint8).view(2, -1)
    store.store(["a", "b"], source)
    assert torch.equal(store.chunks(["b"])[0].raw_tensor, source[1])
    cache = PagedKVCache.of("vllm-flash-nhd", [torch.zeros(2, 128, 16, 1, 2).half()])
    with pytest.raises(ValueError, match="chunks of one group can be stored from an engine"):
        store.store_from_engine(["c"], cache, BlockIds(torch.arange(32)))
    with pytest.raises(ValueError, match=r"source must have shape \(1, 131\), got \(1, 4, 8\)"):
        store.store(["c"], torch.zeros(1, 4, 8))


def refused_moves(near: TensorMemoryAllocator, how: str) -> dict[str, object]:
    """Arguments of ``offload`` that are wrong in one way."""
    batch = near.batched_allocate(LAYOUT.shapes[0], LAYOUT.dtypes[0], 2, LAYOUT.fmt)
    assert batch is not None
    if how == "pinned":
        batch[1].pin()
    elif how == "referenced":
        batch[1].ref_count_up()
    elif how == "failed":
        batch.transfer = FailedTransfer()  # type: ignore[assignment]
    blocks: object = [batch[0], batch[0]] if how == "named twice" else batch
    options = {
        "path": {"path": "warp"},
        "a path of devices": {"path": "kernel"},
        "no SMs": {"max_sms": 0},
        "no number of SMs": {"max_sms": 1.5},
        "a stream": {"stream": object()},
    }
    return {"batch": blocks, "free": how != "failed", **options.get(how, {})}


class FailedTransfer:
    error = TransferError("the blocks were never filled")

    def done(self) -> bool:
        return True

    def require_success(self) -> None:
        raise self.error


class TestNothingIsEvictedInVain:
    @pytest.mark.parametrize(
        ("how", "error"),
        [
            ("path", ValueError),
            ("a path of devices", ValueError),
            ("no SMs", ValueError),
            ("no number of SMs", TypeError),
            ("a stream", ValueError),
            ("pinned", LifetimeError),
            ("referenced", LifetimeError),
            ("named twice", InvalidFreeError),
            ("failed", TransferError),
        ],
    )
    def test_for_an_offload_that_is_refused(self, how: str, error: type[Exception]) -> None:
        store, near = store_of(4, 1, 2, 3, 4), heap_of(4)
        arguments = refused_moves(near, how)
        with pytest.raises(error):
            store.offload([8, 9], **arguments)  # type: ignore[arg-type]
        assert ready(store, range(10)) == [1, 2, 3, 4]
        assert near.stats().allocated_bytes == 2 * CHUNK
        assert store.stats().stores_in_flight == 0

    @pytest.mark.parametrize(
        ("slots", "error"),
        [
            (torch.tensor([*range(1023), 2048]), ValueError),
            (torch.tensor([-2, *range(1, 1024)]), ValueError),
            (torch.arange(1024.0), TypeError),
            (BlockIds(torch.tensor([*range(63), 128])), ValueError),
        ],
    )
    def test_for_slots_that_are_refused(self, slots: object, error: type[Exception]) -> None:
        store = store_of(2, 1, 2)
        cache = PagedKVCache.of("vllm-flash-nhd", [torch.zeros(2, 128, 16, 1, 2).half()])
        with pytest.raises(error):
            store.store_from_engine([8, 9], cache, slots)  # type: ignore[arg-type]
        assert ready(store, range(10)) == [1, 2]

    def test_where_the_holes_of_others_are_too_small(self) -> None:
        """Half a chunk is free at each of four places, and evictions make room for three more."""
        heap = heap_of(8, align_bytes=CHUNK // 2)
        store: PrefixStore = PrefixStore(heap, LAYOUT)
        halves = heap.batched_allocate([CHUNK // 2], torch.uint8, 8)
        assert halves is not None
        store.store([1, 2, 3, 4], contents([1, 2, 3, 4]))
        heap.batched_free(halves[:8:2])
        assert heap.stats().free_bytes == 2 * CHUNK
        with store.hold([1]), pytest.raises(RequestTooLargeError) as caught:
            store.store([5, 6, 7, 8, 9], contents([5, 6, 7, 8, 9]))
        assert caught.value.evictable_bytes == 3 * CHUNK
        assert ready(store, range(10)) == [1, 2, 3, 4]
        assert store.stats().evicted_chunks == 0
        store.store([5, 6, 7], contents([5, 6, 7]))
        assert len(store) == 4

    def test_holes_beside_chunks_count_if_both_together_are_large_enough(self) -> None:
        heap = heap_of(3, align_bytes=CHUNK // 2)
        store: PrefixStore = PrefixStore(heap, LAYOUT)
        half = heap.batched_allocate([CHUNK // 2], torch.uint8, 1)
        store.store([1], contents([1]))
        other = heap.batched_allocate([CHUNK // 2], torch.uint8, 1)
        store.store([2], contents([2]))
        assert half is not None
        assert other is not None
        heap.batched_free(half)
        heap.batched_free(other)
        assert heap.max_batch(LAYOUT.shapes[0], LAYOUT.dtypes[0]) == 0
        store.store([3, 4, 5], contents([3, 4, 5]))  # 12 KiB, of which 8 were two chunks
        assert ready(store, range(10)) == [3, 4, 5]

    def test_where_others_hold_what_could_be_evicted(self) -> None:
        store = store_of(4, 1, 2, 3, 4)
        for chunk in store.chunks([1, 2, 3]):
            chunk.pin()
        store.remove([])
        with pytest.raises(RequestTooLargeError):
            store.store([7, 8, 9, 10, 11], contents([7, 8, 9, 10, 11]))
        assert ready(store, range(10)) == [1, 2, 3, 4]


def test_a_store_that_is_cleared_in_flight_never_says_ready() -> None:
    store = store_of(6)
    whole, half = store.begin([1, 2]), store.begin([3, 4])
    store.remove([3])
    half.complete()
    assert (half.state, ready(store, range(6))) == ("ready", [4])
    store.clear()
    whole.complete()
    whole.complete()
    whole.abort()
    assert (whole.state, ready(store, range(6))) == ("removed", [])
    assert store.heap.stats().allocated_bytes == 0


@pytest.mark.parametrize("number", [float("nan"), 1.0, True, "1", None])
def test_numbers_of_an_index_are_integers(number: object) -> None:
    index: PrefixIndex[int, int] = PrefixIndex()
    with pytest.raises(TypeError, match="num_bytes must be an integer"):
        index.evict(number)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="size_bytes of 1 must be an integer"):
        index.begin([1], [1], [number])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="size_bytes of 1 must be an integer"):
        index.begin([1], [1], number if isinstance(number, float) else [number])  # type: ignore[arg-type, list-item]
    with pytest.raises(TypeError, match="min_uses must be an integer"):
        S3FIFO(number)  # type: ignore[arg-type]
    assert index.stats().pending_chunks == 0


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0, True, "1", None])
def test_costs_are_finite_numbers(cost: object) -> None:
    index: PrefixIndex[int, int] = PrefixIndex(GDSF(lambda size_bytes: cost))  # type: ignore[arg-type, return-value]
    with pytest.raises((ValueError, TypeError), match=r"cost\(10\) must be a non-negative finite"):
        index.begin([1], [1], 10).complete()
    with pytest.raises(TypeError, match="cost must be a function"):
        GDSF(1.0)  # type: ignore[arg-type]
    assert len(index) == 1  # found, in the order of LRU
    assert index.evict(10) == [(1, 1)]


def test_a_store_goes_with_its_last_reference() -> None:
    """Without the cycle collector, whatever is in flight, held or pending."""
    gc.collect()
    gc.disable()
    try:
        for order in itertools.permutations(range(3)):
            store = store_of(6, 1, 2, 3)
            near = heap_of(2)
            batch = near.batched_allocate(LAYOUT.shapes[0], LAYOUT.dtypes[0], 1, LAYOUT.fmt)
            flights = [store.offload([8], batch, free=True), store.begin([9])]  # type: ignore[arg-type]
            hold = store.hold([1, 2])
            store.remove([1])
            with pytest.raises(ValueError, match="stored already"):
                store.store([2], contents([2]))
            memory = [weakref.ref(heap.buffer.untyped_storage()) for heap in (near, store.heap)]
            held: list[object] = [[store, near], hold, [flights, batch]]
            del store, near, batch, flights, hold
            for index in order:
                held[index] = None
            host_queue.run([lambda: None], False)[0].synchronize()
            assert [buffer() is None for buffer in memory] == [True, True], order
    finally:
        gc.enable()
