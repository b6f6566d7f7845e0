"""Stores and loads as transfers: paths, streams, budgets, and what is protected until they end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fake_captures import install
from fake_device import (
    DriverError,
    FakeDevice,
    heap_on,
    random_bytes,
    require_sound,
)

from kvheap import (
    BlockIds,
    LifetimeError,
    MemoryBatch,
    PagedKVCache,
    TensorMemoryAllocator,
    load,
    store,
)
from kvheap.engine import transfers
from kvheap.engine.paged_runs import pieces_of, units_of
from kvheap.errors import ClosedError, TransferError
from kvheap.kernels.paged_slots import Places
from kvheap.kernels.token_copy import TokenCopy
from kvheap.planning import planner
from kvheap.planning.link_sms import LINK_SMS
from kvheap.transfer import Transfer

LAYERS, BLOCKS, SLOTS, HEADS, DIM = 3, 32, 16, 2, 64
LAYER_BYTES = 2 * BLOCKS * SLOTS * HEADS * DIM * 2
CHUNK_BYTES = 2 * LAYERS * SLOTS * HEADS * DIM * 2
ROOM = 16
IDS = [9, 2, 30, 11, 4, 5, 17, 1]
OTHER_IDS = [3, 8, 25, 13, 0, 31, 20, 6]

LINKS = [
    (is_store, path) for is_store in (True, False) for path in ("kernel", "copy_engine", "staged")
]


@pytest.fixture(autouse=True)
def launched(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paged kernel is a queue of the stand-in's."""

    def run_copy(copy: TokenCopy, max_sms: int | None = None) -> None:
        pieces = pieces_of(copy, units_of(copy))
        stream = device.current
        device.call("launch", ("launch", pieces, stream, max_sms))
        device.enqueue(stream, pieces)

    monkeypatch.setattr(transfers, "run_copy", run_copy)


class Scene:
    """A cache on the device, and a heap with room for 16 chunks of one block."""

    def __init__(self, device: FakeDevice, kind: str = "host", **options: Any) -> None:
        self.device = device
        self.layers = [
            device.tensor(LAYER_BYTES).view(torch.float16).view(2, BLOCKS, SLOTS, HEADS, DIM)
            for _ in range(LAYERS)
        ]
        for seed, layer in enumerate(self.layers):
            layer.view(torch.uint8).view(-1).copy_(random_bytes(LAYER_BYTES, seed))
        self.cache = PagedKVCache.of("vllm-flash-nhd", self.layers)
        self.heap = heap_on(device, kind, ROOM * CHUNK_BYTES, **options)

    def blocks(self, ids: list[int]) -> torch.Tensor:
        """The bytes of blocks in the cache, as chunks keep them: ``[N, 2, L, T, D]``."""
        found = torch.stack([layer[:, ids] for layer in self.layers], dim=2)
        return found.transpose(0, 1).reshape(len(ids), 2, LAYERS, SLOTS, -1).clone()

    def store(self, ids: list[int], **options: Any) -> MemoryBatch:
        batch = self.heap.batched_store(self.cache, BlockIds(ids), SLOTS, **options)
        assert batch is not None
        return batch

    def filled(self, ids: list[int] = IDS) -> MemoryBatch:
        """Chunks of blocks, stored and done."""
        batch = self.store(ids)
        self.device.drain()
        return batch

    def whole(self) -> None:
        """All chunks are free."""
        self.heap.stats()
        every = self.heap.batched_allocate([CHUNK_BYTES], torch.uint8, ROOM)
        assert every is not None, self.heap.stats()
        self.heap.batched_free(every)
        assert self.heap.memcheck()


def contents(batch: MemoryBatch) -> torch.Tensor:
    """Of chunks, however far a copy is."""
    starts = batch.addresses.tolist()
    heap = batch.allocator
    assert isinstance(heap, TensorMemoryAllocator)
    rows = [heap.buffer[start : start + CHUNK_BYTES] for start in starts]
    return torch.stack(rows).view(torch.float16).view(len(starts), 2, LAYERS, SLOTS, -1).clone()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


