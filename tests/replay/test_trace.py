"""Traces: what is read, what is refused and how, and what made-up traffic looks like."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from kvheap.replay import compression, trace
from kvheap.replay.trace import (
    CHUNK_TOKENS,
    Request,
    TraceError,
    infer_chunk_tokens,
    read_trace,
    synthetic_trace,
)

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
COMPRESSORS = (gzip, bz2, lzma)
RECORD = {"timestamp": 7, "input_length": 900, "output_length": 52, "hash_ids": [46, 47]}


def trace_of(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_request_keeps_what_its_line_says(tmp_path: Path) -> None:
    ids = [0, -(1 << 63), (1 << 63) - 1]
    path = trace_of(tmp_path, RECORD, {**RECORD, "hash_ids": ids, "more": "ignored"})
    assert read_trace(path) == [Request(7, 900, 52, (46, 47)), Request(7, 900, 52, tuple(ids))]


def test_a_last_line_needs_no_newline_and_a_prompt_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({**RECORD, "input_length": 0, "hash_ids": []}))
    assert read_trace(path) == [Request(7, 0, 52, ())]


def test_the_limit_stops_before_what_lies_behind_it(tmp_path: Path) -> None:
    path = trace_of(tmp_path, RECORD, RECORD, "no request")
    assert len(read_trace(path, limit=2)) == 2
    with pytest.raises(TraceError):
        read_trace(path, limit=3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"timestamp": None}, "timestamp must be a number, got null"),
        ({"timestamp": "7"}, 'timestamp must be a number, got "7"'),
        ({"timestamp": True}, "timestamp must be a number, got true"),
        ({"timestamp": float("nan")}, "timestamp must be a number, got NaN"),
        ({"timestamp": float("inf")}, "timestamp must be a number, got Infinity"),
        ({"timestamp": -0.5}, "timestamp must be non-negative, got -0.5"),
        ({"timestamp": 1e19}, "timestamp must be a 64-bit number of ms, got 1e+19"),
        ({"timestamp": 1 << 63}, "timestamp must be a 64-bit integer, got 9223372036854775808"),
        ({"timestamp": 1e306, "chat_id": 1}, "timestamp must be a 64-bit number of ms, got 1e+306"),
        ({"timestamp": 1e300}, "timestamp must be a 64-bit number of ms, got 1e+300"),
        ({"input_length": -1}, "input_length must be non-negative, got -1"),
        ({"output_length": True}, "output_length must be an integer, got true"),
        ({"output_length": "52"}, 'output_length must be an integer, got "52"'),
        ({"hash_ids": "46"}, 'hash_ids must be a list, got "46"'),
        ({"hash_ids": {"46": 47}}, 'hash_ids must be a list, got {"46": 47}'),
        ({"hash_ids": [1, False]}, "hash_ids must be 64-bit integers, got false"),
        ({"hash_ids": [[1]]}, "hash_ids must be 64-bit integers, got [1]"),
        ({"hash_ids": [-(1 << 63) - 1]}, "got -9223372036854775809"),
        ({"hash_ids": [1 << 64]}, "got 18446744073709551616"),
        (
            {"hash_ids": [-1, 1 << 63]},
            "must be signed or unsigned, not both: -1 and 92233720368547",
        ),
        ({"hash_ids": ["long" * 50]}, 'got "' + "long" * 9 + "..."),
    ],
)
def test_a_wrong_value_is_shown(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = trace_of(tmp_path, RECORD, RECORD, {**RECORD, **change})
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert (caught.value.path, caught.value.line_number) == (path, 3)
    assert reason in caught.value.reason
    assert str(caught.value) == f"{path}, line 3: {caught.value.reason}"


@pytest.mark.parametrize("key", ["input_length", "output_length", "hash_ids"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    record = {name: value for name, value in RECORD.items() if name != key}
    with pytest.raises(TraceError, match=f"line 1: {key} is missing"):
        read_trace(trace_of(tmp_path, record))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "not JSON"),
        (b'{"timestamp": 1', "not JSON: .* at column"),
        (b'{"timestamp": "\xff"}', "not UTF-8"),
        (b"null", "not an object but null"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"timestamp": 1' + b"0" * 5000 + b"}", "line 1: "),
    ],
)
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(TraceError, match=reason):
        read_trace(path)


class TestWhatOthersWrite:
    def test_rows_of_qwen_bailian(self, tmp_path: Path) -> None:
        more = {"chat_id": 159, "parent_chat_id": -1, "type": "text", "turn": 1}
        row = {"input_length": 40, "output_length": 5, "hash_ids": [1089, 1090, 6326]}
        rows = [{**more, "timestamp": at, **row} for at in (61, 61.114, 62.5)]
        requests = read_trace(trace_of(tmp_path, *rows))
        assert [request.timestamp_ms for request in requests] == [61_000, 61_114, 62_500]
        assert requests[0] == Request(61_000, 40, 5, (1089, 1090, 6326))
        assert infer_chunk_tokens(requests) == 16

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ([0, 3000], [0, 3000]),
            ([0.0, 3000.0], [0, 3000]),
            ([0.0, 61.114], [0, 61_114]),
            ([5, 7.25, 9], [5000, 7250, 9000]),
            ([7, None, 9, None], [7, 7, 9, 9]),
            ([None, None], [0, 0]),
            ([None, 1.5, None], [0, 1500, 1500]),
        ],
    )
    def test_timestamps(
        self, tmp_path: Path, given: list[float | None], expected: list[int]
    ) -> None:
        rows = []
        for at in given:
            row = {**RECORD, "timestamp": at}
            if at is None:
                del row["timestamp"]
            rows.append(row)
        requests = read_trace(trace_of(tmp_path, *rows))
        assert [request.timestamp_ms for request in requests] == expected
        assert all(type(request.timestamp_ms) is int for request in requests)

    @pytest.mark.parametrize("huge", [1.7e308, 1e306, 9.3e15, 1 << 62])
    def test_a_timestamp_whose_milliseconds_are_too_many(self, tmp_path: Path, huge: float) -> None:
        rows = [{**RECORD, "timestamp": 0.5}, {**RECORD, "timestamp": huge}]
        with pytest.raises(TraceError, match="line 2: timestamp must be a 64-bit number of ms"):
            read_trace(trace_of(tmp_path, *rows))

    def test_unsigned_ids_keep_their_bits_and_stay_apart(self, tmp_path: Path) -> None:
        ids = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
        (request,) = read_trace(trace_of(tmp_path, {**RECORD, "hash_ids": ids}))
        assert [each % (1 << 64) for each in request.hash_ids] == ids
        assert all(-(1 << 63) <= each < 1 << 63 for each in request.hash_ids)
        path = trace_of(
            tmp_path, {**RECORD, "hash_ids": [1 << 63]}, RECORD, {**RECORD, "hash_ids": [-5]}
        )
        with pytest.raises(TraceError, match="line 3: hash_ids must be signed or unsigned"):
            read_trace(path)

    @pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n", " \n\t\n", ""])
    def test_blank_lines(self, tmp_path: Path, end: str) -> None:
        path = tmp_path / "trace.jsonl"
        line = json.dumps(RECORD)
        path.write_bytes(f"{line}\n\n{line}{end}".encode())
        assert len(read_trace(path)) == 2
        assert len(read_trace(path, limit=1)) == 1
        path.write_bytes(f"{line}\n\nnothing{end}".encode())
        with pytest.raises(TraceError, match="line 3: not JSON"):
            read_trace(path)

    def test_gzip_by_its_contents_and_not_its_name(self, tmp_path: Path) -> None:
        text = (json.dumps(RECORD) + "\n").encode() * 100
        path = tmp_path / "trace.jsonl"
        path.write_bytes(gzip.compress(text))
        assert len(read_trace(path)) == 100
        assert len(read_trace(path, limit=7)) == 7
        plain = tmp_path / "trace.jsonl.gz"
        plain.write_bytes(text)
        assert len(read_trace(plain)) == 100

    @pytest.mark.parametrize("is_gzip", [False, True])
    def test_a_pipe_is_read_once(self, tmp_path: Path, is_gzip: bool) -> None:
        text = (json.dumps(RECORD) + "\n").encode() * 300
        path = tmp_path / "pipe"
        os.mkfifo(path)
        sent = gzip.compress(text) if is_gzip else text
        writer = threading.Thread(target=path.write_bytes, args=(sent,), daemon=True)
        writer.start()
        assert len(read_trace(path)) == 300
        writer.join(10)
        assert not writer.is_alive()

    @pytest.mark.parametrize("cut", [5, 30, -9, -3])
    def test_damaged_gzip(self, tmp_path: Path, cut: int) -> None:
        whole = gzip.compress(
            b"".join(json.dumps({**RECORD, "n": n}).encode() + b"\n" for n in range(500))
        )
        path = tmp_path / "trace.jsonl.gz"
        path.write_bytes(whole[:cut])
        with pytest.raises(TraceError, match=r"line \d+: the gzip file is damaged"):
            read_trace(path)
        broken = bytearray(whole)
        broken[len(whole) // 2] ^= 0xFF
        path.write_bytes(broken)
        with pytest.raises(TraceError, match=r"line \d+: "):
            read_trace(path)

    @pytest.mark.parametrize("module", COMPRESSORS, ids=lambda module: module.__name__)
    def test_streams_one_after_another_and_zeros_between(self, tmp_path: Path, module: Any) -> None:
        lines = [json.dumps({**RECORD, "n": n}).encode() + b"\n" for n in range(3000)]
        whole = module.compress(b"".join(lines))
        half = module.compress(b"".join(lines[:7])[:-30])
        rest = module.compress(b"".join(lines[:7])[-30:])
        path = tmp_path / "trace"
        for contents, count in (
            (whole, 3000),
            (whole + whole, 6000),
            (half + rest, 7),
            (whole + bytes(64), 3000),
            (whole + bytes(64) + half + rest, 3007),
            (module.compress(b"") + half + rest, 7),
        ):
            path.write_bytes(contents)
            assert len(read_trace(path)) == count
        assert len(read_trace(str(path), limit=3)) == 3

    @pytest.mark.parametrize("module", COMPRESSORS, ids=lambda module: module.__name__)
    def test_a_damaged_file_says_so(self, tmp_path: Path, module: Any) -> None:
        text = "".join(json.dumps({**RECORD, "n": n}) + "\n" for n in range(5000))
        whole = module.compress(text.encode())
        path = tmp_path / "trace"
        for contents in (whole[:8], whole[:-3], whole + b"garbage" * 9):
            path.write_bytes(contents)
            with pytest.raises(TraceError, match=r"line \d+: the (gzip|bzip2|xz) file is damaged"):
                read_trace(path)
        for at in range(12, len(whole), len(whole) // 40):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            with pytest.raises(TraceError, match=r"line \d+: "):
                read_trace(path)

    @pytest.mark.parametrize("module", COMPRESSORS, ids=lambda module: module.__name__)
    def test_few_bytes_do_not_fill_the_memory(
        self, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "trace"
        path.write_bytes(module.compress(b"0" * (16 << 20)))
        monkeypatch.setattr(trace, "MAX_LINE_BYTES", 1 << 20)
        tracemalloc.start()
        with pytest.raises(TraceError, match="line 1: longer than 1048576 bytes"):
            read_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 << 20
        monkeypatch.setattr(compression, "SMALL_BYTES", 1 << 19)
        path.write_bytes(module.compress((json.dumps(RECORD) + "\n").encode() * 15_000))
        with pytest.raises(
            TraceError, match=r"\d+ bytes of \w+ decompress to more than [5-9]\d{5},"
        ):
            read_trace(path)
        assert len(read_trace(path, limit=100)) == 100
        monkeypatch.setattr(compression, "MAX_GROWTH", 1 << 20)
        assert len(read_trace(path)) == 15_000

    def test_a_dictionary_of_xz_is_bounded(self, tmp_path: Path) -> None:
        text = (json.dumps(RECORD) + "\n").encode()
        path = tmp_path / "trace"
        for dictionary, is_read in ((64 << 20, True), (1 << 30, False)):
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": dictionary}]
            path.write_bytes(lzma.compress(text, filters=filters))
            if is_read:
                assert len(read_trace(path)) == 1
            else:
                with pytest.raises(TraceError, match="line 1: the xz file is damaged: Memory"):
                    read_trace(path)

    @pytest.mark.parametrize(
        ("magic", "kind"),
        [
            ("28b52ffd", "zstd"),
            ("522a4d18", "zstd"),
            ("04224d18", "lz4"),
            ("4c5a4950", "lzip"),
            ("1f9d", "compress"),
            ("5d000080", "lzma"),
            ("504b0304", "zip"),
            ("377abcaf271c", "7z"),
        ],
    )
    def test_other_compressions_are_named(self, tmp_path: Path, magic: str, kind: str) -> None:
        path = tmp_path / "trace.jsonl"
        path.write_bytes(bytes.fromhex(magic) + b"\x04\x00" * 20)
        message = f"line 1: a file compressed by {kind}: decompress it first, with .* trace.jsonl"
        with pytest.raises(TraceError, match=message):
            read_trace(path)

    def test_a_python_without_a_library(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "trace"
        path.write_bytes(lzma.compress(json.dumps(RECORD).encode()))
        monkeypatch.setitem(sys.modules, "lzma", None)
        with pytest.raises(TraceError, match="line 1: a file compressed by xz, which this Python"):
            read_trace(path)

    @pytest.mark.parametrize("tokens", [1, 16, 64, 128, 256, 512, 1024, 4096])
    @pytest.mark.parametrize("whole_only", [False, True])
    def test_the_tokens_of_a_chunk(self, tokens: int, whole_only: bool) -> None:
        def ids(length: int) -> tuple[int, ...]:
            return tuple(range(length // tokens if whole_only else -(-length // tokens)))

        lengths = [5000, 9216, 12_345, 100, 65_537, 4097, 8191]
        requests = [Request(0, length, 1, ids(length)) for length in lengths]
        assert infer_chunk_tokens(requests) == tokens

    def test_lengths_that_say_nothing(self) -> None:
        assert infer_chunk_tokens([]) == CHUNK_TOKENS
        assert infer_chunk_tokens([Request(0, 900, 1, ()), Request(0, 0, 1, (3,))]) == CHUNK_TOKENS
        assert infer_chunk_tokens([Request(0, 900, 1, (1, 2))]) == CHUNK_TOKENS
        odd = [Request(0, 900, 1, (1, 2)), Request(0, 900, 1, (1,))]
        assert infer_chunk_tokens(odd) == CHUNK_TOKENS


def test_the_error_survives_a_process_pool() -> None:
    error = TraceError(Path("a"), 3, "odd")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.line_number, copy.reason) == (Path("a"), 3, "odd")


class TestMadeUpTraffic:
    def test_the_seed_decides(self) -> None:
        assert synthetic_trace(200, seed=3) == synthetic_trace(200, seed=3)
        assert synthetic_trace(200, seed=3) != synthetic_trace(200, seed=4)

    def test_a_shorter_trace_is_the_beginning_of_a_longer_one(self) -> None:
        assert synthetic_trace(100) == synthetic_trace(300)[:100]
        assert synthetic_trace(0) == []

    def test_it_is_a_trace(self) -> None:
        requests = synthetic_trace(1000)
        times = [request.timestamp_ms for request in requests]
        assert times == sorted(times)
        for request in requests:
            assert len(set(request.hash_ids)) == len(request.hash_ids)
            assert request.input_length == len(request.hash_ids) * CHUNK_TOKENS
            assert request.output_length > 0

    def test_an_id_always_follows_the_same_prefix(self) -> None:
        prefix_of: dict[int, tuple[int, ...]] = {}
        for request in synthetic_trace(1000):
            for position, hash_id in enumerate(request.hash_ids):
                prefix = request.hash_ids[:position]
                assert prefix_of.setdefault(hash_id, prefix) == prefix

    def test_conversations_share_system_prompts_and_grow(self) -> None:
        requests = synthetic_trace(1000)
        earlier: set[tuple[int, ...]] = set()
        continued = 0
        for request in requests:
            prefixes = {request.hash_ids[:end] for end in range(1, len(request.hash_ids))}
            continued += bool(prefixes & earlier)
            earlier.add(request.hash_ids)
        assert 600 < continued < 900
        assert len({request.hash_ids[0] for request in requests}) == 16


@pytest.mark.skipif(not TRACE.exists(), reason="needs the conversation trace beside the checkout")
def test_the_conversation_trace_is_what_its_publisher_says() -> None:
    requests = read_trace(TRACE)
    assert len(requests) == 12_031
    assert sum(len(request.hash_ids) for request in requests) == 288_500
    assert len({hash_id for request in requests for hash_id in request.hash_ids}) == 182_790
