"""What fills blocks comes behind what still uses them: every way to fill, every way to read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, FakeStream, heap_on, read
from fake_mooncake import FakeStore
from transfer_scenes import BLOCK, Gate, drain

from kvheap import (
    BlockLayout,
    MemoryBatch,
    PagedKVCache,
    TensorMemoryAllocator,
    TransferError,
    foreign_transfer,
    load,
    offload,
    store,
)
from kvheap.device.events import ReportingEvent
from kvheap.transfer import CopyPlan, Transfer, copy, runs

COUNT = 4
CHUNK = [1, 1, 16, BLOCK // 16]
OLD, NEW = 1, 7


@dataclass
class Scene:
    """Blocks of ``OLD`` on the host or on a device, and what holds up whoever uses them.

    Attributes:
        gate: copies within host memory, and stores of files, wait for it.
        later: what the test does to let the readers go on, and what they have then read.
    """

    device: FakeDevice
    kind: str
    gate: Gate
    folder: Path
    heaps: dict[str, TensorMemoryAllocator] = field(default_factory=dict)
    closing: list[Any] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    def heap(self, kind: str) -> TensorMemoryAllocator:
        if kind not in self.heaps:
            self.heaps[kind] = heap_on(self.device, kind, 1 << 17)
        return self.heaps[kind]

    def blocks(self, kind: str, value: int) -> MemoryBatch:
        heap = self.heap(kind)
        batch = heap.batched_allocate(CHUNK, torch.uint8, COUNT)
        assert batch is not None
        heap.batched_write(batch, torch.full((COUNT, *CHUNK), value, dtype=torch.uint8))
        return batch

    def cache(self, kind: str, value: int) -> PagedKVCache:
        memory = self.device.tensor if kind == "device" else partial(torch.empty, dtype=torch.uint8)
        layer = memory(COUNT * BLOCK).view(COUNT, 16, BLOCK // 16)  # type: ignore[operator]
        return PagedKVCache.of("mla", [layer.fill_(value)])

    def close(self) -> None:
        for each in self.closing:
            each.close()


Result = Callable[[], torch.Tensor]
Begin = Callable[[Scene, MemoryBatch], Result]
Fill = Callable[[Scene, MemoryBatch, "FakeStream"], object]


def bytes_of(batch: MemoryBatch, transfer: Transfer) -> torch.Tensor:
    transfer.result()
    return read(batch)


def by_copy(kind: str, path: Any) -> Begin:
    def begin(scene: Scene, batch: MemoryBatch) -> Result:
        target = scene.blocks(kind, 0)
        is_h2h = scene.kind == kind == "host"
        stream: Any = None if is_h2h else scene.device.stream("reader")
        return partial(bytes_of, target, copy((batch, target), stream, path=path))

    return begin


def by_offload(kind: str, **options: Any) -> Begin:
    def begin(scene: Scene, batch: MemoryBatch) -> Result:
        is_h2h = scene.kind == kind == "host"
        stream: Any = None if is_h2h else scene.device.stream("reader")
        target = offload(batch, scene.heap(kind), stream, **options)
        assert target is not None
        assert target.transfer is not None
        return partial(bytes_of, target, target.transfer)

    return begin


def by_load(path: Any) -> Begin:
    def begin(scene: Scene, batch: MemoryBatch) -> Result:
        cache = scene.cache("device", 0)
        stream: Any = scene.device.stream("reader")
        transfer = load(batch, cache, torch.arange(16 * COUNT), stream=stream, path=path)

        def result() -> torch.Tensor:
            transfer.result()
            return cache.tensors[0]

        return result

    return begin


def by_foreign(scene: Scene, batch: MemoryBatch) -> Result:
    """A library that reads in its own time, and tells when it has."""
    ended: Future[None] = Future()
    foreign_transfer(ended, source=batch)
    found: list[torch.Tensor] = []

    def work() -> None:
        scene.gate.wait()
        memory = scene.heap(scene.kind).buffer
        found.extend(memory[at : at + BLOCK].clone() for at in batch.addresses)
        ended.set_result(None)

    thread = threading.Thread(target=work)
    thread.start()

    def result() -> torch.Tensor:
        thread.join()
        return torch.stack(found)

    return result


def by_file(scene: Scene, batch: MemoryBatch) -> Result:
    tier = file_tier(scene, batch.layout)
    transfer = tier.store([b"old"], batch[1:2])

    def result() -> torch.Tensor:
        transfer.result()
        found = scene.blocks("host", 0)
        tier.load([b"old"], found[:1]).result()
        return read(found[:1])

    return result


def file_tier(scene: Scene, layout: BlockLayout) -> Any:
    pytest.importorskip("lmdb")
    pytest.importorskip("xxhash")
    from kvheap.files import FileTier

    folder = scene.folder / str(len(scene.closing))
    scene.closing.append(FileTier(folder, 1 << 20, layout, namespace="model"))
    return scene.closing[-1]


READS: dict[str, tuple[str, Begin]] = {
    "copy h2d by the kernel": ("host", by_copy("device", "kernel")),
    "copy h2d by the copy engine": ("host", by_copy("device", "copy_engine")),
    "copy h2d by staging": ("host", by_copy("device", "staged")),
    "copy h2h": ("host", by_copy("host", None)),
    "copy d2h by the kernel": ("device", by_copy("host", "kernel")),
    "copy d2h by staging": ("device", by_copy("host", "staged")),
    "copy d2d": ("device", by_copy("device", None)),
    "copy p2p": ("device", by_copy("peer", None)),
    "offload h2d": ("host", by_offload("device")),
    "offload h2h": ("host", by_offload("host")),
    "offload d2h by layer": ("device", by_offload("host", by_layer=True)),
    "load h2d": ("host", by_load("copy_engine")),
    "load d2d": ("device", by_load("copy_engine")),
    "a foreign transfer": ("host", by_foreign),
    "a foreign transfer of a device": ("device", by_foreign),
    "a tier of files": ("host", by_file),
}
"""Where the blocks are, and what begins to read them."""


def fill_by_copy(
    kind: str, *, path: Any = None, some: Any = None, is_prepared: bool = False
) -> Fill:
    def fill(scene: Scene, batch: MemoryBatch, stream: FakeStream) -> object:
        source = scene.blocks(kind, NEW)
        pair: Any = (source, batch) if some is None else (list(source)[some], some_of(batch, some))
        plan: Any = CopyPlan.between(*pair) if is_prepared else pair
        if is_prepared:
            plan.prepare()
        is_h2h = scene.kind == kind == "host"
        return copy(plan, None if is_h2h else stream, path=path)  # type: ignore[arg-type]

    return fill


def some_of(batch: MemoryBatch, some: Any) -> Any:
    """A slice, or a list of objects."""
    return batch[some] if some.step is None else list(batch)[some]


def fill_by_store(kind: str, path: Any) -> Fill:
    def fill(scene: Scene, batch: MemoryBatch, stream: FakeStream) -> object:
        cache = scene.cache(kind, NEW)
        given: Any = stream if kind == "device" else None
        return store(cache, torch.arange(16 * COUNT), batch, stream=given, path=path)

    return fill


def fill_by_write(scene: Scene, batch: MemoryBatch, stream: FakeStream) -> object:
    rows = torch.full((COUNT, *CHUNK), NEW, dtype=torch.uint8)
    return scene.heap(scene.kind).batched_write(batch, rows)


def fill_by_file(scene: Scene, batch: MemoryBatch, stream: FakeStream) -> object:
    tier = file_tier(scene, batch.layout)
    keys = [bytes([number]) for number in range(COUNT)]
    with_gate, scene.gate.opened = scene.gate.opened, threading.Event()
    scene.gate.open()
    tier.store(keys, scene.blocks("host", NEW)).result()
    scene.gate.opened = with_gate
    return tier.load(keys, batch)


def fill_by_shared_heap(scene: Scene, batch: MemoryBatch, stream: FakeStream) -> object:
    from kvheap import SharedHeap

    path = Path("/dev/shm") / f"kvheap-order-{threading.get_native_id()}-{id(scene)}"
    heap = SharedHeap(path, 64 << 10, batch.layout, namespace="model")
    try:
        keys = [bytes([number]) for number in range(COUNT)]
        heap.store(keys, torch.full((COUNT, *CHUNK), NEW, dtype=torch.uint8))
        return heap.load(keys, batch)
    finally:
        heap.close()
        path.unlink(missing_ok=True)


def fill_by_mooncake(scene: Scene, batch: MemoryBatch, stream: FakeStream) -> object:
    from kvheap.integrations.mooncake import MooncakeTier

    layout = batch.layout
    with MooncakeTier(FakeStore(), scene.heap("host"), layout, namespace="model") as tier:
        keys = [bytes([number]) for number in range(COUNT)]
        tier.put(keys, scene.blocks("host", NEW))
        return tier.get(keys, batch)


FILLS: dict[str, tuple[str, Fill]] = {
    "copy h2h": ("host", fill_by_copy("host")),
    "copy h2h to a slice": ("host", fill_by_copy("host", some=slice(1, 3))),
    "copy h2h to objects": ("host", fill_by_copy("host", some=slice(None, None, -1))),
    "copy d2h by the kernel": ("host", fill_by_copy("device", path="kernel")),
    "copy d2h by the copy engine": ("host", fill_by_copy("device", path="copy_engine")),
    "copy d2h by staging": ("host", fill_by_copy("device", path="staged")),
    "copy d2h to a slice": ("host", fill_by_copy("device", some=slice(1, 3))),
    "a prepared plan d2h": ("host", fill_by_copy("device", is_prepared=True)),
    "copy h2d": ("device", fill_by_copy("host")),
    "copy h2d by staging": ("device", fill_by_copy("host", path="staged")),
    "copy d2d": ("device", fill_by_copy("device")),
    "copy d2d to objects": ("device", fill_by_copy("device", some=slice(None, None, -1))),
    "a prepared plan d2d": ("device", fill_by_copy("device", is_prepared=True)),
    "store h2h": ("host", fill_by_store("host", None)),
    "store d2h": ("host", fill_by_store("device", "copy_engine")),
    "store d2d": ("device", fill_by_store("device", "copy_engine")),
    "batched_write": ("host", fill_by_write),
    "batched_write of a device": ("device", fill_by_write),
    "a tier of files": ("host", fill_by_file),
    "a shared heap": ("host", fill_by_shared_heap),
    "Mooncake Store": ("host", fill_by_mooncake),
}
"""Where the blocks are, and what fills them."""


@pytest.fixture
def scene_of(
    device: FakeDevice, by_queue: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    made: list[Scene] = []

    def make(kind: str) -> Scene:
        made.append(Scene(device, kind, by_queue, tmp_path))
        return made[-1]

    def held_up(call: Callable[..., Any]) -> Callable[..., Any]:
        def store(*arguments: Any) -> Any:
            by_queue.wait()
            return call(*arguments)

        return store

    try:
        from kvheap.files.chunk_file import ChunkFile
    except ModuleNotFoundError:
        pass
    else:
        monkeypatch.setattr(ChunkFile, "store", held_up(ChunkFile.store))
    yield make
    by_queue.open()
    drain(device)
    for scene in made:
        scene.close()


def settle(scene: Scene, stream: FakeStream) -> None:
    """Let the stream of the fill do all that it can, then everybody else."""
    while scene.device.run_one(stream):
        pass
    scene.gate.open()
    drain(scene.device)


PAIRS = [
    (reading, filling)
    for reading, (at, _) in READS.items()
    for filling, (to, _) in FILLS.items()
    if at == to
]


@pytest.mark.parametrize(("reading", "filling"), PAIRS)
def test_a_reader_gets_what_was_there(scene_of: Any, reading: str, filling: str) -> None:
    kind, begin = READS[reading]
    scene = scene_of(kind)
    batch = scene.blocks(kind, OLD)
    result = begin(scene, batch)
    stream = scene.device.stream("filler")
    opener = threading.Timer(0.03, scene.gate.open)
    opener.start()
    filled = FILLS[filling][1](scene, batch, stream)
    settle(scene, stream)
    opener.join()
    if hasattr(filled, "result"):
        filled.result()
    assert result().eq(OLD).all()
    assert read(batch)[1].eq(NEW).all()


@pytest.mark.parametrize("filling", [name for name, (kind, _) in FILLS.items() if kind == "host"])
def test_the_last_fill_wins(scene_of: Any, filling: str) -> None:
    """A copy into blocks that another copy still fills comes behind it."""
    scene = scene_of("host")
    batch, first = scene.blocks("host", 0), scene.blocks("device", OLD)
    earlier = copy((first, batch), scene.device.stream("earlier"))
    stream = scene.device.stream("filler")
    opener = threading.Timer(0.03, scene.gate.open)
    opener.start()
    filled = FILLS[filling][1](scene, batch, stream)
    settle(scene, stream)
    opener.join()
    if hasattr(filled, "result"):
        filled.result()
    earlier.result()
    assert read(batch)[1].eq(NEW).all()


CHAINED = [name for name, (kind, _) in READS.items() if kind == "host" and "foreign" not in name]


@pytest.mark.parametrize("reading", CHAINED)
def test_a_copy_gets_what_an_earlier_copy_fills(scene_of: Any, reading: str) -> None:
    """Also if the earlier one does not become the ``transfer`` of the batch."""
    scene = scene_of("host")
    batch, first = scene.blocks("host", 0), scene.blocks("device", OLD)
    earlier = copy((first, batch), scene.device.stream("earlier"))
    assert batch.transfer is None
    result = READS[reading][1](scene, batch)
    for stream in scene.device.streams:
        if stream.name == "reader":
            settle(scene, stream)
    scene.gate.open()
    drain(scene.device)
    earlier.result()
    assert result().eq(OLD).all()


class Reads:
    """A device's copy of all blocks on a stream, in flight, and blocks to copy over them."""

    def __init__(self, scene: Scene) -> None:
        self.device = scene.device
        self.batch, self.other = scene.blocks("host", OLD), scene.blocks("host", NEW)
        self.on_device, self.target = scene.blocks("device", NEW), scene.blocks("device", 0)
        self.stream: Any = scene.device.stream("reader")
        self.another: Any = scene.device.stream("filler")
        self.transfer = copy((self.batch, self.target), self.stream)
        self.device.counts.clear()

    def require_old(self) -> None:
        drain(self.device)
        self.transfer.result()
        assert read(self.target).eq(OLD).all()


