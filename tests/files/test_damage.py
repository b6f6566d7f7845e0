"""What others do to the files of a tier, and systems that run out of something.

No byte that is served is wrong, no process dies, and what can be read is kept.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")

from file_tiers import PLACE, key_of, make_heap, open_tier, stored, wrong_rows
from forked_child import in_a_child

from kvheap.files import TierInUseError, TierMismatchError

NUM_CHUNKS = 300
NAMES = [key_of(number) for number in range(NUM_CHUNKS)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tier whose index has several pages, and has been changed often."""
    folder = tmp_path_factory.mktemp("tiers") / "original"
    heap = make_heap(NUM_CHUNKS)
    with open_tier(folder, NUM_CHUNKS + 16) as tier:
        for first in range(0, NUM_CHUNKS, 50):
            stored(tier, heap, range(first, first + 50))
        tier.remove(NAMES[::7])
        stored(tier, heap, range(0, NUM_CHUNKS, 7))
    return folder


def spoiled(original: Path, folder: Path, spoil: Callable[[bytearray], bytearray]) -> Path:
    """A copy of a tier with another index."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    for name in ("chunks", "tier.json"):
        shutil.copyfile(original / name, folder / name)
    (folder / "index").write_bytes(spoil(bytearray((original / "index").read_bytes())))
    return folder


def used(folder: Path) -> tuple[int, int, int]:
    """Open a tier, load all it has, store more, and open it again.

    Returns:
        How many chunks it had, how many of them were not damaged, and how many were dropped.
    """
    heap = make_heap(NUM_CHUNKS + 32)
    with open_tier(folder, NUM_CHUNKS + 16) as tier:
        keys = tier.keys()
        loading = tier.load(keys, heap)
        assert loading is not None
        is_right = loading.succeeded(60)
        assert not wrong_rows(keys, loading.batch, is_right.tolist())
        tier.check()
        new = stored(tier, heap, range(1000, 1010))
        tier.check()
        dropped = tier.stats().dropped_chunks
    with open_tier(folder, NUM_CHUNKS + 16) as tier:
        assert set(new) <= set(tier.keys())
        assert tier.stats().dropped_chunks == 0
        tier.check()
    return len(keys), int(is_right.sum()), dropped


def used_bytes(raw: bytearray) -> list[int]:
    return [at for at, value in enumerate(raw) if value]


class TestIndex:
    """The index, whose format has no checksums, and which LMDB maps."""

    @pytest.mark.parametrize("share", [0.95, 0.75, 0.5, 0.25, 0.1])
    def test_cut_off(self, original: Path, tmp_path: Path, share: float) -> None:
        num_bytes = used_bytes(bytearray((original / "index").read_bytes()))[-1]
        folder = spoiled(original, tmp_path / "tier", lambda raw: raw[: int(num_bytes * share)])
        num_keys, num_right, dropped = in_a_child(lambda: used(folder))
        assert num_right == num_keys
        assert num_keys > 200 if share == 0.95 else num_keys < NUM_CHUNKS
        assert dropped > 0

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda raw: random.Random(1).randbytes(len(raw)),
            lambda raw: bytes(len(raw)),
            lambda raw: b"not an index",
            lambda raw: raw[:4096] + bytes(len(raw) - 4096),
            lambda raw: raw[:8192] + random.Random(2).randbytes(len(raw) - 8192),
        ],
        ids=["random", "zeros", "short", "zeros behind the first page", "random pages"],
    )
    def test_no_index(self, original: Path, tmp_path: Path, spoil: Any) -> None:
        folder = spoiled(original, tmp_path / "tier", spoil)
        assert in_a_child(lambda: used(folder))[0] == 0

    def test_flipped_bits(self, original: Path, tmp_path: Path) -> None:
        random_ = random.Random(3)
        places = used_bytes(bytearray((original / "index").read_bytes()))

        def flip(raw: bytearray) -> bytearray:
            raw[random_.choice(places)] ^= 1 << random_.randrange(8)
            return raw

        for _ in range(25):
            folder = spoiled(original, tmp_path / "tier", flip)
            num_keys, num_right, dropped = in_a_child(lambda: used(folder))  # noqa: B023
            assert num_keys - num_right <= 2 or dropped

    def test_one_that_is_whole_is_left_alone(self, original: Path, tmp_path: Path) -> None:
        folder = spoiled(original, tmp_path / "tier", lambda raw: raw)
        before = os.stat(folder / "index").st_ino
        assert used(folder) == (NUM_CHUNKS, NUM_CHUNKS, 0)
        assert os.stat(folder / "index").st_ino == before

    def test_it_is_told_once(
        self, original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = spoiled(original, tmp_path / "tier", lambda raw: bytes(len(raw)))
        with caplog.at_level(logging.WARNING, "kvheap"):
            open_tier(folder).close()
            open_tier(folder).close()
        assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
            f"the index {folder / 'index'} was damaged"
        ]

    def test_a_folder_in_its_place(self, tmp_path: Path) -> None:
        open_tier(tmp_path / "tier").close()
        (tmp_path / "tier" / "index").unlink()
        (tmp_path / "tier" / "index").mkdir()
        for _ in range(2):  # nothing is left open
            with pytest.raises(OSError, match=r"tier/index"):
                open_tier(tmp_path / "tier")


class TestState:
    @pytest.mark.parametrize("raw", [b"", b"\xdc\xff", b"\0" * 100, b'{"identity": "\xe5"}', b"[]"])
    def test_unreadable(self, tmp_path: Path, raw: bytes) -> None:
        open_tier(tmp_path / "tier").close()
        (tmp_path / "tier" / "tier.json").write_bytes(raw)
        with pytest.raises(TierMismatchError, match=r"tier\.json: the content cannot be read") as e:
            open_tier(tmp_path / "tier")
        assert "delete this one" in str(e.value)
        assert e.value.found is None

    def test_another_tier_of_this_process(self, tmp_path: Path) -> None:
        with open_tier(tmp_path / "tier"), pytest.raises(TierInUseError, match="is this one"):
            open_tier(tmp_path / "tier")


class TestChunks:
    def test_many_damaged_ones_are_told_in_one_line(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        heap = make_heap()
        with open_tier(tmp_path / "tier", 32) as tier:
            keys = stored(tier, heap, range(32))
            os.truncate(tmp_path / "tier" / "chunks", 0)
            loading = tier.load(keys, heap)
            assert loading is not None
            with caplog.at_level(logging.WARNING, "kvheap"):
                assert not loading.succeeded(60).any()
                tier.remove([b"-"])  # the thread has told it by now
        assert [record.getMessage()[:24] for record in caplog.records] == [
            "32 chunks in " + str(tmp_path)[:11]
        ]


class TestArguments:
    @pytest.mark.parametrize("path", ["", "a\0b"])
    def test_no_folder(self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="path must be the path of a folder, got "):
            open_tier(path)
        assert not [*tmp_path.iterdir()]

    def test_too_many_threads(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="threads must be at most 256, got 1000000"):
            open_tier(tmp_path / "tier", threads=1_000_000)
        assert not (tmp_path / "tier").exists()


def tier_state(parent: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((parent / "tier" / "tier.json").read_text())
    return state


class TestNoRoom:
    """Errors of the system name the file."""

    def test_no_room_for_the_file(self, tmp_path: Path) -> None:
        def task() -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (PLACE, PLACE))
            with pytest.raises(OSError, match="File too large") as caught:
                open_tier(tmp_path / "tier")
            return str(caught.value)

        message = in_a_child(task)
        assert f"{16 * PLACE} bytes" in message
        assert message.endswith(f"'{tmp_path / 'tier' / 'chunks'}'")

    def test_a_tier_that_has_filled_its_file_system_is_opened_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heap, real = make_heap(), os.open
        with open_tier(tmp_path / "tier") as tier:
            keys = stored(tier, heap, range(4))

        def without_room(path: Any, flags: int, *mode: int) -> int:
            if flags & os.O_CREAT and not os.path.exists(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(path, flags, *mode)

        monkeypatch.setattr(os, "open", without_room)
        for number in range(4, 8):
            tier = open_tier(tmp_path / "tier")
            assert sorted(tier.keys()) == keys
            assert not tier_state(tmp_path)["is_closed"]
            keys += stored(tier, heap, [number])  # which may have its place
            tier.close()
            assert tier_state(tmp_path)["is_closed"]

    def test_no_room_for_chunks(self, tmp_path: Path) -> None:
        def task() -> tuple[str, int]:
            heap = make_heap()
            with open_tier(tmp_path / "tier") as tier:
                keys = stored(tier, heap, range(2))
                limit = (3 * PLACE, resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
                with pytest.raises(Exception, match="not moved") as caught:
                    stored(tier, heap, range(2, 16))
                tier.check()
                loading = tier.load(tier.keys(), heap)
                assert loading is not None
                loading.result(60)
                assert set(keys) <= set(tier.keys())
                return str(caught.value), len(tier.keys())

        message, num_keys = in_a_child(task)
        assert message.endswith(f"File too large: '{tmp_path / 'tier' / 'chunks'}'")
        assert 2 <= num_keys <= 3
