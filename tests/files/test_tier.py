"""What a tier stores, finds, loads, evicts, removes and refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")

from file_tiers import (
    LAYOUT,
    PLACE,
    expected,
    fill,
    key_of,
    make_heap,
    open_tier,
    stored,
    wrong_rows,
)

from kvheap import (
    AdHocMemoryAllocator,
    BlockLayout,
    ClosedError,
    HostMemoryAllocator,
    LifetimeError,
    MemoryFormat,
    PagedTensorMemoryAllocator,
    TensorMemoryAllocator,
    TransferError,
)
from kvheap.errors import HeapCorruptionError
from kvheap.files import FileTier, MissingChunksError
from kvheap.files.chunk_file import ChunkFile
from kvheap.files.chunk_index import ChunkIndex
from kvheap.prefix.orders import ORDERS

NAMES = [key_of(number) for number in range(20)]


@pytest.fixture
def heap() -> HostMemoryAllocator:
    return make_heap()


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[FileTier]:
    tier = open_tier(tmp_path / "tier")
    yield tier
    tier.check()
    tier.close()


def two_buffers() -> TensorMemoryAllocator:
    heap = TensorMemoryAllocator(torch.zeros(5 * PLACE, dtype=torch.uint8))
    heap.add_buffer(torch.zeros(40 * PLACE, dtype=torch.uint8))
    return heap


HEAPS: dict[str, Callable[[], Any]] = {
    "aligned": make_heap,
    "a tensor": lambda: TensorMemoryAllocator(torch.zeros(64 * PLACE, dtype=torch.uint8)),
    "not aligned": lambda: TensorMemoryAllocator(
        torch.zeros(64 * PLACE + 99, dtype=torch.uint8)[24:]
    ),
    "two buffers": two_buffers,
    "small alignment": lambda: HostMemoryAllocator(64 * PLACE, align_bytes=256),
    "large alignment": lambda: HostMemoryAllocator(64 * PLACE, align_bytes=2 * PLACE),
}


class TestStoreAndLoad:
    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("name", HEAPS)
    def test_what_is_stored_is_loaded(self, tmp_path: Path, name: str, direct: bool) -> None:
        heap = HEAPS[name]()
        numbers = [3, 1, 2, 9, 8, 7, 5]
        with open_tier(tmp_path / "tier", direct=direct) as tier:
            keys = stored(tier, heap, numbers)
            hole = heap.batched_allocate([2048], torch.int64, 1)  # so that blocks are no neighbours
            other = keys[::-1][:5]
            loading = tier.load(other, heap)
            assert loading is not None
            loading.result(60)
            assert not wrong_rows(other, loading.batch)
            heap.batched_free(hole)
            tier.check()
            stats = tier.stats()
            assert (stats.stored_chunks, stats.loaded_chunks, stats.missed_chunks) == (7, 5, 0)
            assert stats.written_bytes == 7 * PLACE
            assert stats.read_bytes == 5 * PLACE
            assert stats.direct_bytes in (0, 12 * PLACE)
            if not direct:
                assert not stats.direct_bytes
                assert not stats.is_direct

    @pytest.mark.parametrize("size_bytes", [1, 100, 4096, 4608, 5000, 8192, 12289])
    @pytest.mark.parametrize("kind", ["host", "pages", "tight"])
    def test_chunks_of_any_size(self, tmp_path: Path, size_bytes: int, kind: str) -> None:
        layout = BlockLayout.of([size_bytes], torch.uint8, MemoryFormat.UNDEFINED)
        memory = torch.zeros(40 * size_bytes, dtype=torch.uint8)
        heap: Any
        if kind == "host":
            heap = HostMemoryAllocator(1 << 20)
        elif kind == "pages":
            heap = PagedTensorMemoryAllocator(memory, [size_bytes], torch.uint8, layout.fmt)
        else:
            heap = HostMemoryAllocator(1 << 20, align_bytes=512)
        kv = torch.randint(0, 256, (6, size_bytes), dtype=torch.uint8)
        batch = heap.batched_allocate([size_bytes], torch.uint8, 6, layout.fmt, source=kv)
        around = heap.batched_allocate([size_bytes], torch.uint8, 4, layout.fmt)
        target = heap.batched_allocate([size_bytes], torch.uint8, 6, layout.fmt)
        behind = heap.batched_allocate([size_bytes], torch.uint8, 4, layout.fmt)
        for each in [*around, *behind, *target]:
            each.tensor.fill_(77)
        with FileTier(tmp_path / "tier", 1 << 20, layout, namespace="m") as tier:
            tier.store(NAMES[:6], batch).result(60)
            tier.load(NAMES[:6], target).result(60)
            tier.check()
        assert all(torch.equal(target[row].tensor, kv[row]) for row in range(6))
        assert all((each.tensor == 77).all() for each in [*around, *behind])

    def test_objects_of_several_batches(self, tier: FileTier, heap: HostMemoryAllocator) -> None:
        one, two = fill(heap, NAMES[:3]), fill(heap, NAMES[3:6])
        tier.store(NAMES[1:5], [one[1], one[2], two[0], two[1]]).result(60)
        blanks = [fill(heap, NAMES[7:10]), fill(heap, NAMES[7:10])]
        loading = tier.load([NAMES[4], NAMES[1]], [blanks[1][2], blanks[0][0]])
        assert loading is not None
        assert loading.batch is None
        loading.result(60)
        assert not wrong_rows([NAMES[4], NAMES[1]], [blanks[1][2], blanks[0][0]])
        assert not wrong_rows([NAMES[7], NAMES[8]], [blanks[1][0], blanks[1][1]])

    def test_nothing(self, tier: FileTier, heap: HostMemoryAllocator) -> None:
        tier.store([], []).result(60)
        loading = tier.load([], heap)
        assert loading is not None
        assert loading.succeeded(60).tolist() == []
        assert tier.lookup([]).tolist() == []
        assert tier.keys() == []
        assert tier.remove([]) == []

    def test_one_key_may_be_loaded_into_two_blocks(
        self, tier: FileTier, heap: HostMemoryAllocator
    ) -> None:
        stored(tier, heap, [1, 2])
        keys = [NAMES[1], NAMES[2], NAMES[1]]
        loading = tier.load(keys, heap)
        assert loading is not None
        loading.result(60)
        assert not wrong_rows(keys, loading.batch)

    def test_a_chunk_that_is_there_is_not_written_again(
        self, tier: FileTier, heap: HostMemoryAllocator
    ) -> None:
        stored(tier, heap, [1, 2])
        batch = fill(heap, NAMES[1:4])
        assert tier.store(NAMES[1:4], batch).succeeded(60).all()
        assert tier.stats().stored_chunks == 3
        assert tier.stats().written_bytes == 3 * PLACE

    def test_a_heap_without_room(self, tier: FileTier, heap: HostMemoryAllocator) -> None:
        stored(tier, heap, [1])
        rest = heap.batched_allocate([2048], torch.int64, 64)
        assert rest is not None
        assert tier.load([NAMES[1]], heap) is None

    def test_await_and_with(self, tier: FileTier, heap: HostMemoryAllocator) -> None:
        async def both() -> None:
            await tier.store(NAMES[:2], fill(heap, NAMES[:2]))
            loading = tier.load(NAMES[:2], heap)
            assert loading is not None
            await loading
            assert not wrong_rows(NAMES[:2], loading.batch)
            with pytest.raises(MissingChunksError):
                await tier.load(NAMES[:3], heap)  # type: ignore[misc]
            with pytest.raises(MissingChunksError):
                async with tier.load(NAMES[:3], heap):  # type: ignore[union-attr]
                    pass
            async with tier.load(NAMES[:2], heap) as again:  # type: ignore[union-attr]
                pass
            assert again.done()

        asyncio.run(both())
        with tier.store(NAMES[2:4], fill(heap, NAMES[2:4])) as storing:
            pass
        assert storing.done()
        assert "h2f by file" in repr(storing)

    def test_tokens_of_the_blocks_are_forgotten(
        self, tier: FileTier, heap: HostMemoryAllocator
    ) -> None:
        stored(tier, heap, [1])
        batch = fill(heap, NAMES[5:6])
        batch.stored_tokens.set_first(3)
        tier.load([NAMES[1]], batch).result(60)  # type: ignore[union-attr]
        assert batch.num_tokens is None


class TestMisses:
    def test_what_is_missing_is_named_and_the_rest_is_there(
        self, tier: FileTier, heap: HostMemoryAllocator
    ) -> None:
        stored(tier, heap, [1, 2, 3])
        keys = [NAMES[1], NAMES[9], NAMES[3]]
        loading = tier.load(keys, heap)
        assert loading is not None
        with pytest.raises(MissingChunksError, match=r"not in the tier: b'.*t'") as caught:
            loading.result(60)
        assert caught.value.missing == (NAMES[9],)
        assert caught.value.damaged == caught.value.failed == ()
        assert isinstance(loading.transfer.error, TransferError)
        with pytest.raises(TransferError):  # nobody reads by accident what has not arrived
            _ = loading.batch[0].tensor  # type: ignore[index]
        is_there = loading.succeeded()
        assert is_there.tolist() == [True, False, True]
        assert not wrong_rows(keys, loading.batch, is_there.tolist())
        assert tier.stats().missed_chunks == 1

    def test_blocks_that_are_not_filled_stay_as_they_are(
        self, tier: FileTier, heap: HostMemoryAllocator
    ) -> None:
        stored(tier, heap, [1])
        batch = fill(heap, [NAMES[5], NAMES[6]])
        tier.load([NAMES[1], NAMES[9]], batch).succeeded(60)  # type: ignore[union-attr]
        assert not wrong_rows([NAMES[1], NAMES[6]], batch)


class TestEviction:
    @pytest.mark.parametrize("policy", sorted(ORDERS))
    def test_the_bytes_are_bounded(
        self, tmp_path: Path, heap: HostMemoryAllocator, policy: str
    ) -> None:
        with open_tier(tmp_path / "tier", 10, policy=policy) as tier:
            for number in range(0, 60, 3):
                stored(tier, heap, range(number, number + 3))
                tier.check()
            stats = tier.stats()
            assert (stats.ready_chunks, stats.free_bytes, stats.evicted_chunks) == (10, 0, 50)
            keys = tier.keys()
            loading = tier.load(keys, heap)
            assert loading is not None
            loading.result(60)
            assert not wrong_rows(keys, loading.batch)
        files = (tmp_path / "tier").iterdir()
        assert sum(file.stat().st_size for file in files if file.name == "chunks") == 10 * PLACE

    def test_a_load_and_a_touch_are_uses(self, tmp_path: Path, heap: HostMemoryAllocator) -> None:
        with open_tier(tmp_path / "tier", 4) as tier:
            stored(tier, heap, [1])
            stored(tier, heap, [2])
            stored(tier, heap, [3])
            stored(tier, heap, [4])
            tier.load([NAMES[1]], heap).result(60)  # type: ignore[union-attr]
            tier.touch([NAMES[2], NAMES[9]])
            tier.lookup([NAMES[3]])
            tier.check()  # behind the touch
            stored(tier, heap, [5, 6])
            assert tier.lookup(NAMES[1:7]).tolist() == [True, True, False, False, True, True]

    def test_uses_count_before_a_store_evicts_however_late_their_thread_is(
        self, tmp_path: Path, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ChunkFile, "count_uses", lambda file: None)  # it never comes
        with open_tier(tmp_path / "tier", 3) as tier:
            stored(tier, heap, [1])
            stored(tier, heap, [2])
            stored(tier, heap, [3])
            tier.touch([NAMES[1]])
            stored(tier, heap, [4])
            assert tier.lookup(NAMES[1:5]).tolist() == [True, False, True, True]
            tier.touch([NAMES[3]])
            tier.load([NAMES[1]], heap).result(60)  # type: ignore[union-attr]
            stored(tier, heap, [5, 6])
            assert tier.lookup(NAMES[1:7]).tolist() == [True, False, False, False, True, True]

    def test_more_than_the_tier_holds(self, tmp_path: Path, heap: HostMemoryAllocator) -> None:
        with open_tier(tmp_path / "tier", 4) as tier:
            storing = tier.store(NAMES[:6], fill(heap, NAMES[:6]))
            assert storing.succeeded(60).tolist() == [True] * 4 + [False] * 2
            with pytest.raises(TransferError, match="2 of 6 chunks were not moved"):
                storing.result()
            assert tier.stats().refused_chunks == 2


class TestRemove:
    def test_what_is_removed_is_not_found(self, tmp_path: Path, heap: HostMemoryAllocator) -> None:
        with open_tier(tmp_path / "tier") as tier:
            stored(tier, heap, [1, 2, 3])
            assert tier.remove([NAMES[2], NAMES[9], NAMES[2]]) == [NAMES[2]]
            assert tier.lookup(NAMES[1:4]).tolist() == [True, False, True]
            assert sorted(tier.keys()) == [NAMES[1], NAMES[3]]
            tier.check()
            stored(tier, heap, [2])
            assert tier.remove([NAMES[1]]) == [NAMES[1]]
        with open_tier(tmp_path / "tier") as tier:
            assert sorted(tier.keys()) == [NAMES[2], NAMES[3]]


class TestDamage:
    def spoil(self, folder: Path, place: int, offset: int = 100) -> None:
        with open(folder / "chunks", "r+b") as file:
            file.seek(place * PLACE + offset)
            byte = file.read(1)
            file.seek(place * PLACE + offset)
            file.write(bytes([byte[0] ^ 1]))

    @pytest.mark.parametrize("offset", [0, 8191, PLACE - 1])
    @pytest.mark.parametrize("is_restarted", [True, False])
    def test_one_wrong_bit_is_found_and_named(
        self, tmp_path: Path, heap: HostMemoryAllocator, offset: int, is_restarted: bool
    ) -> None:
        tier = open_tier(tmp_path / "tier")
        keys = stored(tier, heap, [1, 2, 3, 4])
        if is_restarted:
            tier.close()
        self.spoil(tmp_path / "tier", 2, offset)
        if is_restarted:
            tier = open_tier(tmp_path / "tier")
        loading = tier.load(keys, heap)
        assert loading is not None
        with pytest.raises(MissingChunksError, match="damaged, and removed") as caught:
            loading.result(60)
        assert caught.value.damaged == (NAMES[3],)
        assert loading.succeeded().tolist() == [True, True, False, True]
        assert tier.lookup(keys).tolist() == [True, True, False, True]
        assert tier.stats().damaged_chunks == 1
        tier.check()
        assert stored(tier, heap, [3])
        tier.load(keys, heap).result(60)  # type: ignore[union-attr]
        tier.close()
        with open_tier(tmp_path / "tier") as tier:
            assert tier.lookup(keys).all()

    def test_two_chunks_that_changed_places(
        self, tmp_path: Path, heap: HostMemoryAllocator
    ) -> None:
        with open_tier(tmp_path / "tier") as tier:
            keys = stored(tier, heap, [1, 2])
            with open(tmp_path / "tier" / "chunks", "r+b") as file:
                whole = file.read(2 * PLACE)
                file.seek(0)
                file.write(whole[PLACE:] + whole[:PLACE])
            loading = tier.load(keys, heap)
            assert loading is not None
            assert not loading.succeeded(60).any()

    def test_equal_bytes_under_another_key_are_wrong_too(
        self, tmp_path: Path, heap: HostMemoryAllocator
    ) -> None:
        tier = open_tier(tmp_path / "tier")
        keys = stored(tier, heap, [1, 2])
        tier.close()
        index = ChunkIndex(tmp_path / "tier" / "index", 16, is_durable=False)
        one, two = sorted(index.entries())  # type: ignore[type-var]
        index.write([], [one._replace(address=two.address, digest=two.digest)])  # type: ignore[union-attr]
        index.close()
        with open_tier(tmp_path / "tier") as tier:
            loading = tier.load(keys, heap)
            assert loading is not None
            is_right = loading.succeeded(60).tolist()
            assert not is_right[0]
            tier.check()

    def test_a_file_that_was_cut(self, tmp_path: Path, heap: HostMemoryAllocator) -> None:
        with open_tier(tmp_path / "tier") as tier:
            keys = stored(tier, heap, [1, 2, 3])
            os.truncate(tmp_path / "tier" / "chunks", 2 * PLACE + 5000)
            loading = tier.load(keys, heap)
            assert loading is not None
            assert loading.succeeded(60).tolist() == [True, True, False]
            assert not wrong_rows(keys[:2], loading.batch)
            assert tier.stats().damaged_chunks == 1


class TestFaults:
    def at_place(self, place: int, error: OSError, call: Any) -> Any:
        """A call that fails if it touches a place."""

        def fail(fd: int, buffers: Any, address: int) -> int:
            end = address + sum(buffer.nbytes for buffer in buffers)
            if address < (place + 1) * PLACE and end > place * PLACE:
                raise error
            return call(fd, buffers, address)

        return fail

    def test_a_chunk_that_cannot_be_read_is_damaged_and_its_neighbours_are_loaded(
        self, tier: FileTier, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = stored(tier, heap, [1, 2, 3, 4])
        lost = self.at_place(1, OSError(errno.EIO, "bad sector"), os.preadv)
        monkeypatch.setattr(os, "preadv", lost)
        loading = tier.load(keys, heap)
        assert loading is not None
        assert loading.succeeded(60).tolist() == [True, False, True, True]
        assert not wrong_rows(keys, loading.batch, [True, False, True, True])
        assert not tier.lookup([NAMES[2]]).any()

    def test_a_chunk_that_cannot_be_read_for_now_stays(
        self, tier: FileTier, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = stored(tier, heap, [1, 2])
        with monkeypatch.context() as patch:
            for_now = self.at_place(1, OSError(errno.ENOMEM, "no memory"), os.preadv)
            patch.setattr(os, "preadv", for_now)
            loading = tier.load(keys, heap)
            assert loading is not None
            with pytest.raises(MissingChunksError, match="could not be read") as caught:
                loading.result(60)
        assert caught.value.failed == (NAMES[2],)
        assert isinstance(caught.value.__cause__, OSError)
        tier.load(keys, heap).result(60)  # type: ignore[union-attr]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
    def test_what_cannot_be_written_is_not_there(
        self,
        tmp_path: Path,
        heap: HostMemoryAllocator,
        number: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("kvheap.files.pieces.PIECE_BYTES", 2 * PLACE)
        with open_tier(tmp_path / "tier", 6) as tier:
            stored(tier, heap, [11, 12, 13])
            with monkeypatch.context() as patch:
                full = self.at_place(4, OSError(number, "it is full"), os.pwritev)
                patch.setattr(os, "pwritev", full)
                storing = tier.store(NAMES[:6], fill(heap, NAMES[:6]))
                with pytest.raises(TransferError, match="it is full") as caught:
                    storing.result(60)
                assert isinstance(caught.value.__cause__, OSError)
                is_there = storing.succeeded()
                assert 0 < is_there.sum() < 6
                assert tier.lookup(NAMES[:6]).tolist() == is_there.tolist()
            tier.check()
            assert tier.store(NAMES[:6], fill(heap, NAMES[:6])).succeeded(60).all()
            tier.load(NAMES[:6], heap).result(60)  # type: ignore[union-attr]
        with open_tier(tmp_path / "tier", 6) as tier:
            loading = tier.load(NAMES[:6], heap)
            assert loading is not None
            loading.result(60)
            assert not wrong_rows(NAMES[:6], loading.batch)

    @pytest.mark.parametrize("at", range(1, 5))
    def test_an_index_that_cannot_be_written(
        self, tmp_path: Path, heap: HostMemoryAllocator, at: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whichever transaction fails, what is found is right, also after a restart."""
        real, calls = ChunkIndex.write, []

        def fail(self: ChunkIndex, *arguments: Any) -> None:
            calls.append(1)
            if len(calls) == at:
                raise OSError(errno.ENOSPC, "the index is full")
            real(self, *arguments)

        tier = open_tier(tmp_path / "tier", 4)
        stored(tier, heap, [11, 12, 13, 14])
        with monkeypatch.context() as patch:
            patch.setattr(ChunkIndex, "write", fail)
            for first in (0, 2):
                names = NAMES[first : first + 2]
                tier.store(names, fill(heap, names)).succeeded(60)
                tier.check()
        keys = tier.keys()
        assert len(keys) in (2, 4)
        tier.load(keys, heap).result(60)  # type: ignore[union-attr]
        tier.close()
        with open_tier(tmp_path / "tier", 4) as tier:
            assert sorted(tier.keys()) == sorted(keys)
            tier.load(keys, heap).result(60)  # type: ignore[union-attr]
            assert tier.stats().damaged_chunks == 0

    def test_what_cannot_be_synchronized_is_not_stored(
        self, tmp_path: Path, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_tier(tmp_path / "tier", durable=True) as tier:
            stored(tier, heap, [1])

            def fail(fd: int) -> None:
                raise OSError(errno.EIO, "lost")

            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fail)
                storing = tier.store(NAMES[2:4], fill(heap, NAMES[2:4]))
                assert not storing.succeeded(60).any()
            tier.check()
            assert tier.keys() == [NAMES[1]]


