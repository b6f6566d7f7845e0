"""Locks that end with their process, whatever else of it lives on."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_child import in_a_child

from kvheap.integrations.vllm.file_locks import LockedFile
from kvheap.memory.boots import boot_id
from kvheap.memory.descriptors import Descriptor
from kvheap.memory.file_locks import FileLock, RangeLocks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(bytes(8192))
    return tmp_path / "file"


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def file_of(path: Path) -> Descriptor:
    return Descriptor(path, os.O_RDWR)


class TestFileLock:
    def test_one_at_a_time_in_any_process(self, path: Path) -> None:
        lock = FileLock(file_of(path))

        def other() -> bool:
            with pytest.raises(BlockingIOError):
                FileLock(file_of(path))
            return True

        assert other()
        assert in_a_child(other)
        lock.release()
        lock.release()
        FileLock(file_of(path)).release()

    def test_patience(self, path: Path) -> None:
        lock = FileLock(file_of(path))
        with pytest.raises(BlockingIOError):
            FileLock(file_of(path), 0.05)
        lock.release()
        other = FileLock(file_of(path), 0.05)
        fd = other.fd
        other.release()
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)

    def test_in_a_forked_child_it_stays_the_parents(self, path: Path) -> None:
        lock = FileLock(file_of(path))
        assert in_a_child(lambda: lock.release() is None)
        with pytest.raises(BlockingIOError):
            FileLock(file_of(path))
        lock.release()

    def test_dropping_it_releases_it(self, path: Path) -> None:
        lock = FileLock(file_of(path))
        del lock
        FileLock(file_of(path)).release()


def own_lock(path: Path) -> object:
    fd = opened(path)
    lock = FileLock.reopened(fd)
    return lock, mmap.mmap(fd, 8192)


def locked_file(path: Path) -> object:
    file = LockedFile(str(path), "it is locked")
    return file, mmap.mmap(file.fd, 8192)


@pytest.mark.parametrize("take", [own_lock, locked_file])
def test_a_mapping_in_a_forked_child_does_not_keep_the_lock(
    path: Path, take: Callable[[Path], object]
) -> None:
    """The child has let go of what it has inherited, but the mapping."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        held = take(path)
        grandchild = os.fork()
        if not grandchild:
            os.closerange(3, write_end)
            os.closerange(write_end + 1, 256)
            os.write(write_end, os.getpid().to_bytes(8, "little"))
            time.sleep(60)
        time.sleep(60)
        os._exit(held is None)
    grandchild = int.from_bytes(os.read(read_end, 8), "little")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        FileLock(file_of(path), 5.0).release()
    finally:
        os.kill(grandchild, signal.SIGKILL)
        os.close(read_end)
        os.close(write_end)


class TestRangeLocks:
    def test_shared_and_exclusive(self, path: Path) -> None:
        one, other, third = (RangeLocks(file_of(path)) for _ in range(3))
        assert one.share(1 << 41, 10)
        assert other.share(5 + (1 << 41), 10)
        assert not third.take(9 + (1 << 41), 1)
        assert third.take(15 + (1 << 41), 1)
        assert not one.share(15 + (1 << 41), 1)
        assert third.has_others(1 << 41, 20)
        assert not third.has_others(15 + (1 << 41), 5)
        assert one.has_others(1 << 41, 10)
        assert not one.has_others(1 << 41, 5)  # its own
        other.drop(7 + (1 << 41), 1)
        assert not one.has_others(7 + (1 << 41), 1)
        one.close()
        one.close()
        one.drop(1 << 41, 1)
        assert not third.has_others(1 << 41, 5)
        other.close()
        third.close()

    def test_a_process_that_is_killed_has_none(self, path: Path) -> None:
        mine = RangeLocks(file_of(path))
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            theirs = RangeLocks(file_of(path))
            theirs.share(3, 4)
            os.write(write_end, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(read_end, 1)
        assert mine.has_others(0, 10)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not mine.has_others(0, 10)
        mine.close()

    def test_closing_what_a_child_has_inherited_leaves_the_locks(self, path: Path) -> None:
        mine, other = RangeLocks(file_of(path)), RangeLocks(file_of(path))
        assert mine.share(3, 4)
        assert in_a_child(lambda: mine.close() is None)
        assert other.has_others(3, 1)
        mine.close()
        other.close()


def test_an_open_file_of_its_own(path: Path) -> None:
    fd = opened(path)
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    os.close(own)


def test_the_boot_has_a_name() -> None:
    assert len(boot_id()) == 36
