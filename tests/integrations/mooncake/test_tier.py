"""A tier over a stand-in for Mooncake Store's client: what is checked, protected and refused.

``test_real.py`` meets the real client and master.
"""

from __future__ import annotations

import gc
import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_mooncake import FakeStore

from kvheap import (
    BlockLayout,
    ClosedError,
    ForeignObjectError,
    HostMemoryAllocator,
    LifetimeError,
    MemoryFormat,
    TensorMemoryAllocator,
    TransferError,
)
from kvheap.integrations.mooncake import MAX_KEYS_PER_CALL, MooncakeError, MooncakeTier, connect
from kvheap.integrations.mooncake import codes as codes_module
from kvheap.integrations.mooncake.codes import have_settled

LAYOUT = BlockLayout.of([500], torch.int64, MemoryFormat.UNDEFINED)
"""4,000 bytes, in blocks of 4,096."""


def make_heap(num_chunks: int = 64) -> HostMemoryAllocator:
    return HostMemoryAllocator(num_chunks * 4096, stream_wait_s=0.0)


def chunk(number: int) -> torch.Tensor:
    return torch.arange(500) * 7919 + number * 1_000_003


def keys_of(numbers: Any) -> list[bytes]:
    return [int(number).to_bytes(8, "big") for number in numbers]


def fill(heap: Any, numbers: Any) -> Any:
    source = torch.stack([chunk(number) for number in numbers])
    return heap.batched_allocate([500], torch.int64, len(source), LAYOUT.fmt, source=source)


def empty(heap: Any, count: int) -> Any:
    batch = heap.batched_allocate([500], torch.int64, count, LAYOUT.fmt)
    for obj in batch:
        obj.tensor.fill_(-1)
    return batch


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def heap() -> HostMemoryAllocator:
    return make_heap()


@pytest.fixture
def tier(store: FakeStore, heap: HostMemoryAllocator) -> Iterator[MooncakeTier]:
    with MooncakeTier(store, heap, LAYOUT, namespace="a model") as tier:
        yield tier
    assert not store.ranges


def test_what_is_put_is_got(tier: MooncakeTier, heap: Any) -> None:
    hole = empty(heap, 1)
    batch = fill(heap, [3, 1, 2])
    heap.batched_free(hole)
    assert tier.put(keys_of([3, 1, 2]), batch).all()
    into = empty(heap, 4)
    found = tier.get(keys_of([2, 9, 3, 1]), into)
    assert found.tolist() == [True, False, True, True]
    assert [int(obj.tensor[0]) for obj in into] == [2_000_006, -1, 3_000_009, 1_000_003]
    assert torch.equal(into[2].tensor, chunk(3))
    assert tier.lookup(keys_of([9, 1])).tolist() == [False, True]


def test_objects_of_several_batches_and_buffers(store: FakeStore) -> None:
    heap = TensorMemoryAllocator(torch.zeros(5 * 4096, dtype=torch.uint8))
    with MooncakeTier(store, heap, LAYOUT, namespace="a model") as tier:
        heap.add_buffer(torch.zeros(40 * 4096, dtype=torch.uint8))  # after the tier was made
        objects = [*fill(heap, range(7)), *fill(heap, [8])][::-1]
        assert tier.put(keys_of([8, *range(7)][::1]), [objects[0], *objects[:0:-1]]).all()
        into = empty(heap, 8)[::-1]
        assert tier.get(keys_of([*range(7), 8]), into).all()
        for number, obj in zip([*range(7), 8], into, strict=True):
            assert torch.equal(obj.tensor, chunk(number))
        assert len(store.ranges) == 2
    assert not store.ranges