@pytest.fixture
def reads(scene_of: Any) -> Reads:
    return Reads(scene_of("host"))


def test_a_stream_waits_and_the_host_does_not(reads: Reads) -> None:
    copy((reads.on_device, reads.batch), reads.another)
    assert reads.device.counts["wait_event"] == 1
    assert reads.device.counts["event.synchronize"] == 0
    assert not reads.transfer.done()
    reads.require_old()


def test_a_stream_does_not_wait_for_itself(reads: Reads) -> None:
    copy((reads.on_device, reads.batch), reads.stream)
    assert reads.device.counts["wait_event"] == 0
    reads.require_old()


def test_nobody_waits_for_what_has_ended(reads: Reads) -> None:
    drain(reads.device)
    copy((reads.on_device, reads.batch), reads.another)
    assert reads.device.counts["wait_event"] == 0
    reads.require_old()


def test_other_blocks_of_a_batch_are_not_waited_for(scene_of: Any) -> None:
    scene = scene_of("host")
    batch, target = scene.blocks("host", OLD), scene.blocks("device", 0)
    copy((batch[:2], target[:2]), scene.device.stream())
    scene.device.counts.clear()
    copy((scene.blocks("device", NEW)[2:], batch[2:]), scene.device.stream())
    assert scene.device.counts["wait_event"] == 0


