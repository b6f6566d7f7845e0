"""What has an end makes one promise, whatever it is."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from closables import KINDS, LAYOUT, PLACE, Kind, blocks
from forked_child import in_a_child

from kvheap import ClosedError, HostMemoryAllocator, SharedHeap
from kvheap.closing import Closer
from kvheap.device.host_queue import NestedWaitError
from kvheap.shared.service import Service

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    found = KINDS[request.param](tmp_path)
    yield found
    found.close()


@pytest.fixture
def it(kind: Kind) -> Iterator[Any]:
    found = kind.open()
    yield found
    found.close(60)


def refused(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """What each call says that is refused; the others are missing."""
    found = {name: refusal(call) for name, call in calls.items()}
    return {name: text for name, text in found.items() if text}


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ClosedError as error:
        return str(error)
    return ""


def enter(it: Any) -> None:
    with it:
        pass


class TestEverything:
    def test_it_is_refused_by_name_from_the_first_close_on(self, kind: Kind, it: Any) -> None:
        calls = {**kind.calls(it), "with": lambda: enter(it)}
        assert refused({name: calls[name] for name in calls if name != "with"}) == {}
        assert not it.closed
        it.close()
        it.close()
        it.close(0)
        assert it.closed
        assert refused(calls) == dict.fromkeys(calls, f"{it!r} is closed")

    def test_with_closes_it(self, kind: Kind, it: Any) -> None:
        with it as same:
            assert same is it
            it.close()
        with pytest.raises(ClosedError, match="is closed"), it:
            pytest.fail("it is closed")

    @pytest.mark.parametrize(
        ("timeout_s", "error"),
        [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)],
    )
    def test_a_wrong_number_of_seconds_changes_nothing(
        self, kind: Kind, it: Any, timeout_s: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error, match="timeout_s"):
            it.close(timeout_s)
        assert not it.closed
        assert refused(kind.calls(it)) == {}
        it.close()
        with pytest.raises(error, match="timeout_s"):
            it.close(timeout_s)

    def test_what_runs_is_waited_for_and_the_end_can_be_tried_again(
        self, kind: Kind, it: Any
    ) -> None:
        goes_on = threading.Event()
        kind.keep_busy(it, lambda: goes_on.wait(60))
        try:
            if "Node" not in repr(it):  # which waits for reads, as tests/remote tests
                for _ in range(2):
                    with pytest.raises(TimeoutError, match="close it again later"):
                        it.close(0.01)
                    assert it.closed
                    with pytest.raises(ClosedError, match="is closed"), it:
                        pytest.fail("its end has begun")
        finally:
            goes_on.set()
        it.close(60)

    def test_several_threads_close_it(self, kind: Kind, it: Any) -> None:
        goes_on = threading.Event()
        kind.keep_busy(it, lambda: goes_on.wait(60))
        errors: list[BaseException] = []

        def close() -> None:
            try:
                it.close(60)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=close) for _ in range(6)]
        for thread in threads:
            thread.start()
        goes_on.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert errors == []

    def test_on_a_thread_that_the_end_waits_for(self, kind: Kind, it: Any) -> None:
        """A finalizer may run on any thread."""
        found: list[BaseException | None] = []
        has_run = threading.Event()

        def finalize() -> None:
            try:
                it.close()
            except BaseException as error:
                found.append(error)
            else:
                found.append(None)
            has_run.set()

        kind.keep_busy(it, finalize)
        assert has_run.wait(10), "it waits for itself"
        if "attached" in repr(it):  # the call that it is inside finds out by itself
            assert found == [None]
        else:
            assert isinstance(found[0], NestedWaitError)
        it.close(60)
        with pytest.raises(ClosedError, match="is closed"):
            enter(it)

    def test_a_forked_child_is_refused_and_closes_nothing(self, kind: Kind, it: Any) -> None:
        calls = kind.calls(it)
        assert refused(calls) == {}
        calls["with"] = lambda: enter(it)

        def child() -> dict[str, str]:
            it.close()
            it.close(0)
            it.__exit__(None, None, None)
            return refused(calls)

        start = f"{it!r} belongs to process {os.getpid()}: a forked child cannot use "
        found = in_a_child(child)
        assert found.keys() == calls.keys()
        assert all(text.startswith(start) for text in found.values())
        del calls["with"]
        assert refused(calls) == {}

    def test_a_child_of_one_that_was_closed(self, kind: Kind, it: Any) -> None:
        """Numbers of descriptors that it had may be others' by then."""
        calls = kind.calls(it)
        it.close()
        pipes = [os.pipe() for _ in range(16)]

        def child() -> dict[str, str]:
            for read_end, write_end in pipes:
                os.write(write_end, b"x")
                assert os.read(read_end, 1) == b"x"
            return refused(calls)

        try:
            assert in_a_child(child) == dict.fromkeys(calls, f"{it!r} is closed")
        finally:
            for pipe in pipes:
                for fd in pipe:
                    os.close(fd)

    def test_whether_it_stays_without_its_user(self, kind: Kind) -> None:
        it = kind.open()
        alive = weakref.ref(it)
        del it
        gc.collect()
        assert (alive() is not None) == kind.is_kept
        if kind.is_kept:
            alive().close()
            gc.collect()
            assert alive() is None


