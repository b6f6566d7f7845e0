"""Reads and writes of extents: parts, errors, and the way past the page cache."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvheap.files.data_file import PLACE_ALIGN_BYTES, DataFile, ShortReadError

PAGE = PLACE_ALIGN_BYTES


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DataFile]:
    file = DataFile(tmp_path / "chunks", 16 * PAGE, direct=True)
    yield file
    file.close()


def pages(count: int, seed: int = 0) -> memoryview:
    """So many aligned pages of random bytes."""
    memory = mmap.mmap(-1, count * PAGE)
    memory[:] = random.Random(seed).randbytes(count * PAGE)
    return memoryview(memory)


class Parts:
    """Calls that move a part only, and fail now and then, as told."""

    def __init__(self, call: Any, limits: list[int | OSError]) -> None:
        self.call, self.limits = call, limits
        self.fds: list[int] = []

    def __call__(self, fd: int, buffers: Any, address: int) -> int:
        self.fds.append(fd)
        if not self.limits:
            return self.call(fd, buffers, address)
        limit = self.limits.pop(0)
        if isinstance(limit, OSError):
            raise limit
        left, some = limit, []
        for buffer in buffers:
            some.append(buffer[:left])
            left -= some[-1].nbytes
        return self.call(fd, some, address)


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read(tmp_path: Path, direct: bool) -> None:
    file = DataFile(tmp_path / "chunks", 16 * PAGE, direct)
    whole, back = pages(5), pages(5, seed=1)
    file.write([whole[: 2 * PAGE], whole[2 * PAGE :]], 3 * PAGE, is_aligned=True)
    file.read([back[: 4 * PAGE], back[4 * PAGE :]], 3 * PAGE, is_aligned=True)
    assert back == whole
    file.sync()
    file.close()
    file.close()
    assert (tmp_path / "chunks").read_bytes()[3 * PAGE : 8 * PAGE] == whole
    assert (tmp_path / "chunks").stat().st_size == 16 * PAGE


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
@pytest.mark.parametrize(
    "limits",
    [
        [PAGE],
        [PAGE, PAGE, 2 * PAGE],
        [100],  # the rest is not aligned
        [PAGE + 1, 1, 1],
        [3 * PAGE],  # where a buffer ends
        [InterruptedError(errno.EINTR, "a signal")],
        [2 * PAGE, InterruptedError(errno.EINTR, "a signal"), 5],
        [OSError(errno.EINVAL, "not past the page cache")],
        [PAGE, OSError(errno.EINVAL, "not past the page cache")],
    ],
    ids=str,
)
def test_a_call_that_moves_a_part_is_continued(
    file: DataFile, name: str, limits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if file.direct_align is None:
        pytest.skip("the file system of tmp_path has no O_DIRECT")
    whole, back = pages(6), pages(6, seed=1)
    parts = Parts(getattr(os, name), [*limits])
    monkeypatch.setattr(os, name, parts)
    file.write([whole[: 3 * PAGE], whole[3 * PAGE :]], PAGE, is_aligned=True)
    file.read([back[: 3 * PAGE], back[3 * PAGE :]], PAGE, is_aligned=True)
    assert back == whole
    assert not parts.limits
    assert len(parts.fds) > 1


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOMEM])
def test_an_error_is_raised(
    file: DataFile, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, name, Parts(getattr(os, name), [PAGE, OSError(number, "so it is")]))
    move = file.read if name == "preadv" else file.write
    with pytest.raises(OSError, match="so it is") as caught:
        move([pages(2)], 0, is_aligned=True)
    assert caught.value.errno == number


def test_a_file_that_was_made_shorter(file: DataFile, tmp_path: Path) -> None:
    os.truncate(tmp_path / "chunks", 2 * PAGE)
    with pytest.raises(ShortReadError, match="ends at 8192"):
        file.read([pages(2)], PAGE, is_aligned=True)


def test_a_write_that_moves_nothing_does_not_go_on_for_ever(
    file: DataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="no byte"):
        file.write([pages(1)], 0, is_aligned=True)


def test_without_o_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    file = DataFile(tmp_path / "chunks", 16 * PAGE, direct=True)
    assert file.direct_align is None
    assert not file.write([pages(1)], 0, is_aligned=True)
    file.close()


def test_memory_that_is_not_aligned_goes_through_the_page_cache(file: DataFile) -> None:
    whole = pages(2)
    assert not file.write([whole[1 : PAGE + 1]], 0, is_aligned=False)
    back = pages(2, seed=1)
    went_direct = file.read([back[:PAGE]], 0, is_aligned=True)
    assert went_direct == (file.direct_align is not None)
    assert back[:PAGE] == whole[1 : PAGE + 1]  # both ways see the same bytes


def test_a_smaller_size_cuts_the_file(tmp_path: Path) -> None:
    for size in (8 * PAGE, 2 * PAGE, 4 * PAGE):
        DataFile(tmp_path / "chunks", size, direct=False).close()
        assert (tmp_path / "chunks").stat().st_size == size