def test_the_thread_that_began_to_read_does_not_matter(scene_of: Any) -> None:
    scene = scene_of("host")
    batch, target = scene.blocks("host", OLD), scene.blocks("device", 0)
    stream = scene.device.stream()
    begun: list[Transfer] = []
    thread = threading.Thread(target=lambda: begun.append(copy((batch, target), stream)))
    thread.start()
    thread.join()
    begun.clear()  # and nobody holds the transfer
    copy((scene.blocks("host", NEW), batch))
    scene.gate.open()
    drain(scene.device)
    assert read(target).eq(OLD).all()


def test_a_reader_that_failed_half_way_has_ended_first(scene_of: Any) -> None:
    scene = scene_of("host")
    batch, target = scene.blocks("host", OLD), scene.blocks("device", 0)
    stream, another = scene.device.stream(), scene.device.stream("filler")
    scene.device.fail("copy_batch", after=2)
    failed = copy((batch[::-1], target), stream, path="copy_engine")
    assert failed.error is not None
    filled = copy((scene.blocks("device", NEW), batch), another)
    settle(scene, another)
    filled.result()
    assert read(target[:2]).eq(OLD).all()


class Frozen:
    """An event of a library that does not come, or tells that it failed."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.has_ended = False
        self.was_asked = threading.Event()

    def query(self) -> bool:
        self.was_asked.set()
        if self.failure is not None:
            raise self.failure
        return self.has_ended


class FrozenReporter(Frozen, ReportingEvent):
    """The same by an event that needs no translation, such as that of a read from a peer."""

    def synchronize(self) -> None:
        while not self.query():
            time.sleep(1e-3)

    def error(self) -> TransferError | None:
        return None

    def require_success(self) -> None:
        pass


class TestForeignReaders:
    @pytest.mark.parametrize("kind", [Frozen, FrozenReporter])
    def test_one_that_never_ends_holds_up_its_caller_only(self, scene_of: Any, kind: Any) -> None:
        scene, peer = scene_of("host"), kind()
        scene.gate.open()
        batch, other = scene.blocks("host", OLD), scene.blocks("host", NEW)
        foreign_transfer(peer, source=batch)
        peer.was_asked.clear()
        thread = threading.Thread(target=lambda: copy((other, batch)).result())
        thread.start()
        assert peer.was_asked.wait(10)
        elsewhere = scene.blocks("host", 0)
        copy((other, elsewhere)).result(10)
        assert read(batch).eq(OLD).all()
        peer.has_ended = True
        thread.join()
        assert read(batch).eq(NEW).all()

    @pytest.mark.parametrize("kind", ["host", "device"])
    def test_one_that_failed_is_not_waited_for(self, scene_of: Any, kind: str) -> None:
        """It may still read: what it has read nobody takes for good."""
        scene, peer = scene_of(kind), Frozen()
        scene.gate.open()
        batch = scene.blocks(kind, OLD)
        reading = foreign_transfer(peer, source=batch)
        peer.failure = OSError("the peer does not answer")
        copy((scene.blocks(kind, NEW), batch)).result()
        assert read(batch).eq(NEW).all()
        assert reading.is_quarantined
        peer.failure, peer.has_ended = None, True

    def test_what_may_still_be_written_is_not_copied_over(self, scene_of: Any) -> None:
        scene, peer = scene_of("host"), Frozen()
        scene.gate.open()
        batch = scene.blocks("host", OLD)
        foreign_transfer(peer, target=batch[:2])
        assert batch.transfer is None
        peer.failure = OSError("the peer does not answer")
        other = scene.blocks("host", NEW)
        for target in (batch, batch[1:3]):
            with pytest.raises(TransferError, match="the peer does not answer"):
                copy((other[: len(target)], target))
        copy((other[2:], batch[2:])).result()
        with pytest.raises(TransferError, match="the peer does not answer"):
            copy((batch, other))
        assert read(batch[2:]).eq(NEW).all()
        peer.failure, peer.has_ended = None, True

    def test_a_loop_cannot_wait_for_its_own_future(self, scene_of: Any) -> None:
        import asyncio

        scene = scene_of("host")
        scene.gate.open()
        batch, other = scene.blocks("host", OLD), scene.blocks("host", NEW)

        async def work() -> None:
            future = asyncio.get_running_loop().create_future()
            reading = foreign_transfer(future, source=batch)
            with pytest.raises(RuntimeError, match="await the transfer"):
                copy((other, batch))
            assert read(batch).eq(OLD).all()
            future.set_result(None)
            await reading
            await copy((other, batch))

        asyncio.run(work())
        assert read(batch).eq(NEW).all()

    def test_one_that_would_write_what_is_read_does_not_begin(self, reads: Reads) -> None:
        begun: list[object] = []
        for target in (reads.batch, reads.batch[1:2], [reads.batch[3]]):
            with pytest.raises(RuntimeError, match="still being read by a transfer"):
                foreign_transfer(lambda: begun.append(1) or Frozen(), target=target)
        for side in ({"target": reads.target}, {"source": reads.target[1:]}):
            with pytest.raises(RuntimeError, match="still being filled by a transfer"):
                foreign_transfer(lambda: begun.append(1) or Frozen(), **side)
        assert begun == []
        peer = Frozen()
        foreign_transfer(peer, source=reads.batch)  # two may read
        peer.has_ended = True
        reads.require_old()
        foreign_transfer(peer, target=reads.batch).result()


class TestCaptures:
    @pytest.fixture
    def graph(self, reads: Reads) -> FakeStream:
        reads.plan = CopyPlan.between(reads.on_device, reads.batch).prepare()  # type: ignore[attr-defined]
        graph = reads.device.stream("graph")
        graph.capturing = True
        return graph

    def test_what_another_stream_still_reads_is_refused(
        self, reads: Any, graph: FakeStream
    ) -> None:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="as a capture cannot"):
                copy(reads.plan, graph)
        assert graph.graph == []
        assert not graph.queue
        drain(reads.device)
        assert copy(reads.plan, graph).is_captured
        graph.capturing = False
        reads.require_old()
        graph.replay()
        assert read(reads.batch).eq(NEW).all()

    def test_what_was_read_on_the_same_stream_comes_before(self, reads: Any) -> None:
        plan = CopyPlan.between(reads.on_device, reads.batch).prepare()
        reads.stream.capturing = True
        assert copy(plan, reads.stream).is_captured
        reads.stream.capturing = False
        reads.require_old()

    def test_what_a_graph_fills_is_nobodys_to_wait_for(self, reads: Any, graph: FakeStream) -> None:
        drain(reads.device)
        copy(reads.plan, graph)
        graph.capturing = False
        reads.device.counts.clear()
        copy((reads.on_device, reads.batch), reads.another).result()
        assert reads.device.counts["wait_event"] == 0


def test_a_store_in_one_launch_waits_on_its_stream(scene_of: Any) -> None:
    """By the kernel, on the current stream: what it fills, another stream still reads."""
    scene = scene_of("device")
    batch, target = scene.blocks("device", OLD), scene.blocks("host", 0)
    reading = copy((batch, target), scene.device.stream())
    current = scene.device.stream("current")
    with scene.device.using(current):
        store(scene.cache("device", NEW), torch.arange(16 * COUNT), batch)
        assert [kind for kind, _ in current.queue] == ["wait"]
        assert not reading.done()
        while scene.device.run_one(current):
            pass
        assert reading.done()
        store(scene.cache("device", NEW), torch.arange(16 * COUNT), batch)
        assert not current.queue


def test_pointers_have_no_blocks_to_wait_for(reads: Reads) -> None:
    """Whose they are is not known: see ``CopyPlan.of_pointers``."""
    starts = reads.batch.addresses + reads.batch.allocator.segments[0][1].data_ptr()  # type: ignore[attr-defined]
    plan = CopyPlan.of_pointers(
        reads.on_device.addresses + reads.on_device.allocator.segments[0][1].data_ptr(),  # type: ignore[attr-defined]
        starts,
        BLOCK,
        "cuda",
        "cpu",
    )
    copy(plan, reads.another)
    assert reads.device.counts["wait_event"] == 0


def test_freed_blocks_are_not_filled_anew_while_they_are_read(device: FakeDevice) -> None:
    near, far = heap_on(device, "device", COUNT * BLOCK), heap_on(device, "host", COUNT * BLOCK)
    batch = far.batched_allocate(CHUNK, torch.uint8, COUNT)
    target = near.batched_allocate(CHUNK, torch.uint8, COUNT)
    assert batch is not None
    assert target is not None
    far.batched_write(batch, torch.full((COUNT, *CHUNK), OLD, dtype=torch.uint8))
    transfer = copy((batch, target), device.stream())
    addresses = np.array(batch.addresses)
    far.batched_free(batch)
    assert far.batched_allocate(CHUNK, torch.uint8, 1) is None
    drain(device)
    assert transfer.done()
    again = far.batched_allocate(CHUNK, torch.uint8, COUNT)
    assert again is not None
    assert np.array_equal(np.sort(again.addresses), np.sort(addresses))


class TestCallsAtTheSameTime:
    """They have no order; but none of them fails, or waits for ever, because of another."""

    @pytest.mark.parametrize("filling", ["copy h2h", "copy d2h by the kernel", "batched_write"])
    def test_what_another_thread_copies_itself(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, filling: str
    ) -> None:
        """A small copy runs on its caller's thread; the queue's thread cannot wait for it."""
        gate, is_inside = Gate(), threading.Event()
        copy_on_host = runs.copy_on_host

        def held_up(pieces: Any) -> None:
            if threading.current_thread().name == "reader":
                is_inside.set()
                gate.wait()
            copy_on_host(pieces)

        monkeypatch.setattr(runs, "copy_on_host", held_up)
        scene = Scene(device, "host", gate, tmp_path)
        batch, target = scene.blocks("host", OLD), scene.blocks("host", 0)
        reader = threading.Thread(target=lambda: copy((batch, target)), name="reader")
        reader.start()
        assert is_inside.wait(20)
        opener = threading.Timer(0.05, gate.open)
        opener.start()
        filled = FILLS[filling][1](scene, batch, device.stream("filler"))
        drain(device)
        if hasattr(filled, "result"):
            filled.result(20)
        reader.join()
        opener.join()
        assert read(batch).eq(NEW).all()

    @pytest.mark.parametrize("filling", ["copy h2h", "copy d2h by the kernel", "batched_write"])
    def test_what_this_thread_is_in_the_middle_of(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, filling: str
    ) -> None:
        """A finalizer in a small copy: it is told, instead of waiting for its own thread."""
        scene = Scene(device, "host", Gate(), tmp_path)
        batch, target = scene.blocks("host", OLD), scene.blocks("host", 0)
        copy_on_host, found = runs.copy_on_host, []

        def interrupted(pieces: Any) -> None:
            monkeypatch.setattr(runs, "copy_on_host", copy_on_host)
            try:
                filled = FILLS[filling][1](scene, batch, device.stream("filler"))
                error = getattr(filled, "error", None)
            except RuntimeError as raised:
                error = raised
            found.append(error)
            copy_on_host(pieces)

        monkeypatch.setattr(runs, "copy_on_host", interrupted)
        thread = threading.Thread(target=lambda: copy((batch, target)).result(), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        drain(device)
        assert len(found) == 1
        assert (found[0] is None) == (filling == "copy h2h"), found
        if found[0] is not None:
            assert "cannot wait" in str(found[0])

    @pytest.mark.parametrize("filling", ["copy h2h", "copy d2h by the kernel", "batched_write"])
    def test_what_is_not_in_the_queue_yet_is_not_waited_for(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, filling: str
    ) -> None:
        """It may never be, or come behind the other in the queue, which would wait for it."""
        scene = Scene(device, "host", Gate(), tmp_path)
        batch, target = scene.blocks("host", OLD), scene.blocks("host", 0)
        submit, filled = runs.host_queue.submit, []

        def late(job: Any, is_small: bool) -> None:
            monkeypatch.setattr(runs.host_queue, "submit", submit)
            filled.append(FILLS[filling][1](scene, batch, device.stream("filler")))
            submit(job, is_small)

        monkeypatch.setattr(runs.host_queue, "submit", late)
        thread = threading.Thread(target=lambda: copy((batch, target)).result(), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        drain(device)
        if hasattr(filled[0], "result"):
            filled[0].result(20)
        assert read(batch).eq(NEW).all()


def test_what_is_only_read_of_a_batch_is_read_by_others_too(scene_of: Any) -> None:
    """Rows tell: one copy may read some blocks of a batch and fill others."""
    scene = scene_of("device")
    batch, target = scene.blocks("device", OLD), scene.blocks("host", 0)
    copy((batch[:2], batch[2:]), scene.device.stream())
    scene.device.counts.clear()
    copy((batch[:2], target[:2]), scene.device.stream())
    assert scene.device.counts["wait_event"] == 0
    copy((batch[2:], target[2:]), scene.device.stream())
    assert scene.device.counts["wait_event"] == 1
