"""The worker over made-up KV caches: where the bytes of each group go, and what a failure does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from vllm_cpu_scenes import MadeUpCaches, chunk_bytes, chunk_of, locations, need_vllm

need_vllm()

from vllm.v1.kv_offload.base import GPULoadStoreSpec, TransferResult  # noqa: E402

from kvheap.integrations.vllm import ChunkLocations, KVHeapWorker  # noqa: E402
from kvheap.integrations.vllm.chunk_memory import FileMemory, HeapMemory  # noqa: E402
from kvheap.integrations.vllm.failures import TolerantWorker  # noqa: E402

HEAP_BYTES = 1 << 20

ONE = ([(96, 96)], [[(0, 96)]])
PADDED = ([(160, 160), (160, 192)], [[(0, 100), (1, 160)]])
UNLIKE = (
    [(128, 128), (64, 80), (1000, 1024)],
    [[(0, 128), (1, 64)], [(0, 96)], [(2, 1000), (1, 7), (0, 33)]],
)
"""Three groups: one shares its tensors with the others, and uses a part of their pages."""

LARGE = ([(65536, 65536), (4096, 8192)], [[(0, 65536)], [(1, 4096)]])
"""A job is copied in the background."""

WORLDS = {"one": ONE, "padded": PADDED, "unlike": UNLIKE, "large": LARGE}


class World:
    """A worker over made-up caches."""

    def __init__(self, shape: Any, blocks_per_chunk: int, heap_bytes: int = HEAP_BYTES) -> None:
        self.caches = MadeUpCaches(*shape)
        self.blocks_per_chunk = blocks_per_chunk
        self.memory = HeapMemory(heap_bytes, pin=False)
        self.worker = KVHeapWorker(self.caches.canonical, self.memory, blocks_per_chunk)
        self.sizes = chunk_bytes(self.caches.groups, blocks_per_chunk)
        self.caches.fill(0)

    def blocks(self, ids: list[list[int]], firsts: list[int]) -> GPULoadStoreSpec:
        return GPULoadStoreSpec(list(chain(*ids)), [len(group) for group in ids], firsts)

    def chunks(self, counts: list[int], start: int = 0) -> ChunkLocations:
        return locations(
            [size for size, n in zip(self.sizes, counts, strict=True) for _ in range(n)], start
        )

    def bytes_at(self, address: int, size: int) -> bytes:
        return self.memory.tensor[address : address + size].numpy().tobytes()

    def ended(self, *job_ids: int) -> dict[int, TransferResult]:
        self.worker.wait(set(job_ids))
        results = {result.job_id: result for result in self.worker.get_finished()}
        assert results.keys() == set(job_ids)
        return results


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    shape, blocks_per_chunk = request.param
    made = World(WORLDS[shape], blocks_per_chunk)
    yield made
    made.worker.shutdown()


def worlds(*names: str, chunks: tuple[int, ...] = (1, 2, 3)) -> Any:
    cases = [(name, n) for name in names or WORLDS for n in chunks]
    return pytest.mark.parametrize("world", cases, indirect=True, ids=lambda c: f"{c[0]}-{c[1]}")


class TestRoundTrip:
    @worlds()
    def test_chunks_hold_the_pages_of_their_group_alone(self, world: World) -> None:
        """Byte by byte, tensor after tensor, and nothing beside them is written."""
        groups, n = len(world.caches.groups), world.blocks_per_chunk
        ids = [[(7 * g + 5 * i) % 12 for i in range(2 * n)] for g in range(groups)]
        chunks = world.chunks([2] * groups)
        world.memory.tensor[: 1 << 20].fill_(0xA5)
        assert world.worker.submit_store(1, world.blocks(ids, [0] * groups), chunks)
        assert world.ended(1)[1].success
        expected = bytearray(b"\xa5" * HEAP_BYTES)
        for at, (address, size) in enumerate(
            zip(chunks.addresses.tolist(), chunks.sizes.tolist(), strict=True)
        ):
            blocks = ids[at // 2][at % 2 * n :][:n]
            expected[address : address + size] = chunk_of(world.caches, at // 2, blocks)
        assert world.bytes_at(0, HEAP_BYTES) == bytes(expected)

    @worlds()
    def test_what_was_stored_is_loaded_elsewhere_and_nothing_else_changes(
        self, world: World
    ) -> None:
        groups, n = len(world.caches.groups), world.blocks_per_chunk
        ids = [[(5 * i + g) % 12 for i in range(2 * n)] for g in range(groups)]
        chunks = world.chunks([2] * groups)
        world.worker.submit_store(1, world.blocks(ids, [0] * groups), chunks)
        assert world.ended(1)[1].success
        stored = [[world.caches.block(g, b) for b in ids[g]] for g in range(groups)]
        for group in range(groups):  # one at a time: groups share tensors
            world.caches.fill(1 + group)
            before = MadeUpCaches(*self_shape(world))
            before.fill(1 + group)
            target = [(11 - i) for i in range(2 * n)]
            held = ChunkLocations(chunks.addresses[2 * group :][:2], chunks.sizes[2 * group :][:2])
            only = [target if g == group else [] for g in range(groups)]
            world.worker.submit_load(2 + group, held, world.blocks(only, [4 * n] * groups))
            result = world.ended(2 + group)[2 + group]
            assert result.success
            assert result.transfer_size == sum(map(len, chain(*stored[group])))
            for block, pages in zip(target, stored[group], strict=True):
                assert world.caches.block(group, block) == pages
                for at, (tensor, used) in enumerate(world.caches.groups[group]):
                    before.tensors[tensor][block, :used] = torch.frombuffer(
                        bytearray(pages[at]), dtype=torch.int8
                    )
            assert world.caches.contents() == before.contents()

    @pytest.mark.parametrize("first", [0, 1, 2, 5])
    @pytest.mark.parametrize("count", [1, 2, 4])
    @worlds("unlike", chunks=(3,))
    def test_a_part_of_a_chunk_is_copied_alone(self, world: World, first: int, count: int) -> None:
        """Blocks ``first`` to ``first + count`` of a request, in chunks of 3."""
        n, skip = world.blocks_per_chunk, first % 3
        num_chunks = -(-(skip + count) // n)
        ids = [3, 9, 1, 7][:count]
        chunks = world.chunks([0, num_chunks, 0])
        world.memory.tensor[: 1 << 20].zero_()
        world.worker.submit_store(1, world.blocks([[], ids, []], [0, first, 0]), chunks)
        assert world.ended(1)[1].success
        slots: list[int | None] = [None] * skip + ids + [None] * (n * num_chunks - skip - count)
        for at, (address, size) in enumerate(
            zip(chunks.addresses.tolist(), chunks.sizes.tolist(), strict=True)
        ):
            expected = chunk_of(world.caches, 1, slots[n * at :][:n])
            assert world.bytes_at(address, size) == expected
        pages = [world.caches.block(1, block) for block in ids]
        world.caches.fill(1)
        target = [8, 4, 2, 6][:count]
        world.worker.submit_load(2, chunks, world.blocks([[], target, []], [0, first, 0]))
        assert world.ended(2)[2].success
        assert [world.caches.block(1, block) for block in target] == pages

    @worlds("one", chunks=(2,))
    def test_a_block_of_minus_one_is_skipped(self, world: World) -> None:
        chunks = world.chunks([2])
        world.memory.tensor[: 1 << 20].zero_()
        world.worker.submit_store(1, world.blocks([[-1, 5, 6, -1]], [0]), chunks)
        result = world.ended(1)[1]
        assert result.success
        assert result.transfer_size == 2 * 96
        for at, blocks in enumerate(([None, 5], [6, None])):
            address, size = int(chunks.addresses[at]), int(chunks.sizes[at])
            assert world.bytes_at(address, size) == chunk_of(world.caches, 0, blocks)

    @worlds("one", chunks=(1,))
    def test_a_load_into_the_null_block_several_times_is_none(self, world: World) -> None:
        chunks = world.chunks([3])
        world.worker.submit_store(1, world.blocks([[4, 5, 6]], [0]), chunks)
        assert world.ended(1)[1].success
        null, page = world.caches.block(0, 0), world.caches.block(0, 5)
        world.worker.submit_load(2, chunks, world.blocks([[0, 9, 0]], [0]))
        assert world.ended(2)[2].success
        assert world.caches.block(0, 9) == page
        assert world.caches.block(0, 0) == null

    @worlds("one", chunks=(1,))
    def test_a_job_without_blocks_ends(self, world: World) -> None:
        world.worker.submit_store(1, world.blocks([[]], [0]), world.chunks([0]))
        result = world.ended(1)[1]
        assert (result.success, result.transfer_size) == (True, 0)


def self_shape(world: World) -> Any:
    """The shape of which a world was made."""
    return next(shape for shape in WORLDS.values() if shape[1] is world.caches.groups)


class TestFailures:
    @pytest.mark.parametrize(
        ("ids", "addresses", "sizes"),
        [
            ([3], [HEAP_BYTES - 64], [96]),
            ([3], [HEAP_BYTES], [96]),
            ([3], [-256], [96]),
            ([3], [0], [95]),
            ([3, 4], [0], [96]),
            ([3], [0, 256], [96, 96]),
            ([12], [0], [96]),
            ([1 << 20], [0], [96]),
        ],
        ids=[
            "crosses the end",
            "behind the end",
            "before the start",
            "chunk too small",
            "too few chunks",
            "too many chunks",
            "block behind the last",
            "block far behind",
        ],
    )
    @pytest.mark.parametrize("is_store", [True, False])
    @worlds("one", chunks=(1,))
    def test_a_job_that_does_not_fit_fails_and_writes_nothing(
        self, world: World, is_store: bool, ids: list[int], addresses: list[int], sizes: list[int]
    ) -> None:
        heap, cache = world.bytes_at(0, HEAP_BYTES), world.caches.contents()
        chunks, blocks = ChunkLocations(addresses, sizes), world.blocks([ids], [0])
        submit(world, is_store, 1, blocks, chunks)
        result = world.ended(1)[1]
        assert not result.success
        assert result.transfer_size is None
        assert world.bytes_at(0, HEAP_BYTES) == heap
        assert world.caches.contents() == cache
        counts = (world.worker.num_failed_stores, world.worker.num_failed_loads)
        assert counts == ((1, 0) if is_store else (0, 1))

    @worlds("one", chunks=(1,))
    def test_a_job_of_another_tier_fails(self, world: World) -> None:
        from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

        world.worker.submit_store(1, world.blocks([[3]], [0]), CPULoadStoreSpec([0]))
        assert not world.ended(1)[1].success

    @worlds("one", chunks=(1,))
    def test_a_job_of_other_groups_fails(self, world: World) -> None:
        world.worker.submit_store(1, GPULoadStoreSpec([3, 4], [1, 1], [0, 0]), world.chunks([2]))
        assert not world.ended(1)[1].success

    @pytest.mark.parametrize("is_store", [True, False])
    @worlds("one", chunks=(1,))
    def test_a_copy_that_cannot_begin_is_a_failed_job(
        self, world: World, is_store: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise RuntimeError("CUDA error: made up")

        monkeypatch.setattr("kvheap.integrations.vllm.worker.copy", refuse)
        submit(world, is_store, 1, world.blocks([[3]], [0]), world.chunks([1]))
        assert not world.ended(1)[1].success
        monkeypatch.undo()
        submit(world, is_store, 2, world.blocks([[3]], [0]), world.chunks([1]))
        assert world.ended(2)[2].success

    @pytest.mark.parametrize("is_store", [True, False])
    @worlds("large", chunks=(2,))
    def test_a_copy_that_fails_on_the_way_is_a_failed_job(
        self, world: World, is_store: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError("made up")

        monkeypatch.setattr("kvheap.transfer.runs.copy_on_host", fail)
        submit(
            world, is_store, 1, world.blocks([list(range(1, 9)), []], [0, 0]), world.chunks([4, 0])
        )
        assert not world.ended(1)[1].success

    @worlds("one", chunks=(1,))
    def test_bytes_that_are_not_ready_are_refused(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A heap that grows in the background is used as far as it has grown."""
        monkeypatch.setattr(HeapMemory, "ready_bytes", property(lambda _: 4096))
        for job, address, is_ready in ((1, 4096 - 256, True), (2, 4096 - 64, False)):
            chunks = ChunkLocations([address], [96])
            world.worker.submit_store(job, world.blocks([[3]], [0]), chunks)
            assert world.ended(job)[job].success == is_ready


