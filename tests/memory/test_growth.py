"""BackgroundGrowth: what is committed is published, in order, until it is told to end."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable

import pytest

from kvheap.memory.growth import GROWTH_BYTES, BackgroundGrowth, GrowthProgress
from kvheap.memory.host_memory import HostBuffer

TIMEOUT = 60.0


class Heap:
    """Keeps what was committed and published, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int]] = []
        self.usable = 0

    def commit(self, start: int, end: int) -> None:
        self.log.append(("commit", start, end))

    def publish(self, num_bytes: int) -> None:
        self.log.append(("publish", self.usable, self.usable + num_bytes))
        self.usable += num_bytes


class Gate:
    """A commit that says when it is entered, and waits until it is let through."""

    def __init__(self, heap: Heap, closed_at: int) -> None:
        self.heap, self.closed_at = heap, closed_at
        self.entered, self.opened = threading.Event(), threading.Event()

    def commit(self, start: int, end: int) -> None:
        if start == self.closed_at:
            self.entered.set()
            assert self.opened.wait(TIMEOUT)
        self.heap.commit(start, end)


def growth_of(
    heap: Heap,
    commit: Callable[[int, int], None] | None = None,
    on_progress: Callable[[GrowthProgress], None] | None = None,
    final_bytes: int = 100,
) -> BackgroundGrowth:
    return BackgroundGrowth(
        commit or heap.commit,
        heap.publish,
        start_bytes=0,
        final_bytes=final_bytes,
        piece_bytes=10,
        on_progress=on_progress,
    )


class TestGrow:
    def test_each_piece_is_committed_then_published(self) -> None:
        heap = Heap()
        seen: list[GrowthProgress] = []
        heap.usable = 5
        growth = BackgroundGrowth(
            heap.commit,
            heap.publish,
            start_bytes=5,
            final_bytes=28,
            piece_bytes=10,
            on_progress=seen.append,
        )
        assert growth.progress == GrowthProgress(5, 28, done=False)
        assert growth.start() is growth
        assert growth.wait(TIMEOUT)
        steps = [(5, 15), (15, 25), (25, 28)]
        assert heap.log == [(what, *step) for step in steps for what in ("commit", "publish")]
        assert seen == [
            GrowthProgress(15, 28, done=False),
            GrowthProgress(25, 28, done=False),
            GrowthProgress(28, 28, done=True),
        ]
        assert growth.progress == seen[-1]
        assert growth.callback_error is None

    def test_nothing_to_grow(self) -> None:
        heap = Heap()
        seen: list[GrowthProgress] = []
        growth = growth_of(heap, on_progress=seen.append, final_bytes=0)
        assert growth.start().wait(TIMEOUT)
        assert (heap.log, seen) == ([], [GrowthProgress(0, 0, done=True)])

    def test_the_default_piece(self) -> None:
        heap = Heap()
        final_bytes = 2 * GROWTH_BYTES + 1
        growth = BackgroundGrowth(heap.commit, heap.publish, start_bytes=0, final_bytes=final_bytes)
        assert growth.start().wait(TIMEOUT)
        assert [end - start for what, start, end in heap.log if what == "publish"] == [
            GROWTH_BYTES,
            GROWTH_BYTES,
            1,
        ]

    def test_a_host_buffer_grows(self) -> None:
        size_bytes, page = (1 << 20) + 100, 4096
        buffer = HostBuffer(size_bytes)
        usable: list[int] = [0]

        def publish(num_bytes: int) -> None:
            buffer.tensor[usable[0] : usable[0] + num_bytes] += 1
            usable[0] += num_bytes

        growth = BackgroundGrowth(
            buffer.populate, publish, start_bytes=0, final_bytes=size_bytes, piece_bytes=7 * page
        )
        assert growth.start().wait(TIMEOUT)
        assert buffer.tensor.eq(1).all()

    @pytest.mark.parametrize(
        ("start_bytes", "final_bytes", "piece_bytes", "message"),
        [
            (-1, 5, 1, "start_bytes must be between 0 and final_bytes, got -1 and 5"),
            (6, 5, 1, "start_bytes must be between 0 and final_bytes, got 6 and 5"),
            (0, 5, 0, "piece_bytes must be positive, got 0"),
        ],
    )
    def test_wrong_arguments(
        self, start_bytes: int, final_bytes: int, piece_bytes: int, message: str
    ) -> None:
        heap = Heap()
        with pytest.raises(ValueError, match=message):
            BackgroundGrowth(
                heap.commit,
                heap.publish,
                start_bytes=start_bytes,
                final_bytes=final_bytes,
                piece_bytes=piece_bytes,
            )


