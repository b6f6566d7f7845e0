"""Who owns a segment, which files are refused, and what damage is found."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_child import in_a_child
from shared_heaps import LAYOUT, NAMESPACE, PLACE, attach, contents, own, wrong_rows
from small_shared_heaps import KEYS, MANY, NUM_CHUNKS

from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat, SharedHeap
from kvheap.errors import ClosedError
from kvheap.files import MissingChunksError
from kvheap.shared import (
    SegmentDamagedError,
    SegmentInUseError,
    SegmentMismatchError,
    SegmentReplacedError,
)
from kvheap.shared.geometry import HEADER_BYTES, RECORD_BYTES, Geometry

GEOMETRY = Geometry.of(NUM_CHUNKS, LAYOUT.size_bytes, PLACE, 4096)


def stored(path: Path, **options: Any) -> None:
    with own(path, NUM_CHUNKS, **options) as heap:
        assert heap.store(KEYS, contents(KEYS)).all()


def damage(path: Path, offset: int, new: bytes | None = None) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(1 if new is None else len(new))
        file.seek(offset)
        file.write(bytes([old[0] ^ 0x40]) if new is None else new)


class TestOneOwner:
    def test_a_second_one_is_refused_by_the_process_that_owns_it(self, path: Path) -> None:
        with own(path), pytest.raises(SegmentInUseError) as caught:
            own(path)
        assert caught.value.owner_pid == os.getpid()
        own(path).close()

    def test_other_names_lead_to_the_same_lock(self, path: Path, tmp_path: Path) -> None:
        stored(path)
        symlink, hard_link = tmp_path / "symlink", path.parent / "hard link"
        folder = tmp_path / "folder"
        symlink.symlink_to(path)
        folder.symlink_to(path.parent)
        os.link(path, hard_link)
        fd = os.open(path, os.O_RDWR)
        others = [symlink, hard_link, folder / "heap", Path(f"/proc/{os.getpid()}/fd/{fd}"), fd]
        for first in (path, fd):
            with own(first, NUM_CHUNKS) as heap:
                for other in others:
                    with pytest.raises(SegmentInUseError):
                        own(other, NUM_CHUNKS)
                assert heap.lookup(KEYS).all()
        os.close(fd)
        hard_link.unlink()

    def test_a_name_is_one_in_dev_shm(self) -> None:
        name = f"kvheap-test-{os.getpid()}"
        with own(name, unlink=True) as heap:
            assert heap.path == f"/dev/shm/{name}"
            assert Path(heap.path).exists()
            attach(name).close()
        assert not Path(f"/dev/shm/{name}").exists()

    def test_a_forked_child_is_not_an_owner(self, path: Path) -> None:
        with own(path, NUM_CHUNKS) as heap:
            heap.store(KEYS, contents(KEYS))

            def child() -> list[str]:
                errors = []
                for call in (lambda: heap.store([b"x"], contents([KEYS[0]])), heap.keys):
                    with pytest.raises(ClosedError):
                        call()
                try:
                    own(path, NUM_CHUNKS)
                except SegmentInUseError:
                    errors.append("in use")
                heap.close()
                with attach(path) as mine:
                    mine.store([b"child"], contents([KEYS[0]]))
                return errors

            assert in_a_child(child) == ["in use"]
            assert heap.lookup([b"child"]).all()
            assert heap.store([b"x"], contents([KEYS[0]])).all()
            heap.check(contents=True)

    def test_a_forked_child_does_not_keep_the_lock_of_an_owner_that_is_killed(
        self, path: Path
    ) -> None:
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            heap = own(path)  # lives on in the grandchild, mapped
            grandchild = os.fork()
            if not grandchild:
                os.write(write_end, os.getpid().to_bytes(8, "little"))
                time.sleep(60)
                os._exit(int(heap.is_owner))
            time.sleep(60)
            os._exit(1)
        grandchild = int.from_bytes(os.read(read_end, 8), "little")
        with pytest.raises(SegmentInUseError):
            own(path)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        own(path).close()
        os.kill(grandchild, signal.SIGKILL)
        os.close(read_end)
        os.close(write_end)

    def test_many_at_once(self, path: Path) -> None:
        """Of processes that begin at once, also to make the file, one becomes the owner."""
        for _ in range(5):
            gate_read, gate_write = os.pipe()
            answers_read, answers_write = os.pipe()
            children = []
            for _ in range(6):
                child = os.fork()
                if not child:
                    os.close(gate_write)
                    os.read(gate_read, 1)
                    try:
                        heap = own(path)
                    except SegmentInUseError:
                        os.write(answers_write, b"-")
                    except BaseException:
                        os.write(answers_write, b"x")
                    else:
                        os.write(answers_write, b"+")
                        time.sleep(60)
                        heap.close()
                    os._exit(0)
                children.append(child)
            os.close(gate_read)
            os.close(gate_write)  # opens it
            found = b""
            while len(found) < 6:
                found += os.read(answers_read, 6)
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            os.close(answers_read)
            os.close(answers_write)
            assert sorted(found) == sorted(b"+-----")
            path.unlink()

    @pytest.mark.parametrize("is_there", [True, False])
    def test_a_file_that_is_replaced_or_removed(self, path: Path, is_there: bool) -> None:
        with own(path, NUM_CHUNKS, unlink=True) as heap, attach(path) as replica:
            heap.store(KEYS, contents(KEYS))
            path.unlink()
            other = own(path, NUM_CHUNKS) if is_there else None
            for each in (heap, replica):
                with pytest.raises(SegmentReplacedError, match=re.escape(str(path))):
                    each.store([b"x"], contents([KEYS[0]]))
                with each.hold(KEYS) as hold:  # its bytes are its own
                    assert not wrong_rows(KEYS, hold.batch)
        assert path.exists() == is_there  # it is not the one to remove
        if other is not None:
            assert other.store(KEYS, contents(KEYS)).all()
            other.close()

    def test_a_memfd_is_passed_on(self) -> None:
        fd = os.memfd_create("kvheap")
        with own(fd, NUM_CHUNKS) as heap:
            heap.store(KEYS, contents(KEYS))
            with attach(f"/proc/{os.getpid()}/fd/{fd}") as replica:
                assert replica.lookup(KEYS).all()
        with own(fd, NUM_CHUNKS) as heap, heap.hold(KEYS) as hold:
            assert not wrong_rows(KEYS, hold.batch)
        os.close(fd)


class TestRefused:
    """What a heap was not made for."""

    @pytest.mark.parametrize(
        ("field", "options"),
        [
            ("namespace", {"namespace": "another model"}),
            ("lease_s", {"lease_s": 7.0}),
            ("num_places", {"num_chunks": NUM_CHUNKS + 1}),
        ],
    )
    def test_what_differs_is_named(self, path: Path, field: str, options: dict[str, Any]) -> None:
        stored(path)
        with pytest.raises(SegmentMismatchError, match=field) as caught:
            own(path, **{"num_chunks": NUM_CHUNKS, **options})
        assert caught.value.field == field
        assert str(caught.value.found) in str(caught.value)
        with own(path, NUM_CHUNKS) as heap:
            assert heap.lookup(KEYS).all()

    @pytest.mark.parametrize(
        "layout",
        [
            BlockLayout.of([2048], torch.float64, MemoryFormat.UNDEFINED),
            BlockLayout.of([1024, 2], torch.int64, MemoryFormat.UNDEFINED),
            BlockLayout.of([2, 1, 512, 2], torch.int64, MemoryFormat.KV_2LTD),
            BlockLayout.of([2047], torch.int64, MemoryFormat.UNDEFINED),
        ],
    )
    def test_another_layout(self, path: Path, layout: BlockLayout) -> None:
        stored(path)
        for opened in (
            lambda: SharedHeap(path, NUM_CHUNKS * PLACE, layout, namespace=NAMESPACE),
            lambda: SharedHeap.attach(path, layout, namespace=NAMESPACE),
        ):
            with pytest.raises(SegmentMismatchError, match="layout is") as caught:
                opened()
            assert caught.value.found == str(LAYOUT)

    def test_another_namespace_is_not_attached(self, path: Path) -> None:
        stored(path)
        with pytest.raises(SegmentMismatchError, match="namespace is 'a model'"):
            attach(path, namespace="another model")

    def test_another_version(self, path: Path) -> None:
        stored(path)
        damage(path, GEOMETRY.header_at + 16, b"\x02")
        for opened in (lambda: own(path, NUM_CHUNKS), lambda: attach(path)):
            with pytest.raises(SegmentMismatchError, match="format_version is 2"):
                opened()

    @pytest.mark.parametrize("num_bytes", [1, 100, 4096, HEADER_BYTES, 3 * PLACE])
    @pytest.mark.parametrize("sign", [-1, 1])
    def test_a_file_of_another_length(self, path: Path, num_bytes: int, sign: int) -> None:
        stored(path)
        length = path.stat().st_size + sign * num_bytes
        os.truncate(path, length)
        for opened in (lambda: own(path, NUM_CHUNKS), lambda: attach(path)):
            with pytest.raises(SegmentDamagedError, match=str(path)):
                opened()
        assert path.stat().st_size == length

    def test_a_file_that_was_cut_off_and_made_longer_again(self, path: Path) -> None:
        stored(path)
        length = path.stat().st_size
        os.truncate(path, GEOMETRY.data_bytes)
        os.truncate(path, length)
        with pytest.raises(SegmentDamagedError):
            attach(path)
        with own(path, NUM_CHUNKS) as heap:  # it looks like one that was never filled
            assert not heap.keys()

    @pytest.mark.parametrize(
        "content", [b"precious", bytes(GEOMETRY.file_bytes - 4096), b"x" * 99999]
    )
    def test_another_file_is_not_touched(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        for opened in (lambda: own(path, NUM_CHUNKS), lambda: attach(path)):
            with pytest.raises(SegmentDamagedError, match="is no segment of kvheap"):
                opened()
        assert path.read_bytes() == content

    def test_what_is_no_file(self, path: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(SegmentDamagedError, match="not a regular file"):
            attach(tmp_path / "fifo")
        with pytest.raises(OSError, match="directory"):
            own(tmp_path)
        with pytest.raises(FileNotFoundError, match="there is no segment"):
            attach(path)
        with pytest.raises(FileNotFoundError):
            own(tmp_path / "missing" / "heap")
        with pytest.raises(OSError, match="descriptor"):
            own(12345)

    def test_no_room_leaves_nothing(self, path: Path) -> None:
        with pytest.raises(OSError, match="has no room for"):
            own(path, 1 << 31)
        assert not list(path.parent.iterdir())

    def test_a_file_system_without_nameless_files(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.open

        def without(name: Any, flags: int, *mode: int, **options: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return real(name, flags, *mode, **options)

        monkeypatch.setattr(os, "open", without)
        stored(path)
        with own(path, NUM_CHUNKS) as heap:
            assert heap.lookup(KEYS).all()
            with pytest.raises(SegmentInUseError):
                own(path, NUM_CHUNKS)

    def test_an_empty_file_and_one_without_a_header_are_filled(self, path: Path) -> None:
        path.touch()
        stored(path)
        path.write_bytes(bytes(GEOMETRY.file_bytes))
        stored(path)

    @pytest.mark.parametrize(
        ("path_given", "error"),
        [
            ("", ValueError),
            (".", ValueError),
            ("a/", ValueError),
            (-1, ValueError),
            (1.5, TypeError),
        ],
    )
    def test_a_wrong_path(self, path_given: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="path must"):
            own(path_given)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": PLACE - 1}, f"size must be {PLACE}"),
            ({"size": 1 << 62}, "size must be"),
            ({"namespace": ""}, "namespace must name"),
            ({"namespace": 3}, "namespace must be a text"),
            ({"namespace": "x" * 20000}, "use a hash of the namespace"),
            ({"policy": "mru"}, "policy must be one of lru"),
            ({"lease_s": 0}, "lease_s must be a positive"),
            ({"unlink": 1}, "unlink must be True or False"),
            ({"layout": [2048]}, "layout must be a BlockLayout"),
        ],
    )
    def test_a_wrong_argument_makes_no_file(
        self, path: Path, options: dict[str, Any], message: str
    ) -> None:
        given = {"size": PLACE, "layout": LAYOUT, "namespace": NAMESPACE, **options}
        with pytest.raises((ValueError, TypeError), match=message):
            SharedHeap(path, **given)
        assert not list(path.parent.iterdir())


class TestDamage:
    def test_of_any_byte_of_a_record_costs_that_chunk_only(self, path: Path) -> None:
        stored(path)
        whole = path.read_bytes()
        with own(path, NUM_CHUNKS) as heap, heap.hold(KEYS) as hold:
            places = [record.place for record in hold.records]
        for offset in range(RECORD_BYTES):
            path.write_bytes(whole)
            damage(path, GEOMETRY.records_at + RECORD_BYTES * places[1] + offset)
            others = [KEYS[0], *KEYS[2:]]
            with own(path, NUM_CHUNKS) as heap:
                is_padding = offset >= 32 + len(KEYS[1])
                assert heap.lookup(KEYS).tolist() == [True, is_padding, True, True], offset
                with heap.hold(others) as hold:
                    assert not wrong_rows(others, hold.batch)
                heap.check()

    def test_of_a_header(self, path: Path) -> None:
        stored(path)
        damage(path, GEOMETRY.header_at + 60)
        for opened in (lambda: own(path, NUM_CHUNKS), lambda: attach(path)):
            with pytest.raises(SegmentDamagedError, match="damaged header"):
                opened()

    def test_of_the_hash_table_is_mended(self, path: Path) -> None:
        stored(path)
        length = GEOMETRY.cells_end - GEOMETRY.cells_at
        for new in (
            bytes(length),
            b"\xff" * length,
            os.urandom(length),
            b"\0\0\0\1" * (length // 4),
        ):
            damage(path, GEOMETRY.cells_at, new)
            with attach(path) as replica:
                assert not (replica.lookup([b"x"])).any()
            with own(path, NUM_CHUNKS) as heap:
                heap.check()
                assert heap.lookup(KEYS).all()

    def test_of_uses_is_harmless(self, path: Path) -> None:
        stored(path)
        with own(path, NUM_CHUNKS) as heap:
            damage(path, GEOMETRY.uses_at, b"\xff" * 8 * NUM_CHUNKS)
            assert heap.store(MANY, contents(MANY)).all()
            heap.check(contents=True)

    @pytest.mark.parametrize("is_owner", [True, False])
    def test_of_bytes_is_found_and_costs_the_chunk(self, path: Path, is_owner: bool) -> None:
        stored(path)
        with own(path, NUM_CHUNKS) as heap, attach(path) as replica:
            reader = heap if is_owner else replica
            with heap.hold(KEYS) as hold:
                places = [record.place for record in hold.records]
            damage(path, places[2] * PLACE + 12345)
            into = HostMemoryAllocator(1 << 20)
            with pytest.raises(MissingChunksError) as caught:
                reader.load(KEYS, into)
            assert caught.value.damaged == (KEYS[2],)
            assert not into.stats().allocated_bytes
            assert heap.lookup(KEYS).tolist() == [True, True, False, True]
            keeper = heap.stats().keeper
            assert keeper is not None
            assert keeper.damaged_chunks == 1
            heap.check(contents=True)

    def test_of_bytes_is_found_by_the_first_hold_of_a_process(self, path: Path) -> None:
        stored(path)
        damage(path, 12345)
        with own(path, NUM_CHUNKS) as heap:
            with heap.hold(KEYS, allow_partial=True) as hold:
                num_right = len(hold)
            with pytest.raises(KeyError):
                heap.hold(KEYS)
            assert num_right < len(KEYS)
            assert len(heap.keys()) == len(KEYS) - 1

    def test_check_of_contents_names_what_is_damaged(self, path: Path) -> None:
        stored(path)
        with own(path, NUM_CHUNKS) as heap:
            damage(path, 12345)
            heap.check()
            with pytest.raises(MissingChunksError, match="damaged, and removed"):
                heap.check(contents=True)
            heap.check(contents=True)

    def test_another_boot_of_the_machine_empties_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored(path)
        with monkeypatch.context() as context:
            context.setattr("kvheap.shared.ownership.boot_id", lambda: "another")
            with own(path, NUM_CHUNKS) as heap:
                assert not heap.keys()
                heap.store(KEYS, contents(KEYS))
            with own(path, NUM_CHUNKS) as heap:
                assert heap.lookup(KEYS).all()


class TestPaths:
    """Links, and systems that run out of something."""

    def test_a_link_to_a_file_that_is_not_there_yet(self, path: Path, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(path)

        def task() -> tuple[bool, bool]:  # it hung
            torch.set_num_threads(1)  # those of the parent do not exist here
            with own(link, NUM_CHUNKS) as heap:
                assert heap.store(KEYS, contents(KEYS)).all()
            with attach(path) as heap:
                return heap.lookup(KEYS).all(), path.is_symlink()

        assert in_a_child(task) == (True, False)
        with own(link, NUM_CHUNKS, unlink=True) as heap:
            assert sorted(heap.keys()) == KEYS
        assert link.is_symlink()
        assert not path.exists()  # the file, whose bytes would stay otherwise

    def test_a_name_with_a_zero_byte(self) -> None:
        for call in (own, attach):
            with pytest.raises(ValueError, match=r"path must be the path of a file, got 'a\\x00b'"):
                call("a\0b")  # type: ignore[operator]

    def test_an_error_of_the_system_names_the_file(self, path: Path) -> None:
        def task() -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (PLACE, PLACE))
            with pytest.raises(OSError, match="File too large") as caught:
                own(path, NUM_CHUNKS)
            assert not path.exists()
            return str(caught.value)

        message = in_a_child(task)
        assert message.endswith(f"{str(path)!r}")
        assert f"{GEOMETRY.file_bytes} bytes" in message