def test_calls_have_at_most_1024_keys(store: FakeStore) -> None:
    heap, numbers = make_heap(5000), range(2500)
    with MooncakeTier(store, heap, LAYOUT, namespace="a model") as tier:
        assert tier.put(keys_of(numbers), fill(heap, numbers)).all()
        into = empty(heap, 2500)
        assert tier.get(keys_of(numbers), into).all()
        assert tier.lookup(keys_of(numbers)).all()
        assert len(tier.remove(keys_of(numbers), force=True)) == 2500
    assert torch.equal(into[2400].tensor, chunk(2400))
    assert MAX_KEYS_PER_CALL == 1024
    assert store.calls == [
        (name, count) for name in ("put", "get", "exist", "remove") for count in (1024, 1024, 452)
    ]


def test_no_keys(tier: MooncakeTier, heap: Any, store: FakeStore) -> None:
    batch = heap.batched_allocate([500], torch.int64, 0, LAYOUT.fmt)
    assert tier.put([], batch).tolist() == tier.get([], batch).tolist() == []
    assert tier.lookup([]).tolist() == tier.remove([]) == []
    assert not store.calls


def test_a_full_store_takes_what_fits(tier: MooncakeTier, heap: Any, store: FakeStore) -> None:
    store.capacity = 2 * LAYOUT.size_bytes
    assert tier.put(keys_of(range(3)), fill(heap, range(3))).tolist() == [True, True, False]


def test_leased_chunks_are_removed_by_force_only(tier: MooncakeTier, heap: Any) -> None:
    keys = keys_of(range(3))
    tier.put(keys, fill(heap, range(3)))
    assert tier.lookup(keys[:1]).all()
    assert tier.remove([*keys, b"x"]) == keys[1:]
    assert tier.remove(keys, force=True) == keys[:1]


def test_another_namespace_or_layout_is_not_found(store: FakeStore, heap: Any) -> None:
    other = BlockLayout.of([1000], torch.int32, MemoryFormat.UNDEFINED)  # of the same size
    with MooncakeTier(store, heap, LAYOUT, namespace="a model") as tier:
        tier.put([b"k"], fill(heap, [1]))
        for layout, namespace in ((LAYOUT, "another"), (other, "a model")):
            another = make_heap()
            with MooncakeTier(store, another, layout, namespace=namespace) as elsewhere:
                assert not elsewhere.lookup([b"k"])[0]


