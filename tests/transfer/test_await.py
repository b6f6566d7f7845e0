"""Transfers and their parts in ``asyncio``: awaited, in ``async with``, cancelled, and in tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, heap_on
from small_heaps import heap_of
from transfer_scenes import Gate, InFlight

from kvheap import MemoryBatch, MemoryFormat, Transfer, TransferError, foreign_transfer, offload
from kvheap.transfer import CopyPlan, Part, copy

LAYERS = 4


def run(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(main, 20)

    asyncio.run(limited())


async def later(call: Callable[[], object]) -> None:
    await asyncio.sleep(0.01)
    call()


def by_layer(device: FakeDevice, stream: Any) -> tuple[torch.Tensor, MemoryBatch]:
    near, far = heap_on(device, "device", 1 << 16), heap_on(device, "host", 1 << 16)
    kv = torch.randn(3, 2, LAYERS, 6, 32)
    batch = near.batched_allocate(kv.shape[1:], kv.dtype, 3, MemoryFormat.KV_2LTD, source=kv)
    assert batch is not None
    away = offload(batch, far, stream, by_layer=True)
    assert away is not None
    return kv, away


def transfer_of(batch: MemoryBatch) -> Transfer:
    assert batch.transfer is not None
    return batch.transfer


class TestAwait:
    def test_the_end_of_every_kind(self, flying: InFlight) -> None:
        async def main() -> None:
            finishing = asyncio.ensure_future(later(flying.finish))
            assert await flying.transfer is None  # type: ignore[func-returns-value]
            assert torch.equal(flying.target, flying.source)
            await flying.transfer
            await finishing

        run(main())

    def test_every_part_of_every_kind(self, flying: InFlight) -> None:
        async def main() -> None:
            finishing = asyncio.ensure_future(later(flying.finish))
            for part in flying.transfer.parts:
                assert await part is None  # type: ignore[func-returns-value]
                assert part.done()
            await asyncio.gather(*flying.transfer.parts, flying.transfer)
            assert torch.equal(flying.target, flying.source)
            await finishing

        run(main())

    def test_layer_by_layer(self, device: FakeDevice) -> None:
        stream = device.stream()
        kv, away = by_layer(device, stream)
        parts = transfer_of(away).parts
        seen: list[int] = []

        async def follow(layer: int, part: Part) -> None:
            await part
            seen.append(layer)

        async def main() -> None:
            tasks = [asyncio.ensure_future(follow(*each)) for each in enumerate(parts)]
            for layer in range(LAYERS):
                await asyncio.sleep(0.005)
                assert seen == list(range(layer))
                while not parts[layer].done():
                    assert device.run_one(stream)
                await tasks[layer]
            await transfer_of(away)

        run(main())
        assert seen == list(range(LAYERS))
        assert all(torch.equal(obj.tensor, kv[row]) for row, obj in enumerate(away))  # type: ignore[arg-type]

    def test_what_has_ended_needs_no_turn_of_the_loop(self) -> None:
        batch, far = heap_of(4).batched_allocate([8], torch.uint8, 2), heap_of(4)
        assert batch is not None
        away = offload(batch, far)
        assert away is not None
        transfer = transfer_of(away)
        transfer.wait()
        for awaited in (transfer, *transfer.parts):
            with pytest.raises(StopIteration):
                next(awaited.__await__())

    def test_one_that_failed(self) -> None:
        batch = heap_of(4).batched_allocate([8], torch.uint8, 2)
        assert batch is not None
        work: Future[None] = Future()
        transfer = foreign_transfer(work, target=batch)

        async def main() -> None:
            failing = asyncio.ensure_future(later(lambda: work.set_exception(OSError("gone"))))
            for awaited in (transfer, transfer.parts[0], transfer):
                with pytest.raises(TransferError, match="gone"):
                    await awaited
            with pytest.raises(TransferError, match="gone"):
                async with transfer:
                    pass
            await failing

        run(main())


class TestWith:
    def test_leaving_it_waits(self, flying: InFlight) -> None:
        async def main() -> None:
            finishing = asyncio.ensure_future(later(flying.finish))
            async with flying.transfer as entered:
                assert entered is flying.transfer
                assert not entered.done()
            assert entered.done()
            assert torch.equal(flying.target, flying.source)
            await finishing

        run(main())

    def test_an_exception_waits_too_and_passes(self, flying: InFlight) -> None:
        async def main() -> None:
            finishing = asyncio.ensure_future(later(flying.finish))
            with pytest.raises(KeyError, match="mine"):
                async with flying.transfer:
                    raise KeyError("mine")
            assert flying.transfer.done()
            await finishing

        run(main())

    def test_an_exception_hides_the_transfers(self) -> None:
        batch = heap_of(4).batched_allocate([8], torch.uint8, 2)
        assert batch is not None
        work: Future[None] = Future()
        transfer = foreign_transfer(work, target=batch)
        work.set_exception(TransferError("gone"))

        async def main() -> None:
            with pytest.raises(KeyError):
                async with transfer:
                    raise KeyError("mine")

        run(main())


class TestCancel:
    @pytest.mark.parametrize("what", ["transfer", "part", "with", "body"])
    def test_loses_nothing(self, by_queue: Gate, what: str) -> None:
        near, far = heap_of(8), heap_of(8)
        source = torch.randint(256, (4, 64), dtype=torch.uint8)
        batch = near.batched_allocate([64], torch.uint8, 4, source=source)
        assert batch is not None
        away = offload(batch, far, free=True)
        assert away is not None
        transfer = transfer_of(away)

        async def use() -> None:
            if what == "transfer":
                await transfer
            elif what == "part":
                await transfer.parts[0]
            else:
                async with transfer:
                    await asyncio.sleep(30 if what == "body" else 0)

        async def main() -> None:
            task = asyncio.ensure_future(use())
            await asyncio.sleep(0.01)
            task.cancel()
            if what == "body":
                await asyncio.sleep(0.01)  # leaving waits for the copy
                assert not task.done()
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(transfer, 0.01)
            assert not transfer.done()
            assert transfer.error is None
            near.batched_allocate([64], torch.uint8, 4)
            opening = asyncio.ensure_future(later(by_queue.open))
            await transfer
            await opening

        run(main())
        assert torch.equal(far.batched_read(away), source)
        assert not batch.live.any()

    def test_of_a_plan(self, by_queue: Gate) -> None:
        source, target = torch.arange(64), torch.zeros(64, dtype=torch.int64)
        transfer = copy(CopyPlan.of_addresses(source, target, [0], [0], 512))

        async def main() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(transfer.parts[0], 0.01)
            by_queue.open()
            await transfer

        run(main())
        assert np.array_equal(source, target)
