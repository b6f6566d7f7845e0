"""``HostMemoryAllocator.attach`` by descriptor, path and POSIX name, and what it refuses."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import pytest
import torch

from kvheap import HostBuffer, HostMemoryAllocator, MemoryBatch
from kvheap.memory import shared_files

PAGE = 4096
SIZE = 16 * PAGE


@pytest.fixture
def block() -> Iterator[shared_memory.SharedMemory]:
    """Shared memory with a name, that some process has made."""
    made = shared_memory.SharedMemory(create=True, size=SIZE)
    yield made
    made.close()
    made.unlink()


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    resource_tracker.ensure_running()  # of multiprocessing, which keeps a descriptor
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def owned(path: Path, size: int = SIZE) -> tuple[HostMemoryAllocator, MemoryBatch]:
    """A heap in a file, whose books this process keeps."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, size)
        heap = HostMemoryAllocator(size, host_buffer=HostBuffer(size, fd=fd), view_only=False)
    finally:
        os.close(fd)
    batch = heap.batched_allocate([4], torch.int64, 3, source=torch.arange(12).reshape(3, 4))
    assert batch is not None
    return heap, batch


def require_seen(file: Any, batch: MemoryBatch, **how: Any) -> None:
    with HostMemoryAllocator.attach(file, **how) as heap:
        assert heap.is_view_only
        assert heap.stats().heap_bytes == SIZE
        assert heap.batched_read(heap.view(batch.metadata)).tolist() == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [8, 9, 10, 11],
        ]


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("how", [{}, {"size": SIZE}])
def test_by_name(block: shared_memory.SharedMemory, slash: str, how: dict[str, int]) -> None:
    name = block.name.lstrip("/")
    heap, batch = owned(Path("/dev/shm") / name)
    with heap:
        for file in (slash + name, f"/dev/shm/{name}", Path("/dev/shm", name)):
            require_seen(file, batch, **how)


def test_by_path_and_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heap, batch = owned(tmp_path / "heap")
    with heap:
        monkeypatch.chdir(tmp_path)
        fd = heap.host_buffer.fd
        assert fd is not None
        (tmp_path / "folder").symlink_to(tmp_path)
        for file in (
            fd,
            tmp_path / "heap",
            str(tmp_path / "heap"),
            "heap",
            "./heap",
            Path("heap"),
            "folder/heap",
            f"/proc/self/fd/{fd}",
            f"/proc/{os.getpid()}/fd/{fd}",
            f"/dev/fd/{fd}",
        ):
            require_seen(file, batch)
            require_seen(file, batch, size=SIZE)


def test_of_a_memfd() -> None:
    with HostMemoryAllocator(SIZE, shared=True) as heap:
        batch = heap.batched_allocate([4], torch.int64, 3, source=torch.arange(12).reshape(3, 4))
        assert batch is not None
        require_seen(heap.host_buffer.fd, batch)
        require_seen(f"/proc/{os.getpid()}/fd/{heap.host_buffer.fd}", batch)


class TestAbsent:
    def test_says_where_it_has_looked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("no-such-heap", "/no-such-heap"):
            with pytest.raises(FileNotFoundError, match="/dev/shm/no-such-heap") as caught:
                HostMemoryAllocator.attach(name, SIZE)
            assert caught.value.filename == name
        for path in (Path("no-such-heap"), "./no-such-heap", "/dev/shm/no-such-heap", "a/b"):
            with pytest.raises(FileNotFoundError, match=str(path)):
                HostMemoryAllocator.attach(path, SIZE)

    @pytest.mark.parametrize("file", ["", "a\0b", b"heap", Path(""), ".", "..", "/", True, -1])
    def test_what_names_no_file(self, file: Any) -> None:
        for size in (SIZE, None):
            with pytest.raises((ValueError, TypeError), match=r"file|folder"):
                HostMemoryAllocator.attach(file, size)

    def test_a_closed_descriptor(self) -> None:
        fd = os.memfd_create("gone")
        os.close(fd)
        for size in (SIZE, None):
            with pytest.raises(OSError, match="Bad file descriptor"):
                HostMemoryAllocator.attach(fd, size)