def submit(
    world: World, is_store: bool, job_id: int, blocks: GPULoadStoreSpec, chunks: ChunkLocations
) -> None:
    if is_store:
        assert world.worker.submit_store(job_id, blocks, chunks)
    else:
        assert world.worker.submit_load(job_id, chunks, blocks)


class TestJobs:
    @worlds("large", chunks=(2,))
    def test_jobs_are_reported_when_they_end_and_waited_for(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The copies stand still until they are let go."""
        import kvheap.transfer.runs as runs

        may_go, real = threading.Event(), runs.copy_on_host

        def held_up(*arguments: Any) -> None:
            may_go.wait(60)
            real(*arguments)

        monkeypatch.setattr(runs, "copy_on_host", held_up)
        blocks = world.blocks([list(range(1, 9)), []], [0, 0])
        world.worker.submit_store(1, blocks, world.chunks([4, 0]))
        world.worker.submit_store(2, blocks, world.chunks([4, 0], 1 << 19))
        assert world.worker.get_finished() == []
        waiter = threading.Thread(target=world.worker.wait, args=({1, 2, 99},))
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive()
        may_go.set()
        waiter.join(60)
        assert not waiter.is_alive()
        assert [result.job_id for result in world.worker.get_finished()] == [1, 2]
        assert world.worker.get_finished() == []

    @worlds("large", chunks=(2,))
    def test_shutdown_waits_and_can_be_repeated(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import kvheap.transfer.runs as runs

        copied, real = [], runs.copy_on_host

        def slow(*arguments: Any) -> None:
            threading.Event().wait(0.05)
            real(*arguments)
            copied.append(1)

        monkeypatch.setattr(runs, "copy_on_host", slow)
        blocks = world.blocks([list(range(1, 9)), []], [0, 0])
        world.worker.submit_store(1, blocks, world.chunks([4, 0]))
        world.worker.shutdown()
        assert copied
        world.worker.shutdown()
        assert world.worker.get_finished() == []
        world.worker.submit_store(2, blocks, world.chunks([4, 0]))
        assert [result.success for result in world.worker.get_finished()] == [False]
        world.worker.wait({2})

    def test_loads_may_be_expedited(self) -> None:
        """vLLM 0.33 says so of loads that the same step waits for."""
        world = World(ONE, 1)
        chunks = world.chunks([1])
        world.worker.submit_store(1, world.blocks([[3]], [0]), chunks)
        page = world.caches.block(0, 3)
        world.ended(1)
        world.worker.submit_load(2, chunks, world.blocks([[4]], [0]), expedited=True)
        assert world.ended(2)[2].success
        assert world.caches.block(0, 4) == page
        world.worker.shutdown()


class TestMisuse:
    def test_no_tensor(self) -> None:
        memory = HeapMemory(HEAP_BYTES, pin=False)
        with pytest.raises(ValueError, match="no KV cache tensor"):
            KVHeapWorker(MadeUpCaches([], [[]]).canonical, memory)
        with pytest.raises(ValueError, match="group has no tensor"):
            KVHeapWorker(MadeUpCaches([(96, 96)], [[]]).canonical, memory)
        memory.close()

    def test_a_page_is_larger_than_its_block(self) -> None:
        memory = HeapMemory(HEAP_BYTES, pin=False)
        with pytest.raises(ValueError, match="97 bytes, its block 96"):
            KVHeapWorker(MadeUpCaches([(96, 96)], [[(0, 97)]]).canonical, memory)
        memory.close()

    def test_another_device(self) -> None:
        caches = MadeUpCaches([(96, 96)], [[(0, 96)]]).canonical
        caches.tensors[0].tensor = caches.tensors[0].tensor.to("meta")
        memory = HeapMemory(HEAP_BYTES, pin=False)
        with pytest.raises(ValueError, match="on meta"):
            KVHeapWorker(caches, memory)
        memory.close()


class Troubled:
    """A worker that refuses job 1 by an exception and job 2 by False, and fails job 7."""

    def __init__(self) -> None:
        self.ended: list[TransferResult] = []
        self.waited: list[set[int]] = []
        self.is_mute = self.is_lost = False

    def submit_store(self, job_id: int, *_: object) -> bool:
        if job_id == 1:
            raise RuntimeError("made up: no start")
        if job_id != 2:
            self.ended.append(TransferResult(job_id, job_id != 7, 5, 0.5))
        return job_id != 2

    submit_load = submit_store

    def get_finished(self) -> list[TransferResult]:
        if self.is_mute:
            raise RuntimeError("made up: no answer")
        ended, self.ended = self.ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        self.waited.append(set(job_ids))
        if self.is_lost:
            raise RuntimeError("made up: no end")

    def shutdown(self) -> None: ...


class TestTolerantWorker:
    @pytest.fixture
    def troubled(self) -> Troubled:
        return Troubled()

    @pytest.fixture
    def worker(self, troubled: Troubled) -> Any:
        made: Any = TolerantWorker(troubled)  # type: ignore[arg-type]
        return made

    def test_every_job_succeeds_and_the_failed_are_named(self, worker: Any) -> None:
        assert worker.submit_store(1, None, None)
        assert worker.submit_load(2, None, None)
        assert worker.submit_load(7, None, None)
        assert worker.submit_store(8, None, None)
        results = worker.get_finished()
        assert sorted((r.job_id, r.success) for r in results) == [(n, True) for n in (1, 2, 7, 8)]
        assert {r.job_id: r.transfer_size for r in results} == {1: None, 2: None, 7: None, 8: 5}
        assert worker.take_failed() == {1, 2, 7}
        assert worker.take_failed() == set()
        assert worker.get_finished() == []

    def test_jobs_that_nobody_reports_have_failed(self, worker: Any, troubled: Troubled) -> None:
        """Once: when the worker answers again, it names them again."""
        worker.submit_store(3, None, None)
        worker.submit_load(4, None, None)
        troubled.is_mute = True
        assert sorted(r.job_id for r in worker.get_finished()) == [3, 4]
        assert troubled.waited == [{3, 4}], "their blocks may still be written"
        assert worker.take_failed() == {3, 4}
        assert worker.get_finished() == []
        troubled.is_mute = False
        worker.submit_load(5, None, None)
        assert [(r.job_id, r.success) for r in worker.get_finished()] == [(5, True)]
        assert worker.take_failed() == set()

    def test_jobs_that_cannot_be_waited_for_have_failed(
        self, worker: Any, troubled: Troubled
    ) -> None:
        worker.submit_store(3, None, None)
        worker.submit_store(4, None, None)
        troubled.is_lost = True
        worker.wait({4, 99})
        assert sorted(r.job_id for r in worker.get_finished()) == [3, 4]
        assert worker.take_failed() == {4}
        assert worker.get_finished() == []

    def test_neither_can_be_done(self, worker: Any, troubled: Troubled) -> None:
        worker.submit_load(3, None, None)
        troubled.is_lost = troubled.is_mute = True
        assert [r.job_id for r in worker.get_finished()] == [3]
        assert worker.take_failed() == {3}


@pytest.mark.parametrize("size", [256, 4096 - 256, 4096 + 256, 7 * 4096 + 512])
def test_heaps_of_any_size_grow_to_it(size: int) -> None:
    """Memory is committed in whole pages, a heap need not have whole ones."""
    memory = HeapMemory(size, pin=False)
    for _ in range(1000):
        if memory.ready_bytes == size:
            break
        threading.Event().wait(0.01)
    assert memory.ready_bytes == size
    memory.close()


class TestFileMemory:
    def test_bytes_outlive_the_worker(self, tmp_path: Any) -> None:
        caches = MadeUpCaches(*UNLIKE)
        caches.fill(3)
        chunks = locations(chunk_bytes(caches.groups, 1))
        blocks = GPULoadStoreSpec([3, 4, 5], [1, 1, 1], [0, 0, 0])
        pages = [caches.block(group, 3 + group) for group in range(3)]
        path = str(tmp_path / "heap")
        first = KVHeapWorker(caches.canonical, FileMemory(path, HEAP_BYTES, pin=False))
        first.submit_store(1, blocks, chunks)
        first.shutdown()
        caches.fill(4)
        again = KVHeapWorker(caches.canonical, FileMemory(path, HEAP_BYTES, pin=False))
        for group in range(3):
            held = ChunkLocations(
                chunks.addresses[group : group + 1], chunks.sizes[group : group + 1]
            )
            sizes = [int(group == at) for at in range(3)]
            again.submit_load(2, held, GPULoadStoreSpec([6], sizes, [0, 0, 0]))
            again.wait({2})
            assert [r.success for r in again.get_finished()] == [True]
            assert caches.block(group, 6) == pages[group]
        again.shutdown()

    def test_two_heaps_do_not_share_a_file(self, tmp_path: Any) -> None:
        path = str(tmp_path / "heap")
        first = FileMemory(path, HEAP_BYTES, pin=False)
        with pytest.raises(BlockingIOError, match="heap_path is used by another process"):
            FileMemory(path, HEAP_BYTES, pin=False)
        first.close()
        FileMemory(path, HEAP_BYTES, pin=False).close()

    def test_a_file_that_cannot_be_made(self, tmp_path: Any) -> None:
        with pytest.raises(FileNotFoundError):
            FileMemory(str(tmp_path / "none" / "heap"), HEAP_BYTES, pin=False)