class TestFailures:
    def test_a_value_of_another_size_is_refused(
        self, tier: MooncakeTier, heap: Any, store: FakeStore
    ) -> None:
        keys = keys_of(range(3))
        tier.put(keys, fill(heap, range(3)))
        names = list(store.values)
        store.values[names[0]] += b"more"
        store.values[names[2]] = store.values[names[2]][:100]
        into = empty(heap, 3)
        with pytest.raises(
            MooncakeError, match=r"larger than a block.*its value has 100 bytes"
        ) as e:
            tier.get(keys, into)
        assert e.value.codes == {keys[0]: -600, keys[2]: 100}
        assert e.value.succeeded.tolist() == [False, True, False]
        with pytest.raises(TransferError):
            _ = into[1].tensor
        heap.batched_free(into)
        assert heap.stats().pending_bytes == 0

    @pytest.mark.parametrize("call", ["put", "get", "exist", "remove"])
    def test_the_first_error_ends_a_call(self, store: FakeStore, call: str) -> None:
        heap, keys = make_heap(3000), keys_of(range(2500))
        batch = fill(heap, range(2500))
        store.answer = lambda name, codes: (
            [-900 if row == 7 else code for row, code in enumerate(codes)]
            if name == call
            else codes
        )
        with MooncakeTier(store, heap, LAYOUT, namespace="a model") as tier:
            if call != "put":
                tier.put(keys, batch)
            run = {
                "put": lambda: tier.put(keys, batch),
                "get": lambda: tier.get(keys, batch),
                "exist": lambda: tier.lookup(keys),
                "remove": lambda: tier.remove(keys),
            }[call]
            with pytest.raises(MooncakeError, match="the master cannot be reached") as found:
                run()
        error = pickle.loads(pickle.dumps(found.value))
        assert error.codes == {keys[7]: -900}
        assert error.untried == tuple(keys[1024:])
        assert "not tried after that" in str(error)
        assert int(error.succeeded.sum()) == 1023
        assert store.calls[-1] == (call, 1024)

    @pytest.mark.parametrize("answer", [[], [0, 0, 0], [-1]])
    def test_too_few_or_many_answers(
        self, tier: MooncakeTier, heap: Any, store: FakeStore, answer: list[int]
    ) -> None:
        batch = fill(heap, [1, 2])
        store.answer = lambda *_: answer
        with pytest.raises(TransferError, match=f"{len(answer)} results for 2 keys"):
            tier.put(keys_of([1, 2]), batch)
        with pytest.raises(TransferError, match=f"{len(answer)} results for 2 keys"):
            tier.lookup(keys_of([1, 2]))

    @pytest.mark.parametrize(
        ("call", "code", "took_s", "is_kept"),
        [
            ("get", -800, 0.0, False),
            ("get", -800, 60.0, True),
            ("put", -800, 60.0, True),
            ("get", -1, 0.0, True),
            ("get", -707, 60.0, False),
            ("put", -600, 0.0, True),
            ("get", -901, 60.0, False),
        ],
    )
    def test_blocks_that_may_still_be_written_stay_allocated(
        self,
        heap: Any,
        store: FakeStore,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        code: int,
        took_s: float,
        is_kept: bool,
    ) -> None:
        store.answer = lambda _, codes: [code] * len(codes)
        if took_s:
            monkeypatch.setattr(codes_module, "SETTLED_S", 0.0)
        with MooncakeTier(store, heap, LAYOUT, namespace="a model") as tier:
            batch = fill(heap, range(64))
            with pytest.raises(MooncakeError):
                getattr(tier, call)(keys_of(range(64)), batch)
            heap.batched_free(batch)
        assert heap.stats().pending_bytes == (64 * 4096 if is_kept else 0)
        assert (heap.batched_allocate([500], torch.int64, 1, LAYOUT.fmt) is None) == is_kept

    def test_only_what_fails_soon_has_ended(self) -> None:
        assert have_settled([4000, -704, -800], is_get=True, took_s=10.0)
        assert not have_settled([4000, -704, -800], is_get=True, took_s=60.0)

    def test_a_client_that_raises(self, tier: MooncakeTier, heap: Any, store: FakeStore) -> None:
        def fail(_: str) -> None:
            raise OSError("odd")

        store.during = fail
        batch = fill(heap, [1])
        with pytest.raises(OSError, match="odd"):
            tier.get([b"k"], batch)
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 4096
        with pytest.raises(OSError, match="odd"):
            tier.lookup([b"k"])

    def test_a_signal_after_the_answer_quarantines_nothing(
        self, tier: MooncakeTier, heap: Any, store: FakeStore
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        def answer(_: str, codes: list[int]) -> list[int]:
            return Late(codes)

        class Late(list):  # type: ignore[type-arg]
            """Raises when the answer is looked at, as a handler that runs just after the call."""

            def __len__(self) -> int:
                interrupt()
                return 0

        store.answer = answer
        batch = fill(heap, [1])
        with pytest.raises(KeyboardInterrupt):
            tier.get([b"k"], batch)
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 0


class TestLifetime:
    def test_blocks_freed_during_a_call_are_not_reused(
        self, tier: MooncakeTier, heap: Any, store: FakeStore
    ) -> None:
        seen = []

        def during(name: str) -> None:
            heap.batched_free(batch)
            other = heap.batched_allocate([500], torch.int64, 64, LAYOUT.fmt)
            seen.append((name, other is None, heap.stats().pending_bytes))

        store.during = during
        for call in (tier.put, tier.get):
            batch = fill(heap, range(64))
            store.values.clear()
            if call == tier.get:
                store.values = dict.fromkeys(
                    [tier._prefix + key.hex() for key in keys_of(range(64))], b"x" * 4000
                )
            assert call(keys_of(range(64)), batch).all()
        assert seen == [("put", True, 64 * 4096), ("get", True, 64 * 4096)]
        assert heap.batched_allocate([500], torch.int64, 64, LAYOUT.fmt) is not None

    def test_close_waits_for_calls(self, heap: Any, store: FakeStore) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def during(_: str) -> None:
            begun.set()
            assert go_on.wait(30)
            assert store.ranges

        store.during = during
        tier = MooncakeTier(store, heap, LAYOUT, namespace="a model")
        batch, found = fill(heap, [1]), []
        thread = threading.Thread(target=lambda: found.append(tier.put([b"k"], batch)))
        thread.start()
        assert begun.wait(30)
        with pytest.raises(TimeoutError, match="close it again"):
            tier.close(0.01)
        assert store.ranges
        with pytest.raises(ClosedError):
            tier.lookup([b"k"])
        go_on.set()
        tier.close(30)
        tier.close()
        thread.join()
        assert not store.ranges
        assert found[0].all()

    def test_the_memory_stays_until_the_tier_is_closed(self, store: FakeStore) -> None:
        heap = make_heap()
        tier = MooncakeTier(store, heap, LAYOUT, namespace="a model")
        ((pointer, size),) = store.ranges.items()
        heap.close()
        del heap
        gc.collect()
        assert is_mapped(pointer, size)
        with pytest.raises(ClosedError):
            tier.put([b"k"], [])
        tier.close()
        del tier
        gc.collect()
        assert not store.ranges
        assert not is_mapped(pointer, size)

    def test_a_dropped_tier_unregisters_before_its_memory_goes(self, store: FakeStore) -> None:
        heap = make_heap()
        tier = MooncakeTier(store, heap, LAYOUT, namespace="a model")
        ((pointer, size),) = store.ranges.items()
        unregister, seen = store.unregister_buffer, []
        store.unregister_buffer = lambda at: (
            seen.append(is_mapped(pointer, size)),
            unregister(at),
        )[1]  # type: ignore[method-assign]
        del tier, heap
        gc.collect()
        assert seen == [True]
        assert not is_mapped(pointer, size)

    def test_memory_that_the_client_keeps_stays(
        self, store: FakeStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        heap = make_heap()
        tier = MooncakeTier(store, heap, LAYOUT, namespace="a model")
        ((pointer, size),) = store.ranges.items()
        store.unregister_buffer = lambda _: -600  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="does not let go"):
            tier.close()
        del tier, heap
        gc.collect()
        assert "dropped without being closed" in caplog.text
        assert is_mapped(pointer, size)

    def test_a_heap_is_registered_once(
        self, tier: MooncakeTier, heap: Any, store: FakeStore
    ) -> None:
        with pytest.raises(RuntimeError, match="one tier for each heap"):
            MooncakeTier(store, heap, LAYOUT, namespace="another")
        gc.collect()
        assert store.ranges

    def test_a_forked_child_is_refused(self, tier: MooncakeTier, store: FakeStore) -> None:
        child = os.fork()
        if not child:
            status = 1
            try:
                tier.lookup([b"k"])
            except ClosedError as error:
                tier.close()
                status = 0 if "belongs to process" in str(error) and store.ranges else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestRefused:
    def test_wrong_keys(self, tier: MooncakeTier, heap: Any, store: FakeStore) -> None:
        batch = fill(heap, [1, 2])
        for keys, error, text in [
            ([b"a", b"a"], ValueError, "b'a' twice"),
            ([b"a", "b"], TypeError, "must be bytes, got 'b'"),
            ([b"a", b""], ValueError, "1 to 511 bytes"),
            ([b"a", b"x" * 512], ValueError, "1 to 511 bytes"),
            (b"ab", TypeError, "pass"),
            ({b"a", b"b"}, TypeError, "no order"),
            ([b"a"], ValueError, "1 keys need as many blocks, got 2"),
        ]:
            for call in (tier.put, tier.get):
                with pytest.raises(error, match=text):
                    call(keys, batch)  # type: ignore[operator]
        assert not store.calls

    def test_wrong_blocks(self, tier: MooncakeTier, heap: Any, store: FakeStore) -> None:
        another = make_heap()
        freed = fill(heap, [1])
        heap.batched_free(freed)
        longer = heap.batched_allocate([501], torch.int64, 1, LAYOUT.fmt)
        for blocks, error, text in [
            (fill(another, [1]), ValueError, "tier's heap"),
            (longer, ValueError, "must be"),
            (freed, LifetimeError, "freed"),
            ("ab", TypeError, "MemoryBatch"),
            (fill(heap, [1])[0], TypeError, "pass"),
        ]:
            for call in (tier.put, tier.get):
                with pytest.raises(error, match=text):
                    call([b"a"], blocks)  # type: ignore[operator]
        block = fill(heap, [1])[0]
        with pytest.raises(ValueError, match="name a block twice"):
            tier.get([b"a", b"b"], [block, block])
        assert not store.calls
        assert heap.stats().pending_bytes == 0

    def test_a_view_for_reading(self, tier: MooncakeTier, heap: Any, store: FakeStore) -> None:
        view = heap.view(fill(heap, [1]).metadata, writable=False)
        assert tier.put([b"a"], view).all()
        with pytest.raises(ForeignObjectError):
            tier.get([b"a"], view)
        assert store.calls == [("put", 1)]

    def test_wrong_arguments(self, store: FakeStore, heap: Any) -> None:
        for change, error in [
            ({"client": object()}, TypeError),
            ({"client": FakeStore}, TypeError),
            ({"heap": torch.zeros(4096)}, TypeError),
            ({"layout": [500]}, TypeError),
            ({"namespace": ""}, ValueError),
            ({"namespace": b"a"}, TypeError),
        ]:
            arguments: Any = {
                "client": store,
                "heap": heap,
                "layout": LAYOUT,
                "namespace": "a model",
                **change,
            }
            with pytest.raises(error, match=next(iter(change))):
                MooncakeTier(**arguments)
        assert not store.ranges
        heap.close()
        with pytest.raises(ClosedError):
            MooncakeTier(store, heap, LAYOUT, namespace="a model")


class TestConnect:
    @pytest.mark.parametrize("master", ["", "127.0.0.1", ":1", "host:", "host:x"])
    def test_a_wrong_address(self, master: str) -> None:
        with pytest.raises(ValueError, match="must be host:port"):
            connect(master)

    def test_without_mooncake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvheap.integrations.mooncake import connecting

        for raised, advice in [
            (
                ModuleNotFoundError("No module named 'mooncake'"),
                "pip install mooncake-transfer-engine",
            ),
            (ImportError("libibverbs.so.1: cannot open"), "apt-get install libibverbs1"),
        ]:

            def fail(_: str, error: ImportError = raised) -> Any:
                raise error

            monkeypatch.setattr(connecting, "import_module", fail)
            with pytest.raises(ImportError, match=advice):
                connect("127.0.0.1:1")

    def test_no_master(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kvheap.integrations.mooncake import connecting

        monkeypatch.setattr(connecting, "import_module", lambda _: None)
        with pytest.raises(ConnectionError, match="no Mooncake master"):
            connect("127.0.0.1:1")


def is_mapped(pointer: int, size: int) -> bool:
    """Whether memory is mapped."""
    with open("/proc/self/maps") as lines:
        spans = [line.split()[0].split("-") for line in lines]
    return any(int(a, 16) <= pointer and pointer + size <= int(b, 16) for a, b in spans)
