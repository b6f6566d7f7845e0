"""The bytes of an index and its file: read as they were written, or refused. Needs no vLLM."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap.integrations.vllm import index_file
from kvheap.integrations.vllm.index_file import IndexFile
from kvheap.integrations.vllm.index_format import (
    CHECKSUM_BYTES,
    IndexRefusedError,
    SavedIndex,
    decode,
    encode,
)
from kvheap.integrations.vllm.store_values import ChunkRecords


def index_of(keys: list[bytes], seed: int = 0) -> SavedIndex:
    source = np.random.default_rng(seed)
    return SavedIndex(
        {"model": "mödel", "dtype": "bfloat16"},
        {0: "a" * 32, 3: "b" * 32},
        ChunkRecords(
            keys,
            source.integers(0, 1 << 62, len(keys)),
            source.integers(0, 9, len(keys)),
            source.integers(0, 1 << 62, (len(keys) // 2, 3)),
        ),
    )


SOME = index_of([bytes([at]) * 36 for at in range(20)])


def require_equal(one: SavedIndex, other: SavedIndex) -> None:
    assert dict(one.identity) == dict(other.identity)
    assert dict(one.heaps) == dict(other.heaps)
    assert one.records.keys == other.records.keys
    for name in ("addresses", "groups", "spans"):
        first, second = getattr(one.records, name), getattr(other.records, name)
        assert first.dtype == second.dtype == np.int64
        assert first.shape == second.shape
        assert (first == second).all()


class TestFormat:
    @given(st.lists(st.binary(max_size=40), max_size=20, unique=True), st.integers(0, 9))
    @settings(max_examples=50)
    def test_what_was_written_is_read(self, keys: list[bytes], seed: int) -> None:
        require_equal(decode(encode(index_of(keys, seed))), index_of(keys, seed))

    def test_it_is_compact(self) -> None:
        keys = [os.urandom(36) for _ in range(10_000)]
        assert len(encode(index_of(keys))) < 10_000 * 70

    def test_no_byte_may_be_another(self) -> None:
        data = encode(SOME)
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 1 << at % 8
            with pytest.raises(IndexRefusedError):
                decode(bytes(damaged))

    def test_no_byte_may_be_missing(self) -> None:
        data = encode(SOME)
        for size in range(len(data)):
            with pytest.raises(IndexRefusedError, match=r"cut off|bytes instead of"):
                decode(data[:size])
        with pytest.raises(IndexRefusedError, match="bytes instead of"):
            decode(data + b"x")

    def test_another_format_is_named(self) -> None:
        data = bytearray(encode(SOME))
        data[8] = 7
        with pytest.raises(IndexRefusedError, match="format 7; this kvheap reads format 1"):
            decode(bytes(data))
        with pytest.raises(IndexRefusedError, match=r"no index of kvheap: it begins with b'PK"):
            decode(b"PK\3\4" + bytes(100))

    @pytest.mark.parametrize("seed", range(60))
    def test_wrong_contents_with_a_right_checksum(self, seed: int) -> None:
        """Whatever the description says, nothing but a refusal comes of it."""
        source, data = random.Random(seed), encode(SOME)
        body = bytearray(data[:-CHECKSUM_BYTES])
        for _ in range(source.randint(1, 4)):
            body[source.randrange(24, 300)] = source.choice(b'09{}[]":,x\xff')
        checksum = blake2b(body, digest_size=CHECKSUM_BYTES).digest()
        try:
            found = decode(bytes(body) + checksum)
        except IndexRefusedError:
            return
        assert len(found.records.keys) == len(found.records.addresses)


class TestFile:
    def test_what_was_written_is_read_and_removed(self, tmp_path: Path) -> None:
        path = tmp_path / "index"
        file = IndexFile(str(path))
        assert file.read() is None
        file.write(encode(SOME))
        data = file.read()
        assert data is not None
        require_equal(decode(data), SOME)
        assert path.stat().st_mode & 0o777 == 0o600
        file.remove()
        file.remove()
        assert file.read() is None
        file.close()
        file.close()
        assert os.listdir(tmp_path) == []

    def test_what_is_no_index_is_not_read_into_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "index"
        with path.open("wb") as large:
            large.truncate(1 << 40)
        file = IndexFile(str(path))
        with pytest.raises(IndexRefusedError, match="no index of kvheap"):
            file.read()
        with path.open("r+b") as large:
            large.write(encode(SOME))
        with pytest.raises(IndexRefusedError, match="1099511627776 bytes instead of"):
            file.read()

    @pytest.mark.parametrize("size", [0, 5, 8, 100])
    def test_what_is_left_of_an_index_is_removed(self, tmp_path: Path, size: int) -> None:
        (tmp_path / "index").write_bytes(encode(SOME)[:size])
        file = IndexFile(str(tmp_path / "index"))
        file.remove()
        file.close()
        assert os.listdir(tmp_path) == []

    def test_what_may_be_somebodys_work_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_bytes(b"kvheap is a heap")
        file = IndexFile(str(tmp_path / "notes.txt"))
        file.remove()
        file.write(encode(SOME))
        file.close()
        assert (tmp_path / "notes.txt.refused").read_bytes() == b"kvheap is a heap"
        assert sorted(os.listdir(tmp_path)) == ["notes.txt", "notes.txt.refused"]

    @pytest.mark.parametrize("step", ["open", "fsync", "replace"])
    def test_a_write_that_fails_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        path = tmp_path / "index"
        file = IndexFile(str(path))
        file.write(b"before")

        def fail(*args: object, **options: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(index_file.os, step, fail)
            with pytest.raises(OSError, match="No space left"):
                file.write(b"after")
        assert path.read_bytes() == b"before"
        assert sorted(os.listdir(tmp_path)) == ["index", "index.lock"]

    def test_what_a_killed_process_left_is_removed(self, tmp_path: Path) -> None:
        (tmp_path / "index.new").write_bytes(b"half")
        file = IndexFile(str(tmp_path / "index"))
        assert os.listdir(tmp_path) == ["index.lock"]
        file.close()

    def test_one_engine_at_a_time(self, tmp_path: Path) -> None:
        path = str(tmp_path / "index")
        file = IndexFile(path)
        with pytest.raises(BlockingIOError, match=r"\['index_path'\] is used by another engine"):
            IndexFile(path)
        file.close()
        IndexFile(path).close()
        dropped = IndexFile(path)
        del dropped
        IndexFile(path).close()

    def test_a_lock_ends_with_its_process(self, tmp_path: Path) -> None:
        path = str(tmp_path / "index")
        script = (
            "import os, signal, sys; from kvheap.integrations.vllm.index_file import IndexFile; "
            "file = IndexFile(sys.argv[1]); print('locked', flush=True); "
            "sys.stdin.read(1); os.kill(os.getpid(), signal.SIGKILL)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdin is not None
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(BlockingIOError):
                IndexFile(path)
            other.stdin.write(b"x")
            other.stdin.close()
            other.wait()
        IndexFile(path).close()

    def test_a_fork_does_not_end_it(self, tmp_path: Path) -> None:
        path = str(tmp_path / "index")
        file = IndexFile(path)
        pid = os.fork()
        if not pid:
            file.close()
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(BlockingIOError):
            IndexFile(path)
        file.close()

    def test_a_place_that_cannot_be_written_to_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match=r"\['index_path'\] must be the path of a file"):
            IndexFile(str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"\['index_path'\]: cannot write to .*none"):
            IndexFile(str(tmp_path / "none" / "index"))
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(NotADirectoryError, match=r"\['index_path'\]"):
            IndexFile(str(tmp_path / "file" / "index"))
        with pytest.raises(OSError, match=r"\['index_path'\]"):
            IndexFile("/proc/index")
