"""What a copy may take: captures, the legacy stream, the choice of path, pieces between walls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import (
    PATHS_OF,
    POISON,
    FakeDevice,
    FakeStream,
    filled,
    heap_on,
    memory_of,
    random_bytes,
    read,
)
from transfer_scenes import BLOCK, Places, Registrar, allocated

from kvheap import PinMemoryAllocator, TensorMemoryAllocator
from kvheap.planning import planner
from kvheap.transfer import CopyPlan, copy, offload, restore


class TestCapture:
    @pytest.fixture
    def pair(self, device: FakeDevice) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = memory_of(device, "device", 1 << 16), memory_of(device, "host", 1 << 16)
        source.copy_(random_bytes(1 << 16, 1))
        return source, target

    @staticmethod
    def plan_of(pair: tuple[torch.Tensor, torch.Tensor], count: int) -> CopyPlan:
        starts = np.arange(count) * 512
        return CopyPlan.of_addresses(*pair, starts, starts, 256)

    @pytest.fixture
    def capture(self, device: FakeDevice) -> FakeStream:
        stream = device.stream()
        stream.capturing = True
        return stream

    @staticmethod
    def replayed(device: FakeDevice, capture: FakeStream) -> None:
        capture.capturing = False
        assert device.is_idle
        capture.replay()

    @pytest.mark.parametrize("path", [None, "kernel", "staged"])
    def test_many_runs_are_refused(
        self, device: FakeDevice, capture: FakeStream, pair: Any, path: Any
    ) -> None:
        plan = self.plan_of(pair, 64)
        with pytest.raises(RuntimeError, match="captur"):
            copy(plan, capture, path=path)  # type: ignore[arg-type]
        assert capture.graph == []
        assert device.calls == []

    @pytest.mark.parametrize("path", [None, "kernel"])
    def test_a_prepared_plan_is_captured(self, device: FakeDevice, pair: Any, path: Any) -> None:
        plan = self.plan_of(pair, 64)
        with device.using(device.stream()):
            assert plan.prepare() is plan
        capture = device.stream()
        capture.capturing = True
        transfer = copy(plan, capture, path=path)  # type: ignore[arg-type]
        assert [call[0] for call in device.calls] == ["run"]
        assert device.counts["prepare"] == 1
        self.replayed(device, capture)
        assert transfer.path == "kernel"
        for start in range(0, 64 * 512, 512):
            assert torch.equal(pair[1][start : start + 256], pair[0][start : start + 256])
            assert (pair[1][start + 256 : start + 512] == POISON).all()

    @pytest.mark.parametrize(("count", "path"), [(1, None), (8, None), (20, "copy_engine")])
    def test_single_copies_are_captured(
        self, device: FakeDevice, capture: FakeStream, pair: Any, count: int, path: Any
    ) -> None:
        transfer = copy(self.plan_of(pair, count), capture, path=path)  # type: ignore[arg-type]
        assert [call[0] for call in device.calls] == ["copy_each"]
        assert transfer.path == "copy_engine"
        self.replayed(device, capture)
        starts = range(0, count * 512, 512)
        assert all(torch.equal(pair[1][at : at + 256], pair[0][at : at + 256]) for at in starts)

    def test_what_was_captured_has_no_end(
        self, device: FakeDevice, capture: FakeStream, pair: Any
    ) -> None:
        transfer = copy(self.plan_of(pair, 1), capture)  # type: ignore[arg-type]
        assert transfer.parts == ()
        assert repr(transfer).endswith("captured)")
        for ask in (
            transfer.done,
            transfer.wait,
            transfer.result,
            lambda: transfer.wait_stream(device.stream()),  # type: ignore[arg-type]
            lambda: asyncio.run(transfer._ended()),
        ):
            with pytest.raises(RuntimeError, match="captured in a CUDA graph"):
                ask()
        with transfer:
            pass

    def test_what_is_on_its_way_cannot_be_captured(
        self, device: FakeDevice, capture: FakeStream
    ) -> None:
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4)
        away = offload(batch, far, device.stream())
        assert away is not None
        with pytest.raises(RuntimeError, match="in flight"):
            copy((away, batch), capture)  # type: ignore[arg-type]
        assert capture.graph == []
        device.drain()
        copy((away, batch), capture)  # type: ignore[arg-type]

    def test_blocks_cannot_be_given_up_in_a_capture(
        self, device: FakeDevice, capture: FakeStream
    ) -> None:
        """Each replay copies again: there is no end at which they could be freed."""
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4)
        with pytest.raises(RuntimeError, match="captur"):
            offload(batch, far, capture, free=True)  # type: ignore[arg-type]
        assert capture.graph == []
        assert batch.live.all()
        assert allocated(far) == [0]

    def test_no_stream_is_drawn_into_the_capture_of_the_current_one(
        self, device: FakeDevice, capture: FakeStream
    ) -> None:
        near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
        batch = filled(near, 4)
        with device.using(capture), pytest.raises(RuntimeError, match="captur"):
            offload(batch, far, device.stream())
        assert capture.graph == []
        assert allocated(far) == [0]

    def test_a_plan_is_not_prepared_in_a_capture(
        self, device: FakeDevice, capture: FakeStream, pair: Any
    ) -> None:
        with device.using(capture), pytest.raises(RuntimeError, match="before the capture"):
            self.plan_of(pair, 64).prepare()
        assert device.counts["prepare"] == 0


class TestLegacyStream:
    @pytest.mark.parametrize("direction", ["d2h", "h2d", "d2d", "p2p"])
    def test_the_batch_call_is_refused_when_forced(
        self, device: FakeDevice, direction: str
    ) -> None:
        places = Places.of(device, direction, np.full(20, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        with pytest.raises(ValueError, match="legacy default stream"):
            copy(plan, path="copy_engine")
        assert device.is_idle
        assert device.calls == []

    def test_one_run_is_allowed(self, device: FakeDevice) -> None:
        places = Places.of(device, "d2h", np.full(1, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        expected = places.expected()
        copy(plan, path="copy_engine").result()
        assert torch.equal(places.target, expected)
        assert [call[0] for call in device.calls] == ["copy_each"]

    @pytest.mark.parametrize("direction", ["d2h", "h2d", "d2d"])
    def test_another_path_is_chosen_and_told_once(
        self, device: FakeDevice, direction: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(3):
            places = Places.of(device, direction, np.full(20, 256))
            plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
            expected = places.expected()
            transfer = copy(plan)
            assert transfer.path in ("kernel", "staged")
            transfer.result()
            assert torch.equal(places.target, expected)
        told = [record for record in caplog.records if "legacy default stream" in record.message]
        assert [record.levelno for record in told] == [logging.WARNING]

    def test_where_there_is_no_other_path_pieces_go_one_by_one(
        self, device: FakeDevice, caplog: pytest.LogCaptureFixture
    ) -> None:
        device.has_kernel = False
        for direction in ("d2h", "h2d", "d2d", "p2p"):
            places = Places.of(device, direction, np.full(20, 256))
            plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
            expected = places.expected()
            copy(plan).result()
            assert torch.equal(places.target, expected)
        assert {call[0] for call in device.calls} == {"copy_each"}
        assert sum("legacy" in record.message for record in caplog.records) == 1

    def test_few_runs_are_copied_one_by_one_and_nobody_is_told(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(planner, "table_for", lambda *_: Choice("copy_engine"))
        places = Places.of(device, "d2h", np.full(8, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        copy(plan).result()
        assert [call[0] for call in device.calls] == ["copy_each"]
        assert caplog.records == []

    @pytest.mark.parametrize("on_default", [True, False])
    @pytest.mark.parametrize("path", [None, "copy_engine"])
    def test_an_older_driver_copies_pieces_one_by_one(
        self,
        device: FakeDevice,
        monkeypatch: pytest.MonkeyPatch,
        on_default: bool,
        path: Any,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        device.has_batch = False
        monkeypatch.setattr(planner, "table_for", lambda *_: Choice("copy_engine"))
        places = Places.of(device, "d2h", np.full(20, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        expected = places.expected()
        copy(plan, None if on_default else device.stream(), path=path).result()  # type: ignore[arg-type]
        assert torch.equal(places.target, expected)
        assert {call[0] for call in device.calls} == {"copy_each"}
        assert caplog.records == []


class Choice:
    """A table that always chooses one path, if it is allowed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.asked: list[tuple[Any, ...]] = []

    def choose(self, direction: str, count: int, num_bytes: int, allowed: Iterable[str]) -> str:
        self.asked.append((direction, count, num_bytes, tuple(allowed)))
        assert self.path in allowed
        return self.path

    def default_sms(self, direction: str) -> int | None:
        return None


