"""Traces: what is read, what is refused and how, and what made-up traffic looks like."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from kvheap.replay.trace import CHUNK_TOKENS, Request, TraceError, read_trace, synthetic_trace

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
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
        ({"timestamp": 1.0}, "timestamp must be an integer, got 1.0"),
        ({"timestamp": None}, "timestamp must be an integer, got null"),
        ({"timestamp": 1 << 63}, "timestamp must be a 64-bit integer, got 9223372036854775808"),
        ({"input_length": -1}, "input_length must be non-negative, got -1"),
        ({"output_length": True}, "output_length must be an integer, got true"),
        ({"output_length": "52"}, 'output_length must be an integer, got "52"'),
        ({"hash_ids": "46"}, 'hash_ids must be a list, got "46"'),
        ({"hash_ids": {"46": 47}}, 'hash_ids must be a list, got {"46": 47}'),
        ({"hash_ids": [1, False]}, "hash_ids must be 64-bit integers, got false"),
        ({"hash_ids": [[1]]}, "hash_ids must be 64-bit integers, got [1]"),
        ({"hash_ids": [-(1 << 63) - 1]}, "got -9223372036854775809"),
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


@pytest.mark.parametrize("key", RECORD)
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
