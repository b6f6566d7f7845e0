"""What is done to freed bytes: zeroes, or a pattern that finds writes after a free."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from small_heaps import (
    PAGE,
    allocated_pages,
    heap_of,
    no_debug,
    take,
)

from kvheap import (
    WriteAfterFreeError,
)
from kvheap.kernels.few_blocks import HostMemory

__all__ = ["no_debug"]


class TestDebug:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVHEAP_DEBUG", "1")

    def test_a_write_after_free_is_found_with_its_owner(self) -> None:
        heap = heap_of(4)
        batch = take(heap, 3)
        stale = batch[1].tensor
        assert stale is not None
        heap.batched_free(batch)
        stale[5] = 1
        with pytest.raises(
            WriteAfterFreeError, match=rf"between {PAGE + 5} and {PAGE + 5} "
        ) as found:
            heap.batched_allocate([PAGE], torch.uint8, 4)
        assert f"the block at {PAGE} " in str(found.value) or "block at 0" in str(found.value)
        assert "small_heaps.py" in str(found.value)
        assert allocated_pages(heap) == 0
        assert heap.memcheck()
        again = take(heap, 4)  # found once; the bytes are good again
        heap.batched_free(again)

    def test_other_sizes_are_looked_at_too(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 8)
        tensors = [block.tensor for block in batch]
        heap.batched_free(batch)
        large = heap.allocate([3 * PAGE], torch.uint8)
        assert large is not None
        tensors[3].fill_(0)  # type: ignore[union-attr]
        with pytest.raises(WriteAfterFreeError, match=f"the block at {3 * PAGE} "):
            heap.allocate([5 * PAGE], torch.uint8)

    def test_what_was_never_freed_is_not_looked_at(self) -> None:
        heap = heap_of(4)
        heap.buffer.fill_(7)
        heap.batched_free(take(heap, 4))

    def test_it_can_be_switched_off(self) -> None:
        heap = heap_of(2, debug=False)
        batch = take(heap, 2)
        batch[0].tensor.fill_(3)  # type: ignore[union-attr]
        heap.batched_free(batch)
        assert heap.buffer[:PAGE].eq(3).all()


class TestScrub:
    @pytest.mark.parametrize("way", ["batch", "objects", "count", "dropped"])
    def test_freed_bytes_are_zero(self, way: str) -> None:
        heap = heap_of(8, scrub=True)
        batch = heap.batched_allocate([100], torch.uint8, 4)
        other = heap.allocate([2 * PAGE], torch.uint8)
        assert batch is not None
        assert other is not None
        heap.buffer.fill_(9)
        if way == "batch":
            heap.batched_free(batch)
        elif way == "objects":
            heap.batched_free([batch[1], other, batch[0], batch[2], batch[3]])
            assert heap.buffer[4 * PAGE : 6 * PAGE].eq(0).all()
        elif way == "count":
            for obj in batch:
                obj.ref_count_down()
        else:
            del batch
            gc.collect()
            heap.stats()
        assert heap.buffer[: 4 * PAGE].eq(0).all()
        assert heap.buffer[6 * PAGE :].eq(9).all()

    def test_what_a_failed_scatter_wrote_is_zeroed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def write_and_fail(blocks: object, memory: HostMemory, *rest: object) -> None:
            memory.buffer[:PAGE] = 5
            raise KeyboardInterrupt

        monkeypatch.setattr("kvheap.heaps.segments.copy_run", write_and_fail)
        heap = heap_of(4, scrub=True)
        with pytest.raises(KeyboardInterrupt):
            heap.batched_allocate([PAGE], torch.uint8, 2, source=torch.zeros(2, PAGE).byte())
        assert heap.buffer.eq(0).all()
        assert allocated_pages(heap) == 0

    def test_one_launch_a_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def count(buffer: object, addresses: np.ndarray, *rest: object) -> None:
            calls.append(len(addresses))

        monkeypatch.setattr("kvheap.heaps.segments.fill_blocks", count)
        heap = heap_of(64, scrub=True)
        heap.batched_free(take(heap, 64))
        assert calls == [64]