def test_who_closes_late_does_not_end_the_next_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xxhash")
    path = str(tmp_path / "heap")

    def own() -> SharedHeap:
        return SharedHeap(path, 4 * PLACE, LAYOUT, namespace="a model")

    first = own()
    late = threading.Thread(target=first.close)
    has_waited, goes_on = threading.Event(), threading.Event()
    stop = Service.stop

    def stop_slowly(self: Service, timeout_s: float | None) -> bool:
        has_ended = stop(self, timeout_s)
        if threading.current_thread() is late:
            has_waited.set()
            goes_on.wait(60)
        return has_ended

    with monkeypatch.context() as patch:
        patch.setattr(Service, "stop", stop_slowly)
        late.start()
        assert has_waited.wait(60)
        first.close()
        second = own()
        goes_on.set()
        late.join(60)
    assert second.stats().owner_pid == os.getpid()
    with second, SharedHeap.attach(path, LAYOUT, namespace="a model") as replica:
        source = HostMemoryAllocator(4 * PLACE)
        assert replica.store([b"a", b"b"], blocks(source)).all()


# -- the end of a program ----------------------------------------------------------------------


def run_program(text: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "tests" / "support"), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        timeout=120,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )


def test_a_program_that_ends_with_everything_open_and_at_work(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    pytest.importorskip("xxhash")
    ended = run_program(f"""
        import threading, time
        from pathlib import Path
        from closables import *
        kinds = {{name: kind(Path({str(tmp_path)!r}, str(at)))
                  for at, (name, kind) in enumerate(KINDS.items())}}
        for kind in kinds.values():
            kind.path.parent.mkdir()
        del kinds["Node"]
        it = {{name: kind.open() for name, kind in kinds.items()}}
        batch = blocks(kinds["FileTier"].heap, 4)
        it["FileTier"].store([b"%d" % number for number in range(4)], batch)
        store = kinds["MooncakeTier"].store
        unregister = store.unregister_buffer
        store.unregister_buffer = lambda at: (print("unregistered", flush=True), unregister(at))[1]
        def call():
            store.during = lambda _: (begun.set(), time.sleep(0.3), print("moved", flush=True))
            it["MooncakeTier"].lookup([b"a"])
        begun = threading.Event()
        threading.Thread(target=call, daemon=True).start()
        replica = it["SharedHeap, attached"]
        replica.store([b"a", b"b"], blocks(kinds["FileTier"].heap))
        begun.wait()
        print("ending", flush=True)
    """)
    assert ended.stderr == ""
    assert ended.returncode == 0
    assert ended.stdout.split() == ["ending", "moved", "unregistered"]
    tier = KINDS["FileTier"](tmp_path / "0").open()
    with tier:
        assert len(tier.keys()) == 4
    with KINDS["SharedHeap, owner"](tmp_path / "2").open() as heap:
        assert sorted(heap.keys()) == [b"a", b"b"]


def store_and_end(folder: Path) -> None:
    it = KINDS["FileTier"](folder).open()
    it.store([b"a", b"b", b"c", b"d"], blocks(HostMemoryAllocator(16 * PLACE), 4))


def test_a_process_of_multiprocessing_loses_nothing(tmp_path: Path) -> None:
    """One that was forked runs no ``atexit`` function."""
    kind = KINDS["FileTier"](tmp_path)
    kind.open().close()  # or skipped
    child = multiprocessing.get_context("fork").Process(target=store_and_end, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    with kind.open() as tier:
        assert len(tier.keys()) == 4


# -- the part that all of them use -------------------------------------------------------------


class Thing:
    """Has an end, which a test makes slow, wrong or nested."""

    def __init__(self, **options: Any) -> None:
        self.waits: list[float | None] = []
        self.releases = 0
        self.during_wait: Callable[[], object] = lambda: None
        self.during_release: Callable[[], object] = lambda: None
        self.closer = Closer(self, exit_s=0.5, **options)

    def close(self, timeout_s: float | None = None) -> None:
        self.closer.close(timeout_s, wait=self._wait, release=self._release)

    def _wait(self, timeout_s: float | None) -> None:
        self.waits.append(timeout_s)
        self.during_wait()

    def _release(self) -> None:
        self.during_release()
        self.releases += 1

    def __repr__(self) -> str:
        return "Thing()"


class TestCloser:
    def test_it_ends_once(self) -> None:
        thing = Thing()
        thing.close()
        thing.close(3)
        assert (thing.waits, thing.releases) == ([None], 1)
        assert thing.closer.has_ended

    def test_a_finalizer_inside_the_end_returns_at_once(self) -> None:
        thing = Thing()
        for name in ("during_wait", "during_release"):
            setattr(thing, name, lambda: thing.close(60) if not thing.closer.has_ended else None)
        nested: list[int] = []
        thing.during_wait = lambda: nested.append(1) or len(nested) > 3 or thing.close(60)
        thing.close()
        assert thing.releases == 1

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_an_end_that_was_interrupted_is_made_again(self, error: type[BaseException]) -> None:
        thing = Thing()

        def fail() -> None:
            thing.during_release = lambda: None
            raise error

        thing.during_release = fail
        with pytest.raises(error):
            thing.close()
        with pytest.raises(ClosedError):
            thing.closer.require_open()
        assert not thing.closer.has_ended
        thing.close()
        assert (thing.releases, thing.closer.has_ended) == (1, True)

    def test_who_waits_for_a_thread_that_was_interrupted_takes_over(self) -> None:
        thing = Thing()
        is_inside, fails = threading.Event(), threading.Event()

        def fail() -> None:
            thing.during_release = lambda: None
            is_inside.set()
            fails.wait(60)
            raise OSError("stuck")

        def close() -> None:
            with pytest.raises(OSError, match="stuck"):
                thing.close()

        thing.during_release = fail
        thread = threading.Thread(target=close)
        thread.start()
        assert is_inside.wait(60)
        with pytest.raises(
            TimeoutError, match=r"has not closed Thing\(\) in 0.01 s: close it again"
        ):
            thing.close(0.01)
        fails.set()
        thing.close(60)
        thread.join(60)
        assert thing.releases == 1

    def test_the_program_ends_the_last_one_first_and_goes_on_after_errors(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        ended: list[str] = []
        given_up: list[str] = []

        def made(name: str, error: type[BaseException] | None = None) -> Thing:
            def release() -> None:
                if error is not None:
                    raise error(f"{name} is stuck")
                ended.append(name)

            thing = Thing(give_up=lambda: given_up.append(name), is_kept=False)
            thing.during_release = release
            return thing

        things = [made("one"), made("two", TimeoutError), made("three"), made("four", SystemExit)]
        with caplog.at_level(logging.WARNING, "kvheap"):
            for thing in reversed(things):
                thing.closer.close_at_exit()
        assert ended == ["three", "one"]
        assert given_up == ["four", "two"]
        assert "at the end of the program: two is stuck" in caplog.text
        assert [thing.waits for thing in things] == [[0.5]] * 4
        numbers = [thing.closer.number for thing in things]
        assert numbers == sorted(set(numbers))

    def test_a_wait_that_is_not_over(self) -> None:
        thing = Thing()

        def late() -> None:
            raise TimeoutError

        thing.during_wait = late
        for _ in range(2):
            with pytest.raises(TimeoutError):
                thing.close(0)
        assert thing.releases == 0
        thing.during_wait = lambda: time.sleep(0)
        thing.close(0)
        assert thing.releases == 1
