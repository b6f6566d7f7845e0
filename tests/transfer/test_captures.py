"""Captures of CUDA graphs: no call of kvheap's breaks one, and no block that is freed is lost."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_captures import Captures, install, on_thread
from fake_device import FakeDevice, FakeStream, filled, heap_on

from kvheap import MemoryBatch, PagedKVCache, load, store
from kvheap.heaps.segments import Segments
from kvheap.transfer import CopyPlan, Transfer, copy, offload, restore

BLOCK = 4096
COUNT = 8


@pytest.fixture
def captures(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Captures:
    return install(monkeypatch, device)


class Scene:
    """Two heaps with blocks in every state in which a call asks the device something."""

    def __init__(self, device: FakeDevice, captures: Captures) -> None:
        self.device = device
        self.near = heap_on(device, "device", 16 * COUNT * BLOCK)
        self.far = heap_on(device, "host", 16 * COUNT * BLOCK)
        self.graph, self.side = captures.stream(), captures.stream()
        self.plain = filled(self.near, COUNT)
        self.recorded = self.used_by(self.side)
        self.of_graph = self.used_by(self.graph)
        self.leased = self.used_by(self.side)
        self.lease = self.leased[0].pin(ttl=600.0)
        self.near.batched_free(self.used_by(self.side))  # pending
        self.dropped: MemoryBatch | None = self.used_by(self.side)
        self.prunable = self.used_by(self.side)
        for _ in range(7):
            copy((self.plain, filled(self.far, COUNT)), self.side).wait()
            copy((self.prunable, filled(self.far, COUNT)), self.side)
        self.moved = offload(self.plain, self.far, self.side)
        assert self.moved is not None
        self.plan = CopyPlan.between(self.plain, self.moved).prepare()
        layers = [torch.zeros(4, 2, 8, 2, 8) for _ in range(2)]
        self.cache = PagedKVCache.of("vllm-flashinfer-nhd", layers)
        stored = self.far.batched_store(self.cache, range(32), 16)
        assert stored is not None
        self.stored = stored
        on_device = [device.tensor(4 * 2 * 8 * 16 * 4).view(torch.float32) for _ in range(2)]
        self.paged = PagedKVCache.of(
            "vllm-flashinfer-nhd", [layer.view(4, 2, 8, 2, 8) for layer in on_device]
        )
        self.kept: list[object] = []

    def used_by(self, stream: FakeStream) -> MemoryBatch:
        """Blocks that a stream uses, with work on it that has not ended."""
        batch = filled(self.near, COUNT)
        batch.record_stream(stream)
        return batch

    @property
    def transfer(self) -> Transfer:
        """One that is in flight."""
        assert self.moved is not None
        assert self.moved.transfer is not None
        return self.moved.transfer

    def drop(self) -> None:
        self.dropped = None
        self.near.batched_free(self.near.batched_allocate([BLOCK], torch.uint8, 1))

    def expire(self) -> None:
        self.near.batched_free(self.leased[1:])
        self.lease.release()
        self.leased[0].ref_count_down()

    def fill_up(self) -> None:
        """Ask for more than there is, so that the call looks at all that is pending."""
        assert self.near.batched_allocate([BLOCK], torch.uint8, 16 * COUNT) is None

    def end(self) -> None:
        """Free everything, when the device has done everything."""
        self.device.drain()
        if not self.near.closed:
            self.lease.release()
        for heap in (self.near, self.far):
            if heap.closed:
                threading.Timer(0.02, self.device.drain).start()
                heap.close()
                continue
            for name, each in list(vars(self).items()):
                if isinstance(each, MemoryBatch) and each.allocator is heap:
                    heap.batched_free([block for block in each if block.is_valid()])
                    setattr(self, name, None)
        self.kept.clear()
        del self.lease, self.plan
        for heap in (self.near, self.far):
            if not heap.closed:
                heap.stats()  # reclaims what was dropped
                self.device.drain()
                whole = heap.batched_allocate([BLOCK], torch.uint8, 16 * COUNT)
                assert whole is not None, heap.stats()
                heap.batched_free(whole)
                assert heap.memcheck()


def keep(call: Callable[[Scene], object]) -> Callable[[Scene], None]:
    return lambda scene: scene.kept.append(call(scene))


CALLS: dict[str, Callable[[Scene], object]] = {
    "allocate": lambda s: s.near.allocate([BLOCK], torch.uint8),
    "batched_allocate": lambda s: s.near.batched_allocate([BLOCK], torch.uint8, 3),
    "allocate from a source": lambda s: s.near.batched_allocate(
        [BLOCK], torch.uint8, 2, source=torch.zeros(2, BLOCK, dtype=torch.uint8)
    ),
    "allocate in a full heap": Scene.fill_up,
    "free": lambda s: s.near.free(s.recorded[0]),
    "batched_free": lambda s: s.near.batched_free(s.recorded),
    "batched_free of the graph's": lambda s: s.near.batched_free(s.of_graph),
    "batched_free into a tensor": lambda s: s.near.batched_free(
        s.recorded, out=torch.empty(COUNT, BLOCK, dtype=torch.uint8)
    ),
    "free a copy's source": lambda s: s.near.batched_free(s.plain),
    "free a copy's target": lambda s: s.far.batched_free(s.moved),
    "count down": lambda s: s.recorded[1].ref_count_down(),
    "count down the graph's": lambda s: s.of_graph[1].ref_count_down(),
    "unpin": lambda s: (s.recorded[2].pin(), s.recorded[2].unpin()),
    "end a lease": Scene.expire,
    "drop": Scene.drop,
    "record_stream": lambda s: s.prunable.record_stream(s.side),
    "record_stream of the graph": lambda s: s.recorded.record_stream(s.graph),
    "detach": lambda s: s.near.batched_free(s.recorded[:1]),
    "evict": lambda s: s.far.batched_evict(s.stored),
    "stats": lambda s: (s.near.stats(), s.near.leaks(), s.near.memcheck(), s.near.free_extents()),
    "contents": lambda s: s.recorded[0].tensor,
    "copy": lambda s: copy((s.plain, s.moved)),
    "copy on another stream": lambda s: copy((s.plain, s.moved), s.side),
    "copy a prepared plan": lambda s: copy(s.plan),
    "copy by the copy engine": lambda s: copy((s.plain, s.moved), s.side, path="copy_engine"),
    "copy by staging": lambda s: copy((s.plain, s.moved), s.side, path="staged"),
    "offload": lambda s: offload(s.plain, s.far, s.side),
    "offload and free": lambda s: offload(s.recorded, s.far, s.side, free=True),
    "restore": lambda s: restore(s.moved, s.near, s.side, by_layer=False),
    "done": lambda s: s.transfer.done(),
    "wait": lambda s: s.transfer.wait(),
    "wait for a time": lambda s: s.transfer.wait(0.01),
    "result": lambda s: s.transfer.result(),
    "error": lambda s: (s.transfer.error, s.transfer.require_success()),
    "wait_stream": lambda s: s.transfer.wait_stream(None),
    "leave": lambda s: s.transfer.__exit__(None, None, None),
    "await": lambda s: (s.device.drain(), asyncio.run(await_for(s.transfer))),
    "wait for a part": lambda s: (s.transfer.parts[0].done(), s.transfer.parts[0].wait()),
    "a part's stream": lambda s: s.transfer.parts[0].wait_stream(None),
    "store": lambda s: store(s.cache, range(32), s.stored),
    "load": lambda s: load(s.stored, s.cache, range(32)),
    "batched_store": lambda s: s.near.batched_store(s.cache, range(16), 16),
    "batched_load": lambda s: s.far.batched_load(s.stored, s.cache, range(32)),
    "store over the link": lambda s: store(s.paged, range(32), s.stored),
    "store by the copy engine": lambda s: store(
        s.paged, range(32), s.stored, stream=s.side, path="copy_engine"
    ),
    "batched_store by staging": lambda s: s.far.batched_store(
        s.paged, range(32), 16, stream=s.side, path="staged"
    ),
    "load over the link": lambda s: load(s.stored, s.paged, range(32), max_sms=2).result(),
    "load on another stream": lambda s: load(s.stored, s.paged, range(32), stream=s.side).result(),
    "store within the device": lambda s: s.near.batched_store(s.paged, range(16), 16),
    "close": lambda s: s.near.close(timeout_s=0.01),
    "collect": lambda s: gc.collect(),
}
"""Public calls that allocate, free, copy, wait or close."""


@pytest.mark.parametrize("debug", [False, True])
def test_wiping_waits_for_the_end_of_a_capture(
    device: FakeDevice, captures: Captures, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    """Of bytes on a device: a graph would wipe them at each replay, and a check would wait."""
    options = {"debug": True} if debug else {"scrub": True}
    heap = heap_on(device, "device", 2 * BLOCK, **options)
    stream = captures.stream()
    fills: list[bool] = []
    fill = Segments.fill

    def watched(segments: Segments, *arguments: Any) -> None:
        fills.append(device.current.capturing)
        fill(segments, *arguments)

    monkeypatch.setattr(Segments, "fill", watched)
    monkeypatch.setattr(Segments, "device", property(lambda segments: torch.device("cuda")))
    first = heap.allocate([BLOCK], torch.uint8)
    second = heap.allocate([BLOCK], torch.uint8)
    assert first is not None
    assert second is not None
    heap.free(first)
    nonzero = torch.nonzero
    looks: list[bool] = []

    def looked(*arguments: Any) -> torch.Tensor:
        looks.append(device.current.capturing)
        return nonzero(*arguments)

    monkeypatch.setattr(torch, "nonzero", looked)
    with captures.of(stream):
        heap.free(second)
        assert heap.stats().pending_bytes == BLOCK
        assert heap.allocate([BLOCK], torch.uint8) is not None
        assert heap.allocate([BLOCK], torch.uint8) is None
    again = heap.allocate([BLOCK], torch.uint8)
    assert again is not None
    assert fills == [False] * 3  # of both, and of the one that was dropped in the capture
    assert True not in looks
    assert heap.memcheck()
    captures.require_whole()


async def await_for(transfer: Transfer) -> None:
    await transfer


@pytest.mark.parametrize("is_own", [True, False], ids=["own thread", "other thread"])
@pytest.mark.parametrize("name", CALLS)
def test_no_call_breaks_a_capture(
    device: FakeDevice, captures: Captures, name: str, is_own: bool
) -> None:
    scene = Scene(device, captures)
    call = keep(CALLS[name])
    refused: BaseException | None = None
    with captures.of(scene.graph):
        if not is_own:
            refused = on_thread(lambda: call(scene))
        else:
            try:
                call(scene)
            except (RuntimeError, TimeoutError) as error:  # what a capture cannot include
                refused = error
        if refused is not None and not is_own:
            assert isinstance(refused, TimeoutError), refused
            assert name == "close"
        device.drain()
        if not scene.near.closed:
            scene.near.batched_allocate([BLOCK], torch.uint8, 17 * COUNT)
    captures.require_whole()
    assert device.violations == []
    scene.end()
    captures.require_whole()
