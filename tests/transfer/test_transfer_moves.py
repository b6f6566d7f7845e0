"""Blocks that move between heaps: there and back, in chains, in the order of streams."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_device import (
    DIRECTIONS,
    PATHS_OF,
    FakeDevice,
    filled,
    heap_on,
    memory_of,
    random_bytes,
    read,
    require_sound,
)
from transfer_scenes import BLOCK, Gate, Registrar, Tiers, allocated, in_a_row, scattered, stream_of

from kvheap import (
    BlockInUseError,
    BufferAllocator,
    DoubleFreeError,
    LazyMemoryAllocator,
    LifetimeError,
    TensorMemoryAllocator,
)
from kvheap.device.completion import InFlight
from kvheap.errors import TransferError
from kvheap.transfer import copy, moves, offload, restore, runs


class TestOffload:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("path", [None, "kernel", "copy_engine", "staged"])
    @pytest.mark.parametrize("free", [False, True])
    @pytest.mark.parametrize("objects", [False, True])
    def test_there_and_back(
        self, device: FakeDevice, direction: str, path: Any, free: bool, objects: bool
    ) -> None:
        if path not in (None, *PATHS_OF[direction]):
            return
        count = 24
        near, far = (heap_on(device, kind, 2 * count * BLOCK) for kind in DIRECTIONS[direction])
        batch, room = (in_a_row if direction == "h2d" else scattered)(near, count)
        if direction == "h2d":  # staging is for what is scattered on the device
            hole, room = scattered(far, count)
            far.batched_free(hole)
        contents = read(batch)
        before, other_bytes = allocated(near)[0], count * BLOCK * (direction != "h2d")
        moved = offload(
            list(batch) if objects else batch,
            far,
            stream_of(device, direction),
            free=free,
            path=path,
        )
        assert moved is not None
        assert (moved.layout, len(moved)) == (batch.layout, count)
        assert (~batch.live).all() if free else batch.live.all()
        assert moved.transfer is not None
        assert moved.transfer.direction == direction
        moved.transfer.result()
        assert allocated(near)[0] == (other_bytes if free else before)
        assert torch.equal(read(moved), contents)
        if direction == "p2p":
            return  # the peer has no stream here
        if not free:
            near.batched_free(batch)
        back_way = {"h2d": "d2h", "d2h": "h2d"}.get(direction, direction)
        back = restore(moved, near, stream_of(device, back_way), free=True)
        assert back is not None
        assert not moved.live.any()
        assert back.transfer is not None
        back.transfer.result()
        assert torch.equal(read(back), contents)
        del room

    def test_a_full_target_changes_nothing(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 8)
        filler = filled(tiers.far, 60)
        before = tiers.far.free_extents().tolist()
        assert offload(batch, tiers.far, tiers.device.stream(), free=True) is None
        assert tiers.far.free_extents().tolist() == before
        assert batch.live.all()
        assert tiers.device.calls == []
        tiers.far.batched_free(filler)
        assert offload(batch, tiers.far, tiers.device.stream(), free=True) is not None

    @pytest.mark.parametrize("free", [False, True])
    @pytest.mark.parametrize("objects", [False, True])
    def test_the_first_ones_that_fit(self, tiers: Tiers, free: bool, objects: bool) -> None:
        batch = filled(tiers.near, 8)
        filled(tiers.far, 61).detach()
        contents = read(batch)
        moved = offload(
            list(batch) if objects else batch,
            tiers.far,
            tiers.device.stream(),
            free=free,
            allow_partial=True,
        )
        assert moved is not None
        moved.transfer.result()
        assert torch.equal(read(moved), contents[:3])
        assert batch.live.tolist() == [not free] * 3 + [True] * 5
        assert allocated(tiers.near) == [(5 if free else 8) * BLOCK]

    @pytest.mark.parametrize("path", [None, "copy_engine", "kernel"])
    def test_nothing_fits(self, tiers: Tiers, path: Any) -> None:
        batch = filled(tiers.near, 8)
        filled(tiers.far, 64).detach()
        stream = tiers.device.stream()
        moved = offload(batch, tiers.far, stream, free=True, allow_partial=True, path=path)
        assert moved is not None
        assert len(moved) == 0
        moved.transfer.result()
        assert batch.live.all()

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("with_stream", [False, True])
    @pytest.mark.parametrize("free", [False, True])
    def test_an_empty_batch(
        self, device: FakeDevice, direction: str, with_stream: bool, free: bool
    ) -> None:
        source, target = (heap_on(device, kind, 1 << 16) for kind in DIRECTIONS[direction])
        empty = source.batched_allocate([BLOCK], torch.uint8, 0)
        assert empty is not None
        stream = stream_of(device, direction) if with_stream else None
        moved = offload(empty, target, stream, free=free)
        assert moved is not None
        assert len(moved) == 0
        moved.transfer.result()
        assert moved.transfer.num_bytes == 0
        with pytest.raises(ValueError, match="an empty list of blocks belongs to no heap"):
            offload([], target, stream)

    def test_freed_bytes_come_back_at_the_end(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 64)
        moved = offload(batch, tiers.far, tiers.device.stream(), free=True)
        assert moved is not None
        assert not batch.live.any()
        assert batch[0].tensor is None
        with pytest.raises(DoubleFreeError):
            tiers.near.batched_free(batch)
        assert tiers.near.stats().pending_bytes == 64 * BLOCK
        assert tiers.near.batched_allocate([BLOCK], torch.uint8, 1) is None
        tiers.device.drain()
        assert tiers.near.stats().pending_bytes == 0
        assert allocated(tiers.near) == [0]

    def test_what_is_given_up_waits_for_other_streams_too(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 4)
        other, stream = tiers.device.stream(), tiers.device.stream()
        other.queue.append(("work", lambda: None))
        batch.record_stream(other)
        moved = offload(batch, tiers.far, stream, free=True)
        assert moved is not None
        while tiers.device.run_one(stream):
            pass
        moved.transfer.result()
        assert allocated(tiers.near) == [4 * BLOCK]
        tiers.device.drain()
        assert allocated(tiers.near) == [0]

    @pytest.mark.parametrize("objects", [False, True])
    @pytest.mark.parametrize(
        ("spoil", "error"),
        [
            (lambda heap, batch: batch[2].pin(), BlockInUseError),
            (lambda heap, batch: batch[2].ref_count_up(), BlockInUseError),
            (lambda heap, batch: heap.free(batch[2]), (DoubleFreeError, LifetimeError)),
        ],
        ids=["pinned", "referenced", "freed"],
    )
    def test_what_is_not_the_callers_alone_is_not_given_up(
        self, tiers: Tiers, spoil: Callable[..., None], error: Any, objects: bool
    ) -> None:
        batch = filled(tiers.near, 6)
        contents = tiers.near.buffer.clone()
        spoil(tiers.near, batch)
        live = batch.live.tolist()
        counts = batch.ref_counts.tolist()
        with pytest.raises(error):
            offload(list(batch) if objects else batch, tiers.far, tiers.device.stream(), free=True)
        assert batch.live.tolist() == live
        assert batch.ref_counts.tolist() == counts
        assert allocated(tiers.far) == [0]
        assert torch.equal(tiers.near.buffer, contents)
        assert tiers.device.calls == []
        assert tiers.near.stats().pending_bytes == 0

    def test_one_batch_of_several_refuses_all(self, tiers: Tiers) -> None:
        first, second = filled(tiers.near, 3), filled(tiers.near, 3)
        second[1].pin()
        with pytest.raises(BlockInUseError):
            offload([*first, *second], tiers.far, tiers.device.stream(), free=True)
        assert first.live.all()
        assert second.live.all()
        tiers.near.batched_free(first)
        assert allocated(tiers.near, tiers.far) == [3 * BLOCK, 0]

    def test_an_object_named_twice(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 3)
        with pytest.raises(DoubleFreeError, match="named twice"):
            offload([batch[0], batch[1], batch[0]], tiers.far, tiers.device.stream(), free=True)
        assert batch.live.all()
        twice = offload([batch[0], batch[0]], tiers.far, tiers.device.stream())
        assert twice is not None
        twice.transfer.result()
        assert torch.equal(twice[1].tensor, batch[0].tensor)

    def test_several_groups(self, tiers: Tiers) -> None:
        shapes, dtypes = [[2, 4, 8, 16], [5]], [torch.float16, torch.int16]
        batch = tiers.near.batched_allocate(shapes, dtypes, 7)
        assert batch is not None
        rows = random_bytes(7 * batch.size_bytes, 3).view(7, -1)
        for block, row in zip(batch, rows, strict=True):
            tiers.near.buffer[block.address : block.address + batch.size_bytes] = row
        away = offload(batch, tiers.far, tiers.device.stream(), free=True)
        assert away is not None
        back = restore(away, tiers.near, tiers.device.stream(), free=True)
        assert back is not None
        back.transfer.result()
        assert back.layout == batch.layout
        for block, row in zip(back, rows, strict=True):
            found = tiers.near.buffer[block.address : block.address + batch.size_bytes]
            assert torch.equal(found, row)
        assert allocated(tiers.far) == [0]

    def test_what_the_target_cannot_hold_is_refused(self, tiers: Tiers) -> None:
        batch = filled(tiers.near, 3)
        buffers = BufferAllocator()
        with pytest.raises((TypeError, ValueError)):
            offload(batch, buffers, tiers.device.stream(), free=True)
        assert buffers.leaks() == ()
        assert batch.live.all()
        for wrong in ({"path": "fast"}, {"max_sms": 0}, {"path": "host"}):
            with pytest.raises(ValueError, match=r"path|max_sms"):
                offload(batch, tiers.far, tiers.device.stream(), free=True, **wrong)
        with pytest.raises(TypeError):
            offload(batch, tiers.far, "stream", free=True)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            copy(batch)  # type: ignore[arg-type]
        assert allocated(tiers.far) == [0]
        assert batch.live.all()
        tiers.far.close()
        with pytest.raises(RuntimeError, match="closed"):
            offload(batch, tiers.far, tiers.device.stream(), free=True)
        assert batch.live.all()

    def test_of_a_batch_whose_transfer_failed(self, tiers: Tiers) -> None:
        device = tiers.device
        batch = filled(tiers.near, 8)
        target = offload(batch, tiers.far, device.stream())
        assert target is not None
        device.fail("event.query")
        assert target.transfer.done()
        before = allocated(tiers.near)
        for blocks in (target, list(target)):
            with pytest.raises(TransferError):
                restore(blocks, tiers.near, device.stream(), free=True)
        with pytest.raises(TransferError):
            copy((target, batch), device.stream())
        assert allocated(tiers.near) == before
        assert target.live.all()

    def test_of_a_host_copy_that_failed(
        self, tiers: Tiers, monkeypatch: pytest.MonkeyPatch, by_queue: Gate
    ) -> None:
        other = heap_on(tiers.device, "host", 1 << 18)
        batch = filled(tiers.far, 8)

        def fails(pieces: object) -> None:
            by_queue.wait()
            raise MemoryError("no room for the copy")

        monkeypatch.setattr(runs, "copy_on_host", fails)
        moved = offload(batch, other, free=True)
        assert moved is not None
        assert not batch.live.any()
        chained = offload(moved, heap_on(tiers.device, "host", 1 << 18))
        assert chained is not None
        by_queue.open()
        for failed in (moved, chained):
            with pytest.raises(TransferError, match="no room for the copy"):
                failed.transfer.result()
        assert batch.live.all()  # what was given up for a copy that failed is live again
        assert torch.equal(read(batch), random_bytes(8 * BLOCK, 0).view(8, -1))
        with pytest.raises(TransferError, match="no room"):
            restore(moved, tiers.near, tiers.device.stream())
        tiers.far.batched_free(batch)
        other.batched_free(moved)
        assert allocated(tiers.far, other, tiers.near) == [0, 0, 0]

    def test_another_copy_that_was_lost_is_not_its_own(self, tiers: Tiers) -> None:
        device, batch = tiers.device, filled(tiers.near, 4)
        out = memory_of(device, "host", 4 * BLOCK).view(4, BLOCK)
        lost = copy((batch, out), device.stream())
        away = offload(batch, tiers.far, device.stream(), free=True)
        assert away is not None
        device.fail("event.query")
        assert lost.done()
        away.transfer.result()
        assert not batch.live.any()
        assert allocated(tiers.near) == [4 * BLOCK]  # the lost one may still read them


def test_a_partial_move_does_no_python_work_for_a_block(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[int, list[int]] = {512: [], 1024: []}
    for num_blocks in (512, 1024) * 3:  # the first also fills caches
        near = heap_on(device, "device", num_blocks * BLOCK)
        far = heap_on(device, "host", num_blocks // 2 * BLOCK)
        batch = filled(near, num_blocks)
        # Neither other tests' copies, which a new one looks at, nor their garbage are counted.
        monkeypatch.setattr(moves, "in_flight", InFlight())
        gc.collect()
        gc.disable()
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            is_ours = frame.f_globals.get("__name__", "").startswith("kvheap.")
            calls += event == "call" and is_ours

        stream: Any = device.stream()
        sys.setprofile(count)
        try:
            away = offload(batch, far, stream, free=True, allow_partial=True)
        finally:
            sys.setprofile(None)
            gc.enable()
        counts[num_blocks].append(calls)
        assert away is not None
        away.transfer.result()
        half = num_blocks // 2
        assert batch.live.tolist() == [False] * half + [True] * half
        assert torch.equal(read(away), random_bytes(num_blocks * BLOCK, 0).view(-1, BLOCK)[:half])
        assert allocated(near) == [half * BLOCK]
    # The least: transfers that other tests have left in flight are looked at now and then.
    assert min(counts[512]) == min(counts[1024])


class TestHeapsThatWatch:
    """Heaps that wipe or poison what is freed, or grow."""

    @pytest.mark.parametrize("options", [{"debug": True}, {"scrub": True}], ids=str)
    def test_there_and_back(self, device: FakeDevice, options: dict[str, bool]) -> None:
        how: Any = {"stream_wait_s": 0, "on_full": None, **options}
        near = TensorMemoryAllocator(device.tensor(1 << 16), **how)
        far = TensorMemoryAllocator(device.pinned_tensor(1 << 16), **how)
        batch = filled(near, 16, seed=5)
        expected = read(batch).clone()
        for path in ("copy_engine", "kernel", "staged", None):
            stream: Any = device.stream()
            away = offload(batch, far, stream, free=True, path=path)
            assert away is not None
            batch = restore(away, near, stream, free=True, path=path)  # type: ignore[assignment]
            assert batch is None  # no room before the copies have ended
            away.transfer.result()
            batch = restore(away, near, stream, free=True, path="copy_engine")  # type: ignore[assignment]
            batch.transfer.result()  # type: ignore[union-attr]
            assert torch.equal(read(batch), expected)
        near.batched_free(batch)
        assert allocated(near, far) == [0, 0]
        if "scrub" in options:
            assert not near.buffer.any()
            assert not far.buffer.any()

    def test_into_a_heap_that_grows(self, device: FakeDevice) -> None:
        near = heap_on(device, "device", 64 * BLOCK)
        registrar: Any = Registrar(device)
        piece = 16 * BLOCK
        with LazyMemoryAllocator(piece, 4 * piece, piece_bytes=piece, registrar=registrar) as far:
            far.wait_until_grown(20)
            assert len(far.host_buffer.pinned_ranges) == 4
            batch = filled(near, 64, seed=6)
            expected = read(batch).clone()
            away = offload(batch, far, device.stream(), free=True)  # type: ignore[arg-type]
            assert away is not None
            assert away.transfer.num_runs == 4  # none straddles two registrations
            away.transfer.result()
            assert torch.equal(read(away), expected)
            far.batched_free(away)


class TestOneAfterAnother:
    @pytest.mark.parametrize("away_path", [None, *PATHS_OF["d2h"]])
    @pytest.mark.parametrize("back_path", [None, *PATHS_OF["h2d"]])
    def test_back_while_it_is_on_its_way(
        self, device: FakeDevice, away_path: Any, back_path: Any
    ) -> None:
        near, far = heap_on(device, "device", 64 * BLOCK), heap_on(device, "host", 24 * BLOCK)
        whole = filled(near, 64)
        contents = read(whole[:48:2])
        first, second = device.stream(), device.stream()
        away = offload(whole[:48:2], far, first, free=True, path=away_path)
        assert away is not None
        near.batched_free(whole[48::2])  # scattered room
        back = restore(away[:8], near, second, path=None if back_path == "staged" else back_path)
        assert back is not None
        assert not away.transfer.done()
        require_sound(device, near, far)
        while device.run_one(second):
            pass
        back.transfer.result()
        assert away.transfer.done()
        assert torch.equal(read(back), contents[:8])

    def test_of_several_that_are_on_their_way(self, device: FakeDevice) -> None:
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
        batches = [filled(near, 4, seed=seed) for seed in range(5)]
        moved = [offload(batch, far, device.stream(), free=True) for batch in batches]
        objects = [batch[1] for batch in moved if batch is not None]
        last = device.stream()
        back = restore(objects, near, last)
        assert back is not None
        while device.run_one(last):
            pass
        expected = [random_bytes(4 * BLOCK, seed).view(4, -1)[1] for seed in range(5)]
        assert torch.equal(read(back), torch.stack(expected))

    def test_to_another_place_of_the_host_meanwhile(
        self, device: FakeDevice, by_queue: Gate
    ) -> None:
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
        plain = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
        batch = filled(near, 8)
        contents = read(batch)
        away = offload(batch, far, device.stream(), free=True)
        assert away is not None
        further = offload(away, plain, free=True)
        assert further is not None
        assert further.transfer.direction == "h2h"
        assert not further.transfer.done()
        by_queue.open()
        further.transfer.result()
        assert away.transfer.done()
        assert torch.equal(read(further), contents)
        assert allocated(near, far) == [0, 0]

    def test_from_another_place_of_the_host_meanwhile(
        self, device: FakeDevice, by_queue: Gate
    ) -> None:
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
        plain = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
        batch = filled(plain, 8)
        contents = read(batch)
        pinned = offload(batch, far, free=True)
        assert pinned is not None
        threading.Timer(0.02, by_queue.open).start()
        back = restore(pinned, near, device.stream(), free=True)
        assert back is not None
        back.transfer.result()
        assert torch.equal(read(back), contents)
        assert allocated(plain, far) == [0, 0]

    def test_between_devices(self, device: FakeDevice, peer: FakeDevice) -> None:
        near, there = heap_on(device, "device", 1 << 20), heap_on(device, "peer", 1 << 20)
        far = heap_on(device, "host", 1 << 20)
        batch = filled(near, 8)
        contents = read(batch)
        moved = offload(batch, there, device.stream(), free=True)
        assert moved is not None
        assert moved.transfer.direction == "p2p"
        away = offload(moved, far, peer.stream(), free=True)  # on a stream of the other device
        assert away is not None
        away.transfer.result()
        assert torch.equal(read(away), contents)

    def test_a_stream_of_the_target_waits(self, device: FakeDevice, peer: FakeDevice) -> None:
        near, there = heap_on(device, "device", 1 << 20), heap_on(device, "peer", 1 << 20)
        batch = filled(near, 8)
        moved = offload(batch, there, device.stream())
        assert moved is not None
        stream = peer.stream()
        moved.transfer.wait_stream(stream)  # type: ignore[arg-type]
        while peer.run_one(stream):
            pass
        assert torch.equal(read(moved), read(batch))


class TestOrder:
    @pytest.mark.parametrize("path", [None, *PATHS_OF["d2h"]])
    def test_work_queued_before_the_copy_is_seen(self, device: FakeDevice, path: Any) -> None:
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, "host", 1 << 20)
        whole = filled(near, 64)
        blocks = whole[::2]
        stream = device.stream()
        stream.queue.append(("work", lambda: near.buffer[: 64 * BLOCK].fill_(3)))
        away = offload(blocks, far, stream, path=path)
        assert away is not None
        while device.run_one(device.side):
            pass
        away.transfer.result()
        assert (read(away) == 3).all()

    @pytest.mark.parametrize("path", [None, *PATHS_OF["d2h"]])
    @pytest.mark.parametrize("to", ["host", "peer"])
    def test_another_stream_waits_for_the_current_one(
        self, device: FakeDevice, path: Any, to: str
    ) -> None:
        if to == "peer" and path not in (None, "copy_engine"):
            return
        near, far = heap_on(device, "device", 1 << 20), heap_on(device, to, 1 << 20)
        whole = filled(near, 64)
        current, stream = device.stream(), device.stream()
        with device.using(current):
            current.queue.append(("work", lambda: near.buffer[: 64 * BLOCK].fill_(3)))
            away = offload(whole[::2], far, stream, path=path)
        assert away is not None
        for each in (device.side, stream):
            while device.run_one(each):
                pass
        assert (read(away) == 3).all()

    @pytest.mark.parametrize("path", [None, "kernel", "copy_engine"])
    def test_fresh_targets_may_still_be_read_on_the_current_stream(
        self, device: FakeDevice, path: Any
    ) -> None:
        near, far = heap_on(device, "device", 8 * BLOCK), heap_on(device, "host", 1 << 20)
        batch = filled(far, 8, seed=2)
        old = filled(near, 8, seed=1)
        current, stream = device.stream(), device.stream()
        seen: list[torch.Tensor] = []
        with device.using(current):
            current.queue.append(("work", lambda: seen.append(near.buffer.clone())))
            near.batched_free(old)
            back = restore(batch, near, stream, path=path)
        assert back is not None
        while device.run_one(stream):
            pass
        device.drain()
        assert torch.equal(seen[0], random_bytes(8 * BLOCK, 1))
        assert torch.equal(read(back), read(batch))

    def test_fresh_targets_on_another_device(self, device: FakeDevice, peer: FakeDevice) -> None:
        near, there = heap_on(device, "device", 1 << 20), heap_on(device, "peer", 8 * BLOCK)
        batch = filled(near, 8, seed=2)
        old = filled(there, 8, seed=1)
        seen: list[torch.Tensor] = []
        current = peer.stream()
        with peer.using(current):
            current.queue.append(("work", lambda: seen.append(there.buffer.clone())))
            there.batched_free(old)  # free for work on the peer's current stream
            moved = offload(batch, there, device.stream())
        assert moved is not None
        device.drain()
        peer.drain()
        assert torch.equal(seen[0], random_bytes(8 * BLOCK, 1))

    @pytest.mark.parametrize("direction", ["d2h", "h2d"])
    def test_extents_of_the_heap_may_still_be_read_on_the_current_stream(
        self, device: FakeDevice, direction: str
    ) -> None:
        heap = heap_on(device, "device", 96 * BLOCK)
        blocks = filled(heap, 64)[::2]
        old = filled(heap, 32, seed=1)
        out = memory_of(device, "host", 32 * BLOCK).view(32, BLOCK)
        current, stream = device.stream(), device.stream()
        seen: list[torch.Tensor] = []
        with device.using(current):
            current.queue.append(("work", lambda: seen.append(heap.buffer[64 * BLOCK :].clone())))
            heap.batched_free(old)
            pair = (blocks, out) if direction == "d2h" else (out, blocks)
            transfer = copy(pair, stream, path="staged")
        assert device.held_staging == 0  # it did take the heap's
        for each in (device.side, stream):
            while device.run_one(each):
                pass
        device.drain()
        assert torch.equal(seen[0], random_bytes(32 * BLOCK, 1))
        transfer.result()
        assert torch.equal(read(blocks), out)