class TestWays:
    @pytest.mark.parametrize("kind", ["host", "device"])
    @pytest.mark.parametrize("path", [None, "kernel", "copy_engine", "staged"])
    @pytest.mark.parametrize("max_sms", [None, 3])
    def test_there_and_back(
        self, device: FakeDevice, kind: str, path: Any, max_sms: int | None
    ) -> None:
        if (kind, path) == ("device", "staged"):
            return
        scene, stream = Scene(device, kind), device.stream()
        wanted = scene.blocks(IDS)
        options = {"stream": stream, "path": path, "max_sms": max_sms}
        batch = scene.store(IDS, **options)
        there = batch.transfer
        assert there is not None
        assert not there.done()
        assert not same(contents(batch), wanted)
        back = scene.heap.batched_load(batch, scene.cache, BlockIds(OTHER_IDS), **options)
        assert isinstance(back, Transfer)
        assert not back.done()
        back.result()
        there.result()
        assert same(contents(batch), wanted)
        assert same(scene.blocks(OTHER_IDS), wanted)
        over_link = kind == "host"
        assert (there.direction, back.direction) == (("d2h", "h2d") if over_link else ("d2d",) * 2)
        assert there.num_bytes == back.num_bytes == len(IDS) * CHUNK_BYTES
        assert path in (None, there.path)
        asked = [call for call in device.calls if call[0] in ("launch", "run")]
        defaults = set(LINK_SMS.values()) if over_link else {None}
        assert {call[3] for call in asked} <= ({max_sms} if max_sms else defaults)
        assert bool(asked) == (there.path != "copy_engine")
        assert {call[2] for call in device.calls if call[0] == "copy_batch"} <= {stream}

    @pytest.mark.parametrize("path", [None, "kernel", "staged"])
    def test_sms_that_were_measured(
        self, device: FakeDevice, path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = replace(planner.table_for(device.name, ""), link_sms={"h2d": 7, "d2h": 5})
        monkeypatch.setattr(planner, "table_for", lambda *_: table)
        scene, stream = Scene(device), device.stream()
        for max_sms, wanted in ((None, [5, 7]), (4, [4, 4])):
            options = {"stream": stream, "path": path, "max_sms": max_sms}
            before = len(device.calls)
            batch = scene.store(IDS, **options)
            back = scene.heap.batched_load(batch, scene.cache, BlockIds(OTHER_IDS), **options)
            back.result()
            asked = [call[3] for call in device.calls[before:] if call[0] in ("launch", "run")]
            assert list(dict.fromkeys(asked)) == list(dict.fromkeys(wanted))
            scene.heap.batched_free(batch)

    @pytest.mark.parametrize("is_list", [False, True])
    @pytest.mark.parametrize("path", ["kernel", "copy_engine", "staged"])
    def test_tokens_partly_filled_and_skipped(
        self, device: FakeDevice, path: Any, is_list: bool
    ) -> None:
        scene, stream = Scene(device), device.stream()
        slots = torch.randperm(BLOCKS * SLOTS, generator=torch.Generator().manual_seed(1))[:70]
        slots[5::7] = -1
        batch = scene.filled([1, 2, 3, 4, 5])
        before = contents(batch)
        chunks: Any = list(batch) if is_list else batch
        store(scene.cache, slots, chunks, stream=stream, path=path).result()
        after = contents(batch)
        rows = torch.stack([layer.view(2, BLOCKS * SLOTS, -1) for layer in scene.layers], dim=1)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                before[token // SLOTS, :, :, token % SLOTS] = rows[:, :, slot]
        assert same(after, before)

    def test_the_planner_chooses(self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        scene, stream = Scene(device), device.stream()
        few = scene.store(IDS, stream=stream)
        assert few.transfer is not None
        assert few.transfer.path == "kernel"  # so few bytes need no plan
        scene.heap.batched_free(few)
        device.drain()
        monkeypatch.setattr(transfers, "MIN_PLANNED_BYTES", 0)
        few = scene.store(IDS, stream=stream)
        assert few.transfer is not None
        assert few.transfer.path == "copy_engine"
        scene.heap.batched_free(few)
        device.drain()
        many = scene.heap.batched_store(scene.cache, range(0, 256, 2), SLOTS, stream=stream)
        assert many is not None
        assert many.transfer is not None
        assert (many.transfer.path, many.transfer.num_runs) == ("kernel", 128 * 2 * LAYERS)
        big = [device.tensor(8 << 20).view(4, 1, 2 << 20) for _ in range(1)]
        cache = PagedKVCache.of("opaque", big)
        heap = heap_on(device, "host", 8 << 20)
        batch = heap.batched_store(cache, BlockIds([3, 1]), 1, stream=stream)
        assert batch is not None
        assert batch.transfer is not None
        assert (batch.transfer.path, batch.transfer.num_runs) == ("copy_engine", 2)
        batch.transfer.result()
        assert torch.equal(batch[0].tensor.view(-1), big[0][3].view(-1))  # type: ignore[union-attr]

    def test_within_a_device_on_the_current_stream_nothing_is_recorded(
        self, device: FakeDevice
    ) -> None:
        scene = Scene(device, "device")
        device.counts.clear()
        batch = scene.store(IDS)
        transfer = store(scene.cache, BlockIds(IDS), batch)
        assert device.counts["record_event"] == 0
        assert batch.transfer is None
        assert not transfer.done()
        other = device.stream()
        transfer.wait_stream(other)
        assert device.counts["record_event"] == 1
        device.run_one(other)
        assert same(contents(batch), scene.blocks(IDS))
        transfer.result()
        assert repr(transfer).startswith("Transfer(d2d by kernel, ")

    def test_whoever_reads_a_batch_waits(self, device: FakeDevice) -> None:
        scene = Scene(device)
        batch = scene.store(IDS, stream=device.stream())
        wanted = scene.blocks(IDS)
        assert same(batch[3].tensor, wanted[3])  # type: ignore[arg-type]

    @pytest.mark.parametrize("path", ["kernel", "copy_engine", "staged"])
    def test_a_load_is_ordered_behind_the_store(self, device: FakeDevice, path: Any) -> None:
        scene = Scene(device)
        wanted = scene.blocks(IDS)
        batch = scene.store(IDS, stream=device.stream(), path=path)
        stream = device.stream()
        back = load(batch, scene.cache, BlockIds(OTHER_IDS), stream=stream, path=path)
        while device.run_one(stream):  # asks for what it waits for, and nothing else
            pass
        assert back.done()
        assert same(scene.blocks(OTHER_IDS), wanted)

    def test_new_chunks_wait_for_the_current_stream(self, device: FakeDevice) -> None:
        scene, stream = Scene(device, "device"), device.stream()
        ran: list[int] = []
        device.default.queue.append(("work", lambda: ran.append(1)))
        scene.store(IDS, stream=stream)
        device.run_one(stream)
        assert ran == [1]

    def test_layer_by_layer(self, device: FakeDevice) -> None:
        scene = Scene(device)
        batch = scene.heap.batched_allocate(
            (2, LAYERS, SLOTS, HEADS * DIM), torch.float16, len(IDS)
        )
        assert batch is not None
        for layer in range(LAYERS):
            store(
                scene.cache,
                BlockIds(IDS),
                batch,
                layers=range(layer, layer + 1),
                stream=device.stream(),
                path="copy_engine",
            )
        wanted = scene.blocks(IDS)
        load(batch, scene.cache, BlockIds(OTHER_IDS), stream=device.stream()).result()
        assert same(scene.blocks(OTHER_IDS), wanted)

    def test_the_rest_is_cleared_first(self, device: FakeDevice) -> None:
        scene, stream = Scene(device), device.stream()
        batch = scene.filled(IDS[:2])
        slots = BlockIds([7, 12], num_tokens=SLOTS + 5)
        batch = scene.heap.batched_store(scene.cache, BlockIds(IDS[:2], SLOTS + 5), SLOTS)
        assert batch is not None
        wanted = scene.blocks(IDS[:2])
        load(batch, scene.cache, slots, clear_rest=True, stream=stream, path="copy_engine").result()
        wanted[1, :, :, 5:] = 0
        assert same(scene.blocks([7, 12]), wanted)


HOW = ["free", "drop", "free some", "free one by one"]


class TestProtection:
    @pytest.mark.parametrize("how", HOW)
    @pytest.mark.parametrize(("is_store", "path"), LINKS)
    def test_bytes_come_back_when_the_copy_has_ended(
        self, device: FakeDevice, is_store: bool, path: Any, how: str
    ) -> None:
        scene, stream = Scene(device), device.stream()
        batch: Any = scene.filled()
        wanted = scene.blocks(IDS)
        if is_store:
            transfer = store(scene.cache, BlockIds(IDS), batch, stream=stream, path=path)
        else:
            transfer = load(batch, scene.cache, BlockIds(OTHER_IDS), stream=stream, path=path)
        addresses = set(batch.addresses.tolist())
        if how == "free":
            scene.heap.batched_free(batch)
        elif how == "free some":
            scene.heap.batched_free(batch[:3])
            addresses = {obj.address for obj in batch[:3]}
        elif how == "free one by one":
            for obj in batch:
                obj.ref_count_down()
        else:
            del batch
            batch = None
        require_sound(device, scene.heap)
        others = scene.heap.batched_allocate([CHUNK_BYTES], torch.uint8, ROOM, allow_partial=True)
        assert others is not None
        assert not addresses & set(others.addresses.tolist())
        for obj in others:
            obj.tensor.fill_(7)  # type: ignore[union-attr]
        require_sound(device, scene.heap)
        transfer.result()
        if not is_store:
            assert same(scene.blocks(OTHER_IDS), wanted)
        again = scene.heap.batched_allocate([CHUNK_BYTES], torch.uint8, ROOM, allow_partial=True)
        assert again is not None
        assert addresses <= set(again.addresses.tolist())

    @pytest.mark.parametrize(("is_store", "path"), LINKS)
    def test_closing_a_heap_waits(self, device: FakeDevice, is_store: bool, path: Any) -> None:
        scene, stream = Scene(device), device.stream()
        batch = scene.filled()
        if is_store:
            transfer = store(scene.cache, BlockIds(IDS), batch, stream=stream, path=path)
        else:
            transfer = load(batch, scene.cache, BlockIds(IDS), stream=stream, path=path)
        with pytest.raises(TimeoutError):
            scene.heap.close(timeout_s=0.01)
        threading.Timer(0.02, device.drain).start()
        scene.heap.close()
        assert transfer.done()
        with pytest.raises(ClosedError):
            scene.heap.batched_load(batch, scene.cache, BlockIds(IDS), stream=stream, path=path)
        with pytest.raises(ClosedError):
            scene.heap.batched_store(scene.cache, BlockIds(IDS), SLOTS, stream=stream, path=path)

    def test_a_transfer_that_nobody_holds_goes_on(self, device: FakeDevice) -> None:
        scene = Scene(device)
        wanted = scene.blocks(IDS)
        batch = scene.store(IDS, stream=device.stream(), path="copy_engine")
        batch.transfer = None
        device.drain()
        assert same(contents(batch), wanted)

    @pytest.mark.parametrize("path", ["kernel", "copy_engine", "staged"])
    def test_threads_store_load_and_free(self, device: FakeDevice, path: Any) -> None:
        scene = Scene(device, stream_wait_s=10.0)
        errors: list[BaseException] = []
        stop = threading.Event()

        def work(ids: list[int]) -> None:
            try:
                stream = device.stream()
                for _ in range(20):
                    batch = scene.store(ids, stream=stream, path=path)
                    scene.heap.batched_load(
                        batch, scene.cache, BlockIds(ids), stream=stream, path=path
                    )
                    scene.heap.batched_free(batch)
            except BaseException as error:
                errors.append(error)

        def run() -> None:
            while not stop.is_set():
                device.drain()

        wanted = scene.blocks(list(range(BLOCKS)))
        device_thread = threading.Thread(target=run)
        threads = [threading.Thread(target=work, args=(IDS[at : at + 4],)) for at in (0, 4)]
        for thread in (device_thread, *threads):
            thread.start()
        for thread in threads:
            thread.join(60)
        stop.set()
        device_thread.join(60)
        assert errors == []
        assert same(scene.blocks(list(range(BLOCKS))), wanted)
        device.drain()
        scene.whole()


FAULTS = [
    ("kernel", "launch"),
    ("copy_engine", "copy_batch"),
    ("staged", "prepare"),
    ("staged", "run"),
    ("staged", "copy_each"),
    *((path, "record_event") for path in ("kernel", "copy_engine", "staged")),
]


class TestFaults:
    @pytest.mark.parametrize("is_new", [True, False])
    @pytest.mark.parametrize("after", [0, 3])
    @pytest.mark.parametrize(("path", "call"), FAULTS)
    def test_a_store_that_cannot_be_queued(
        self, device: FakeDevice, path: Any, call: str, after: int, is_new: bool
    ) -> None:
        scene, stream = Scene(device), device.stream()
        batch = None if is_new else scene.filled()
        device.fail(call, after=after)
        to_queue: Callable[[], object] = partial(scene.store, IDS, stream=stream, path=path)
        if batch is not None:
            to_queue = partial(store, scene.cache, BlockIds(IDS), batch, stream=stream, path=path)
        with pytest.raises(TransferError, match=r"a transfer d2h of \d+ bytes .* failed: fault"):
            to_queue()
        require_sound(device, scene.heap)
        if batch is not None:
            assert batch.num_tokens is None  # nothing is known of them
            scene.heap.batched_free(batch)
        device.drain()
        scene.whole()

    @pytest.mark.parametrize("after", [0, 3])
    @pytest.mark.parametrize(("path", "call"), FAULTS)
    def test_a_load_that_cannot_be_queued(
        self, device: FakeDevice, path: Any, call: str, after: int
    ) -> None:
        scene, stream = Scene(device), device.stream()
        batch = scene.filled()
        before = contents(batch)
        device.fail(call, after=after)
        with pytest.raises(TransferError, match=r"a transfer h2d of \d+ bytes .* failed: fault"):
            load(batch, scene.cache, BlockIds(OTHER_IDS), stream=stream, path=path)
        require_sound(device, scene.heap)
        device.drain()
        assert same(contents(batch), before)
        load(batch, scene.cache, BlockIds(OTHER_IDS), stream=stream, path=path).result()
        assert same(scene.blocks(OTHER_IDS), before)
        scene.heap.batched_free(batch)
        scene.whole()

    @pytest.mark.parametrize("path", ["kernel", "copy_engine", "staged"])
    def test_a_device_that_is_lost_keeps_its_bytes(self, device: FakeDevice, path: Any) -> None:
        scene = Scene(device)
        batch = scene.store(IDS, stream=device.stream(), path=path)
        transfer = batch.transfer
        assert transfer is not None
        device.lose()
        with pytest.raises(TransferError):
            transfer.result()
        addresses = set(batch.addresses.tolist())
        scene.heap.batched_free(batch)
        other = scene.heap.batched_allocate([CHUNK_BYTES], torch.uint8, ROOM, allow_partial=True)
        assert other is not None
        assert not addresses & set(other.addresses.tolist())
        device.is_lost = False

    @pytest.mark.parametrize("error", [DriverError("fault"), KeyboardInterrupt()])
    def test_an_exception_in_the_middle(self, device: FakeDevice, error: BaseException) -> None:
        scene = Scene(device)
        device.fail("copy_batch", after=5, error=error)
        with pytest.raises((TransferError, KeyboardInterrupt)):
            scene.store(IDS, stream=device.stream(), path="copy_engine")
        require_sound(device, scene.heap)
        device.drain()
        scene.whole()

    def test_a_failed_store_is_not_loaded(self, device: FakeDevice) -> None:
        scene = Scene(device)
        batch = scene.store(IDS, stream=device.stream())
        assert batch.transfer is not None
        device.lose()
        assert batch.transfer.done()
        device.is_lost = False
        before = scene.blocks(OTHER_IDS)
        with pytest.raises(TransferError):
            load(batch, scene.cache, BlockIds(OTHER_IDS), stream=device.stream())
        assert same(scene.blocks(OTHER_IDS), before)


def check_refused(
    scene: Scene, error: type[Exception], match: str, call: Callable[[], object]
) -> None:
    scene.device.drain()
    before = scene.heap.buffer.clone(), scene.blocks(list(range(BLOCKS)))
    allocated = scene.heap.stats().allocated_bytes
    with pytest.raises(error, match=match):
        call()
    assert scene.device.is_idle
    assert torch.equal(scene.heap.buffer, before[0])
    assert same(scene.blocks(list(range(BLOCKS))), before[1])
    assert scene.heap.stats().allocated_bytes == allocated


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"path": "host"}, ValueError, "path 'host' cannot be taken: the cache is on Fake GPU"),
            ({"path": "fast"}, ValueError, "path must be one of kernel, .*got 'fast'"),
            ({"path": 3}, ValueError, "path must be one of .*got 3"),
            ({"max_sms": 0}, ValueError, "max_sms must be positive, got 0"),
            ({"max_sms": 1.5}, TypeError, "max_sms"),
            ({"stream": "side"}, TypeError, "stream must be a stream, got 'side'"),
            (
                {"path": "copy_engine"},
                ValueError,
                "refuses the legacy default stream: pass another",
            ),
        ],
    )
    def test_options(
        self, device: FakeDevice, options: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        scene = Scene(device)
        batch = scene.filled()
        for call in (
            lambda: store(scene.cache, BlockIds(IDS), batch, **options),
            lambda: load(batch, scene.cache, BlockIds(IDS), **options),
            lambda: scene.heap.batched_store(scene.cache, BlockIds(IDS), SLOTS, **options),
            lambda: scene.heap.batched_load(batch, scene.cache, BlockIds(IDS), **options),
        ):
            check_refused(scene, error, match, call)

    def test_another_devices_stream(self, device: FakeDevice) -> None:
        scene = Scene(device)
        batch = scene.filled()
        other = device.peers[0].stream()
        check_refused(
            scene,
            ValueError,
            "another device",
            lambda: load(batch, scene.cache, BlockIds(IDS), stream=other),  # type: ignore[arg-type]
        )

    def test_staging_within_a_device(self, device: FakeDevice) -> None:
        scene = Scene(device, "device")
        batch = scene.filled()
        check_refused(
            scene,
            ValueError,
            "staging only copies between a device and the host",
            lambda: store(scene.cache, BlockIds(IDS), batch, path="staged"),
        )

    @pytest.mark.parametrize("path", ["copy_engine", "staged"])
    def test_only_the_kernel_converts(self, device: FakeDevice, path: Any) -> None:
        scene = Scene(device)
        check_refused(
            scene,
            ValueError,
            f"path '{path}' cannot be taken: only the kernel converts",
            lambda: scene.heap.batched_store(
                scene.cache, BlockIds(IDS), SLOTS, convert=True, stream=device.stream(), path=path
            ),
        )

    @pytest.mark.parametrize("path", ["copy_engine", "staged"])
    def test_slots_on_the_device(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, path: Any
    ) -> None:
        scene = Scene(device)
        batch = scene.filled()

        places_of = Places.of

        def on_device(*arguments: Any, **options: Any) -> Places:
            places = places_of(*arguments, **options)
            return replace(places, values=torch.from_numpy(places.on_host()))

        monkeypatch.setattr(Places, "of", on_device)
        check_refused(
            scene,
            ValueError,
            f"path '{path}' cannot be taken: the slots are on the device",
            lambda: store(scene.cache, BlockIds(IDS), batch, stream=device.stream(), path=path),
        )
        monkeypatch.setattr(transfers, "run_copy", lambda copy, max_sms: None)
        assert store(scene.cache, BlockIds(IDS), batch, stream=device.stream()).path == "kernel"

    @pytest.mark.parametrize("path", ["copy_engine", "staged"])
    def test_memory_that_is_not_pinned(self, device: FakeDevice, path: Any) -> None:
        scene = Scene(device)
        device.pinned.clear()
        check_refused(
            scene,
            ValueError,
            "is in host memory that is not pinned",
            lambda: scene.heap.batched_store(
                scene.cache, BlockIds(IDS), SLOTS, stream=device.stream(), path=path
            ),
        )

    def test_a_freed_chunk(self, device: FakeDevice) -> None:
        scene = Scene(device)
        batch = scene.filled()
        scene.heap.batched_free(batch[:1])
        check_refused(
            scene,
            LifetimeError,
            "freed",
            lambda: store(scene.cache, BlockIds(IDS), batch, stream=device.stream()),
        )

    @pytest.mark.parametrize("kind", ["host", "device"])
    @pytest.mark.parametrize("path", [None, "kernel", "copy_engine", "staged"])
    def test_in_a_capture(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, path: Any, kind: str
    ) -> None:
        if (kind, path) == ("device", "staged"):
            return
        captures = install(monkeypatch, device)
        scene, stream = Scene(device, kind), captures.stream()
        batch = scene.filled()
        with captures.of(stream), device.using(device.default):
            for call in (
                lambda: scene.store(IDS, stream=stream, path=path),
                lambda: store(scene.cache, BlockIds(IDS), batch, stream=stream, path=path),
                lambda: load(batch, scene.cache, BlockIds(IDS), stream=stream, path=path),
            ):
                check_refused(scene, RuntimeError, "captured in a CUDA graph", call)
        assert batch.num_tokens == len(IDS) * SLOTS
        assert stream.graph == []
        captures.require_whole()


class TestHost:
    """Where no device has part."""

    @pytest.fixture
    def scene(self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Scene:
        monkeypatch.undo()
        return Scene(device)

    def test_they_have_ended(self, scene: Scene) -> None:
        wanted = scene.blocks(IDS)
        batch = scene.store(IDS, path="host", max_sms=2)
        assert batch.transfer is None
        with store(scene.cache, BlockIds(IDS), batch) as transfer:
            assert transfer.done()
        back = load(batch, scene.cache, BlockIds(OTHER_IDS), path="host")
        for each in (transfer, back):
            assert (each.path, each.direction) == ("host", "h2h")
            assert each.num_bytes == len(IDS) * CHUNK_BYTES
            assert each.num_runs == len(IDS) * LAYERS * 2
            assert each.wait()
            each.result()
            each.wait_stream(None)
            each.parts[0].wait()
            assert each.parts[0].done()
        assert same(scene.blocks(OTHER_IDS), wanted)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"path": "kernel"}, "within host memory cannot take the path 'kernel'"),
            ({"path": "copy_engine"}, "within host memory cannot take the path 'copy_engine'"),
            ({"path": "staged"}, "within host memory cannot take the path 'staged'"),
            ({"stream": "side"}, "runs on no stream, got 'side'"),
            ({"max_sms": -1}, "max_sms must be positive, got -1"),
        ],
    )
    def test_what_needs_a_device(self, scene: Scene, options: dict[str, Any], match: str) -> None:
        batch = scene.filled()
        for call in (
            lambda: scene.store(IDS, **options),
            lambda: store(scene.cache, BlockIds(IDS), batch, **options),
            lambda: load(batch, scene.cache, BlockIds(IDS), **options),
        ):
            check_refused(scene, ValueError, match, call)
