"""Lives of a tier, one after another, over real files: what is found is what was stored.

Needs no vLLM: a worker is a mapped file with a label, as in ``FileMemory``.
"""

from __future__ import annotations

import logging
import mmap
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvheap.integrations.vllm import restart
from kvheap.integrations.vllm.chunk_store import ChunkStore
from kvheap.integrations.vllm.eviction import POLICIES
from kvheap.integrations.vllm.file_locks import LockedFile
from kvheap.integrations.vllm.groups import ChunkGroup
from kvheap.integrations.vllm.heap_label import LABEL_BYTES, HeapLabel, HeapReport
from kvheap.integrations.vllm.heap_watch import watch_heaps
from kvheap.integrations.vllm.index_format import decode, encode
from kvheap.integrations.vllm.restart import RestartIndex

GROUPS = {b"f": ChunkGroup("full", 2560), b"w": ChunkGroup("window", 1024)}
HEAP_BYTES = 1 << 16
IDENTITY = {"model": "llama", "dtype": "bfloat16"}


class Worker:
    """A worker's heap in a file."""

    def __init__(self, path: str, rank: int, heap_bytes: int, boot: str) -> None:
        self.path, self.rank = path, rank
        self.file = LockedFile(path, f"{path} is locked")
        fd = self.file.fd
        os.posix_fallocate(fd, 0, LABEL_BYTES + heap_bytes)
        self.bytes = np.frombuffer(mmap.mmap(fd, LABEL_BYTES + heap_bytes), np.uint8)
        self.label = HeapLabel(self.bytes[:LABEL_BYTES], heap_bytes, lambda: None, boot)

    def report(self, layout: str) -> HeapReport:
        self.label.renew()
        label = self.label
        return HeapReport(self.rank, self.path, label.previous, label.why, label.current, layout)

    def chunk(self, address: int, size: int) -> np.ndarray[Any, Any]:
        return self.bytes[LABEL_BYTES + address : LABEL_BYTES + address + size]

    def end(self, is_clean: bool = True) -> None:
        if is_clean:
            self.label.seal()
        self.file.release()