class TestChoice:
    @pytest.mark.parametrize("direction", ["d2h", "h2d", "d2d"])
    @pytest.mark.parametrize("path", ["kernel", "copy_engine", "staged"])
    def test_the_table_decides(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, direction: str, path: str
    ) -> None:
        table = Choice(path)
        monkeypatch.setattr(planner, "table_for", lambda *_: table)
        places = Places.of(device, direction, np.full(20, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        if path not in PATHS_OF[direction]:
            with pytest.raises(AssertionError):
                copy(plan, device.stream())  # type: ignore[arg-type]
            assert path not in table.asked[0][3]
            return
        assert copy(plan, device.stream()).path == path  # type: ignore[arg-type]
        assert table.asked[0][:3] == (direction, 20, 20 * 256)
        assert set(table.asked[0][3]) == set(PATHS_OF[direction])

    def test_the_table_is_asked_for_one_part_of_several(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each is submitted by itself: 40 runs in 4 parts are no batch of 40."""
        table = Choice("kernel")
        monkeypatch.setattr(planner, "table_for", lambda *_: table)
        places = Places.of(device, "d2h", np.full(40, 256))
        plan = CopyPlan.of_addresses(
            places.source, places.target, *places.starts, 256, parts=[10, 10, 0, 10, 10]
        )
        copy(plan, device.stream())  # type: ignore[arg-type]
        assert [asked[:3] for asked in table.asked] == [("d2h", 10, 10 * 256)]

    def test_the_default_stream_is_told_of_only_where_it_matters(
        self,
        device: FakeDevice,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(planner, "table_for", lambda *_: Choice("kernel"))
        places = Places.of(device, "d2h", np.full(40, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        assert copy(plan).path == "kernel"
        assert caplog.records == []

    def test_staging_is_not_chosen_for_a_scattered_host_side(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class PrefersStaging(Choice):
            def choose(self, direction: str, count: int, num_bytes: int, allowed: Any) -> str:
                self.asked.append((direction, count, num_bytes, tuple(allowed)))
                return "staged" if "staged" in allowed else "kernel"

        monkeypatch.setattr(planner, "table_for", lambda *_: PrefersStaging("staged"))
        gpu, host = device.tensor(1 << 16), device.pinned_tensor(1 << 16)
        starts = np.random.default_rng(0).permutation(64) * 1024
        in_a_row = np.arange(64) * 512
        stream: Any = device.stream()
        for host_side, path in ((in_a_row, "staged"), (starts[::-1].copy(), "kernel")):
            plan = CopyPlan.of_addresses(gpu, host, starts, host_side, 512)
            assert copy(plan, stream).path == path

    def test_without_triton_nothing_needs_it(self, device: FakeDevice) -> None:
        device.has_kernel = False
        places = Places.of(device, "d2h", np.full(64, 256))
        plan = CopyPlan.of_addresses(places.source, places.target, *places.starts, 256)
        assert copy(plan, device.stream()).path == "copy_engine"  # type: ignore[arg-type]
        for path in ("kernel", "staged"):
            with pytest.raises(ValueError, match="needs the triton package"):
                copy(plan, device.stream(), path=path)  # type: ignore[arg-type]

    def test_the_host_takes_no_stream(self, device: FakeDevice) -> None:
        with pytest.raises(ValueError, match="runs on no stream"):
            copy((torch.zeros(2, 2), torch.zeros(2, 2)), device.stream())  # type: ignore[arg-type]


PIECE = 16 << 10


class TestWalls:
    @pytest.mark.parametrize("direction", ["d2h", "h2d"])
    @pytest.mark.parametrize("path", [None, *PATHS_OF["d2h"]])
    @pytest.mark.parametrize("is_stream_legacy", [False, True])
    def test_no_run_is_in_two_registrations(
        self, device: FakeDevice, direction: str, path: Any, is_stream_legacy: bool
    ) -> None:
        near = heap_on(device, "device", 1 << 20)
        with PinMemoryAllocator(
            16 * PIECE, registrar=Registrar(device), piece_bytes=PIECE, stream_wait_s=0.0
        ) as far:
            assert len(far.host_buffer.pinned_ranges) == 16
            on_device: Any = filled(near, 128)
            if path == "staged":
                on_device = on_device[::2]
            else:
                near.batched_free(on_device[64:])
                on_device = on_device[:64]
            on_host = filled(far, 64, seed=1)
            assert on_host.num_runs <= 16
            pair = (on_device, on_host) if direction == "d2h" else (on_host, on_device)
            plan = CopyPlan.between(*pair)
            bounds = sorted(start for start, _ in device.pinned)
            for part in plan.parts:
                starts = part.targets if direction == "d2h" else part.sources
                ends = starts + part.size_array()
                first = np.searchsorted(bounds, starts, side="right")
                last = np.searchsorted(bounds, ends, side="left")
                assert (first == last).all()
            if path != "staged":
                assert len(plan.parts[0]) == 16
            if path == "copy_engine" and is_stream_legacy:
                return
            stream = None if is_stream_legacy else device.stream()
            copy(plan, stream, path=path).result()  # type: ignore[arg-type]
            assert torch.equal(read(on_device), read(on_host))
            assert (
                torch.equal(
                    read(on_host),
                    random_bytes(64 * BLOCK, 0 if direction == "d2h" else 1).view(64, -1),
                )
                or path == "staged"
            )

    @pytest.mark.parametrize("direction", ["d2h", "h2d"])
    @pytest.mark.parametrize("path", [None, *PATHS_OF["d2h"]])
    @pytest.mark.parametrize("by", ["tensor", "pointers"])
    def test_no_piece_of_a_tensor_is_in_two_registrations(
        self, device: FakeDevice, direction: str, path: Any, by: str
    ) -> None:
        host = device.pinned_tensor(60_000, cuts=(5000, 5001, 20_001, 40_000))
        gpu = device.tensor(240_000)
        rows = 60
        starts = (np.arange(rows) * 1000, np.arange(rows) * 4000)
        source, target = (gpu, host) if direction == "d2h" else (host, gpu)
        places = starts[::-1] if direction == "d2h" else starts
        source.copy_(random_bytes(source.numel(), 4))
        if by == "tensor":
            plan = CopyPlan.of_addresses(source, target, *places, 1000)
        else:
            names = ("cuda", "cpu") if direction == "d2h" else ("cpu", "cuda")
            plan = CopyPlan.of_pointers(
                places[0] + source.data_ptr(), places[1] + target.data_ptr(), 1000, *names
            )
        assert plan.num_runs == rows + 2  # two of the cuts are inside of pieces
        copy(plan, device.stream(), path=path).result()  # type: ignore[arg-type]
        for here, there in zip(*places, strict=True):
            assert torch.equal(target[there : there + 1000], source[here : here + 1000])

    def test_buffers_of_a_heap_that_share_a_registration(self, device: FakeDevice) -> None:
        memory = device.pinned_tensor(1 << 20, cuts=(300_000,))
        far = TensorMemoryAllocator(memory[: 1 << 19])
        assert far.batched_allocate([1 << 19], torch.uint8, 1) is not None
        far.add_buffer(memory[1 << 19 :])
        near = heap_on(device, "device", 1 << 19)
        source = near.batched_allocate([1 << 19], torch.uint8, 1)
        target = far.view([0], [1 << 19], torch.uint8)
        assert source is not None
        plan = CopyPlan.between(source, target)
        assert plan.parts[0].size_array().tolist() == [300_000, (1 << 19) - 300_000]
        copy(plan, device.stream(), path="copy_engine").result()  # type: ignore[arg-type]

    def test_memory_that_is_not_pinned_is_refused(self, device: FakeDevice) -> None:
        plain = torch.zeros(4096, dtype=torch.uint8)
        gpu = device.tensor(4096)
        for pair in ((gpu, plain), (plain, gpu)):
            with pytest.raises(ValueError, match=r"piece 0 .*is in host memory.* not pinned"):
                CopyPlan.of_addresses(*pair, [0, 8], [0, 8], 8)
        near = heap_on(device, "device", 1 << 16)
        far = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
        batch = filled(near, 4)
        with pytest.raises(ValueError, match="not pinned: Fake GPU cannot reach it"):
            offload(batch, far, device.stream(), free=True)  # type: ignore[arg-type]
        assert batch.live.all()
        assert allocated(far) == [0]
        assert device.is_idle

    def test_a_hole_between_pinned_memory_is_only_where_it_is(self, device: FakeDevice) -> None:
        host, gpu = torch.zeros(3 * 4096, dtype=torch.uint8), device.tensor(3 * 4096)
        base = host.data_ptr()
        device.pinned += [(base, base + 4096), (base + 8192, base + 12288)]
        starts = [0, 8192]
        CopyPlan.of_addresses(gpu, host, starts, starts, 4096)
        with pytest.raises(ValueError, match=r"piece 1 .*not pinned"):
            CopyPlan.of_addresses(gpu, host, [0, 4096, 8192], [0, 4096, 8192], 4096)

    @pytest.mark.parametrize("refused", [[1], [0], [0, 3]])
    def test_a_heap_that_is_pinned_in_part(self, device: FakeDevice, refused: list[int]) -> None:
        near = heap_on(device, "device", 1 << 18)
        with PinMemoryAllocator(
            4 * PIECE,
            registrar=Registrar(device, refused),
            piece_bytes=PIECE,
            allow_unpinned=True,
        ) as far:
            batch = filled(far, 16)
            for row, block in enumerate(batch):
                target = near.batched_allocate([BLOCK], torch.uint8, 1)
                assert target is not None
                if row * BLOCK // PIECE in refused:
                    with pytest.raises(ValueError, match="not pinned"):
                        copy(([block], target), device.stream())  # type: ignore[arg-type]
                else:
                    copy(([block], target), device.stream()).result()  # type: ignore[arg-type]
                    assert torch.equal(read(target), read([block]))
            first = min(row for row in range(16) if row * BLOCK // PIECE in refused)
            before = allocated(near)
            with pytest.raises(ValueError, match=rf"piece {first} .*not pinned"):
                restore(list(batch), near, device.stream(), free=True)  # type: ignore[arg-type]
            assert allocated(near) == before
            assert batch.live.all()

    def test_buffers_of_a_device_are_walls(self, device: FakeDevice) -> None:
        memory = device.tensor(8 * BLOCK)
        device.own[-1:] = [
            (memory.data_ptr(), memory.data_ptr() + 4 * BLOCK),
            (memory.data_ptr() + 4 * BLOCK, memory.data_ptr() + 8 * BLOCK),
        ]
        near = TensorMemoryAllocator(memory[: 4 * BLOCK])
        near.add_buffer(memory[4 * BLOCK :])
        far = heap_on(device, "host", 1 << 16)
        batch = filled(near, 8)
        away = offload(batch, far, device.stream(), path="copy_engine")  # type: ignore[arg-type]
        assert away is not None
        assert away.transfer.num_runs == 2
        away.transfer.result()
        assert torch.equal(read(away), read(batch))