class TestWait:
    def test_looking_and_waiting_while_a_piece_is_in_progress(self) -> None:
        heap = Heap()
        gate = Gate(heap, closed_at=20)
        growth = growth_of(heap, gate.commit).start()
        assert gate.entered.wait(TIMEOUT)
        assert growth.progress == GrowthProgress(20, 100, done=False)
        assert heap.usable == 20
        assert growth.wait(0.01) is False
        gate.opened.set()
        assert growth.wait(TIMEOUT) is True
        assert heap.usable == 100

    def test_before_it_began(self) -> None:
        with pytest.raises(RuntimeError, match="before it is started"):
            growth_of(Heap()).wait()

    def test_it_begins_once(self) -> None:
        growth = growth_of(Heap()).start()
        with pytest.raises(RuntimeError, match="once"):
            growth.start()
        growth.stop()


class TestErrors:
    @pytest.mark.parametrize("failing", ["commit", "publish"])
    def test_an_error_ends_growth_and_is_kept(
        self, failing: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        heap = Heap()
        seen: list[GrowthProgress] = []
        error = MemoryError("no memory")

        def commit(start: int, end: int) -> None:
            if failing == "commit" and start == 30:
                raise error
            heap.commit(start, end)

        def publish(num_bytes: int) -> None:
            if failing == "publish" and heap.usable == 30:
                raise error
            heap.publish(num_bytes)

        growth = BackgroundGrowth(
            commit,
            publish,
            start_bytes=0,
            final_bytes=100,
            piece_bytes=10,
            on_progress=seen.append,
        )
        with caplog.at_level(logging.WARNING, "kvheap"):
            growth.start()
            for _ in range(2):
                with pytest.raises(MemoryError) as caught:
                    growth.wait(TIMEOUT)
                assert caught.value is error
        assert growth.progress == GrowthProgress(30, 100, done=True, error=error)
        assert seen[-1] == growth.progress
        assert [progress.committed_bytes for progress in seen] == [10, 20, 30, 30]
        assert heap.usable == 30
        assert [record.getMessage() for record in caplog.records] == [
            "growth ended at 30 of 100 bytes: MemoryError('no memory')"
        ]
        growth.stop()

    def test_an_exit_in_a_callable_is_not_lost(self) -> None:
        growth = growth_of(Heap(), commit=lambda start, end: sys.exit("leaving"))
        with pytest.raises(SystemExit, match="leaving"):
            growth.start().wait(TIMEOUT)

    def test_a_callback_that_fails_does_not_end_growth(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        heap, errors = Heap(), [KeyError("first"), SystemExit("second")]
        raised = iter(errors)

        def on_progress(progress: GrowthProgress) -> None:
            error = next(raised, None)
            if error is not None:
                raise error

        growth = growth_of(heap, on_progress=on_progress)
        with caplog.at_level(logging.WARNING, "kvheap"):
            assert growth.start().wait(TIMEOUT)
        assert heap.usable == 100
        assert growth.callback_error is errors[0]
        assert growth.progress.error is None
        assert len(caplog.records) == 2


class TestStop:
    def test_a_piece_in_progress_is_awaited_and_not_published(self) -> None:
        heap = Heap()
        seen: list[GrowthProgress] = []
        gate = Gate(heap, closed_at=20)
        growth = growth_of(heap, gate.commit, seen.append).start()
        assert gate.entered.wait(TIMEOUT)
        stopping = [threading.Thread(target=growth.stop) for _ in range(3)]
        for thread in stopping:
            thread.start()
        stopping[0].join(0.05)
        assert all(thread.is_alive() for thread in stopping)
        gate.opened.set()
        for thread in stopping:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in stopping)
        assert heap.log[-1] == ("commit", 20, 30)
        assert heap.usable == 20
        assert growth.progress == seen[-1] == GrowthProgress(20, 100, done=True)
        assert growth.wait() is True
        growth.stop()

    @pytest.mark.parametrize("where", ["commit", "publish", "on_progress"])
    def test_from_the_thread_itself(self, where: str) -> None:
        heap = Heap()
        after: list[int] = []

        def stop() -> None:
            growth.stop()
            after.append(heap.usable)

        def commit(start: int, end: int) -> None:
            heap.commit(start, end)
            if where == "commit" and start == 20:
                stop()

        def publish(num_bytes: int) -> None:
            heap.publish(num_bytes)
            if where == "publish" and heap.usable == 20:
                stop()

        def on_progress(progress: GrowthProgress) -> None:
            if where == "on_progress" and progress.committed_bytes == 20:
                stop()

        growth = BackgroundGrowth(
            commit,
            publish,
            start_bytes=0,
            final_bytes=100,
            piece_bytes=10,
            on_progress=on_progress,
        )
        assert growth.start().wait(TIMEOUT)
        assert heap.usable == 20
        assert set(after) == {20}
        assert growth.progress == GrowthProgress(20, 100, done=True)

    def test_before_it_began(self) -> None:
        heap = Heap()
        growth = growth_of(heap)
        growth.stop()
        assert growth.start().wait(TIMEOUT)
        assert heap.log == []
        assert growth.progress == GrowthProgress(0, 100, done=True)

    def test_after_its_end(self) -> None:
        heap = Heap()
        growth = growth_of(heap).start()
        assert growth.wait(TIMEOUT)
        growth.stop()
        assert heap.usable == 100

    def test_at_any_moment_nothing_is_published_after_it(self) -> None:
        """Stops at random moments, also while it is being started, against a free-running heap."""
        rng = random.Random(21)
        for _ in range(200):
            heap = Heap()
            growth = growth_of(heap, final_bytes=100_000)
            starting = threading.Thread(target=growth.start)
            starting.start()
            for _ in range(rng.randrange(50)):
                growth.progress  # noqa: B018
            growth.stop()
            usable = heap.usable
            starting.join()
            assert growth.wait(TIMEOUT)
            assert heap.usable == usable == growth.progress.committed_bytes
            published = [step[1:] for step in heap.log if step[0] == "publish"]
            committed = [step[1:] for step in heap.log if step[0] == "commit"]
            assert published == committed[: len(published)]
            assert len(committed) - len(published) <= 1


class TestLifetime:
    @pytest.mark.parametrize("ends", ["completed", "stopped"])
    def test_the_callables_are_let_go_when_it_ends(self, ends: str) -> None:
        heap = Heap()
        gate = Gate(heap, closed_at=20)
        growth = growth_of(heap, gate.commit).start()
        assert gate.entered.wait(TIMEOUT)
        dropped = weakref.ref(heap)
        opened = gate.opened
        del heap, gate
        assert dropped() is not None
        opened.set()
        if ends == "stopped":
            growth.stop()
        assert growth.wait(TIMEOUT)
        assert dropped() is None

    def test_no_piece_is_begun_at_exit(self) -> None:
        program = textwrap.dedent("""
            import atexit, threading, time
            from kvheap.memory.growth import BackgroundGrowth
            begun = []

            def commit(start, end):
                begun.append(start)
                time.sleep(0.001)

            def at_exit():
                before = len(begun)
                time.sleep(0.2)
                print(len(begun) - before <= 1)

            atexit.register(at_exit)
            BackgroundGrowth(
                commit, lambda num_bytes: None,
                start_bytes=0, final_bytes=1 << 40, piece_bytes=4096,
            ).start()
            time.sleep(0.05)
        """)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")

    def test_the_interpreter_exits_and_says_nothing(self) -> None:
        """While one range grows in short commits, and another one's commit never ends."""
        program = textwrap.dedent("""
            import logging, threading, time
            from kvheap.memory.growth import BackgroundGrowth
            logging.basicConfig()

            def grow(commit_seconds):
                begun = threading.Event()

                def commit(start, end):
                    begun.set()
                    time.sleep(commit_seconds)

                BackgroundGrowth(
                    commit, lambda num_bytes: None,
                    start_bytes=0, final_bytes=1 << 40, piece_bytes=4096,
                ).start()
                assert begun.wait(60)

            grow(0.01)
            grow(3600)
        """)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_the_interpreter_exits_while_a_buffer_is_populated(self) -> None:
        program = textwrap.dedent("""
            import logging, threading
            from kvheap.memory.growth import BackgroundGrowth
            from kvheap.memory.host_memory import HostBuffer
            logging.basicConfig()
            buffer, begun = HostBuffer(1 << 30), threading.Event()
            BackgroundGrowth(
                lambda start, end: buffer.populate(start, end, threads=2),
                lambda num_bytes: begun.set(),
                start_bytes=0, final_bytes=1 << 30, piece_bytes=32 << 20,
            ).start()
            assert begun.wait(60)
        """)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