def contents(key: bytes, rank: int, size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([rank, *key]).integers(0, 256, size).astype(np.uint8)


class Life:
    """One engine: its scheduler and workers."""

    def __init__(
        self,
        folder: Path,
        num_workers: int = 1,
        heap_bytes: int = HEAP_BYTES,
        identity: dict[str, str] = IDENTITY,
        layout: str = "NHD",
        boot: str = "boot 1",
        has_index: bool = True,
        name: str = "index",
    ) -> None:
        self.workers = [
            Worker(str(folder / f"heap.{rank}"), rank, heap_bytes, boot)
            for rank in range(num_workers)
        ]
        self.store: ChunkStore[bytes] = ChunkStore(
            heap_bytes, GROUPS, POLICIES["lru"](heap_bytes), lambda key: key[:1]
        )
        self.index = None
        self.found: list[bytes] = []
        if has_index:
            self.index = RestartIndex(str(folder / name), identity, num_workers)
            reports = [worker.report(layout) for worker in self.workers]
            self.found = self.index.restore(self.store, reports)
        self.store.check()

    def store_keys(self, *keys: bytes, complete: bool = True) -> None:
        plan = self.store.begin_store(keys)
        for worker in self.workers:
            worker.label.renew()
        for key, address, size in zip(
            plan.keys, plan.addresses.tolist(), plan.sizes.tolist(), strict=True
        ):
            for worker in self.workers:
                worker.chunk(address, size)[:] = contents(key, worker.rank, size)
        if complete:
            self.store.end_store(plan.keys)

    def require_right_bytes(self) -> int:
        """Every chunk that would be loaded has its own bytes; how many there are."""
        records = self.store.records()
        for key in records.keys:
            addresses, sizes = self.store.begin_load([key])
            self.store.end_load([key])
            for worker in self.workers:
                found = worker.chunk(int(addresses[0]), int(sizes[0]))
                assert (found == contents(key, worker.rank, int(sizes[0]))).all(), key
        return len(records.keys)

    def end(self) -> None:
        for worker in self.workers:
            worker.end()
        if self.index is not None:
            self.index.save(self.store)

    def crash(self) -> None:
        """The scheduler is gone at once, the workers at some time."""
        if self.index is not None:
            with self.index._mutex:  # its thread dies with it
                self.index._is_saved = True
            self.index._file.close()
        for worker in self.workers:
            worker.end(is_clean=False)


@pytest.fixture(autouse=True)
def _levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvheap")


KEYS = [b"f0", b"f1", b"w0", b"w1", b"w2"]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_next_process_finds_what_was_stored(tmp_path: Path, num_workers: int) -> None:
    for number in range(3):  # a second restart too
        life = Life(tmp_path, num_workers)
        assert sorted(life.found) == sorted(KEYS if number else [])
        assert not (tmp_path / "index").exists()
        assert life.require_right_bytes() == len(life.found)
        life.store_keys(*KEYS)
        life.end()
        assert sorted(os.listdir(tmp_path)) == [
            *[f"heap.{rank}" for rank in range(num_workers)],
            "index",
        ]


def test_what_was_not_complete_is_not_found(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store_keys(*KEYS)
    life.store_keys(b"f7", b"w7", complete=False)
    life.store.begin_load([b"f0"])
    life.store.begin_load([b"f1"])
    life.store.forget([b"f1"])
    life.end()
    assert sorted(Life(tmp_path).found) == [b"f0", b"w0", b"w1", b"w2"]


def test_after_a_reset_only_what_came_later_is_found(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store_keys(*KEYS)
    life.store.reset()
    life.store_keys(b"w9")
    life.end()
    again = Life(tmp_path)
    assert again.found == [b"w9"]
    again.store.reset()
    again.end()
    assert not (tmp_path / "index").exists()
    assert Life(tmp_path).found == []


def test_a_killed_scheduler_leaves_nothing_to_find(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    life = Life(tmp_path)
    life.store_keys(*KEYS)
    life.crash()
    again = Life(tmp_path)
    assert again.found == []
    assert "there is no index" in caplog.text
    again.store_keys(*KEYS)
    again.end()
    assert len(Life(tmp_path).found) == len(KEYS)


def test_a_start_that_fails_before_the_handshake_costs_nothing(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store_keys(*KEYS)
    life.end()
    worker = Worker(str(tmp_path / "heap.0"), 0, HEAP_BYTES, "boot 1")
    index = RestartIndex(str(tmp_path / "index"), IDENTITY, 1)
    del index
    worker.end(is_clean=False)
    assert sorted(Life(tmp_path).found) == sorted(KEYS)


def saved(tmp_path: Path, **options: Any) -> None:
    life = Life(tmp_path, **options)
    life.store_keys(*KEYS)
    life.end()


REFUSALS: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "another model": (
        lambda f: None,
        {"identity": IDENTITY | {"model": "qwen"}},
        "model is qwen, was llama",
    ),
    "less is known": (
        lambda f: None,
        {"identity": {"model": "llama"}},
        "dtype is nothing, was bfloat16",
    ),
    "more is known": (
        lambda f: None,
        {"identity": IDENTITY | {"seed": "5"}},
        "seed is 5, was nothing",
    ),
    "another layout": (lambda f: None, {"layout": "HND"}, "KV cache of worker 0 is HND, was NHD"),
    "more workers": (
        lambda f: None,
        {"num_workers": 3},
        "KV cache of worker 2 is NHD, was nothing",
    ),
    "fewer workers": (
        lambda f: None,
        {"num_workers": 1},
        "KV cache of worker 1 is nothing, was NHD",
    ),
    "another size": (
        lambda f: None,
        {"heap_bytes": 2 * HEAP_BYTES},
        "it had 65536 bytes, and has 131072 now",
    ),
    "a new file": (
        lambda f: (f / "heap.1").unlink(),
        {},
        "heap.1 is not the one it belongs to: it is new",
    ),
    "another file": (
        lambda f: shutil.copy(f / "heap.0", f / "heap.1"),
        {},
        "heap.1 is not the one it belongs to: its bytes were changed after",
    ),
    "cut off": (lambda f: os.truncate(f / "index", 100), {}, "it has 100 bytes instead of"),
    "empty": (lambda f: os.truncate(f / "index", 0), {}, "cut off after 0 bytes"),
    "no index": (lambda f: (f / "index").write_bytes(b"x" * 5000), {}, "no index of kvheap"),
    "damaged": (lambda f: spoil(f / "index"), {}, "its checksum is wrong"),
    "wrong places": (lambda f: misplace(f / "index"), {}, "has two chunks"),
}


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def misplace(path: Path) -> None:
    index = decode(path.read_bytes())
    index.records.addresses[0] = index.records.addresses[1]
    path.write_bytes(encode(index))


@pytest.mark.parametrize("kind", REFUSALS)
def test_an_index_that_does_not_fit_is_named_and_costs_the_chunks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    change, options, message = REFUSALS[kind]
    saved(tmp_path, num_workers=2)
    change(tmp_path)
    life = Life(tmp_path, **{"num_workers": 2, **options})
    assert life.found == []
    assert message in caplog.text
    assert "the tier begins empty" in caplog.text
    assert life.store.stats().free_bytes == options.get("heap_bytes", HEAP_BYTES)
    assert not (tmp_path / "index").exists(), "it would be tried again"
    life.store_keys(*KEYS)
    life.end()
    assert len(Life(tmp_path, **{"num_workers": 2, **options}).found) == len(KEYS)


@pytest.mark.parametrize("has_index", [True, False])
def test_an_index_that_comes_back_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_index: bool
) -> None:
    """Such as from a backup: whoever had the heap since has changed its id."""
    saved(tmp_path)
    shutil.copy(tmp_path / "index", tmp_path / "copy")
    life = Life(tmp_path, has_index=has_index)
    life.store_keys(b"f5")
    life.crash()
    (tmp_path / "copy").rename(tmp_path / "index")
    assert Life(tmp_path).found == []
    assert "changed after the index was written" in caplog.text


def test_an_engine_of_another_size_or_index_has_changed_the_bytes(tmp_path: Path) -> None:
    saved(tmp_path)
    other = Life(tmp_path, heap_bytes=HEAP_BYTES // 2, name="other")
    other.store_keys(*[b"w%d" % at for at in range(30)])
    other.end()
    assert Life(tmp_path).found == []


def test_a_restart_of_the_machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    life = Life(tmp_path, boot="boot 2")
    assert len(life.found) == len(KEYS)
    for worker in life.workers:
        worker.end(is_clean=False)
    assert life.index is not None
    life.index.save(life.store)
    assert Life(tmp_path, boot="boot 3").found == []
    assert "the machine has restarted before it was flushed" in caplog.text


def test_two_engines_do_not_share_an_index(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store_keys(*KEYS)
    with pytest.raises(BlockingIOError, match=r"index_path.*is used by another engine"):
        RestartIndex(str(tmp_path / "index"), IDENTITY, 1)
    life.end()
    assert len(Life(tmp_path).found) == len(KEYS)


def test_without_all_workers_nothing_is_found_and_nothing_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path)
    life = Life(tmp_path, has_index=False)
    index = RestartIndex(str(tmp_path / "index"), IDENTITY, 2)
    assert index.restore(life.store, [life.workers[0].report("NHD")]) == []
    assert "of 2 workers, 1 have said which heap they have" in caplog.text
    life.store_keys(*KEYS)
    (tmp_path / "index").unlink()
    index.save(life.store)
    assert not (tmp_path / "index").exists()


def test_a_second_handshake_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    life = Life(tmp_path)
    assert life.index is not None
    assert life.index.restore(life.store, [life.workers[0].report("NHD")]) == []
    assert life.require_right_bytes() == len(KEYS)


def test_an_index_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    life = Life(tmp_path)
    life.store_keys(*KEYS)
    (tmp_path / "index").mkdir()
    life.end()
    assert "could not be written" in caplog.text


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_is_written_once_the_workers_have_let_go_of_their_heaps(tmp_path: Path) -> None:
    """vLLM may kill the scheduler before it shuts it down."""
    life = Life(tmp_path, num_workers=2)
    life.store_keys(*KEYS)
    life.workers[0].end()
    time.sleep(0.1)
    assert not (tmp_path / "index").exists()
    life.workers[1].end(is_clean=False)
    wait_for((tmp_path / "index").exists)
    wait_for(lambda: not (tmp_path / "index.lock").exists())
    life.store.reset()
    assert life.index is not None
    life.index.save(life.store)
    assert len(Life(tmp_path, num_workers=2).found) == len(KEYS)


def test_a_store_that_changes_meanwhile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life, calls = Life(tmp_path), []
    life.store_keys(*KEYS)
    read = life.store.records

    def records() -> Any:
        calls.append(0)
        if len(calls) < 3:
            raise RuntimeError("dictionary changed size during iteration")
        return read()

    monkeypatch.setattr(life.store, "records", records)
    life.end()
    assert len(calls) == 3
    assert len(Life(tmp_path).found) == len(KEYS)


def test_a_forked_child_leaves_the_index_to_its_parent(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store_keys(*KEYS)
    assert life.index is not None
    pid = os.fork()
    if not pid:
        life.store.reset()
        life.store_keys(b"f9")
        life.index.save(life.store)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert not (tmp_path / "index").exists()
    assert (tmp_path / "index.lock").exists()


def test_a_heap_that_cannot_be_watched_is_saved_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(paths: object, on_released: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(restart, "watch_heaps", refuse)
    saved(tmp_path)
    assert "written when the scheduler is shut down" in caplog.text
    assert len(Life(tmp_path).found) == len(KEYS)


def test_watching_holds_no_descriptor_when_it_fails_or_ends(tmp_path: Path) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    (tmp_path / "a").write_bytes(b"")
    before, called = num_open(), threading.Event()
    with pytest.raises(FileNotFoundError):
        watch_heaps([str(tmp_path / "a"), str(tmp_path / "none")], called.set)
    assert num_open() == before
    watch_heaps([str(tmp_path / "a")], called.set)
    assert called.wait(20)
    wait_for(lambda: num_open() == before)


@pytest.mark.parametrize("seed", range(4))
def test_no_life_finds_wrong_bytes(tmp_path: Path, seed: int) -> None:
    """Random lives with random ends, and indexes that come back: what is found is right."""
    source, index, copy = random.Random(seed), tmp_path / "index", tmp_path / "copy"
    found = refused = 0
    for _ in range(50):
        if index.exists() and source.random() < 0.5:
            shutil.copy(index, copy)
        if copy.exists() and source.random() < 0.2:
            shutil.copy(copy, index)
        if source.random() < 0.05:
            (tmp_path / "heap.0").unlink(missing_ok=True)
        life = Life(
            tmp_path,
            num_workers=source.choices([2, 1], [9, 1])[0],
            heap_bytes=source.choices([HEAP_BYTES, HEAP_BYTES // 2], [9, 1])[0],
            has_index=source.random() < 0.9,
        )
        assert life.require_right_bytes() == len(life.found)
        found += len(life.found)
        refused += not life.found
        for _ in range(source.randint(0, 8)):
            keys = [source.choice([b"f", b"w"]) + b"%d" % source.randint(0, 60) for _ in range(3)]
            life.store_keys(*keys, complete=source.random() < 0.8)
            if source.random() < 0.05:
                life.store.reset()
        life.require_right_bytes()
        if source.random() < 0.8:
            life.end()
        else:
            life.crash()
    assert found > 50
    assert refused > 5
