"""What a transfer will do: pieces, parts, walls, and what is refused before anything moves."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import (
    DIRECTIONS,
    FakeDevice,
    filled,
    heap_on,
    memory_of,
    random_bytes,
    read,
    write,
)

from kvheap import (
    BufferAllocator,
    ClosedError,
    ForeignObjectError,
    LifetimeError,
    MemoryFormat,
    TensorMemoryAllocator,
)
from kvheap.transfer import CopyPlan, copy

BLOCK = 4096


def host_heap(num_bytes: int = 1 << 18, align_bytes: int = BLOCK) -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.zeros(num_bytes, dtype=torch.uint8), align_bytes)


def two_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    return random_bytes(256, 1), torch.zeros(256, dtype=torch.uint8)


def moved(plan: CopyPlan) -> list[tuple[int, int]]:
    """Source and target of each byte, in order."""
    return [
        (source + at, target + at)
        for part in plan.parts
        for source, target, size in zip(
            part.sources.tolist(), part.targets.tolist(), part.size_array().tolist(), strict=True
        )
        for at in range(size)
    ]


class TestOfAddresses:
    def test_neighbours_on_both_sides_are_one_run(self) -> None:
        source, target = two_buffers()
        plan = CopyPlan.of_addresses(source, target, [0, 8, 16, 40], [64, 72, 96, 104], 8)
        assert (plan.num_runs, plan.num_bytes, plan.direction) == (3, 32, "h2h")
        assert repr(plan) == "CopyPlan(h2h, 32 bytes in 3 runs, 1 part)"
        assert plan.device is None
        assert moved(plan)[0] == (source.data_ptr(), target.data_ptr() + 64)

    @pytest.mark.parametrize("is_source", [True, False])
    @pytest.mark.parametrize("size_bytes", [0, 100])
    @pytest.mark.parametrize("places", [[0, 64], np.array([0, 64])])
    def test_memory_that_was_taken_away_is_refused(
        self, places: Any, size_bytes: int, is_source: bool
    ) -> None:
        tensors = [torch.zeros(2, 64, dtype=torch.uint8) for _ in range(2)]
        name, lost = ("source", 0) if is_source else ("target", 1)
        tensors[lost].untyped_storage().resize_(size_bytes)  # as FSDP does
        message = rf"{name} ends at byte 128 of its storage, which was resized to {size_bytes}"
        with pytest.raises(ValueError, match=message):
            CopyPlan.of_addresses(*tensors, places, places, 64)
        with pytest.raises(ValueError, match=message):
            copy((tensors[0], tensors[1]))

    def test_runs_stay_inside_of_parts(self) -> None:
        source, target = two_buffers()
        plan = CopyPlan.of_addresses(
            source, target, [0, 8, 16, 24], [0, 8, 16, 24], 8, parts=[1, 0, 3]
        )
        assert [part.num_bytes for part in plan.parts] == [8, 0, 24]
        assert plan.num_runs == 2
        assert repr(plan) == "CopyPlan(h2h, 32 bytes in 2 runs, 3 parts)"

    def test_any_dtype_and_views(self) -> None:
        source = torch.arange(64, dtype=torch.float64)
        target = torch.zeros(8, 8, dtype=torch.int16)
        plan = CopyPlan.of_addresses(source[4:], target[2:], [8], [2], [24])
        copy(plan).result()
        flat = target.view(-1).view(torch.uint8)
        assert torch.equal(flat[34:58], source.view(torch.uint8)[40:64])
        assert (flat[:34] == 0).all()
        assert (flat[58:] == 0).all()

    def test_within_one_buffer(self) -> None:
        buffer = random_bytes(256, 1)
        before = buffer.clone()
        copy(CopyPlan.of_addresses(buffer, buffer, [0, 32], [128, 64], [32, 16])).result()
        assert torch.equal(buffer[128:160], before[:32])
        assert torch.equal(buffer[64:80], before[32:48])
        for sources, targets in (([0], [16]), ([0, 64], [128, 80]), ([64], [64])):
            with pytest.raises(ValueError, match="overlaps the source of piece"):
                CopyPlan.of_addresses(buffer, buffer, sources, targets, 32)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([0, 250], [0, 8], 8), "source_addresses[1] is 250: a block of 8 bytes there"),
            (([0], [256], [1]), "target_addresses[0] is 256: a piece of 1 bytes there exceeds"),
            (([-8], [0], 8), "source_addresses[0] is -8"),
            (([0], [0], 2**63 - 1), "not within"),
            (([0], [0], -8), "sizes must not be negative"),
            (([0, 8], [0, 4], 8), "targets overlap"),
            (([0, 8], [0], 8), "2 sources but 1 targets"),
            (([0, 8], [0, 8], [8]), "2 sources, 2 targets and 1 sizes"),
            (([[0]], [[0]], 8), "must be one-dimensional"),
        ],
    )
    def test_wrong_values(self, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            CopyPlan.of_addresses(*two_buffers(), *arguments)

    @pytest.mark.parametrize("arguments", [([0.5], [0], 8), ([0], [0], 8.0), ([0], ["0"], 8)])
    def test_wrong_types(self, arguments: Any) -> None:
        with pytest.raises(TypeError, match="must be integers"):
            CopyPlan.of_addresses(*two_buffers(), *arguments)

    def test_buffers_must_be_contiguous(self) -> None:
        source, target = two_buffers()
        with pytest.raises(ValueError, match="contiguous"):
            CopyPlan.of_addresses(source[::2], target, [0], [0], 8)

    @pytest.mark.parametrize("parts", [[1], [1, 2], [3, -1], []])
    def test_parts_must_add_up(self, parts: list[int]) -> None:
        with pytest.raises(ValueError, match="parts must add up to 2 pieces"):
            CopyPlan.of_addresses(*two_buffers(), [0, 8], [0, 8], 8, parts=parts)

    @pytest.mark.parametrize("parts", [[0.5, 1.5], [True, True], ["2"]])
    def test_parts_are_integers(self, parts: Any) -> None:
        with pytest.raises(TypeError, match="parts must be an integer"):
            CopyPlan.of_addresses(*two_buffers(), [0, 8], [0, 8], 8, parts=parts)

    @pytest.mark.parametrize("parts", [None, [1, 1]])
    @pytest.mark.parametrize(
        ("targets", "sizes"), [([0, 8, 16], 8), ([0, 8], [8, 8, 8]), ([0], 8), ([0, 8], [8])]
    )
    def test_lengths_must_agree_also_in_parts(
        self, targets: list[int], sizes: Any, parts: list[int] | None
    ) -> None:
        with pytest.raises(ValueError, match="targets"):
            CopyPlan.of_addresses(*two_buffers(), [0, 8], targets, sizes, parts=parts)

    def test_a_later_part_does_not_overlap_an_earlier_one(self) -> None:
        with pytest.raises(ValueError, match="targets overlap"):
            CopyPlan.of_addresses(*two_buffers(), [0, 8], [0, 4], 8, parts=[1, 1])


class TestOfPointers:
    def test_within_the_host(self) -> None:
        source, target = two_buffers()
        sources = source.data_ptr() + np.array([0, 64], np.uint64)
        targets = [target.data_ptr() + 8, target.data_ptr()]
        plan = CopyPlan.of_pointers(sources, targets, [16, 8], "cpu", "cpu", keep=[source, target])
        copy(plan).result()
        assert torch.equal(target[8:24], source[:16])
        assert torch.equal(target[:8], source[64:72])
        assert {id(each) for each in (source, target)} <= {id(each) for each in plan.memory}

    @pytest.mark.parametrize("wrong", [0, -8, 2**63 - 4])
    def test_null_and_wrapping_addresses(self, wrong: int) -> None:
        target = two_buffers()[1]
        for pointers in (([wrong], [target.data_ptr()]), ([target.data_ptr()], [wrong])):
            with pytest.raises(ValueError, match=r"positive addresses|wrap around"):
                CopyPlan.of_pointers(*pointers, 8, "cpu", "cpu")

    def test_what_the_driver_does_not_know(self, device: FakeDevice) -> None:
        gpu, host = memory_of(device, "device", 4096), memory_of(device, "host", 4096)
        other = memory_of(device, "peer", 4096)
        good = ([gpu.data_ptr()], [host.data_ptr()])
        assert CopyPlan.of_pointers(*good, 4096, "cuda:0", "cpu").direction == "d2h"
        for sources, targets, size in (
            (good[0], good[1], 4097),  # out of both
            ([gpu.data_ptr() + 4096 + 64], good[1], 8),
            ([other.data_ptr()], good[1], 8),  # of another device
            (good[1], good[0], 8),  # the wrong way around
            (good[0], [torch.zeros(8).data_ptr()], 8),  # not pinned
        ):
            with pytest.raises(ValueError, match="piece 0"):
                CopyPlan.of_pointers(sources, targets, size, "cuda:0", "cpu")

    def test_the_device_that_has_it_not_is_named(self, device: FakeDevice) -> None:
        gpu, other = memory_of(device, "device", 4096), memory_of(device, "peer", 4096)
        good = (gpu.data_ptr(), other.data_ptr())
        names = ("cuda:0", "cuda:1")
        assert CopyPlan.of_pointers([good[0]], [good[1]], 8, *names).direction == "p2p"
        with pytest.raises(ValueError, match="is not in memory of Fake GPU that CUDA knows"):
            CopyPlan.of_pointers([good[1]], [good[1] + 8], 8, *names)
        with pytest.raises(ValueError, match="is not in memory of Fake peer that CUDA knows"):
            CopyPlan.of_pointers([good[0]], [good[0] + 8], 8, *names)

    def test_the_driver_is_asked_once_for_each_allocation(self, device: FakeDevice) -> None:
        gpus = [memory_of(device, "device", 4096) for _ in range(3)]
        host = memory_of(device, "host", 3 * 4096)
        offsets = np.arange(0, 4096, 8)
        sources = np.concatenate([gpu.data_ptr() + offsets for gpu in gpus])
        order = np.random.default_rng(1).permutation(len(sources))
        targets = host.data_ptr() + np.arange(len(sources)) * 8
        plan = CopyPlan.of_pointers(sources[order], targets, 8, "cuda:0", "cpu")
        assert device.counts["locate"] == 4
        assert plan.num_bytes == 3 * 4096


class TestBetween:
    def test_blocks_of_a_run_are_one_run(self) -> None:
        near, far = host_heap(), host_heap()
        batch, target = filled(near, 8), filled(far, 8)
        assert CopyPlan.between(batch, target).num_runs == 1
        assert CopyPlan.between(batch[::2], target[:4]).num_runs == 4
        assert CopyPlan.between(batch[::-1], target).num_runs == 8

    @pytest.mark.parametrize(
        ("block_bytes", "is_joined"), [(4000, True), (3641, True), (3000, False)]
    )
    def test_padding_is_copied_where_it_is_little(self, block_bytes: int, is_joined: bool) -> None:
        near, far = host_heap(), host_heap()
        batch, target = filled(near, 8, block_bytes), filled(far, 8, block_bytes, seed=1)
        plan = CopyPlan.between(batch, target)
        assert plan.num_runs == (1 if is_joined else 8)
        assert plan.num_bytes == 8 * (BLOCK if is_joined else block_bytes)
        copy(plan).result()
        assert torch.equal(read(target), read(batch))

    def test_heaps_of_different_alignment(self) -> None:
        near, far = host_heap(align_bytes=4096), host_heap(align_bytes=512)
        batch, target = filled(near, 8, 1000), filled(far, 8, 1000, seed=1)
        plan = CopyPlan.between(batch, target)
        assert plan.num_bytes == 8000
        copy(plan).result()
        assert torch.equal(read(target), read(batch))

    def test_runs_in_pairs(self) -> None:
        """Batches in a few runs, which begin and end at different blocks on both sides."""
        rng = np.random.default_rng(2)
        for _ in range(20):
            sides: list[Any] = []
            for _ in range(2):
                heap = host_heap(400 * 512, 512)
                every = filled(heap, 400, 512)
                first = int(rng.integers(0, 50))
                free = [*range(first, first + 100), *range(200, 200 + int(rng.integers(156, 199)))]
                heap.batched_free([every[row] for row in free])
                sides.append((filled(heap, 256, 512, seed=first), every))
            batch, target = sides[0][0], sides[1][0]
            plan = CopyPlan.between(batch, target)
            expected = [
                (source + at, place + at)
                for source, place in zip(
                    batch.addresses + batch.allocator.buffer.data_ptr(),
                    target.addresses + target.allocator.buffer.data_ptr(),
                    strict=True,
                )
                for at in range(512)
            ]
            assert moved(plan) == expected
            assert plan.num_runs <= batch.num_runs + target.num_runs

    def test_several_batches_and_a_heap_of_several_buffers(self) -> None:
        near = host_heap(8 * BLOCK)
        first = filled(near, 8)
        near.add_buffer(torch.zeros(8 * BLOCK, dtype=torch.uint8))
        near.free(first[7])
        second, third = filled(near, 4, seed=1), filled(near, 3, seed=2)
        objects = [third[2], first[0], second[3], first[6], second[0]]
        out = torch.zeros(5, BLOCK, dtype=torch.uint8)
        copy((objects, out)).result()
        assert torch.equal(out, read(objects))
        far = host_heap()
        target = far.batched_allocate([BLOCK], torch.uint8, 8)
        assert target is not None
        copy(([*first[:7], second[1]], target)).result()
        assert torch.equal(read(target), read([*first[:7], second[1]]))

    def test_tensors_with_rows_apart(self) -> None:
        source = random_bytes(8 * 64, 1).view(8, 64)
        target = torch.zeros(8, 100, dtype=torch.uint8)
        copy((source[:, 8:40], target[:, 3:35])).result()
        assert torch.equal(target[:, 3:35], source[:, 8:40])
        assert (target[:, 35:] == 0).all()
        assert (target[:, :3] == 0).all()
        copy((source[:1].expand(4, 64), target[4:, :64])).result()  # one source many times
        assert torch.equal(target[4:, :64], source[:1].expand(4, 64))

    @pytest.mark.parametrize("shape", [(0, 4), (30, 0), (30, 0, 4), (0,)])
    def test_nothing(self, shape: tuple[int, ...]) -> None:
        plan = CopyPlan.between(torch.zeros(shape), torch.ones(shape))
        assert (plan.num_runs, plan.num_bytes) == (0, 0)
        copy(plan).result()

    def test_what_does_not_fit(self) -> None:
        near, far = host_heap(), host_heap()
        batch = near.batched_allocate([8], torch.float32, 4)
        wider = far.batched_allocate([16], torch.float32, 4)
        other_format = far.batched_allocate([8], torch.float32, 4, MemoryFormat.KV_T2D)
        assert batch is not None
        assert wider is not None
        for target, message in (
            (torch.zeros(5, 8), "the source has 4 blocks, the target 5"),
            (wider, "the source's blocks are (8,)"),
            (other_format, "the target's (8,) torch.float32 KV_T2D"),
            (torch.zeros(4, 9), "36"),
            (torch.zeros(4, 4, dtype=torch.int64), "blocks must be the same"),
            (torch.zeros(4, 2, 4), "blocks must be the same"),
            (torch.zeros(4, 16)[:, ::2], "must be contiguous, got strides"),
            (torch.zeros(()), "target must be [N, ...], got a scalar"),
            (torch.zeros(1, 8).expand(4, 8), "targets overlap"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                CopyPlan.between(batch, target)  # type: ignore[arg-type]
        complex_rows = torch.zeros(4, 4, dtype=torch.complex64).conj()
        with pytest.raises(ValueError, match="conj"):
            CopyPlan.between(complex_rows, torch.zeros(4, 4, dtype=torch.complex64))
        with pytest.raises(ValueError, match="an empty list of blocks belongs to no heap"):
            CopyPlan.between([], [])
        as_bytes = torch.zeros(4, 32, dtype=torch.uint8)
        assert CopyPlan.between(batch, as_bytes).num_bytes == 128

    def test_what_is_no_side(self) -> None:
        near = host_heap()
        batch = filled(near, 4)
        for wrong in (7, "blocks", None, [7]):
            with pytest.raises((TypeError, AttributeError)):
                CopyPlan.between(batch, wrong)  # type: ignore[arg-type]
        buffers = BufferAllocator()
        plain = buffers.batched_allocate([BLOCK], None, 4, MemoryFormat.BINARY_BUFFER)
        assert plain is not None
        with pytest.raises(TypeError, match="expected blocks of a heap, got blocks of "):
            CopyPlan.between(batch, plain)

    def test_objects_of_several_heaps_or_layouts(self) -> None:
        near, far = host_heap(), host_heap()
        batch, other, smaller = filled(near, 4), filled(far, 4), filled(near, 4, 64)
        out = torch.zeros(2, BLOCK, dtype=torch.uint8)
        with pytest.raises(ForeignObjectError):
            CopyPlan.between([batch[0], other[0]], out)
        with pytest.raises(ValueError, match="one layout"):
            CopyPlan.between([batch[0], smaller[0]], out)
        with pytest.raises(ValueError, match="targets overlap"):
            CopyPlan.between(out, [batch[0], batch[0]])

    def test_freed_blocks_and_closed_heaps(self) -> None:
        near, far = host_heap(), host_heap()
        batch, target = filled(near, 4), filled(far, 4)
        far.free(target[3])
        for pair in ((batch, target), (target, batch), (batch[:4], target[:4])):
            with pytest.raises(LifetimeError, match="freed"):
                CopyPlan.between(*pair)
        plan = CopyPlan.between(batch[:2], target[:2])
        near.close()
        with pytest.raises(ClosedError):
            CopyPlan.between(batch, torch.zeros(4, BLOCK, dtype=torch.uint8))
        with pytest.raises(ClosedError):
            copy(plan)

    def test_a_batch_to_itself(self) -> None:
        near = host_heap()
        batch = filled(near, 4)
        with pytest.raises(ValueError, match="overlaps the source"):
            CopyPlan.between(batch, batch)
        copy((batch[:2], batch[2:])).result()
        assert torch.equal(read(batch[2:]), read(batch[:2]))

    def test_a_view_of_blocks(self) -> None:
        near = host_heap()
        batch = filled(near, 4)
        seen = near.view(batch.metadata)
        out = torch.zeros(4, BLOCK, dtype=torch.uint8)
        copy((seen, out)).result()
        assert torch.equal(out, read(batch))

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_directions(self, device: FakeDevice, direction: str) -> None:
        near, far = (heap_on(device, kind, 1 << 16) for kind in DIRECTIONS[direction])
        plan = CopyPlan.between(filled(near, 4), filled(far, 4))
        assert plan.direction == direction
        devices = {"h2h": None, "h2d": device}.get(direction, device)
        assert plan.device is devices


class TestLayers:
    def test_each_layer_is_a_part_in_block_order(self) -> None:
        near, far = host_heap(), host_heap()
        shape = (2, 3, 4, 8)
        batch = near.batched_allocate(shape, torch.float32, 2, MemoryFormat.KV_2LTD)
        target = far.batched_allocate(shape, torch.float32, 2, MemoryFormat.KV_2LTD)
        assert batch is not None
        assert target is not None
        plan = CopyPlan.between(batch, target, by_layer=True)
        assert [len(part) for part in plan.parts] == [4] * 3
        assert all(part.sizes == 4 * 8 * 4 for part in plan.parts)
        first = plan.parts[1].sources - near.buffer.data_ptr()
        assert first.tolist() == [128, 128 * 4, BLOCK + 128, BLOCK + 128 * 4]

    def test_of_a_batch_and_a_tensor(self) -> None:
        near = host_heap()
        shape = (1, 3, 4, 8)
        batch = near.batched_allocate(shape, torch.float32, 2, MemoryFormat.KV_MLA_FMT)
        assert batch is not None
        kv = torch.randn(2, *shape)
        copy(CopyPlan.between(kv, batch, by_layer=True)).result()
        assert torch.equal(torch.stack([block.tensor for block in batch]), kv)
        write(batch, torch.zeros(2, *shape))


class TestHostRuns:
    @pytest.mark.parametrize("direction", ["d2h", "h2d"])
    def test_counted_on_the_side_of_the_host(self, device: FakeDevice, direction: str) -> None:
        gpu, host = memory_of(device, "device", 1 << 16), memory_of(device, "host", 1 << 16)
        apart, together = np.arange(64) * 512, np.arange(64) * 256

        def runs(on_gpu: np.ndarray, on_host: np.ndarray, parts: list[int] | None) -> int:
            sides = (
                (gpu, host, on_gpu, on_host) if direction == "d2h" else (host, gpu, on_host, on_gpu)
            )
            return CopyPlan.of_addresses(*sides, 256, parts=parts).num_host_runs

        assert runs(apart, together, None) == 1
        assert runs(together, apart, None) == 64
        assert runs(apart, together, [32, 0, 32]) == 2
        assert runs(apart, np.concatenate((together[:32], together[32:] + 8)), None) == 2
        assert runs(together, together, None) == 1
        assert runs(together[:0], together[:0], None) == 0


class TestPrepare:
    def test_each_part_is_uploaded_once(self, device: FakeDevice) -> None:
        gpu, host = memory_of(device, "device", 4096), memory_of(device, "host", 4096)
        gpu.copy_(random_bytes(4096, 1))
        plan = CopyPlan.of_addresses(gpu, host, [0, 64, 128], [0, 96, 200], 32, parts=[2, 1])
        assert plan.prepared is None
        with device.using(device.stream()):  # type: ignore[arg-type]
            assert plan.prepare() is plan
        assert plan.prepared is not None
        assert len(plan.prepared) == 2
        assert device.counts["prepare"] == 2
        stream: Any = device.stream()
        for seed in (2, 3):
            gpu.copy_(random_bytes(4096, seed))
            copy(plan, stream, path="kernel").result()
            assert torch.equal(host[96:128], gpu[64:96])
            assert torch.equal(host[200:232], gpu[128:160])
        assert device.counts["prepare"] == 2

    def test_what_the_kernel_does_not_do(self, device: FakeDevice) -> None:
        buffers = {kind: memory_of(device, kind, 64) for kind in ("host", "device", "peer")}
        for first, second in (("host", "host"), ("device", "peer")):
            source = buffers[first]
            target = memory_of(device, second, 64)
            with pytest.raises(RuntimeError, match="the kernel cannot execute a copy"):
                CopyPlan.of_addresses(source, target, [0], [0], 8).prepare()
        device.has_kernel = False
        with pytest.raises(RuntimeError, match="the kernel cannot execute a copy"):
            CopyPlan.of_addresses(buffers["device"], buffers["host"], [0], [0], 8).prepare()
