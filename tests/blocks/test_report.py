"""What a full heap says."""

from __future__ import annotations

import gc
import logging
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from small_heaps import (
    PAGE,
    heap_of,
    no_debug,
    take,
)

from kvheap import (
    FullReport,
    LiveBlocks,
    log_full_report,
)

__all__ = ["no_debug"]


class TestFull:
    def test_one_report_says_who_holds_what(self) -> None:
        reports: list[FullReport] = []
        heap = heap_of(8, on_full=reports.append, on_full_interval_s=3600.0, trace_frames=2)
        kept = [take(heap, 3), take(heap, 3)]
        kept[1][2].pin()
        heap.free(kept[0][1])
        for _ in range(1000):
            assert heap.batched_allocate([2 * PAGE], torch.uint8, 2) is None
        (report,) = reports
        assert (report.requested_bytes, report.num_blocks, report.failures) == (4 * PAGE, 2, 1)
        assert (report.free_bytes, report.largest_free_bytes) == (3 * PAGE, 2 * PAGE)
        assert (report.free_extents, report.live_blocks, report.live_bytes) == (2, 5, 5 * PAGE)
        assert (report.pinned_blocks, report.pinned_bytes) == (1, PAGE)
        assert "in take" in report.live[0].site[0]
        assert f"{4 * PAGE:,} bytes" in str(report)
        heap._full_reporter._next_report = 0.0
        assert heap.allocate([9 * PAGE], torch.uint8) is None
        assert reports[1].failures == 1000

    def test_a_report_that_fails_does_not_fail_the_allocation(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(report: FullReport) -> None:
            raise ZeroDivisionError("in on_full")

        heap = heap_of(2, on_full=broken)
        assert heap.allocate([9 * PAGE], torch.uint8) is None
        assert "on_full failed" in caplog.text
        assert "in on_full" in caplog.text
        assert heap.allocate([PAGE], torch.uint8) is not None

    def test_a_full_answer_keeps_nothing_of_its_callers(self) -> None:
        class Local:
            pass

        def ask() -> weakref.ref[Local]:
            local = Local()
            assert heap.allocate([2 * PAGE], torch.uint8) is None
            return weakref.ref(local)

        heap = heap_of(1, on_full=None)
        gc.disable()
        try:
            assert ask()() is None
        finally:
            gc.enable()

    def test_a_full_heap_is_quiet_and_counts(self, caplog: pytest.LogCaptureFixture) -> None:
        heap = heap_of(1)
        with caplog.at_level(logging.DEBUG, logger="kvheap"):
            for _ in range(3):
                assert heap.allocate([2 * PAGE], torch.uint8) is None
        assert not caplog.records
        assert heap.stats().failed_allocations == 3
        assert heap.full_report(1, 2 * PAGE).failures == 3

    def test_it_can_be_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        heap = heap_of(1, on_full=log_full_report)
        with caplog.at_level(logging.WARNING, logger="kvheap"):
            for _ in range(3):
                assert heap.allocate([2 * PAGE], torch.uint8) is None
            for thread in threading.enumerate():
                if thread.name == "kvheap-report":
                    thread.join()
        assert len(caplog.records) == 1
        assert caplog.records[0].threadName == "kvheap-report"
        assert "cannot allocate 1 blocks, 8,192 bytes" in caplog.text

    @pytest.mark.parametrize("logs", [True, False])
    def test_a_failure_looks_at_no_live_block(
        self, logs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads: list[threading.Thread] = []
        heap = heap_of(8, on_full=log_full_report if logs else lambda report: None)
        kept = [take(heap, 1) for _ in range(8)]
        find = heap.lifetime.live

        def live() -> tuple[LiveBlocks, ...]:
            threads.append(threading.current_thread())
            return find()

        monkeypatch.setattr(type(heap.lifetime), "live", lambda self: live())
        assert heap.allocate([PAGE], torch.uint8) is None
        for thread in threading.enumerate():
            if thread.name == "kvheap-report":
                thread.join()
        assert threading.current_thread() not in threads
        assert len(threads) == logs
        assert heap.full_report().live_blocks == len(kept)

    def test_a_report_keeps_no_heap_and_survives_a_pickle(self) -> None:
        reports: list[FullReport] = []
        heap = heap_of(2, on_full=reports.append)
        kept = take(heap, 1)
        assert heap.allocate([2 * PAGE], torch.uint8) is None
        (report,) = reports
        copy = pickle.loads(pickle.dumps(report))
        assert (copy, copy.live) == (report, report.live)
        assert copy.live_blocks == 1
        late = heap.full_report()
        buffer = weakref.ref(heap.buffer.untyped_storage())
        del kept, heap
        gc.collect()
        assert buffer() is None
        assert late.live == ()

    @pytest.mark.parametrize("on_full", ["log", 1, True])
    def test_what_cannot_be_called_is_refused(self, on_full: Any) -> None:
        with pytest.raises(TypeError, match=f"on_full must be a function .* got {on_full!r}"):
            heap_of(1, on_full=on_full)