class TestArguments:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ("ab", "for one key pass"),
            (b"ab", "for one key pass"),
            (["a"], "must be bytes, got 'a'"),
            ([b"a", 1], "must be bytes, got 1"),
            ([b""], "1 to 511 bytes, got 0"),
            ([b"x" * 512], "1 to 511 bytes, got 512"),
            (None, "keys must be"),
            ({b"a"}, "which has no order"),
        ],
    )
    def test_wrong_keys(
        self, tier: FileTier, heap: HostMemoryAllocator, keys: Any, message: str
    ) -> None:
        batch = fill(heap, NAMES[:1])
        calls: list[Callable[[], Any]] = [
            lambda: tier.store(keys, batch),
            lambda: tier.load(keys, batch),
            lambda: tier.load(keys, heap),
        ]
        if not isinstance(keys, set):
            calls += [
                lambda: tier.lookup(keys),
                lambda: tier.remove(keys),
                lambda: tier.touch(keys),
            ]
        for call in calls:
            with pytest.raises((TypeError, ValueError), match=message):
                call()
        assert heap.stats().allocated_bytes == PLACE
        assert tier.stats().stored_chunks == 0

    def test_the_longest_key(self, tier: FileTier, heap: HostMemoryAllocator) -> None:
        batch = fill(heap, NAMES[:1])
        tier.store([b"x" * 511], batch).result(60)
        assert tier.lookup([b"x" * 511]).all()

    def test_wrong_blocks(self, tier: FileTier, heap: HostMemoryAllocator) -> None:
        batch = fill(heap, NAMES[:2])
        floats = heap.batched_allocate([2048], torch.float64, 1)
        raw = AdHocMemoryAllocator().batched_allocate([2048], torch.int64, 1)
        freed = fill(heap, NAMES[:1])
        heap.batched_free(freed)
        cases: list[tuple[Any, Any, str]] = [
            (NAMES[:1], batch, "1 keys need as many blocks, got 2"),
            (NAMES[:1], floats, "must be .*int64.*got .*float64"),
            (NAMES[:1], raw, "blocks of a heap"),
            (NAMES[:1], batch[0], "must be a MemoryBatch or a list"),
            (NAMES[:1], None, "must be a MemoryBatch or a list"),
            (NAMES[:1], freed, "is freed"),
        ]
        for keys, blocks, message in cases:
            for call in (tier.store, tier.load):
                with pytest.raises((TypeError, ValueError, LifetimeError), match=message):
                    call(keys, blocks)
        with pytest.raises(ValueError, match="a chunk twice"):
            tier.store([NAMES[0], NAMES[0]], batch)
        with pytest.raises(ValueError, match="a block twice"):
            tier.load(NAMES[:2], [batch[0], batch[0]])
        assert tier.stats().stored_chunks == 0

    def test_a_view_is_read_but_not_filled(self, tmp_path: Path) -> None:
        heap = HostMemoryAllocator(64 * PLACE, shared=True)
        batch = fill(heap, NAMES[:2])
        view = heap.view(batch.metadata, writable=False)
        with open_tier(tmp_path / "tier") as tier:
            tier.store(NAMES[:2], view).result(60)
            with pytest.raises(ValueError, match="view"):
                tier.load(NAMES[:2], view)

    def test_memory_of_a_device(
        self, tier: FileTier, heap: HostMemoryAllocator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = fill(heap, NAMES[:1])
        device = property(lambda self: torch.device("cuda", 0))
        monkeypatch.setattr(HostMemoryAllocator, "device", device, raising=False)
        for call in (
            lambda: tier.store(NAMES[:1], batch),
            lambda: tier.load(NAMES[:1], batch),
            lambda: tier.load(NAMES[:1], heap),
        ):
            with pytest.raises(ValueError, match=r"host memory, got a heap on cuda:0.*offload"):
                call()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"path": 3}, "path must be"),
            ({"size": -1}, "size must be non-negative"),
            ({"size": 4096.0}, "size must be an integer"),
            ({"size": PLACE - 1}, "size must be at least 16384"),
            ({"size": 1 << 63}, r"size must be less than 2\*\*63"),
            ({"layout": [2048]}, "layout must be a BlockLayout"),
            ({"namespace": ""}, "namespace must name"),
            ({"namespace": None}, "namespace must be a text"),
            (
                {"policy": "random"},
                "policy must be one of lru, arc, s3fifo, adaptive, got 'random'",
            ),
            ({"policy": None}, "policy must be one of"),
            ({"threads": 0}, "threads must be positive"),
            ({"direct": 1}, "direct must be True or False"),
            ({"durable": "no"}, "durable must be True or False"),
        ],
    )
    def test_wrong_options(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        options: dict[str, Any] = {
            "path": tmp_path / "tier",
            "size": 16 * PLACE,
            "layout": LAYOUT,
            "namespace": "m",
        }
        with pytest.raises((TypeError, ValueError), match=message):
            FileTier(**options | change)
        assert not (tmp_path / "tier").exists()

    @pytest.mark.parametrize("name", ["lmdb", "xxhash"])
    def test_without_the_extra(
        self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"{name}.*pip install lmdb xxhash"):
            open_tier(tmp_path / "tier")
        assert not (tmp_path / "tier").exists()


class TestCheck:
    def test_it_sees_what_the_index_has_wrong(
        self, tmp_path: Path, heap: HostMemoryAllocator
    ) -> None:
        tier = open_tier(tmp_path / "tier")
        stored(tier, heap, [1, 2])
        index = tier._file._index
        entries = [*index.entries()]
        for spoil, message in (
            (lambda: index.write([NAMES[1]]), "has None for the ready"),
            (lambda: index.write([], [entries[0]._replace(digest=5)]), "for the ready"),  # type: ignore[union-attr]
            (lambda: index.write([], [entries[0]._replace(key=b"z")]), "not in the books"),  # type: ignore[union-attr]
        ):
            tier.check()
            spoil()
            with pytest.raises(HeapCorruptionError, match=message):
                tier.check()
            index.write([b"z"], entries)  # type: ignore[arg-type]
        tier.close()

    def test_after_close(self, tmp_path: Path, heap: HostMemoryAllocator) -> None:
        tier = open_tier(tmp_path / "tier")
        batch = fill(heap, NAMES[:1])
        tier.store(NAMES[:1], batch).result(60)
        tier.close()
        tier.close()
        calls: list[Callable[[], Any]] = [
            lambda: tier.lookup(NAMES),
            tier.keys,
            tier.check,
            lambda: tier.store(NAMES[:1], batch),
            lambda: tier.load(NAMES[:1], heap),
            lambda: tier.remove(NAMES),
            lambda: tier.touch(NAMES),
        ]
        for call in calls:
            with pytest.raises(ClosedError, match="is closed"):
                call()
        assert tier.stats().ready_chunks == 1
        assert heap.stats().allocated_bytes == PLACE
        with pytest.raises(ValueError, match="timeout_s"):
            tier.close(-1)


def test_expected_chunks_differ() -> None:
    """The other tests compare with these."""
    assert len({expected(name).numpy().tobytes() for name in NAMES}) == len(NAMES)
    assert np.array_equal(expected(NAMES[1]), expected(NAMES[1]))