class TestSize:
    def test_a_file_that_is_too_small(self, tmp_path: Path) -> None:
        (tmp_path / "heap").write_bytes(bytes(PAGE))
        with pytest.raises(ValueError, match=f"has {PAGE} bytes, fewer than the {SIZE} "):
            HostMemoryAllocator.attach(tmp_path / "heap", SIZE)
        fd = os.memfd_create("small")
        try:
            for size, match in ((SIZE, "has 0 bytes"), (None, "is empty")):
                with pytest.raises(ValueError, match=match):
                    HostMemoryAllocator.attach(fd, size)
            os.ftruncate(fd, 100)
            with pytest.raises(ValueError, match="0 bytes"):
                HostMemoryAllocator.attach(fd)
            with pytest.raises(ValueError, match="has 100 bytes, fewer than the 4096"):
                HostBuffer(PAGE, fd=fd)
        finally:
            os.close(fd)

    def test_the_first_bytes_of_a_larger_file(self, tmp_path: Path) -> None:
        heap, batch = owned(tmp_path / "heap", 4 * SIZE)
        with heap:
            require_seen(tmp_path / "heap", batch, size=SIZE)
            with HostMemoryAllocator.attach(tmp_path / "heap", PAGE) as small:
                with pytest.raises(ValueError, match="leave the"):
                    small.view(batch.metadata)
                assert small.view(batch[0].metadata)[0].tensor is not None

    @pytest.mark.parametrize("size", [0, -1, 1.5, "big", 1 << 70, True])
    def test_a_wrong_size(self, tmp_path: Path, size: Any) -> None:
        (tmp_path / "heap").write_bytes(bytes(SIZE))
        with pytest.raises((ValueError, TypeError), match=str(size)):
            HostMemoryAllocator.attach(tmp_path / "heap", size)


class TestSurprises:
    def test_links_are_not_followed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared_files, "SHM_FOLDER", str(tmp_path / "shm"))
        (tmp_path / "shm").mkdir()
        secret = tmp_path / "secret"
        secret.write_bytes(bytes(SIZE))
        for link in (tmp_path / "shm" / "kvheap-link", tmp_path / "link"):
            link.symlink_to(secret)
        for file in ("kvheap-link", "/kvheap-link", tmp_path / "link", str(tmp_path / "link")):
            with pytest.raises(ValueError, match=f"symbolic link to {secret}"):
                HostMemoryAllocator.attach(file, SIZE)
        (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name in ("broken", "loop"):
            with pytest.raises(ValueError, match="symbolic link"):
                HostMemoryAllocator.attach(tmp_path / name, SIZE)
        assert secret.read_bytes() == bytes(SIZE)

    def test_a_text_that_is_a_name_and_a_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shared_files, "SHM_FOLDER", str(tmp_path / "shm"))
        (tmp_path / "shm").mkdir()
        monkeypatch.chdir(tmp_path)
        heap, batch = owned(tmp_path / "heap")
        (tmp_path / "shm" / "heap").write_bytes(bytes(SIZE))
        with heap:
            with pytest.raises(ValueError, match="both a file and the name"):
                HostMemoryAllocator.attach("heap", SIZE)
            require_seen(Path("heap"), batch)
            require_seen("./heap", batch)
            with HostMemoryAllocator.attach(str(tmp_path / "shm" / "heap")) as other:
                assert not other.buffer.any()

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "socket"))
            for path, kind in (
                (tmp_path, "a folder"),
                (tmp_path / "pipe", "a pipe"),
                (tmp_path / "socket", "a socket"),
                ("/dev/zero", "a character device"),
            ):
                for size in (SIZE, None):
                    with pytest.raises(ValueError, match=f"is {kind}"):
                        HostMemoryAllocator.attach(path, size)
